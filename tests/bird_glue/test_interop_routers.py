"""A node with three top-of-rack routers, of BIRD, FRR and GoBGP: the same story with each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.bird_glue.routers import KINDS, LOOP, SHARED, TopOfRack, Uplink
from tests.bird_glue.world import Node, Ping, Station, World, world
from tests.support.netns import connect, eventually

# nothing goes out any more, and the link stays up
RESTORE = ("qdisc", "del", "dev", "node", "root")
CUT = ("qdisc", "add", "dev", "node", "root", "tbf", "rate", "8bit", "burst", "1", "limit", "1")
BLOCKS = {"10.1.0.0/26", "2001:db8:1::/122"}
PASSWORD = "correct-horse"  # FRR takes none with a space
POD, OUTSIDE = "10.1.0.5", "192.0.2.9"
UPLINKS = {kind: Uplink(n) for n, kind in enumerate(KINDS, 1)}


@dataclass
class Rack:
    world: World
    node: Node
    pod: Station
    outside: Station
    routers: dict[str, TopOfRack]

    def up(self, kind: str) -> bool:
        uplink = UPLINKS[kind]
        return (
            self.node.established(uplink.address, uplink.six)
            and self.routers[kind].prefixes() >= BLOCKS
            and self.node.route_to(uplink.own[0]) != ""
            and self.routes_six(uplink.own[1]) != []
        )

    def routes_six(self, net: str) -> list[str]:
        return self.node.routes(f"exact {net} proto 179", "-6")

    def ways_out(self) -> set[str]:
        """The routers that share the traffic to the outside."""
        route = self.node.route_to(SHARED)
        return {kind for kind, uplink in UPLINKS.items() if f"via {uplink.address} " in route}

    def settle(self) -> None:
        for kind in KINDS:
            eventually(lambda kind=kind: self.up(kind), 40)  # type: ignore[misc]
        eventually(lambda: self.ways_out() == set(KINDS))

    @contextmanager
    def changed(self, kind: str, **settings: Any) -> Iterator[None]:
        """The router is set so for the block."""
        self.routers[kind].begin(replace(UPLINKS[kind], **settings))
        try:
            yield
        finally:
            self.routers[kind].begin(UPLINKS[kind])

    def peer(self, kind: str, **settings: Any) -> None:
        """Both sessions with a router."""
        uplink = UPLINKS[kind]
        for name, address in (("four", uplink.address), ("six", uplink.six)):
            self.world.store.put(
                "BGPPeer", f"{kind}-{name}", peerIP=address, asNumber=uplink.asn,
                sourceAddress="None", **settings,
            )  # fmt: skip

    def info(self, kind: str) -> str:
        peer = self.node.peer(UPLINKS[kind].address)
        return peer.info if peer else ""


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    with rack_of_three(tmp_path_factory.mktemp("interop")) as made:
        yield made


@contextmanager
def rack_of_three(directory: Path) -> Iterator[Rack]:
    with world(directory) as made:
        node, outside = made.node("n1"), made.host("out")
        pod = made.pod(node, "pod", POD)
        store = made.store
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        routers = {kind: made.router(KINDS[kind], kind) for kind in KINDS}
        members = []
        for kind, uplink in UPLINKS.items():
            router = routers[kind]
            four = [f"{uplink.node}/24", f"{uplink.address}/24"]
            connect(node.namespace, f"eth{uplink.n}", router.namespace, "node", four)
            for station, device, six in (
                (node, f"eth{uplink.n}", uplink.node_six),
                (router, "node", uplink.six),
            ):
                station.run("ip", "address", "add", f"{six}/64", "dev", device, "nodad")
            members.append((router, f"192.0.2.{uplink.n}/24"))
            router.run("ip", "route", "add", "10.1.0.0/26", "via", uplink.node)
        made.switch("spine", *members, (outside, f"{OUTSIDE}/24"))
        outside.run("ip", "route", "add", "10.1.0.0/16", "via", "192.0.2.1")
        first = UPLINKS["bird"]
        store.node("n1", f"{first.node}/24", ipv6Address=f"{first.node_six}/64")
        for block in BLOCKS:
            store.block("n1", block)
        rack = Rack(made, node, pod, outside, routers)
        for kind, uplink in UPLINKS.items():
            routers[kind].begin(uplink)
            rack.peer(kind)
        node.start()
        yield rack


@pytest.fixture(autouse=True)
def settled(rack: Rack) -> None:
    rack.settle()


each_router = pytest.mark.parametrize("kind", KINDS)


def test_all_share_the_traffic_and_nothing_is_passed_on(rack: Rack) -> None:
    assert rack.outside.reaches(POD)
    assert rack.pod.reaches(OUTSIDE)
    for kind, router in rack.routers.items():
        others = {net for other, uplink in UPLINKS.items() if other != kind for net in uplink.own}
        assert not router.prefixes() & others


@pytest.mark.parametrize("kind", ["bird", "frr"])  # GoBGP doesn't even send it
def test_our_own_as_in_a_path_is_a_loop(rack: Rack, kind: str) -> None:
    peer = rack.node.peer(UPLINKS[kind].address)
    assert peer
    assert peer.refused["our own AS is in its AS path"] >= 1
    assert rack.node.route_to(LOOP) == ""


@each_router
def test_communities_both_ways_and_filters(rack: Rack, kind: str) -> None:
    """Ours are seen there; theirs decide what we take; neither costs a session."""
    store, uplink = rack.world.store, UPLINKS[kind]
    peer = rack.node.peer(uplink.address)
    assert peer
    refuse = {
        "communities": {"values": [f"{uplink.asn}:7"]},
        "action": "Reject",
    }
    store.put("BGPFilter", "tagged", importV4=[refuse])
    store.put(
        "BGPConfiguration", "default", nodeToNodeMeshEnabled=False,
        prefixAdvertisements=[{"cidr": "10.1.0.0/16", "communities": ["64512:300"]}],
    )  # fmt: skip
    settings = {"peerIP": uplink.address, "asNumber": uplink.asn, "sourceAddress": "None"}
    store.put("BGPPeer", f"{kind}-four", **settings, filters=["tagged"])
    eventually(lambda: rack.node.route_to(uplink.own[0]) == "")
    eventually(lambda: "64512" in rack.routers[kind].communities("10.1.0.0/26"))
    eventually(lambda: "300" in rack.routers[kind].communities("10.1.0.0/26"))
    assert kind in rack.ways_out()
    store.put("BGPPeer", f"{kind}-four", **settings)
    store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
    rack.settle()
    now = rack.node.peer(uplink.address)
    assert now
    assert now.since == peer.since


@pytest.mark.slow
@each_router
def test_what_a_router_says_no_to_is_explained(rack: Rack, kind: str) -> None:
    """Wrong AS numbers, either way; more prefixes than it takes; the same router id."""
    store, uplink = rack.world.store, UPLINKS[kind]
    settings = {"peerIP": uplink.address, "sourceAddress": "None"}
    store.put("BGPPeer", f"{kind}-four", asNumber=65099, **settings)
    wrong = f"wrong AS number: the peer is AS {uplink.asn}, AS 65099 is configured"
    eventually(lambda: wrong in rack.info(kind), 30)
    store.put("BGPPeer", f"{kind}-four", asNumber=uplink.asn, localASNumber=65098, **settings)
    eventually(lambda: "wrong AS number, we are AS 65098" in rack.info(kind), 30)
    store.put("BGPPeer", f"{kind}-four", asNumber=uplink.asn, **settings)
    with rack.changed(kind, limit=1):
        blocks = [f"10.1.{n}.0/26" for n in range(1, 4)]
        for block in blocks:
            store.block("n1", block)
        eventually(lambda: "maximum number of prefixes reached" in rack.info(kind), 30)
        for block in blocks:
            store.drop_block("n1", block)


@each_router
def test_a_router_that_goes_and_comes_back(rack: Rack, kind: str) -> None:
    """With graceful restart its routes stay and nothing is lost; a closed port is named."""
    uplink, router = UPLINKS[kind], rack.routers[kind]
    with Ping(rack.outside, POD) as ping:
        router.stop()
        eventually(lambda: not rack.node.established(uplink.address))
        assert rack.ways_out() == set(KINDS)
        eventually(lambda: "refused, or closed at once" in rack.info(kind), 20)
        router.begin(uplink, graceful=True)
        rack.settle()
    assert ping.lost == 0


@pytest.mark.slow
@each_router
def test_exabgp_is_killed_and_nobody_notices(rack: Rack, kind: str) -> None:
    router = rack.routers[kind]
    os.kill(rack.node.exabgp(), signal.SIGKILL)
    gone = []
    uplink = UPLINKS[kind]

    def back() -> bool:
        gone.append(not router.prefixes() >= BLOCKS)
        return rack.node.established(uplink.address, uplink.six)

    eventually(lambda: not rack.node.established(uplink.address))
    eventually(back, 20)
    assert not any(gone)


@pytest.mark.slow
@each_router
def test_ttl_security_and_a_password(rack: Rack, kind: str) -> None:
    """The router is away first; then it is the first to have them no more, and the last again."""
    uplink, router = UPLINKS[kind], rack.routers[kind]
    both = {"ttlSecurity": 1, "password": {"secretKeyRef": {"name": "bgp", "key": "rack"}}}
    secure = replace(uplink, ttl_security=True, password=PASSWORD)

    def settled(before: float) -> bool:
        """Sessions that came up after that, and what they told."""
        peers = [rack.node.peer(address) for address in (uplink.address, uplink.six)]
        return all(peer and peer.since > before for peer in peers) and rack.up(kind)

    rack.world.secret("bgp", rack=PASSWORD)
    changed = time.time()
    router.stop()
    rack.peer(kind, **both)
    eventually(lambda: "incoming-ttl" in (rack.node.run_dir / "exabgp.conf").read_text())
    eventually(lambda: not rack.node.established(uplink.address))
    router.begin(secure)
    eventually(lambda: settled(changed), 30)
    changed = time.time()
    router.begin(uplink)
    rack.peer(kind)
    eventually(lambda: settled(changed), 30)
    changed = time.time()
    rack.peer(kind, **both)
    eventually(lambda: not rack.node.established(uplink.address))
    router.begin(secure)
    eventually(lambda: settled(changed), 30)
    router.begin(uplink)
    rack.peer(kind)


@each_router
def test_a_link_flaps(rack: Rack, kind: str) -> None:
    """Away at once, back when it is back; the others carry on."""
    uplink = UPLINKS[kind]
    since = {other: rack.node.peer(UPLINKS[other].address) for other in KINDS if other != kind}
    for _ in range(3):
        rack.routers[kind].run("ip", "link", "set", "node", "down")
        eventually(lambda: rack.ways_out() == set(KINDS) - {kind})
        rack.routers[kind].run("ip", "link", "set", "node", "up")
        six = ("ip", "address", "replace", f"{uplink.six}/64", "dev", "node", "nodad")
        rack.routers[kind].run(*six)
        eventually(lambda: kind in rack.ways_out())
    rack.routers[kind].run("ip", "route", "replace", "10.1.0.0/26", "via", uplink.node)
    for other, before in since.items():
        now = rack.node.peer(UPLINKS[other].address)
        assert now
        assert before
        assert now.since == before.since


@pytest.mark.slow
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
