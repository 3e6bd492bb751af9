"""Patterns and CEL beside the validators in Python whose work they do in the API server."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from api import bgp, bgpfilter, clusternetworkpolicy, felix, fields, policy
from manifests.schema import type_schema
from manifests.values import SELECTOR
from policy.selector import SelectorError
from policy.selector import parse as parse_selector
from tests.support import vectors

# those whose pattern says everything; of the others it says less than the validator
PATTERNS = {
    "CommunityOrName": bgp.CommunityOrName,
    "CommunityValue": bgp.CommunityValue,
    "DSCP": fields.DSCP,
    "DomainName": clusternetworkpolicy.DomainName,
    "FilterInterface": bgpfilter.FilterInterface,
    "IgnoredInterface": fields.IgnoredInterface,
    "InterfaceFilter": fields.InterfaceFilter,
    "InterfaceName": fields.InterfaceName,
    "Name": fields.Name,
    "OpenstackRegion": felix.OpenstackRegion,
    "Path": policy.Path,
    "PlainCommunity": bgpfilter.PlainCommunity,
    "PortName": fields.PortName,
}
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text("0123456789:.", max_size=12),
    st.text("ab-.:*+/0129_% ", max_size=18),
    st.lists(st.integers(0, 1 << 33).map(str), min_size=1, max_size=4).map(":".join),
    st.sampled_from(["65535:65535", "65536:1", "4294967295:0:0", "1.65535", "TCP", "tcp", "ef"]),
)


def cheap(annotated: Any) -> dict[str, Any]:
    """The schema where a value may stand very often: no CEL."""
    schema = type_schema(annotated, (), float("inf"))
    assert "x-kubernetes-validations" not in schema
    return schema


def accepts(annotated: Any, text: str) -> bool:
    try:
        TypeAdapter(annotated).validate_python(text)
    except ValidationError:
        return False
    return True


def matches(schema: dict[str, Any], text: str) -> bool:
    pattern = schema["pattern"].removeprefix("^").removesuffix("$")
    return len(text) <= longest(schema) and re.fullmatch(pattern, text) is not None


def longest(schema: dict[str, Any]) -> float:
    return float(schema.get("maxLength", "inf"))


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=60, deadline=None)  # a long regular expression, a busy machine
@given(st.data())
def test_patterns_say_what_the_validators_say(name: str, data: st.DataObject) -> None:
    schema = cheap(PATTERNS[name])
    like = st.from_regex(re.compile(schema["pattern"], re.ASCII), fullmatch=True)
    text = data.draw(st.one_of(TEXTS, like))
    if len(text) <= longest(schema):
        assert matches(schema, text) == accepts(PATTERNS[name], text)


@pytest.mark.parametrize(
    "annotated", [fields.AsNumber, fields.Port, fields.Protocol, fields.Duration, felix.Interval]
)
@given(st.one_of(TEXTS, st.text("0123456789.hmsuµn+-", max_size=10)))
def test_what_is_right_matches(annotated: Any, text: str) -> None:
    if accepts(annotated, text) and text != "-0":
        assert matches(cheap(annotated), text)


SELECTORS = st.recursive(
    st.sampled_from(
        [
            *("all()", "global( )", "has(a.b/c-d)", 'a == "b"', "a!='x y'", "a in {}"),
            *("a not  in{'b',\"c\" , }", "a notin {'b'}", "in in {'in'}", "a contains 'b'"),
            *("startswith startswith''", "a starts\twith 'b'", "a ends with'b'"),
            *("a", "a =='b", "{}", ""),
        ]
    ),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["!", "! !", "(", " "]), inner).map("".join),
        st.tuples(inner, st.sampled_from([")", " ", "\n"])).map("".join),
        st.tuples(inner, st.sampled_from(["&&", " || ", "\t&& ", "&"]), inner).map("".join),
        inner.map("({})".format),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(SELECTORS, st.text("a!=&|(){}'\", \t", max_size=14)))
def test_no_selector_that_is_right_is_refused(text: str) -> None:
    matched = re.fullmatch(SELECTOR.removeprefix("^").removesuffix("$"), text) is not None
    try:
        parse_selector(text)
    except SelectorError:
        assert not matched or "(" in text or ")" in text  # nobody counts parentheses
    else:
        assert matched


def test_recorded_selectors() -> None:
    pattern = re.compile(SELECTOR.removeprefix("^").removesuffix("$"))
    content = vectors.load("selectors")
    rows = [row for row in content["vectors"] + content["derived"] if row["parse"] == "ok"]
    wrong = [row["selector"] for row in rows if not pattern.fullmatch(row["selector"])]
    assert (len(rows) > 500, wrong) == (True, [])
