"""Back-off on a clock that the tests hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconcile.backoff import Backoff


def test_each_failure_waits_longer_up_to_the_maximum() -> None:
    backoff: Backoff[str] = Backoff(1, 5, 2, 0)
    waits = [backoff.failed("a", 100) - 100 for _ in range(5)]
    assert waits == [1, 2, 4, 5, 5]


def test_success_forgets_the_failures() -> None:
    backoff: Backoff[str] = Backoff(1, 60, 2, 0)
    backoff.failed("a", 0)
    backoff.failed("a", 1)
    backoff.succeeded("a")
    assert len(backoff) == 0
    assert backoff.due(1000) == []
    assert backoff.next_due() is None
    assert backoff.failed("a", 10) == 11
    backoff.succeeded("never failed")


def test_due_gives_the_longest_due_first_and_keeps_them() -> None:
    backoff: Backoff[str] = Backoff(1, 60, 2, 0)
    backoff.failed("late", 5)
    backoff.failed("early", 0)
    backoff.failed("middle", 2)
    assert backoff.next_due() == 1
    assert backoff.due(0.5) == []
    assert backoff.due(3) == ["early", "middle"]
    assert backoff.due(9) == ["early", "middle", "late"]
    assert backoff.due(9) == ["early", "middle", "late"]


@given(st.floats(0.01, 10), st.floats(1, 4), st.floats(0, 1), st.floats(0, 1), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_jitter_only_shortens_and_only_by_its_share(
    initial: float, factor: float, jitter: float, chance: float, failures: int
) -> None:
    backoff: Backoff[str] = Backoff(initial, 20, factor, jitter, chance=lambda: chance)
    plain: Backoff[str] = Backoff(initial, 20, factor, 0)
    for _ in range(failures):
        wait, full = backoff.failed("a", 0), plain.failed("a", 0)
        assert full * (1 - jitter) - 1e-9 <= wait <= full <= 20


@pytest.mark.parametrize(
    ("initial", "maximum", "factor", "jitter"),
    [(0, 1, 2, 0), (2, 1, 2, 0), (1, 2, 0.5, 0), (1, 2, 2, 1.5), (1, 2, 2, -0.1)],
)
def test_impossible_numbers_are_refused(
    initial: float, maximum: float, factor: float, jitter: float
) -> None:
    with pytest.raises(ValueError, match="0 < initial <= maximum"):
        Backoff[str](initial, maximum, factor, jitter)
