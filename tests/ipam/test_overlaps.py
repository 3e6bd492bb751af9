"""Which ranges of others a pool lies over."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.net import Net, parse_net
from ipam.overlaps import (
    Range,
    learned_routes,
    node_ranges,
    of_other_clusters,
    overlapping,
    service_addresses,
    service_ranges,
    shared,
)
from ipam.pools import Pool


def node(name: str, *addresses: str, **bgp: str) -> dict[str, Any]:
    found = [{"address": address, "type": "InternalIP"} for address in addresses]
    return {"metadata": {"name": name}, "spec": {"bgp": bgp, "addresses": found}}


def test_networks_of_nodes_each_once() -> None:
    nodes = [
        node("n1", ipv4Address="172.31.1.11/24", ipv6Address="fd00:1::11/64"),
        node("n2", ipv4Address="172.31.1.12/24"),
        node("n3", ipv4Address="nonsense"),
        {"metadata": {"name": "n4"}, "spec": None},
        {"metadata": {"name": "n5"}, "spec": ["x"]},
        {"metadata": {"name": "n6"}, "spec": {"addresses": [5, {"address": None}]}},
        node("n7", "172.31.1.13", "192.0.2.7", "192.0.2.8/24"),
        node("n8", "192.0.2.7"),
    ]
    assert list(node_ranges(nodes)) == [
        Range(parse_net("172.31.1.0/24"), "the network of node n1"),
        Range(parse_net("fd00:1::/64"), "the network of node n1"),
        Range(parse_net("192.0.2.7"), "the address of node n7"),
        Range(parse_net("192.0.2.8"), "the address of node n7"),
    ]


def test_addresses_of_services() -> None:
    spec = {
        "serviceClusterIPs": [{"cidr": "10.96.0.0/12"}, {"cidr": None}],
        "serviceLoadBalancerIPs": [{"cidr": "192.0.2.0/24"}],
    }
    configurations: list[dict[str, Any]] = [
        {"metadata": {"name": "default"}, "spec": spec},
        {"metadata": {}},
    ]
    assert [(str(r.net), r.use, r.for_load_balancers) for r in service_ranges(configurations)] == [
        ("10.96.0.0/12", "serviceClusterIPs of BGPConfiguration default", False),
        ("192.0.2.0/24", "serviceLoadBalancerIPs of BGPConfiguration default", True),
    ]


def test_services_by_their_addresses() -> None:
    def service(name: str, **spec: object) -> dict[str, Any]:
        return {"metadata": {"namespace": "shop", "name": name}, "spec": spec}

    services = [
        service("web", clusterIP="10.96.0.9", clusterIPs=["10.96.0.9", "fd00::9"]),
        service("headless", clusterIP="None", clusterIPs=["None"]),
        service("outside"),
        service("db", clusterIP="10.96.0.2"),
        {},
    ]
    ranges = list(service_addresses(services))
    assert [(str(each.net), each.use) for each in ranges] == [
        ("10.96.0.9/32", "the address of Service shop/web"),
        ("fd00::9/128", "the address of Service shop/web"),
        ("10.96.0.2/32", "the address of Service shop/db"),
    ]
    # one is enough to say so, and always the same
    assert [each.use for each in shared(parse_net("10.0.0.0/8"), ranges)] == [
        "the address of Service shop/db"
    ]


def test_pools_that_overlap() -> None:
    pools = [pool("a", "10.0.0.0/16"), pool("b", "10.0.4.0/24"), pool("c", "10.0.5.0/24")]
    assert [(one.name, other.name) for one, other in overlapping(pools)] == [("a", "b"), ("a", "c")]


@pytest.mark.parametrize(
    ("cidr", "load_balancers", "expected"),
    [
        ("10.0.0.0/16", False, []),
        ("10.0.0.0/8", False, ["cluster"]),
        ("10.96.4.0/24", True, ["cluster"]),
        ("192.0.2.0/25", False, ["lb"]),
        ("192.0.2.0/25", True, []),
    ],
)
def test_what_a_pool_shares(cidr: str, load_balancers: bool, expected: list[str]) -> None:
    ranges = [
        Range(parse_net("10.96.0.0/12"), "cluster"),
        Range(parse_net("192.0.2.0/24"), "lb", for_load_balancers=True),
    ]
    found = shared(parse_net(cidr), ranges, load_balancers=load_balancers)
    assert [range_.use for range_ in found] == expected


def pool(name: str, cidr: str) -> Pool:
    return Pool(name, parse_net(cidr), 32, ("Workload",), False, True, None, None)


def test_routes_of_another_cluster_into_our_pool() -> None:
    pools = [pool("pods", "10.0.0.0/16"), pool("six", "fd00::/64")]
    blocks = {parse_net("10.0.1.0/26"), parse_net("10.0.4.0/30"), parse_net("fd00::40/122")}
    ours = (
        "10.0.1.0/26",
        "10.0.1.5/32",
        "10.0.4.0/30",
        "10.0.4.0/24",
        "fd00::40/128",
        "fd00::/120",
    )
    elsewhere = ("10.9.0.0/16", "0.0.0.0/0", "::/0", "fd01::/122")
    theirs = ("10.0.2.0/26", "10.0.1.64/26", "10.0.3.255/32", "fd00::/122", "fd00::80/122")
    announced = [("10.1.1.1", parse_net(text)) for text in (*ours, *theirs, *elsewhere)]
    found = list(of_other_clusters(pools, blocks, announced))
    assert [message.split(",")[0].split()[-1] for _, message in found] == list(theirs)
    assert [of.name for of, _ in found] == ["pods", "pods", "pods", "six", "six"]
    assert found[0][1].startswith("10.1.1.1 announces 10.0.2.0/26, which no node of this cluster")


NETS = st.builds(
    lambda address, length: parse_net(
        f"10.0.0.{address >> (32 - length) << (32 - length)}/{length}"
    ),
    st.integers(0, 255),
    st.integers(24, 32),
)


@given(st.sets(NETS, max_size=6), NETS)
def test_a_route_is_of_another_cluster_when_it_shares_no_address_with_a_block(
    blocks: set[Net], net: Net
) -> None:
    pools = [pool("pods", "10.0.0.0/24")]
    found = list(of_other_clusters(pools, blocks, [("x", net)]))
    assert bool(found) != any(block.overlaps(net) for block in blocks)


def test_what_a_node_status_tells() -> None:
    def status(updated: str, period: object = 60, **more: Any) -> dict[str, Any]:
        routes = [
            {"destination": "10.0.2.0/26", "learnedFrom": {"sourceType": "BGPPeer", "peerIP": "p"}},
            {
                "destination": "10.0.3.0/26",
                "learnedFrom": {"sourceType": "NodeMesh", "peerIP": "q"},
            },
            {"destination": "10.0.4.0/26", "learnedFrom": {"sourceType": "Static"}},
            {"destination": "x", "learnedFrom": {"sourceType": "BGPPeer"}},
            "nonsense",
        ]
        spec = {"node": "n1", "updatePeriodSeconds": period}
        return {
            "spec": spec,
            "status": {"lastUpdated": updated, "routes": {"routesV4": routes}} | more,
        }

    now = datetime(2030, 1, 31, 12, tzinfo=UTC)
    fresh = list(learned_routes([status("2030-01-31T11:59:00Z")], now))
    assert fresh == [
        ("p, a peer of node n1,", parse_net("10.0.2.0/26")),
        ("q, a peer of node n1,", parse_net("10.0.3.0/26")),
    ]
    # kept up to date no more, and whatever else there may be
    useless = [
        status("2030-01-31T11:40:00Z"),
        status("2030-01-31T11:59:00Z", 0),
        status("2030-01-31T11:59:00Z", "x"),
        status("2030-01-31T11:59:00"),
        status("yesterday"),
        status("2030-01-31T11:59:00Z", routes={"routesV4": 5}),
        {"spec": []},
        {},
    ]
    assert list(learned_routes(useless, now)) == []
