"""Endless UDP packets of many flows at once, sent by a process of its own, and which arrived.

In each round every flow sends one packet, with the number of the round. As nobody answers,
connection tracking never calls them established: each is judged by the policy as it is at that
moment.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kernel.netns import Namespace, inside
from tests.support import sender
from tests.support.netns import eventually

_SO_RCVBUFFORCE = 33
_ROOM = 1 << 24  # bytes, for packets that were not taken yet
_PATIENCE = 10.0  # seconds, for what must arrive


@dataclass(frozen=True, slots=True)
class Course:
    """From where to where a flow goes. ``received_at`` may be another place, after NAT."""

    source: Namespace
    source_address: str
    address: str
    port: int
    target: Namespace
    received_at: tuple[str, int]


class Streams:
    """Flows, counted as ``courses`` are. Nothing is sent before ``start``."""

    def __init__(self, courses: Sequence[Course], stack: ExitStack) -> None:
        receivers: dict[tuple[str, int], socket.socket] = {}
        senders: list[socket.socket] = []
        for course in courses:
            if course.received_at not in receivers:
                receivers[course.received_at] = _udp(course.target, course.received_at, stack)
            own = _udp(course.source, (course.source_address, 0), stack)
            # Few packets are on their way at a time, lest a queue be full.
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            own.setblocking(True)
            senders.append(own)
        self._receivers = list(receivers.values())
        self._flows = {own.getsockname()[:2]: number for number, own in enumerate(senders)}
        self._arrived: list[set[int]] = [set() for _ in courses]
        state = os.memfd_create("streams")
        stack.callback(os.close, state)
        os.ftruncate(state, mmap.PAGESIZE)
        self._state = stack.enter_context(mmap.mmap(state, mmap.PAGESIZE))
        targets = [
            f"{own.fileno()},{course.address},{course.port}"
            for own, course in zip(senders, courses, strict=True)
        ]
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
        for receiver in self._receivers:
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, peer = receiver.recvfrom(100)
                    self._arrived[self._flows[peer[:2]]].add(int.from_bytes(data, "big"))


def _udp(netns: Namespace, address: tuple[str, int], stack: ExitStack) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with inside(netns.fd):
        made = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
    made.bind(address)
    made.setblocking(False)
    return made
