"""The relay as ExaBGP runs it: a real process, its stdin and stdout pipes, its socket."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from api.net import Net, parse_net
from bird_glue import relay
from bird_glue.announcement import Announcement
from bird_glue.announcer import Announcer
from bird_glue.channel import Channel, FromRelay
from bird_glue.config import RELAY
from bird_glue.dialogue import ANSWER_SECONDS, Dialogue, Result
from bird_glue.limits import MOST
from bird_glue.messages import (
    Answer,
    Attributes,
    Down,
    EndOfRib,
    Event,
    Hello,
    Live,
    Notified,
    Text,
    Up,
    Updated,
    parse,
)
from tests.bird_glue.rawpeer import encoded
from tests.support.netns import eventually

PEER, OTHER = "10.0.0.2", "10.0.0.3"


def event(kind: str, peer: str = PEER, **neighbor: Any) -> dict[str, Any]:
    return {"type": kind, "time": 5.0, "neighbor": {"address": {"peer": peer}, **neighbor}}


def state(name: str, peer: str = PEER, **more: Any) -> dict[str, Any]:
    return event("state", peer, state=name, **more)


def update(peer: str = PEER, **parts: Any) -> dict[str, Any]:
    return event("update", peer, direction="receive", message={"update": parts})


def announce(*nets: str, med: int = 0, hop: str = PEER) -> dict[str, Any]:
    entries = [{"nlri": net} for net in nets]
    return update(
        attribute={"origin": "igp", "med": med}, announce={"ipv4 unicast": {hop: entries}}
    )


def withdraw(*nets: str) -> dict[str, Any]:
    return update(withdraw={"ipv4 unicast": [{"nlri": net} for net in nets]})


EOR = event("update", direction="receive", message={"eor": {"afi": "ipv4", "safi": "unicast"}})


class Running:
    """A relay with this test as its ExaBGP."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(RELAY), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        eventually(path.exists)

    def say(self, *lines: dict[str, Any] | str) -> None:
        assert self.process.stdin
        for line in lines:
            text = line if isinstance(line, str) else json.dumps(line)
            self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().decode().strip()

    def end(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            assert self.process.wait(10) == 0  # it ends when ExaBGP does
        finally:
            self.process.kill()


class Client:
    """A client of the relay."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        # bound and listening are two steps
        eventually(lambda: self.socket.connect_ex(str(path)) == 0)
        self.reader = self.socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.reader.close()
        self.socket.close()

    def next(self) -> Event | None:
        return parse(self.reader.readline().strip())

    def snapshot(self) -> list[Event]:
        found: list[Event] = []
        while not isinstance(made := self.next(), Live):
            assert made is not None
            found.append(made)
        return found

    def send(self, text: str) -> None:
        self.socket.sendall(text.encode())


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path / "s")
    try:
        yield made
    finally:
        made.end()


@contextmanager
def settled(running: Running, *lines: dict[str, Any] | str) -> Iterator[Client]:
    """A client that connects after the relay has taken in the lines."""
    with Client(running.path) as before:
        before.snapshot()
        running.say(*lines, "marker")
        while getattr(before.next(), "line", None) != "marker":
            pass
    with Client(running.path) as client:
        yield client


def held(events: list[Event]) -> dict[Net, int | None]:
    """Prefix → MED, of all updates in order."""
    found: dict[Net, int | None] = {}
    for made in events:
        if isinstance(made, Updated):
            for net in made.withdrawn:
                found.pop(net, None)
            found.update({net: made.attributes.med for net, _ in made.announced})
    return found


def test_what_was_sent_comes_together_and_in_order(running: Running) -> None:
    def echo(number: int) -> dict[str, Any]:
        sent = announce(f"10.{number}.0.0/16")
        return sent | {"neighbor": sent["neighbor"] | {"direction": "send"}}

    with settled(running) as client:
        client.snapshot()
        for number in range(100):
            running.say(echo(number))
        chunks = [client.socket.recv(1 << 20)]
        while sum(chunk.count(b"\n") for chunk in chunks) < 100:
            chunks.append(client.socket.recv(1 << 20))
        assert len(chunks) < 50
        told = [parse(line) for line in b"".join(chunks).splitlines()]
        assert [made.sent and made.announced[0].net for made in told if isinstance(made, Updated)] \
            == [parse_net(f"10.{number}.0.0/16") for number in range(100)]  # fmt: skip
        running.say(echo(0), "done")
        assert isinstance(client.next(), Updated)
        assert client.next() == Answer(True)
    with Client(running.path) as again:
        assert held(again.snapshot()) == {}


def test_snapshot_is_what_holds_now(running: Running) -> None:
    lines = (
        state("up"),
        announce("10.1.0.0/24", "10.2.0.0/24", med=1),
        announce("10.2.0.0/24", med=2),
        announce("10.3.0.0/24", med=1),
        withdraw("10.1.0.0/24"),
        EOR,
        state("up", OTHER),
        event(
            "notification", OTHER, direction="receive",
            notification={"code": 6, "subcode": 2, "message": ""},
        ),
        state("down", OTHER, reason="notification received (6,2)"),
    )  # fmt: skip
    with settled(running, *lines) as client:
        events = client.snapshot()
    assert isinstance(events[0], Hello)
    assert events[0].pid == os.getpid()
    assert held(events) == {parse_net("10.2.0.0/24"): 2, parse_net("10.3.0.0/24"): 1}
    kinds = [type(made) for made in events[1:]]
    assert kinds == [Up, Updated, Updated, EndOfRib, Notified, Down]


def packed(*texts: str) -> str:
    return encoded(map(parse_net, texts)).hex()


def test_routes_told_as_they_came_and_in_exabgps_words_are_the_same_routes(
    running: Running,
) -> None:
    """Which it is depends on the message, not on the route."""
    med = "800404" + "00000007"
    family, six = "ipv4 unicast", "ipv6 unicast"
    nets = packed("0.0.0.0/0", "10.1.0.0/24", "10.2.128.0/17", "10.3.0.1/32", "10.4.0.0/16")
    lines = (
        state("up"),
        update(attribute=med, announce={family: {PEER: nets}}),
        update(attribute=med, announce={six: {"2001:db8::1": packed("::/0", "fd00::/9")}}),
        announce("10.1.0.0/24", med=1),  # in place of the one above
        withdraw("10.2.255.0/17", "0.0.0.0/0"),
        announce("10.5.0.0/16", "10.6.0.0/16", med=1),
        update(withdraw={family: packed("10.6.0.0/16", "10.4.0.0/16")}),
        update(attribute="", withdraw={six: packed("fd00::/9")}),
    )
    with settled(running, *lines) as client:
        events = client.snapshot()
    assert held(events) == {
        parse_net("10.1.0.0/24"): 1,
        parse_net("10.3.0.1/32"): 7,
        parse_net("10.5.0.0/16"): 1,
        parse_net("::/0"): 7,
    }


def test_what_is_not_whole_is_not_remembered(running: Running) -> None:
    lines = [
        update(attribute="", announce={"ipv4 unicast": {PEER: nets}})
        for nets in ("18", "180a", "81" + "0" * 40, "zz")
    ]
    with settled(running, state("up"), *lines) as client:
        told = client.snapshot()
    assert held(told) == {}


def test_routes_are_forgotten_with_their_session(running: Running) -> None:
    lost = state("down", reason="closing connection")
    with settled(running, state("up"), announce("10.1.0.0/24"), EOR, lost, state("up")) as client:
        events = client.snapshot()
    assert [type(made) for made in events] == [Hello, Up]


def test_a_peer_that_tells_too_much_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is enough for the next agent to see that it was too much; until it ends."""
    assert relay.MAX_ROUTES == MOST
    monkeypatch.setattr(relay, "MAX_ROUTES", 2)
    memory = relay.Memory()

    def remembered(*lines: dict[str, Any]) -> int:
        for line in lines:
            memory.said(json.dumps(line).encode())
        return len(held([made for line in memory.snapshot() if (made := parse(line))]))

    assert remembered(state("up"), announce("10.1.0.0/24", "10.2.0.0/24")) == 2
    assert remembered(announce("10.2.0.0/24", med=1)) == 2
    assert remembered(announce("10.3.0.0/24"), announce("10.4.0.0/24")) == 3
    assert remembered(withdraw("10.1.0.0/24", "10.2.0.0/24")) == 3
    assert remembered(state("down"), state("up"), announce("10.1.0.0/24")) == 1


def test_all_next_hops_of_a_prefix_are_kept(running: Running) -> None:
    both = update(
        attribute={},
        announce={
            "ipv6 unicast": {
                "2001:db8::1": [{"nlri": "2001:db8:1::/64"}],
                "fe80::1": [{"nlri": "2001:db8:1::/64"}],
            }
        },
    )
    with settled(running, state("up"), both) as client:
        told = [found for found in client.snapshot() if isinstance(found, Updated)]
    # in one event, as ExaBGP told it: in two, the second would be taken for a better one
    assert [list(found.announced) for found in told] == [
        [(parse_net("2001:db8:1::/64"), parse_net("2001:db8::1"))]
    ]


def test_commands_and_what_was_announced(running: Running) -> None:
    with Client(running.path) as client:
        client.snapshot()
        client.send(
            f"neighbor {PEER} announce attributes next-hop self nlri 10.8.0.0/26 10.8.1.0/26\n"
            f"neighbor {PEER} withdraw attributes next-hop self nlri 10.8.1.0/26\n"
            f"neighbor {OTHER} announce attributes next-hop self nlri 10.8.0.0/26\n"
            "\n"
            "show neighbor summary\nnot a whole li"
        )
        commands = [running.hear() for _ in range(4)]
        assert [command.split()[0] for command in commands] == ["neighbor"] * 3 + ["show"]
        running.say("done", "done", "error")  # the third failed, the fourth is unanswered
        for _ in range(3):
            client.next()
    with Client(running.path) as client:
        hello = client.snapshot()[0]
        assert isinstance(hello, Hello)
        assert hello.unanswered == 1
        assert hello.announced == {parse_net(PEER): {parse_net("10.8.0.0/26")}}
        client.send("version\n")
        assert running.hear() == "version"  # and nothing of the half line


@pytest.mark.parametrize("missing", [0, 1])
def test_peers_that_are_told_the_same_are_told_at_once(running: Running, missing: int) -> None:
    """By name where ExaBGP has a peer that is not up: what waits for one hinders it."""
    texts = [f"10.0.0.{n}" for n in range(1, 26)]
    peers = [parse_net(text) for text in texts]
    net = parse_net("10.8.0.0/26")
    heard: queue.SimpleQueue[FromRelay] = queue.SimpleQueue()
    channel = Channel(running.path, heard.put)
    channel.start()
    try:
        assert isinstance(heard.get(timeout=10).events[0], Hello)
        dialogue = Dialogue(channel, 0, 0)
        announcer = Announcer()
        running.say(*(state("up", text) for text in texts))
        for peer in peers:
            announcer.note(Up(peer, 0))
        wanted = {net: Announcement(None, Attributes(origin=0))}
        announcer.want(dict.fromkeys(peers, wanted), {}, {}, mark_end=True)
        announcer.step(dialogue, 0, peers + [parse_net("10.0.1.0")] * missing)
        tails = ["announce attributes next-hop self origin igp nlri 10.8.0.0/26"] * (1 + missing)
        tails += ["announce eor ipv4 unicast"] * (1 + missing)
        named: list[str] = []
        for tail in tails:
            dialogue.pump(0)
            line = running.hear()
            named.append(line.removesuffix(f" {tail}"))
            running.say("done")
            while not any(isinstance(made, Answer) for made in heard.get(timeout=10).events):
                pass
            dialogue.heard(Answer(True), 0)
        announcer.step(dialogue, 1, peers)
        dialogue.pump(1)
        assert not dialogue.stuck(1000)  # nothing more was asked
    finally:
        channel.close()
    if missing:
        parts = [
            " , ".join(f"neighbor {text}" for text in part) for part in (texts[:20], texts[20:])
        ]
        assert named == parts * 2
    else:
        assert named == ["neighbor *"] * 2
    with Client(running.path) as client:
        hello = client.snapshot()[0]
        assert isinstance(hello, Hello)
        assert hello.announced == {peer: {net} for peer in peers}


def test_a_new_client_replaces_the_old(running: Running) -> None:
    with Client(running.path) as old, Client(running.path) as new:
        new.snapshot()
        old.snapshot()
        assert old.reader.readline() == b""
        running.say(state("up"))
        assert isinstance(new.next(), Up)


def test_a_client_that_does_not_read_delays_nobody(running: Running) -> None:
    """ExaBGP would stop, and all sessions with it, if it could not write."""
    with Client(running.path):
        running.say(state("up"))
        for start in range(0, 20000, 500):  # far more than socket buffers hold
            running.say(
                announce(*(f"10.{n // 256}.{n % 256}.0/24" for n in range(start, start + 500)))
            )
    with Client(running.path) as client:
        assert len(held(client.snapshot())) == 20000


@pytest.mark.parametrize(
    "junk", ["{", "{}", '{"type": 5}', "\x00", '{"type": "update", "neighbor": 1}']
)
def test_junk_is_passed_on_and_not_remembered(running: Running, junk: str) -> None:
    with settled(running, junk, state("up")) as client:
        assert [type(made) for made in client.snapshot()] == [Hello, Up]


def test_a_peer_taken_out_of_the_configuration_knows_nothing_any_more(running: Running) -> None:
    with Client(running.path) as client:
        client.snapshot()
        client.send(f"neighbor {PEER} announce attributes next-hop self nlri 10.8.0.0/26\n")
        running.hear()
        running.say("done", state("down", reason="stop, message [removed]"))
        client.next()
        client.next()
    with Client(running.path) as client:
        (hello,) = client.snapshot()
        assert isinstance(hello, Hello)
        assert hello.announced == {}


def test_one_command_at_a_time_and_whose_answer_it_is(running: Running) -> None:
    """Through the channel: the first answers belong to commands of an earlier client."""
    with Client(running.path) as earlier:
        earlier.snapshot()
        earlier.send("version\n")
        assert running.hear() == "version"
    heard: queue.SimpleQueue[FromRelay] = queue.SimpleQueue()
    channel = Channel(running.path, heard.put)
    channel.start()
    try:
        events = list(heard.get(timeout=10).events)
        hello = events[0]
        assert isinstance(hello, Hello)
        dialogue = Dialogue(channel, hello.unanswered, now=100)
        results: list[Result] = []
        dialogue.ask("first", results.append)
        dialogue.ask("second", results.append)

        def answer(now: float, *lines: str) -> None:
            running.say(*lines)
            while True:
                for made in heard.get(timeout=10).events:
                    assert isinstance(made, Answer | Text)
                    dialogue.heard(made, now)
                    if isinstance(made, Answer):
                        dialogue.pump(now)
                        return

        dialogue.pump(100)
        assert not dialogue.stuck(100 + ANSWER_SECONDS)
        assert dialogue.stuck(101 + ANSWER_SECONDS)
        answer(110, "exabgp 5", "done")  # the earlier client's
        assert running.hear() == "first"
        answer(120, "some output", "done")
        assert running.hear() == "second"
        answer(130, "error")
        assert results == [Result(True, ("some output",), 120), Result(False, (), 130)]
        assert not dialogue.stuck(1000)
        dialogue.pump(1000)
        assert running.hear() == "version"  # whether it is still there
    finally:
        channel.close()
