"""Whatever JSON comes in: a resource or InvalidObjectError, and dumping is stable."""

from __future__ import annotations

import copy
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import InvalidObjectError
from api.registry import KINDS, dump, key_parts, parse, selectors
from tests.support import vectors

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "all()", "10.0.0.0/24", "fd00::/64", "TCP", "80:90", "5s", "a" * 300]),
)
NUMBERS = st.one_of(st.integers(), st.sampled_from([0, 1, 6, 26, 80, 65535, 1 << 64]))
ANY_JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


def check(obj: Any) -> None:
    before = copy.deepcopy(obj)
    try:
        parsed = parse(obj)
    except InvalidObjectError as error:
        assert error.problems
        assert str(error)
    else:
        dumped = dump(parsed)
        assert dump(parse(orjson.loads(orjson.dumps(dumped)))) == dumped
        assert key_parts(dumped)[2] == parsed.name
        list(selectors(parsed))
    assert repr(obj) == repr(before), "the input was changed"


@given(ANY_JSON)
def test_arbitrary_json(obj: Any) -> None:
    check(obj)


@settings(max_examples=300)
@given(st.sampled_from(sorted(KINDS)), ANY_JSON, ANY_JSON, ANY_JSON)
def test_arbitrary_contents(kind_id: str, metadata: Any, spec: Any, status: Any) -> None:
    kind = KINDS[kind_id]
    obj = {"apiVersion": kind.api_version, "kind": kind.kind}
    check(obj | {"metadata": metadata, "spec": spec})
    check(obj | {"metadata": {"name": "a"}, "spec": spec, "status": status})


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    return [(value, key) for key in keys] + [p for key in keys for p in places(value[key])]


@settings(max_examples=500)
@given(st.data())
def test_right_objects_with_something_replaced(data: st.DataObject) -> None:
    here = {kind.kind for kind in KINDS.values()}
    rows = [
        row["object"]
        for row in vectors.load("validation")["cli_resources"]
        if row["object"]["kind"] in here
    ]
    obj = copy.deepcopy(data.draw(st.sampled_from(rows)))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(obj)))
        container[key] = data.draw(ANY_JSON)
    check(obj)


def test_recorded_objects_round_trip() -> None:
    for name in ("validation", "validation_resources"):
        for case in vectors.load(name)["cases"]:
            if case["resource"] is not None:
                check(case["resource"])
