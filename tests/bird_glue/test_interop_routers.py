"""A node with three top-of-rack routers, of BIRD, FRR and GoBGP: the same story with each."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bird_glue.process import Bird as BirdProcess
from bird_glue.process import ExaBgp
from tests.bird_glue.routers import KINDS, LOOP, NODE_AS, SHARED, SHARED_SIX, TopOfRack, Uplink
from tests.bird_glue.world import Node, Ping, Station, World, world
from tests.support.netns import PROMPTLY, connect, eventually

# nothing goes out any more, and the link stays up
RESTORE = ("qdisc", "del", "dev", "node", "root")
CUT = ("qdisc", "add", "dev", "node", "root", "tbf", "rate", "8bit", "burst", "1", "limit", "1")
BLOCKS = {"10.1.0.0/26", "2001:db8:1::/122"}
PASSWORD = "correct-horse"  # FRR takes none with a space
POD, POD_SIX = "10.1.0.5", "2001:db8:1::5"
OUTSIDE, OUTSIDE_SIX = "192.0.2.9", "2001:db8:5::9"
UPLINKS = {kind: Uplink(n) for n, kind in enumerate(KINDS, 1)}


# a datagram to each of many ports of an address
DATAGRAMS = """
import socket, sys
_, address, count = sys.argv
for n in range(int(count)):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET,
                       socket.SOCK_DGRAM) as s:
        s.sendto(b"", (address, 20000 + n))
