"""The overlay: what follows from nodes, blocks and pools; and packets between racks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.net import Net, parse_interface, parse_net
from datastore.interface import Key
from felix.desired import Device
from felix.overlay import Encapsulation, Host, Overlay, Peer, Pool, Remote, tunnel_mac
from felix.tunnel import Tunnel
from ipam.allocator import Allocator
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from tests.felix.world import V3, Listener, Node, Pod, cluster, reaches
from tests.support.netns import connect, eventually, fresh_namespace, run


def host(address: str, tunnel: str | None) -> Host:
    own, network = parse_interface(address)
    return Host(own, network, parse_net(tunnel) if tunnel else None, tunnel_mac(address))


def overlay(mode: Encapsulation) -> Overlay:
    """node1 and node2 are in one subnet, node3 elsewhere. All have tunnel ends."""
    made = Overlay("node1")
    made.set_pools([Pool(parse_net("10.0.0.0/16"), mode, False)], None)
    made.set_host("node1", host("172.31.1.1/24", "10.0.0.1"))
    made.set_host("node2", host("172.31.1.2/24", "10.0.1.1"))
    made.set_host("node3", host("172.31.2.3/24", "10.0.2.1"))
    for node, third in (("node1", 0), ("node2", 1), ("node3", 2)):
        made.set_block(node, parse_net(f"10.0.{third}.0/26"), True)
    return made


def test_always_tunnels_to_all() -> None:
    changes = overlay(Encapsulation.ALWAYS).flush()
    assert changes.routes == {
        parse_net("10.0.1.0/26"): Remote(parse_net("10.0.1.1"), tunnelled=True),
        parse_net("10.0.2.0/26"): Remote(parse_net("10.0.2.1"), tunnelled=True),
    }
    assert changes.peers["node3"] == Peer(
        parse_net("10.0.2.1"), tunnel_mac("172.31.2.3/24"), parse_net("172.31.2.3")
    )


def test_cross_subnet_tunnels_only_where_it_must() -> None:
    made = overlay(Encapsulation.CROSS_SUBNET)
    assert made.flush().routes == {
        parse_net("10.0.1.0/26"): Remote(parse_net("172.31.1.2"), tunnelled=False),
        parse_net("10.0.2.0/26"): Remote(parse_net("10.0.2.1"), tunnelled=True),
    }
    made.set_host("node2", host("172.31.9.2/24", "10.0.1.1"))
    assert made.flush().routes == {
        parse_net("10.0.1.0/26"): Remote(parse_net("10.0.1.1"), tunnelled=True)
    }


def test_never_is_left_to_bgp() -> None:
    changes = overlay(Encapsulation.NEVER).flush()
    assert not changes.routes and not changes.peers


def test_borrowed_addresses_have_routes_of_their_own() -> None:
    made = overlay(Encapsulation.ALWAYS)
    made.flush()
    borrowed, own = parse_net("10.0.1.9"), parse_net("10.0.2.9")
    made.set_address("node3", borrowed, True)
    made.set_address("node3", own, True)
    assert made.flush().routes == {borrowed: Remote(parse_net("10.0.2.1"), tunnelled=True)}
    made.set_block("node2", parse_net("10.0.1.0/26"), False)
    made.set_block("node3", parse_net("10.0.1.0/26"), True)
    assert made.flush().routes == {
        borrowed: None,
        parse_net("10.0.1.0/26"): Remote(parse_net("10.0.2.1"), tunnelled=True),
        parse_net("10.0.1.1"): Remote(parse_net("10.0.1.1"), tunnelled=True),
    }


def test_the_tunnel_mac_follows_from_the_name() -> None:
    # printf node1 | sha1sum
    assert tunnel_mac("node1") == "66:f9:37:c3:7e:94"


@dataclass(frozen=True)
class Step:
    """One thing to tell an overlay, and what takes it back."""

    what: str
    arguments: tuple[Any, ...]

    def do(self, made: Overlay) -> None:
        node, value = self.arguments
        if self.what == "host":
            made.set_host(node, value)
        elif self.what == "block":
            made.set_block(node, value, held=True)
        else:
            made.set_address(node, value, used=True)

    def undo(self, made: Overlay) -> None:
        node, value = self.arguments
        if self.what == "host":
            made.set_host(node, None)
        elif self.what == "block":
            made.set_block(node, value, held=False)
        else:
            made.set_address(node, value, used=False)


nodes = st.sampled_from(["node1", "node2", "node3", "node4"])
addresses = st.integers(0, 255).map(lambda n: Net(4, 0x0A000000 + n, 32))
blocks = st.integers(0, 3).map(lambda n: Net(4, 0x0A000000 + 64 * n, 26))
hosts = st.builds(
    lambda number, tunnel: host(f"172.31.{number}.1/23", str(tunnel) if tunnel else None),
    st.integers(0, 9),
    st.none() | addresses,
)
steps = st.lists(
    st.one_of(
        st.tuples(nodes, hosts).map(lambda a: Step("host", a)),
        st.tuples(nodes, blocks).map(lambda a: Step("block", a)),
        st.tuples(nodes, addresses).map(lambda a: Step("address", a)),
    ),
    max_size=25,
)


@given(steps, st.sampled_from(Encapsulation), st.randoms(use_true_random=False))
def test_only_the_present_counts(
    drawn: list[Step], mode: Encapsulation, chance: random.Random
) -> None:
    # of several hosts of one name the last counts: keep one
    wanted = list(
        {(s.what, s.arguments[0] if s.what == "host" else s.arguments): s for s in drawn}.values()
    )
    pools = [Pool(parse_net("10.0.0.0/25"), mode, False)]
    straight = Overlay("node1")
    straight.set_pools(pools, None)
    for step in wanted:
        step.do(straight)
    straight.flush()

    detour = Overlay("node1")
    routes: dict[Net, Remote | None] = {}
    chance.shuffle(wanted)
    for step in wanted:
        step.do(detour)
        if chance.random() < 0.5:
            step.undo(detour)
            routes.update(detour.flush().routes)
            step.do(detour)
    detour.set_pools(pools, None)
    routes.update(detour.flush().routes)
    assert (detour.routes, detour.peers) == (straight.routes, straight.peers)
    assert {net: remote for net, remote in routes.items() if remote} == straight.routes


def test_a_tunnel_address_that_moves_to_another_node(
    namespace: Namespace, netlink: NetlinkSocket
) -> None:
    tunnel, (one, other) = parse_net("10.0.1.1"), map(parse_net, ("192.0.2.1", "192.0.2.2"))
    made = Tunnel(netlink)
    made.read({})
    made.want_device(Device(4096, 4789, one, parse_net("10.0.0.1"), tunnel_mac("me"), 1400), 0)
    made.want_peer("a", Peer(tunnel, tunnel_mac("a"), one))
    made.apply(0.0)
    made.want_peer("b", Peer(tunnel, tunnel_mac("b"), other))
    made.want_peer("a", None)
    made.apply(1.0)
    neighbours = run(namespace, "ip", "neighbour", "show", "nud", "permanent").stdout
    assert neighbours.split()[:5] == ["10.0.1.1", "dev", "vxlan.calico", "lladdr", tunnel_mac("b")]
    assert "192.0.2.1" not in run(namespace, "bridge", "fdb").stdout
    assert [error for table in made.tables() for error in table.errors] == []


class Racks:
    """node1 and node2 in one rack, node3 in another; a router between them."""

    def __init__(self, made: tuple[Node, ...], router: Namespace) -> None:
        self.nodes = made
        self.router = router
        run(router, "ip", "link", "add", "rack1", "type", "bridge")
        run(router, "ip", "address", "add", "172.31.1.254/24", "dev", "rack1")
        run(router, "ip", "link", "set", "rack1", "up")
        run(router, "sysctl", "-w", "net.ipv4.ip_forward=1")
        for number, node in enumerate(made, 1):
            assert node.address
            third = 1 if number < 3 else 2
            ends = [node.address] if number < 3 else [node.address, "172.31.2.254/24"]
            connect(node.netns, "eth0", router, f"n{number}", ends)
            if number < 3:
                run(router, "ip", "link", "set", f"n{number}", "master", "rack1")
            run(node.netns, "ip", "route", "add", "default", "via", f"172.31.{third}.254")
            node.start(wait=False)
        for node in made:
            node.wait_ready()

    def pod(self, node: Node, name: str) -> Pod:
        allocator = Allocator(node.store, node.name)
        address = allocator.assign(f"k8s-pod-network.{name}", {"pod": name}).address
        return node.pod(name, str(address).removesuffix("/32"))


def _pool(mode: str) -> dict[str, Any]:
    return {
        "apiVersion": V3,
        "kind": "IPPool",
        "metadata": {"name": "pool"},
        "spec": {"cidr": "10.64.0.0/16", "vxlanMode": mode},
    }


@pytest.fixture(scope="module")
def racks() -> Iterator[Racks]:
    names = ("node1", "node2", "node3")
    where = ("172.31.1.11/24", "172.31.1.12/24", "172.31.2.13/24")
    with cluster(*names, addresses=where, iptables=True) as made, fresh_namespace() as router:
        made[0].put(_pool("CrossSubnet"))
        racks = Racks(made, router)
        eventually(lambda: len(_tunnels(racks)) == 3)
        yield racks


def _tunnels(racks: Racks) -> list[str]:
    found = (node.store.get(Key("Node", node.name)).value["spec"] for node in racks.nodes)
    return [spec["ipv4VXLANTunnelAddr"] for spec in found if "ipv4VXLANTunnelAddr" in spec]


def test_pods_in_two_racks_talk_encapsulated(racks: Racks) -> None:
    one, two, three = racks.nodes
    first, second, third = (racks.pod(node, f"pod-{node.name}") for node in racks.nodes)
    for node in racks.nodes:
        node.settle()
    with Listener(third.netns, 80), Listener(second.netns, 80):
        assert reaches(first.netns, second.address, 80) == first.address
        assert reaches(first.netns, third.address, 80) == first.address
        assert reaches(one.netns, third.address, 80) in _tunnels(racks)
    routes = run(one.netns, "ip", "route").stdout
    assert "via 172.31.1.12 dev eth0 proto 80" in routes
    assert "dev vxlan.calico proto 80 onlink" in routes
    link = run(one.netns, "ip", "-d", "link", "show", "vxlan.calico").stdout
    assert "mtu 1450" in link and "id 4096" in link and "dstport 4789" in link
    assert tunnel_mac("node1") in link and "nolearning" in link
    # a packet of full size fits through, one that does not is refused, not lost
    full = ("ping", "-c1", "-W20", "-M", "do", "-s", "1422", third.address)
    run(first.netns, *full)
    seen = run(racks.router, "ip", "-s", "link", "show", "n3").stdout
    assert seen
    assert two.errors() == three.errors() == {}


def test_encapsulated_packets_are_taken_from_nodes_only(racks: Racks) -> None:
    one = racks.nodes[0]
    one.settle()
    rules = run(one.netns, "iptables", "-S", "cali-INPUT").stdout
    assert "cali40all-vxlan-net src" in rules
    members = run(one.netns, "ipset", "list", "cali40all-vxlan-net").stdout
    assert "172.31.1.12" in members and "172.31.2.13" in members

    def dropped() -> int:
        lines = run(one.netns, "iptables-save", "-c", "-t", "filter").stdout.splitlines()
        (line,) = (line for line in lines if "VXLAN from elsewhere" in line)
        return int(line[1:].split(":")[0])

    before = dropped()
    send = "import socket; socket.socket(2, 2).sendto(bytes(60), ('172.31.1.11', 4789))"
    run(racks.router, "python3", "-c", send)
    eventually(lambda: dropped() == before + 1)


def test_restart_keeps_the_tunnel(racks: Racks) -> None:
    one = racks.nodes[0]
    one.settle()
    before = _overlay_state(one)
    tunnels = _tunnels(racks)
    one.kill()
    one.start()
    one.settle()
    assert _overlay_state(one) == before
    assert _tunnels(racks) == tunnels


def test_a_damaged_device_is_mended(racks: Racks) -> None:
    one = racks.nodes[0]
    one.settle()
    before = _overlay_state(one)
    for damage in (("down",), ("address", "02:00:00:00:00:01", "down")):
        run(one.netns, "ip", "link", "set", "vxlan.calico", *damage)
        eventually(lambda: _overlay_state(one) == before)
    run(one.netns, "ip", "link", "del", "vxlan.calico")
    eventually(lambda: _without_index(_overlay_state(one)) == _without_index(before))


def test_the_end_of_encapsulation(racks: Racks) -> None:
    one = racks.nodes[0]
    one.put(_pool("Never"))
    eventually(lambda: _tunnels(racks) == [])
    for node in racks.nodes:
        node.settle()
        assert "vxlan" not in run(node.netns, "ip", "link").stdout
        assert "proto 80" not in _remote_routes(node)
        assert Allocator(node.store, node.name).addresses(f"vxlan-tunnel-addr-{node.name}") == []
    eventually(lambda: "all-vxlan" not in run(one.netns, "ipset", "list", "-n").stdout)
    one.put(_pool("Always"))
    eventually(lambda: len(_tunnels(racks)) == 3)
    for node in racks.nodes:
        node.settle()
    assert "via 172.31.1.12" not in _remote_routes(one)
    stranger = racks.nodes[1].pod("probe", "10.64.200.1")
    for node in racks.nodes:
        node.settle()
    with Listener(stranger.netns, 80):
        # off block: a route of its own
        assert reaches(one.netns, "10.64.200.1", 80) is not None


def _remote_routes(node: Node) -> str:
    lines = run(node.netns, "ip", "route").stdout.splitlines()
    return "\n".join(line for line in lines if "scope link" not in line)


def _overlay_state(node: Node) -> str:
    return "".join(
        run(node.netns, *command, check=False).stdout
        for command in (
            ("ip", "-d", "link", "show", "vxlan.calico"),
            ("ip", "-4", "address", "show", "vxlan.calico"),
            ("ip", "route"),
            ("ip", "neighbour", "show", "nud", "permanent"),
            ("bridge", "fdb", "show", "dev", "vxlan.calico"),
        )
    )


def _without_index(state: str) -> str:
    return "\n".join(sorted(line.split(": ", 1)[-1] for line in state.splitlines()))
