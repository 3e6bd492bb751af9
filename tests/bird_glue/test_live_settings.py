"""Fields that change how sessions and routes are made, each seen where it counts: at a router,
on a socket, in the kernel.

One node that reflects, three BIRD routers and a second node, all on one switch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.bird_glue.world import Bird, Node, World, world
from tests.support.netns import connect, eventually, run

NODE, SECOND = "172.31.1.11", "172.31.1.12"
SOURCE, OUTER, INNER = "172.31.1.1", "172.31.1.2", "172.31.1.3"
NODE_AS = 64512
ASNS = {SOURCE: NODE_AS, OUTER: 65002, INNER: NODE_AS}
BLOCK, BLOCK_SIX = "10.1.0.0/26", "2001:db8:1::/122"
INSIDE, ELSEWHERE, LATER = "10.1.7.0/26", "10.71.0.0/16", "10.70.0.0/16"
BEYOND = "172.31.9.1"  # on an interface of the node that may be ignored
HIGHEST = 2147483647
BIRD = """
log stderr all;
router id {address};
protocol device {{ scan time 1; }}
protocol static {{ ipv4; {statics} }}
template bgp common {{
  hold time 30; graceful restart on; direct;
  connect delay time 0; connect retry time 1; error wait time 1, 2;
}}
protocol bgp node from common {{
  local {address} as {asn}; neighbor {node} port {port} as 64512;
  ipv4 {{ import all; export all; }};
}}
"""
STATICS = f"""
route {LATER} blackhole; route {INSIDE} blackhole;
route {ELSEWHERE} blackhole {{ bgp_next_hop = {BEYOND}; }};
"""


@dataclass
class Place:
    engine: str
    world: World
    node: Node
    second: Node
    routers: dict[str, Bird]

    def configure(self, **spec: Any) -> None:
        spec = {"nodeToNodeMeshEnabled": False} | spec
        self.world.store.put("BGPConfiguration", "default", **spec)

    def peer(self, address: str, **spec: Any) -> None:
        settings = {"peerIP": address, "asNumber": ASNS[address]} | spec
        self.world.store.put("BGPPeer", f"r{address.rpartition('.')[2]}", **settings)

    def sees(self, address: str, net: str, words: str) -> bool:
        """Whether a router has that among the attributes of a prefix."""
        return words in self.routers[address].shown(net)

    def listens(self) -> set[str]:
        """Where BGP is listened for on the node: address and port."""
        return set(re.findall(r"LISTEN\s+\d+\s+\d+\s+(\S+:\d+)\s", self.node.run("ss", "-tln")))

    def settle(self) -> None:
        eventually(lambda: self.node.established(*self.routers))
        eventually(lambda: self.node.route_to(LATER) != "")
        eventually(lambda: all(BLOCK in router.blocks() for router in self.routers.values()))


@pytest.fixture(scope="module", params=["exabgp", "bird"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    with world(tmp_path_factory.mktemp("settings")) as made:
        node, second = made.node("n1"), made.node("n2")
        node.engine = second.engine = request.param
        routers = {address: made.bird(f"r{n}") for n, address in enumerate(ASNS, 1)}
        members = [(routers[address], f"{address}/24") for address in routers]
        made.switch("rack", *members, (node, f"{NODE}/24"), (second, f"{SECOND}/24"))
        beyond = ["172.31.9.11/24", f"{BEYOND}/24"]
        connect(node.namespace, "beyond0", made.host("beyond").namespace, "eth0", beyond)
        place = Place(request.param, made, node, second, routers)
        place.configure()
        store = made.store
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        store.put("IPPool", "more", cidr="10.64.0.0/10")
        cluster = {"routeReflectorClusterID": "1.0.0.1"}
        store.node("n1", f"{NODE}/24", **cluster)
        store.block("n1", BLOCK)
        for address, router in routers.items():
            place.peer(address)
            router.start(configuration(address))
        node.start()
        yield place


def configuration(address: str, port: int = 179) -> str:
    return BIRD.format(
        address=address,
        asn=ASNS[address],
        node=NODE,
        port=port,
        statics=STATICS if address == SOURCE else "",
    )


@pytest.fixture(autouse=True)
def settled(place: Place) -> None:
    place.settle()


def test_next_hop_mode_and_keep_original_next_hop(place: Place) -> None:
    """What a reflector tells on, to another AS and to its own."""
    own, original = f"BGP.next_hop: {NODE}", f"BGP.next_hop: {SOURCE}"
    for address, spec, expected in (
        (OUTER, {}, own),
        (INNER, {}, original),
        (OUTER, {"nextHopMode": "Keep"}, original),
        (OUTER, {"keepOriginalNextHop": True}, original),
        (OUTER, {"nextHopMode": "Self"}, own),
        (INNER, {"nextHopMode": "Self"}, own),
        (INNER, {"nextHopMode": "Keep"}, original),
    ):
        place.peer(address, **spec)
        eventually(lambda a=address, e=expected: place.sees(a, LATER, e))  # type: ignore[misc]
        place.peer(address)


def test_ignored_interfaces(place: Place) -> None:
    """Nothing is looked for on them, as they are called now."""
    eventually(lambda: f"via {BEYOND} dev beyond0" in place.node.route_to(ELSEWHERE))
    place.configure(ignoredInterfaces=["beyond*"])
    eventually(lambda: place.node.route_to(ELSEWHERE) == "")
    assert place.node.route_to(LATER) != ""
    place.node.run("ip", "link", "set", "beyond0", "name", "other0")
    eventually(lambda: f"via {BEYOND} dev other0" in place.node.route_to(ELSEWHERE))
    place.node.run("ip", "link", "set", "other0", "name", "beyond0")
    eventually(lambda: place.node.route_to(ELSEWHERE) == "")
    place.configure()
    eventually(lambda: f"via {BEYOND} dev beyond0" in place.node.route_to(ELSEWHERE))


def test_route_priorities(place: Place) -> None:
    """The metric in the kernel, and the local preference that others are told."""
    eventually(lambda: place.sees(INNER, BLOCK, f"BGP.local_pref: {HIGHEST - 1024}"))
    place.configure(ipv4NormalRoutePriority=512)
    eventually(lambda: place.node.route_to(LATER).endswith("metric 512"))
    eventually(lambda: place.sees(INNER, BLOCK, f"BGP.local_pref: {HIGHEST - 512}"))
    place.configure()
    eventually(lambda: place.node.route_to(LATER).endswith("metric 1024"))


def test_program_cluster_routes(place: Place) -> None:
    """Inside of pools; what is outside of them is BGP's in any case."""
    eventually(lambda: place.node.route_to(INSIDE) != "")
    place.configure(programClusterRoutes="Disabled")
    eventually(lambda: place.node.route_to(INSIDE) == "")
    place.configure(programClusterRoutes="Enabled")
    eventually(lambda: place.node.route_to(INSIDE) != "")


