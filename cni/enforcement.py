"""Which endpoints felix enforces, as it tells while it works, and waiting until it does.

Felix announces on ``felix-endpoints.sock`` in the run directory (``felix/announcer.py`` has the
bytes). What it enforced stays enforced when it ends, so what it told stays true until it comes
back and tells all anew.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orjson

from datastore.interface import Key

SOCKET = "felix-endpoints.sock"
_RETRY = 0.1  # seconds between attempts to reach felix while it is away
# So many may wait for a felix that has said nothing for so many seconds: each occupies a worker
# of the server, and some must be left for deletions.
MOST_WAITING = 48
_SILENCE = 1.0

_log = logging.getLogger(__name__)


class Enforcement:
    """Listens to the felix of this node. Any number of threads may wait."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / SOCKET
        self._lock = threading.Lock()
        self._enforced: dict[str, str] = {}
        self._waiting: dict[tuple[str, str], list[threading.Event]] = {}
        self.waiters = 0  # threads that wait now
        self._heard = 0.0  # when felix said something last, monotonic seconds
        self._away_since: float | None = time.monotonic()
        self._stopping = threading.Event()
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="cni-enforcement", daemon=True)

    def start(self) -> None:
        """Start listening."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening. Who waits goes on waiting, to the end of its time."""
        self._stopping.set()
        with self._lock, contextlib.suppress(OSError):
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def away(self) -> float:
        """For how many seconds felix has not been there; 0 while it is."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    def wait(self, endpoint: Key, container: str, seconds: float) -> bool:
        """Wait until felix enforces the endpoint's policy for this container; whether it does.

        ``seconds`` at most; not at all when felix has been away for longer than that, or when
        many wait for one that says nothing.
        """
        name = f"{endpoint.namespace}/{endpoint.name}"
        event = threading.Event()
        with self._lock:
            if self._enforced.get(name) == container:
                return True
            silent = time.monotonic() - self._heard > _SILENCE
            if self.away() > seconds or (silent and self.waiters >= MOST_WAITING):
                return False
            self._waiting.setdefault((name, container), []).append(event)
            self.waiters += 1
        enforced = event.wait(seconds)
        with self._lock:
            self.waiters -= 1
            waiting = self._waiting.get((name, container), [])
            if event in waiting:
                waiting.remove(event)
                if not waiting:
                    del self._waiting[name, container]
        return enforced

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
                if not self._stopping.is_set():
                    yield connection
            finally:
                with self._lock:
                    self._connection = None

    def _listen(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        told = orjson.loads(line)
        everything, endpoints = told["all"], dict(told["endpoints"])
        with self._lock:
            self._heard = time.monotonic()
            if everything:
                self._enforced.clear()
            for name, container in endpoints.items():
                if container is None:
                    self._enforced.pop(name, None)
                    continue
                self._enforced[name] = container
                for event in self._waiting.pop((name, container), ()):
                    event.set()
            if self._away_since is not None:
                _log.info("felix is there: it enforces %d endpoints", len(self._enforced))
                self._away_since = None
