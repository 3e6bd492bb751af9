"""Policies of cluster administrators: their place among the tiers, and what can't be converted."""

from __future__ import annotations

from typing import Any

import pytest

from api.adminnetworkpolicy import AdminNetworkPolicy, BaselineAdminNetworkPolicy
from api.clusternetworkpolicy import ClusterNetworkPolicy
from api.registry import parse_as
from policy import cluster
from policy.model import Action, NamedPort, PolicyId
from tests.policy.world import World, endpoint, endpoint_id, network_set, policy

C = endpoint_id("c", "other")
EVERYONE: dict[str, Any] = {"namespaces": {}}
RED: dict[str, Any] = {"namespaces": {"matchLabels": {"team": "red"}}}
WEB: dict[str, Any] = {
    "pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}
}


@pytest.fixture
def world() -> World:
    """Two pods, ``a`` and ``b``, in ``ns``, and one, ``c``, in ``other``; no policy."""
    world = World()
    world.namespace("ns", {"team": "red"})
    world.namespace("other")
    http = (NamedPort("http", 6, 8080),)
    world.add(endpoint("a", "10.0.0.1", own={"app": "web"}))
    world.add(endpoint("b", "10.0.0.2", ports=http))
    world.add(endpoint("c", "10.0.0.3", namespace="other", ports=(NamedPort("http", 17, 81),)))
    return world


def put(world: World, kind: str, name: str = "x", **spec: Any) -> list[str]:
    """Set it; the fields that can't be converted."""
    parsed = parse_as(kind, {"metadata": {"name": name}, "spec": spec})
    assert isinstance(
        parsed, ClusterNetworkPolicy | AdminNetworkPolicy | BaselineAdminNetworkPolicy
    )
    converted, problems = cluster.global_policy(parsed)
    world.engine.set_policy(PolicyId(kind, "", name), converted)
    return [problem.field for problem in problems]


def test_before_and_after_the_policies_of_namespaces(world: World) -> None:
    put(
        world,
        "ClusterNetworkPolicy",
        "admin",
        tier="Admin",
        priority=5,
        subject=RED,
        ingress=[{"action": "Pass", "from": [WEB]}, {"action": "Deny", "from": [EVERYONE]}],
    )
    baseline = {"tier": "Baseline", "priority": 0, "subject": RED}
    deny = [{"action": "Deny", "from": [RED]}]
    put(world, "ClusterNetworkPolicy", "baseline", **baseline, ingress=deny)
    verdict = world.verdict(C, "b")
    assert (verdict.action, verdict.tier, verdict.rule_index) == (Action.DENY, "kube-admin", 1)
    assert world.verdict("a", "b").tier == "kube-baseline"
    world.add(policy({"selector": "app != 'web'", "ingress": [{"action": "Allow"}]}))
    assert world.verdict("a", "b").tier == "default"
    assert world.allows("a", "b")
    assert world.allows("192.0.2.1", C), "neither is about it; no tier ends"


def test_lower_priorities_come_first_and_names_break_ties(world: World) -> None:
    for name, priority in (("b", 5), ("a", 5), ("c", 1)):
        rules = [{"action": "Accept", "from": [EVERYONE]}]
        spec: dict[str, Any] = {
            "tier": "Admin",
            "priority": priority,
            "subject": EVERYONE,
            "ingress": rules,
        }
        put(world, "ClusterNetworkPolicy", name, **spec)
    world.flush()
    (tier,) = world.engine.endpoints[C].tiers  # type: ignore[union-attr]
    assert [id.name for id in tier.ingress] == ["c", "a", "b"]
    assert tier.egress == ()


def test_peers_are_pods_only(world: World) -> None:
    world.add(network_set("nets", "198.51.100.0/24", namespace="ns"))
    rules = [{"action": "Deny", "from": [RED]}]
    put(world, "ClusterNetworkPolicy", tier="Admin", priority=0, subject=EVERYONE, ingress=rules)
    assert not world.allows("a", "b")
    assert world.allows("198.51.100.1", "b")


