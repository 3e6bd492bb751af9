"""What a peer must not have us do, by either engine and in both IP versions; and what it may."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from api.net import V4, V6, Net, parse_net
from tests.bird_glue.rawpeer import (
    MED,
    NOTIFICATION,
    UPDATE,
    RawPeer,
    message,
    number,
    preference,
    update,
)
from tests.bird_glue.world import Node, Station, world
from tests.support.netns import connect, eventually

ASN, FRIENDLY_ASN = 65066, 65077
LIMIT = 1000
END_OF_RIB = {
    V4: message(UPDATE, b"\0\0\0\0"),
    V6: message(UPDATE, b"\0\0\0\x06\x80\x0f\x03\0\x02\x01"),
}


@dataclass(frozen=True)
class Words:
    """The addresses of an IP version."""

    version: int
    own: str
    hostile: str
    friend: str
    gateway: str
    other_node: str
    subnet: str
    block: str

    @property
    def ending(self) -> str:
        return "/24" if self.version == V4 else "/64"


FOUR = Words(
    V4, "172.31.1.11", "172.31.1.66", "172.31.1.77", "172.31.1.1", "172.31.1.12",
    "172.31.1.0/24", "10.1.0.0/26",
)  # fmt: skip
SIX = Words(
    V6, "2001:db8::11", "2001:db8::66", "2001:db8::77", "2001:db8::1", "2001:db8::12",
    "2001:db8::/64", "fd10::/122",
)  # fmt: skip


@dataclass
class Siege:
    engine: str
    node: Node
    outside: Station

    def call(self, words: Words, own: str, asn: int) -> RawPeer:
        """A session; the first calls may still meet the end of the last one."""
        made: list[RawPeer] = []

        def called() -> bool:
            eventually(lambda: not self.node.established(own))
            peer = RawPeer(self.outside.namespace, own, words.own, asn)
            eventually(lambda: peer.established.is_set() or peer.ended.is_set())
            eventually(lambda: peer.ended.is_set() or self.node.established(own))
            if peer.ended.is_set():
                peer.close()
                return False
            made.append(peer)
            return True

        eventually(called)
        made[0].send(END_OF_RIB[words.version])
        return made[0]

    def learned(self, version: int) -> set[str]:
        """The prefixes in the kernel."""
        protocol = {"exabgp": "179", "bird": "bird"}[self.engine]
        family = "-4" if version == V4 else "-6"
        found = self.node.routes(f"proto {protocol} type unicast", family)
        return {line.split()[0] for line in found}

    def refused(self, address: str) -> dict[str, int]:
        peer = self.node.peer(address)
        return peer.refused if peer else {}


@pytest.fixture(scope="module", params=["exabgp", "bird"])
def siege(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Siege]:
    with world(tmp_path_factory.mktemp("refused")) as made:
        node, outside = made.node("n1"), made.host("out")
        connect(node.namespace, "eth0", outside.namespace, "eth0")
        for words in (FOUR, SIX):
            nodad = ["nodad"] * (words.version == V6)
            own = f"{words.own}{words.ending}"
            node.run("ip", "address", "add", own, "dev", "eth0", *nodad)
            for address in (words.hostile, words.friend, words.gateway):
                their = f"{address}{words.ending}"
                outside.run("ip", "address", "add", their, "dev", "eth0", *nodad)
            node.run("ip", "route", "add", "default", "via", words.gateway)
            made.store.put("BGPPeer", f"h{words.version}", peerIP=words.hostile, asNumber=ASN)
            friend = {"peerIP": words.friend, "asNumber": FRIENDLY_ASN}
            made.store.put("BGPPeer", f"f{words.version}", **friend)
            made.store.block("n1", words.block)
        made.store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        made.store.put("IPPool", "plain", cidr="10.1.0.0/16")
        made.store.put("IPPool", "six", cidr="fd10::/112")
        made.store.node("n1", f"{FOUR.own}/24", ipv6Address=f"{SIX.own}/64")
        made.store.node("n2", f"{FOUR.other_node}/24", ipv6Address=f"{SIX.other_node}/64")
        node.start(MANX_BGP_ENGINE=request.param, MANX_RECEIVE_LIMIT=str(LIMIT))
        eventually(lambda: node.peer(FOUR.friend) is not None)
        for listening in ("0.0.0.0:179 ", "]:179 "):
            eventually(lambda listening=listening: listening in node.run("ss", "-tln"))  # type: ignore[misc]
        yield Siege(request.param, node, outside)


PARTS = {
    V4: (
        "172.31.1.0/24", "172.31.1.0/25", "172.31.1.64/26", "172.31.1.77/32", "172.31.1.76/30",
        "172.31.1.1/32", "172.31.1.12/32", "172.31.1.8/29", "172.31.1.11/32", "172.31.1.66/32",
    ),
    V6: (
        "2001:db8::/64", "2001:db8::/65", "2001:db8::77/128", "2001:db8::70/124",
        "2001:db8::1/128", "2001:db8::12/128", "2001:db8::11/128", "2001:db8::66/128",
    ),
}  # fmt: skip
# a load balancer of a neighbour, a part of the link where nobody is known to be, all around it
FREE = {
    V4: {"172.31.1.200", "172.31.1.128/25", "172.31.0.0/16", "10.66.0.0/16"},
    V6: {"2001:db8::200", "2001:db8:0:0:8000::/65", "2001:db8::/32", "2001:db8:66::/48"},
}


@pytest.mark.parametrize("words", [FOUR, SIX], ids=["v4", "v6"])
def test_our_links_are_not_taken_over(siege: Siege, words: Words) -> None:
    """Neither peers, nor the gateway, nor other nodes: they are where they always were."""
    with siege.call(words, words.hostile, ASN) as peer:
        peer.tell(*map(parse_net, (*PARTS[words.version], *FREE[words.version])))
        eventually(lambda: siege.learned(words.version) == FREE[words.version])
        why = {
            "it is a subnet this node is on": 1,
            "it is an address of this node": 1,
            "it is its own next hop": 1,
            "a peer, gateway or node on a link of this node is in it": len(PARTS[words.version])
            - 3,
        }
        eventually(lambda: siege.refused(words.hostile) == why)
        for host in (words.friend, words.gateway, words.other_node):
            assert "via" not in siege.node.run("ip", "route", "get", host)
    eventually(lambda: siege.learned(words.version) == set())


NO_HOPS = {
    V4: ("224.0.0.1", "127.0.0.1", "0.1.2.3", "240.1.1.1"),
    V6: ("ff02::1", "::1", "ff0e::5"),
}


@pytest.mark.parametrize("words", [FOUR, SIX], ids=["v4", "v6"])
def test_next_hops_that_no_machine_has(siege: Siege, words: Words) -> None:
    """Not even where a default route would lead there."""
    first = parse_net("20.0.0.0/24" if words.version == V4 else "2001:db8:20::/48")
    size = 1 << (32 if words.version == V4 else 128) - first.length
    good, *bad = (first._replace(address=first.address + n * size) for n in range(5))
    with siege.call(words, words.hostile, ASN) as peer:
        for net, hop in zip(bad, NO_HOPS[words.version], strict=False):
            peer.send(update([net], next_hop=hop, path=(ASN,)))
        peer.send(update([good], next_hop=words.hostile, path=(ASN,)))
        eventually(lambda: siege.learned(words.version) == {str(good)})
        why = {
            "its next hop is an address of this node": 1,  # of its loopback
            "its next hop is not an address of a machine": len(NO_HOPS[words.version]) - 1,
        }
        eventually(lambda: siege.refused(words.hostile) == why)
        assert siege.learned(words.version) == {str(good)}
    eventually(lambda: siege.learned(words.version) == set())


@pytest.mark.parametrize("words", [FOUR, SIX], ids=["v4", "v6"])
def test_pods_and_static_routes_come_first(siege: Siege, words: Words) -> None:
    """Addresses of our block that nobody has yet are told by a peer; then pods are born there."""
    node, family = siege.node, "-4" if words.version == V4 else "-6"
    block = parse_net(words.block)
    pods = [str(block._replace(address=block.address + n, length=length(block))) for n in (5, 6)]
    elsewhere = "10.66.0.0/16" if words.version == V4 else "2001:db8:66::/48"
    connect(node.namespace, "cali5", siege.outside.namespace, "pod5")
    node.run("ip", family, "route", "add", pods[0], "dev", "cali5", "proto", "80")
    with siege.call(words, words.hostile, ASN) as peer:
        peer.tell(*map(parse_net, (*pods, elsewhere)))
        told = {net.partition("/32")[0].partition("/128")[0] for net in (*pods, elsewhere)}
        eventually(lambda: siege.learned(words.version) == told)
        node.run("ip", family, "route", "add", pods[1], "dev", "cali5", "proto", "80")
        node.run("ip", family, "route", "add", elsewhere, "via", words.gateway)
        for pod in pods:
            assert "dev cali5" in node.run("ip", "route", "get", pod.partition("/")[0])
        where = str(parse_net(elsewhere)).partition("/")[0]
        assert f"via {words.gateway} " in node.run("ip", "route", "get", where)
        eventually(lambda: siege.learned(words.version) == told)
        status = node.status()
        assert status
        assert not [text for text in status.problems if "not programmed" in text]
    node.run("ip", "link", "delete", "cali5")
    node.run("ip", family, "route", "delete", elsewhere, "via", words.gateway)
    eventually(lambda: siege.learned(words.version) == set())


def length(net: Net) -> int:
    """Of a single address."""
    return 32 if net.version == V4 else 128


OFFERS = st.tuples(
    st.lists(st.sampled_from((65101, 65102)), max_size=2).map(tuple),  # behind the peer's own AS
    st.none() | st.integers(0, 2**32 - 1),  # LOCAL_PREF
    st.integers(0, 2),  # MED
)


@pytest.mark.parametrize("words", [FOUR, SIX], ids=["v4", "v6"])
def test_another_as_has_no_say_in_what_is_preferred_here(siege: Siege, words: Words) -> None:
    """LOCAL_PREF of eBGP is ignored (RFC 4271 5.1.5): both engines choose alike without it."""
    net = parse_net("10.66.0.0/16" if words.version == V4 else "2001:db8:66::/48")
    ours = words.hostile, ASN
    theirs = words.friend, FRIENDLY_ASN
    with siege.call(words, *ours) as one, siege.call(words, *theirs) as other:

        @settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
        @example([((65101, 65102), 4_000_000_000, 0), ((), None, 0)])
        @given(st.lists(OFFERS, min_size=2, max_size=2))
        def chosen(offers: list[tuple[tuple[int, ...], int | None, int]]) -> None:
            for peer, (path, preferred, med) in zip((one, other), offers, strict=True):
                more = number(MED, med)
                more += preference(preferred) if preferred is not None else b""
                way = (peer.asn, *path)
                peer.send(update([net], next_hop=peer.own, path=way, more=more))
            costs = [(len(path), med) for path, _, med in offers]
            best = {
                peer.own
                for peer, cost in zip((one, other), costs, strict=True)
                if cost == min(costs)
            }
            eventually(lambda: hops(siege.node.route_to(str(net))) == best)

        chosen()
        for peer in (one, other):
            peer.tell(withdrawn=[net])
        eventually(lambda: siege.learned(words.version) == set())


def hops(route: str) -> set[str]:
    """The gateways of a route as text."""
    return set(re.findall(r"via (\S+)", route))


def test_hold_times_that_are_refused_are_named(siege: Siege) -> None:
    """A second or two is no hold time (RFC 4271 4.2); and a peer may not like ours."""

    def said(words: str) -> bool:
        return (peer := siege.node.peer(FOUR.hostile)) is not None and words in peer.info

    def calls(hold: int, more: bytes, words: str) -> None:
        def called() -> bool:
            with RawPeer(siege.outside.namespace, FOUR.hostile, FOUR.own, ASN, hold=hold) as peer:
                peer.send(more)
                assert peer.ended.wait(60)
            return said(words)

        eventually(called)  # one call may meet the end of the last

    calls(2, b"", "sent: unacceptable hold time")
    calls(90, message(NOTIFICATION, b"\2\6"), "the peer says: unacceptable hold time")


def test_a_closed_port_is_named(siege: Siege) -> None:
    """Nobody listens there."""
    words = f"connection to {FOUR.friend} port 179 refused, or closed at once"
    eventually(lambda: words in (p.info if (p := siege.node.peer(FOUR.friend)) else ""))


def test_a_peer_that_tells_too_much_rests(siege: Siege) -> None:
    """Last: the attacker is not spoken with for a minute, on neither engine."""
    first = parse_net("20.0.0.0/24").address
    many = [Net(V4, first + (n << 8), 24) for n in range(3 * LIMIT)]
    with siege.call(FOUR, FOUR.hostile, ASN) as peer:
        peer.tell(*many)
        assert peer.ended.wait(60)

    def said() -> bool:
        status = siege.node.status()
        told = "\n".join(status.problems) if status else ""
        return "it announced more, and is tried again at" in told

    eventually(said)
    eventually(lambda: siege.learned(V4) == set())
    assert siege.node.peer(FOUR.hostile) is None

    def refused() -> bool:
        try:
            with RawPeer(siege.outside.namespace, FOUR.hostile, FOUR.own, ASN) as again:
                assert again.ended.wait(60)
                return not again.established.is_set()
        except OSError:
            return True  # at once

    eventually(refused)
    assert siege.learned(V4) == set()
