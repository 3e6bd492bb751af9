"""Kubernetes objects → what the engine takes: policies, profiles, what endpoints carry.

The result is Calico's: policies of order 1000 in the tier ``default``; namespaces and
service accounts as profiles (``kns.…``, ``ksa.…``), whose labels pods inherit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from api import pods
from api.endpoint import WorkloadEndpointPort
from api.fields import parse_port, protocol_number
from api.kubernetes import (
    KubernetesMeta,
    KubernetesNetworkPolicy,
    LabelSelector,
    LabelSelectorRequirement,
    Namespace,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    Pod,
)
from api.metadata import ObjectMeta
from api.net import Net, parse_interface, parse_net
from api.policy import (
    EntityRule,
    GlobalNetworkPolicy,
    NetworkPolicy,
    NetworkPolicySpec,
    PolicyType,
    Rule,
)
from api.services import EndpointSlice
from api.staged import (
    StagedGlobalNetworkPolicy,
    StagedGlobalNetworkPolicySpec,
    StagedKubernetesNetworkPolicy,
    StagedKubernetesNetworkPolicySpec,
    StagedNetworkPolicy,
)
from policy import labels
from policy.engine import Profile
from policy.model import NamedPort, ServiceSlice

ORDER = 1000.0

_ALLOW_ALL = (Rule(action="Allow"),)


def network_policy(policy: KubernetesNetworkPolicy) -> NetworkPolicy:
    """The v3 policy that means the same as a Kubernetes one.

    Absent ``policyTypes`` are taken as the Kubernetes API server defaults them: Ingress, and
    Egress where there are egress rules. The result isn't validated: Kubernetes allows names
    and lengths that v3 refuses.
    """
    spec = policy.spec
    wanted = spec.policy_types or (["Ingress", "Egress"] if spec.egress else ["Ingress"])
    types: tuple[PolicyType, ...] = ("Ingress", "Egress")
    return NetworkPolicy.model_construct(
        metadata=ObjectMeta.model_construct(name=policy.name, namespace=policy.namespace),
        spec=NetworkPolicySpec.model_construct(
            order=ORDER,
            selector=pod_selector(spec.pod_selector),
            types=[type for type in types if type in wanted],
            ingress=[
                _rule(index, protocol, source=peer, destination={"ports": ports})
                for index, rule in enumerate(spec.ingress)
                for protocol, ports in _ports(rule.ports)
                for peer in _peers(rule.from_)
            ],
            egress=[
                _rule(index, protocol, source={}, destination={"ports": ports, **peer})
                for index, rule in enumerate(spec.egress)
                for protocol, ports in _ports(rule.ports)
                for peer in _peers(rule.to)
            ],
        ),
    )


def staged_policy(
    draft: StagedNetworkPolicy | StagedGlobalNetworkPolicy | StagedKubernetesNetworkPolicy,
) -> NetworkPolicy | GlobalNetworkPolicy | None:
    """The policy that a draft would be; None where it stands for a deletion.

    To be given to the engine under the draft's own kind: that keeps it from deciding anything.
    """
    spec = draft.spec
    if spec.staged_action == "Delete":
        return None
    if isinstance(spec, StagedKubernetesNetworkPolicySpec):
        metadata = KubernetesMeta.model_construct(name=draft.name, namespace=draft.namespace)
        return network_policy(KubernetesNetworkPolicy.model_construct(metadata=metadata, spec=spec))
    # The draft's spec is one of the policy, too.
    if isinstance(spec, StagedGlobalNetworkPolicySpec):
        return GlobalNetworkPolicy.model_construct(metadata=draft.metadata, spec=spec)
    return NetworkPolicy.model_construct(metadata=draft.metadata, spec=spec)


def service_slice(found: EndpointSlice) -> ServiceSlice | None:
    """The endpoints of a service, whether ready or not; None: of no service, or names.

    A port without a number is no port at all, as in Calico.
    """
    if not found.service or found.address_type == "FQDN":
        return None
    addresses = (text for endpoint in found.endpoints for text in endpoint.addresses)
    ports = ((protocol_number(port.protocol), port.port) for port in found.ports)
    return ServiceSlice(
        f"{found.namespace}/{found.service}",
        tuple(dict.fromkeys(parse_net(text, strict=False) for text in addresses)),
        tuple(sorted({(protocol, port) for protocol, port in ports if port})),
    )


def namespace_profile(namespace: Namespace) -> tuple[str, Profile]:
    """The profile of all pods in a namespace: its labels, and everything is allowed."""
    own = _inherited(labels.NAMESPACE_PREFIX, namespace.name, namespace.metadata.labels)
    return pods.namespace_profile(namespace.name), Profile(own, _ALLOW_ALL, _ALLOW_ALL)


def service_account_profile(
    namespace: str, name: str, account_labels: Mapping[str, str]
) -> tuple[str, Profile]:
    """The profile of all pods of a service account: its labels, and no rules."""
    own = _inherited(labels.SERVICE_ACCOUNT_PREFIX, name, account_labels)
    return pods.account_profile(namespace, name), Profile(own)


def pod_profiles(pod: Pod) -> tuple[str, ...]:
    """Names of the profiles a pod has: that of its namespace and that of its service account."""
    return pods.profiles(pod.namespace, pod.spec.service_account_name)


def pod_labels(pod: Pod) -> dict[str, str]:
    """A pod's labels and those that say where it comes from, which a pod can't choose."""
    return pods.labels(pod.metadata.labels, pod.namespace, pod.spec.service_account_name)


def pod_finished(pod: Pod) -> bool:
    """Whether a pod is over and its addresses may already be another's.

    While a pod is being deleted it still runs, until the CNI plugin empties its annotation.
    """
    metadata = pod.metadata
    return pods.finished(pod.status.phase, bool(metadata.deletion_timestamp), metadata.annotations)


def pod_nets(pod: Pod) -> tuple[Net, ...]:
    """A pod's addresses, none once it has finished. The status wins over the annotations.

    Raises ValueError when one isn't an address.
    """
    if pod_finished(pod):
        return ()
    known = [address.ip for address in pod.status.pod_ips if address.ip]
    texts = pods.addresses(pod.status.pod_ip, known, pod.metadata.annotations)
    return tuple(parse_interface(text)[0] for text in texts)


def pod_ports(pod: Pod) -> list[WorkloadEndpointPort]:
    """A pod's ports that have a name or are mapped to the host, as its endpoint lists them."""
    return [
        WorkloadEndpointPort.model_construct(
            name=port.name,
            protocol=port.protocol,
            port=port.container_port,
            host_port=port.host_port,
            host_ip=port.host_ip,
        )
        for container in (*pod.spec.containers, *pod.spec.init_containers)
        for port in container.ports
        if port.name or port.host_port
    ]


