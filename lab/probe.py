"""Who reaches whom in a lab: one process with sockets in many network namespaces.

A socket stays in the namespace it was made in, so nothing has to run in a pod to serve
there or to call from there. Every station serves TCP on ``PORT`` and answers each caller
with the address it saw; ICMP echo is answered by the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kernel.netns import inside
from lab.client import Lab
from lab.errors import LabError

PORT = 7777
TIMEOUT = 1.3  # seconds until silence means blocked; a lost SYN is sent again after one

_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_SOL_RAW, _ICMP_FILTER = 255, 1  # linux/socket.h, linux/icmp.h
_ICMP = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence; RFC 792

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Station:
    """A place to probe from and to. ``net``: a descriptor of its network namespace."""

    name: str
    address: str
    net: int


@dataclass(frozen=True, slots=True)
class Reach:
    """What came of one pair. ``seen``: the source address the TCP server saw.

    ``tcp_error`` says why there was no TCP answer, None when there was one.
    """

    icmp: bool
    seen: str | None
    tcp_error: str | None

    @property
    def tcp(self) -> bool:
        """Whether TCP got through and was answered."""
        return self.tcp_error is None


def icmp_echo(identifier: int, sequence: int) -> bytes:
    """An ICMP echo request (RFC 792); the kernel leaves its checksum to the sender."""
    header = _ICMP.pack(_ECHO_REQUEST, 0, 0, identifier, sequence)
    total = sum(struct.unpack("!4H", header))
    total = (total >> 16) + (total & 0xFFFF)
    return _ICMP.pack(_ECHO_REQUEST, 0, ~(total + (total >> 16)) & 0xFFFF, identifier, sequence)


def icmp_socket(net: int) -> socket.socket:
    """A raw socket in a namespace that hears echo replies only. Raises OSError."""
    with inside(net):
        made = socket.socket(
            socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP
        )
    made.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << _ECHO_REPLY) & 0xFFFFFFFF))
    return made


def echo_reply(packet: bytes) -> tuple[int, int]:
    """Identifier and sequence of an echo reply as a raw socket gives it, IP header and all."""
    _, _, _, identifier, sequence = _ICMP.unpack_from(packet, (packet[0] & 0xF) * 4)
    return identifier, sequence


def first_reply(station: Station, address: str, deadline: float) -> float:
    """Ping ``address`` every millisecond; the time (monotonic) of the first reply.

    Raises LabError when there is none until ``deadline``.
    """
    identifier = secrets.randbelow(0x10000)
    with icmp_socket(station.net) as sock:
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        for sequence in range(0x10000):
            with contextlib.suppress(OSError):  # no route yet counts as no answer yet
                sock.sendto(icmp_echo(identifier, sequence), (address, 0))
            if poller.poll(1) and echo_reply(sock.recv(1500))[0] == identifier:
                return time.monotonic()
            if time.monotonic() > deadline:
                break
    raise LabError(f"{station.name}: no ping answer from {address}")


class Probe:
    """Serves on all stations and calls between them. A context manager."""

    def __init__(self, stations: Sequence[Station], port: int = PORT) -> None:
        """Stations are closed with the probe. Raises OSError when a port is taken."""
        self.stations: Mapping[str, Station] = {each.name: each for each in stations}
        self._port = port
        self._listeners: list[socket.socket] = []
        self._stop, self._stopped = os.pipe()
        try:
            for station in stations:
                self._listeners.append(_listener(station, port))
        except OSError:
            self._close()
            raise
        self._thread = threading.Thread(target=self._serve, name="probe", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, lab: Lab, names: Iterable[str], port: int = PORT) -> Probe:
        """A probe with members and pods of a lab as its stations. Raises LabError."""
        stations = []
        for name in names:
            with lab.open(name) as place:
                if not place.addresses:
                    raise LabError(f"{name} has no address")
                net = os.dup(place.namespaces.net)
                stations.append(Station(name, place.addresses[0], net))
        return cls(stations, port)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the servers and let go of all namespaces."""
        os.write(self._stopped, b"x")
        self._thread.join()
        self._close()

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for station in self.stations.values():
            os.close(station.net)
        os.close(self._stop)
        os.close(self._stopped)

    def _serve(self) -> None:
        """Tell every caller which address it came from."""
        selector = selectors.DefaultSelector()
        selector.register(self._stop, selectors.EVENT_READ)
        for listener in self._listeners:
            selector.register(listener, selectors.EVENT_READ, listener)
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    selector.close()
                    return
                with contextlib.suppress(OSError):  # a caller that has gone again
                    connection, (address, _port) = key.data.accept()
                    with connection:
                        connection.send(address.encode())

    def pairs(self) -> list[Pair]:
        """All ordered pairs of two stations."""
        return [(one, other) for one in self.stations for other in self.stations if one != other]

    def matrix(
        self, pairs: Iterable[Pair] | None = None, timeout: float = TIMEOUT
    ) -> dict[Pair, Reach]:
        """Try all pairs (by default ``pairs()``) at once, over TCP and ICMP.

        Returns as soon as everything is answered, at the latest after ``timeout`` seconds.
        At most 65536 pairs.
        """
        return _Round(self, list(self.pairs() if pairs is None else pairs)).run(timeout)

    def connect(self, pair: Pair) -> tuple[socket.socket, int]:
        """A non-blocking TCP connection from one station to the other, and its errno so far."""
        source, target = self.stations[pair[0]], self.stations[pair[1]]
        with inside(source.net):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        return sock, sock.connect_ex((target.address, self._port))


