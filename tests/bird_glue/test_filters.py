"""BGPFilter: every condition and operation, and what holds for all filters and routes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.bgpfilter import BGPFilter
from api.net import BITS, Net, parse_net
from api.registry import parse_as
from bird_glue.filters import (
    AddCommunity,
    Direction,
    Filter,
    PrefixMatch,
    PrependAsPath,
    RouteFacts,
    Rule,
    SetLocalPreference,
    compile_filter,
    evaluate,
)
from bird_glue.messages import Attributes, Segment

NET = parse_net("10.1.2.0/24")
FACTS = RouteFacts(NET, Attributes(), external=True)


def made(**spec: Any) -> Filter:
    parsed = parse_as("BGPFilter", {"metadata": {"name": "f"}, "spec": spec})
    assert isinstance(parsed, BGPFilter)
    return compile_filter(parsed)


def accepts(facts: RouteFacts, **rule: Any) -> bool:
    """Whether an import rule with these conditions holds for the route."""
    version = facts.net.version
    found = made(**{f"importV{version}": [{"action": "Reject", **rule}]})
    return evaluate((found,), Direction.IMPORT, facts).accept is False


@pytest.mark.parametrize(
    ("operator", "cidr", "length", "expected"),
    [
        ("In", "10.1.0.0/16", {}, True),
        ("In", "10.1.2.0/24", {}, True),
        ("In", "10.1.2.0/25", {}, False),
        ("In", "10.2.0.0/16", {}, False),
        ("In", "10.1.0.0/16", {"min": 24}, True),
        ("In", "10.1.0.0/16", {"min": 25}, False),
        ("In", "10.1.0.0/16", {"max": 24}, True),
        ("In", "10.1.0.0/16", {"max": 23}, False),
        ("In", "10.1.0.0/16", {"max": 8}, False),
        ("NotIn", "10.1.0.0/16", {}, False),
        ("NotIn", "10.2.0.0/16", {}, True),
        ("NotIn", "10.1.0.0/16", {"max": 23}, True),
        ("Equal", "10.1.2.0/24", {}, True),
        ("Equal", "10.1.0.0/16", {}, False),
        ("Equal", "10.1.2.0/24", {"min": 24, "max": 24}, True),
        ("Equal", "10.1.2.0/24", {"max": 23}, False),
        ("NotEqual", "10.1.2.0/24", {}, False),
        ("NotEqual", "10.1.0.0/16", {}, True),
    ],
)
def test_prefixes(operator: str, cidr: str, length: dict[str, int], expected: bool) -> None:
    rule: dict[str, Any] = {"cidr": cidr, "matchOperator": operator}
    if length:
        rule["prefixLength"] = length
    assert accepts(FACTS, **rule) is expected


def test_source_and_peer_type() -> None:
    own = replace(FACTS, remote=False)
    assert accepts(FACTS, source="RemotePeers")
    assert not accepts(own, source="RemotePeers")
    assert accepts(FACTS, peerType="eBGP")
    assert not accepts(FACTS, peerType="iBGP")
    assert accepts(replace(FACTS, external=False), peerType="iBGP")


@pytest.mark.parametrize(
    ("pattern", "interface", "expected"),
    [
        ("eth0", "eth0", True),
        ("eth0", "eth01", False),
        ("eth*", "eth01", True),
        ("*.calico", "vxlan.calico", True),
        ("*.calico", "vxlanXcalico", False),
        ("*", "x", True),
        ("*", None, False),
        ("eth*", None, False),
    ],
)
def test_interfaces(pattern: str, interface: str | None, expected: bool) -> None:
    assert accepts(replace(FACTS, interface=interface), interface=pattern) is expected


def test_communities_priority_and_path() -> None:
    attributes = Attributes(
        communities=("65001:7",),
        large_communities=("1:2:3",),
        local_preference=2**31 - 1 - 512,
        as_path=(Segment("as-sequence", (65001, 65002)), Segment("as-set", (7, 8))),
    )
    facts = replace(FACTS, attributes=attributes)
    for value, expected in (("65001:7", True), ("65001:70", False), ("1:2:3", True)):
        assert accepts(facts, communities={"values": [value]}) is expected
    assert accepts(facts, priority=512)
    assert not accepts(facts, priority=1024)
    assert accepts(FACTS, priority=2**31 - 1 - 100)  # none is 100
    for prefix, expected in (
        ([65001], True),
        ([65001, 65002], True),
        ([65002], False),
        ([65001, 65002, 8], True),
        ([65001, 65002, 8, 7], True),
        ([65001, 65002, 9], False),
        ([65001, 65002, 8, 9], False),
    ):
        assert accepts(facts, asPathPrefix=prefix) is expected, prefix
    assert not accepts(FACTS, asPathPrefix=[65001])


def test_all_conditions_must_hold_and_the_first_rule_decides() -> None:
    found = made(
        exportV4=[
            {"action": "Reject", "cidr": "10.1.0.0/16", "matchOperator": "In", "peerType": "iBGP"},
            {"action": "Accept", "cidr": "10.1.0.0/16", "matchOperator": "In"},
            {"action": "Reject"},
        ]
    )
    decision = evaluate((found,), Direction.EXPORT, FACTS)
    assert (decision.accept, decision.why) == (True, "BGPFilter f: exportV4[1]")
    assert evaluate((found,), Direction.EXPORT, replace(FACTS, external=False)).accept is False
    assert evaluate((found,), Direction.IMPORT, FACTS).accept is None
    six = replace(FACTS, net=parse_net("fd00::/64"))
    assert evaluate((found,), Direction.EXPORT, six).accept is None


def test_operations_in_their_order() -> None:
    operations = [
        {"addCommunity": {"value": "65001:7"}},
        {"addCommunity": {"value": "65001:7"}},
        {"addCommunity": {"value": "1:2:3"}},
        {"prependASPath": {"prefix": [1, 2]}},
        {"prependASPath": {"prefix": [3]}},
        {"setPriority": {"value": 100}},
    ]
    attributes = Attributes(as_path=(Segment("as-sequence", (9,)),))
    found = made(importV4=[{"action": "Accept", "operations": operations}])
    decision = evaluate((found,), Direction.IMPORT, replace(FACTS, attributes=attributes))
    assert decision.attributes == Attributes(
        communities=("65001:7",),
        large_communities=("1:2:3",),
        as_path=(Segment("as-sequence", (3, 1, 2, 9)),),
        local_preference=2147483547,
    )
    bare = evaluate((found,), Direction.IMPORT, FACTS)
    assert bare.attributes.as_path == (Segment("as-sequence", (3, 1, 2)),)


def test_a_missing_filter_rejects() -> None:
    decision = evaluate((Filter("gone", missing=True),), Direction.EXPORT, FACTS)
    assert decision.accept is False
    assert decision.why == "BGPFilter gone: it does not exist, or is not valid"


def nets(version: int = 4) -> st.SearchStrategy[Net]:
    def cut(length: int, value: int) -> Net:
        shift = BITS[version] - length
        return Net(version, value >> shift << shift, length)

    return st.builds(cut, st.integers(0, BITS[version]), st.integers(0, 2 ** BITS[version] - 1))


COMMUNITIES = st.sampled_from(("1:1", "1:2", "1:1:1", "1:1:2"))
ASNS = st.integers(1, 4)
OPERATIONS = st.one_of(
    st.builds(AddCommunity, COMMUNITIES),
    st.builds(PrependAsPath, st.lists(ASNS, min_size=1, max_size=3).map(tuple)),
    st.builds(SetLocalPreference, st.integers(1, 3)),
)
RULES = st.builds(
    Rule,
    accept=st.booleans(),
    prefix=st.none()
    | st.builds(PrefixMatch, nets(), st.integers(0, 32), st.integers(0, 32), st.booleans()),
    remote=st.booleans(),
    interface=st.sampled_from(("", "eth*", "eth0")),
    external=st.sampled_from((None, True, False)),
    community=st.just("") | COMMUNITIES,
    as_path=st.lists(ASNS, max_size=2).map(tuple),
    local_preference=st.none() | st.integers(1, 3),
    operations=st.lists(OPERATIONS, max_size=3).map(tuple),
)
FILTERS = st.builds(
    Filter, st.just("f"), st.lists(RULES, max_size=4).map(tuple), missing=st.booleans()
)
SEGMENTS = st.builds(
    Segment, st.sampled_from(("as-sequence", "as-set")), st.lists(ASNS, max_size=3).map(tuple)
)
ROUTES = st.builds(
    RouteFacts,
    nets(),
    st.builds(
        Attributes,
        as_path=st.lists(SEGMENTS, max_size=3).map(tuple),
        communities=st.lists(COMMUNITIES.filter(lambda text: text.count(":") == 1)).map(tuple),
        local_preference=st.none() | st.integers(1, 3),
    ),
    st.booleans(),
    st.booleans(),
    st.sampled_from((None, "eth0", "eth1", "cali1")),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(FILTERS, max_size=3), ROUTES)
def test_filters_one_after_the_other_decide_as_one(
    filters: list[Filter], facts: RouteFacts
) -> None:
    """Joining the rules of several filters changes nothing; what rejects changes nothing."""
    whole = Filter(
        "f", tuple(rule for found in filters for rule in found.rules(Direction.IMPORT, 4))
    )
    apart = evaluate(filters, Direction.IMPORT, facts)
    together = evaluate((whole,), Direction.IMPORT, facts)
    assert apart[:2] == together[:2]
    if apart.accept is not True:
        assert apart.attributes == facts.attributes
    assert bool(apart.why) == (apart.accept is not None)
    prepended = apart.attributes.path_length - facts.attributes.path_length
    assert 0 <= prepended <= 9


@settings(max_examples=80, deadline=None)
@given(st.lists(SEGMENTS, max_size=4).map(tuple), st.lists(ASNS, min_size=1, max_size=3))
def test_what_was_prepended_begins_the_path(path: tuple[Segment, ...], asns: list[int]) -> None:
    prepend = Rule(accept=True, operations=(PrependAsPath(tuple(asns)),))
    begins = Rule(accept=True, as_path=tuple(asns))
    facts = replace(FACTS, attributes=Attributes(as_path=path))
    changed = evaluate((Filter("f", (prepend,)),), Direction.IMPORT, facts).attributes
    after = replace(facts, attributes=changed)
    assert evaluate((Filter("f", (begins,)),), Direction.IMPORT, after).accept
