"""Policy as its documentation reads, straight from the objects: slow, and without any index.

Works on addresses, as packets do: an address meets a selector when some endpoint that has
it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from api.fields import parse_port, protocol_number
from api.net import Net, parse_net
from api.policy import (
    BUILT_IN_TIERS,
    EntityRule,
    GlobalNetworkPolicy,
    ICMPFields,
    NetworkPolicy,
    Rule,
    ServiceMatch,
    Tier,
)
from policy import labels, selector
from policy.engine import Profile
from policy.evaluate import Flow
from policy.model import Endpoint, EndpointId, PolicyId, ServiceSlice

parse = cache(selector.parse)
network = cache(parse_net)

Policy = NetworkPolicy | GlobalNetworkPolicy
NORMAL, FORWARD, PRE_DNAT, UNTRACKED = "normal", "forward", "preDNAT", "doNotTrack"


@dataclass
class State:
    """All objects as they were set."""

    endpoint: dict[EndpointId, Endpoint] = field(default_factory=dict)
    profile: dict[str, Profile] = field(default_factory=dict)
    policy: dict[PolicyId, Policy] = field(default_factory=dict)
    tier: dict[str, Tier] = field(default_factory=dict)
    slice: dict[tuple[str, str], ServiceSlice] = field(default_factory=dict)

    def put(self, table: str, key: Any, value: Any) -> None:
        rows: dict[Any, Any] = getattr(self, table)
        if value is None:
            rows.pop(key, None)
        else:
            rows[key] = value

    def allows(self, flow: Flow) -> bool:
        """What happens to a flow: at hosts it passes, at its source, at its destination."""
        source, destination = flow.src_endpoint, flow.dst_endpoint
        verdicts: list[str | None] = []
        order: tuple[str, ...]
        if is_host(source) and destination is not None:
            return True
        if is_host(source):
            verdicts.append(self._of_host(source, flow, "Egress", (UNTRACKED, NORMAL)))
        elif is_host(destination) and source is not None:
            verdicts.append(self._of_host(flow.entry, flow, "Ingress", (PRE_DNAT,)))
        elif is_host(destination):
            order = (UNTRACKED, PRE_DNAT, NORMAL)
            verdicts.append(self._of_host(destination, flow, "Ingress", order))
        else:
            order = (PRE_DNAT, FORWARD) if source else (UNTRACKED, PRE_DNAT, FORWARD)
            verdicts.append(self._of_host(flow.entry, flow, "Ingress", order))
            verdicts.append(self._of_host(flow.exit, flow, "Egress", (FORWARD,)))
        if not is_host(source):
            verdicts.append(self._verdict(source, flow, "Egress", NORMAL))
        if not is_host(destination):
            verdicts.append(self._verdict(destination, flow, "Ingress", NORMAL))
        return "Deny" not in verdicts

    def _of_host(
        self, id: EndpointId | None, flow: Flow, direction: str, order: tuple[str, ...]
    ) -> str | None:
        """The first part that decides."""
        for part in order:
            before = flow
            if part in (UNTRACKED, PRE_DNAT) and flow.original_dst is not None:
                before = replace(flow, dst=flow.original_dst, dst_port=flow.original_dst_port)
            found = self._verdict(id, before, direction, part)
            if found:
                return found
        return None

    def _verdict(self, id: EndpointId | None, flow: Flow, direction: str, part: str) -> str | None:
        """Allow, Deny, or nothing is decided."""
        if id is None or id not in self.endpoint or not self.endpoint[id].local:
            return None
        endpoint = self.endpoint[id]
        selecting = [
            (policy_id, policy)
            for policy_id, policy in self.policy.items()
            if direction in policy.spec.types
            and part in parts_of(policy)
            and not policy_id.kind.startswith("Staged")
            and self._applies(policy, endpoint)
        ]
        for tier in sorted({policy.spec.tier for _, policy in selecting}, key=self._tier_order):
            mine = [(i, policy) for i, policy in selecting if policy.spec.tier == tier]
            verdict = "Pass" if part in (UNTRACKED, PRE_DNAT) else self._default_action(tier)
            for _, policy in sorted(mine, key=lambda each: policy_order(*each)):
                found = self._first(rules_of(policy.spec, direction), flow, direction, policy)
                if found:
                    unplaced = self._tier_order(tier)[0] == -math.inf
                    verdict = "Pass" if unplaced and found == "Allow" else found
                    break
            if verdict != "Pass":
                return verdict
        if part != NORMAL:
            return None
        for name in endpoint.profiles:
            if name not in self.profile:
                break
            found = self._first(rules_of(self.profile[name], direction), flow, direction, None)
            if found in ("Allow", "Deny"):
                return found
        return "Deny"

    def _first(
        self, rules: Iterable[Rule], flow: Flow, direction: str, policy: Policy | None
    ) -> str | None:
        for rule in rules:
            if rule.action != "Log" and self._rule_matches(rule, flow, direction, policy):
                return rule.action
        return None

    def _tier_order(self, name: str) -> tuple[float, str]:
        if name in BUILT_IN_TIERS:
            return BUILT_IN_TIERS[name][0], name
        if name in self.tier:
            order = self.tier[name].spec.order
            return math.inf if order is None else order, name
        return -math.inf, name

    def _default_action(self, name: str) -> str:
        if name in BUILT_IN_TIERS:
            return BUILT_IN_TIERS[name][1]
        return self.tier[name].spec.default_action if name in self.tier else "Deny"

    def _applies(self, policy: Policy, endpoint: Endpoint) -> bool:
        spec = policy.spec
        if isinstance(policy, GlobalNetworkPolicy):
            scope = self._namespace_matches(policy.spec.namespace_selector, endpoint)
        else:
            scope = endpoint.id.namespace == policy.namespace
        accounts = spec.service_account_selector
        return (
            scope
            and (not accounts or parse(accounts).matches(self._prefixed(endpoint, "pcsa.")))
            and parse(spec.selector).matches(self._labels(endpoint))
        )

    def _rule_matches(self, rule: Rule, flow: Flow, direction: str, policy: Policy | None) -> bool:
        number = None if rule.protocol is None else protocol_number(rule.protocol)
        excluded = None if rule.not_protocol is None else protocol_number(rule.not_protocol)
        version = {1: 4, 58: 6}.get(number or 0, rule.ip_version)
        return (
            version in (None, flow.src.version)
            and number in (None, flow.protocol)
            and excluded != flow.protocol
            and (rule.icmp is None or is_icmp(rule.icmp, flow))
            and (rule.not_icmp is None or not is_icmp(rule.not_icmp, flow))
            and self._side_matches(rule, flow, "source", direction == "Egress", policy)
            and self._side_matches(rule, flow, "destination", direction == "Ingress", policy)
        )

    def _side_matches(
        self, rule: Rule, flow: Flow, side: str, own: bool, policy: Policy | None
    ) -> bool:
        entity: EntityRule = getattr(rule, side)
        address, port = (flow.src, flow.src_port) if side == "source" else (flow.dst, flow.dst_port)
        namespace = policy.namespace if policy else ""
        accounts = entity.service_accounts
        if entity.services and not self._is_of_service(entity.services, side, flow, namespace):
            return False
        owners = [e for e in self.endpoint.values() if any(n.contains(address) for n in e.nets)]
        named = owners
        if (
            entity.selector
            or entity.namespace_selector
            or (accounts and (accounts.names or accounts.selector))
            or (namespace and entity.not_selector)
        ):
            named = [e for e in owners if self._entity_selects(entity, e, namespace)]
            if not named:
                return False
        elif entity.not_selector and self._any_matches(entity.not_selector, owners):
            return False
        elif own and policy and parts_of(policy) == (NORMAL,):
            named = [e for e in owners if self._applies(policy, e)]
        return (
            (not entity.nets or in_any(address, entity.nets))
            and (not entity.not_nets or is_of_version(address, entity.not_nets))
            and not in_any(address, entity.not_nets)
            and (not entity.ports or has_port(entity.ports, port, flow.protocol, named))
            and not has_port(entity.not_ports, port, flow.protocol, named)
        )

    def _is_of_service(self, service: ServiceMatch, side: str, flow: Flow, namespace: str) -> bool:
        name = f"{service.namespace or namespace}/{service.name}"
        slices = [found for found in self.slice.values() if found.service == name]
        if side == "source":
            return any(flow.src in found.nets for found in slices)
        return any(
            flow.dst in found.nets and (flow.protocol, flow.dst_port) in found.ports
            for found in slices
        )

    def _any_matches(self, selector: str, owners: Iterable[Endpoint]) -> bool:
        return any(parse(selector).matches(self._labels(owner)) for owner in owners)

    def _entity_selects(self, entity: EntityRule, endpoint: Endpoint, namespace: str) -> bool:
        if entity.namespace_selector:
            if not self._namespace_matches(entity.namespace_selector, endpoint):
                return False
        elif namespace and endpoint.id.namespace != namespace:
            return False
        accounts = entity.service_accounts
        if accounts:
            own = dict(endpoint.labels).get(labels.SERVICE_ACCOUNT)
            if accounts.names and own not in accounts.names:
                return False
            selector = parse(accounts.selector)
            if accounts.selector and not selector.matches(self._prefixed(endpoint, "pcsa.")):
                return False
        if entity.not_selector and self._any_matches(entity.not_selector, (endpoint,)):
            return False
        return parse(entity.selector).matches(self._labels(endpoint))

    def _namespace_matches(self, selector: str, endpoint: Endpoint) -> bool:
        inside = bool(endpoint.id.namespace)
        if selector in ("all()", "global()"):
            return inside is (selector == "all()")
        return parse(selector).matches(self._prefixed(endpoint, "pcns."))

    def _labels(self, endpoint: Endpoint) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in endpoint.profiles:
            if name in self.profile:
                found = {**dict(self.profile[name].labels), **found}
        return {**found, **dict(endpoint.labels)}

    def _prefixed(self, endpoint: Endpoint, prefix: str) -> dict[str, str]:
        """The labels of an endpoint's namespace or service account."""
        return {
            label.removeprefix(prefix): value
            for label, value in self._labels(endpoint).items()
            if label.startswith(prefix)
        }


