"""What peers were sent is compared with what they should have been, and set right."""

from __future__ import annotations

from api.net import V4, Net, parse_net
from bird_glue.announcement import Announcement, Announcements
from bird_glue.announcer import Announcer
from bird_glue.dialogue import Dialogue
from bird_glue.messages import Announced, Answer, Attributes, EndOfRib, Up, Updated

PEER = parse_net("10.0.0.1")
ONE, TWO, THREE = (parse_net(f"10.{n}.0.0/24") for n in (1, 2, 3))
WAY = Announcement(None, Attributes(origin=0))


class ExaBgp:
    """Says done to everything, and sends what it is told, but for prefixes it loses."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.loses: set[str] = set()

    def send(self, line: str) -> None:
        self.lines.append(line)


class Stage:
    def __init__(self) -> None:
        self.announcer, self.exabgp = Announcer(), ExaBgp()
        self.dialogue = Dialogue(self.exabgp, 0, 0.0)  # type: ignore[arg-type]
        self.announcer.note(Up(PEER, 0.0))

    def want(self, *nets: Net) -> None:
        wanted: dict[Net, Announcements] = {PEER: dict.fromkeys(nets, WAY)}
        self.announcer.want(wanted, {PEER: None}, {}, mark_end=True)

    def run(self, now: float) -> list[str]:
        """All that is due, and what was said for it."""
        start = len(self.exabgp.lines)
        while True:
            before = len(self.exabgp.lines)
            self.announcer.step(self.dialogue, now)
            self.dialogue.pump(now)
            if len(self.exabgp.lines) == before:
                return self.exabgp.lines[start:]
            self._obey(self.exabgp.lines[-1])
            self.dialogue.heard(Answer(True), now)

    def _obey(self, line: str) -> None:
        nets = [word for word in line.split() if "/" in word and word not in self.exabgp.loses]
        if "eor" in line:
            self.announcer.note(EndOfRib(PEER, True, V4))
        elif "withdraw" in line:
            gone = tuple(map(parse_net, nets))
            self.announcer.note(Updated(PEER, True, gone, (), Attributes()))
        elif "announce" in line:
            told = tuple(Announced(parse_net(net), PEER) for net in nets)
            self.announcer.note(Updated(PEER, True, (), told, Attributes()))

    @property
    def counts(self) -> tuple[int, int, int]:
        a = self.announcer
        return a.intended(PEER), a.sent(PEER), a.adrift(PEER)


def test_what_is_as_it_should_be_is_left_alone() -> None:
    stage = Stage()
    stage.want(ONE, TWO)
    assert len(stage.run(0)) == 2
    for now in range(10, 100, 10):
        assert [line for line in stage.run(now) if "nlri" in line] == []
    assert stage.counts == (2, 2, 0)


def test_what_was_lost_is_told_again_once() -> None:
    stage = Stage()
    stage.exabgp.loses = {str(TWO)}
    stage.want(ONE, TWO)
    stage.run(0)
    assert stage.run(10) == []  # it may have been under way
    assert stage.counts == (2, 1, 0)
    stage.exabgp.loses = set()
    withdrawn, announced = stage.run(20)
    assert f"withdraw attributes next-hop self nlri {TWO}" in withdrawn
    assert announced.endswith(f"nlri {TWO}")
    stage.run(30)
    assert stage.counts == (2, 2, 0)


def test_what_is_lost_every_time_is_not_told_without_end() -> None:
    stage = Stage()
    stage.exabgp.loses = {str(TWO)}
    stage.want(ONE, TWO)
    for now in range(0, 200, 10):
        stage.run(now)
    assert sum("withdraw" in line for line in stage.exabgp.lines) == 1
    assert stage.counts == (2, 1, 1)


def test_what_nobody_wants_to_be_told_is_taken_back() -> None:
    stage = Stage()
    stage.want(ONE)
    stage.run(0)
    told = (Announced(THREE, PEER),)
    stage.announcer.note(Updated(PEER, True, (), told, Attributes()))
    stage.run(10)
    assert stage.counts == (1, 2, 0)
    stage.run(20)
    stage.run(30)
    assert stage.counts == (1, 1, 0)
