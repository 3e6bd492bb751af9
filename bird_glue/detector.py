"""The agent's side of failure detection: the BFD process is kept running and told whom to watch.

That a peer is dead is known within seconds where both ends speak BFD, instead of when the hold
time is over. Nodes call each other; a router is only answered, so one that doesn't speak BFD
with us is not bothered. A session that never came up means nothing, and neither does one that
an administrator ended (RFC 5882 4.2).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

from api.net import Net, format_address
from bird_glue.bfd import Diagnostic, State
from bird_glue.messages import parse_host
from reconcile.backoff import Backoff

_log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[1]
_SOURCES = ("bfd.py", "bfd_main.py")
_START_SECONDS = 5.0
_SEND_SECONDS = 5.0
_END_SECONDS = 2.0
_AGAIN_SECONDS = 5.0  # a port that is taken may become free
_POLL_SECONDS = 0.05
_CHUNK = 1 << 18
_MOST_INTERVAL, _MOST_MULTIPLIER = 60_000, 255


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds between two packets, and how many may be missing in a row."""

    interval: int = 500
    multiplier: int = 5

    @classmethod
    def parse(cls, text: str) -> Timing | None:
        """``500x5``; ``on`` or empty for the default; ``off``: None. Raises ValueError."""
        if text in ("", "on"):
            return cls()
        if text == "off":
            return None
        interval, _, multiplier = text.partition("x")
        if interval.isdecimal() and multiplier.isdecimal():
            found = cls(int(interval), int(multiplier))
            if 10 <= found.interval <= _MOST_INTERVAL and (
                1 <= found.multiplier <= _MOST_MULTIPLIER
            ):
                return found
        raise ValueError(
            f"MANX_BFD={text!r}: expected on, off, or milliseconds and packets: 500x5"
            f" (10 to {_MOST_INTERVAL}, 1 to {_MOST_MULTIPLIER})"
        )


@dataclass(frozen=True, slots=True)
class Watch:
    """A peer to watch. ``active``: we call. ``least_ttl``: of its packets, over several hops."""

    peer: Net
    local: Net
    active: bool
    multihop: bool
    least_ttl: int = 0


@dataclass(frozen=True, slots=True)
class Detection:
    """What is known of a peer. ``failed_at``: seconds of the epoch, 0.0 for never.

    ``independent``: it says that its BFD lives on when its control plane restarts.
    ``seconds``: of silence that end it.
    """

    state: State
    since: float
    independent: bool
    failed_at: float
    why: Diagnostic
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A peer that was there has fallen silent, or says that it doesn't hear us.

    ``time``: when, in seconds of the epoch. ``info``: in words.
    """

    peer: Net
    independent: bool
    time: float
    info: str


@dataclass(frozen=True, slots=True)
class FromDetector:
    """Lines of the BFD process; ``closed`` when nothing more will come."""

    channel: _Channel
    lines: tuple[bytes, ...] = ()
    closed: bool = False


def failure(peer: Net, found: Detection) -> Failure:
    """What a peer's failure is, from what is known of it."""
    if found.why is Diagnostic.NEIGHBOR_SAID_DOWN:
        info = "BFD: the peer does not hear us, or its BFD has started anew"
    else:
        info = f"BFD: nothing heard from the peer for {found.seconds:g} s"
    return Failure(peer, found.independent, found.failed_at, info)


def describe(found: Detection | None) -> str:
    """For people: ``up (2.5 s)``, ``down``; empty for a peer that has not taken part."""
    if found is None or (found.state is not State.UP and not found.failed_at):
        return ""
    return f"up ({found.seconds:g} s)" if found.state is State.UP else "down"


class _Channel:
    """A connection to the BFD process; a thread puts what it says into ``sink``."""

    def __init__(self, path: Path, sink: Callable[[FromDetector], object]) -> None:
        self._sink = sink
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._run, name="bfd", daemon=True)
        self._thread.start()

    def send(self, document: object) -> None:
        self._socket.settimeout(_SEND_SECONDS)
        self._socket.sendall(orjson.dumps(document) + b"\n")

    def wait(self, seconds: float) -> None:
        """Until the other end has hung up."""
        self._thread.join(seconds)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        rest = b""
        while data := self._receive():
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                self._sink(FromDetector(self, tuple(lines)))
        self._sink(FromDetector(self, closed=True))

    def _receive(self) -> bytes:
        while True:
            try:
                return self._socket.recv(_CHUNK)
            except TimeoutError:  # the limit is meant for send()
                continue
            except OSError:
                return b""


