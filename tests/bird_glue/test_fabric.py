"""Several nodes: the mesh, racks with BIRD and FRR, a reflecting router. Packets are the proof."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from bird_glue.process import Bird, ExaBgp
from tests.bird_glue.world import BIRD_COMMON, BIRD_SESSION, Node, Ping, world
from tests.support.netns import PROMPTLY, connect, eventually


def test_mesh_of_three_nodes(tmp_path: Path) -> None:
    """Everybody hears everybody, one helps the other over a restart, one goes for good.

    The first two speak IPv6 too, in a session of its own.
    """
    with world(tmp_path) as made:
        nodes = [made.node(f"n{n}") for n in (1, 2, 3)]
        hosts = [f"172.31.1.{n}" for n in (9, 10, 11)]  # as text, .9 is the greatest
        made.switch("rack", *((n, f"{h}/24") for n, h in zip(nodes, hosts, strict=True)))
        pods = [made.pod(node, f"p{n}", f"10.1.{n}.5") for n, node in enumerate(nodes)]
        for n, (node, host) in enumerate(zip(nodes, hosts, strict=True)):
            six = f"2001:db8::{n + 1}/64"
            node.run("ip", "address", "add", six, "dev", "eth0", "nodad")
            made.store.node(node.name, f"{host}/24", **({"ipv6Address": six} if n < 2 else {}))
            made.store.block(node.name, f"10.1.{n}.0/26")
            made.store.block(node.name, f"2001:db8:1{n}::/122")
        made.store.put("IPPool", "plain", cidr="10.1.0.0/16")
        for node in nodes:
            node.start()
        for n, node in enumerate(nodes):
            others = [m for m in range(3) if m != n]
            expected = {f"10.1.{m}.0/26 via {hosts[m]} dev eth0 metric 1024" for m in others}
            expected.add(f"blackhole 10.1.{n}.0/26 metric 1024")
            eventually(lambda node=node, expected=expected: set(node.routes()) == expected)  # type: ignore[misc]
        assert all(pods[a].reaches(f"10.1.{b}.5") for a in range(3) for b in range(3))
        # each node hears one block from each other one: nobody tells on what it heard
        peers = [node.peer(host) for node in nodes for host in hosts]
        assert {peer.received for peer in peers if peer} == {1}
        over_ipv6 = [
            "blackhole 2001:db8:10::/122 dev lo metric 1025 pref medium",
            "2001:db8:11::/122 via 2001:db8::2 dev eth0 metric 1025 pref medium",
        ]
        eventually(lambda: nodes[0].routes(family="-6") == over_ipv6)
        assert {peer.type for peer in peers if peer} == {"node-to-node mesh"}

        with Ping(pods[0], "10.1.1.5") as ping:
            before = nodes[0].sessions(hosts[1])
            os.kill(nodes[1].exabgp(), signal.SIGKILL)
            eventually(lambda: nodes[0].established_since(before))
            eventually(lambda: nodes[1].established(hosts[0]))
        assert ping.lost == 0

        made.store.delete("Node", "n3")
        made.store.drop_block("n3", "10.1.2.0/26")
        eventually(lambda: all(not node.route_to("10.1.2.0/26") for node in nodes[:2]))
        assert pods[0].reaches("10.1.1.5")


FRR_BGP = """
router bgp 65002
 bgp router-id 172.31.2.1
 no bgp ebgp-requires-policy
 neighbor 172.31.2.11 remote-as 64512
 address-family ipv4 unicast
  network 192.0.2.0/24
  network 172.31.2.0/24
 exit-address-family
