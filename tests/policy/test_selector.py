"""The selector language against the recorded cases, and against arbitrary text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.selector import MAX_DEPTH, Selector, SelectorError, normalise, parse
from tests.support import vectors


def test_recorded_selectors() -> None:
    content = vectors.load("selectors")
    for row in content["vectors"] + content["derived"]:
        if row["parse"] == "error":
            with pytest.raises(SelectorError):
                parse(row["selector"])
            continue
        selector = parse(row["selector"])
        assert selector.canonical == row["canonical"]
        assert selector.id == row["uid"]
        for case in row["cases"]:
            assert selector.matches(case["labels"]) is case["match"], (row["selector"], case)


def test_recorded_token_cases() -> None:
    for row in vectors.load("selectors")["tokens"]:
        if row["tokens"] is None:
            with pytest.raises(SelectorError):
                parse(row["input"])


def test_recorded_normalise() -> None:
    for row in vectors.load("selectors")["normalise"]:
        assert normalise(row["input"]) == row["normalised"]


def test_tricky_1_negative_comparisons_match_objects_without_the_label() -> None:
    for text in ('a != "x"', 'a not in {"x"}'):
        assert parse(text).matches({})
    for text in ('a == "x"', 'a in {"x"}', 'a contains ""', 'a starts with ""', 'a ends with ""'):
        assert not parse(text).matches({})


@pytest.mark.parametrize(
    "text",
    ["a startswith 'b'", "a notin {'b'}", 'a in{"b",}', "a in {}", "all( )", "has( a )", "a=='b'"],
)
def test_tricky_2_parses(text: str) -> None:
    parse(text)


@pytest.mark.parametrize(
    "text",
    ["has (a)", "all ()", "a in {,}", r"a == 'it\'s'", "all()\n", "a ==\n'b'", "a" * 513 + "=='b'"],
)
def test_tricky_2_does_not_parse(text: str) -> None:
    with pytest.raises(SelectorError):
        parse(text)


def test_tricky_3_canonical_form() -> None:
    assert parse("!!!a=='b' && x in {'z', \"y'\", 'z'}").canonical == (
        '(!a == "b" && x in {"y\'", "z"})'
    )
    assert parse("(a == '\"' && (has(b)))").canonical == "(a == '\"' && has(b))"
    assert parse("a=='b'||(c=='d'||has(e))").canonical == '(a == "b" || (c == "d" || has(e)))'
    assert parse("").id == parse("all()").id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 'b'", "selector \"a = 'b'\": at character 2, \"= 'b'\": expected ==, !=, in"),
        ("a == ", "the end: expected a value in quotes"),
        ("(has(a)", "expected && or || or )"),
        ("has(a) has(b)", "at character 7"),
        ("%", "expected a label"),
        ("a == 'b' && ", "expected a label"),
        ("has()", "expected has(label)"),
        ("all(a)", "expected all()"),
        ("\ud800", "valid Unicode"),
    ],
)
def test_errors_say_where_and_what(text: str, expected: str) -> None:
    with pytest.raises(SelectorError) as caught:
        parse(text)
    assert expected in str(caught.value)


def test_nesting_is_bounded() -> None:
    parse("(" * MAX_DEPTH + "has(a)" + ")" * MAX_DEPTH).matches({})
    with pytest.raises(SelectorError, match="nested more than"):
        parse("(" * (MAX_DEPTH + 1) + "has(a)" + ")" * (MAX_DEPTH + 1))
    with pytest.raises(SelectorError, match="nested more than"):
        parse("!(" * 1_000_000)
    deepest = "!(" * MAX_DEPTH + "has(a) && has(b)" + ")" * MAX_DEPTH
    assert parse(deepest).matches({"a": "", "b": ""})
    flat, nested = "has(a) && (" * MAX_DEPTH, "(has(a) && " * MAX_DEPTH
    with pytest.raises(SelectorError, match="nested more than"):  # its canonical form would be
        parse(flat + "has(b) || has(c)" + ")" * MAX_DEPTH)
    deep = parse(nested + "has(b)" + ")" * MAX_DEPTH)
    assert parse(deep.canonical) == deep
    assert parse("!" * 1_000_001 + "has(a)").matches({})


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "a==" + "'" * 100_001,
        "a in {" + "'b'," * 40_000,
        "has(a)&&" * 40_000,
        " " * 100_000 + "\n",
        "has(" * 40_000,
        "a starts" + " " * 100_000,
        "a not" + "\t" * 100_000 + "in",
    ],
)
def test_long_input_is_refused_in_linear_time(text: str) -> None:
    with pytest.raises(SelectorError):
        parse(text)


PUNCTUATION = ["(", ")", "{", "}", ",", "!", "&&", "||", "==", "!=", "=", "&", "|", " ", "\t", "\n"]
WORDS = ["a", "b", "has(", "all()", "global()", "in", "not", "contains", "starts", "with", "ends"]
STRINGS = ["'x'", '"y"', "'", '"', "é"]


def parses(text: str) -> Selector | None:
    try:
        return parse(text)
    except SelectorError as error:
        assert 0 <= error.position <= len(text)
        return None


@settings(max_examples=300)
@given(
    st.text(alphabet=st.characters())
    | st.lists(st.sampled_from(PUNCTUATION + WORDS + STRINGS), max_size=20).map("".join)
)
def test_any_text_is_a_selector_or_a_selector_error(text: str) -> None:
    selector = parses(text)
    if selector is None:
        return
    assert parse(selector.canonical).matches({"a": "x"}) is selector.matches({"a": "x"})
    settled = parse(selector.canonical)  # `!(!has(a))` settles as `has(a)` the second time
    assert parse(settled.canonical) == settled
