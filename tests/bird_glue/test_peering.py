"""What a BGPPeer says of a session, as a router sees it: ways to it, AS numbers, TTL, IPv6."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kernel.netns import inside
from tests.bird_glue.world import Bird, Node, World, world
from tests.support.netns import connect, eventually

TOR, NODE, LOOPBACK = "172.31.1.1", "172.31.1.11", "10.225.0.4"
TOR6, NODE6 = "fd00:1::1", "fd00:1::11"
BLOCK, BLOCK6 = "10.1.0.0/26", "fd10::/122"
BIRD = f"""
log stderr all;
router id {TOR};
protocol device {{ scan time 1; }}
protocol direct {{ ipv4; ipv6; }}
protocol static {{ ipv4; route 10.70.0.0/16 blackhole; }}
protocol static {{ ipv6; route fd70::/32 blackhole; }}
template bgp common {{
  hold time 30; graceful restart on;
  connect delay time 0; connect retry time 1; error wait time 1, 2;
}}
protocol bgp six from common {{
  local {TOR6} as 65001; neighbor {NODE6} as 64512; direct;
  ipv6 {{ import all; export where source = RTS_STATIC; next hop self; }};
}}
"""
# BIRD has but one session with an address
FAR = f"""
protocol bgp far from common {{
  local {LOOPBACK} as 65001; neighbor {NODE} as 65010; multihop;
  ipv4 {{ import all; export where source = RTS_STATIC; next hop self; }};
}}
"""
NEAR = f"""
protocol bgp near from common {{
  local {TOR} as 65001; neighbor {NODE} as 64512; direct; ttl security on;
  ipv4 {{ import all; export none; }};
}}
"""


@dataclass
class Rack:
    node: Node
    tor: Bird
    world: World


@pytest.fixture(scope="module", params=["exabgp", "bird"])
def rack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rack]:
    with world(tmp_path_factory.mktemp("peering")) as made:
        node, tor = made.node("n1"), made.bird("tor")
        node.engine = request.param
        addresses = [f"{NODE}/24", f"{TOR}/24"]
        connect(node.namespace, "eth0", tor.namespace, "n1", addresses)
        for station, name, address in ((node, "eth0", NODE6), (tor, "n1", TOR6)):
            station.run("ip", "address", "add", f"{address}/64", "dev", name, "nodad")
        tor.run("ip", "address", "add", f"{LOOPBACK}/32", "dev", "lo")
        store = made.store
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        store.node("n1", f"{NODE}/24", ipv6Address=f"{NODE6}/64")
        store.block("n1", BLOCK)
        store.block("n1", BLOCK6)
        tor.start(BIRD + FAR)
        node.start()
        yield Rack(node, tor, made)


def far(rack: Rack, **spec: object) -> None:
    rack.world.store.put(
        "BGPPeer", "far", peerIP=LOOPBACK, asNumber=65001, localASNumber=65010, **spec
    )


def test_reachable_by(rack: Rack) -> None:
    """Nothing but ``reachableBy`` leads to the router's loopback, nor to what it is next hop of."""
    node = rack.node
    far(rack)
    eventually(lambda: bool((peer := node.peer(LOOPBACK)) and "no route" in peer.info))
    far(rack, reachableBy="172.31.9.9")
    words = "BGPPeer far: spec.reachableBy: '172.31.9.9'"
    eventually(lambda: bool((status := node.status()) and words in "".join(status.problems)))
    far(rack, reachableBy=TOR)
    eventually(lambda: node.established(LOOPBACK))
    assert node.route_to(f"{LOOPBACK}/32") == f"{LOOPBACK} via {TOR} dev eth0 metric 1024"
    via = f"10.70.0.0/16 via {TOR} dev eth0 metric 1024"
    eventually(lambda: node.route_to("10.70.0.0/16") == via)
    eventually(lambda: BLOCK in rack.tor.blocks())
    # over this session the node's AS is another
    assert "BGP.as_path: 65010" in rack.tor.shown(BLOCK)
    rack.world.store.delete("BGPPeer", "far")
    eventually(lambda: node.route_to(f"{LOOPBACK}/32") == "" == node.route_to("10.70.0.0/16"))
    eventually(lambda: BLOCK not in rack.tor.blocks())


def test_ttl_security_and_keepalive(rack: Rack) -> None:
    store, node = rack.world.store, rack.node
    rack.tor.configure(BIRD + NEAR)
    store.put("BGPPeer", "near", peerIP=TOR, asNumber=65001, ttlSecurity=1, keepaliveTime="3s")
    eventually(lambda: node.established(TOR))
    shown = rack.tor.birdc("show", "protocols", "all", "near")
    # three keepalives in a hold time (RFC 4271 10), and the lower hold time counts
    assert "/9" in next(line for line in shown.splitlines() if "Hold timer" in line)
    store.delete("BGPPeer", "near")
    eventually(lambda: node.peer(TOR) is None)


