"""BFD's packet and state machine: two ends, a wire between them, and what RFC 5880 asks."""

from __future__ import annotations

import copy
import heapq
import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bird_glue.bfd import (
    TURNS,
    Diagnostic,
    MalformedError,
    Packet,
    Session,
    Settings,
    State,
    parse,
)

HALF_SECOND = Settings(500_000, 5, active=True)
U32 = st.integers(0, 2**32 - 1)
PACKETS = st.builds(
    Packet,
    state=st.sampled_from(State),
    diagnostic=st.integers(0, 31),
    multiplier=st.integers(1, 255),
    mine=st.integers(1, 2**32 - 1),
    yours=st.integers(1, 2**32 - 1),
    desired_tx=U32,
    required_rx=U32,
    required_echo=U32,
    poll=st.booleans(),
    final=st.booleans(),
    independent=st.booleans(),
    demand=st.booleans(),
)
SETTINGS = st.builds(
    Settings,
    interval=st.integers(50_000, 2_000_000),
    multiplier=st.integers(1, 10),
    active=st.just(True),
)


@given(PACKETS)
def test_packets_survive_the_wire(packet: Packet) -> None:
    assert parse(packet.pack()) == packet
    assert parse(packet.pack() + b"behind it") == packet


@given(st.binary(max_size=60))
def test_any_bytes_are_a_packet_or_malformed(data: bytes) -> None:
    try:
        found = parse(data)
    except MalformedError:
        return
    assert found.multiplier
    assert found.mine
    assert found.yours or found.state <= State.DOWN


GOOD = Packet(State.DOWN, 0, 3, 7, 0, 1_000_000, 1_000_000).pack()


@pytest.mark.parametrize(
    ("where", "value", "why"),
    [
        (0, 0x00, "version 0, expected 1"),
        (0, 0x40, "version 2, expected 1"),
        (1, 0x44, "authenticated"),
        (1, 0x41, "multipoint"),
        (1, 0xC0, "your discriminator 0 in state UP"),
        (2, 0, "detection multiplier 0"),
        (3, 23, "length 23"),
        (3, 25, "length 25"),
        (7, 0, "my discriminator 0"),
    ],
)
def test_what_is_discarded(where: int, value: int, why: str) -> None:
    data = bytearray(GOOD)
    data[where] = value
    with pytest.raises(MalformedError, match=why):
        parse(bytes(data))
    with pytest.raises(MalformedError, match="23 bytes"):
        parse(GOOD[:23])


@dataclass
class Wire:
    """Two sessions and packets under way. ``cut`` loses those to the ends that are in it."""

    ends: tuple[Session, Session]
    delay: float = 0.001
    now: float = 0.0
    cut: set[int] = field(default_factory=set)
    sent: list[tuple[float, int, Packet]] = field(default_factory=list)
    under_way: list[tuple[float, int, int, bytes]] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def put(self, sender: int, data: bytes | None) -> None:
        if data is not None:
            self.sent.append((self.now, sender, parse(data)))
            if 1 - sender not in self.cut:
                entry = (self.now + self.delay, len(self.sent), 1 - sender, data)
                heapq.heappush(self.under_way, entry)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while True:
            arrival = self.under_way[0][0] if self.under_way else float("inf")
            following = min(arrival, *(end.due for end in self.ends))
            if following > until:
                self.now = until
                return
            self.now = max(self.now, following)
            if arrival == following:
                _, _, receiver, data = heapq.heappop(self.under_way)
                self.put(receiver, self.ends[receiver].receive(parse(data), self.now))
            for number, end in enumerate(self.ends):
                if end.due <= self.now:
                    self.put(number, end.advance(self.now, self.chance.random()))

    @property
    def states(self) -> tuple[State, State]:
        return self.ends[0].state, self.ends[1].state


def wire(one: Settings = HALF_SECOND, other: Settings = HALF_SECOND, delay: float = 0.001) -> Wire:
    return Wire((Session(one, 11, 0.0), Session(other, 22, 0.0)), delay)


UP = (State.UP, State.UP)
DOWN = (State.DOWN, State.DOWN)


@given(SETTINGS, SETTINGS, st.floats(0.0001, 0.02))
@settings(max_examples=50, deadline=None)
def test_two_ends_come_up_stay_up_and_see_each_other_die(
    one: Settings, other: Settings, delay: float
) -> None:
    both = wire(one, other, delay)
    both.run(10)
    assert both.states == UP
    both.run(60)
    assert both.states == UP
    assert not any(end.failed for end in both.ends)
    slowest = max(one.interval, other.interval)
    detection = [other.multiplier * slowest / 1e6, one.multiplier * slowest / 1e6]
    assert [end.detection for end in both.ends] == detection
    both.cut = {0, 1}
    both.run(max(detection) + 2 * delay + 0.001)
    assert both.states == DOWN
    assert all(end.failed for end in both.ends)
    both.cut = set()
    both.run(15)
    assert both.states == UP


@given(SETTINGS, SETTINGS)
@settings(max_examples=30, deadline=None)
def test_nobody_sends_more_than_was_agreed(one: Settings, other: Settings) -> None:
    """Once up and polled: every interval is that of the slower end, less the jitter."""
    both = wire(one, other)
    both.run(20)
    start = len(both.sent)
    both.run(20)
    slowest = max(one.interval, other.interval) / 1e6
    for number, multiplier in enumerate((one.multiplier, other.multiplier)):
        times = [at for at, sender, _ in both.sent[start:] if sender == number]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        most = 0.9 if multiplier == 1 else 1.0
        assert all(0.75 * slowest <= gap <= most * slowest + 1e-6 for gap in gaps)
        assert len(times) >= 20 / slowest - 2
    assert not any(packet.poll or packet.final for _, _, packet in both.sent[start:])
    assert all(packet.independent for _, _, packet in both.sent)