class _Round:
    """One matrix being measured."""

    def __init__(self, probe: Probe, pairs: list[Pair]) -> None:
        self._probe = probe
        self._pairs = pairs  # a pair's place in it is its ICMP sequence number
        # A new one each time, or connection tracking takes the ping for part of an earlier,
        # allowed exchange.
        self._identifier = secrets.randbelow(0x10000)
        self._poll = select.epoll()
        self._calls: dict[int, tuple[Pair, socket.socket]] = {}
        self._pings: dict[int, socket.socket] = {}  # by descriptor
        self._ping_of: dict[str, socket.socket] = {}  # by station
        self._seen: dict[Pair, str] = {}
        self._errors: dict[Pair, str] = {}
        self._echoed: set[Pair] = set()

    def run(self, timeout: float) -> dict[Pair, Reach]:
        try:
            for pair in self._pairs:
                sock, code = self._probe.connect(pair)
                if code not in (0, errno.EINPROGRESS):
                    self._errors[pair] = os.strerror(code)
                    sock.close()
                    continue
                self._calls[sock.fileno()] = (pair, sock)
                self._poll.register(sock, select.EPOLLIN)
            for name in {source for source, _ in self._pairs}:
                sock = icmp_socket(self._probe.stations[name].net)
                self._ping_of[name] = self._pings[sock.fileno()] = sock
                self._poll.register(sock, select.EPOLLIN)
            self._listen(timeout)
        finally:
            self._poll.close()
            for _, sock in self._calls.values():
                sock.close()
            for sock in self._pings.values():
                sock.close()
        return {pair: self._verdict(pair) for pair in self._pairs}

    def _verdict(self, pair: Pair) -> Reach:
        seen = self._seen.get(pair)
        error = None if seen else self._errors.get(pair, "no answer")
        return Reach(pair in self._echoed, seen, error)

    def _listen(self, timeout: float) -> None:
        begun = time.monotonic()
        pings = 0
        while self._calls or len(self._echoed) < len(self._pairs):
            elapsed = time.monotonic() - begun
            if elapsed >= timeout:
                return
            if elapsed >= pings * timeout / 3:  # thrice in all: a lost ping is not a verdict
                self._send_pings()
                pings += 1
            for fd, _ in self._poll.poll(min(0.05, timeout - elapsed)):
                if fd in self._pings:
                    self._hear_ping(self._pings[fd])
                else:
                    self._hear_call(fd)

    def _send_pings(self) -> None:
        for number, pair in enumerate(self._pairs):
            if pair not in self._echoed:
                target = self._probe.stations[pair[1]]
                with contextlib.suppress(OSError):  # unreachable: there will be no answer
                    packet = icmp_echo(self._identifier, number)
                    self._ping_of[pair[0]].sendto(packet, (target.address, 0))

    def _hear_ping(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                identifier, number = echo_reply(sock.recv(1500))
                if identifier == self._identifier and number < len(self._pairs):
                    pair = self._pairs[number]
                    if self._ping_of[pair[0]] is sock:
                        self._echoed.add(pair)

    def _hear_call(self, fd: int) -> None:
        pair, sock = self._calls[fd]
        try:
            seen = sock.recv(64).decode()
        except BlockingIOError:
            return  # a router's complaint (ICMP) woke us; TCP goes on trying
        except OSError as error:
            self._errors[pair] = error.strerror or str(error)
        else:
            if seen:
                self._seen[pair] = seen
            else:
                self._errors[pair] = "closed without an answer"
        del self._calls[fd]
        self._poll.unregister(fd)
        sock.close()


def _listener(station: Station, port: int) -> socket.socket:
    with inside(station.net):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("0.0.0.0", port))
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    return sock