"""


def test_two_uplinks_share_the_traffic_and_one_may_fail(tmp_path: Path) -> None:
    """A node between BIRD and FRR: two ways out, and no way through."""
    with world(tmp_path) as made:
        node, bird, frr, outside = made.node("n1"), made.bird("a"), made.frr("b"), made.host("out")
        connect(node.namespace, "eth0", bird.namespace, "n1", ["172.31.1.11/24", "172.31.1.1/24"])
        connect(node.namespace, "eth1", frr.namespace, "n1", ["172.31.2.11/24", "172.31.2.1/24"])
        made.switch(
            "spine", (bird, "192.0.2.1/24"), (frr, "192.0.2.2/24"), (outside, "192.0.2.9/24")
        )
        outside.run("ip", "route", "add", "10.1.0.0/16", "via", "192.0.2.2")
        pod = made.pod(node, "pod", "10.1.0.5")
        store = made.store
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        store.put("BGPPeer", "a", node="n1", peerIP="172.31.1.1", asNumber=65001)
        store.put(
            "BGPPeer", "b", node="n1", peerIP="172.31.2.1", asNumber=65002, sourceAddress="None"
        )
        store.node("n1", "172.31.1.11/24")
        store.block("n1", "10.1.0.0/26")
        bird.start(
            BIRD_COMMON.format(router_id="172.31.1.1")
            + BIRD_SESSION.format(
                name="n1", local="172.31.1.1", asn=65001, peer="172.31.1.11", peer_asn=64512,
                export="all",
            )
        )  # fmt: skip
        frr.start(FRR_BGP)
        node.start()
        both = (
            "192.0.2.0/24 metric 1024 nexthop via 172.31.1.1 dev eth0 weight 1 "
            "nexthop via 172.31.2.1 dev eth1 weight 1"
        )
        eventually(lambda: node.route_to("192.0.2.0/24") == both)
        eventually(lambda: outside.reaches("10.1.0.5"))
        eventually(lambda: pod.reaches("192.0.2.9"))
        # FRR's subnet is not told to BIRD, nor BIRD's to FRR
        eventually(lambda: bird.blocks() == {"10.1.0.0/26"})
        eventually(lambda: frr.blocks() == {"10.1.0.0/26", "172.31.2.0/24", "192.0.2.0/24"})

        with Ping(outside, "10.1.0.5") as ping:  # through FRR
            before = node.sessions("172.31.1.1", "172.31.2.1")
            os.kill(node.exabgp(), signal.SIGKILL)
            eventually(lambda: node.established_since(before))
        assert ping.lost == 0
        assert node.route_to("192.0.2.0/24") == both

        bird.run("ip", "link", "set", "n1", "down")  # the cable: no hold timer is waited for
        one = "192.0.2.0/24 via 172.31.2.1 dev eth1 metric 1024"
        eventually(lambda: node.route_to("192.0.2.0/24") == one)
        assert pod.reaches("192.0.2.9")


@pytest.mark.parametrize("asn", [64512, 65001], ids=["iBGP", "eBGP"])
def test_router_between_two_racks(tmp_path: Path, asn: int) -> None:
    """All nodes in AS 64512.

    iBGP: reflected with next hops unchanged, reached by a route that the router tells too.
    eBGP: the nodes' own AS is in the path of the other rack's routes, and allowed once.
    """
    with world(tmp_path) as made:
        one, two, tor = made.node("n1"), made.node("n2"), made.bird("tor")
        connect(one.namespace, "eth0", tor.namespace, "n1", ["172.31.1.11/24", "172.31.1.1/24"])
        connect(two.namespace, "eth0", tor.namespace, "n2", ["172.31.2.11/24", "172.31.2.1/24"])
        pods = made.pod(one, "p1", "10.1.1.5"), made.pod(two, "p2", "10.1.2.5")
        store = made.store
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        configuration = BIRD_COMMON.format(router_id="172.31.1.1")
        for n, node in ((1, one), (2, two)):
            store.node(node.name, f"172.31.{n}.11/24", labels={"rack": f"r{n}"})
            store.block(node.name, f"10.1.{n}.0/26")
            store.put(
                "BGPPeer", f"rack{n}", nodeSelector=f"rack == 'r{n}'",
                peerIP=f"172.31.{n}.1", asNumber=asn, numAllowedLocalASNumbers=1,
            )  # fmt: skip
            session = BIRD_SESSION.format(
                name=node.name, local=f"172.31.{n}.1", asn=asn, peer=f"172.31.{n}.11",
                peer_asn=64512, export="all",
            )  # fmt: skip
            if asn == 64512:
                session = session.replace("next hop self;", "").replace("ipv4", "rr client; ipv4")
            configuration += session
        tor.start(configuration)
        one.start()
        two.start()
        eventually(lambda: one.route_to("10.1.2.0/26") != "")
        eventually(lambda: two.route_to("10.1.1.0/26") != "")
        assert one.route_to("10.1.2.0/26") == "10.1.2.0/26 via 172.31.1.1 dev eth0 metric 1024"
        assert pods[0].reaches("10.1.2.5")
        assert pods[1].reaches("10.1.1.5")


def test_node_that_reflects(tmp_path: Path) -> None:
    """No mesh: two nodes hear of each other from a third, and send straight to each other."""
    with world(tmp_path) as made:
        nodes = [made.node(name) for name in ("rr", "n1", "n2")]
        hosts = [f"172.31.1.{n}" for n in (10, 11, 12)]
        made.switch("rack", *((n, f"{h}/24") for n, h in zip(nodes, hosts, strict=True)))
        rr, one, two = nodes
        pod = made.pod(one, "p1", "10.1.1.5")
        made.pod(two, "p2", "10.1.2.5")
        store = made.store
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        store.put("BGPPeer", "rr", nodeSelector="all()", peerSelector="has(rr)")
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        cluster = {"routeReflectorClusterID": "1.0.0.1", "labels": {"rr": "1"}}
        for n, (node, host) in enumerate(zip(nodes, hosts, strict=True)):
            store.node(node.name, f"{host}/24", **(cluster if node is rr else {}))
            store.block(node.name, f"10.1.{n}.0/26")
            node.start()
        direct = "10.1.2.0/26 via 172.31.1.12 dev eth0 metric 1024"
        eventually(lambda: one.route_to("10.1.2.0/26") == direct)
        eventually(lambda: two.route_to("10.1.1.0/26") != "")
        assert pod.reaches("10.1.2.5")
        with Ping(pod, "10.1.2.5") as ping:  # both the reflector's programs at once
            before, exabgp = one.sessions(hosts[0]), rr.exabgp()
            rr.agent.end()
            os.kill(exabgp, signal.SIGKILL)
            rr.start()
            eventually(lambda: one.established_since(before) and two.established(hosts[0]))
            eventually(lambda: bool((status := rr.status()) and not status.holding))
        assert ping.lost == 0
        store.drop_block("n2", "10.1.2.0/26")
        eventually(lambda: one.route_to("10.1.2.0/26") == "", PROMPTLY)


@pytest.mark.parametrize("engine", ["exabgp", "bird"])
def test_two_reflectors_and_one_dies(tmp_path: Path, engine: str) -> None:
    """For good, cable and all. The other one has told everything too, and goes on."""
    with world(tmp_path) as made:
        nodes = [made.node(name) for name in ("rr1", "rr2", "n1", "n2")]
        hosts = [f"172.31.1.{n}" for n in range(10, 14)]
        members = [(node, f"{host}/24") for node, host in zip(nodes, hosts, strict=True)]
        switch = made.switch("rack", *members)
        first, second, one, two = nodes
        pod = made.pod(one, "p1", "10.1.1.5")
        made.pod(two, "p2", "10.1.2.5")
        store = made.store
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        store.put("BGPPeer", "rr", nodeSelector="all()", peerSelector="has(rr)")
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        for n, (node, host) in enumerate(zip(nodes, hosts, strict=True)):
            reflects = {"routeReflectorClusterID": f"1.0.0.{n + 1}", "labels": {"rr": "1"}}
            store.node(node.name, f"{host}/24", **(reflects if n < 2 else {}))
        store.block("n1", "10.1.1.0/26")
        store.block("n2", "10.1.2.0/26")
        for node in nodes:
            node.start(MANX_BGP_ENGINE=engine)
        direct = "10.1.2.0/26 via 172.31.1.13 dev eth0 metric 1024"
        eventually(lambda: one.route_to("10.1.2.0/26") == direct)
        eventually(lambda: two.route_to("10.1.1.0/26") != "")
        for node in (one, two):  # from both, and both ways are the same one
            eventually(lambda n=node: n.established(*hosts[:2]))  # type: ignore[misc]
            eventually(lambda n=node: told(n, hosts[0]) == told(n, hosts[1]) == 1)  # type: ignore[misc]
        with Ping(pod, "10.1.2.5") as ping:
            switch.run("ip", "link", "set", "dev", "rr1", "down")
            first.end()
            eventually(lambda: not one.established(hosts[0]), PROMPTLY)
            eventually(lambda: not two.established(hosts[0]), PROMPTLY)
            store.block("n2", "10.1.3.0/26")
            eventually(lambda: one.route_to("10.1.3.0/26") != "")
        assert ping.lost == 0
        store.drop_block("n2", "10.1.2.0/26")
        eventually(lambda: one.route_to("10.1.2.0/26") == "", PROMPTLY)
        assert second.established(*hosts[2:])


def told(node: Node, host: str) -> int:
    """How many prefixes a peer has told."""
    peer = node.peer(host)
    return peer.received if peer else 0


@pytest.mark.parametrize("engine", ["exabgp", "bird"])
def test_a_locked_datastore_changes_no_session_and_no_route(tmp_path: Path, engine: str) -> None:
    """Neither does a restart of both programs meanwhile; what changed is done at the unlock."""

    def lock(locked: bool) -> None:
        made.store.put("ClusterInformation", "default", datastoreReady=not locked)

    with world(tmp_path) as made:
        nodes = [made.node(f"n{n}") for n in (1, 2)]
        hosts = ["172.31.1.11", "172.31.1.12"]
        made.switch("rack", *((n, f"{h}/24") for n, h in zip(nodes, hosts, strict=True)))
        pods = [made.pod(node, f"p{n}", f"10.1.{n}.5") for n, node in enumerate(nodes)]
        for n, (node, host) in enumerate(zip(nodes, hosts, strict=True)):
            made.store.node(node.name, f"{host}/24")
            made.store.block(node.name, f"10.1.{n}.0/26")
        made.store.put("IPPool", "plain", cidr="10.1.0.0/16")
        for node in nodes:
            node.start(MANX_BGP_ENGINE=engine)
        eventually(lambda: pods[0].reaches("10.1.1.5"))
        before = [node.routes("table main") for node in nodes]

        lock(True)
        told = "ClusterInformation default: spec.datastoreReady: False"
        for node in nodes:
            eventually(lambda n=node: bool((s := n.status()) and told in "".join(s.problems)))  # type: ignore[misc]
        with Ping(pods[0], "10.1.1.5") as ping:
            for name, host in zip(("n1", "n2"), hosts, strict=True):
                made.store.delete("Node", name)
                made.store.node("later", f"{host}/24")
            for n in range(2):
                made.store.drop_block(f"n{n + 1}", f"10.1.{n}.0/26")
            made.store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
            made.store.block("n1", "10.1.9.0/26")
            nodes[0].agent.end(signal.SIGKILL)
            nodes[0].start(MANX_BGP_ENGINE=engine)
            eventually(lambda: bool((s := nodes[0].status()) and told in "".join(s.problems)))
            session = nodes[1].sessions(hosts[0])
            for kind in (ExaBgp, Bird):  # nobody but the file knows the configuration now
                if daemon := kind.find(nodes[0].run_dir):
                    daemon.signal(signal.SIGKILL)
                    daemon.close()
            eventually(lambda: nodes[1].established_since(session))
            eventually(lambda: bool((s := nodes[0].status()) and not s.holding))
            # a second change of the lock object, so that what came before has been seen
            made.store.put("ClusterInformation", "default", datastoreReady=False, clusterType="x")
        assert ping.lost == 0
        assert [node.routes("table main") for node in nodes] == before
        # the object that has the address now is not looked at
        assert [peer.address for n in nodes if (s := n.status()) for peer in s.peers] == hosts[::-1]

        made.store.delete("Node", "later")
        for n, host in enumerate(hosts):
            made.store.node(f"n{n + 1}", f"{host}/24")
        made.store.delete("BGPConfiguration", "default")
        lock(False)
        eventually(lambda: nodes[1].routes("exact 10.1.9.0/26") != [])
        eventually(lambda: nodes[1].routes("exact 10.1.0.0/26") == [])
        own = ["blackhole 10.1.9.0/26 proto 179 metric 1024"]
        eventually(lambda: nodes[0].routes("type blackhole") == own)
