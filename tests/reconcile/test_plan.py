"""A plan turns actual into desired, and is empty when there is nothing to do."""

from hypothesis import given, settings
from hypothesis import strategies as st

from reconcile.plan import Plan, diff

TABLES = st.dictionaries(st.integers(0, 9), st.integers(0, 3))


def applied(plan: Plan[int, int], actual: dict[int, int]) -> dict[int, int]:
    assert not plan.create.keys() & actual.keys()
    assert plan.update.keys() <= actual.keys()
    assert plan.delete.items() <= actual.items()
    kept = {key: value for key, value in actual.items() if key not in plan.delete}
    return kept | plan.create | plan.update


@given(TABLES, TABLES)
@settings(max_examples=200, deadline=None)
def test_plan_leads_from_actual_to_desired(desired: dict[int, int], actual: dict[int, int]) -> None:
    plan = diff(desired, actual)
    assert applied(plan, actual) == desired
    assert bool(plan) == (desired != actual)
    assert not diff(desired, desired)
    assert len(plan) == len({**plan.create, **plan.update, **plan.delete})


def test_same_decides_what_needs_an_update() -> None:
    plan = diff({"a": 10, "b": 21}, {"a": 11, "b": 12}, same=lambda x, y: x // 10 == y // 10)
    assert plan == Plan(update={"b": 21})