class Detector:
    """The BFD process of ``run_dir``. ``timing`` None: there is none, and nobody is watched."""

    def __init__(
        self, run_dir: Path, sink: Callable[[FromDetector], object], timing: Timing | None
    ) -> None:
        self._run_dir = run_dir
        self._sink = sink
        self._timing = timing
        self._wanted: dict[Net, Watch] = {}
        self._told: dict[Net, Watch] | None = None
        self._told_at = 0.0
        self._found: dict[Net, Detection] = {}
        self._channel: _Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._backoff: Backoff[str] = Backoff(0.1, 10.0)
        self._process_problem = ""
        self._port_problem = ""

    @property
    def problem(self) -> str:
        """Why failures are not detected; empty if they are."""
        found = self._process_problem or self._port_problem
        return f"BFD: {found}" if found and self._wanted else ""

    def configure(self, watches: Mapping[Net, Watch]) -> None:
        """Whom to watch, by address."""
        self._wanted = dict(watches) if self._timing else {}
        for peer in self._found.keys() - self._wanted.keys():
            del self._found[peer]

    def get(self, peer: Net) -> Detection | None:
        """What is known of a peer."""
        return self._found.get(peer)

    def handle(self, message: FromDetector, now: float) -> list[Failure]:
        """Take in what came; returns who died. One that died before an agent was there counts."""
        if message.channel is not self._channel:
            return []
        failures = []
        for line in message.lines:
            document = orjson.loads(line)
            if isinstance(document, dict):
                if document["hello"] != _version():
                    _log.info("the BFD process is of another version: replacing it")
                    self._send({"end": False}, now)
                    break
                self._port_problem = document["problem"]
                self._backoff.succeeded("start")
                self._process_problem = ""
            else:
                failures += self._report(*document)
        if message.closed:
            self._hang_up()
        return failures

    def step(self, now: float) -> None:
        """Do what is due: start it, connect, tell it whom to watch."""
        if self._channel is None:
            if (self._wanted or self._running()) and (self._backoff.next_due() or 0.0) <= now:
                self._connect(now)
            return
        again = self._port_problem and now >= self._told_at + _AGAIN_SECONDS
        if self._told != self._wanted or again:
            self._tell(now)

    def next_due(self, now: float) -> float | None:
        """When to call ``step`` though nothing happens."""
        if self._channel is None:
            if not self._wanted:
                return None
            return max(now + _POLL_SECONDS, self._backoff.next_due() or 0.0)
        return self._told_at + _AGAIN_SECONDS if self._port_problem else None

    def end(self) -> None:
        """End all sessions by intention, so that no peer takes it for a failure, and the process.

        Use it when the whole node, or container, is about to end.
        """
        if self._channel is None:
            with contextlib.suppress(OSError):
                self._channel = _Channel(self._run_dir / "bfd.sock", self._sink)
        if self._channel is not None:
            self._send({"end": True}, 0.0)
        if self._channel is not None:
            self._channel.wait(_END_SECONDS)
        self.close()

    def close(self) -> None:
        """Let go of the process, which goes on."""
        self._hang_up()
        if self._process is not None:
            self._process.returncode = self._process.poll() or 0  # else its destructor warns
            self._process = None

    def _report(
        self,
        peer: str,
        state: int,
        since: float,
        independent: bool,
        failed_at: float,
        why: int,
        seconds: float,
        news: bool,
    ) -> list[Failure]:
        address = parse_host(peer)
        if address not in self._wanted:
            return []
        before = self._found.get(address)
        found = Detection(State(state), since, independent, failed_at, Diagnostic(why), seconds)
        self._found[address] = found
        missed = found.failed_at and (before is None or before.failed_at != found.failed_at)
        if not (news or missed):
            return []
        failed = failure(address, found)
        seen = datetime.fromtimestamp(failed.time, UTC).isoformat(timespec="milliseconds")
        _log.warning("%s: %s; seen at %s", peer, failed.info, seen)
        return [failed]

    def _connect(self, now: float) -> None:
        try:
            self._channel = _Channel(self._run_dir / "bfd.sock", self._sink)
        except OSError as error:
            if not self._running():
                self._start(now)
            elif now - self._started > _START_SECONDS:
                self._fail(f"its process doesn't listen: {error}", now)
        else:
            self._told = None
            self._tell(now)

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self, now: float) -> None:
        if not self._wanted:
            return
        if self._process is not None:
            self._fail(f"its process ended with {self._process.returncode}: {self._output()}", now)
            self._process = None
            return
        program = (
            f"import sys; sys.path.append({str(_ROOT)!r}); "
            "from bird_glue.bfd_main import main; main(*sys.argv[1:])"
        )
        try:
            with (self._run_dir / "bfd.out").open("w") as out:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", program, str(self._run_dir), _version()],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    cwd=self._run_dir,
                    start_new_session=True,
                )
        except OSError as error:
            self._fail(f"its process can't be started: {error}", now)
            return
        self._started = now

    def _fail(self, why: str, now: float) -> None:
        self._process_problem = why
        self._backoff.failed("start", now)
        _log.error("BFD: %s", why)
        if self._running() and self._process is not None:
            self._process.kill()

    def _output(self) -> str:
        lines = (self._run_dir / "bfd.out").read_text(errors="replace").splitlines()
        return lines[-1] if lines else ""

    def _tell(self, now: float) -> None:
        assert self._timing is not None
        sessions = [
            [
                format_address(*watch.peer[:2]),
                format_address(*watch.local[:2]),
                watch.multihop,
                watch.least_ttl,
                self._timing.interval * 1000,
                self._timing.multiplier,
                watch.active,
            ]
            for watch in self._wanted.values()
        ]
        self._told, self._told_at = dict(self._wanted), now
        self._send({"sessions": sessions}, now)

    def _send(self, document: object, now: float) -> None:
        if self._channel is None:
            return
        try:
            self._channel.send(document)
        except OSError as error:
            _log.warning("BFD: its process is gone: %s", error)
            self._hang_up()
            self._backoff.failed("start", now)

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        self._told = None


@functools.cache
def _version() -> str:
    """What the program of the process is: another text is another version."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def find(run_dir: Path) -> int:
    """The process id of the BFD process of a directory; 0 if there is none."""
    path = run_dir / "bfd.pid"
    text = path.read_text().strip() if path.exists() else ""
    if not text.isdigit():
        return 0
    try:
        command = Path(f"/proc/{text}/cmdline").read_bytes()
    except OSError:
        return 0
    return int(text) if b"bird_glue.bfd_main" in command else 0


def kill(run_dir: Path) -> None:
    """End the process at once, as a crash would."""
    if pid := find(run_dir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
