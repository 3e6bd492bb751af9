"""Two nodes in a mesh and a top-of-rack router: filters, services, borrowed addresses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.bird_glue.world import BIRD_COMMON, BIRD_SESSION, Bird, Node, Station, World, world
from tests.support.netns import eventually

TOR, N1, N2 = "172.31.1.1", "172.31.1.11", "172.31.1.12"
BLOCK1, BLOCK2 = "10.1.1.0/26", "10.1.2.0/26"
POD, BORROWED = "10.1.2.5", "10.1.2.9"  # the second lives on n1
STATICS = """
protocol static { ipv4;
  route 10.60.0.0/16 blackhole { bgp_community.add((65001,60)); };
  route 10.61.0.0/16 blackhole { bgp_path.prepend(65099); };
  route 10.62.0.0/16 blackhole;
}
"""


def bird_configuration() -> str:
    sessions = (
        BIRD_SESSION.format(
            name=name, local=TOR, asn=65001, peer=peer, peer_asn=64512, export="all"
        )
        for name, peer in (("n1", N1), ("n2", N2))
    )
    return BIRD_COMMON.format(router_id=TOR) + STATICS + "".join(sessions)


@dataclass
class Rack:
    n1: Node
    n2: Node
    tor: Bird
    pod: Station
    borrowed: Station
    world: World

    def told_by(self, name: str) -> set[str]:
        """What the router has of a node."""
        output = self.tor.birdc("show", "route", "protocol", name)
        return {line.split()[0] for line in output.splitlines() if "/" in line.split(" ")[0]}

    def learned(self, node: Node) -> set[str]:
        """Which of the router's prefixes a node uses."""
        return {net for net in ("10.60.0.0/16", "10.61.0.0/16", "10.62.0.0/16")
                if node.route_to(net)}  # fmt: skip

    def peer(self, **spec: Any) -> None:
        self.world.store.put("BGPPeer", "tor", peerIP=TOR, asNumber=65001, **spec)

    def shows(self, *texts: str) -> None:
        """What the router has of the first node's block, sooner or later."""

        def shown() -> bool:
            output = self.tor.shown(BLOCK1)
            return all(text in output for text in texts)

        eventually(shown)

    def settle(self) -> None:
        eventually(lambda: self.n1.established(TOR, N2) and self.n2.established(TOR, N1))
        eventually(lambda: self.told_by("n1") == {BLOCK1, f"{BORROWED}/32"})
        eventually(lambda: self.told_by("n2") == {BLOCK2})
        eventually(lambda: len(self.learned(self.n1)) == 3)


@pytest.fixture(scope="module", params=["exabgp", "bird"])
def rack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rack]:
    with world(tmp_path_factory.mktemp("announced")) as made:
        n1, n2, tor = made.node("n1"), made.node("n2"), made.bird("tor")
        made.switch("switch", (n1, f"{N1}/24"), (n2, f"{N2}/24"), (tor, f"{TOR}/24"))
        store = made.store
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        store.put("BGPPeer", "tor", peerIP=TOR, asNumber=65001)
        for name, address, block in (("n1", N1, BLOCK1), ("n2", N2, BLOCK2)):
            store.node(name, f"{address}/24")
            store.block(name, block)
        pod, borrowed = made.pod(n2, "pod", POD), made.pod(n1, "borrowed", BORROWED)
        tor.start(bird_configuration())
        n1.engine = n2.engine = request.param
        n1.start()
        n2.start()
        yield Rack(n1, n2, tor, pod, borrowed, made)


@pytest.fixture(autouse=True)
def settled(rack: Rack) -> None:
    rack.settle()


