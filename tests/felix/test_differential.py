"""The oracle and the kernel agree: drawn worlds of all kinds of policy, real packets.

Every enforcer lives through all examples, so what one of them leaves behind would show in the
next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings

from datastore.interface import JSON, Key
from tests.felix.crossroads import Crossroads
from tests.felix.fabric import MAKERS
from tests.policy import objects
from tests.support.probes import Prober

Enforcers = dict[str, tuple[Crossroads, Prober]]
bounded = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def enforcers() -> Iterator[Enforcers]:
    with ExitStack() as stack:
        places = {backend: Crossroads(backend, stack) for backend in MAKERS}
        yield {backend: (place, place.prober(stack)) for backend, place in places.items()}


def check(enforcers: Enforcers, world: dict[Key, JSON]) -> None:
    """Every probed packet of a world, on every enforcer."""
    for place, _ in enforcers.values():
        place.become(world)
    # They were told the same, so that any of them knows what the oracle says.
    expected = next(iter(enforcers.values()))[0].oracle.expected()
    allowed = {probe for probe, passes in expected.items() if passes}
    for backend, (_, prober) in enforcers.items():
        assert prober.round(expected, allowed) == allowed, backend


@bounded
@given(objects.worlds())
def test_the_kernel_does_what_the_oracle_says(enforcers: Enforcers, world: dict[Key, JSON]) -> None:
    check(enforcers, world)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(bounded, max_examples=300)
@given(objects.worlds())
def test_the_kernel_does_what_the_oracle_says_in_many_worlds(
    enforcers: Enforcers, world: dict[Key, JSON]
) -> None:
    check(enforcers, world)
