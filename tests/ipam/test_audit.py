"""Each disagreement is found, and a cluster in which all agree has none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from api.names import cidr_name, interface_name
from api.net import Net, parse_net
from api.pods import INTERFACE_PREFIX
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator
from ipam.audit import Fault, Finding, audit, leaks, standing
from ipam.audit_kernel import (
    audit_kernel,
    audit_learned,
    disagreements,
    interface_prefixes,
)
from ipam.block import Block
from ipam.reading import read
from ipam.records import CONFIRMED, PENDING, Records
from kernel.links import Links, link_up, veth
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside
from kernel.routes import PROTO_BGP, PROTO_BIRD, Hop, Route, route_add, route_delete
from tests.controllers.world import (
    add_nodes,
    assign,
    attachment,
    forget,
    plug,
    put,
    record,
    release,
    remove,
)
from tests.ipam.world import add_pool, blocks

Break = Callable[[SqliteDatastore], None]


@pytest.fixture
def cluster(store: SqliteDatastore) -> SqliteDatastore:
    """Two nodes with pods and tunnels, and everything agrees."""
    add_pool(store, "four", "10.0.0.0/24", 28)
    add_pool(store, "six", "fd00::/120", 124)
    add_nodes(store, "n1", "n2")
    for node in ("n1", "n2"):
        plug(store, node, f"web-{node}", f"c-{node}", (4, 6))
        tunnel = Allocator(store, node).assign(f"vxlan-tunnel-addr-{node}", {"node": node})
        change(store, "Node", node, ipv4VXLANTunnelAddr=str(tunnel.address).partition("/")[0])
    return store


def change(store: SqliteDatastore, kind: str, name: str, namespace: str = "", **spec: Any) -> None:
    entry = store.get(Key(kind, name, namespace))
    store.update(entry.key, entry.value | {"spec": entry.value["spec"] | spec})


def found(store: SqliteDatastore) -> list[Finding]:
    return standing(store)[1]


def test_all_is_well(cluster: SqliteDatastore) -> None:
    assert found(cluster) == []


def addresses(store: SqliteDatastore, node: str = "n1") -> list[Net]:
    return Allocator(store, node).addresses(attachment(f"web-{node}", f"c-{node}").handle)


def four(store: SqliteDatastore) -> Net:
    return addresses(store)[0]


def new_block(store: SqliteDatastore, net: Net, affinity: str | None) -> None:
    put(store, "IPAMBlock", cidr_name(net), Block.new(net, affinity, 1, None).to_spec())


def stolen(store: SqliteDatastore) -> None:
    record(store, "n2", "x", "cx", [four(store)])
    forget(store, "n1", "web-n1", "c-n1")


BREAKS: list[tuple[Fault, str, Break]] = [
    (
        Fault.UNREADABLE,
        "IPAMBlock(10-9-9-0-28)",
        lambda s: put(s, "IPAMBlock", "10-9-9-0-28", {"cidr": "10.9.9.0/28"}),
    ),
    (
        Fault.UNREADABLE,
        "no address is collected",
        lambda s: put(s, "WorkloadEndpoint", "w", {"ipNetworks": ["x"]}, namespace="shop"),
    ),
    (
        Fault.HALF_DELETED,
        "IPAMHandle(h)",
        lambda s: put(s, "IPAMHandle", "h", {"handleID": "h", "block": {}, "deleted": True}),
    ),
    (Fault.UNUSED, "(pod shop/web-n1) on n1", lambda s: forget(s, "n1", "web-n1", "c-n1")),
    (
        Fault.UNKNOWN_HOLDER,
        "stranger",
        lambda s: void(Allocator(s, "n1").assign("stranger", {})),
    ),
    (
        Fault.NOT_ALLOCATED,
        "free in pool four (10.0.0.0/24)",
        lambda s: record(s, "n2", "x", "cx", [parse_net("10.0.0.255")]),
    ),
    (
        Fault.OUTSIDE,
        "in no pool",
        lambda s: record(s, "n2", "x", "cx", [parse_net("192.0.2.1")]),
    ),
    (
        Fault.OTHERS,
        "but is used by WorkloadEndpoint(shop/n2-k8s-x-eth0)",
        stolen,
    ),
    (
        Fault.DOUBLED,
        "WorkloadEndpoint(shop/n1-k8s-web--n1-eth0) and WorkloadEndpoint(shop/n2-k8s-x-eth0)",
        lambda s: record(s, "n2", "x", "cx", [four(s)]),
    ),
    (
        Fault.RESERVED,
        "on n1 before",
        lambda s: put(s, "IPReservation", "r", {"reservedCIDRs": [str(four(s))]}),
    ),
    (
        Fault.NO_HANDLE,
        "a release by handle will not find it",
        lambda s: remove(s, "IPAMHandle", "k8s-pod-network.c-n1"),
    ),
    (
        Fault.EMPTY_HANDLE,
        "IPAMHandle(h)",
        lambda s: put(s, "IPAMHandle", "h", {"handleID": "h", "block": {"10.0.0.0/28": 1}}),
    ),
    (
        Fault.MISCOUNTED,
        "counts 3 addresses",
        lambda s: change(
            s,
            "IPAMHandle",
            "k8s-pod-network.c-n1",
            block={str(net): 3 for net in Records(s).handle("k8s-pod-network.c-n1").thing.counts},  # type: ignore[union-attr]
        ),
    ),
    (
        Fault.CLAIM,
        "(pending), and there is no block",
        lambda s: void(Records(s).create_affinity("n1", parse_net("10.0.0.240/28"), PENDING)),
    ),
    (
        Fault.CLAIM,
        "and there is a block of host:n1",
        lambda s: void(Records(s).create_affinity("n2", block_of(s), CONFIRMED)),
    ),
    (
        Fault.UNCLAIMED,
        "is n1's, which has no BlockAffinity",
        lambda s: remove(s, "BlockAffinity", f"n1-{cidr_name(block_of(s))}"),
    ),
    (
        Fault.UNOWNED,
        "is empty and nobody's",
        lambda s: new_block(s, parse_net("10.0.0.240/28"), None),
    ),
    (
        Fault.OVERLAP,
        "shares addresses with block",
        lambda s: new_block(s, half_of(block_of(s)), "host:n1"),
    ),
    (Fault.NO_POOL, "lies in no IPPool", lambda s: remove(s, "IPPool", "six")),
    (Fault.GONE_NODE, "2 blocks and 1 endpoints", lambda s: remove(s, "Node", "n1")),
    (
        Fault.POOL_OVERLAP,
        "IPPool(four): 10.0.0.0/24 shares addresses with 10.0.0.0/16 of IPPool wide",
        lambda s: add_pool(s, "wide", "10.0.0.0/16", 28),
    ),
    (
        Fault.NODE_RANGE,
        "IPPool(four): 10.0.0.0/24 shares addresses with 10.0.0.0/22, the network of node n3",
        lambda s: put(s, "Node", "n3", {"bgp": {"ipv4Address": "10.0.3.7/22"}}),
    ),
    (
        Fault.NODE_RANGE,
        "IPPool(six): fd00::/120 shares addresses with fd00::7/128, the address of node n3",
        lambda s: put(s, "Node", "n3", {"addresses": [{"address": "fd00::7"}]}),
    ),
    (
        Fault.SERVICE_RANGE,
        "shares addresses with 10.0.0.0/12, serviceClusterIPs of BGPConfiguration default",
        lambda s: put(
            s, "BGPConfiguration", "default", {"serviceClusterIPs": [{"cidr": "10.0.0.0/12"}]}
        ),
    ),
    (
        Fault.SERVICE_RANGE,
        "shares addresses with 10.0.0.9/32, the address of Service shop/web",
        lambda s: put(s, "Service", "web", {"clusterIP": "10.0.0.9"}, namespace="shop"),
    ),
    (
        Fault.SERVICE_RANGE,
        "shares addresses with 10.0.0.0/20, ServiceCIDR kubernetes",
        lambda s: put(s, "ServiceCIDR", "kubernetes", {"cidrs": ["bad", "10.0.0.0/20"]}),
    ),
    (
        Fault.SHARED,
        "IPPool(four): 172.31.1.1, a peer of node n1, announces 10.0.0.240/28, which no node",
        lambda s: announced(s, "10.0.0.240/28"),
    ),
]


def announced(store: SqliteDatastore, cidr: str) -> None:
    """A node has been told of this by a peer, as bird_glue writes it."""
    source = {"sourceType": "BGPPeer", "peerIP": "172.31.1.1"}
    route = {"type": "FIB", "destination": cidr, "learnedFrom": source}
    own = {"type": "FIB", "destination": "10.0.0.224/28", "learnedFrom": {"sourceType": "Static"}}
    spec = {"node": "n1", "classes": ["Routes"], "updatePeriodSeconds": 60}
    put(store, "CalicoNodeStatus", "n1", spec)
    entry = store.get(Key("CalicoNodeStatus", "n1"))
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    status = {"lastUpdated": now, "routes": {"routesV4": [own, route], "routesV6": []}}
    store.update(entry.key, entry.value | {"status": status})


def void(_: object) -> None:
    """For lambdas."""


def block_of(store: SqliteDatastore) -> Net:
    return next(net for net in blocks(store) if net.contains(four(store)))


def half_of(net: Net) -> Net:
    return Net(net.version, net.address, net.length + 1)


@pytest.mark.parametrize(("fault", "text", "break_it"), BREAKS)
def test_what_is_wrong_is_found(
    cluster: SqliteDatastore, fault: Fault, text: str, break_it: Break
) -> None:
    break_it(cluster)
    findings = [finding for finding in found(cluster) if finding.fault is fault]
    assert findings, found(cluster)
    assert any(text in str(finding) for finding in findings), findings


def test_every_fault_of_the_datastore_is_tried() -> None:
    assert {fault for fault, _, _ in BREAKS} == set(Fault) - {
        Fault.ROUTE,
        Fault.INTERFACE,
        Fault.GONE_POD,  # in tests/controllers/test_nodes.py
    }


def test_what_is_under_way_is_no_finding(cluster: SqliteDatastore) -> None:
    """A pod whose ADD ends between the two readings."""
    given = assign(cluster, "n1", "new", "c9")

    class Later:
        lists = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(cluster, name)

        def list(self, kind: str, *rest: Any, **more: Any) -> Any:
            listing = cluster.list(kind, *rest, **more)
            if kind == "WorkloadEndpoint":
                self.lists += 1
                if self.lists == 1:
                    record(cluster, "n1", "new", "c9", given)
            return listing

    assert len(audit(read(cluster))) == 1
    assert standing(Later())[1] == []


def test_leaks_are_whole_handles(cluster: SqliteDatastore) -> None:
    forget(cluster, "n1", "web-n1", "c-n1")
    record(cluster, "n2", "thief", "c7", addresses(cluster)[1:])
    inventory, findings = standing(cluster)
    assert leaks(inventory, findings) == []
    forget(cluster, "n2", "thief", "c7")
    inventory, findings = standing(cluster)
    assert [[each.address for each in leak] for leak in leaks(inventory, findings)] == [
        sorted(addresses(cluster))
    ]


def test_a_finished_pod_does_not_use_its_address(cluster: SqliteDatastore) -> None:
    text = str(four(cluster)).partition("/")[0]
    put(cluster, "Pod", "done", {"nodeName": "n2"}, namespace="shop")
    entry = cluster.get(Key("Pod", "done", "shop"))
    status = {"phase": "Running", "podIP": text}
    cluster.update(entry.key, entry.value | {"status": status})
    assert Fault.DOUBLED in {finding.fault for finding in found(cluster)}
    cluster.update(entry.key, entry.value | {"status": status | {"phase": "Failed"}})
    assert found(cluster) == []


def test_the_kernel_of_a_node(cluster: SqliteDatastore) -> None:
    inventory = read(cluster)
    nets = addresses(cluster)
    name = "cali0123456789a"
    good = dict.fromkeys(nets, name)

    def faults(links: list[str], routes: dict[Net, str]) -> list[tuple[Fault, str]]:
        users = [user for user in inventory.users if user.node == "n1"]
        result = sorted(disagreements(users, ["cali"], links, routes))
        return [(finding.fault, finding.message) for finding in result]

    assert faults(["eth0", name], good) == []
    assert faults(["eth0"], {}) == [(Fault.INTERFACE, f"has no interface {name}")]
    ((fault, message),) = faults([name], {nets[0]: name})
    assert (fault, "has no route to" in message) == (Fault.ROUTE, True)
    ((_, message),) = faults([name], good | {nets[0]: "eth0"})
    assert "but one by eth0" in message
    stray = parse_net("10.0.0.99")
    assert faults([name, "cali9"], good | {stray: "cali9"}) == [
        (Fault.INTERFACE, "is of no endpoint of this node"),
        (Fault.ROUTE, "is routed to cali9, and of no endpoint there"),
    ]


def test_a_real_kernel(cluster: SqliteDatastore, namespace: Namespace) -> None:
    release(cluster, "n2", "web-n2", "c-n2")
    with inside(namespace.fd):
        (missing,) = kernel_faults(cluster)
        assert missing.fault is Fault.INTERFACE
        with NetlinkSocket() as socket:
            assert socket.batch([veth("cali0123456789a", "peer0")]) == []
        kinds = [finding.fault for finding in kernel_faults(cluster)]
    assert kinds == [Fault.ROUTE, Fault.ROUTE]


def test_what_bgp_told_this_node(cluster: SqliteDatastore, namespace: Namespace) -> None:
    """A route into a pool that leads to no block of ours, borrowed addresses among them."""
    nobodys = parse_net("10.0.0.224/28")
    new_block(cluster, nobodys, None)
    ours = [*blocks(cluster), parse_net("10.0.0.225"), parse_net("192.0.2.0/26")]
    theirs = parse_net("10.0.0.240/28")
    gateways = {4: parse_net("172.31.1.1"), 6: parse_net("fd99::1")}
    allocator = Allocator(cluster, "n1")
    with inside(namespace.fd), NetlinkSocket() as socket:
        assert socket.batch([veth("up0", "up1")]) == []
        index = Links(socket).get("up0").index

        def learned(net: Net, protocol: int) -> Route:
            hop = Hop(index, gateways[net.version].address, onlink=True)
            return Route(net, (hop,), protocol=protocol)

        routes = [learned(net, PROTO_BGP) for net in ours]
        assert socket.batch([*map(route_add, routes), link_up(index)]) == []
        assert audit_learned(cluster, allocator.claimed) == []
        for protocol in (PROTO_BGP, PROTO_BIRD):
            route = learned(theirs, protocol)
            assert socket.batch([route_add(route)]) == []
            (finding,) = audit_learned(cluster, allocator.claimed)
            assert socket.batch([route_delete(route)]) == []
    assert (finding.fault, finding.subject) == (Fault.SHARED, "IPPool(four)")
    assert finding.message.startswith("the next hop 172.31.1.1 announces 10.0.0.240/28, which no")


def kernel_faults(store: SqliteDatastore) -> list[Finding]:
    return audit_kernel(read(store).users, "n1", interface_prefixes(store, "n1"))


def test_other_prefixes_of_interfaces(cluster: SqliteDatastore, namespace: Namespace) -> None:
    """The FelixConfiguration says how interfaces are called; that of the node counts more."""
    release(cluster, "n2", "web-n2", "c-n2")
    put(cluster, "FelixConfiguration", "default", {"interfacePrefix": "wl"})
    with inside(namespace.fd):
        with NetlinkSocket() as socket:
            assert socket.batch([veth("wl-1", "peer1"), veth("tap2", "peer2")]) == []
        strays = {finding.subject for finding in kernel_faults(cluster)}
        assert "wl-1" in strays
        assert "tap2" not in strays
        put(cluster, "FelixConfiguration", "node.n1", {"interfacePrefix": "cali, tap"})
        strays = {finding.subject for finding in kernel_faults(cluster)}
        assert "wl-1" not in strays
        assert "tap2" in strays


def test_a_pod_of_kubernetes_says_how_its_interface_begins(
    cluster: SqliteDatastore, namespace: Namespace
) -> None:
    """Where there is no other endpoint. Before its ADD it need have no interface, and may."""
    for node in ("n1", "n2"):
        release(cluster, node, f"web-{node}", f"c-{node}")
        forget(cluster, node, f"web-{node}", f"c-{node}")
    put(cluster, "FelixConfiguration", "default", {"interfacePrefix": "tap"})
    put(cluster, "Pod", "web", {"nodeName": "n1"}, namespace="shop")
    name = interface_name("tap", "shop", "web")
    entry = cluster.get(Key("Pod", "web", "shop"))
    with inside(namespace.fd):
        assert kernel_faults(cluster) == []
        annotations = {"cni.projectcalico.org/podIP": "10.0.0.1/32", INTERFACE_PREFIX: "tap"}
        entry.value["metadata"]["annotations"] = annotations
        cluster.update(entry.key, entry.value)
        (finding,) = kernel_faults(cluster)
        assert finding.message == f"has no interface {name}"
        with NetlinkSocket() as socket:
            assert socket.batch([veth(name, "peer1")]) == []
        (finding,) = kernel_faults(cluster)
        assert finding.message == f"has no route to 10.0.0.1 by {name}"
