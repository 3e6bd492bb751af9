"""BIRD as an engine: told what should be by a configuration file, it does the rest by itself.

It selects routes, resolves next hops, writes the kernel (protocol ``bird``, the metric of
learned routes), reflects, and restarts gracefully. A change to one peer is a change to one
protocol in the file; ``birdc configure`` leaves the others alone.
"""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path

from api.net import V4, V6, Net
from bird_glue.announcement import Announcements
from bird_glue.bird_config import kernel_metrics, protocol_name, render
from bird_glue.bird_routes import parse_learned, parse_routes, why_filtered
from bird_glue.bird_status import ProtocolStatus, error_in_words, parse_protocols
from bird_glue.birdc import Birdc, BirdError, Line, RefusedError
from bird_glue.channel import FromRelay
from bird_glue.config import Neighbor
from bird_glue.engine import (
    BIRD,
    EngineEvent,
    Intent,
    LearnedPath,
    Report,
    Restarted,
    TooMany,
)
from bird_glue.process import Bird
from reconcile.backoff import Backoff

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05  # while it starts
_WATCH_SECONDS = 0.5  # between two looks whether it lives
_PAUSE_SECONDS = 0.3  # between two configurations; what changes meanwhile is loaded together
_START_SECONDS = 10.0
_HEALTHY_SECONDS = 30.0  # one that ran for so long starts the back-off anew
_PROVEN_SECONDS = 5.0  # one that ends earlier has not worked
_MOST_FAILURES = 3  # in a row, until the other engine is taken
_STOP_SECONDS = 3.0
_CHECK_SECONDS = 30.0
_LIMITS_SECONDS = 1.0  # between two looks for peers that told too much
_AUDIT_SECONDS = 10.0
_OVER = "Route limit exceeded"  # in BIRD's words
_FRESH_SECONDS = 0.2  # that an answer about sessions counts for
_LAST_WORDS = 3  # lines
_REFUSED = "refused by a rule of this node or a BGPFilter"
_EXPLAINED = 1000  # prefixes of a peer that are refused, at most


