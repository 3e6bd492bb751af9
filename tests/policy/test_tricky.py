"""Where reimplementations of policy go wrong, point by point, through the engine to the verdict."""

from __future__ import annotations

from typing import Any

import pytest

from api.net import parse_net
from policy.evaluate import Flow, is_match
from policy.model import Action, Endpoint, EndpointId, Match, NamedPort, PolicyId
from tests.policy.world import (
    World,
    binding_of,
    endpoint,
    endpoint_id,
    global_policy,
    host_endpoint,
    network_set,
    policy,
    policy_id,
    staged,
)

ALLOW: dict[str, Any] = {"action": "Allow"}
DENY: dict[str, Any] = {"action": "Deny"}
PASS: dict[str, Any] = {"action": "Pass"}


@pytest.fixture
def world() -> World:
    """Two pods, ``a`` and ``b``, in ``ns``, and one, ``c``, in ``other``; no policy."""
    world = World()
    world.namespace("ns", {"team": "red"})
    world.namespace("other")
    world.add(endpoint("a", "10.0.0.1", own={"app": "web"}))
    world.add(endpoint("b", "10.0.0.2", own={"app": "db"}))
    world.add(endpoint("c", "10.0.0.3", namespace="other"))
    return world


C = endpoint_id("c", "other")


def kubernetes(name: str = "p", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "ns"}
    return {"metadata": metadata, "spec": {"podSelector": {}, **spec}}


def bound(world: World, name: str, direction: str = "ingress") -> list[str]:
    """Names of the policies that decide about an endpoint, in order."""
    world.flush()
    binding = binding_of(world.engine, endpoint_id(name))
    return [id.name for tier in binding.tiers for id in getattr(tier, direction)]


def test_tricky_4_all_is_every_namespace_and_global_is_outside(world: World) -> None:
    world.add(host_endpoint("host", "10.0.9.9", local=False))
    world.add(network_set("inside", "198.51.100.0/24", namespace="ns"))
    world.add(network_set("outside", "203.0.113.0/24"))
    expected = {"all()": (True, False), "global()": (False, True)}
    for text, (inside, outside) in expected.items():
        rule = {**ALLOW, "source": {"namespaceSelector": text}}
        world.add(policy({"selector": "app == 'db'", "ingress": [rule]}))
        assert world.allows("a", "b") is inside
        assert world.allows("198.51.100.7", "b") is inside
        assert world.allows("10.0.9.9", "b") is outside
        assert world.allows("203.0.113.7", "b") is outside
        assert not world.allows("192.0.2.1", "b"), "which is nobody's"


def test_tricky_5_network_sets_without_a_namespace_match_a_negative_selector(world: World) -> None:
    world.add(network_set("global", "203.0.113.0/24"))
    world.add(network_set("red", "198.51.100.0/24", namespace="ns"))
    rule = {**ALLOW, "source": {"namespaceSelector": "team != 'red'"}}
    world.add(policy({"selector": "app == 'db'", "ingress": [rule]}))
    assert world.allows("203.0.113.7", "b")
    assert not world.allows("198.51.100.7", "b")


def test_tricky_6_a_selector_finds_the_sets_of_the_policys_namespace_only(world: World) -> None:
    for name, net, namespace in (
        ("own", "198.51.100.0/25", "ns"),
        ("others", "198.51.100.128/25", "other"),
        ("global", "203.0.113.0/24", ""),
    ):
        world.add(network_set(name, net, namespace=namespace, own={"app": "nets"}))
    rule = {**ALLOW, "source": {"selector": "app == 'nets'"}}
    world.add(policy({"selector": "app == 'db'", "ingress": [rule]}))
    assert world.allows("198.51.100.1", "b")
    assert not world.allows("198.51.100.129", "b")
    assert not world.allows("203.0.113.1", "b")
    world.add(global_policy({"selector": "app == 'db'", "order": 1, "ingress": [rule]}))
    assert world.allows("198.51.100.129", "b")
    assert world.allows("203.0.113.1", "b")


def test_tricky_5_negative_namespace_selector_matches_host_endpoints(world: World) -> None:
    host = EndpointId("HostEndpoint", "", "host")
    world.add(Endpoint(host, labels=(), profiles=(), nets=(parse_net("10.0.9.9"),)))
    rule = {**ALLOW, "source": {"namespaceSelector": "team != 'red'"}}
    world.add(policy({"selector": "app == 'db'", "ingress": [rule]}))
    assert not world.allows("a", "b")
    assert world.allows(C, "b")
    assert world.allows("10.0.9.9", "b")
    assert not world.allows("192.0.2.1", "b"), "an outside address is no endpoint"


