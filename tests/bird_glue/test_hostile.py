"""A peer that means harm, or has a bug: it costs its own session, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.net import V4, Net, parse_net
from bird_glue.limits import DEFAULT_LIMIT, parse_limit
from tests.bird_glue.rawpeer import (
    KEEPALIVE,
    MARKER,
    NOTIFICATION,
    OPEN,
    UPDATE,
    RawPeer,
    attribute,
    message,
    update,
)
from tests.bird_glue.world import Node, Station, World, world
from tests.support.netns import connect, eventually

OWN, HOSTILE, FRIEND = "172.31.1.11", "172.31.1.66", "172.31.1.77"
BLOCK, LIMIT = "10.1.0.0/26", 3000
END_OF_RIB = message(UPDATE, b"\0\0\0\0")
ASN, FRIENDLY_ASN = 65066, 65077
KEPT = "10.77.0.0/16"  # what the friend announces all the time


def call(outside: Station, own: str, asn: int) -> RawPeer:
    """A session; the first call may come before the engine knows the peer, or still meet the end of
    the last one, or the seconds in which BIRD speaks with nobody who made a mistake.
    """
    found: list[RawPeer] = []

    def called() -> bool:
        peer = RawPeer(outside.namespace, own, OWN, asn)
        eventually(lambda: peer.established.is_set() or peer.ended.is_set())
        if peer.established.is_set():
            found.append(peer)
        else:
            peer.close()
        return bool(found)

    eventually(called)
    return found[0]


@dataclass
class Siege:
    world: World
    node: Node
    outside: Station
    friend: RawPeer

    def attack(self) -> RawPeer:
        """A session of the attacker's."""
        peer = call(self.outside, HOSTILE, ASN)
        peer.send(END_OF_RIB)
        return peer

    def routes(self) -> set[str]:
        """The prefixes in the kernel, less what should be there."""
        lines = self.node.routes("proto 179") + self.node.routes("proto bird")
        return {line.split()[0] for line in lines if "blackhole" not in line} - {KEPT}

    def pid(self) -> int:
        """The engine's process."""
        status = self.node.status()
        return (status.pid if status else None) or 0

    def info(self) -> str:
        peer = self.node.peer(HOSTILE)
        return peer.info if peer else ""

    def refused(self) -> int:
        peer = self.node.peer(HOSTILE)
        return sum(peer.refused.values()) if peer else 0

    def unharmed(self) -> bool:
        """Nothing of the attacker is left, everything else is as it was."""
        return (
            not self.friend.ended.is_set()
            and self.routes() == set()
            and self.node.route_to(KEPT) != ""
            and f"blackhole {BLOCK} metric 1024" in self.node.routes()
        )


@pytest.fixture(scope="module", params=["exabgp", "bird"])
def siege(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Siege]:
    with world(tmp_path_factory.mktemp("hostile")) as made:
        node, outside = made.node("n1"), made.host("out")
        node.engine = request.param
        connect(node.namespace, "eth0", outside.namespace, "eth0", [f"{OWN}/24", f"{HOSTILE}/24"])
        outside.run("ip", "address", "add", f"{FRIEND}/24", "dev", "eth0")
        made.store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        made.store.put("IPPool", "plain", cidr="10.1.0.0/16")
        made.store.put("BGPPeer", "hostile", peerIP=HOSTILE, asNumber=ASN)
        made.store.put("BGPPeer", "friend", peerIP=FRIEND, asNumber=FRIENDLY_ASN)
        made.store.node("n1", f"{OWN}/24")
        made.store.block("n1", BLOCK)
        node.start(MANX_RECEIVE_LIMIT=str(LIMIT))
        eventually(lambda: node.peer(FRIEND) is not None)
        eventually(lambda: ":179 " in node.run("ss", "-tln"))
        with call(outside, FRIEND, FRIENDLY_ASN) as friend:
            friend.tell(parse_net(KEPT))
            friend.send(END_OF_RIB)
            eventually(lambda: node.route_to(KEPT) != "")
            yield Siege(made, node, outside, friend)


@pytest.fixture(autouse=True)
def unharmed(siege: Siege) -> Iterator[None]:
    yield
    eventually(siege.unharmed)


def nets(count: int) -> list[Net]:
    first = parse_net("20.0.0.0/24").address
    return [Net(V4, first + (n << 8), 24) for n in range(count)]