class BirdEngine:
    """The engine BIRD, its files in ``run_dir``.

    ``former_metrics``: IP version and metric of the routes it wrote for an earlier agent.
    """

    name = BIRD
    programs = True

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / "bird.conf"
        self._socket = run_dir / "bird.ctl"
        self._process: Bird | None = None
        self._birdc: Birdc | None = None
        self._intent: Intent | None = None
        self._wanted: Mapping[Net, Announcements] = {}
        self._advertised = False  # what is wanted is known: until then what runs stays
        self._stale = False  # it runs on something else than is wanted
        self._next = 0.0
        self._started = 0.0
        self._backoff: Backoff[str] = Backoff(0.1, 10.0)
        self._failures = 0
        self._rejected: dict[Net, str] = {}
        self._leaving = False
        self._dead: dict[Net, str] = {}  # those that have not come back, and why
        self._problem = ""
        self._seen: dict[str, ProtocolStatus] = {}
        self._seen_at = 0.0
        self._limits_at = 0.0
        self._audit_at = 0.0
        self._suspect: Set[Net] = frozenset()  # peers not told all, when it was compared last
        self._adrift: dict[Net, int] = {}  # nor the time before, and how much
        self.former_metrics: tuple[tuple[int, int], ...] = ()

    @property
    def problem(self) -> str:
        """Why BIRD doesn't do what it should; else empty."""
        return self._problem

    @property
    def rejected(self) -> Mapping[Net, str]:
        """Sessions that BIRD refuses to be configured with, and what it says."""
        return self._rejected

    @property
    def pid(self) -> int | None:
        """The process id of BIRD."""
        return self._process.pid if self._process else None

    @property
    def left(self) -> bool:
        """After ``leave``: whether all sessions have ended."""
        return self._birdc is None or all(found.state == "Idle" for found in self._look().values())

    @property
    def recovering(self) -> bool:
        """Whether routes of an earlier run are kept until peers have told theirs."""
        if self._process and not self._birdc:
            return True
        return any("recovery" in line.lower() for line in self._ask("show status"))

    def adopt(self, now: float) -> None:
        """Find the BIRD that an earlier agent started. Raises OSError."""
        self._process = Bird.find(self._run_dir)
        if self._path.exists():
            self.former_metrics = kernel_metrics(self._path.read_text())
        self._started = now
        self._stale = True  # whatever it runs on
        if self._process:
            _log.info("found BIRD running, process %d", self._process.pid)

    def configure(self, intent: Intent) -> None:
        """What sessions there should be, and their rules."""
        if intent != self._intent:
            before = self._intent.neighbors if self._intent else {}
            for address, neighbor in before.items():
                if neighbor != intent.neighbors.get(address):
                    self._seen.pop(protocol_name(address), None)  # said of other settings
            self._intent = intent
            self._stale = True

    def advertise(self, wanted: Mapping[Net, Announcements], *, mark_end: bool) -> None:
        """What each peer should be told of our own routes; BIRD marks the end by itself."""
        self._advertised = True
        if wanted != self._wanted:
            self._wanted = wanted
            self._stale = True

    def handle(self, message: FromRelay, now: float) -> list[EngineEvent]:
        """Nothing comes from BIRD unasked."""
        return []

    def step(self, now: float) -> list[EngineEvent]:
        """Do what is due: see that it runs, and on what is wanted."""
        intent = self._intent
        if intent is None or not self._advertised or self._leaving:
            return []
        try:
            if self._process is None:
                if intent.neighbors and (self._backoff.next_due() or 0.0) <= now:
                    self._start(intent, now)
                return []
            if self._process.ended():
                return self._end("it has ended", now)
            if self._birdc is None:
                return self._connect(now)
            if self._stale and now >= self._next:
                self._next = now + _PAUSE_SECONDS
                self._load(intent, self._birdc)
            self._audit(intent, now)
            return self._too_many(intent, now)
        except (OSError, RefusedError) as error:
            self._failed(f"BIRD can't be configured: {error}")
            self._failures += self._process is None
            self._backoff.failed("start", now)
            self._next = now + 1.0
        except BirdError as error:
            return self._end(str(error), now)
        return []

    def next_due(self, now: float) -> float | None:
        """When to call ``step`` though nothing happens; None: no need."""
        if self._leaving:
            return now + _POLL_SECONDS
        if self._process is None:
            wanted = self._intent is not None and self._intent.neighbors and self._advertised
            return (self._backoff.next_due() or now) if wanted else None
        if self._birdc is None:
            return now + _POLL_SECONDS
        return max(now, self._next) if self._stale else now + _WATCH_SECONDS

    def sent(self, peer: Net) -> int:
        """How many prefixes a peer was sent and has not had withdrawn."""
        found = self._look().get(protocol_name(peer))
        return found.exported if found else 0

    def intended(self, peer: Net) -> int:
        """How many prefixes of our own a peer should be sent."""
        return len(self._wanted.get(peer, {}))

    def adrift(self, peer: Net) -> int:
        """How many of these a peer has not been sent, when it was compared last."""
        return self._adrift.get(peer, 0)

    def fail(self, peer: Net, why: str) -> None:
        """The peer is dead: end its session, and with it its routes; and try again."""
        self._dead[peer] = why
        self._ask(f"restart {protocol_name(peer)}")
        self._seen_at = 0.0

    def report(self) -> Mapping[Net, Report]:
        """The sessions as BIRD sees them."""
        found = self._look()
        recovering = self.recovering
        reports: dict[Net, Report] = {}
        for address, neighbor in (self._intent.neighbors if self._intent else {}).items():
            name = protocol_name(address)
            if name not in found:
                continue
            seen = found[name]
            up = seen.state == "Established"
            if up:
                self._dead.pop(address, None)
            error = self._dead.get(address) or error_in_words(seen.error, neighbor)
            reports[address] = Report(
                state=seen.state,
                since=seen.since,
                info="" if up else error,
                said=error_in_words(seen.said, neighbor),
                received=seen.imported + seen.filtered,
                used=seen.preferred,
                # until it has recovered nothing of it goes to the kernel
                installed=self._installed(name, neighbor) if up and not recovering else 0,
                refused=self._refused(address, seen),
            )
        return reports

    def learned(self) -> list[LearnedPath]:
        """All that peers told and filters let pass."""
        neighbors = self._intent.neighbors if self._intent else {}
        names = {protocol_name(address): address for address in neighbors}
        lines = [
            line
            for version in (V4, V6)
            for line in self._answer(f"show route table master{version} all where source = RTS_BGP")
        ]
        return [
            LearnedPath(way.net, names[way.protocol], way.next_hop, way.best)
            for way in parse_learned(lines)
            if way.protocol in names
        ]

    def leave(self) -> None:
        """End all sessions, and say so: peers forget our routes at once."""
        self._leaving = True
        self._ask('disable "peer_*"')

    def abandon(self) -> None:
        """End BIRD as if it had crashed."""
        if self._process:
            self._process.signal(signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """End BIRD. Its routes stay in the kernel."""
        if self._process:
            self._process.stop(_STOP_SECONDS)
        self.close()

    def close(self) -> None:
        """Let go of BIRD, which goes on."""
        if self._birdc:
            self._birdc.close()
            self._birdc = None
        if self._process:
            self._process.close()
            self._process = None
        self._stale = True
        self._seen_at = 0.0

    def _start(self, intent: Intent, now: float) -> None:
        # expect routes to be kept where an engine has run since the machine was started
        recover = any((self._run_dir / name).exists() for name in ("bird.pid", "exabgp.pid"))
        self._socket.unlink(missing_ok=True)
        self._write(intent)
        self._process = Bird.start(self._run_dir, self._path, self._socket, recover=recover)
        self._started = now
        self._stale = False
        _log.info("started BIRD, process %d", self._process.pid)

    def _connect(self, now: float) -> list[EngineEvent]:
        try:
            self._birdc = Birdc(self._socket)
        except BirdError as error:
            if now - self._started > _START_SECONDS:
                return self._end(str(error), now)
            return []
        self._problem = ""
        return []

    def _load(self, intent: Intent, birdc: Birdc) -> None:
        """``birdc configure``. Raises BirdError, OSError."""
        self._write(intent)
        birdc.ask("configure")
        self._stale = False
        self._problem = ""

    def refusal(self, intent: Intent) -> str:
        """Why BIRD would not run on this; empty if it would."""
        if self._failures >= _MOST_FAILURES:
            return (
                f"a BIRD that stays up: it ended {self._failures} times in a row: {self._problem}"
            )
        if shutil.which("bird") is None:
            return "BIRD 2 on this machine (Debian package bird2)"
        try:
            self._rendered(intent)
        except OSError as error:
            return f"a BIRD that takes its configuration: {error}"
        return ""

    @property
    def hopeless(self) -> bool:
        """Whether it was started again and again in vain."""
        return self._failures >= _MOST_FAILURES

    def forgive(self) -> None:
        """Forget what was in vain."""
        self._failures = 0

    def _audit(self, intent: Intent, now: float) -> None:
        """Compare what BIRD has of our own routes, and has sent, with what it should.

        Where that differs twice in a row, somebody has changed its state: set it right, once.
        """
        if now < self._audit_at or self._stale or self.recovering:
            return
        self._audit_at = now + _AUDIT_SECONDS
        seen, found = self._look(), dict[Net, int]()
        for address, told in self._wanted.items():
            status = seen.get(protocol_name(address))
            if address in intent.neighbors and status and status.state == "Established":
                # not every peer takes the other IP version's, which BIRD doesn't tell here
                due = sum(net.version == address.version for net in told)
                missing = due - status.exported
                if missing > 0:
                    found[address] = missing
        again = {address: found[address] for address in found.keys() & self._suspect}
        news = again.keys() - self._adrift.keys()
        self._suspect, self._adrift = found.keys(), again
        if news:
            _log.warning("BIRD has not sent %d peers all they should be told", len(news))
            self._ask('enable "own_v*"')
            self._stale = True
            for address in news:
                self._ask(f"reload out {protocol_name(address)}")

    def _too_many(self, intent: Intent, now: float) -> list[EngineEvent]:
        """The peers whose sessions BIRD has ended because they told too much."""
        if not (intent.receive_limit and intent.neighbors) or now < self._limits_at:
            return []
        self._limits_at = now + _LIMITS_SECONDS
        names = {protocol_name(address): address for address in intent.neighbors}
        ended = (line.split()[0] for line in self._ask('show protocols "peer_*"') if _OVER in line)
        return [TooMany(names[name]) for name in ended if name in names]

    def _write(self, intent: Intent) -> None:
        """Put the file in place, less sessions that BIRD would refuse. Raises OSError."""
        text = self._rendered(intent)
        new = self._path.with_suffix(".new")
        _write_private(new, text)
        new.replace(self._path)

    def _rendered(self, intent: Intent) -> str:
        """The file, less sessions that BIRD would refuse. Raises OSError."""
        self._rejected = {}
        text = render(intent, self._wanted, self._run_dir)
        if self._path.exists() and self._path.read_text() == text and self._process:
            return text
        if error := self._error_in(text):
            for address in intent.neighbors:
                alone = _without(intent, intent.neighbors.keys() - {address})
                if why := self._error_in(render(alone, {}, self._run_dir)):
                    self._rejected[address] = why
            text = render(_without(intent, self._rejected.keys()), self._wanted, self._run_dir)
            if error := self._error_in(text):
                raise OSError(error)
        return text

    def _error_in(self, text: str) -> str:
        """What ``bird -p`` says; empty if all is well."""
        path = self._path.with_suffix(".check")
        _write_private(path, text)
        try:
            result = subprocess.run(
                ["bird", "-p", "-c", str(path)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CHECK_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"bird -p -c {path}: {error}") from error
        finally:
            path.unlink()
        if result.returncode == 0:
            return ""
        words = "; ".join(result.stderr.split("\n")[:_LAST_WORDS]).strip("; ")
        return words or f"bird -p ends with {result.returncode}"

    def _end(self, why: str, now: float) -> list[EngineEvent]:
        """BIRD is gone, or no good any more: see that it is gone, and forget it."""
        assert self._process is not None
        problem = f"BIRD, process {self._process.pid}: {why}"
        if self._process.ended() and (words := self._last_words()):
            problem += f": {words}"
        self._failed(problem)
        self._failures = 0 if now - self._started > _PROVEN_SECONDS else self._failures + 1
        if now - self._started > _HEALTHY_SECONDS:
            self._backoff.succeeded("start")
        else:
            self._backoff.failed("start", now)
        self.abandon()
        return [Restarted()]

    def _failed(self, problem: str) -> None:
        if problem != self._problem:
            _log.warning("%s; trying again", problem)
        self._problem = problem

    def _last_words(self) -> str:
        path = self._run_dir / "bird.out"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "; ".join(lines[-_LAST_WORDS:])

    def _ask(self, command: str) -> list[str]:
        """An answer's text, line by line; see ``_answer``."""
        return [line.text for line in self._answer(command)]

    def _answer(self, command: str) -> list[Line]:
        """An answer's lines; empty if there is none, which then is the problem."""
        if self._birdc is None:
            return []
        try:
            return self._birdc.ask(command)
        except RefusedError as error:
            self._failed(f"BIRD: {error}")
        except BirdError as error:
            self._failed(f"BIRD: {error}")
            self._birdc.close()
            self._birdc = None  # ``step`` connects again, or finds out that it has ended
        return []

    def _look(self) -> dict[str, ProtocolStatus]:
        """The sessions by the name of their protocol, as of just now."""
        if not (self._intent and self._intent.neighbors):
            return {}  # to ask for none is an error to BIRD
        now = time.monotonic()
        if now - self._seen_at > _FRESH_SECONDS:
            self._seen_at = now
            found = parse_protocols(self._answer('show protocols all "peer_*"'))
            self._seen = {seen.name: seen.after(self._seen.get(seen.name, seen)) for seen in found}
        return self._seen

    def _refused(self, peer: Net, seen: ProtocolStatus) -> dict[str, int]:
        """Why prefixes of a peer are not used, and how many. Of very many only their number."""
        if not seen.filtered or self._intent is None or self._birdc is None:
            return {}
        if seen.filtered > _EXPLAINED:
            return {_REFUSED: seen.filtered}
        session, guard = self._intent.sessions[peer], self._intent.guard
        routes = parse_routes(self._answer(f"show route filtered all protocol {seen.name}"))
        found = (why_filtered(route, peer, session, guard) or _REFUSED for route in routes)
        return dict(Counter(found))

    def _installed(self, name: str, neighbor: Neighbor) -> int:
        """How many routes of a peer the kernel gets."""
        found = 0
        for version in neighbor.versions:
            answer = self._ask(f"show route count protocol {name} export kernel{version}")
            words = answer[0].split() if answer else []
            found += int(words[0]) if words and words[0].isdigit() else 0
        return found


def _without(intent: Intent, addresses: Set[Net]) -> Intent:
    """The same without these sessions."""
    neighbors = {a: neighbor for a, neighbor in intent.neighbors.items() if a not in addresses}
    return replace(intent, neighbors=neighbors)


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)  # passwords may be in it
    path.write_text(text)