def test_ipv6(rack: Rack) -> None:
    store, node, tor = rack.world.store, rack.node, rack.tor
    store.put("BGPPeer", "six", peerIP=TOR6, asNumber=65001)
    eventually(lambda: node.established(TOR6))
    eventually(lambda: BLOCK6 in tor.blocks())
    eventually(lambda: "fd70::/32 via " in node.route_to("fd70::/32"))
    rule = {"action": "Reject", "cidr": "fd70::/16", "matchOperator": "In"}
    store.put("BGPFilter", "six", importV6=[rule | {"prefixLength": {"min": 32, "max": 48}}])
    store.put("BGPPeer", "six", peerIP=TOR6, asNumber=65001, filters=["six"])
    eventually(lambda: node.route_to("fd70::/32") == "")
    store.delete("BGPPeer", "six")
    eventually(lambda: BLOCK6 not in tor.blocks())


def test_a_silent_peer_holds_up_no_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Connected, and then not a word, with our routes waiting for it: it may be new settings
    that it waits for, and other sessions want theirs as well."""
    with world(tmp_path_factory.mktemp("silent")) as made:
        node, silent, tor = made.node("n1"), made.host("silent"), made.bird("tor")
        connect(node.namespace, "eth0", tor.namespace, "n1", [f"{NODE}/24", f"{TOR}/24"])
        addresses = ["172.31.2.11/24", "172.31.2.1/24"]
        connect(node.namespace, "eth1", silent.namespace, "n1", addresses)
        store = made.store
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        store.node("n1", f"{NODE}/24")
        store.block("n1", BLOCK)
        with inside(silent.namespace.fd):
            listener = socket.create_server(("", 179))
        with listener:
            listener.settimeout(60)
            settings = {"peerIP": "172.31.2.1", "asNumber": 65002, "sourceAddress": "None"}
            store.put("BGPPeer", "silent", **settings)
            node.start()
            first, _ = listener.accept()
            with first:
                first.settimeout(60)
                assert first.recv(4096)
                tor.start(BIRD + NEAR)
                store.put("BGPPeer", "near", peerIP=TOR, asNumber=65001, ttlSecurity=1)
                eventually(lambda: node.established(TOR))
                store.put("BGPPeer", "silent", **settings, keepaliveTime="5s")
                assert first.recv(4096) == b""
                second, _ = listener.accept()
                with second:
                    second.settimeout(60)
                    hold_time = second.recv(4096)[22:24]  # of OPEN (RFC 4271 4.2)
                    assert int.from_bytes(hold_time, "big") == 15
            assert node.established(TOR)


def test_ttl_security_holds_for_peers_that_call(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A router behind another one, which calls with TTL 255 as one on the link would."""
    with world(tmp_path_factory.mktemp("far")) as made:
        node, between, caller = made.node("n1"), made.host("between"), made.bird("caller")
        connect(node.namespace, "eth0", between.namespace, "a", [f"{NODE}/24", f"{TOR}/24"])
        connect(caller.namespace, "eth0", between.namespace, "b", ["192.0.2.9/24", "192.0.2.1/24"])
        node.run("ip", "route", "add", "default", "via", TOR)
        caller.run("ip", "route", "add", "default", "via", "192.0.2.1")
        made.store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        made.store.node("n1", f"{NODE}/24")
        made.store.put("BGPPeer", "p", peerIP="192.0.2.9", asNumber=65001, ttlSecurity=2)
        caller.start(f"""
            log stderr all;
            router id 192.0.2.9;
            protocol device {{ scan time 1; }}
            protocol bgp n1 {{
              local 192.0.2.9 as 65001; neighbor {NODE} as 64512; multihop 2; ttl security on;
              connect delay time 0; connect retry time 1; error wait time 1, 1;
              ipv4 {{ import all; export none; }};
            }}
        """)
        node.start()
        eventually(lambda: node.established("192.0.2.9"))
        # one hop less is allowed than there are: from here on whatever it sends is too far away
        made.store.put("BGPPeer", "p", peerIP="192.0.2.9", asNumber=65001, ttlSecurity=1)
        eventually(lambda: not node.established("192.0.2.9"))
        with pytest.raises(AssertionError):  # both call, each every second or so
            eventually(lambda: node.established("192.0.2.9"), 4)