"""


@dataclass
class Rack:
    """``hosts``: one behind each router, reached by it alone. ``outside``: behind all three."""

    engine: str
    world: World
    node: Node
    pod: Station
    outside: Station
    routers: dict[str, TopOfRack]
    hosts: dict[str, Station]
    begun: dict[str, float] = field(default_factory=dict)

    def begin(self, kind: str, *, graceful: bool = False, **settings: Any) -> None:
        """Start a router, or start it again; ``up`` is about the sessions from then on."""
        self.begun[kind] = time.time()
        self.routers[kind].begin(replace(UPLINKS[kind], **settings), graceful=graceful)

    def up(self, kind: str) -> bool:
        uplink = UPLINKS[kind]
        peers = [self.node.peer(address) for address in (uplink.address, uplink.six)]
        return (
            all(p and p.state == "Established" and p.since > self.begun[kind] for p in peers)
            and self.routers[kind].prefixes() >= BLOCKS
            and all(self.node.route_to(net) for net in uplink.own)
        )

    def ways_out(self, net: str = SHARED) -> set[str]:
        """The routers that share the traffic to the outside."""
        route = self.node.route_to(net)
        return {kind for kind, uplink in UPLINKS.items() if f" dev eth{uplink.n} " in route}

    def settle(self) -> None:
        for kind in KINDS:
            eventually(lambda kind=kind: self.up(kind))  # type: ignore[misc]
            eventually(lambda kind=kind: not self.routers[kind].stale())  # type: ignore[misc]
        eventually(lambda: self.ways_out() == self.ways_out(SHARED_SIX) == set(KINDS))

    def in_touch(self, kind: str) -> bool:
        """Packets of both IP versions go through a router, there and back."""
        return self.hosts[kind].reaches(POD) and self.hosts[kind].reaches(POD_SIX)

    def daemon(self) -> int:
        """The process id of the engine; 0 while there is none."""
        found = {"exabgp": ExaBgp, "bird": BirdProcess}[self.engine].find(self.node.run_dir)
        if found is None:
            return 0
        found.close()
        return found.pid

    def plug_in(self, kind: str) -> None:
        """What a router has on its link to the node besides BGP."""
        uplink, router = UPLINKS[kind], self.routers[kind]
        router.run("ip", "link", "set", "node", "up")
        router.run("ip", "address", "replace", f"{uplink.address}/24", "dev", "node")
        router.run("ip", "address", "replace", f"{uplink.six}/64", "dev", "node", "nodad")
        if kind == "gobgp":  # which writes no routes
            router.run("ip", "route", "replace", "10.1.0.0/26", "via", uplink.node)
            router.run("ip", "route", "replace", "2001:db8:1::/122", "via", uplink.node_six)

    @contextmanager
    def changed(self, kind: str, **settings: Any) -> Iterator[None]:
        """The router is set so for the block."""
        self.begin(kind, **settings)
        try:
            yield
        finally:
            self.begin(kind)

    @contextmanager
    def peered(self, kind: str, **settings: Any) -> Iterator[None]:
        """Both sessions with a router are set so for the block."""
        self.peer(kind, **settings)
        try:
            yield
        finally:
            self.peer(kind)

    def peer(self, kind: str, **settings: Any) -> None:
        """Both sessions with a router."""
        uplink = UPLINKS[kind]
        for name, address in (("four", uplink.address), ("six", uplink.six)):
            spec = {"peerIP": address, "asNumber": uplink.asn, "sourceAddress": "None"}
            self.world.store.put("BGPPeer", f"{kind}-{name}", **spec | settings)

    def info(self, kind: str, six: bool = False) -> str:
        peer = self.node.peer(UPLINKS[kind].six if six else UPLINKS[kind].address)
        return peer.info if peer else ""

    def told(self, kind: str, words: str) -> None:
        """The status says so of both sessions with a router."""
        for six in (False, True):
            try:
                eventually(lambda six=six: words in self.info(kind, six))  # type: ignore[misc]
            except AssertionError as error:
                raise AssertionError(f"{self.info(kind, six)!r}, expected: {words}") from error


@pytest.fixture(scope="module")
def rack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rack]:
    with rack_of_three(tmp_path_factory.mktemp("interop"), request.param) as made:
        yield made


@contextmanager
def rack_of_three(directory: Path, engine: str) -> Iterator[Rack]:
    with world(directory) as made:
        node, outside = made.node("n1"), made.host("out")
        node.engine = engine
        pod = made.pod(node, "pod", POD, POD_SIX)
        store = made.store
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        store.put("IPPool", "plain6", cidr="2001:db8:1::/64")
        routers = {kind: made.router(KINDS[kind], kind) for kind in KINDS}
        hosts = {kind: made.host(f"host-{kind}") for kind in KINDS}
        rack = Rack(engine, made, node, pod, outside, routers, hosts)
        made.switch(
            "spine",
            *((routers[kind], f"192.0.2.{uplink.n}/24") for kind, uplink in UPLINKS.items()),
            (outside, f"{OUTSIDE}/24"),
        )
        outside.run("ip", "address", "add", f"{OUTSIDE_SIX}/48", "dev", "eth0", "nodad")
        for kind, uplink in UPLINKS.items():
            router, host = routers[kind], hosts[kind]
            here = [f"{uplink.node}/24", f"{uplink.address}/24"]
            connect(node.namespace, f"eth{uplink.n}", router.namespace, "node", here)
            six = f"{uplink.node_six}/64"
            node.run("ip", "address", "add", six, "dev", f"eth{uplink.n}", "nodad")
            rack.plug_in(kind)
            six = f"2001:db8:5::{uplink.n}/48"
            router.run("ip", "address", "add", six, "dev", "eth0", "nodad")
            connect(host.namespace, "eth0", router.namespace, "host")
            for address, length in zip(uplink.behind, (16, 48), strict=True):
                gateway = address[:-1] + "1"
                for station, device, own in ((host, "eth0", address), (router, "host", gateway)):
                    words = ("dev", device, *(("nodad",) if ":" in own else ()))
                    station.run("ip", "address", "add", f"{own}/{length}", *words)
                host.run("ip", "route", "add", "default", "via", gateway)
        for prefix, pool in (("192.0.2.", "10.1.0.0/16"), ("2001:db8:5::", "2001:db8:1::/64")):
            hops = [word for n in (1, 2, 3) for word in ("nexthop", "via", f"{prefix}{n}")]
            outside.run("ip", "route", "add", pool, *hops)
        first = UPLINKS["bird"]
        store.node("n1", f"{first.node}/24", ipv6Address=f"{first.node_six}/64")
        for block in BLOCKS:
            store.block("n1", block)
        for kind in KINDS:
            rack.begin(kind)
            rack.peer(kind)
        node.start()
        yield rack


@pytest.fixture(autouse=True)
def settled(rack: Rack) -> None:
    rack.settle()


each_router = pytest.mark.parametrize("kind", KINDS)
each_engine = pytest.mark.parametrize("rack", ["exabgp", "bird"], indirect=True)
exabgp_only = pytest.mark.parametrize("rack", ["exabgp"], indirect=True)


@each_engine
def test_packets_go_through_every_router_and_all_share_the_traffic(rack: Rack) -> None:
    for kind in KINDS:
        eventually(lambda kind=kind: rack.in_touch(kind))  # type: ignore[misc]
        assert all(rack.pod.reaches(address) for address in UPLINKS[kind].behind)
    for address, counter in ((OUTSIDE, "IpForwDatagrams"), (OUTSIDE_SIX, "Ip6OutForwDatagrams")):
        before = {kind: forwarded(rack.routers[kind], counter) for kind in KINDS}
        rack.pod.run(sys.executable, "-c", DATAGRAMS, address, "99")
        for kind in KINDS:
            enough = partial(forwarded_by, rack.routers[kind], counter, before[kind] + 9)
            eventually(enough)


def forwarded(router: Station, counter: str) -> int:
    found = re.search(rf"{counter}\s+(\d+)", router.run("nstat", "-asz", counter))
    assert found
    return int(found[1])


def forwarded_by(router: Station, counter: str, least: int) -> bool:
    return forwarded(router, counter) >= least


@each_engine
def test_nothing_is_passed_on(rack: Rack) -> None:
    for kind, router in rack.routers.items():
        others = {net for other, uplink in UPLINKS.items() if other != kind for net in uplink.own}
        assert not router.prefixes() & others


@each_engine
@pytest.mark.parametrize("kind", ["bird", "frr"])  # GoBGP doesn't even send it
def test_our_own_as_in_a_path_is_a_loop_unless_it_is_allowed(rack: Rack, kind: str) -> None:
    why = "our own AS is in its AS path"
    eventually(lambda: bool((p := rack.node.peer(UPLINKS[kind].address)) and p.refused.get(why)))
    peer = rack.node.peer(UPLINKS[kind].address)
    assert peer
    assert rack.ways_out(LOOP) == set()
    rack.peer(kind, numAllowedLocalASNumbers=1)
    eventually(lambda: rack.ways_out(LOOP) == {kind})
    rack.peer(kind)
    eventually(lambda: rack.ways_out(LOOP) == set())
    now = rack.node.peer(UPLINKS[kind].address)
    assert now
    assert now.since == peer.since


@each_engine
@each_router
def test_communities_both_ways_and_filters(rack: Rack, kind: str) -> None:
    """Ours are seen there; theirs decide what we take; neither costs a session."""
    store, uplink = rack.world.store, UPLINKS[kind]
    both = uplink.address, uplink.six
    before = [rack.node.peer(address) for address in both]
    refuse = {"communities": {"values": [f"{uplink.asn}:7"]}, "action": "Reject"}
    store.put("BGPFilter", "tagged", importV4=[refuse], importV6=[refuse])
    store.put(
        "BGPConfiguration", "default", nodeToNodeMeshEnabled=False,
        prefixAdvertisements=[
            {"cidr": cidr, "communities": ["64512:300"]}
            for cidr in ("10.1.0.0/16", "2001:db8:1::/64")
        ],
    )  # fmt: skip
    rack.peer(kind, filters=["tagged"])
    for own, block, shared in zip(uplink.own, sorted(BLOCKS), (SHARED, SHARED_SIX), strict=True):
        eventually(lambda own=own: rack.node.route_to(own) == "")  # type: ignore[misc]
        for word in ("64512", "300"):
            eventually(lambda b=block, w=word: w in rack.routers[kind].communities(b))  # type: ignore[misc]
        assert kind in rack.ways_out(shared)
    rack.peer(kind)
    store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
    rack.settle()
    after = [rack.node.peer(address) for address in both]
    assert [p and p.since for p in after] == [p and p.since for p in before]


@pytest.mark.slow
@exabgp_only  # wrong AS numbers with BIRD: test_engines
@each_router
def test_what_a_router_says_no_to_is_explained(rack: Rack, kind: str) -> None:
    """Wrong AS numbers, either way; more prefixes than it takes."""
    store, uplink = rack.world.store, UPLINKS[kind]
    rack.peer(kind, asNumber=65099)
    wrong = f"wrong AS number: the peer is AS {uplink.asn}, AS 65099 is configured"
    eventually(lambda: wrong in rack.info(kind))
    rack.peer(kind, localASNumber=65098)
    eventually(lambda: "wrong AS number, we are AS 65098" in rack.info(kind))
    rack.peer(kind)
    # who hangs up with words unread may take its own along, so that BIRD gets one more for each
    # session, and no others; FRR reads on, and sees with the next that it had too many
    numbers = range(1, 4 if kind == "frr" else 2)
    more = [f"10.1.{n}.0/26" for n in numbers] + [f"2001:db8:1::{n}00/122" for n in numbers]
    with rack.changed(kind, limit=1):
        rack.settle()
        for block in more:
            store.block("n1", block)
        try:
            reached = "maximum number of prefixes reached"
            if kind == "gobgp":  # does so all the same
                eventually(lambda: reached in rack.info(kind) + rack.info(kind, six=True))
            else:
                rack.told(kind, reached)
        finally:
            for block in more:
                store.drop_block("n1", block)


@pytest.mark.slow
@each_engine
@each_router
def test_a_router_with_our_router_id(rack: Rack, kind: str) -> None:
    """In our own AS neither end may take it, and it is said why; in another one nobody minds
    (RFC 6286 2.2).
    """
    ours = UPLINKS["bird"].node
    with rack.changed(kind, router_id=ours):
        rack.settle()
        eventually(lambda: rack.in_touch(kind))
    with rack.changed(kind, router_id=ours, asn=NODE_AS), rack.peered(kind, asNumber=NODE_AS):
        rack.told(kind, f"has our router ID, {ours}")


@exabgp_only
def test_routers_with_the_same_router_id(rack: Rack) -> None:
    """Two of one rack, by mistake: their routes are told apart all the same."""
    with rack.changed("frr", router_id=UPLINKS["bird"].router_id):
        rack.settle()
        for kind in KINDS:
            eventually(lambda kind=kind: rack.in_touch(kind))  # type: ignore[misc]


@each_engine
@each_router
def test_a_router_that_goes_and_comes_back(rack: Rack, kind: str) -> None:
    """With graceful restart its routes stay and nothing is lost; a closed port is named."""
    uplink, router = UPLINKS[kind], rack.routers[kind]
    with Ping(rack.hosts[kind], POD) as four, Ping(rack.hosts[kind], POD_SIX) as six:
        router.stop()
        eventually(lambda: not rack.node.established(uplink.address), PROMPTLY)
        assert rack.ways_out() == set(KINDS)
        eventually(lambda: "refused, or closed at once" in rack.info(kind))
        rack.begin(kind, graceful=True)
        rack.settle()
    assert four.lost == 0
    assert six.lost <= (1000 if kind == "frr" else 0)  # it deletes IPv6 routes before they come


@pytest.mark.slow
@exabgp_only  # BIRD uses what it kept as soon as the link is back
@each_router
@pytest.mark.parametrize("graceful", [True, False], ids=["graceful", "cold"])
def test_a_router_reboots(rack: Rack, kind: str, graceful: bool) -> None:
    """Its link goes, its BGP, and all its kernel knew. When the link is back nothing is sent
    there before it has told its routes anew.
    """
    uplink, router = UPLINKS[kind], rack.routers[kind]
    router.run("ip", "link", "set", "node", "down")
    router.end()
    router.run("ip", "address", "flush", "dev", "node")
    for family in ("-4", "-6"):
        for protocol in ("bird", "bgp", "static"):
            router.run("ip", family, "route", "flush", "proto", protocol)
    eventually(lambda: rack.ways_out() == rack.ways_out(SHARED_SIX) == set(KINDS) - {kind})
    rack.plug_in(kind)
    for address in (uplink.address, uplink.six):
        eventually(lambda a=address: not rack.node.established(a), PROMPTLY)  # type: ignore[misc]
    assert rack.ways_out() == rack.ways_out(SHARED_SIX) == set(KINDS) - {kind}
    assert not any(rack.node.route_to(net) for net in uplink.own)
    rack.begin(kind, graceful=graceful, forwards=False)
    rack.settle()
    eventually(lambda: rack.in_touch(kind))


@pytest.mark.slow
@each_engine
@each_router
def test_the_engine_is_killed_and_nobody_notices(rack: Rack, kind: str) -> None:
    router, uplink = rack.routers[kind], UPLINKS[kind]
    before = rack.node.sessions(uplink.address, uplink.six)
    gone = []

    def back() -> bool:
        gone.append(not router.prefixes() >= BLOCKS)
        return rack.node.established_since(before)

    with Ping(rack.hosts[kind], POD) as four, Ping(rack.hosts[kind], POD_SIX) as six:
        os.kill(rack.daemon(), signal.SIGKILL)
        eventually(back)
    assert not any(gone)
    assert (four.lost, six.lost) == (0, 0)


@pytest.mark.slow
@each_engine
@each_router
def test_ttl_security_and_a_password(rack: Rack, kind: str) -> None:
    """The router is away first; then it is the first to have them no more, and the last again."""
    uplink, router = UPLINKS[kind], rack.routers[kind]
    both = {"ttlSecurity": 1, "password": {"secretKeyRef": {"name": "bgp", "key": "rack"}}}
    secure: dict[str, Any] = {"ttl_security": True, "password": PASSWORD}
    rack.world.secret("bgp", rack=PASSWORD)
    router.stop()
    rack.peer(kind, **both)
    words = {"exabgp": "incoming-ttl", "bird": "ttl security on"}[rack.engine]
    eventually(lambda: words in (rack.node.run_dir / f"{rack.engine}.conf").read_text())
    eventually(lambda: not rack.node.established(uplink.address), PROMPTLY)
    rack.begin(kind, **secure)
    eventually(lambda: rack.up(kind))
    rack.begin(kind)
    rack.peer(kind)
    eventually(lambda: rack.up(kind))
    rack.peer(kind, **both)
    eventually(lambda: not rack.node.established(uplink.address), PROMPTLY)
    rack.begin(kind, **secure)
    eventually(lambda: rack.up(kind))
    rack.begin(kind)
    rack.peer(kind)


@each_engine
@each_router
def test_a_link_flaps(rack: Rack, kind: str) -> None:
    """Away at once, back when it is back; the others carry on."""
    since = {other: rack.node.peer(UPLINKS[other].address) for other in KINDS if other != kind}
    for _ in range(3):
        rack.routers[kind].run("ip", "link", "set", "node", "down")
        eventually(lambda: rack.ways_out() == set(KINDS) - {kind})
        rack.plug_in(kind)
        eventually(lambda: kind in rack.ways_out())
    for other, before in since.items():
        now = rack.node.peer(UPLINKS[other].address)
        assert now
        assert before
        assert now.since == before.since


@pytest.mark.slow
@exabgp_only
@pytest.mark.parametrize("kind", ["bird", "frr"])  # GoBGP has no BFD
def test_a_router_with_bfd_is_answered_and_its_death_seen(rack: Rack, kind: str) -> None:
    uplink, router = UPLINKS[kind], rack.routers[kind]
    with rack.changed(kind, bfd=True):
        rack.settle()
        for address in (uplink.address, uplink.six):
            eventually(lambda a=address: bool((p := rack.node.peer(a)) and "up" in p.bfd))  # type: ignore[misc]
        router.run("tc", *CUT)
        eventually(lambda: rack.ways_out() == set(KINDS) - {kind})
        eventually(lambda: rack.info(kind).startswith("BFD: "))
        router.run("tc", *RESTORE)
        rack.settle()
