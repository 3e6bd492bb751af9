"""The BFD process: its packets on real wires, its restarts, its pauses, and who may speak to it."""

from __future__ import annotations

import os
import queue
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from api.net import Net, parse_net
from bird_glue.bfd import Packet, State
from bird_glue.detector import (
    Detector,
    Failure,
    FromDetector,
    Timing,
    Watch,
    describe,
    find,
    kill,
)
from kernel.netns import Namespace, inside
from tests.support.netns import connect, eventually, fresh_namespace, run

ONE, TWO = "172.31.1.1", "172.31.1.2"
FAST = Timing(100, 5)
PATIENT = Timing(200, 10)  # 2 s, in which a busy machine can start a process anew


@dataclass
class End:
    """A detector, in the test's own process, whose BFD process is in a namespace."""

    namespace: Namespace
    directory: Path
    timing: Timing | None = FAST
    failures: list[Failure] = field(default_factory=list)
    queue: queue.SimpleQueue[FromDetector] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.detector = Detector(self.directory, self.queue.put, self.timing)

    def watch(self, *watches: Watch) -> None:
        self.detector.configure({watch.peer: watch for watch in watches})

    def turn(self) -> None:
        now = time.monotonic()
        with inside(self.namespace.fd):
            self.detector.step(now)
        while not self.queue.empty():
            self.failures += self.detector.handle(self.queue.get(), now)

    def state(self, peer: str) -> str:
        self.turn()
        return describe(self.detector.get(host(peer)))

    @property
    def pid(self) -> int:
        return find(self.directory)

    def restart(self) -> None:
        """As an agent's: the process stays."""
        self.detector.close()
        self.detector = Detector(self.directory, self.queue.put, self.timing)

    def end(self) -> None:
        self.detector.close()
        kill(self.directory)


def host(text: str) -> Net:
    return parse_net(text)


def watch(peer: str, local: str, *, active: bool = True, multihop: bool = False) -> Watch:
    return Watch(host(peer), host(local), active, multihop)


def wait(condition: object, *ends: End, seconds: float = 60) -> None:
    def turned() -> bool:
        for end in ends:
            end.turn()
        return bool(condition())  # type: ignore[operator]

    eventually(turned, seconds)


def hold(condition: object, *ends: End, seconds: float = 1.5) -> None:
    """It is so, and stays so."""
    until = time.monotonic() + seconds

    def over() -> bool:
        for end in ends:
            end.turn()
        assert condition()  # type: ignore[operator]
        return time.monotonic() > until

    eventually(over, seconds + 10)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[End, End]]:
    with two(tmp_path) as ends:
        yield ends


@pytest.fixture
def patient_pair(tmp_path: Path) -> Iterator[tuple[End, End]]:
    with two(tmp_path, PATIENT) as ends:
        yield ends


@contextmanager
def two(directory: Path, timing: Timing = FAST) -> Iterator[tuple[End, End]]:
    with fresh_namespace() as near, fresh_namespace() as far:
        connect(near, "eth0", far, "eth0", [f"{ONE}/24", f"{TWO}/24", "fd00::1/64", "fd00::2/64"])
        for namespace in (near, far):
            run(namespace, "ip", "address", "flush", "dev", "eth0", "scope", "link")
            run(namespace, "sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=0")
        ends = End(near, directory / "one", timing), End(far, directory / "two", timing)
        try:
            yield ends
        finally:
            for end in ends:
                end.end()


def both_up(one: End, two: End) -> bool:
    return one.state(TWO)[:2] == two.state(ONE)[:2] == "up"


def test_both_see_the_other_and_see_it_die(pair: tuple[End, End]) -> None:
    one, two = pair
    one.watch(watch(TWO, ONE))
    two.watch(watch(ONE, TWO, active=False))
    wait(lambda: one.state(TWO) == two.state(ONE) == "up (0.5 s)")
    hold(lambda: not one.failures + two.failures, one, two)
    kill(two.directory)
    two.detector.close()
    wait(lambda: one.failures, one)
    assert one.failures[0].info == "BFD: nothing heard from the peer for 0.5 s"
    assert one.failures[0].independent
    assert one.state(TWO) == "down"