def test_tricky_6_a_rule_without_selectors_is_not_limited_to_the_namespace(world: World) -> None:
    target = {"selector": "app == 'db'"}
    world.add(policy({**target, "ingress": [ALLOW]}))
    assert world.allows(C, "b")
    assert world.allows("192.0.2.1", "b")
    world.add(policy({**target, "ingress": [{**ALLOW, "source": {"notSelector": "has(x)"}}]}))
    assert world.allows("a", "b")
    assert not world.allows(C, "b")
    assert not world.allows("192.0.2.1", "b")


def test_a_negative_selector_beside_a_positive_one_is_about_the_same_endpoints(
    world: World,
) -> None:
    """``felix/calc/rule_scanner.go`` combineMatchesIfPossible: together they are one selector.

    That a trusted network lies around a pod doesn't make the pod trusted. Alone, ``notSelector``
    is about addresses, also those of nobody we know.
    """
    world.add(network_set("around", "10.0.0.0/24", own={"trusted": ""}))
    source = {"namespaceSelector": "all()", "notSelector": "has(trusted)"}
    deny = {"action": "Deny", "source": source}
    world.add(global_policy({"selector": "app == 'db'", "ingress": [deny, ALLOW]}))
    assert not world.allows("a", "b")
    assert world.allows("10.0.0.77", "b") and world.allows("192.0.2.1", "b")
    deny = {"action": "Deny", "source": {"notSelector": "has(trusted)"}}
    world.add(global_policy({"selector": "app == 'db'", "ingress": [deny, ALLOW]}))
    assert world.allows("a", "b") and not world.allows("192.0.2.1", "b")


@pytest.mark.parametrize(
    ("spec", "ingress", "egress"),
    [
        ({}, False, True),
        ({"ingress": []}, False, True),
        ({"ingress": [ALLOW]}, True, True),
        ({"egress": [DENY]}, True, False),
        ({"ingress": [DENY], "egress": [DENY]}, False, False),
        ({"types": ["Egress"], "ingress": [DENY]}, True, False),
    ],
)
def test_tricky_7_types_by_default(
    world: World, spec: dict[str, Any], ingress: bool, egress: bool
) -> None:
    world.add(policy({"selector": "app == 'web'", **spec}))
    assert world.allows("b", "a") is ingress
    assert world.allows("a", "b") is egress


def test_tricky_8_order_of_policies(world: World) -> None:
    world.add(policy({}, name="zz"), policy({"order": 20}, name="b"), policy({}, name="aa"))
    world.add(policy({"order": -1.5}, name="y"), policy({"order": 10}, name="c"))
    world.add(global_policy({"order": 10}, name="c"), global_policy({}, name="aa"))
    # `c//GlobalNetworkPolicy` comes before `c/ns/NetworkPolicy`; no order is last.
    assert bound(world, "a") == ["y", "c", "c", "b", "aa", "aa", "zz"]
    (tier,) = binding_of(world.engine, endpoint_id("a")).tiers
    assert tier.ingress[1] == PolicyId("GlobalNetworkPolicy", "", "c")
    assert tier.ingress[4] == PolicyId("GlobalNetworkPolicy", "", "aa")


def test_tricky_8_ties_are_broken_by_bytes(world: World) -> None:
    world.add(*(policy({}, name=name) for name in ("a-b", "a", "a.b", "a1")))
    # "a-b/ns/…" < "a.b/ns/…" < "a/ns/…" < "a1/ns/…"
    assert bound(world, "a") == ["a-b", "a.b", "a", "a1"]


def test_tricky_8_order_of_tiers(world: World) -> None:
    for tier in ("default", "kube-admin", "kube-baseline", "unordered", "b", "a"):
        prefix = "" if tier == "default" else f"{tier}."
        world.add(policy({"tier": tier}, name=f"{prefix}p"))
    world.tier("unordered")
    world.tier("a", order=500)
    world.tier("b", order=500)
    world.flush()
    tiers = [tier.name for tier in binding_of(world.engine, endpoint_id("a")).tiers]
    assert tiers == ["a", "b", "kube-admin", "default", "kube-baseline", "unordered"]


def test_tricky_9_the_end_of_a_tier_counts_in_the_selected_direction_only(world: World) -> None:
    world.tier("first", order=1)
    world.add(policy({"tier": "first", "types": ["Ingress"]}, name="first.p"))
    verdict = world.verdict("a", "b")
    assert (verdict.action, verdict.tier, verdict.policy) == (Action.DENY, "first", None)
    assert world.allows("a", C), "no policy of the tier applies to egress"
    assert world.allows("a", "192.0.2.1")


def test_tricky_9_a_tier_that_passes_drops_nothing(world: World) -> None:
    world.tier("first", order=1, defaultAction="Pass")
    world.add(policy({"tier": "first"}, name="first.p"))
    assert world.allows("a", "b")
    world.add(policy({}))
    assert world.verdict("a", "b").tier == "default"
    assert not world.allows("a", "b")


