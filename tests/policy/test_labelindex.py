"""The label index against brute force."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from policy.labelindex import LabelIndex
from policy.selector import Selector, parse
from tests.support import vectors

LABELS = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["x", "y", "xy"]), max_size=3)
ITEMS = st.integers(0, 40)
ATOMS = st.sampled_from(
    [
        *("a == 'x'", "a != 'x'", "b == 'y'", "b contains 'y'", "c starts with 'x'"),
        *("c ends with 'y'", "has(a)", "a in {'x', 'y'}", "b not in {'x'}", "all()", "a in {}"),
    ]
)
SELECTORS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        inner.map("!({})".format),
        st.lists(inner, min_size=2, max_size=3).map(lambda each: f"({' && '.join(each)})"),
        st.lists(inner, min_size=2, max_size=3).map(lambda each: f"({' || '.join(each)})"),
    ),
    max_leaves=6,
).map(parse)
STEPS = st.one_of(
    st.tuples(st.just("item"), ITEMS, LABELS | st.none()),
    st.tuples(st.just("many"), st.integers(1, 40), LABELS | st.none()),
    st.tuples(st.just("add"), SELECTORS),
    st.tuples(st.just("remove"), SELECTORS),
)


class Model:
    """The index beside what it should say, checked after every step."""

    def __init__(self) -> None:
        self.index: LabelIndex[int] = LabelIndex()
        self.items: dict[int, Mapping[str, str]] = {}
        self.selectors: dict[str, Selector] = {}

    def set_item(self, item: int, labels: Mapping[str, str] | None) -> None:
        before = self.selectors_of(item)
        if labels is None:
            self.items.pop(item, None)
        else:
            self.items[item] = labels
        gained, lost = self.index.set_item(item, labels)
        after = self.selectors_of(item)
        assert {selector.id for selector in gained} == after - before
        assert {selector.id for selector in lost} == before - after
        assert len(gained) == len(after - before)
        assert {selector.id for selector in self.index.selectors_of(item)} == after

    def selectors_of(self, item: int) -> set[str]:
        if item not in self.items:
            return set()
        return {s.id for s in self.selectors.values() if s.matches(self.items[item])}

    def check(self) -> None:
        for selector in self.selectors.values():
            expected = {item for item, own in self.items.items() if selector.matches(own)}
            found = list(self.index.matches(selector))
            assert set(found) == expected
            assert len(found) == len(expected)
            assert self.index.any_match(selector) is bool(expected)
            assert all(self.index.is_match(selector, i) is (i in expected) for i in range(41))


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_agrees_with_brute_force(steps: list[tuple[object, ...]]) -> None:
    model = Model()
    for step in steps:
        match step:
            case ("item", int(item), labels):
                model.set_item(item, labels)  # type: ignore[arg-type]
            case ("many", int(count), labels):
                for item in range(count):
                    model.set_item(item, labels)  # type: ignore[arg-type]
            case ("add", Selector() as selector):
                model.selectors[selector.id] = selector
                matching = {i for i, own in model.items.items() if selector.matches(own)}
                assert set(model.index.add_selector(selector)) == matching
            case ("remove", Selector() as selector):
                if model.selectors.pop(selector.id, None):
                    model.index.remove_selector(selector)
        model.check()


def test_rare_values_are_kept_small() -> None:
    """A value of its own for each item must not cost memory with the square of their number."""
    index: LabelIndex[int] = LabelIndex()
    for item in range(2000):
        index.set_item(item, {"name": str(item), "app": "web"})
    rare, common = parse("name == '1999'"), parse("app == 'web'")
    assert list(index.add_selector(rare)) == [1999]
    assert list(index.add_selector(common)) == list(range(2000))
    assert index._postings._values["name"]["1999"] == (1999,)
    for item in range(1995):
        index.set_item(item, None)
    assert list(index.matches(common)) == list(range(1995, 2000))
    assert index._postings._values["app"]["web"] == (1995, 1996, 1997, 1998, 1999)
    assert list(index._postings._values["name"]) == ["1995", "1996", "1997", "1998", "1999"]


def test_a_selector_is_tried_only_where_an_anchor_points() -> None:
    index: LabelIndex[int] = LabelIndex()
    index.set_item(0, {"orchestrator": "k8s", "app": "web"})
    index.set_item(1, {"orchestrator": "k8s"})
    selector = parse("orchestrator == 'k8s' && app == 'web'")
    list(index.add_selector(selector))
    assert index._anchors[selector.id] == frozenset({("app", "web")})
    assert list(index._candidates(None, {"orchestrator": "k8s", "app": "db"})) == []


def test_selectors_that_need_a_label_are_tried_on_items_that_have_it_only() -> None:
    """Recorded: which labels a selector restricts, and to which values."""
    for row in vectors.load("selectors")["restrictions"]:
        restrictions = (row["restrictions"] or {}).values()
        index: LabelIndex[str] = LabelIndex()
        index.add_selector(parse(row["selector"]))
        if any(restriction["present"] for restriction in restrictions):
            assert not list(index._candidates(None, {"other": "x"})), row
