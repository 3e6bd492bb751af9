"""IPv4 routes over IPv6 sessions (RFC 8950), with each maker's router: links without IPv4."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bird_glue.peers import EXTENDED_NEXT_HOP
from tests.bird_glue.routers import KINDS, SHARED, TopOfRack, Uplink
from tests.bird_glue.world import Node, Ping, Station, World, world
from tests.support.netns import connect, eventually

BLOCK, BLOCK_SIX = "10.1.0.0/26", "2001:db8:1::/122"
POD, POD_SIX = "10.1.0.5", "2001:db8:1::5"
UPLINKS = {kind: Uplink(n, extended=True) for n, kind in enumerate(KINDS, 1)}


@dataclass
class Rack:
    world: World
    node: Node
    pod: Station
    routers: dict[str, TopOfRack]
    hosts: dict[str, Station]

    def peer(self, kind: str, extended: str = "true") -> None:
        uplink = UPLINKS[kind]
        self.world.store.put_raw(
            "BGPPeer",
            kind,
            {
                "apiVersion": "projectcalico.org/v3",
                "kind": "BGPPeer",
                "metadata": {"name": kind, "annotations": {EXTENDED_NEXT_HOP: extended}},
                "spec": {"peerIP": uplink.six, "asNumber": uplink.asn, "sourceAddress": "None"},
            },
        )

    def up(self, kind: str) -> bool:
        uplink = UPLINKS[kind]
        return (
            self.node.established(uplink.six)
            and self.routers[kind].prefixes() >= {BLOCK, BLOCK_SIX}
            and self.leads(uplink, uplink.own[0], "via inet6")
            and self.leads(uplink, uplink.own[1], "via")
        )

    def leads(self, uplink: Uplink, net: str, via: str) -> bool:
        """Whether the kernel has a way to a prefix by a router.

        By which of its two addresses depends on the engine, and on what it told: a router whose
        link-local one was too young when the session began told the other alone.
        """
        router = list(self.routers.values())[uplink.n - 1]
        shown = router.run("ip", "-6", "-o", "address", "show", "dev", "node").split()
        found = [word.partition("/")[0] for word in shown if ":" in word and "/" in word]
        ways = self.node.route_to(net)
        return any(f"{via} {address} dev eth{uplink.n} " in ways for address in found)

    def settle(self) -> None:
        for kind in KINDS:
            eventually(lambda kind=kind: self.up(kind))  # type: ignore[misc]


@pytest.fixture(scope="module", params=["exabgp", "bird"])
def rack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rack]:
    with rack_of_three(tmp_path_factory.mktemp("extended"), request.param) as made:
        yield made


@contextmanager
def rack_of_three(directory: Path, engine: str) -> Iterator[Rack]:
    with world(directory) as made:
        node = made.node("n1")
        node.engine = engine
        pod = made.pod(node, "pod", POD, POD_SIX)
        store = made.store
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        routers = {kind: made.router(KINDS[kind], kind) for kind in KINDS}
        hosts = {kind: made.host(f"host-{kind}") for kind in KINDS}
        rack = Rack(made, node, pod, routers, hosts)
        for kind, uplink in UPLINKS.items():
            router, host, device = routers[kind], hosts[kind], f"eth{uplink.n}"
            connect(node.namespace, device, router.namespace, "node")
            node.run("ip", "address", "add", f"{uplink.node_six}/64", "dev", device, "nodad")
            router.run("ip", "address", "add", f"{uplink.six}/64", "dev", "node", "nodad")
            own = uplink.behind[0]
            gateway = own[:-1] + "1"
            here = [f"{own}/16", f"{gateway}/16"]
            connect(host.namespace, "eth0", router.namespace, "host", here)
            host.run("ip", "route", "add", "default", "via", gateway)
            if kind == "gobgp":  # which writes no routes
                way = ("via", "inet6", uplink.node_six, "dev", "node")
                router.run("ip", "route", "add", BLOCK, *way)
            router.begin(uplink)
            rack.peer(kind)
        store.put("Node", "n1", bgp={"ipv6Address": f"{UPLINKS['bird'].node_six}/64"})
        store.block("n1", BLOCK)
        store.block("n1", BLOCK_SIX)
        node.start(MANX_ROUTER_ID="192.0.2.111")
        yield rack


@pytest.fixture(autouse=True)
def settled(rack: Rack) -> None:
    rack.settle()


def test_packets_go_both_ways_and_all_share_the_traffic(rack: Rack) -> None:
    for kind, uplink in UPLINKS.items():
        eventually(lambda kind=kind: rack.hosts[kind].reaches(POD))  # type: ignore[misc]
        assert rack.pod.reaches(uplink.behind[0])
    eventually(lambda: all(rack.leads(each, SHARED, "via inet6") for each in UPLINKS.values()))
    for uplink in UPLINKS.values():
        peer = rack.node.peer(uplink.six)
        assert peer
        assert peer.announced == 2
        assert peer.installed >= 2


def test_the_engine_is_killed_and_nobody_notices(rack: Rack) -> None:
    status = rack.node.status()
    assert status
    assert status.pid
    before = rack.node.sessions(*(uplink.six for uplink in UPLINKS.values()))
    with Ping(rack.hosts["bird"], POD) as ping:
        os.kill(status.pid, signal.SIGKILL)
        eventually(lambda: rack.node.established_since(before))
        rack.settle()
        eventually(lambda: bool((status := rack.node.status()) and not status.holding))
    assert ping.lost == 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_annotation_ipv4_is_taken_back(rack: Rack, kind: str) -> None:
    uplink = UPLINKS[kind]
    rack.peer(kind, "false")
    eventually(lambda: rack.node.route_to(uplink.own[0]) == "")
    eventually(lambda: rack.node.established(uplink.six))
    eventually(lambda: rack.node.route_to(uplink.own[1]) != "")
    if kind != "gobgp":  # which waits a minute for what a restarted session doesn't speak of
        eventually(lambda: rack.routers[kind].prefixes() == {BLOCK_SIX})
    rack.peer(kind, "yes")
    words = f"BGPPeer {kind}: metadata.annotations[{EXTENDED_NEXT_HOP}]: 'yes': true or false"
    eventually(lambda: bool((s := rack.node.status()) and words in "".join(s.problems)))
    rack.peer(kind)