def test_an_address_borrowed_from_another_nodes_block_is_reached(rack: Rack) -> None:
    eventually(lambda: rack.n2.route_to(f"{BORROWED}/32") != "")
    eventually(lambda: rack.pod.reaches(BORROWED))
    eventually(lambda: rack.borrowed.reaches(POD))
    rack.n1.run("ip", "route", "del", f"{BORROWED}/32", "dev", "caliborrowed")
    eventually(lambda: rack.n2.route_to(f"{BORROWED}/32") == "")
    eventually(lambda: rack.told_by("n1") == {BLOCK1})
    # what is inside of the node's own block is told with the block
    rack.n1.run("ip", "route", "add", "10.1.1.7/32", "dev", "caliborrowed", "proto", "80")
    rack.n1.run("ip", "route", "add", f"{BORROWED}/32", "dev", "caliborrowed", "proto", "80")
    eventually(lambda: rack.told_by("n1") == {BLOCK1, f"{BORROWED}/32"})


def test_filters_decide_and_touch_no_session(rack: Rack) -> None:
    """The peer's settings change to name a filter; the rest follows without a reset."""
    store, session = rack.world.store, rack.tor.session("n1")
    rules = [
        {"action": "Reject", "communities": {"values": ["65001:60"]}},
        {"action": "Reject", "asPathPrefix": [65001, 65099]},
    ]
    export = [{"action": "Reject", "cidr": f"{BORROWED}/32", "matchOperator": "Equal"}]
    store.put("BGPFilter", "f", importV4=rules, exportV4=export)
    rack.peer(filters=["f"])
    eventually(lambda: rack.learned(rack.n1) == {"10.62.0.0/16"})
    eventually(lambda: rack.told_by("n1") == {BLOCK1})
    assert rack.n2.route_to(f"{BORROWED}/32") != ""  # the mesh has no filters
    why = {f"rejected by BGPFilter f: importV4[{n}]": 1 for n in (0, 1)}
    eventually(lambda: bool((p := rack.n1.peer(TOR)) and p.refused.items() >= why.items()))

    changes = [
        {"addCommunity": {"value": "64512:7"}},
        {"addCommunity": {"value": "64512:7:8"}},
        {"prependASPath": {"prefix": [64512, 64512]}},
    ]
    by_prefix: dict[str, Any] = {"cidr": BLOCK1, "matchOperator": "In", "prefixLength": {"max": 26}}
    accepted = [
        {"action": "Accept", **by_prefix, "operations": changes},
        {"action": "Accept", "source": "RemotePeers", "cidr": BLOCK2, "matchOperator": "Equal"},
    ]
    store.put("BGPFilter", "f", exportV4=accepted)
    eventually(lambda: rack.learned(rack.n1) == {"10.60.0.0/16", "10.61.0.0/16", "10.62.0.0/16"})
    # what was learned from the mesh is told to the router, because the filter says so
    eventually(lambda: rack.told_by("n1") == {BLOCK1, BLOCK2, f"{BORROWED}/32"})
    rack.shows(
        "BGP.as_path: 64512 64512 64512",
        "BGP.community: (64512,7)",
        "BGP.large_community: (64512, 7, 8)",
    )

    store.delete("BGPFilter", "f")  # what it should let pass is not known any more
    eventually(lambda: rack.told_by("n1") == set() and not rack.learned(rack.n1))
    eventually(lambda: "BGPPeer tor: spec.filters: 'f'" in problems(rack.n1))
    rack.peer()
    rack.settle()
    assert rack.tor.session("n1") == session


def problems(node: Node) -> str:
    status = node.status()
    return "\n".join(status.problems) if status else ""


def test_communities_of_prefix_advertisements(rack: Rack) -> None:
    store = rack.world.store
    store.put(
        "BGPConfiguration",
        "default",
        communities=[{"name": "pods", "value": "64512:100"}],
        prefixAdvertisements=[{"cidr": "10.1.0.0/16", "communities": ["pods", "1:2:3"]}],
    )
    rack.shows("BGP.community: (64512,100)", "BGP.large_community: (1, 2, 3)")
    store.delete("BGPConfiguration", "default")
    eventually(
        lambda: rack.tor.knows(BLOCK1) and "community" not in rack.tor.shown(BLOCK1),
    )


