"""Short ways to put endpoints, namespaces and policies into an engine, and to ask it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.kubernetes import KubernetesNetworkPolicy, Namespace
from api.net import Net, parse_net
from api.policy import GlobalNetworkPolicy, NetworkPolicy, Tier
from api.registry import parse_as
from api.staged import StagedNetworkPolicy
from policy import convert, labels
from policy.engine import Changes, Engine
from policy.evaluate import Flow, Verdict, evaluate
from policy.model import Action, Endpoint, EndpointBinding, EndpointId, NamedPort, PolicyId

PROTOCOLS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132}


def endpoint_id(name: str, namespace: str = "ns") -> EndpointId:
    return EndpointId("WorkloadEndpoint", namespace, name)


def endpoint(
    name: str,
    *addresses: str,
    namespace: str = "ns",
    own: Mapping[str, str] | None = None,
    ports: tuple[NamedPort, ...] = (),
    local: bool = True,
    profiles: tuple[str, ...] | None = None,
) -> Endpoint:
    """A pod's endpoint, with the labels and profiles that pods have."""
    pod_labels = {**(own or {}), labels.NAMESPACE: namespace, labels.ORCHESTRATOR: "k8s"}
    return Endpoint(
        endpoint_id(name, namespace),
        tuple(sorted(pod_labels.items())),
        (f"kns.{namespace}",) if profiles is None else profiles,
        tuple(parse_net(address) for address in addresses),
        ports,
        local,
    )


def host_endpoint(
    name: str,
    *addresses: str,
    own: Mapping[str, str] | None = None,
    local: bool = True,
    profiles: tuple[str, ...] = (),
) -> Endpoint:
    nets = tuple(parse_net(address) for address in addresses)
    id = EndpointId("HostEndpoint", "", name)
    return Endpoint(id, tuple(sorted((own or {}).items())), profiles, nets, local=local)


def network_set(
    name: str, *nets: str, namespace: str = "", own: Mapping[str, str] | None = None
) -> Endpoint:
    kind = "NetworkSet" if namespace else "GlobalNetworkSet"
    added = {labels.NAMESPACE: namespace} if namespace else {}
    return Endpoint(
        EndpointId(kind, namespace, name),
        tuple(sorted({**(own or {}), **added}.items())),
        (f"kns.{namespace}",) if namespace else (),
        tuple(parse_net(net) for net in nets),
    )


def staged(spec: dict[str, Any], *, name: str = "s", namespace: str = "ns") -> StagedNetworkPolicy:
    obj = {"metadata": {"name": name, "namespace": namespace}, "spec": spec}
    parsed = parse_as("StagedNetworkPolicy", obj)
    assert isinstance(parsed, StagedNetworkPolicy)
    return parsed


def policy(spec: dict[str, Any], *, name: str = "p", namespace: str = "ns") -> NetworkPolicy:
    obj = {"metadata": {"name": name, "namespace": namespace}, "spec": spec}
    parsed = parse_as("NetworkPolicy", obj)
    assert isinstance(parsed, NetworkPolicy)
    return parsed


def global_policy(spec: dict[str, Any], *, name: str = "g") -> GlobalNetworkPolicy:
    parsed = parse_as("GlobalNetworkPolicy", {"metadata": {"name": name}, "spec": spec})
    assert isinstance(parsed, GlobalNetworkPolicy)
    return parsed


def policy_id(policy: NetworkPolicy | GlobalNetworkPolicy) -> PolicyId:
    return PolicyId(policy.kind, policy.namespace, policy.name)


def binding_of(engine: Engine, id: EndpointId) -> EndpointBinding:
    """What decides about a workload."""
    binding = engine.endpoints[id]
    assert isinstance(binding, EndpointBinding)
    return binding


class World:
    """An engine that remembers addresses: flows are asked for by the names of endpoints."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.nets: dict[EndpointId, tuple[Net, ...]] = {}

    def namespace(self, name: str, own: Mapping[str, str] | None = None) -> None:
        parsed = parse_as("Namespace", {"metadata": {"name": name, "labels": dict(own or {})}})
        assert isinstance(parsed, Namespace)
        self.engine.set_profile(*convert.namespace_profile(parsed))

    def add(
        self, *added: Endpoint | NetworkPolicy | GlobalNetworkPolicy | StagedNetworkPolicy
    ) -> None:
        for thing in added:
            if isinstance(thing, StagedNetworkPolicy):
                id = PolicyId(thing.kind, thing.namespace, thing.name)
                self.engine.set_policy(id, convert.staged_policy(thing))
            elif isinstance(thing, Endpoint):
                self.nets[thing.id] = thing.nets
                self.engine.set_endpoint(thing, thing.id)
            else:
                self.engine.set_policy(policy_id(thing), thing)

    def remove(self, removed: NetworkPolicy | GlobalNetworkPolicy) -> None:
        self.engine.set_policy(policy_id(removed), None)

    def kubernetes_policy(self, obj: dict[str, Any]) -> None:
        parsed = parse_as("KubernetesNetworkPolicy", obj)
        assert isinstance(parsed, KubernetesNetworkPolicy)
        id = PolicyId("KubernetesNetworkPolicy", parsed.namespace, parsed.name)
        self.engine.set_policy(id, convert.network_policy(parsed))

    def tier(self, name: str, **spec: object) -> None:
        parsed = parse_as("Tier", {"metadata": {"name": name}, "spec": spec})
        assert isinstance(parsed, Tier)
        self.engine.set_tier(name, parsed)

    def flush(self) -> Changes:
        return self.engine.flush()

    def verdict(
        self,
        src: EndpointId | str,
        dst: EndpointId | str,
        protocol: str = "TCP",
        port: int | None = 80,
        **more: Any,
    ) -> Verdict:
        """``src`` and ``dst`` are endpoints (names in ``ns`` are enough) or outside addresses."""
        self.flush()
        source, source_net = self._end(src)
        destination, destination_net = self._end(dst)
        if protocol.startswith("ICMP"):
            port = None
        flow = Flow(
            source_net,
            destination_net,
            PROTOCOLS[protocol],
            src_port=more.pop("src_port", None if port is None else 40000),
            dst_port=port,
            src_endpoint=source,
            dst_endpoint=destination,
            **more,
        )
        return evaluate(self.engine, flow)

    def allows(self, *args: Any, **more: Any) -> bool:
        return self.verdict(*args, **more).action is Action.ALLOW

    def _end(self, end: EndpointId | str) -> tuple[EndpointId | None, Net]:
        id = endpoint_id(end) if isinstance(end, str) else end
        if id in self.nets:
            return id, self.nets[id][0]
        assert isinstance(end, str), f"no such endpoint: {end}"
        return None, parse_net(end)
