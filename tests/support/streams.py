"""Endless packets of many flows at once, sent by a process of its own, and which arrived.

In each round every flow sends one packet, with the number of the round: of UDP, or the SYN of a TCP
connection. As nobody answers, connection tracking never calls them established: each is judged by
the policy as it is at that moment.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kernel.netns import Namespace, inside
from tests.support import sender
from tests.support.netns import eventually, run
from tests.support.probes import TCP, UDP

_SO_RCVBUFFORCE = 33
_ROOM = 1 << 24  # bytes, for packets that were not taken yet
_PATIENCE = 30.0  # seconds, for what must arrive


@dataclass(frozen=True, slots=True)
class Course:
    """From where to where a flow goes. ``received_at`` may be another place, after NAT.

    Of TCP, ``target`` listens nowhere, and is kept from saying so.
    """

    source: Namespace
    source_address: str
    address: str
    port: int
    target: Namespace
    received_at: tuple[str, int]
    protocol: int = UDP


_PORT = 20_000  # and up, from which TCP flows come
_HEADER = 20  # bytes, of IPv4
_TCP_HEAD = struct.Struct(">HHI")
_SILENCE = """table inet silence {
chain c { type filter hook output priority -1000; tcp flags rst drop; }
}
"""


class Streams:
    """Flows, counted as ``courses`` are. Nothing is sent before ``start``."""

    def __init__(self, courses: Sequence[Course], stack: ExitStack) -> None:
        receivers: dict[tuple[int, str, int], socket.socket] = {}
        senders: list[socket.socket] = []
        self._courses = courses
        self._flows: dict[tuple[int, str, int], int] = {}  # by protocol and source
        targets = []
        silent: set[Namespace] = set()
        for number, course in enumerate(courses):
            protocol, (address, port) = course.protocol, course.received_at
            if protocol == TCP:
                port = 0
                if course.target not in silent:
                    silent.add(course.target)
                    run(course.target, "nft", "-f", "-", stdin=_SILENCE)
            if (protocol, address, port) not in receivers:
                receiver = _socket(protocol, course.target, (address, port), stack)
                receivers[protocol, address, port] = receiver
            own = _socket(protocol, course.source, (course.source_address, 0), stack)
            # Few packets are on their way at a time, lest a queue be full.
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            own.setblocking(True)
            senders.append(own)
            target = f"{own.fileno()},{course.address},{course.port}"
            source, source_port = own.getsockname()[:2]
            if protocol == TCP:
                source_port = _PORT + number
                target += f",{source},{source_port}"
            self._flows[protocol, source, source_port] = number
            targets.append(target)
        self._receivers = [(protocol, own) for (protocol, _, _), own in receivers.items()]
        self._arrived: list[set[int]] = [set() for _ in courses]
        state = os.memfd_create("streams")
        stack.callback(os.close, state)
        os.ftruncate(state, mmap.PAGESIZE)
        self._state = stack.enter_context(mmap.mmap(state, mmap.PAGESIZE))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", sender.__file__, str(state), *targets],
            pass_fds=[state, *(own.fileno() for own in senders)],
        )
        stack.callback(self._process.wait)
        stack.callback(self._process.kill)

    def start(self) -> int:
        """Send from now on; the first round of which nothing was sent yet."""
        self._take()
        for numbers in self._arrived:
            numbers.clear()
        first = self.rounds + 1
        self._state[sender.SENDING] = 1
        self.wait_until(first + 10)
        return first

    def stop(self) -> int:
        """Begin no more rounds; how many were sent in full."""
        self._state[sender.SENDING] = 0
        return self.rounds

    @property
    def rounds(self) -> int:
        """How many have been sent in full."""
        return int.from_bytes(self._state[sender.ROUNDS], "big")

    @staticmethod
    def machine_dropped() -> int:
        """How many packets this machine has dropped for want of room in a CPU's queue."""
        lines = Path("/proc/net/softnet_stat").read_text().splitlines()
        return sum(int(line.split()[1], 16) for line in lines)

    def wait_until(self, rounds: int) -> None:
        """Until so many have been sent."""
        eventually(lambda: self.rounds >= rounds or self._process.poll() is not None)
        assert self._process.poll() is None, "the sender died"

    def arrived(self, number: int, expected: Collection[int]) -> set[int]:
        """The rounds of a flow that arrived, once those that should have, or too long passed."""
        deadline = time.monotonic() + _PATIENCE
        self._take()
        while not self._arrived[number].issuperset(expected) and time.monotonic() < deadline:
            self._take()
        return self._arrived[number]

    def _take(self) -> None:
        for protocol, receiver in self._receivers:
            address, at = receiver.getsockname()[:2]
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, (source, port, *_) = receiver.recvfrom(100)
                    number = int.from_bytes(data, "big")
                    if protocol == TCP:
                        head = 0 if receiver.family == socket.AF_INET6 else _HEADER
                        port, at, number = _TCP_HEAD.unpack_from(data, head)
                    flow = self._flows.get((protocol, source, port))
                    if flow is not None and self._courses[flow].received_at == (address, at):
                        self._arrived[flow].add(number)


def _socket(
    protocol: int, netns: Namespace, address: tuple[str, int], stack: ExitStack
) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    kind = socket.SOCK_RAW if protocol == TCP else socket.SOCK_DGRAM
    with inside(netns.fd):
        made = stack.enter_context(socket.socket(family, kind, protocol))
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
    made.bind(address)
    made.setblocking(False)
    return made
