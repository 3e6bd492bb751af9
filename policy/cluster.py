"""Policies of cluster administrators → what the engine takes.

``ClusterNetworkPolicy`` becomes a global policy in the tier ``kube-admin`` or ``kube-baseline``,
its priority the order. ``AdminNetworkPolicy`` and ``BaselineAdminNetworkPolicy`` are what came
before it, and are read as such policies; the latter, which has no priority, is the last of its
tier.

A rule that means nodes or domain names can't be converted, and fails closed: one that accepts
is left out, any other denies everything in its direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from api.adminnetworkpolicy import (
    AdminEgressRule,
    AdminIngressRule,
    AdminNetworkPolicy,
    AdminPort,
    BaselineAdminNetworkPolicy,
)
from api.clusternetworkpolicy import (
    ClusterNetworkPolicy,
    ClusterNetworkPolicyEgressRule,
    ClusterNetworkPolicyIngressRule,
    DestinationPort,
    EgressPeer,
    IngressPeer,
    ProtocolMatch,
    Subject,
)
from api.errors import Problem
from api.kubernetes import LabelSelector
from api.metadata import ObjectMeta
from api.net import parse_net
from api.policy import EntityRule, GlobalNetworkPolicy, GlobalNetworkPolicySpec, PolicyType, Rule
from policy.convert import merged_ports, namespace_selector, pod_selector

TIERS = {"Admin": "kube-admin", "Baseline": "kube-baseline"}

_ACTIONS: dict[str, Literal["Allow", "Deny", "Pass"]] = {
    "Accept": "Allow",
    "Allow": "Allow",
    "Deny": "Deny",
    "Pass": "Pass",
}

AnyRule = (
    ClusterNetworkPolicyIngressRule
    | ClusterNetworkPolicyEgressRule
    | AdminIngressRule
    | AdminEgressRule
)
AnyAdminPolicy = ClusterNetworkPolicy | AdminNetworkPolicy | BaselineAdminNetworkPolicy
# Protocol (None: any) and its ports (none: all of them).
_Ports = tuple[str | None, list[int | str]]


def global_policy(policy: AnyAdminPolicy) -> tuple[GlobalNetworkPolicy, tuple[Problem, ...]]:
    """The global policy that means the same, and what of it couldn't be converted.

    The policy applies in the directions in which it has rules. The result isn't validated.
    """
    problems: list[Problem] = []
    ingress = list(_rules("ingress", policy.spec.ingress, problems))
    egress = list(_rules("egress", policy.spec.egress, problems))
    types: list[PolicyType] = []
    if policy.spec.ingress:
        types.append("Ingress")
    if policy.spec.egress:
        types.append("Egress")
    tier, order = _place(policy)
    pods, namespaces = subject_selectors(policy.spec.subject)
    return (
        GlobalNetworkPolicy.model_construct(
            metadata=ObjectMeta.model_construct(name=policy.name),
            spec=GlobalNetworkPolicySpec.model_construct(
                tier=tier,
                order=order,
                selector=pods,
                namespace_selector=namespaces,
                types=types,
                ingress=ingress,
                egress=egress,
            ),
        ),
        tuple(problems),
    )


def _place(policy: AnyAdminPolicy) -> tuple[str, float | None]:
    if isinstance(policy, ClusterNetworkPolicy):
        return TIERS[policy.spec.tier], float(policy.spec.priority)
    if isinstance(policy, AdminNetworkPolicy):
        return TIERS["Admin"], float(policy.spec.priority)
    return TIERS["Baseline"], None


def subject_selectors(subject: Subject) -> tuple[str, str]:
    """Selectors of pods (never of hosts) and of namespaces."""
    if subject.pods is not None:
        pods = subject.pods
        return pod_selector(pods.pod_selector), namespace_selector(pods.namespace_selector)
    return pod_selector(None), namespace_selector(subject.namespaces)


def _rules(direction: str, rules: Sequence[AnyRule], problems: list[Problem]) -> Iterator[Rule]:
    for index, rule in enumerate(rules):
        peers = rule.from_ if isinstance(rule, _INGRESS) else rule.to
        wrong = list(_unsupported(peers, f"spec.{direction}[{index}]"))
        if not wrong:
            yield from (made.made_from(index) for made in _converted(rule, peers))
        elif _ACTIONS[rule.action] != "Allow":
            yield Rule.model_construct(action="Deny").made_from(index)
        problems += wrong


_INGRESS = (ClusterNetworkPolicyIngressRule, AdminIngressRule)


def _unsupported(peers: Sequence[IngressPeer | EgressPeer], where: str) -> Iterator[Problem]:
    for index, peer in enumerate(peers):
        if isinstance(peer, EgressPeer):
            for field, value in (("nodes", peer.nodes), ("domainNames", peer.domain_names)):
                if value is not None:
                    yield Problem(
                        f"{where}.to[{index}].{field}",
                        "set",
                        "namespaces, pods or networks: the rest is not supported, and this rule"
                        " allows nothing",
                    )


def _converted(rule: AnyRule, peers: Sequence[IngressPeer | EgressPeer]) -> Iterator[Rule]:
    """A rule for each protocol and peer."""
    ingress = isinstance(rule, _INGRESS)
    for protocol, ports in _protocols(rule):
        for peer in map(_peer, peers):
            source = peer if ingress else {}
            destination = {"ports": ports} | ({} if ingress else peer)
            yield Rule.model_construct(
                action=_ACTIONS[rule.action],
                protocol=protocol,
                source=EntityRule.model_construct(**source),
                destination=EntityRule.model_construct(**destination),
            )


def _peer(peer: IngressPeer | EgressPeer) -> dict[str, Any]:
    if peer.pods is not None:
        return {
            "selector": pod_selector(peer.pods.pod_selector),
            "namespace_selector": namespace_selector(peer.pods.namespace_selector),
        }
    if isinstance(peer, EgressPeer) and peer.networks is not None:
        return {"nets": [str(parse_net(text, strict=False)) for text in peer.networks]}
    namespaces: LabelSelector | None = peer.namespaces
    # Pods only: a network set of a namespace is none of Kubernetes' business.
    return {
        "selector": pod_selector(None),
        "namespace_selector": namespace_selector(namespaces),
    }


def _protocols(rule: AnyRule) -> list[_Ports]:
    if isinstance(rule, AdminIngressRule | AdminEgressRule):
        found = list(map(_admin_port, rule.ports))
    else:
        found = list(map(_protocol, rule.protocols))
    if not found:
        return [(None, [])]
    by_protocol: dict[str | None, list[int | str]] = {}
    for protocol, port in found:
        by_protocol.setdefault(protocol, []).append(port)
    return [
        (protocol, merged_ports(ports))
        for protocol, ports in sorted(by_protocol.items(), key=lambda item: item[0] or "")
    ]


def _protocol(match: ProtocolMatch) -> tuple[str | None, int | str]:
    for protocol, ports in (("TCP", match.tcp), ("UDP", match.udp), ("SCTP", match.sctp)):
        if ports is not None:
            return protocol, _port(ports.destination_port)
    assert match.destination_named_port is not None, "one of the fields is set"
    return None, match.destination_named_port


def _port(port: DestinationPort) -> int | str:
    if port.number is not None:
        return port.number
    assert port.range is not None, "one of the fields is set"
    return f"{port.range.start}:{port.range.end}"


def _admin_port(port: AdminPort) -> tuple[str | None, int | str]:
    if port.port_number is not None:
        return port.port_number.protocol, port.port_number.port
    if port.port_range is not None:
        return port.port_range.protocol, f"{port.port_range.start}:{port.port_range.end}"
    assert port.named_port is not None, "one of the fields is set"
    return None, port.named_port
