"""How many verdicts a second the policy engine gives, on one core.

1,000 policies, of which 20 apply to each endpoint; 250 endpoints of this node among 1,000. Flows
are between any local endpoint and any other, or an outside address, to ports that rules name and
to others.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from api.net import host_net, parse_net
from api.policy import NetworkPolicy
from api.registry import parse_as
from policy.engine import Engine, Profile
from policy.evaluate import Flow, evaluate
from policy.evaluator import Evaluator
from policy.model import Endpoint, EndpointId, NamedPort, PolicyId

POLICIES = 1000
POLICIES_EACH = 20
ENDPOINTS = 1000
LOCAL = 250
FLOWS = 50_000
REFERENCE_FLOWS = 500

_APPS = POLICIES // POLICIES_EACH
_FIRST = parse_net("10.0.0.0").address
_OUTSIDE = parse_net("192.0.2.0").address


def measure() -> dict[str, float]:
    """Verdicts a second, each with all that was looked at: warm, cold, and of the reference."""
    engine, flows = world(random.Random(1))
    evaluator = Evaluator(engine)
    few = flows[:REFERENCE_FLOWS]
    cold = _per_second(evaluator.evaluate, flows)
    warm = _per_second(evaluator.evaluate, flows)
    looked_at = sum(len(evaluator.evaluate(flow).trace) for flow in flows)
    return {
        "evaluate_per_s": warm,
        "evaluate_cold_per_s": cold,
        "evaluate_reference_per_s": _per_second(lambda flow: evaluate(engine, flow), few),
        "evaluate_steps_each": looked_at / len(flows),
    }


def world(chance: random.Random) -> tuple[Engine, list[Flow]]:
    """The engine, flushed, and the flows."""
    engine = Engine()
    engine.set_profile("kns.default", Profile())
    for number in range(ENDPOINTS):
        endpoint = _endpoint(number)
        engine.set_endpoint(endpoint, endpoint.id)
    for number in range(POLICIES):
        policy = _policy(number, chance)
        engine.set_policy(PolicyId("NetworkPolicy", "default", policy.name), policy)
    engine.flush()
    return engine, [_flow(chance) for _ in range(FLOWS)]


def _id(number: int) -> EndpointId:
    return EndpointId("WorkloadEndpoint", "default", f"pod-{number}")


def _endpoint(number: int) -> Endpoint:
    labels = {
        "projectcalico.org/namespace": "default",
        "projectcalico.org/orchestrator": "k8s",
        "app": f"app-{number % _APPS}",
        "tier": f"tier-{number % 3}",
    }
    net = host_net(4, _FIRST + number)
    ports = (NamedPort("http", 6, 8000 + number % 3),)
    return Endpoint(
        _id(number),
        tuple(sorted(labels.items())),
        ("kns.default",),
        (net,),
        ports,
        local=number < LOCAL,
    )


def _policy(number: int, chance: random.Random) -> NetworkPolicy:
    def rule(side: str) -> dict[str, object]:
        peer: dict[str, object] = chance.choice(
            [
                {"selector": f"app == 'app-{chance.randrange(_APPS)}'"},
                {"selector": f"tier in {{'tier-{chance.randrange(3)}', 'tier-9'}}"},
                {"nets": [f"192.0.2.{chance.randrange(0, 256, 16)}/28"]},
            ]
        )
        ports = chance.choice([[443], ["8000:8010"], ["http"], [53, 80, 443], []])
        sides: dict[str, dict[str, object]] = {"source": {}, "destination": {"ports": ports}}
        sides[side] = sides[side] | peer
        return {"action": chance.choice(["Allow", "Allow", "Deny"]), "protocol": "TCP", **sides}

    spec = {
        "order": number % POLICIES_EACH,
        "selector": f"app == 'app-{number // POLICIES_EACH}'",
        "types": ["Ingress", "Egress"],
        "ingress": [rule("source") for _ in range(2)],
        "egress": [rule("destination") for _ in range(2)],
    }
    metadata = {"name": f"policy-{number}", "namespace": "default"}
    policy = parse_as("NetworkPolicy", {"metadata": metadata, "spec": spec})
    assert isinstance(policy, NetworkPolicy)
    return policy


def _flow(chance: random.Random) -> Flow:
    local, other = chance.randrange(LOCAL), chance.randrange(ENDPOINTS)
    own = host_net(4, _FIRST + local)
    if chance.random() < 0.1:
        peer, peer_id = host_net(4, _OUTSIDE + chance.randrange(256)), None
    else:
        peer = host_net(4, _FIRST + other)
        peer_id = _id(other) if other < LOCAL else None
    port = chance.choice([53, 80, 443, 8001, chance.randrange(1, 65536)])
    source_port = chance.randrange(32768, 61000)
    if chance.random() < 0.5:
        return Flow(own, peer, 6, source_port, port, None, None, _id(local), peer_id)
    return Flow(peer, own, 6, source_port, port, None, None, peer_id, _id(local))


def _per_second(decide: Callable[[Flow], object], flows: list[Flow]) -> float:
    start = time.process_time()
    for flow in flows:
        decide(flow)
    return len(flows) / (time.process_time() - start)