@given(st.integers(1, 10), st.integers(0, 2**32))
def test_turns_of_a_process_keep_to_the_jitter(multiplier: int, seed: int) -> None:
    """It sends what is due within half a turn together, so that many sessions share a turn."""
    interval, chance = 0.5, random.Random(seed)
    session = Session(Settings(500_000, multiplier, active=True), 5, 0.0)
    session.resume([5, State.UP, State.UP, 7, 1, 500_000, 500_000, 255], 0.0)
    turn, sent = interval / TURNS, []
    for count in range(10 * TURNS):
        now = count * turn
        if session.due <= now + turn / 2 and session.advance(now, chance.random(), turn / 2):
            sent.append(now)
    most = 0.9 if multiplier == 1 else 1.0
    gaps = [(after - before) / interval for before, after in itertools.pairwise(sent)]
    assert all(0.75 - 1e-9 <= gap <= most + 1e-9 for gap in gaps)


def test_the_same_packet_again_only_takes_time_on() -> None:
    both = wire()
    both.run(10.1)
    packet = next(p for _, sender, p in reversed(both.sent) if sender == 1)
    session, other = both.ends[0], copy.copy(both.ends[0])
    assert session.receive(packet, both.now) is None
    other.receive_again(both.now)
    assert all(getattr(session, name) == getattr(other, name) for name in Session.__slots__)


def test_before_it_is_up_it_is_slow_and_where_nobody_answers_slower_still() -> None:
    both = wire()
    both.cut = {0, 1}
    both.run(30)
    assert 30 <= sum(sender == 0 for _, sender, _ in both.sent) <= 40
    assert all(packet.desired_tx == 1_000_000 for _, _, packet in both.sent)
    before = len(both.sent)
    both.run(60)
    assert len(both.sent) - before <= 18
    both.cut = set()
    both.run(12)
    assert both.states == UP


def test_one_that_only_answers_is_silent_until_it_is_called() -> None:
    quiet = HALF_SECOND._replace(active=False)
    both = wire(quiet, quiet)
    both.run(100)
    assert both.sent == []
    both = wire(quiet, HALF_SECOND)
    both.run(10)
    assert both.states == UP
    both.cut = {0}  # it hears nothing more, and says so
    both.run(4)
    assert State.UP not in both.states
    assert [end.diagnostic for end in both.ends] == [
        Diagnostic.EXPIRED,
        Diagnostic.NEIGHBOR_SAID_DOWN,
    ]
    assert all(end.failed for end in both.ends)
    both.cut = {0, 1}
    both.run(120)
    before = sum(sender == 0 for _, sender, _ in both.sent)
    both.run(60)
    assert sum(sender == 0 for _, sender, _ in both.sent) == before


def test_an_end_by_intention_is_no_failure() -> None:
    both = wire()
    both.run(10)
    both.put(0, both.ends[0].end())
    both.run(10)
    assert both.states == (State.ADMIN_DOWN, State.DOWN)
    assert not any(end.failed for end in both.ends)
    assert both.ends[0].due == float("inf")


def test_a_successor_goes_on_without_the_peer_noticing() -> None:
    both = wire()
    both.run(10)
    snapshot = both.ends[0].snapshot()
    both.run(1)
    successor = Session(HALF_SECOND, 99, both.now)
    successor.resume(snapshot, both.now)
    both.ends = successor, both.ends[1]
    both.run(60)
    assert both.states == UP
    assert both.ends[1].diagnostic is Diagnostic.NONE
    both.cut = {0, 1}
    both.run(2.6)
    assert successor.failed
    with pytest.raises(ValueError, match="nothing to go on with"):
        Session(HALF_SECOND, 98, both.now).resume(successor.snapshot(), both.now)


def test_other_settings_are_agreed_on_without_an_end() -> None:
    both = wire()
    both.run(10)
    both.ends[0].set(Settings(100_000, 4, active=True), both.now)
    both.ends[1].set(Settings(200_000, 6, active=True), both.now)
    both.run(5)
    assert [end.detection for end in both.ends] == [1.2, 0.8]
    both.ends[0].set(HALF_SECOND, both.now)
    both.run(30)
    assert both.states == UP
    assert not any(end.failed for end in both.ends)


def test_time_that_was_not_ours_does_not_count() -> None:
    """Both stood still, as a virtual machine that is moved: nothing came, nothing was sent."""
    both = wire()
    both.run(10)
    both.under_way.clear()
    both.now += 20
    for end in both.ends:
        end.delay(20)
    both.run(10)
    assert both.states == UP


@given(
    st.lists(
        st.one_of(PACKETS, st.floats(0, 20), st.just(None)),
        max_size=60,
    ),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_whatever_a_peer_sends(story: list[Packet | float | None], active: bool) -> None:
    """Nothing raises, nobody who was not heard is sent to too often, only one that was up fails."""
    session = Session(HALF_SECOND._replace(active=active), 5, 0.0)
    now, was_up, heard = 0.0, False, False
    for entry in story:
        if isinstance(entry, Packet):
            heard = True
            assert (session.receive(entry, now) is not None) == entry.poll
        elif isinstance(entry, float):
            now += entry
        was_up |= session.state is State.UP
        sent = session.advance(now, 0.5)
        assert sent is None or active or heard
        if sent is not None:
            assert parse(sent).state is session.state
            assert session.advance(now, 0.5) is None
        assert session.due > now
        assert was_up or not session.failed