def test_max_restart_time(place: Place) -> None:
    router = place.routers[SOURCE]
    shown = ("show", "protocols", "all", "node")
    assert "Restart time: 120" in router.birdc(*shown)
    place.peer(SOURCE, maxRestartTime="33s")
    eventually(lambda: "Restart time: 33" in router.birdc(*shown))
    place.peer(SOURCE)
    eventually(lambda: "Restart time: 120" in router.birdc(*shown))


def test_listen_port_and_bind_mode(place: Place) -> None:
    """Where BGP listens changes with the daemon's restart; routers that only wait don't mind."""
    eventually(lambda: {"0.0.0.0:179"} <= place.listens())
    place.configure(bindMode="NodeIP")
    eventually(lambda: f"{NODE}:179" in place.listens())
    eventually(lambda: "0.0.0.0:179" not in place.listens())
    place.settle()
    place.configure(listenPort=1790)
    eventually(lambda: "0.0.0.0:1790" in place.listens())
    assert not any(shown.endswith(":179") for shown in place.listens())
    place.settle()
    place.configure()
    eventually(lambda: "0.0.0.0:179" in place.listens())


CALL = """
import socket, sys
_, own, other = sys.argv
with socket.socket() as s:
    s.settimeout(2)
    s.bind((own, 0))
    s.connect((other, 179))
"""


def test_node_mesh_password_and_restart_time(place: Place) -> None:
    """Between two nodes; who doesn't know the password isn't even answered."""
    store, node, second = place.world.store, place.node, place.second
    store.node("n1", f"{NODE}/24")  # reflectors are in no mesh
    store.node("n2", f"{SECOND}/24")
    second.start()
    place.configure(nodeToNodeMeshEnabled=True)
    eventually(lambda: node.established(SECOND) and second.established(NODE))
    assert (
        run(second.namespace, sys.executable, "-c", CALL, SECOND, NODE, check=False).returncode == 0
    )
    place.world.secret("bgp", mesh="a mesh's own")
    reference = {"secretKeyRef": {"name": "bgp", "key": "mesh"}}
    place.configure(
        nodeToNodeMeshEnabled=True, nodeMeshPassword=reference, nodeMeshMaxRestartTime="44s"
    )
    call = (sys.executable, "-c", CALL, SECOND, NODE)
    eventually(lambda: run(second.namespace, *call, check=False).returncode != 0)
    eventually(lambda: node.established(SECOND) and second.established(NODE))
    assert node.established(*place.routers)
    files = {"exabgp": ("exabgp.conf", "graceful-restart 44;"), "bird": ("bird.conf", " time 44;")}
    name, words = files[place.engine]
    assert words in (node.run_dir / name).read_text()
    store.delete("Node", "n2")
    store.node("n1", f"{NODE}/24", routeReflectorClusterID="1.0.0.1")
    place.configure()