def named_ports(ports: Iterable[WorkloadEndpointPort]) -> tuple[NamedPort, ...]:
    """Those of an endpoint's ports that have a name, as the engine takes them."""
    return tuple(
        NamedPort(port.name, protocol_number(port.protocol), port.port)
        for port in ports
        if port.name
    )


def _inherited(prefix: str, name: str, own: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(pods.inherited_labels(prefix, name, own).items()))


def _rule(
    position: int,
    protocol: str | None,
    *,
    source: Mapping[str, Any],
    destination: Mapping[str, Any],
) -> Rule:
    return Rule.model_construct(
        action="Allow",
        protocol=protocol,
        source=EntityRule.model_construct(**source),
        destination=EntityRule.model_construct(**destination),
    ).made_from(position)


def _ports(
    ports: Sequence[NetworkPolicyPort],
) -> list[tuple[str | None, list[int | str]]]:
    """Protocol and ports of the rules to write, one for each protocol; no ports: all of it."""
    if not ports:
        return [(None, [])]
    by_protocol: dict[str, list[int | str] | None] = {}  # None: every port
    for port in ports:
        known = by_protocol.setdefault(port.protocol, [])
        if port.port is None:
            by_protocol[port.protocol] = None
        elif known is not None:
            known.append(_port(port.port, port.end_port))
    return [(name, merged_ports(found or [])) for name, found in sorted(by_protocol.items())]


def _port(port: int | str, end: int | None) -> int | str:
    if isinstance(port, str) and port.isdecimal():
        port = int(port)
    return port if end is None or end == port else f"{port}:{end}"


def merged_ports(ports: list[int | str]) -> list[int | str]:
    """Names first, then numbers in order, adjoining and overlapping ones as ranges."""
    ranges = sorted(numbers for port in ports if (numbers := parse_port(port)))
    if len(ranges) <= 1 and all(first == last for first, last in ranges):
        return ports
    merged: list[tuple[int, int]] = []
    for first, last in ranges:
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    names = [port for port in ports if parse_port(port) is None]
    return names + [_port(first, last) for first, last in merged]


def _peers(peers: Sequence[NetworkPolicyPeer]) -> Iterator[dict[str, Any]]:
    """The conditions for each peer; none at all when there is no peer."""
    for peer in peers:
        if peer.ip_block is not None:
            yield {
                "nets": [_network(peer.ip_block.cidr)],
                "not_nets": [_network(text) for text in peer.ip_block.except_],
            }
        else:
            yield {
                "selector": pod_selector(peer.pod_selector),
                "namespace_selector": namespace_selector(peer.namespace_selector),
            }
    if not peers:
        yield {}


def _network(text: str) -> str:
    return str(parse_net(text, strict=False))


def pod_selector(selector: LabelSelector | None) -> str:
    """Pods by their labels, as a selector; None: all pods. Never anything but a pod."""
    conditions = [f"{labels.ORCHESTRATOR} == 'k8s'"]
    if selector is not None:
        conditions += _conditions(selector)
    return " && ".join(conditions)


def namespace_selector(selector: LabelSelector | None) -> str:
    """Namespaces by their labels, as a selector; None: no condition."""
    if selector is None:
        return ""
    return " && ".join(_conditions(selector)) or "all()"


def _conditions(selector: LabelSelector) -> list[str]:
    """Keys and values are validated label keys and values: nothing in them needs quoting."""
    equal = [f"{key} == '{value}'" for key, value in sorted(selector.match_labels.items())]
    return equal + [_condition(requirement) for requirement in selector.match_expressions]


def _condition(requirement: LabelSelectorRequirement) -> str:
    key = requirement.key
    values = "', '".join(requirement.values)
    match requirement.operator:
        case "In":
            return f"{key} in {{ '{values}' }}"
        case "NotIn":
            return f"{key} not in {{ '{values}' }}"
        case "Exists":
            return f"has({key})"
        case "DoesNotExist":
            return f"! has({key})"
