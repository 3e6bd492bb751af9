"""One node and a top-of-rack router, BIRD 2 over eBGP: a pod, an outside host, and packets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.bird_glue.world import (
    BIRD_COMMON,
    BIRD_SESSION,
    Bird,
    Node,
    Ping,
    Process,
    Station,
    World,
    world,
)
from tests.support.netns import PROMPTLY, eventually

BLOCK, POD, OUTSIDE = "10.1.0.0/26", "10.1.0.5", "192.0.2.9"
TOR, NODE = "172.31.1.1", "172.31.1.11"
STATICS = """
protocol static {{ ipv4; {routes} }}
"""


def bird_configuration(*statics: str, asn: int = 65001, graceful: str = "on") -> str:
    routes = " ".join(f"route {net} blackhole;" for net in statics)
    session = BIRD_SESSION.format(
        name="n1", local=TOR, asn=asn, peer=NODE, peer_asn=64512, export="all"
    ).replace("graceful restart on;", f"graceful restart {graceful};")
    return BIRD_COMMON.format(router_id=TOR) + STATICS.format(routes=routes) + session


@dataclass
class Rack:
    node: Node
    tor: Bird
    pod: Station
    outside: Station
    world: World

    def settle(self) -> None:
        eventually(lambda: self.node.established(TOR))
        eventually(lambda: BLOCK in self.tor.blocks())
        eventually(lambda: self.node.route_to("192.0.2.0/24") != "")


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    with world(tmp_path_factory.mktemp("tor")) as made:
        node, tor, outside = made.rack(NODE, TOR, OUTSIDE)
        pod = made.pod(node, "pod", POD)
        store = made.store
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False, asNumber=64512)
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        store.put("IPPool", "overlay", cidr="10.2.0.0/16", vxlanMode="Always")
        store.put("BGPPeer", "tor", peerIP=TOR, asNumber=65001)
        store.node("n1", f"{NODE}/24")
        store.block("n1", BLOCK)
        tor.start(bird_configuration())
        node.start()
        yield Rack(node, tor, pod, outside, made)


@pytest.fixture(autouse=True)
def settled(rack: Rack) -> None:
    rack.settle()


def test_blocks_are_told_routes_learned_and_packets_flow(rack: Rack) -> None:
    """The block, not the pod inside of it; what is free in it goes nowhere."""
    assert rack.tor.blocks() == {BLOCK}
    expected = [
        f"blackhole {BLOCK} metric 1024",
        f"192.0.2.0/24 via {TOR} dev eth0 metric 1024",
    ]
    eventually(lambda: rack.node.routes() == expected)
    assert rack.outside.reaches(POD)
    assert rack.pod.reaches(OUTSIDE)
    # ExaBGP tells what it sent after it sent it: the ToR may know first
    complete = (2, 1, 1)
    eventually(
        lambda: bool(
            (p := rack.node.peer(TOR)) and (p.received, p.installed, p.announced) == complete
        )
    )
    peer = rack.node.peer(TOR)
    assert peer
    assert (peer.type, peer.asn, peer.port, peer.info) == ("global", 65001, 179, "")
    # the node's own subnet is told too, and not used
    assert (peer.received, peer.used, peer.installed) == (2, 1, 1)
    assert peer.refused == {"it is a subnet this node is on": 1}


def test_blocks_and_routes_come_and_go(rack: Rack) -> None:
    store, node, tor = rack.world.store, rack.node, rack.tor
    store.block("n1", "10.1.9.0/26")
    store.block("n1", "10.1.8.0/26", state="pending")
    tor.configure(bird_configuration("10.50.0.0/16", "10.2.7.0/26", "10.1.0.4/30"))
    eventually(lambda: tor.blocks() == {BLOCK, "10.1.9.0/26"})
    eventually(lambda: node.route_to("10.50.0.0/16") != "")
    assert node.route_to("10.2.7.0/26") == ""  # felix programs routes of VXLAN pools
    assert node.route_to("10.1.0.4/30") == ""  # inside of a block of this node
    eventually(lambda: "blackhole 10.1.9.0/26 metric 1024" in node.routes())
    store.drop_block("n1", "10.1.9.0/26")
    tor.configure(bird_configuration())
    eventually(lambda: tor.blocks() == {BLOCK})
    eventually(lambda: len(node.routes()) == 2)


def test_a_pool_is_taken_out_of_bgp_and_put_back(rack: Rack) -> None:
    rack.world.store.put("IPPool", "plain", cidr="10.1.0.0/16", disableBGPExport=True)
    eventually(lambda: rack.tor.blocks() == set())
    assert f"blackhole {BLOCK} metric 1024" in rack.node.routes()
    rack.world.store.put("IPPool", "plain", cidr="10.1.0.0/16", disabled=True)
    eventually(lambda: rack.tor.blocks() == {BLOCK})  # its addresses are still in use


def test_kernel_routes_that_vanish_are_put_back(rack: Rack) -> None:
    rack.node.run("ip", "route", "flush", "proto", "179")
    eventually(lambda: len(rack.node.routes()) == 2)
    rack.node.run("ip", "link", "set", "eth0", "down")
    eventually(lambda: rack.node.route_to("192.0.2.0/24") == "")
    rack.node.run("ip", "link", "set", "eth0", "up")
    eventually(lambda: rack.node.route_to("192.0.2.0/24") != "")


def test_bad_peers_are_named_and_hurt_nobody(rack: Rack) -> None:
    store, node, tor = rack.world.store, rack.node, rack.tor
    session = tor.session("n1")
    store.put(
        "BGPPeer",
        "locked",
        peerIP="172.31.1.7",
        asNumber=1,
        password={"secretKeyRef": {"key": "p", "name": "s"}},
    )
    store.put("BGPPeer", "twice", peerIP=f"{TOR}:1790", asNumber=1)
    store.put("BGPPeer", "nobody", peerIP="172.31.1.99", asNumber=1)
    store.put("BGPPeer", "nowhere", peerIP="198.51.100.1", asNumber=1)
    store.put("BGPPeer", "closed", peerIP="192.0.2.1", asNumber=1)
    store.put_raw("BGPPeer", "broken", {"kind": "BGPPeer", "spec": {"peerIP": "172.31.1.300"}})

    def informed() -> bool:
        info = {address: found.info if (found := node.peer(address)) else "" for address in WORDS}
        return all(words in info[address] for address, words in WORDS.items())

    eventually(informed)
    status = node.status()
    assert status
    text = "\n".join(status.problems)
    assert "BGPPeer locked: spec.password" in text
    assert f"BGPPeer twice: spec.peerIP: '{TOR}': another address: BGPPeer tor" in text
    assert "BGPPeer broken: spec.peerIP: '172.31.1.300': an IP address" in text
    for name in ("locked", "twice", "nobody", "nowhere", "closed", "broken"):
        store.delete("BGPPeer", name)
    eventually(lambda: bool((status := node.status()) and len(status.peers) == 1))
    assert tor.session("n1") == session


WORDS = {
    "172.31.1.99": "no answer from 172.31.1.99 on its link",
    "198.51.100.1": "no route to 198.51.100.1",
    "192.0.2.1": "refused, or closed at once",
}


def test_wrong_as_is_explained(rack: Rack) -> None:
    rack.tor.configure(bird_configuration(asn=65009))
    wrong = "wrong AS number: the peer is AS 65009, AS 65001 is configured"
    eventually(lambda: bool((peer := rack.node.peer(TOR)) and peer.info == wrong))
    rack.tor.configure(bird_configuration())


@pytest.mark.parametrize("who", ["agent", "ExaBGP", "agent and ExaBGP"])
def test_nothing_is_lost_when_it_is_killed(rack: Rack, who: str) -> None:
    """Echo and its answer take the learned route one way and the announced block the other."""
    node, tor = rack.node, rack.tor
    session, exabgp = tor.session("n1"), node.exabgp()
    with Ping(rack.outside, POD) as ping:
        if "agent" in who:
            node.agent.end()
        if "ExaBGP" in who:
            os.kill(exabgp, signal.SIGKILL)
        if "agent" in who:
            node.start()
        if "ExaBGP" in who:
            eventually(lambda: tor.session("n1") != session)
        eventually(lambda: node.established(TOR))
        # the end of our routes was marked: BIRD no longer keeps any in the hope to hear of them
        eventually(lambda: "restart active" not in tor.birdc("show", "protocols", "all", "n1"))
        eventually(lambda: bool((status := node.status()) and not status.holding))
    assert ping.lost == 0
    assert len(node.routes()) == 2
    if who == "agent":
        assert node.exabgp() == exabgp
        assert tor.session("n1") == session  # the session didn't notice


def test_what_changed_while_the_agent_was_away(rack: Rack) -> None:
    store, node, tor = rack.world.store, rack.node, rack.tor
    store.block("n1", "10.1.9.0/26")
    tor.configure(bird_configuration("10.50.0.0/16"))
    eventually(lambda: "10.1.9.0/26" in tor.blocks() and node.route_to("10.50.0.0/16") != "")
    node.agent.end()
    store.drop_block("n1", "10.1.9.0/26")
    store.block("n1", "10.1.10.0/26")
    tor.configure(bird_configuration("10.51.0.0/16"))
    node.start()
    eventually(lambda: tor.blocks() == {BLOCK, "10.1.10.0/26"})
    eventually(lambda: node.route_to("10.51.0.0/16") != "" and not node.route_to("10.50.0.0/16"))
    store.drop_block("n1", "10.1.10.0/26")
    tor.configure(bird_configuration())
    eventually(lambda: tor.blocks() == {BLOCK})


def test_a_router_that_restarts_gracefully_loses_nothing(rack: Rack) -> None:
    with Ping(rack.outside, POD) as ping:
        rack.tor.daemon.end()
        eventually(lambda: not rack.node.established(TOR), PROMPTLY)
        assert rack.node.route_to("192.0.2.0/24") != ""
        rack.tor.start(bird_configuration(), "-R")
        rack.settle()
    assert ping.lost == 0


def test_routes_of_a_router_that_does_not_come_back_go(rack: Rack) -> None:
    rack.tor.configure(bird_configuration(graceful="on; graceful restart time 1"))
    eventually(lambda: "Restart time: 1" in rack.tor.birdc("show", "protocols", "all", "n1"))
    rack.settle()
    rack.tor.daemon.end()
    eventually(lambda: rack.node.route_to("192.0.2.0/24") == "", PROMPTLY)
    rack.tor.start(bird_configuration())
    rack.settle()


def test_a_peer_that_is_removed_forgets_us_at_once(rack: Rack) -> None:
    """Though it would keep our routes for two minutes if we merely hung up."""
    rack.world.store.delete("BGPPeer", "tor")
    eventually(lambda: rack.tor.blocks() == set())
    eventually(lambda: rack.node.route_to("192.0.2.0/24") == "")
    # wanted again, perhaps before ExaBGP has been told
    rack.world.store.put("BGPPeer", "tor", peerIP=TOR, asNumber=65001)
    rack.settle()
    for _ in range(3):
        rack.world.store.delete("BGPPeer", "tor")
        rack.world.store.put("BGPPeer", "tor", peerIP=TOR, asNumber=65001)
    rack.settle()


def test_sessions_are_added_while_routes_are_being_told(rack: Rack) -> None:
    """ExaBGP loses a request to load its configuration that comes while routes wait."""
    store, node, tor = rack.world.store, rack.node, rack.tor
    session = tor.session("n1")
    blocks = [f"10.1.{n}.0/26" for n in range(100, 200)]
    for block in blocks:
        store.block("n1", block)
    store.put("BGPPeer", "new", peerIP="192.0.2.1", asNumber=65001)
    for block in blocks[::2]:
        store.drop_block("n1", block)
    eventually(lambda: tor.blocks() == {BLOCK, *blocks[1::2]})
    # BIRD doesn't know us there, but it is there
    refused = "refused, or closed at once"
    eventually(lambda: bool((peer := node.peer("192.0.2.1")) and refused in peer.info))
    for block in blocks[1::2]:
        store.drop_block("n1", block)
    store.delete("BGPPeer", "new")
    eventually(lambda: tor.blocks() == {BLOCK})
    assert tor.session("n1") == session


def test_a_port_that_is_taken_is_named(rack: Rack) -> None:
    node = rack.node
    node.agent.end()
    os.kill(node.exabgp(), signal.SIGKILL)
    eventually(lambda: not node.exabgp())
    listen = "import socket, time; s = socket.create_server(('', 179)); print(); time.sleep(60)"
    log = node.directory / "squatter.log"
    with Process(node.namespace, sys.executable, "-u", "-c", listen, log=log):
        eventually(lambda: log.read_text() != "")
        node.start()
        text = "the port may already be in use by another application"
        eventually(lambda: bool((s := node.status()) and text in "".join(s.problems)))
    rack.settle()
    eventually(lambda: bool((s := node.status()) and s.problems == []))


def test_leaving_takes_everything_back_first(rack: Rack) -> None:
    node = rack.node
    exabgp = node.exabgp()
    result = subprocess.run(
        [sys.executable, "-m", "bird_glue", "leave"],
        env={**os.environ, "MANX_RUN_DIR": str(node.run_dir)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert node.agent.wait() == 0
    eventually(lambda: rack.tor.blocks() == set())
    assert node.routes() == []
    assert exabgp
    assert node.exabgp() == 0
    node.start()
    rack.settle()