def is_host(id: EndpointId | None) -> bool:
    return id is not None and id.kind == "HostEndpoint"


def parts_of(policy: Policy) -> tuple[str, ...]:
    """Which of a host's packets a policy is for."""
    if isinstance(policy, GlobalNetworkPolicy):
        if policy.spec.do_not_track:
            return (UNTRACKED,)
        if policy.spec.pre_dnat:
            return (PRE_DNAT,)
        if policy.spec.apply_on_forward:
            return (NORMAL, FORWARD)
    return (NORMAL,)


def policy_order(id: PolicyId, policy: Policy) -> tuple[float, str]:
    order = policy.spec.order
    return math.inf if order is None else order, f"{id.name}/{id.namespace}/{id.kind}"


def rules_of(rules: Any, direction: str) -> Iterable[Rule]:
    found: Iterable[Rule] = rules.ingress if direction == "Ingress" else rules.egress
    return found


def is_icmp(fields: ICMPFields, flow: Flow) -> bool:
    return fields.type in (None, flow.icmp_type) and fields.code in (None, flow.icmp_code)


def is_of_version(address: Net, nets: Iterable[str]) -> bool:
    return any(network(net).version == address.version for net in nets)


def in_any(address: Net, nets: Iterable[str]) -> bool:
    return any(network(net).contains(address) for net in nets)


def has_port(
    ports: Iterable[int | str], port: int | None, protocol: int, owners: Iterable[Endpoint]
) -> bool:
    for wanted in ports:
        numbers = parse_port(wanted)
        if numbers is None:
            if any(p == (wanted, protocol, port) for owner in owners for p in owner.ports):
                return True
        elif port is not None and numbers[0] <= port <= numbers[1]:
            return True
    return False
