"""Packets between two pods of a node: what they cost in CPU, and how long the first takes.

One thread is client and server. The kernel carries a packet between veth devices in the context
of whoever sends it, so the CPU time of this thread is that of the whole way.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

from bench._policy_world import PORT, SERVER, Place
from kernel.netns import inside

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: no TIME_WAIT
_CHUNK = bytes(64 << 10)
_BUFFER = 1 << 20
_PATIENCE = 10.0  # seconds, for the first packet of all

_CONNECTIONS = 150
_EXCHANGES = 500
_CHUNKS = 150
_FIRSTS = 100


class Path:
    """The way from the client to the server."""

    def __init__(self, place: Place) -> None:
        self._place = place
        with inside(place.server.netns.fd):
            self._tcp = socket.create_server((SERVER, PORT), backlog=64)
            self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind((SERVER, PORT))
        self._udp.settimeout(_PATIENCE)
        self._tcp.settimeout(_PATIENCE)
        self._near, self._far = self._connect()
        for end in (self._near, self._far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)

    def __enter__(self) -> Path:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for end in (self._near, self._far, self._tcp, self._udp):
            end.close()

    def connections(self) -> float:
        """CPU seconds for a connection: open, a byte each way, close (as netperf's TCP_CRR)."""
        with inside(self._place.client.netns.fd):
            begun = time.thread_time()
            for _ in range(_CONNECTIONS):
                near = socket.socket()
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                near.connect((SERVER, PORT))
                far, _ = self._tcp.accept()
                near.send(b"?")
                far.recv(1)
                far.send(b"!")
                near.recv(1)
                near.close()
                far.close()
            return (time.thread_time() - begun) / _CONNECTIONS

    def exchanges(self) -> float:
        """CPU seconds for a byte each way, on a connection that stands."""
        near, far = self._near, self._far
        begun = time.thread_time()
        for _ in range(_EXCHANGES):
            near.send(b"?")
            far.recv(1)
            far.send(b"!")
            near.recv(1)
        return (time.thread_time() - begun) / _EXCHANGES

    def stream(self) -> float:
        """CPU seconds for 64 KiB one way, on a connection that stands."""
        near, far = self._near, self._far
        begun = time.thread_time()
        for _ in range(_CHUNKS):
            near.sendall(_CHUNK)
            missing = len(_CHUNK)
            while missing:
                missing -= len(far.recv(missing))
        return (time.thread_time() - begun) / _CHUNKS

    def first(self) -> float:
        """Seconds until the first packet of a flow arrives (UDP), the median."""
        delays = []
        for _ in range(_FIRSTS):
            with inside(self._place.client.netns.fd):
                near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            begun = time.perf_counter()
            near.sendto(b"?", (SERVER, PORT))
            self._udp.recv(1)
            delays.append(time.perf_counter() - begun)
            near.close()
        return statistics.median(delays)

    def _connect(self) -> tuple[socket.socket, socket.socket]:
        with inside(self._place.client.netns.fd):
            near = socket.create_connection((SERVER, PORT), _PATIENCE)
        near.settimeout(None)
        far, _ = self._tcp.accept()
        self._tcp.settimeout(None)
        return near, far


def in_turn(
    paths: Mapping[str, Path], measure: Callable[[Path], float], rounds: int
) -> dict[str, list[float]]:
    """The same of every path, round by round: what slows the machine slows all alike."""
    found: dict[str, list[float]] = {name: [] for name in paths}
    names = list(paths)
    for _ in range(rounds):
        for name in names:
            found[name].append(measure(paths[name]))
        names.reverse()
    return found


@contextlib.contextmanager
def opened(places: Mapping[str, Place]) -> Iterator[dict[str, Path]]:
    """The paths of places."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Path(place)) for name, place in places.items()}
