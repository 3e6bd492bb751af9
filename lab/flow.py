"""A flow between two stations that counts what it loses, and packets with forged senders."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass

from kernel.netns import inside
from lab.errors import LabError
from lab.probe import Station

_SEQUENCE = struct.Struct("!Q")
_SO_RCVBUFFORCE = 33  # socket(7)
_BUFFER = 8 << 20  # bytes: a busy machine may stall the meter, that must not look like loss
_DRAIN = 5.0  # seconds, at most, for the last answers to come in


@dataclass(frozen=True, slots=True)
class FlowReport:
    """What became of a flow. Every packet is answered: lost is one way or the other.

    ``longest_gap``: the longest time without any answer, in seconds. ``tcp_intact``: the
    TCP connection lived through it all and returned every byte.
    """

    sent: int
    received: int
    longest_gap: float
    tcp_bytes: int
    tcp_intact: bool

    @property
    def lost(self) -> int:
        """UDP packets without an answer."""
        return self.sent - self.received


class Flow:
    """Numbered UDP packets and a TCP stream there and back, from entering to leaving the block.

    ``report`` is there after the block.
    """

    def __init__(self, source: Station, target: Station, interval: float = 0.002) -> None:
        """``interval``: seconds between packets. Raises LabError, OSError."""
        self._interval = interval
        with contextlib.ExitStack() as stack:
            self._echo = stack.enter_context(_udp(target))
            self._udp = stack.enter_context(_udp(source))
            self._udp.connect(self._echo.getsockname())
            self._server, self._tcp = _tcp_pair(source, target)
            stack.pop_all()
        self._selector = selectors.DefaultSelector()
        for sock in self._sockets():
            self._selector.register(sock, selectors.EVENT_READ, sock)
        self._sent = 0
        self._received: set[int] = set()
        self._tcp_there = self._tcp_back = 0
        self._tcp_broken = False
        self._last_answer = time.monotonic()
        self._longest_gap = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flow", daemon=True)

    def __enter__(self) -> Flow:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ending.set()
        self._thread.join()
        self._selector.close()
        for sock in self._sockets():
            sock.close()

    @property
    def report(self) -> FlowReport:
        """What became of the flow so far; complete after the block."""
        intact = not self._tcp_broken and self._tcp_back == self._tcp_there
        return FlowReport(
            self._sent, len(self._received), self._longest_gap, self._tcp_back, intact
        )

    def _sockets(self) -> tuple[socket.socket, ...]:
        return self._echo, self._udp, self._server, self._tcp

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ending.is_set():
            now = time.monotonic()
            if now >= due:
                self._send()
                due = max(due + self._interval, now)
            self._hear(max(0.0, due - now))
        end = time.monotonic()
        while time.monotonic() < end + _DRAIN and not self._all_answered():
            self._hear(0.01)
        if len(self._received) < self._sent:
            self._longest_gap = max(self._longest_gap, end - self._last_answer)

    def _all_answered(self) -> bool:
        answered = len(self._received) == self._sent
        return answered and (self._tcp_broken or self._tcp_back == self._tcp_there)

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # what is not even accepted counts as sent, and lost
            self._udp.send(_SEQUENCE.pack(self._sent))
        self._sent += 1
        if self._tcp_broken:
            return
        try:
            self._tcp_there += self._tcp.send(_SEQUENCE.pack(self._sent))
        except BlockingIOError:
            return  # its window is full: it waits for acknowledgements
        except OSError:
            self._tcp_broken = True

    def _hear(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is self._echo:
                with contextlib.suppress(OSError):
                    packet, sender = self._echo.recvfrom(64)
                    self._echo.sendto(packet, sender)
            elif key.data is self._udp:
                with contextlib.suppress(OSError):
                    self._received.add(_SEQUENCE.unpack(self._udp.recv(64))[0])
                    now = time.monotonic()
                    self._longest_gap = max(self._longest_gap, now - self._last_answer)
                    self._last_answer = now
            else:
                self._pass_on(key.data)

    def _pass_on(self, sock: socket.socket) -> None:
        """The server's end returns what it gets, the client's counts it."""
        try:
            data = sock.recv(65536)
            if sock is self._server:
                sock.sendall(data)
            else:
                self._tcp_back += len(data)
        except OSError:
            data = b""
        if not data:
            self._tcp_broken = True
            self._selector.unregister(sock)


def _udp(station: Station) -> socket.socket:
    with inside(station.net):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    sock.bind((station.address, 0))
    return sock


def _tcp_pair(source: Station, target: Station) -> tuple[socket.socket, socket.socket]:
    """The two ends of a connection: server's, client's. Raises LabError."""
    with inside(target.net):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with inside(source.net):
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with listener:
        try:
            listener.bind((target.address, 0))
            listener.listen()
            client.settimeout(20)
            client.connect(listener.getsockname())
            server, _ = listener.accept()
        except OSError as error:
            client.close()
            raise LabError(f"no TCP from {source.name} to {target.name}: {error}") from error
    for sock in (client, server):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return server, client


def arrivals(
    station: Station, target: Station, *, sender: str, count: int = 5, timeout: float = 0.7
) -> int:
    """How many of ``count`` UDP packets with ``sender`` as their source address arrive.

    They are written as whole IP packets by a raw socket in ``station`` (raw(7),
    IP_HDRINCL), so the address may be forged.
    """
    nonce = secrets.token_bytes(16)
    with inside(station.net):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw, _udp(target) as receiver:
        port = receiver.getsockname()[1]
        packet = _udp_packet(sender, target.address, port, nonce)
        for _ in range(count):
            raw.sendto(packet, (target.address, 0))
        arrived = 0
        deadline = time.monotonic() + timeout
        receiver.setblocking(True)
        while arrived < count and (left := deadline - time.monotonic()) > 0:
            receiver.settimeout(left)
            with contextlib.suppress(TimeoutError):
                arrived += receiver.recv(64) == nonce
    return arrived


def _udp_packet(source: str, target: str, port: int, payload: bytes) -> bytes:
    """RFC 791 and 768; the kernel fills in length and checksum of the IP header."""
    udp = struct.pack("!4H", 7, port, 8 + len(payload), 0) + payload
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0,
        socket.inet_aton(source), socket.inet_aton(target),
    )  # fmt: skip
    return header + udp