def test_communities_that_say_what_the_router_is_not_to_do(rack: Rack) -> None:
    """RFC 1997's are for those who are told: "not beyond your AS" is no reason not to tell."""
    store = rack.world.store
    for value in ("65535:65281", "65535:65282", "65535:65283"):
        advertised = [{"cidr": "10.1.0.0/16", "communities": [value]}]
        store.put("BGPConfiguration", "default", prefixAdvertisements=advertised)
        rack.shows(f"BGP.community: ({value.replace(':', ',')})")
    store.delete("BGPConfiguration", "default")
    eventually(
        lambda: rack.tor.knows(BLOCK1) and "community" not in rack.tor.shown(BLOCK1),
    )


def service(store: Any, policy: str) -> None:
    spec = {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.5",
        "externalTrafficPolicy": policy,
        "externalIPs": ["203.0.113.9"],
    }
    status = {"loadBalancer": {"ingress": [{"ip": "198.51.100.9"}]}}
    metadata = {"name": "web", "namespace": "default"}
    value = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}
    store.put_raw("Service", "web", value | {"status": status}, namespace="default")


def endpoints(store: Any, *nodes: str, ready: bool = True) -> None:
    value = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "web-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": ["10.1.1.7"], "nodeName": name, "conditions": {"ready": ready}}
            for name in nodes
        ],
    }
    store.put_raw("EndpointSlice", "web-1", value, namespace="default")


def test_service_addresses_come_and_go_with_their_endpoints(rack: Rack) -> None:
    store = rack.world.store
    ranges = {
        "serviceClusterIPs": [{"cidr": "10.96.0.0/16"}],
        "serviceExternalIPs": [{"cidr": "203.0.113.0/24"}],
        "serviceLoadBalancerIPs": [{"cidr": "198.51.100.0/24"}],
    }
    whole = {"10.96.0.0/16", "203.0.113.0/24", "198.51.100.0/24"}
    singles = {"10.96.0.5/32", "203.0.113.9/32", "198.51.100.9/32"}
    service(store, "Local")
    endpoints(store, "n1")
    store.put("BGPConfiguration", "default", **ranges)
    own1, own2 = {BLOCK1, f"{BORROWED}/32"}, {BLOCK2}
    eventually(lambda: rack.told_by("n1") == own1 | whole | singles)
    eventually(lambda: rack.told_by("n2") == own2 | whole)
    # traffic for services is not sent from node to node
    assert rack.n2.route_to("198.51.100.9/32") == ""
    endpoints(store, "n1", ready=False)
    eventually(lambda: rack.told_by("n1") == own1 | whole)
    endpoints(store, "n2")
    eventually(lambda: rack.told_by("n2") == own2 | whole | singles)
    service(store, "Cluster")
    eventually(lambda: rack.told_by("n2") == own2 | whole)
    ranges["serviceLoadBalancerAggregation"] = "Disabled"  # type: ignore[assignment]
    store.put("BGPConfiguration", "default", **ranges)
    whole -= {"198.51.100.0/24"}
    eventually(lambda: rack.told_by("n1") == own1 | whole | singles)
    labels = {"node.kubernetes.io/exclude-from-external-load-balancers": "true"}
    store.node("n1", f"{N1}/24", labels=labels)
    eventually(lambda: rack.told_by("n1") == own1)
    store.node("n1", f"{N1}/24")
    store.delete("BGPConfiguration", "default")
    rack.settle()


def test_services_of_an_earlier_run_are_not_withdrawn(rack: Rack) -> None:
    """The agent knows nothing at its start; the router never sees that."""
    store = rack.world.store
    service(store, "Local")
    endpoints(store, "n1")
    store.put("BGPConfiguration", "default", serviceClusterIPs=[{"cidr": "10.96.0.0/16"}])
    eventually(lambda: "10.96.0.5/32" in rack.told_by("n1"))

    def imported() -> str:
        output = rack.tor.birdc("show", "protocols", "all", "n1")
        return next(line for line in output.splitlines() if "Import withdraws:" in line)

    before = imported()
    rack.n1.agent.end()
    rack.n1.start()
    eventually(lambda: rack.n1.established(TOR))
    eventually(lambda: bool((peer := rack.n1.peer(TOR)) and peer.announced == 4))
    assert imported() == before
    store.delete("BGPConfiguration", "default")
    rack.settle()