def test_ipv6_and_several_hops(pair: tuple[End, End]) -> None:
    one, two = pair
    one.watch(watch("fd00::2", "fd00::1"), watch(TWO, ONE, multihop=True))
    two.watch(watch("fd00::1", "fd00::2", active=False), watch(ONE, TWO, active=False))
    wait(lambda: both_up(one, two), one, two)
    wait(lambda: one.state("fd00::2")[:2] == two.state("fd00::1")[:2] == "up", one, two)
    run(two.namespace, "ip", "link", "set", "eth0", "down")
    wait(lambda: len(one.failures) == len(two.failures) == 2, one, two)


def test_no_restart_of_ours_is_a_death(patient_pair: tuple[End, End]) -> None:
    """Neither the agent's, nor that of the process, be it killed or replaced."""
    one, two = patient_pair
    one.watch(watch(TWO, ONE))
    two.watch(watch(ONE, TWO))
    wait(lambda: both_up(one, two))
    before = one.pid
    one.restart()
    one.watch(watch(TWO, ONE))
    wait(lambda: both_up(one, two))
    assert one.pid == before
    os.kill(before, signal.SIGKILL)
    wait(lambda: one.pid not in (0, before) and both_up(one, two), one, two)
    before = one.pid
    os.kill(before, signal.SIGTERM)
    wait(lambda: one.pid not in (0, before) and both_up(one, two), one, two)
    hold(lambda: not one.failures + two.failures and both_up(one, two), one, two, seconds=3)


def test_a_process_of_another_version_is_replaced(patient_pair: tuple[End, End]) -> None:
    one, two = patient_pair
    one.watch(watch(TWO, ONE))
    two.watch(watch(ONE, TWO))
    wait(lambda: both_up(one, two))
    before = one.pid
    one.detector.handle(
        FromDetector(one.detector._channel, (b'{"hello": "older", "problem": ""}',)),  # type: ignore[arg-type]
        time.monotonic(),
    )
    wait(lambda: one.pid not in (0, before) and both_up(one, two), one, two)
    hold(lambda: not one.failures + two.failures, one, two, seconds=3)


def test_one_that_stands_still_takes_nobody_for_dead(tmp_path: Path) -> None:
    """What came meanwhile waits in the socket, and time that was not ours does not count."""
    with two(tmp_path, FAST) as (one, other):
        one.timing = Timing(100, 100)  # the other waits longer than it stands still
        one.restart()
        one.watch(watch(TWO, ONE))
        other.watch(watch(ONE, TWO))
        wait(lambda: one.state(TWO) == "up (0.5 s)", one, other)
        os.kill(one.pid, signal.SIGSTOP)
        hold(lambda: True, one, other, seconds=2)
        os.kill(one.pid, signal.SIGCONT)
        hold(lambda: not one.failures + other.failures and both_up(one, other), one, other)


def test_an_intended_end_is_no_failure(pair: tuple[End, End]) -> None:
    one, two = pair
    one.watch(watch(TWO, ONE))
    two.watch(watch(ONE, TWO))
    wait(lambda: both_up(one, two))
    one.watch()  # the peer is not wanted any more
    wait(lambda: two.state(ONE) == "", one, two)
    one.watch(watch(TWO, ONE))
    wait(lambda: both_up(one, two))
    one.detector.end()
    wait(lambda: two.state(ONE) == "", two)
    assert one.pid == 0
    hold(lambda: not two.failures, two, seconds=0.5)


def test_a_failure_while_no_agent_looked_is_told_to_the_next(pair: tuple[End, End]) -> None:
    one, two = pair
    one.watch(watch(TWO, ONE))
    two.watch(watch(ONE, TWO))
    wait(lambda: both_up(one, two))
    began = time.time()
    one.restart()
    two.end()
    until = time.monotonic() + 1.0
    eventually(lambda: time.monotonic() > until)
    one.watch(watch(TWO, ONE))
    wait(lambda: one.failures, one)
    assert began <= one.failures[0].time <= time.time()