def test_ports_of_protocols_and_by_name(world: World) -> None:
    protocols: list[dict[str, Any]] = [
        {"tcp": {"destinationPort": {"range": {"start": 80, "end": 90}}}},
        {"udp": {"destinationPort": {"number": 53}}},
        {"destinationNamedPort": "http"},
    ]
    rules = [{"action": "Deny", "to": [EVERYONE], "protocols": protocols}]
    put(world, "ClusterNetworkPolicy", tier="Admin", priority=0, subject=RED, egress=rules)
    assert not world.allows("a", "b", "TCP", 85)
    assert world.allows("a", "b", "TCP", 91)
    assert not world.allows("a", "b", "UDP", 53)
    assert not world.allows("a", "b", "TCP", 8080)
    assert world.allows("a", C, "TCP", 8080)
    assert not world.allows("a", C, "UDP", 81), "the name means another port there"
    assert world.allows("a", "192.0.2.1", "TCP", 85), "which is no pod"


def test_networks_are_pods_and_all_else(world: World) -> None:
    rules = [{"action": "Deny", "to": [{"networks": ["10.0.0.3/24", "192.0.2.0/25"]}]}]
    put(world, "ClusterNetworkPolicy", tier="Admin", priority=0, subject=WEB, egress=rules)
    assert not world.allows("a", "b")
    assert not world.allows("a", "192.0.2.1")
    assert world.allows("a", "192.0.2.129")


@pytest.mark.parametrize("peer", [{"nodes": {}}, {"domainNames": ["example.com"]}])
@pytest.mark.parametrize(("action", "allowed"), [("Accept", True), ("Pass", False)])
def test_what_cannot_be_converted_fails_closed(
    world: World, peer: dict[str, Any], action: str, allowed: bool
) -> None:
    rules = [
        {"action": action, "to": [EVERYONE, peer]},
        {"action": "Accept", "to": [{"networks": ["192.0.2.1/32"]}]},
    ]
    (field,) = put(
        world, "ClusterNetworkPolicy", tier="Admin", priority=0, subject=WEB, egress=rules
    )
    assert field.startswith("spec.egress[0].to[1].")
    assert world.allows("a", "192.0.2.1") is allowed
    verdict = world.verdict("a", "192.0.2.1")
    if allowed:
        assert verdict.tier == "kube-admin"


def test_the_older_kinds(world: World) -> None:
    ports: list[dict[str, Any]] = [
        {"portNumber": {"protocol": "TCP", "port": 80}},
        {"portRange": {"protocol": "UDP", "start": 50, "end": 60}},
        {"namedPort": "http"},
    ]
    deny = {"action": "Deny", "from": [RED], "ports": ports}
    put(world, "AdminNetworkPolicy", priority=3, subject=EVERYONE, ingress=[deny])
    put(
        world,
        "BaselineAdminNetworkPolicy",
        "default",
        subject=RED,
        egress=[{"action": "Deny", "to": [{"networks": ["192.0.2.0/24"]}]}],
    )
    verdict = world.verdict("a", "b", "TCP", 80)
    assert (verdict.tier, verdict.policy) == (
        "kube-admin",
        PolicyId("AdminNetworkPolicy", "", "x"),
    )
    assert not world.allows("a", "b", "UDP", 55)
    assert not world.allows("a", "b", "TCP", 8080)
    assert world.allows("a", "b", "TCP", 81)
    assert world.allows(C, "b", "TCP", 80)
    assert world.verdict("a", "192.0.2.1").tier == "kube-baseline"
    assert world.allows(C, "192.0.2.1")


def test_a_rule_for_each_peer_in_the_directions_that_have_rules() -> None:
    spec = {
        "tier": "Admin",
        "priority": 0,
        "subject": EVERYONE,
        "ingress": [{"action": "Deny", "from": [RED, WEB]}],
    }
    parsed = parse_as("ClusterNetworkPolicy", {"metadata": {"name": "x"}, "spec": spec})
    assert isinstance(parsed, ClusterNetworkPolicy)
    converted, _ = cluster.global_policy(parsed)
    assert [rule.position for rule in converted.spec.ingress] == [0, 0]
    assert converted.spec.types == ["Ingress"]
