"""Packets from everywhere to everywhere at once, and which of them arrived.

Every station listens on the same ports from the beginning. A round sends one packet a probe
(TCP: a whole handshake) and waits for those that should arrive; that the others will not is
known by fences: all packets are sent from one CPU, whose queue is first in, first out, so that
a packet sent later and waited for proves that what was sent before has gone a hop further.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import socket
import struct
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from kernel.netns import Namespace, inside

ICMP, TCP, UDP, ICMPV6, SCTP = 1, 6, 17, 58, 132
FENCE = 9  # the port of the fences
PATIENCE = 30.0  # seconds, for what must arrive
# A handshake between pods of two nodes goes over nine wires: three times three.
HOPS = 10

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_ECHO = {ICMP: (8, 0), ICMPV6: (128, 129)}  # request, reply
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection at once
_IPV4_HEADER = 20


class Probe(NamedTuple):
    """One packet. ``source`` and ``target`` count stations; ``port`` 0: the protocol has none."""

    source: int
    target: int
    protocol: int
    port: int
    version: int = 4


class Station:
    """A network namespace that sends and receives. ``addresses`` by IP version."""

    def __init__(
        self, netns: Namespace, addresses: Mapping[int, str], ports: Sequence[int], stack: ExitStack
    ) -> None:
        self.netns = netns
        self.addresses = dict(addresses)
        self.senders: dict[tuple[int, int], socket.socket] = {}  # by protocol and version
        self.listeners: list[socket.socket] = []
        self.receivers: list[tuple[socket.socket, int]] = []  # and their protocol
        for version, address in addresses.items():
            with inside(netns.fd):
                make = partial(self._socket, stack, _FAMILIES[version])
                tcp = [make(socket.SOCK_STREAM) for _ in ports]
                udp = [make(socket.SOCK_DGRAM) for _ in (*ports, FENCE)]
                sender = make(socket.SOCK_DGRAM)
                sender.bind((address, 0))
                icmp = ICMP if version == 4 else ICMPV6
                raw = {protocol: make(socket.SOCK_RAW, protocol) for protocol in (icmp, SCTP)}
                for one in raw.values():
                    one.bind((address, 0))
            for listener, port in zip(tcp, ports, strict=True):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                listener.bind((address, port))
                listener.listen(1024)
            for receiver, port in zip(udp, (*ports, FENCE), strict=True):
                receiver.bind((address, port))
            self.fence = udp.pop()
            self.listeners += tcp
            self.receivers += [(receiver, UDP) for receiver in udp]
            self.receivers += [(receiver, protocol) for protocol, receiver in raw.items()]
            self.senders[UDP, version] = sender
            self.senders |= {(protocol, version): one for protocol, one in raw.items()}
        self.fence.setblocking(True)
        self.fence.settimeout(PATIENCE)

    def clients(self, versions: Sequence[int]) -> list[socket.socket]:
        """Sockets for TCP connections to be made."""
        with inside(self.netns.fd):
            return [
                socket.socket(_FAMILIES[version], socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                for version in versions
            ]

    @staticmethod
    def _socket(stack: ExitStack, family: int, kind: int, protocol: int = 0) -> socket.socket:
        made = stack.enter_context(socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol))
        if kind != socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 22)
        return made


_SO_RCVBUFFORCE = 33


class Prober:
    """Sends rounds of probes between stations.

    ``fence`` is a namespace whose packets to the first station nothing forbids.
    """

    def __init__(self, stations: Sequence[Station], fence: Namespace, stack: ExitStack) -> None:
        self._stations = stations
        with inside(fence.fd):
            family = stations[0].fence.family
            self._fence = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        # Connection tracking knows a closed connection for some seconds: a new one on the same
        # port could be taken for it.
        self._ports = itertools.cycle(range(10000, 65000))
        self._serial = 0
        self._sent: list[Probe] = []  # of this round, the first of them with serial _first
        self._first = 0
        self._arrived: set[Probe] = set()
        self._connecting: dict[tuple[str, int], Probe] = {}
        self._epoll = stack.enter_context(select.epoll())
        self._receivers: dict[int, tuple[socket.socket, int]] = {}
        for station in stations:
            listeners = ((listener, TCP) for listener in station.listeners)
            for receiver, protocol in (*listeners, *station.receivers):
                self._receivers[receiver.fileno()] = receiver, protocol
                self._epoll.register(receiver, select.EPOLLIN)

    def round(self, probes: Iterable[Probe], expected: Collection[Probe]) -> set[Probe]:
        """Send them all; those that arrived. Returns as soon as no more will come."""
        wanted = set(expected)
        self._arrived = set()
        self._connecting.clear()
        self._sent, self._first = [], self._serial
        with ExitStack() as stack, _on_one_cpu():
            self._send(sorted(probes), stack)
            for _ in range(HOPS):
                self._wait_for_fence()
            self._look(0)
            deadline = time.monotonic() + PATIENCE
            while not wanted <= self._arrived and time.monotonic() < deadline:
                self._look(0.01)
        return self._arrived

    def _send(self, probes: Sequence[Probe], stack: ExitStack) -> None:
        by_source: dict[int, list[Probe]] = {}
        for probe in probes:
            if probe.protocol == TCP:
                by_source.setdefault(probe.source, []).append(probe)
            else:
                self._send_packet(probe)
        for source, own in by_source.items():
            clients = self._stations[source].clients([probe.version for probe in own])
            for client, probe in zip(clients, own, strict=True):
                stack.enter_context(client)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                own_end = self._stations[source].addresses[probe.version], next(self._ports)
                client.bind(own_end)
                self._connecting[own_end] = probe
                client.connect_ex((self._address(probe), probe.port))

    def _send_packet(self, probe: Probe) -> None:
        serial = self._serial
        self._serial += 1
        self._sent.append(probe)
        port = probe.port
        if probe.protocol == UDP:
            data = serial.to_bytes(4, "big")
        elif probe.protocol == SCTP:
            data, port = _sctp_init(1024 + serial % 60000, probe.port, serial), 0
        else:
            data = _echo_request(probe.protocol, serial)
        sender = self._stations[probe.source].senders[probe.protocol, probe.version]
        # What the sender's own system refuses has not arrived.
        with contextlib.suppress(OSError):
            sender.sendto(data, (self._address(probe), port))

    def _address(self, probe: Probe) -> str:
        return self._stations[probe.target].addresses[probe.version]

    def _wait_for_fence(self) -> None:
        receiver = self._stations[0].fence
        self._fence.sendto(b"", receiver.getsockname())
        receiver.recv(1)

    def _look(self, timeout: float) -> None:
        """Take all that has come."""
        while ready := self._epoll.poll(timeout):
            timeout = 0
            for fd, _ in ready:
                receiver, protocol = self._receivers[fd]
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._take(receiver, protocol)

    def _take(self, receiver: socket.socket, protocol: int) -> None:
        if protocol == TCP:
            connection, peer = receiver.accept()
            connection.close()
            probe = self._connecting.get(peer[:2])
            assert probe is not None, f"a connection of an earlier round came from {peer}"
            self._arrived.add(probe)
            return
        data = receiver.recv(2000)
        if protocol != UDP and receiver.family == socket.AF_INET:
            data = data[_IPV4_HEADER:]
        serial = _serial(protocol, data)
        if serial is None:
            return
        assert serial >= self._first, "a packet of an earlier round came"
        self._arrived.add(self._sent[serial - self._first])


@contextlib.contextmanager
def _on_one_cpu() -> Iterator[None]:
    """The calling thread stays on a CPU, and so does all that it sends."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {random.choice(sorted(before))})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _serial(protocol: int, data: bytes) -> int | None:
    """Which probe a packet is; None for one that is none, such as an echo request."""
    if protocol == UDP:
        return int.from_bytes(data[:4], "big")
    if protocol == SCTP:
        return int.from_bytes(data[16:20], "big") - 1 if data[12] == _INIT else None
    if data[0] != _ECHO[protocol][1]:
        return None
    return int.from_bytes(data[6:8] + data[4:6], "big")


def _echo_request(protocol: int, serial: int) -> bytes:
    """RFC 792, RFC 4443. The kernel fills in the checksum of ICMPv6.

    To connection tracking each identifier is another flow, so that is where the serial begins.
    """
    kind, _ = _ECHO[protocol]
    total = (kind << 8) + (serial >> 16) + (serial & 0xFFFF)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBHHH", kind, 0, ~total & 0xFFFF, serial & 0xFFFF, serial >> 16)


_INIT = 1


def _sctp_init(source_port: int, port: int, serial: int) -> bytes:
    """The first packet of an association (RFC 9260, 3.3.2), which has a tag of its own."""
    head = struct.pack("!HHI", source_port, port, 0)
    chunk = struct.pack("!BBHIIHHI", _INIT, 0, 20, serial + 1, 65535, 1, 1, 1)
    checksum = _crc32c(head + bytes(4) + chunk)
    return head + checksum.to_bytes(4, "little") + chunk


def _crc32c_table() -> list[int]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return table


_CRC32C = _crc32c_table()


def _crc32c(data: bytes) -> int:
    """RFC 9260, appendix A."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC32C[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF
