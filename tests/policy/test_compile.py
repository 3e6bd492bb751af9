"""Rules as users write them → neutral rules."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic.alias_generators import to_snake

from api.net import parse_net
from api.policy import NetworkPolicy, Rule
from policy.compile import Compilation, compile_policy, compile_rules, named_port_set
from policy.evaluate import Flow, is_match
from policy.model import Action, Match, PolicyId, PortRange
from policy.model import Rule as PolicyRule
from policy.selector import MAX_DEPTH, SelectorError, parse
from tests.policy.world import World, endpoint, global_policy, policy, policy_id

ID = PolicyId("NetworkPolicy", "ns", "p")


def compiled(*rules: dict[str, Any], **spec: Any) -> Compilation:
    written = policy({"ingress": list(rules), **spec})
    return compile_policy(policy_id(written), written)


def match(**rule: Any) -> Match:
    """The conditions of a rule of which one becomes one."""
    result = compiled({"action": "Allow", **rule})
    assert not result.rules.problems
    assert result.rules.policy.ingress is not None
    (only,) = result.rules.policy.ingress
    return only.match


def test_every_field() -> None:
    ports = {"ports": [80, "8000:8010"], "notPorts": [81]}
    nets = {"nets": ["10.0.0.0/8"], "notNets": ["10.1.0.0/16"]}
    selectors = {"selector": "has(a)", "notSelector": "has(b)"}
    side = {**ports, **nets, **selectors}
    result = match(ipVersion=4, protocol="TCP", notProtocol="UDP", source=side, destination=side)
    own = "projectcalico.org/namespace == 'ns'"
    selected = (parse(f"(({own}) && (has(a))) && (!(has(b)))").id,)
    net, not_net = (parse_net("10.0.0.0/8"),), (parse_net("10.1.0.0/16"),)
    port, not_port = (PortRange(80, 80), PortRange(8000, 8010)), (PortRange(81, 81),)
    assert result == Match(
        version=4,
        protocol=6,
        not_protocol=17,
        src_nets=net,
        not_src_nets=not_net,
        dst_nets=net,
        not_dst_nets=not_net,
        src_sets=selected,
        dst_sets=selected,
        src_ports=port,
        not_src_ports=not_port,
        dst_ports=port,
        not_dst_ports=not_port,
    )


def test_a_negative_selector_alone_is_of_addresses() -> None:
    side = {"notSelector": "has(b)"}
    rule = {"action": "Deny", "source": side, "destination": side}
    result = compile_policy(ID, global_policy({"egress": [rule]})).rules.policy
    unwanted = (parse("has(b)").id,)
    assert result.egress == (
        PolicyRule(Action.DENY, Match(not_src_sets=unwanted, not_dst_sets=unwanted)),
    )


@pytest.mark.parametrize(
    ("protocol", "number"),
    [("TCP", 6), ("UDP", 17), ("SCTP", 132), ("UDPLite", 136), (47, 47)],
)
def test_protocols(protocol: str | int, number: int) -> None:
    assert match(protocol=protocol) == Match(protocol=number)
    assert match(notProtocol=protocol) == Match(not_protocol=number)


def test_icmp_belongs_to_its_ip_version() -> None:
    assert match(protocol="ICMP") == Match(version=4, protocol=1)
    assert match(protocol="ICMPv6") == Match(version=6, protocol=58)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_what_is_never_true_together_matches_nothing(side: str) -> None:
    """``felix/rules/policy.go`` FilterRuleToIPVersion: left out in either version."""
    for protocol, other, own in (("ICMP", "fd00::/8", 4), ("ICMPv6", "10.0.0.0/8", 6)):
        for action in ("Allow", "Deny"):
            rule = {"action": action, "protocol": protocol, side: {"notNets": [other]}}
            assert compiled(rule).rules.policy.ingress == ()
        same = "10.0.0.0/8" if own == 4 else "fd00::/8"
        assert match(protocol=protocol, **{side: {"notNets": [same]}}).version == own


TYPES_AND_CODES = (None, {"type": 8}, {"type": 8, "code": 0}, {"type": 3}, {"type": 3, "code": 1})


@pytest.mark.parametrize(("icmp", "not_icmp"), list(product(TYPES_AND_CODES, repeat=2)))
def test_icmp_conditions_together(
    icmp: dict[str, int] | None, not_icmp: dict[str, int] | None
) -> None:
    result = compiled(
        {"action": "Log", "protocol": "ICMP", "icmp": icmp, "notICMP": not_icmp}
    ).rules.policy
    address = parse_net("10.0.0.1")
    for number, code in product((0, 3, 8), (0, 1)):
        flow = Flow(address, address, 1, icmp_type=number, icmp_code=code)
        values = {"type": number, "code": code}
        expected = (icmp is None or icmp.items() <= values.items()) and not (
            not_icmp is not None and not_icmp.items() <= values.items()
        )
        matching = [rule for rule in result.ingress or () if is_match(rule.match, flow, {})]
        assert len(matching) == int(expected), "and never twice: a Log would log twice"


def test_a_named_port_alone_needs_only_its_own_set() -> None:
    result = match(protocol="TCP", source={"selector": "has(a)", "ports": ["http"]})
    selector = parse("projectcalico.org/namespace == 'ns' && (has(a))")
    assert result.src_named_ports == (named_port_set(selector, "http", 6).id,)
    assert result.src_sets == ()


def test_a_named_port_beside_numbers_needs_both_sets() -> None:
    result = match(protocol="TCP", source={"selector": "has(a)", "ports": ["http", 80]})
    selector = parse("projectcalico.org/namespace == 'ns' && (has(a))")
    assert result.src_named_ports == (named_port_set(selector, "http", 6).id,)
    assert result.src_sets == (selector.id,)
    assert result.src_ports == (PortRange(80, 80),)


def test_named_ports_without_a_protocol_are_of_any() -> None:
    result = match(source={"ports": ["http"]})
    assert result.src_named_ports == (named_port_set(parse("all()"), "http", 0).id,)


def test_a_global_policy_for_forwarded_traffic_looks_for_named_ports_everywhere() -> None:
    rule = {"action": "Allow", "protocol": "TCP", "destination": {"ports": ["http"]}}
    for forward, scope in ((True, "all()"), (False, "has(a)")):
        written = global_policy(
            {"selector": "has(a)", "applyOnForward": forward, "ingress": [rule]}
        )
        (spec,) = compile_policy(policy_id(written), written).rules.sets
        assert spec.id == named_port_set(parse(scope), "http", 6).id


def test_rules_keep_the_index_their_author_knows() -> None:
    rules = (
        {"action": "Allow", "source": {"selector": "="}},
        {"action": "Deny", "protocol": "ICMP", "notICMP": {"type": 8, "code": 0}},
        {"action": "Allow"},
    )
    ingress = compiled(*rules).rules.policy.ingress or ()
    assert [(rule.action, rule.index) for rule in ingress] == [
        (Action.DENY, 1),
        (Action.DENY, 1),
        (Action.ALLOW, 2),
    ]


def test_sets_of_rules_that_are_left_out_are_not_needed() -> None:
    broken = {"source": {"selector": "has(a)", "notSelector": "="}}
    assert not compiled({"action": "Allow", **broken}).rules.sets
    never = {"icmp": {"type": 8}, "notICMP": {"type": 8}, "source": {"selector": "has(a)"}}
    assert not compiled({"action": "Allow", "protocol": "ICMP", **never}).rules.sets
    unused = {"egress": [{"action": "Allow", "destination": {"selector": "has(a)"}}]}
    assert not compiled(types=["Ingress"], **unused).rules.sets


@pytest.mark.parametrize(
    ("side", "problem"),
    [
        ({"nets": ["10.0.0.0/8", "10.0.0/8"]}, "nets"),
        ({"notNets": ["10.0.0/8"]}, "notNets"),
        ({"ports": [80, "1:2:3"]}, "ports"),
        ({"selector": "has(a)", "notSelector": "="}, "notSelector"),
        ({"selector": "=", "namespaceSelector": "has(a)"}, "selector"),
    ],
)
def test_what_remains_of_a_broken_denial_matches_more(side: dict[str, Any], problem: str) -> None:
    """Built without validation, as converted objects are."""
    for action in ("Deny", "Pass"):
        rule = Rule.model_validate({"action": action, "protocol": "TCP"})
        for field, value in side.items():
            setattr(rule.source, to_snake(field), value)
        result = compile_rules(ID, [rule], [])
        assert [p.field for p in result.problems] == [f"spec.ingress[0].source.{problem}"]
        (only,) = result.policy.ingress or ()
        assert only.action is Action.DENY
        kept = (parse("has(a)").id,) if problem == "notSelector" else ()
        assert only.match == Match(protocol=6, src_sets=kept)


def test_ports_without_a_protocol_that_has_them() -> None:
    rule = Rule.model_validate({"action": "Deny"})
    rule.destination.ports = [80, "http"]
    result = compile_rules(ID, [rule], [])
    assert [str(p) for p in result.problems] == [
        "spec.ingress[0].destination.ports: 80: a rule with protocol TCP, UDP or SCTP"
    ]
    (only,) = result.policy.ingress or ()
    assert only.match == Match()


def test_directions_follow_types() -> None:
    rules = [{"action": "Allow"}]
    for types, ingress, egress in (
        (["Ingress"], True, False),
        (["Egress"], False, True),
        (["Ingress", "Egress"], True, True),
    ):
        written = policy({"types": types, "ingress": rules, "egress": rules})
        assert isinstance(written, NetworkPolicy)
        result = compile_policy(ID, written).rules.policy
        assert (result.ingress is not None, result.egress is not None) == (ingress, egress)


@given(st.text(max_size=30), st.sampled_from(["selector", "notSelector", "namespaceSelector"]))
def test_any_text_as_a_selector_is_compiled_or_a_problem(text: str, field: str) -> None:
    rule = Rule.model_validate({"action": "Allow"})
    setattr(rule.source, to_snake(field), text)
    written = policy({})
    written.spec.ingress = [rule]
    result = compile_policy(ID, written).rules
    try:
        parse(text)
    except SelectorError:
        assert [problem.field for problem in result.problems] == [f"spec.ingress[0].source.{field}"]
        assert result.policy.ingress == ()
    else:
        assert not result.problems
        assert len(result.policy.ingress or ()) == 1


def test_selectors_nested_as_deep_as_they_may() -> None:
    deepest = "!(has(x) || " * MAX_DEPTH + "has(y)" + ")" * MAX_DEPTH
    fields = {"selector": deepest, "notSelector": deepest, "namespaceSelector": deepest}
    rule = Rule.model_validate({"action": "Allow"})
    for field, text in fields.items():
        setattr(rule.source, to_snake(field), text)
    written = global_policy({})
    written.spec.selector = written.spec.namespace_selector = deepest
    written.spec.ingress = [rule]
    world = World()
    world.add(endpoint("a", "10.0.0.1"), written)
    world.flush()
    assert not world.engine.problems
