"""YAML and JSON: what they mean here, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.syntax import SyntaxProblemError, documents


def one(text: str) -> Any:
    ((_, value),) = documents(text)
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("80:90", "80:90"),
        ("22:59", "22:59"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("2026-01-01", "2026-01-01"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("010", "010"),
        ("0x1f", 31),
        ("10", 10),
        ("-1", -1),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".inf", ".inf"),
        ("1_000", "1_000"),
        ("'10'", "10"),
        ("64512.1.2", "64512.1.2"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    result = one(f"a: {text}")["a"]
    assert result == value
    assert type(result) is type(value)


def test_null() -> None:
    assert one("{a: , b: ~, c: null}") == {"a": None, "b": None, "c": None}


def test_documents_are_numbered_and_empty_ones_left_out() -> None:
    text = "---\n# nothing\n---\na: 1\n---\n---\nb: 2\n"
    assert list(documents(text)) == [(2, {"a": 1}), (4, {"b": 2})]
    assert list(documents("")) == []


def test_anchors_and_merges() -> None:
    assert one("a: &x {k: 1}\nb: *x\nc: {<<: *x, l: 2}") == {
        "a": {"k": 1},
        "b": {"k": 1},
        "c": {"k": 1, "l": 2},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2, column 1: key 'a' stands here twice"),
        ('{"a": 1, "a": 2}', "key 'a' stands in one object twice"),
        ("a: [1", "line 2, column 1: did not find expected ',' or ']'"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("a: &x [*x]", "an alias within itself"),
        ("a: &x {b: *x}", "an alias within itself"),
        ("a: !!binary aGk=", "a bytes is no JSON value"),
        ("a: !!timestamp 2026-01-01", "a date is no JSON value"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("1: a", "key 1: expected text; put it in quotes"),
        ("true: a", "key True: expected text"),
        ("a: 18446744073709551616", "does not fit into 64 bits"),
        ('{"a": "\\ud800"}', "is not valid Unicode"),
        ("[" * 150 + "]" * 150, "more than 100 levels"),
        ("[" * 5000 + "]" * 5000, "nest|levels"),
        ("a: \x00", "control characters|special characters"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(SyntaxProblemError, match=message):
        list(documents(text))


def test_aliases_that_multiply() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(SyntaxProblemError, match="more than 1000000 values"):
        list(documents("\n".join(lines)))


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.dictionaries(st.text(), JSON_VALUES))
def test_json_is_read_as_json(value: dict[str, Any]) -> None:
    assert one(json.dumps(value)) == value


@given(st.text())
def test_arbitrary_text(text: str) -> None:
    try:
        for _, value in documents(text):
            json.dumps(value)
    except SyntaxProblemError as error:
        assert str(error)
