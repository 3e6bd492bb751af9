"""Which endpoints felix enforces, as it tells while it works, and hearing of one when it does.

Felix announces on ``felix-endpoints.sock`` in the run directory (``felix/announcer.py`` has the
bytes). What it enforced stays enforced when it ends, so what it told stays true until it comes
back and tells all anew.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from datastore.interface import Key

SOCKET = "felix-endpoints.sock"
_RETRY = 0.1  # seconds between attempts to reach felix while it is away
# So many may wait at a time: each has a client's connection, and descriptors are not without end.
MOST_WAITING = 512

# True: it is enforced; False: not in time; None: nobody will know, the listening has ended.
Then = Callable[[bool | None], object]

_log = logging.getLogger(__name__)


@dataclass(slots=True, order=True)
class _Wait:
    """Who wants to hear; ``then`` is None when he has. Ordered by ``deadline``, monotonic."""

    deadline: float
    number: int
    name: str = field(compare=False)
    container: str = field(compare=False)
    then: Then | None = field(compare=False)


class Enforcement:
    """Listens to the felix of this node."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / SOCKET
        self._lock = threading.Lock()
        self._enforced: dict[str, str] = {}
        self._waiting: dict[tuple[str, str], list[_Wait]] = {}
        self._deadlines: list[_Wait] = []  # a heap; some have heard already
        self._sooner = threading.Condition(self._lock)  # the first deadline is another
        self._numbers = itertools.count()
        self._away_since: float | None = time.monotonic()
        self._known = False
        self._stopping = threading.Event()
        self._connection: socket.socket | None = None
        self._threads = [
            threading.Thread(target=target, name="cni-enforcement", daemon=True)
            for target in (self._run, self._watch_time)
        ]

    def start(self) -> None:
        """Start listening."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop listening. Who still waits is told so."""
        self._stopping.set()
        with self._lock, contextlib.suppress(OSError):
            self._sooner.notify_all()
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        with self._lock:
            waiting = [wait.then for wait in self._deadlines if wait.then is not None]
            self._deadlines.clear()
            self._waiting.clear()
        for then in waiting:
            _tell(then, None)

    def away(self) -> float:
        """For how many seconds felix has not been there; 0 while it is."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def known(self) -> bool:
        """Whether felix has ever been there, since ``start``."""
        return self._known

    @property
    def waiting(self) -> int:
        """For how many containers somebody waits to hear."""
        return len(self._waiting)

    def when_enforced(self, endpoint: Key, container: str, seconds: float, then: Then) -> None:
        """Call ``then(True)`` when felix enforces the endpoint's policy for this container.

        After ``seconds``, ``then(False)``; at once if felix has been away for longer than that,
        or too many wait. ``then(None)`` from ``stop``. It is called once, in this thread or in
        one that must not be held up.
        """
        name = f"{endpoint.namespace}/{endpoint.name}"
        with self._lock:
            enforced = self._enforced.get(name) == container
            hopeless = self.away() > seconds or self.waiting >= MOST_WAITING
            if not enforced and not hopeless:
                deadline = time.monotonic() + seconds
                wait = _Wait(deadline, next(self._numbers), name, container, then)
                self._waiting.setdefault((name, container), []).append(wait)
                heapq.heappush(self._deadlines, wait)
                if self._deadlines[0] is wait:
                    self._sooner.notify()
                return
        then(enforced)

    def _watch_time(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                overdue = self._take_overdue()
                if not overdue:
                    first = self._deadlines[0].deadline if self._deadlines else None
                    if not self._stopping.is_set():
                        self._sooner.wait(first and max(0.0, first - time.monotonic()))
            for then in overdue:
                _tell(then, False)

    def _take_overdue(self) -> list[Then]:
        """Under the lock."""
        now = time.monotonic()
        overdue = []
        while self._deadlines and (
            self._deadlines[0].then is None or self._deadlines[0].deadline <= now
        ):
            wait = heapq.heappop(self._deadlines)
            if wait.then is not None:
                key = wait.name, wait.container
                self._waiting[key].remove(wait)
                if not self._waiting[key]:
                    del self._waiting[key]
                overdue.append(wait.then)
        return overdue

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._connect() as connection:
                    self._listen(connection)
            except (OSError, ValueError, KeyError, TypeError) as error:
                if self._away_since is None:
                    _log.warning("felix: %s", error)
            if self._away_since is None:
                self._away_since = time.monotonic()
                _log.warning("felix is away: what it enforced stays")
            self._stopping.wait(_RETRY)

    @contextlib.contextmanager
    def _connect(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.connect(str(self._path))
            with self._lock:
                self._connection = connection
            try:
                if self._stopping.is_set():
                    raise ConnectionAbortedError("stopping")
                yield connection
            finally:
                with self._lock:
                    self._connection = None

    def _listen(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            for line in lines:
                for then in self._take(line):
                    _tell(then, True)

    def _take(self, line: bytes) -> list[Then]:
        """Note what felix says; returns who must hear of it."""
        told = orjson.loads(line)
        everything, endpoints = told["all"], dict(told["endpoints"])
        hearers: list[Then] = []
        with self._lock:
            if everything:
                self._enforced.clear()
            for name, container in endpoints.items():
                if container is None:
                    self._enforced.pop(name, None)
                    continue
                self._enforced[name] = container
                for wait in self._waiting.pop((name, container), ()):
                    if wait.then is not None:
                        hearers.append(wait.then)
                        wait.then = None
            if self._away_since is not None:
                _log.info("felix is there: it enforces %d endpoints", len(self._enforced))
                self._away_since = None
                self._known = True
        return hearers


def _tell(then: Then, enforced: bool | None) -> None:
    """An error of one must not keep the others from hearing."""
    try:
        then(enforced)
    except Exception:
        _log.exception("after waiting for felix")
