"""ExaBGP as a speaker that is told what should be: sessions and announcements.

``configure`` and ``advertise`` say what is wanted; ``step`` does what is due to get there, and
is called whenever something happened or ``next_due`` has come. What ExaBGP does by itself it
goes on doing while nobody looks after it: an agent that starts adopts the one that runs.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from api.net import Net, format_address
from bird_glue.announcement import Announcements
from bird_glue.announcer import Announcer
from bird_glue.channel import Channel, FromRelay
from bird_glue.config import Listen, environment, listening
from bird_glue.configfile import ConfigurationFile, NotLoadedError
from bird_glue.dialogue import Dialogue
from bird_glue.engine import EXABGP, EngineEvent, Intent, LearnedPath, Report, Restarted
from bird_glue.messages import Answer, Hello, Live, Malformed, Text
from bird_glue.process import ExaBgp
from reconcile.backoff import Backoff

_log = logging.getLogger(__name__)

_RELAY_SECONDS = 15.0  # for ExaBGP to start its child
_POLL_SECONDS = 0.05
_HEALTHY_SECONDS = 30.0  # an ExaBGP that ran for so long starts the back-off anew
_DRAIN_SECONDS = 3.0
_STOP_SECONDS = 3.0
_LAST_WORDS = 3  # lines
_BFD_DOWN = 10  # subcode of Cease


class Speaker:
    """The engine ExaBGP, its files in ``run_dir``. ``sink`` gets FromRelay, for ``handle``."""

    name = EXABGP
    programs = False

    def __init__(self, run_dir: Path, sink: Callable[[FromRelay], object]) -> None:
        self._run_dir = run_dir
        self._sink = sink
        self._socket = run_dir / "exabgp.sock"
        self._file = ConfigurationFile(run_dir, self._socket)
        self._announcer = Announcer()
        self._listen: Listen | None = None
        self._process: ExaBgp | None = None
        self._started = 0.0
        self._backoff: Backoff[str] = Backoff(0.1, 10.0)
        self._channel: Channel | None = None
        self._dialogue: Dialogue | None = None
        self._live = False
        self._drain_until: float | None = None
        self._leaving = False
        self._problem = ""

    @property
    def problem(self) -> str:
        """Why ExaBGP ended, while it doesn't run again as it should; else empty."""
        return "" if self._live else self._problem

    @property
    def rejected(self) -> Mapping[Net, str]:
        """Sessions that ExaBGP refuses to be configured with, and what it says."""
        return self._file.rejected

    @property
    def pid(self) -> int | None:
        """The process id of ExaBGP."""
        return self._process.pid if self._process else None

    @property
    def left(self) -> bool:
        """After ``leave``: whether no peer has anything of ours any more."""
        known = self._live or self._process is None
        return known and not self._announcer.knowing()

    def sent(self, peer: Net) -> int:
        """How many prefixes a peer was sent and has not had withdrawn."""
        return self._announcer.sent(peer)

    def intended(self, peer: Net) -> int:
        """How many prefixes a peer should be sent."""
        return self._announcer.intended(peer)

    def adrift(self, peer: Net) -> int:
        """How many prefixes a peer has not been sent as it should, when it was compared last."""
        return self._announcer.adrift(peer)

    def adopt(self, now: float) -> None:
        """Find the ExaBGP that an earlier agent started. Raises OSError."""
        self._process = ExaBgp.find(self._run_dir)
        self._started = now
        self._file.found()
        if self._process:
            _log.info("found ExaBGP running, process %d", self._process.pid)

    def configure(self, intent: Intent) -> None:
        """What sessions there should be."""
        self._listen = intent.listen
        self._file.want(intent.neighbors)

    def advertise(self, wanted: Mapping[Net, Announcements], *, mark_end: bool) -> None:
        """What each peer should be told.

        ``mark_end``: whether that is all, so that peers may forget what isn't in it.
        """
        if not self._leaving:
            fronts = {
                address: neighbor.local_as if neighbor.external else None
                for address, neighbor in self._file.neighbors.items()
            }
            extended = {
                address: neighbor.local
                for address, neighbor in self._file.neighbors.items()
                if neighbor.extended_next_hop
            }
            self._announcer.want(wanted, fronts, extended, mark_end=mark_end)

    @property
    def recovering(self) -> bool:
        """No: of what was learned the RIB is kept here."""
        return False

    def report(self) -> Mapping[Net, Report]:
        """Empty: events tell."""
        return {}

    def learned(self) -> list[LearnedPath]:
        """Empty: the RIB knows."""
        return []

    def fail(self, peer: Net, why: str) -> None:
        """Hang up on a peer that is dead: ``Cease / BFD Down`` (RFC 9384), to nobody probably."""
        if self._dialogue:
            self._dialogue.ask(f"neighbor {format_address(*peer[:2])} teardown {_BFD_DOWN}")

    def leave(self) -> None:
        """Take back all that was announced; see ``left``."""
        self._leaving = True
        self._announcer.want({}, {}, {}, mark_end=False)

    def handle(self, message: FromRelay, now: float) -> list[EngineEvent]:
        """Take in what came; returns what it says about sessions."""
        if message.channel is not self._channel:
            return []
        found: list[EngineEvent] = []
        for event in message.events:
            match event:
                case Hello(pid=pid) if pid != self.pid:
                    break  # the relay of an ExaBGP that is gone; it will soon be, too
                case Hello():
                    self._dialogue = Dialogue(message.channel, event.unanswered, now)
                    self._announcer.hello(event)
                case Live():
                    self._live = True
                case Answer() | Text():
                    if self._dialogue:
                        self._dialogue.heard(event, now)
                case Malformed():
                    pass
                case _:
                    self._announcer.note(event)
                    found.append(event)
        if self._dialogue is None:
            self._channel.close()
            self._channel = None
        elif message.closed:
            # without its child ExaBGP is deaf: start both again
            ended = self._process is not None and self._process.ended()
            found += self._end("it has ended" if ended else "its relay is gone", now)
        return found

    def step(self, now: float) -> list[EngineEvent]:
        """Do what is due. Returns what became of sessions by it."""
        found = self._supervise(now)
        if not (self._live and self._dialogue):
            return found
        try:
            everyone = self._file.accepted if self._file.settled else ()
            self._announcer.step(self._dialogue, now, everyone)
            self._file.step(self._dialogue, now)
            if self._file.settled or self._leaving:
                self._drain_until = None
            elif self._file.stale(now) and self._drained(now):
                self._file.load(self._dialogue, now)
            self._dialogue.pump(now)
        except (OSError, NotLoadedError) as error:
            found += self._end(str(error), now)
        return found

    def next_due(self, now: float) -> float | None:
        """When to call ``step`` though nothing happens; None: no need."""
        if self._process is None:
            return self._backoff.next_due() if self._file.neighbors else None
        waiting = self._leaving or self._drain_until is not None
        if waiting or not self._live or self._dialogue is None:
            return now + _POLL_SECONDS
        due = (self._dialogue.next_due(), self._announcer.next_due(), self._file.next_due())
        return min(time for time in due if time is not None)

    def abandon(self) -> None:
        """End ExaBGP as if it had crashed."""
        if self._process:
            self._process.signal(signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """End ExaBGP. Peers that know graceful restart keep what was not withdrawn."""
        if self._process:
            self._process.stop(_STOP_SECONDS)
        self.close()

    def close(self) -> None:
        """Let go of ExaBGP, which goes on."""
        self._hang_up()
        if self._process:
            self._process.close()
            self._process = None

    def _supervise(self, now: float) -> list[EngineEvent]:
        if self._leaving:  # what peers were told is to be known, so that it can be taken back
            return self._connect(now) if self._process and self._channel is None else []
        if self._listen is None:
            return []
        if self._process is None:
            if self._file.neighbors and (self._backoff.next_due() or 0.0) <= now:
                self._start(self._listen, now)
            return []
        if self._process.ended():
            return self._end("it has ended", now)
        if listening(self._process.variables()) != self._listen:
            return self._end("it is to listen elsewhere", now)
        if self._dialogue and self._dialogue.stuck(now):
            return self._end("it does not answer", now)
        if self._channel is None:
            return self._connect(now)
        return []

    def _start(self, listen: Listen, now: float) -> None:
        try:
            self._file.write(check=self._backoff.next_due() is not None)
            variables = environment(listen, self._run_dir / "exabgp.log")
            self._process = ExaBgp.start(self._run_dir, self._file.path, variables)
        except OSError as error:
            self._backoff.failed("start", now)
            self._problem = f"can't start ExaBGP: {error}"
            _log.error("%s", self._problem)
            return
        self._started = now
        _log.info("started ExaBGP, process %d", self._process.pid)

    def _end(self, why: str, now: float) -> list[EngineEvent]:
        """ExaBGP is gone, or no good any more: see that it is gone, and forget it."""
        if self._process is None:
            return []
        self._problem = f"ExaBGP, process {self._process.pid}: {why}"
        if self._process.ended() and (words := self._last_words()):
            self._problem += f": {words}"
        _log.warning("%s; starting it again", self._problem)
        if now - self._started > _HEALTHY_SECONDS:
            self._backoff.succeeded("start")
        else:
            self._backoff.failed("start", now)
        self.abandon()
        return [Restarted()]

    def _last_words(self) -> str:
        """What ExaBGP said before it ended: a traceback, or the end of its log."""
        for name in ("exabgp.out", "exabgp.log"):
            path = self._run_dir / name
            text = path.read_text(errors="replace") if path.exists() else ""
            lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
            if lines:
                return "; ".join(lines[-_LAST_WORDS:])
        return ""

    def _connect(self, now: float) -> list[EngineEvent]:
        try:
            self._channel = Channel(self._socket, self._sink)
        except OSError as error:
            if now - self._started > _RELAY_SECONDS:
                return self._end(f"its relay doesn't listen: {error}", now)
            return []
        self._channel.start()
        return []

    def _hang_up(self) -> None:
        if self._channel:
            self._channel.close()
        self._channel = self._dialogue = None
        self._live = False
        self._drain_until = None
        self._announcer.forget()
        self._file.found()

    def _drained(self, now: float) -> bool:
        """Whether peers that are to go have had everything withdrawn, or time is up.

        Else they would keep our routes for as long as we asked them to wait for us.
        """
        going = self._announcer.knowing() - self._file.neighbors.keys()
        if not going or (self._drain_until is not None and now > self._drain_until):
            self._drain_until = None
            return True
        if self._drain_until is None:
            self._drain_until = now + _DRAIN_SECONDS
        return False