def test_tricky_9_a_staged_policy_never_ends_a_tier(world: World) -> None:
    world.add(staged({"selector": "app == 'db'", "ingress": [DENY]}))
    verdict = world.verdict("a", "b")
    assert verdict.action is Action.ALLOW
    draft = PolicyId("StagedNetworkPolicy", "ns", "s")
    steps = [(step.policy, step.action) for step in verdict.trace if step.tier]
    assert steps == [(draft, Action.DENY)], "it is told what it would have done, and no tier ends"
    world.add(policy({"selector": "app == 'db'"}))
    assert world.verdict("a", "b").tier == "default"
    assert not world.allows("a", "b")


def test_tricky_9_a_staged_policy_neither_allows_nor_passes(world: World) -> None:
    world.add(policy({"order": 2, "selector": "app == 'db'"}))
    for action in (ALLOW, PASS):
        world.add(staged({"order": 1, "selector": "app == 'db'", "ingress": [action]}))
        assert not world.allows("a", "b")


def test_tricky_10_pass_leaves_the_tier(world: World) -> None:
    world.tier("first", order=1)
    world.add(policy({"tier": "first", "order": 1, "ingress": [PASS, DENY]}, name="first.p"))
    world.add(policy({"tier": "first", "order": 2, "ingress": [DENY]}, name="first.q"))
    verdict = world.verdict("a", "b")
    assert (verdict.action, verdict.policy) == (Action.ALLOW, PolicyId("Profile", "", "kns.ns"))
    world.add(policy({"ingress": [DENY]}, name="last"))
    assert world.verdict("a", "b").policy == PolicyId("NetworkPolicy", "ns", "last")


def test_tricky_10_log_goes_on(world: World) -> None:
    world.add(policy({"ingress": [{"action": "Log"}, ALLOW]}))
    verdict = world.verdict("a", "b")
    assert verdict.action is Action.ALLOW
    assert verdict.rule_index == 1
    assert [(step.action, step.rule_index) for step in verdict.trace[-2:]] == [
        (Action.LOG, 0),
        (Action.ALLOW, 1),
    ]


def test_tricky_11_the_default_comes_from_the_profile(world: World) -> None:
    assert world.verdict("a", "b").policy == PolicyId("Profile", "", "kns.ns")
    world.engine.set_profile("kns.ns", None)
    verdict = world.verdict(C, "b")
    assert verdict.action is Action.DENY
    assert (verdict.tier, verdict.policy, verdict.rule_index) == ("", None, None)


def test_tricky_12_forwarded_traffic_needs_a_policy_to_be_stopped(world: World) -> None:
    host = EndpointId("HostEndpoint", "", "host")
    world.add(host_endpoint("host", "10.0.9.9"))
    assert not world.allows("192.0.2.1", host), "to the host itself nothing is allowed"
    assert not world.allows(host, "192.0.2.1")
    assert world.allows("192.0.2.1", "192.0.2.2", entry=host, exit=host)
    assert world.allows("192.0.2.1", "b", entry=host)
    world.add(global_policy({"applyOnForward": True, "types": ["Ingress"]}))
    assert not world.allows("192.0.2.1", "192.0.2.2", entry=host)
    assert not world.allows("192.0.2.1", "b", entry=host)
    assert world.allows("192.0.2.1", "192.0.2.2", exit=host), "in the other direction none applies"


def test_tricky_14_not_in_matches_pods_without_the_key(world: World) -> None:
    expressions = [{"key": "app", "operator": "NotIn", "values": ["web"]}]
    peer = {"podSelector": {"matchExpressions": expressions}, "namespaceSelector": {}}
    world.kubernetes_policy(kubernetes(ingress=[{"from": [peer]}]))
    assert not world.allows("a", "b")
    assert world.allows(C, "b")


def test_tricky_14_an_empty_value_needs_the_key(world: World) -> None:
    world.add(endpoint("empty", "10.0.0.4", own={"app": ""}))
    peer = {"podSelector": {"matchLabels": {"app": ""}}, "namespaceSelector": {}}
    world.kubernetes_policy(kubernetes(ingress=[{"from": [peer]}]))
    assert world.allows("empty", "b")
    assert not world.allows("a", "b")
    assert not world.allows(C, "b")


@pytest.mark.parametrize(
    ("ingress", "allowed"), [([], False), (None, False), ([{}], True), ([{"from": []}], True)]
)
def test_tricky_15_no_rule_and_an_empty_rule(world: World, ingress: Any, allowed: bool) -> None:
    world.kubernetes_policy(kubernetes(ingress=ingress))
    assert world.allows("a", "b") is allowed


def test_tricky_15_absent_ingress_allows_nothing(world: World) -> None:
    world.kubernetes_policy(kubernetes())
    assert not world.allows("a", "b")


