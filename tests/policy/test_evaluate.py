"""The verdict: against a naive reading of the objects, and what it says beside the action."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import Net
from policy.engine import UNPLACED, Changes, Engine
from policy.evaluate import Flow, evaluate
from policy.evaluator import Evaluator
from policy.model import Action, EndpointId
from tests.policy import strategies
from tests.policy.naive import State
from tests.policy.test_engine import apply
from tests.policy.world import endpoint, global_policy, policy_id

PACKETS: tuple[dict[str, Any], ...] = (
    {"protocol": 6, "src_port": 40000, "dst_port": 80},
    {"protocol": 6, "src_port": 80, "dst_port": 8005},
    {"protocol": 17, "src_port": 40000, "dst_port": 81},
    {"protocol": 1, "icmp_type": 8, "icmp_code": 0},
    {"protocol": 1, "icmp_type": 8, "icmp_code": 1},
    {"protocol": 1, "icmp_type": 0, "icmp_code": 0},
    {"protocol": 47},
)


@settings(max_examples=60, deadline=None)
@given(strategies.worlds(), st.integers(0, 1000))
def test_agrees_with_a_naive_reading_of_the_objects(
    world: list[strategies.Change], seed: int
) -> None:
    engine, state = Engine(), State()
    for change in world:
        apply(engine, change)
        state.put(change.table, change.key, change.value)
    engine.flush()
    evaluator = Evaluator(engine)
    for flow in probes(state, random.Random(seed)):
        verdict = evaluate(engine, flow)
        assert (verdict.action is Action.ALLOW) is state.allows(flow), (flow, verdict)
        assert evaluator.evaluate(flow) == verdict, flow


@pytest.mark.parametrize("direction", strategies.RULES)
def test_each_rule_alone_agrees_with_a_naive_reading(direction: str) -> None:
    """In a drawn world what a rule does is often hidden by others."""
    engine, state = Engine(), State()
    own = endpoint("a", "10.0.0.1", "fd00::1", namespace="red", own={"app": "web"})
    apply(engine, strategies.Change("endpoint", own.id, own))
    state.put("endpoint", own.id, own)
    for rule in strategies.RULES[direction][:500]:
        written = global_policy({"types": [direction.title()], direction: [rule]})
        change = strategies.Change("policy", policy_id(written), written)
        apply(engine, change)
        state.put(change.table, change.key, change.value)
        engine.flush()
        for (net, far), packet in product(zip(own.nets, strategies.OUTSIDE, strict=True), PACKETS):
            if direction == "ingress":
                flow = Flow(far, net, dst_endpoint=own.id, **packet)
            else:
                flow = Flow(net, far, src_endpoint=own.id, **packet)
            allowed = evaluate(engine, flow).action is Action.ALLOW
            assert allowed is state.allows(flow), (rule, flow)


@settings(max_examples=30, deadline=None)
@given(
    strategies.worlds(),
    st.lists(st.lists(strategies.changes(), min_size=1, max_size=3), max_size=5),
    st.integers(0, 1000),
)
def test_decisions_follow_changes(
    world: list[strategies.Change],
    batches: list[list[strategies.Change]],
    seed: int,
) -> None:
    engine, state = Engine(), State()
    evaluator = Evaluator(engine)
    for batch in (world, *batches):
        for change in batch:
            apply(engine, change)
            state.put(change.table, change.key, change.value)
        evaluator.update(engine.flush())
        for flow in probes(state, random.Random(seed)):
            assert evaluator.evaluate(flow) == evaluate(engine, flow), flow


@settings(max_examples=60, deadline=None)
@given(
    strategies.worlds(),
    st.lists(st.lists(strategies.changes(), min_size=1, max_size=3), max_size=5),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_policy_changes_while_decisions_are_prepared(
    world: list[strategies.Change],
    batches: list[list[strategies.Change]],
    pace: int,
    seed: int,
) -> None:
    engine, state = Engine(), State()

    def change(batch: list[strategies.Change]) -> Changes:
        for each in batch:
            apply(engine, each)
            state.put(each.table, each.key, each.value)
        return engine.flush()

    change(world)
    with mock.patch("policy.evaluator._STEP", 1):
        evaluator = Evaluator(engine, in_steps=True)
        steps = evaluator.prepare()
        for batch in batches:
            for _ in islice(steps, pace):
                pass
            evaluator.update(change(batch))
        for _ in steps:
            pass
    for flow in probes(state, random.Random(seed)):
        assert evaluator.evaluate(flow) == evaluate(engine, flow), flow


@settings(max_examples=30, deadline=None)
@given(strategies.worlds(), st.integers(0, 1000))
def test_a_tier_of_which_nobody_knows_where_it_stands_opens_nothing(
    world: list[strategies.Change], seed: int
) -> None:
    """Wherever it may turn out to stand, and whatever its end may be."""
    engine, state = Engine(), State()
    for change in world:
        apply(engine, change)
        state.put(change.table, change.key, change.value)
    engine.set_tier("first", None)
    engine.flush()
    flows = list(probes(state, random.Random(seed)))
    allowed = [flow for flow in flows if evaluate(engine, flow).action is Action.ALLOW]
    for order in (1.0, 2_000.0, None, UNPLACED):
        for action in ("Deny", "Pass"):
            engine.set_tier("first", strategies.tier("first", order, action))
            engine.flush()
            for flow in allowed:
                assert evaluate(engine, flow).action is Action.ALLOW, (order, action, flow)


def probes(state: State, chance: random.Random) -> Iterator[Flow]:
    """Flows from, to and through local endpoints, some of all there may be."""
    local = [endpoint for endpoint in state.endpoint.values() if endpoint.local]
    everywhere = (*strategies.ADDRESSES, *strategies.OUTSIDE)
    for one in local:
        for own in one.nets[:1]:
            others = [net for net in everywhere if net.version == own.version]
            for other in others:
                packet = chance.choice(PACKETS)
                far = chance.choice([None, None, *(e.id for e in local)])
                yield from around(one.id, own, other, far, packet, chance)


def around(
    id: EndpointId,
    own: Net,
    other: Net,
    far: EndpointId | None,
    packet: dict[str, Any],
    chance: random.Random,
) -> Iterator[Flow]:
    """Flows between an endpoint and another address, which may be that of another endpoint."""
    entry, exit = (chance.choice([None, *strategies.HOSTS]) for _ in range(2))
    yield Flow(own, other, src_endpoint=id, dst_endpoint=far, exit=exit, **packet)
    incoming = Flow(other, own, src_endpoint=far, dst_endpoint=id, entry=entry, **packet)
    yield incoming
    yield replace(incoming, original_dst=own, original_dst_port=incoming.dst_port)
    before = chance.choice(strategies.OUTSIDE[:1] if own.version == 4 else strategies.OUTSIDE[1:])
    yield replace(incoming, original_dst=before, original_dst_port=80)
    yield Flow(other, own, entry=entry, exit=exit, **packet)
