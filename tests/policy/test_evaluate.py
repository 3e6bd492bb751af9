"""The verdict: against a naive reading of the objects, and what it says beside the action."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings

from api.net import Net
from policy.engine import Engine
from policy.evaluate import Flow, evaluate
from policy.model import Action, EndpointId
from tests.policy import strategies
from tests.policy.naive import State
from tests.policy.test_engine import apply

PACKETS: tuple[dict[str, Any], ...] = (
    {"protocol": 6, "src_port": 40000, "dst_port": 80},
    {"protocol": 6, "src_port": 80, "dst_port": 8005},
    {"protocol": 17, "src_port": 40000, "dst_port": 81},
    {"protocol": 1, "icmp_type": 8, "icmp_code": 0},
    {"protocol": 1, "icmp_type": 8, "icmp_code": 1},
    {"protocol": 1, "icmp_type": 0, "icmp_code": 0},
    {"protocol": 47},
)


@settings(max_examples=120, deadline=None)
@given(strategies.worlds())
def test_agrees_with_a_naive_reading_of_the_objects(world: list[strategies.Change]) -> None:
    engine, state = Engine(), State()
    for change in world:
        apply(engine, change)
        state.put(change.table, change.key, change.value)
    engine.flush()
    for id, own, other, packet in probes(state):
        for flow in (
            Flow(own, other, src_endpoint=id, **packet),
            Flow(other, own, dst_endpoint=id, **packet),
        ):
            verdict = evaluate(engine, flow)
            assert (verdict.action is Action.ALLOW) is state.allows(flow), (flow, verdict)


def probes(state: State) -> Iterator[tuple[EndpointId, Net, Net, dict[str, Any]]]:
    """Each local endpoint's address with every other address and every packet."""
    for id, endpoint in state.endpoint.items():
        for own in endpoint.nets[:1] if endpoint.local else ():
            for other in (*strategies.ADDRESSES, *strategies.OUTSIDE):
                for packet in PACKETS if own.version == other.version else ():
                    yield id, own, other, packet