def test_tricky_16_an_empty_port_is_every_tcp_port(world: World) -> None:
    world.kubernetes_policy(kubernetes(ingress=[{"ports": [{}]}]))
    assert world.allows("a", "b", "TCP", 12345)
    assert not world.allows("a", "b", "UDP", 12345)
    world.kubernetes_policy(kubernetes(ingress=[{}]))
    assert world.allows("a", "b", "UDP", 12345)


def test_tricky_17_except_belongs_to_its_peer(world: World) -> None:
    block = {"ipBlock": {"cidr": "10.0.0.0/24", "except": ["10.0.0.1/32"]}}
    world.kubernetes_policy(kubernetes(ingress=[{"from": [block]}]))
    assert not world.allows("a", "b"), "ipBlock matches pods, too"
    assert world.allows(C, "b")
    assert not world.allows("10.0.1.1", "b")
    other = {"ipBlock": {"cidr": "10.0.0.1/32"}}
    world.kubernetes_policy(kubernetes(ingress=[{"from": [block, other]}]))
    assert world.allows("a", "b")
    world.kubernetes_policy(kubernetes(ingress=[{"from": [block]}]))
    world.kubernetes_policy(kubernetes("q", ingress=[{"from": [other]}]))
    assert world.allows("a", "b")


def test_tricky_18_a_named_port_is_the_destinations(world: World) -> None:
    world.add(endpoint("x", "10.0.0.11", ports=(NamedPort("http", 6, 8080),)))
    udp_and_tcp = (NamedPort("http", 17, 80), NamedPort("http", 6, 90))
    world.add(endpoint("y", "10.0.0.12", ports=udp_and_tcp))
    world.kubernetes_policy(kubernetes(ingress=[{"ports": [{"port": "http"}]}]))
    assert world.allows("a", "x", port=8080)
    assert not world.allows("a", "x", port=80)
    assert world.allows("a", "y", port=90)
    assert not world.allows("a", "y", port=80)
    assert not world.allows("a", "y", "UDP", 80), "the name and the protocol together"
    assert not world.allows("a", "b"), "no such name there"


def test_tricky_18_a_named_port_never_matches_what_is_no_pod(world: World) -> None:
    world.kubernetes_policy(kubernetes(policyTypes=["Egress"], egress=[{"ports": [{"port": "h"}]}]))
    world.add(endpoint("x", "10.0.0.11", ports=(NamedPort("h", 6, 80),)))
    assert world.allows("a", "x")
    assert not world.allows("a", "192.0.2.1")


def test_tricky_19_a_finished_pod_has_no_address(world: World) -> None:
    rule = {**ALLOW, "source": {"selector": "app == 'web'"}}
    world.add(policy({"selector": "app == 'db'", "ingress": [rule]}))
    assert world.allows("10.0.0.1", "b")
    world.add(endpoint("a", own={"app": "web"}))
    assert not world.allows("10.0.0.1", "b")
    world.add(endpoint("next", "10.0.0.1", own={"app": "other"}))
    assert not world.allows("next", "b")


def test_a_verdict_tells_all_that_was_looked_at(world: World) -> None:
    world.add(policy({"order": 1, "ingress": [{**ALLOW, "protocol": "UDP"}]}, name="udp"))
    world.add(policy({"order": 2, "ingress": [{**DENY, "protocol": "TCP"}]}, name="tcp"))
    verdict = world.verdict("a", "b")
    assert [(s.endpoint.name, s.direction.value, s.policy, s.action) for s in verdict.trace] == [
        ("a", "egress", PolicyId("Profile", "", "kns.ns"), Action.ALLOW),
        ("b", "ingress", PolicyId("NetworkPolicy", "ns", "udp"), None),
        ("b", "ingress", PolicyId("NetworkPolicy", "ns", "tcp"), Action.DENY),
    ]
    assert (verdict.tier, verdict.rule_index) == ("default", 0)


def test_what_egress_denies_is_not_looked_at_further(world: World) -> None:
    denied = policy({"selector": "app == 'web'", "egress": [DENY]})
    world.add(denied)
    verdict = world.verdict("a", "b")
    assert verdict.policy == policy_id(denied)
    assert {step.endpoint.name for step in verdict.trace} == {"a"}


def test_flows_without_an_end_of_ours_are_not_for_us_to_decide(world: World) -> None:
    verdict = world.verdict("192.0.2.1", "192.0.2.2")
    assert (verdict.action, verdict.trace) == (Action.ALLOW, ())


def test_networks_in_sets() -> None:
    members = {"s": frozenset(map(parse_net, ("10.0.0.0/8", "fd00::/16")))}
    for text, inside in (("10.1.2.3", True), ("fd00::1", True), ("11.0.0.1", False)):
        address = parse_net(text)
        assert is_match(Match(src_sets=("s",)), Flow(address, address, 6), members) is inside