def test_a_taken_port_is_named_and_used_when_free(pair: tuple[End, End]) -> None:
    one, two = pair
    with (
        inside(one.namespace.fd),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        other.bind(("", 3784))
        one.watch(watch(TWO, ONE))
        two.watch(watch(ONE, TWO))
        wait(lambda: "UDP port 3784: " in one.detector.problem, one, two)
    wait(lambda: both_up(one, two))
    assert one.detector.problem == ""


def test_who_may_speak(pair: tuple[End, End]) -> None:
    """Only the peer, from its link, with our number: else anybody could end a session."""
    one, two = pair
    run(two.namespace, "ip", "address", "add", "172.31.1.3/24", "dev", "eth0")
    one.watch(watch(TWO, ONE))
    two.watch(watch(ONE, TWO))
    wait(lambda: both_up(one, two))
    down = Packet(State.DOWN, 3, 3, 77, 0, 1_000_000, 1_000_000)
    wrong = down._replace(yours=1234)
    with inside(two.namespace.fd):
        for source, ttl, port, packet in (
            (TWO, 254, 3784, down),
            (TWO, 255, 3784, wrong),
            (TWO, 255, 4784, wrong),
            (TWO, 255, 4784, down),
            ("172.31.1.3", 255, 3784, down),
        ):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
                sender.bind((source, 0))
                for data in (packet.pack(), b"", b"x" * 500, struct.pack("!24s", b"\xff" * 24)):
                    sender.sendto(data, (ONE, port))
    hold(lambda: not one.failures and both_up(one, two), one, two)
    with inside(two.namespace.fd), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)
        sender.bind((TWO, 0))
        sender.sendto(down.pack(), (ONE, 3784))
    wait(lambda: one.failures, one, two)
    assert "the peer does not hear us" in one.failures[0].info


def test_a_flood_does_not_stop_it(pair: tuple[End, End]) -> None:
    one, two = pair
    one.watch(watch(TWO, ONE))
    two.watch(watch(ONE, TWO))
    wait(lambda: both_up(one, two))
    with inside(two.namespace.fd):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        junk = os.urandom(24)

        def flooded() -> bool:
            for _ in range(500):
                sender.sendto(junk, (ONE, 3784))
            return not one.failures + two.failures and both_up(one, two)

        hold(flooded, one, two)


def test_nobody_is_watched_where_it_is_off(tmp_path: Path) -> None:
    with fresh_namespace() as namespace:
        end = End(namespace, tmp_path / "off", None)
        end.watch(watch(TWO, ONE))
        hold(lambda: end.pid == 0 and end.detector.problem == "", end, seconds=0.3)
        assert end.detector.next_due(0.0) is None


def test_what_the_process_is_told_in_error_hurts_nobody(pair: tuple[End, End]) -> None:
    one, _ = pair
    one.watch(watch(TWO, ONE))
    wait(lambda: one.pid and one.detector._told, one)
    channel = one.detector._channel
    assert channel
    junk: tuple[object, ...] = ([], {}, {"sessions": 5}, {"sessions": [["x"], ["a"] * 7]}, "x", 5)
    for document in (*junk, {"sessions": [["a"] * 7]}):
        channel.send(document)
    hold(lambda: one.detector._channel is channel, one, seconds=0.3)


@pytest.mark.parametrize(
    ("text", "timing"),
    [("", Timing()), ("on", Timing()), ("off", None), ("300x3", Timing(300, 3))],
)
def test_settings(text: str, timing: Timing | None) -> None:
    assert Timing.parse(text) == timing


@pytest.mark.parametrize("text", ["yes", "300", "x3", "300x", "5x3", "300x0", "300x256", "-3x3"])
def test_wrong_settings(text: str) -> None:
    with pytest.raises(ValueError, match=r"MANX_BFD=.*500x5"):
        Timing.parse(text)