def memory(pid: int) -> int:
    """Kilobytes of memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


def test_what_is_ours_is_not_taken(siege: Siege) -> None:
    """Our block, parts of it, our subnet and address, addresses that nobody routes."""
    with siege.attack() as peer:
        # a single address of ours may be lent to another node; a pod's own route comes before it
        wanted = ["10.66.0.0/16", "0.0.0.0/0", "10.1.0.0/16", "10.1.0.5/32"]
        refused = [
            BLOCK, "10.1.0.32/27", "172.31.1.0/24", f"{OWN}/32", f"{HOSTILE}/32",
            "127.0.0.0/8", "169.254.1.1/32", "224.0.0.0/4", "240.0.0.0/4",
        ]  # fmt: skip
        peer.tell(*map(parse_net, [*refused, *wanted]))
        for hop in (OWN, "127.0.0.1", "224.0.0.1"):
            peer.send(update([parse_net("10.67.0.0/16")], next_hop=hop, path=(ASN,)))
        peer.send(update([parse_net("10.68.0.0/16")], next_hop=HOSTILE, path=(ASN, 64512)))
        taken = {"10.66.0.0/16", "default", "10.1.0.0/16", "10.1.0.5"}
        eventually(lambda: siege.routes() == taken)
        if siege.node.engine == "exabgp":  # of some BIRD itself says no, and doesn't count them
            eventually(lambda: siege.refused() == len(refused) + 2)
        else:
            eventually(lambda: 0 < siege.refused() <= len(refused) + 2)
        # a default route of somebody's own comes before it
        assert "metric 1024" in siege.node.route_to("default")
        assert not peer.ended.is_set()


def test_routes_that_flap_by_the_thousand_leave_nothing_behind(siege: Siege) -> None:
    flapping = nets(2000)
    with siege.attack() as peer:
        peer.tell(*flapping)
        eventually(lambda: len(siege.routes()) == len(flapping))
        before = memory(siege.node.agent.pid)
        for _ in range(10):
            peer.tell(withdrawn=flapping)
            peer.tell(*flapping)
        last = parse_net("10.66.0.0/16")
        peer.tell(withdrawn=flapping)
        peer.tell(last)
        eventually(lambda: siege.routes() == {str(last)})
        assert memory(siege.node.agent.pid) - before < 30_000
        assert not peer.ended.is_set()


# the parser is its own, and makes one wait for seconds after each mistake
ENOUGH_FOR_BIRD = (
    "sent: connection not synchronized",
    "sent: bad message type",
    "sent: malformed attribute list",
)


def test_malformed_messages_end_the_session_and_say_why(siege: Siege) -> None:
    hop, path = HOSTILE, (ASN,)
    net = [parse_net("10.66.0.0/16")]
    for data, words in (
        (b"\0" * 16 + b"\0\x13\4", "sent: connection not synchronized"),
        (message(KEEPALIVE, length=18), "sent: bad message length"),
        (message(UPDATE, b"", length=65535) + b"x" * 100, "sent: bad message length"),
        (message(99), "sent: bad message type"),
        (message(UPDATE, b"\xff\xff"), "sent: bad message length"),
        (message(UPDATE, b"\0\0\xff\xff"), "sent: malformed attribute list"),
        (message(OPEN, b"\4"), "sent: bad message length"),
        (update(net, next_hop=hop, path=path)[:-1] + b"\xff", ""),
        (message(NOTIFICATION, b"\6\2"), "the peer says: administrative shutdown"),
    ):
        if siege.node.engine == "bird" and words not in ENOUGH_FOR_BIRD:
            continue
        with siege.attack() as peer:
            peer.tell(parse_net("10.67.0.0/16"))
            peer.send(data)
            if words:
                assert peer.ended.wait(60), data
                eventually(lambda words=words: words in siege.info())  # type: ignore[misc]
        eventually(siege.unharmed)


@pytest.mark.parametrize("siege", ["exabgp"], indirect=True)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 255), st.binary(max_size=200)).map(lambda m: message(*m)),
            st.tuples(st.integers(0, 255), st.binary(max_size=40), st.integers(0, 255)).map(
                lambda a: update(
                    [parse_net("10.66.0.0/16")],
                    next_hop=HOSTILE,
                    path=(ASN,),
                    more=attribute(*a),
                )
            ),
            st.tuples(st.binary(max_size=60), st.integers(0, 65535)).map(
                lambda m: message(UPDATE, m[0], m[1])
            ),
            st.binary(max_size=60).map(lambda body: MARKER + body),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_whatever_is_said_costs_the_session_at_most(siege: Siege, said: list[bytes]) -> None:
    engine = siege.pid()
    with siege.attack() as peer:
        for data in said:
            peer.send(data)
    assert siege.pid() == engine
    assert not siege.friend.ended.is_set()
    assert siege.node.status() is not None
    assert siege.routes() <= {"10.66.0.0/16"}


def test_too_many_prefixes_end_the_session_for_a_while(siege: Siege) -> None:
    """Last: the attacker is not spoken with for a minute."""
    many = nets(LIMIT)
    with siege.attack() as peer:
        peer.tell(*many)
        eventually(lambda: len(siege.routes()) == LIMIT)
        assert not peer.ended.is_set()
        before = memory(siege.node.agent.pid)
        peer.tell(*nets(4 * LIMIT))
        assert peer.ended.wait(60)
        eventually(lambda: siege.routes() == set())
        assert memory(siege.node.agent.pid) - before < 30_000

    def said() -> bool:
        status = siege.node.status()
        told = "\n".join(status.problems) if status else ""
        return (
            f"BGPPeer hostile: session with: '{HOSTILE}': a peer that announces at most {LIMIT} "
            "prefixes (MANX_RECEIVE_LIMIT): it announced more, and is tried again at"
        ) in told

    eventually(said)


@pytest.mark.parametrize(("text", "limit"), [("", DEFAULT_LIMIT), ("1", 1), ("250000", 250_000)])
def test_limits(text: str, limit: int) -> None:
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["0", "-1", "x", "250001"])
def test_wrong_limits(text: str) -> None:
    with pytest.raises(ValueError, match="MANX_RECEIVE_LIMIT="):
        parse_limit(text)
