"""Policies of host endpoints: which packets they are for, and in which order they are asked."""

from __future__ import annotations

from typing import Any

import pytest

from api.net import parse_net
from policy.model import Action, EndpointId, HostBinding, Part, PolicyId
from tests.policy.world import World, endpoint, endpoint_id, global_policy, host_endpoint, policy

HOST = EndpointId("HostEndpoint", "", "host")
ALLOW: dict[str, Any] = {"action": "Allow"}
DENY: dict[str, Any] = {"action": "Deny"}


@pytest.fixture
def world() -> World:
    """A host, and a pod ``a`` on it; no policy."""
    world = World()
    world.namespace("ns")
    world.add(host_endpoint("host", "10.0.9.9", own={"role": "node"}), endpoint("a", "10.0.0.1"))
    return world


def binding(world: World) -> HostBinding:
    world.flush()
    found = world.engine.endpoints[HOST]
    assert isinstance(found, HostBinding)
    return found


def parts(world: World, name: str) -> set[Part]:
    """Where a policy stands."""
    return {
        part
        for part in Part
        for tier in binding(world).part(part).tiers
        if name in {id.name for id in (*tier.ingress, *tier.egress)}
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {Part.NORMAL}),
        ({"applyOnForward": True}, {Part.NORMAL, Part.FORWARD}),
        ({"applyOnForward": True, "preDNAT": True, "types": ["Ingress"]}, {Part.PRE_DNAT}),
        ({"applyOnForward": True, "doNotTrack": True}, {Part.UNTRACKED}),
    ],
)
def test_what_a_policy_is_for(world: World, flags: dict[str, Any], expected: set[Part]) -> None:
    world.add(global_policy({"selector": "has(role)", **flags}))
    assert parts(world, "g") == expected


def test_policies_for_hosts_alone_are_active_where_a_host_is_selected(world: World) -> None:
    flags = {"applyOnForward": True, "doNotTrack": True}
    world.add(global_policy({"selector": "all()", "ingress": [DENY], **flags}))
    world.flush()
    id = PolicyId("GlobalNetworkPolicy", "", "g")
    assert id in world.engine.policies
    world.engine.set_endpoint(None, HOST)
    world.flush()
    assert id not in world.engine.policies
    assert world.allows("192.0.2.1", "a")


def test_policies_of_namespaces_are_not_for_hosts(world: World) -> None:
    world.add(policy({"selector": "all()"}))
    assert parts(world, "p") == set()


def test_a_host_of_another_node_is_bound_to_nothing(world: World) -> None:
    world.add(host_endpoint("other", "10.0.9.8", local=False))
    world.flush()
    assert set(world.engine.endpoints) == {HOST, endpoint_id("a")}


def test_profiles_decide_about_the_host_alone(world: World) -> None:
    world.add(host_endpoint("host", "10.0.9.9", profiles=("kns.ns",)))
    assert world.allows("192.0.2.1", HOST)
    assert world.allows(HOST, "192.0.2.1")
    assert binding(world).forward.profiles == ()


def test_what_is_allowed_untracked_is_not_asked_about_again(world: World) -> None:
    early = {"applyOnForward": True, "doNotTrack": True}
    world.add(global_policy({"selector": "has(role)", "ingress": [ALLOW], **early}))
    blocked = {"selector": "has(role)", "applyOnForward": True, "types": ["Ingress"]}
    world.add(global_policy(blocked, name="blocked"))
    assert world.allows("192.0.2.1", HOST)
    assert world.allows("192.0.2.1", "192.0.2.2", entry=HOST)
    verdict = world.verdict("192.0.2.1", "a", entry=HOST)
    assert verdict.action is Action.ALLOW
    assert [(step.endpoint.name, step.part) for step in verdict.trace] == [
        ("host", Part.UNTRACKED),
        ("a", Part.NORMAL),
    ], "the pod is asked, the host not again"


@pytest.mark.parametrize("flag", ["doNotTrack", "preDNAT"])
def test_early_tiers_have_no_end(world: World, flag: str) -> None:
    world.add(host_endpoint("host", "10.0.9.9", own={"role": "node"}, profiles=("kns.ns",)))
    rule = {**DENY, "protocol": "UDP"}
    early = {"applyOnForward": True, "types": ["Ingress"], flag: True}
    world.add(global_policy({"selector": "has(role)", "ingress": [rule], **early}))
    assert world.allows("192.0.2.1", HOST, "TCP")
    assert not world.allows("192.0.2.1", HOST, "UDP")


def test_before_destination_nat_a_packet_is_for_another_address(world: World) -> None:
    rule = {**DENY, "protocol": "TCP", "destination": {"nets": ["10.0.9.9/32"], "ports": [30080]}}
    early = {"applyOnForward": True, "types": ["Ingress"], "preDNAT": True}
    world.add(global_policy({"selector": "has(role)", "ingress": [rule], **early}))
    node = parse_net("10.0.9.9")
    before = {"entry": HOST, "original_dst": node, "original_dst_port": 30080}
    assert not world.allows("192.0.2.1", "a", "TCP", 80, **before)
    assert world.allows("192.0.2.1", "a", "TCP", 80, entry=HOST)
    assert world.allows("192.0.2.1", "a", "TCP", 80, **{**before, "original_dst_port": 30081})


def test_a_forwarded_packet_is_asked_about_where_it_enters_and_leaves(world: World) -> None:
    out = {"selector": "has(role)", "applyOnForward": True, "types": ["Egress"]}
    world.add(global_policy({**out, "egress": [{**ALLOW, "protocol": "UDP"}]}))
    assert world.allows("a", "192.0.2.1", "UDP", exit=HOST)
    assert not world.allows("a", "192.0.2.1", "TCP", exit=HOST)
    assert world.allows("a", "192.0.2.1", "TCP"), "by an interface without host endpoint"


def test_what_a_node_sends_to_itself_meets_nothing(world: World) -> None:
    assert world.verdict(HOST, HOST).trace == ()
    assert world.allows(HOST, HOST)
