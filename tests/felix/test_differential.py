"""The oracle and the kernel agree: drawn worlds of all kinds of policy, real packets.

Every enforcer lives through all examples, so what one of them leaves behind would show in the
next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from datastore.interface import JSON, Key
from tests.felix.crossroads import Crossroads
from tests.felix.fabric import MAKERS
from tests.felix.world import felix_configuration
from tests.policy import objects
from tests.policy.objects import GIVEN, POOLS
from tests.support.probes import Prober

pytestmark = pytest.mark.timeout(600)  # many examples, each with much to do for the kernel

Enforcers = dict[str, tuple[Crossroads, Prober]]
bounded = settings(
    max_examples=50,
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


def look_again(enforcers: Enforcers) -> None:
    """The kernel tells of what was written that it is as it should be."""
    for backend, (place, _) in enforcers.items():
        place.brain.settle()
        place.brain.read()
        assert place.brain.apply() == 0, backend


@bounded
@given(objects.worlds())
def test_the_kernel_does_what_the_oracle_says(enforcers: Enforcers, world: dict[Key, JSON]) -> None:
    check(enforcers, world)


def plain(*objects: JSON, **settings: Any) -> dict[Key, JSON]:
    """The namespaces and one pod, these objects, and settings of felix."""
    world = {key: pool[0] for key, pool in POOLS.items() if key in GIVEN}
    for obj in (*objects, felix_configuration("default", **settings)):
        world[Key(obj["kind"], obj["metadata"]["name"])] = obj
    return world


def test_pods_answer_their_node_where_what_is_allowed_is_returned(enforcers: Enforcers) -> None:
    returns = {f"{enforcer}FilterAllowAction": "Return" for enforcer in ("iptables", "nftables")}
    check(enforcers, plain(**returns, defaultEndpointToHostAction="Drop"))
    look_again(enforcers)


def test_what_was_written_is_known_again(enforcers: Enforcers) -> None:
    """Rules of all kinds, as each enforcer writes them."""
    spec = {"natOutgoing": True, "vxlanMode": "Never", "ipipMode": "Never"}
    pool = {"kind": "IPPool", "metadata": {"name": "p"}, "spec": {"cidr": "10.0.0.0/24", **spec}}
    rejects = {f"{enforcer}FilterDenyAction": "Reject" for enforcer in ("iptables", "nftables")}
    strict = {"serviceLoopPrevention": "Reject", "workloadSourceSpoofing": "Any", **rejects}
    ports = {"natPortRange": "1024:2047"}
    for some in ({}, strict, ports, {"natOutgoingAddress": "172.31.0.1", **ports}):
        for place, _ in enforcers.values():
            place.become(plain(pool, **some))
        look_again(enforcers)


def test_hooks_go_while_their_place_changes(
    enforcers: Enforcers, caplog: pytest.LogCaptureFixture
) -> None:
    host = next(iter(POOLS[Key("HostEndpoint", "near")]))
    check(enforcers, plain(host, chainInsertMode="Insert"))
    check(enforcers, plain(chainInsertMode="Append"))
    assert caplog.messages == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(bounded, max_examples=300)
@given(objects.worlds())
def test_the_kernel_does_what_the_oracle_says_in_many_worlds(
    enforcers: Enforcers, world: dict[Key, JSON]
) -> None:
    check(enforcers, world)
    look_again(enforcers)
