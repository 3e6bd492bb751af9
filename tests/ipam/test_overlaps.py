"""Which ranges of others a pool lies over."""

from __future__ import annotations

from typing import Any

import pytest

from api.net import parse_net
from ipam.overlaps import Range, node_ranges, of_other_clusters, service_ranges, shared


def node(name: str, **bgp: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"bgp": bgp}}


def test_networks_of_nodes_each_once() -> None:
    nodes = [
        node("n1", ipv4Address="172.31.1.11/24", ipv6Address="fd00:1::11/64"),
        node("n2", ipv4Address="172.31.1.12/24"),
        node("n3", ipv4Address="nonsense"),
        {"metadata": {"name": "n4"}, "spec": None},
        {"metadata": {"name": "n5"}, "spec": ["x"]},
    ]
    assert list(node_ranges(nodes)) == [
        Range(parse_net("172.31.1.0/24"), "the network of node n1"),
        Range(parse_net("fd00:1::/64"), "the network of node n1"),
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


@pytest.mark.parametrize(
    ("pool", "load_balancers", "expected"),
    [
        ("10.0.0.0/16", False, []),
        ("10.0.0.0/8", False, ["cluster"]),
        ("10.96.4.0/24", True, ["cluster"]),
        ("192.0.2.0/25", False, ["lb"]),
        ("192.0.2.0/25", True, []),
    ],
)
def test_what_a_pool_shares(pool: str, load_balancers: bool, expected: list[str]) -> None:
    ranges = [
        Range(parse_net("10.96.0.0/12"), "cluster"),
        Range(parse_net("192.0.2.0/24"), "lb", for_load_balancers=True),
    ]
    found = shared(parse_net(pool), ranges, load_balancers=load_balancers)
    assert [range_.use for range_ in found] == expected


def test_routes_of_another_cluster_into_our_pool() -> None:
    pools = {"pods": parse_net("10.0.0.0/16"), "six": parse_net("fd00::/64")}
    blocks = {parse_net("10.0.1.0/26")}
    announced = [
        ("peer 172.31.1.1", parse_net(text))
        for text in ("10.0.1.0/26", "10.0.1.5/32", "10.0.2.0/26", "10.9.0.0/16", "0.0.0.0/0")
    ]
    [warning] = of_other_clusters(pools, blocks, announced)
    assert "IPPool pods (10.0.0.0/16): peer 172.31.1.1 announces 10.0.2.0/26" in warning
