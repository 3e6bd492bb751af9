"""The engine: the same state gives the same result, whatever the way there."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import parse_net
from policy.engine import UNPLACED, Changes, Engine, Profile
from policy.model import (
    Action,
    Binding,
    CompiledPolicy,
    EndpointBinding,
    EndpointId,
    HostBinding,
    Member,
    NamedPort,
    NamedPortMember,
    Part,
    PolicyId,
    ServiceSlice,
    SetKind,
)
from tests.policy import strategies
from tests.policy.world import (
    World,
    binding_of,
    endpoint,
    endpoint_id,
    global_policy,
    policy,
    policy_id,
)


def apply(engine: Engine, change: strategies.Change) -> None:
    match change.table:
        case "endpoint":
            engine.set_endpoint(change.value, change.key)
        case "policy":
            engine.set_policy(change.key, change.value)
        case "profile":
            engine.set_profile(change.key, change.value)
        case "slice":
            namespace, name = change.key
            engine.set_service_slice(namespace, name, change.value)
        case _:
            engine.set_tier(change.key, change.value)


class Mirror:
    """What someone has who only follows the changes, as a dataplane does."""

    def __init__(self) -> None:
        self.sets: dict[str, set[Member]] = {}
        self.policies: dict[PolicyId, CompiledPolicy] = {}
        self.endpoints: dict[EndpointId, Binding] = {}

    def follow(self, changes: Changes) -> None:
        for set_id, delta in changes.sets.items():
            assert not (delta.created and delta.deleted)
            assert delta.created or delta.deleted or delta.added or delta.removed
            if delta.created:
                assert set_id not in self.sets
                self.sets[set_id] = set()
            members = self.sets[set_id]
            assert delta.removed <= members
            assert not delta.added & members
            assert all(
                isinstance(member, NamedPortMember) is (delta.kind is SetKind.NAMED_PORT)
                for member in delta.added | delta.removed
            )
            members -= delta.removed
            members |= delta.added
            if delta.deleted:
                del self.sets[set_id]
        follow(self.policies, changes.policies)
        follow(self.endpoints, changes.endpoints)


def follow(table: dict[Any, Any], changes: dict[Any, Any]) -> None:
    for key, value in changes.items():
        assert table.get(key) != value
        if value is None:
            del table[key]
        else:
            table[key] = value


@settings(max_examples=80, deadline=None)
@given(
    strategies.worlds(),
    st.lists(strategies.changes() | st.just("flush"), max_size=20),
    st.integers(0, 1000),
)
def test_the_result_is_a_function_of_the_state(
    world: list[strategies.Change],
    steps: list[strategies.Change | str],
    seed: int,
) -> None:
    engine, mirror = Engine(), Mirror()
    state: dict[tuple[str, Any], strategies.Change] = {}
    for step in [*world, *steps, "flush"]:
        if isinstance(step, strategies.Change):
            apply(engine, step)
            state[step.table, step.key] = step
        else:
            mirror.follow(engine.flush())
            assert {id: frozenset(members) for id, members in mirror.sets.items()} == dict(
                engine.sets
            )
            assert mirror.policies == engine.policies
            assert mirror.endpoints == engine.endpoints
    assert not engine.flush()
    final = [change for change in state.values() if change.value is not None]
    random.Random(seed).shuffle(final)
    fresh = Engine()
    for change in final:
        apply(fresh, change)
    fresh.flush()
    assert dict(engine.sets) == dict(fresh.sets)
    assert engine.policies == fresh.policies
    assert engine.endpoints == fresh.endpoints
    assert engine.problems == fresh.problems


def parts_of(binding: Binding) -> list[EndpointBinding]:
    if isinstance(binding, HostBinding):
        return [binding.part(part) for part in Part]
    return [binding]


@settings(max_examples=50, deadline=None)
@given(strategies.worlds())
def test_nothing_refers_to_what_is_not_there(steps: list[strategies.Change]) -> None:
    engine = Engine()
    for step in steps:
        apply(engine, step)
    engine.flush()
    needed: set[str] = set()
    for compiled in engine.policies.values():
        for rule in (*(compiled.ingress or ()), *(compiled.egress or ())):
            match = rule.match
            needed |= {*match.src_sets, *match.not_src_sets, *match.dst_sets, *match.not_dst_sets}
            needed |= {*match.src_named_ports, *match.not_src_named_ports}
            needed |= {*match.dst_named_ports, *match.not_dst_named_ports}
    assert needed == set(engine.sets)
    bound: set[PolicyId] = set()
    for user, binding in engine.endpoints.items():
        own = {id for part in parts_of(binding) for id in part.profiles}
        for tier in (tier for part in parts_of(binding) for tier in part.tiers):
            assert tier.ingress or tier.egress
            own.update(tier.ingress, tier.egress)
        assert all(user in engine.users(id) for id in own)
        bound |= own
    local = set(engine.endpoints)
    assert all(local.issuperset(engine.users(id)) for id in engine.policies)
    assert set(engine.users(PolicyId("GlobalNetworkPolicy", "", "nobody knows it"))) == set()
    assert bound <= set(engine.policies)
    enforced = {id for id, compiled in engine.policies.items() if compiled.ingress is not None}
    assert bound >= enforced


ALLOW_FROM_WEB = {"ingress": [{"action": "Allow", "source": {"selector": "app == 'web'"}}]}


def test_sets_exist_only_while_an_active_policy_uses_them() -> None:
    world = World()
    world.add(policy(ALLOW_FROM_WEB))
    world.add(endpoint("remote", "10.0.0.9", own={"app": "web"}, local=False))
    assert not world.flush()
    local = endpoint("local", "10.0.0.1")
    world.add(local)
    changes = world.flush()
    (delta,) = changes.sets.values()
    assert delta.created
    assert list(map(str, delta.added)) == ["10.0.0.9/32"]
    second = policy(ALLOW_FROM_WEB, name="second")
    world.add(second)
    assert not world.flush().sets
    world.remove(second)
    assert not world.flush().sets
    world.engine.set_endpoint(None, local.id)
    (delta,) = world.flush().sets.values()
    assert delta.deleted
    assert not world.engine.sets
    assert not world.engine.policies


def test_an_address_of_two_endpoints_stays_while_one_of_them_matches() -> None:
    world = World()
    world.add(endpoint("local", "10.0.0.1"), policy(ALLOW_FROM_WEB))
    old = endpoint("old", "10.0.0.9", own={"app": "web"}, local=False)
    world.add(old)
    world.flush()
    new = endpoint("new", "10.0.0.9", own={"app": "web"}, local=False)
    world.add(new)
    assert not world.flush()
    world.engine.set_endpoint(None, old.id)
    assert not world.flush()
    world.engine.set_endpoint(None, new.id)
    (delta,) = world.flush().sets.values()
    assert list(map(str, delta.removed)) == ["10.0.0.9/32"]


def test_an_address_that_moves_between_flushes_is_no_change() -> None:
    world = World()
    world.add(endpoint("local", "10.0.0.1"), policy(ALLOW_FROM_WEB))
    old = endpoint("old", "10.0.0.9", own={"app": "web"}, local=False)
    world.add(old)
    world.flush()
    world.engine.set_endpoint(None, old.id)
    world.add(endpoint("new", "10.0.0.9", own={"app": "web"}, local=False))
    assert not world.flush()


def test_labels_of_a_namespace_reach_its_endpoints() -> None:
    world = World()
    spec = {"ingress": [{"action": "Allow", "source": {"namespaceSelector": "team == 'red'"}}]}
    world.add(endpoint("local", "10.0.0.1"), policy(spec))
    world.add(endpoint("remote", "10.0.0.9", namespace="other", local=False))
    world.flush()
    world.namespace("other", {"team": "red"})
    (delta,) = world.flush().sets.values()
    assert list(map(str, delta.added)) == ["10.0.0.9/32"]
    world.engine.set_profile("kns.other", None)
    (delta,) = world.flush().sets.values()
    assert list(map(str, delta.removed)) == ["10.0.0.9/32"]


def test_own_labels_win_over_inherited_ones() -> None:
    world = World()
    spec = {"ingress": [{"action": "Allow", "source": {"selector": "pcns.team == 'own'"}}]}
    world.add(endpoint("local", "10.0.0.1"), policy(spec))
    world.namespace("ns", {"team": "inherited"})
    world.add(endpoint("remote", "10.0.0.9", own={"pcns.team": "own"}, local=False))
    (delta,) = world.flush().sets.values()
    assert list(map(str, delta.added)) == ["10.0.0.9/32"]


def test_a_profile_without_rules_is_not_enforced() -> None:
    world = World()
    world.namespace("ns")
    world.engine.set_profile("ksa.ns.robot", Profile())
    world.add(endpoint("local", "10.0.0.1", profiles=("ksa.ns.robot", "kns.ns", "kns.absent")))
    world.flush()
    binding = binding_of(world.engine, endpoint_id("local"))
    assert [id.name for id in binding.profiles] == ["kns.ns"]


def test_nothing_is_asked_behind_a_profile_that_is_not_there() -> None:
    """``felix/calc/active_rules_calculator.go``: it stands for one that denies everything."""
    world = World()
    world.namespace("ns")
    world.add(endpoint("local", "10.0.0.1", profiles=("custom", "kns.ns")))
    world.flush()
    assert not binding_of(world.engine, endpoint_id("local")).profiles
    assert not world.allows("192.0.2.1", "local")
    world.engine.set_profile("custom", Profile())
    world.flush()
    assert world.allows("192.0.2.1", "local")
    world.engine.set_profile("custom", None)
    world.flush()
    assert not world.allows("192.0.2.1", "local")


@pytest.mark.parametrize(
    ("broken", "where"),
    [
        ({"source": {"selector": "app = 'web'"}}, "spec.ingress[0].source.selector"),
        ({"source": {"notSelector": "app = 'web'"}}, "spec.ingress[0].source.notSelector"),
        ({"source": {"namespaceSelector": "=", "selector": "has(app)"}}, "namespaceSelector"),
        ({"source": {"serviceAccounts": {"selector": "="}}}, "source.serviceAccounts.selector"),
        ({"protocol": "TCP", "http": {"methods": ["GET"]}}, "spec.ingress[0].http"),
        ({"notICMP": {"type": 8}}, "spec.ingress[0].protocol"),
    ],
)
def test_a_rule_that_cannot_be_compiled_never_widens_access(
    broken: dict[str, Any], where: str
) -> None:
    world = World()
    world.namespace("ns")
    world.add(endpoint("a", "10.0.0.1", own={"app": "web"}), endpoint("b", "10.0.0.2"))
    for action, spec_after in (
        ("Allow", []),
        ("Deny", [{"action": "Allow"}]),
        ("Pass", [{"action": "Allow"}]),
    ):
        if "http" in broken and action != "Allow":
            continue  # refused by the API
        written = policy({"ingress": [{"action": action, **broken}, *spec_after]})
        world.add(written)
        verdict = world.verdict("a", "b")
        assert verdict.action is Action.DENY, action
        (problem,) = world.engine.problems[policy_id(written)]
        assert where in problem.field
    world.remove(written)
    assert world.allows("a", "b")
    assert not world.engine.problems


@pytest.mark.parametrize(
    "spec",
    [{"selector": "app = 'web'"}, {"serviceAccountSelector": "app = 'web'"}],
)
def test_a_policy_that_cannot_be_parsed_denies_where_it_might_apply(spec: dict[str, Any]) -> None:
    world = World()
    for name in ("ns", "other"):
        world.namespace(name)
    world.add(endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"))
    other = endpoint("c", "10.0.0.3", namespace="other")
    world.add(other, policy({**spec, "ingress": [{"action": "Allow"}]}))
    assert not world.allows("a", "b")
    assert world.allows("a", other.id)
    assert world.allows("b", "192.0.2.1"), "only in its directions"
    assert len(world.engine.problems) == 1


def test_a_global_policy_that_cannot_be_parsed_keeps_to_its_other_selectors() -> None:
    world = World()
    world.namespace("ns", {"team": "red"})
    world.namespace("other")
    other = endpoint("c", "10.0.0.3", namespace="other")
    world.add(endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"), other)
    written = global_policy({"selector": "=", "namespaceSelector": "team == 'red'"})
    world.add(written)
    assert not world.allows("a", "b")
    assert world.allows("a", other.id)
    (problem,) = world.engine.problems[policy_id(written)]
    assert problem.field == "spec.selector"


def test_a_policy_in_an_unknown_tier_denies_before_all_others_and_allows_nothing() -> None:
    world = World()
    world.namespace("ns")
    world.add(endpoint("a", "10.0.0.1", own={"app": "a"}), endpoint("b", "10.0.0.2"))
    world.add(endpoint("c", "10.0.0.3"))
    rules = [{"action": "Allow", "source": {"selector": "app == 'a'"}}]
    lost = policy({"tier": "lost", "ingress": rules}, name="lost.p")
    world.add(lost)
    assert world.allows("a", "b"), "what it allows is left to the others: the profile"
    assert world.verdict("c", "b").tier == "lost" and not world.allows("c", "b")
    assert [str(p) for p in world.engine.problems[policy_id(lost)]] == [
        "spec.tier: 'lost': a tier that exists"
    ]
    world.add(policy({"ingress": [{"action": "Allow"}]}))
    assert not world.allows("c", "b"), "nor is what it denies allowed by others"
    world.add(policy({"ingress": [{"action": "Deny"}]}))
    assert not world.allows("a", "b")
    world.tier("lost", order=1)
    assert world.allows("a", "b") and not world.allows("c", "b")
    assert not world.engine.problems
    world.tier("lost", order=2e6)
    assert world.verdict("c", "b").tier == "default"
    world.engine.set_tier("lost", strategies.tier("lost", UNPLACED, "Pass"))
    assert not world.allows("a", "b")
    world.add(policy({"ingress": [{"action": "Allow"}]}))
    assert world.allows("a", "b") and world.allows("c", "b"), "its end passes"


@pytest.mark.parametrize("field", ["doNotTrack", "preDNAT"])
def test_policies_of_host_endpoints_leave_workloads_alone(field: str) -> None:
    world = World()
    world.namespace("ns")
    world.add(endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"))
    world.add(global_policy({field: True, "applyOnForward": True}))
    assert world.allows("a", "b")
    assert not any(id.name == "g" for id in world.engine.policies)


def test_named_ports_at_a_policys_own_end_are_those_of_its_own_endpoints() -> None:
    world = World()
    http = (NamedPort("http", 6, 80),)
    world.add(endpoint("web", "10.0.0.1", own={"app": "web"}, ports=http))
    world.add(endpoint("db", "10.0.0.2", ports=http))
    rule = {"action": "Allow", "protocol": "TCP", "destination": {"ports": ["http"]}}
    world.add(policy({"selector": "app == 'web'", "ingress": [rule], "egress": [rule]}))
    sizes = sorted(len(delta.added) for delta in world.flush().sets.values())
    assert sizes == [1, 2]


def test_endpoints_with_repeated_addresses_and_profiles() -> None:
    world = World()
    world.namespace("ns")
    twice = endpoint("a", "10.0.0.1", "10.0.0.1", profiles=("kns.ns", "kns.ns"))
    world.add(twice, policy(ALLOW_FROM_WEB))
    world.flush()
    assert len(binding_of(world.engine, twice.id).profiles) == 1
    world.engine.set_endpoint(None, endpoint_id("a"))
    world.flush()
    assert not world.engine.endpoints


def slice_of(service: str, *addresses: str, ports: tuple[tuple[int, int], ...]) -> ServiceSlice:
    return ServiceSlice(service, tuple(map(parse_net, addresses)), ports)


def test_services_are_the_addresses_and_ports_of_their_endpoints() -> None:
    world = World()
    world.namespace("ns")
    world.add(endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"))
    to_web = {"action": "Allow", "destination": {"services": {"name": "web"}}}
    world.add(policy({"types": ["Egress"], "egress": [to_web]}))
    assert not world.allows("a", "b", port=80)
    engine = world.engine
    engine.set_service_slice("ns", "web-1", slice_of("ns/web", "10.0.0.2", ports=((6, 80),)))
    engine.set_service_slice("ns", "web-2", slice_of("ns/web", "10.0.0.2", ports=((17, 81),)))
    engine.set_service_slice("ns", "db-1", slice_of("ns/db", "10.0.0.2", ports=((6, 90),)))
    (delta,) = world.flush().sets.values()
    assert len(delta.added) == 2
    assert world.allows("a", "b", port=80)
    assert world.allows("a", "b", "UDP", port=81)
    assert not world.allows("a", "b", port=81)
    assert not world.allows("a", "b", port=90)
    engine.set_service_slice("ns", "web-1", None)
    assert not world.allows("a", "b", port=80)


def test_connections_from_a_services_endpoints_have_any_port() -> None:
    world = World()
    world.namespace("ns")
    world.add(endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"))
    from_web = {"action": "Allow", "source": {"services": {"name": "web", "namespace": "x"}}}
    world.add(global_policy({"types": ["Ingress"], "ingress": [from_web]}))
    world.engine.set_service_slice("x", "web-1", slice_of("x/web", "10.0.0.1", ports=()))
    assert world.allows("a", "b")
    assert not world.allows("b", "a")
    assert [set_id.partition(":")[0] for set_id in world.engine.sets] == ["svcnoport"]


def test_endpoints_of_services_are_in_no_selectors_set() -> None:
    world = World()
    world.namespace("ns")
    world.add(endpoint("b", "10.0.0.2"))
    rule = {"action": "Allow", "source": {"namespaceSelector": "global()", "selector": "!has(x)"}}
    world.add(policy({"ingress": [rule]}))
    world.engine.set_service_slice("x", "web-1", slice_of("x/web", "10.0.0.1", ports=((6, 1),)))
    assert not world.allows("10.0.0.1", "b")
