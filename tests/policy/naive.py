"""Policy as its documentation reads, straight from the objects: slow, and without any index.

Works on addresses, as packets do: an address meets a selector when some endpoint that has
it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
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
    Tier,
)
from policy import labels, selector
from policy.engine import Profile
from policy.evaluate import Flow
from policy.model import Endpoint, EndpointId, PolicyId

parse = cache(selector.parse)
network = cache(parse_net)

Policy = NetworkPolicy | GlobalNetworkPolicy


@dataclass
class State:
    """All objects as they were set."""

    endpoint: dict[EndpointId, Endpoint] = field(default_factory=dict)
    profile: dict[str, Profile] = field(default_factory=dict)
    policy: dict[PolicyId, Policy] = field(default_factory=dict)
    tier: dict[str, Tier] = field(default_factory=dict)

    def put(self, table: str, key: Any, value: Any) -> None:
        rows: dict[Any, Any] = getattr(self, table)
        if value is None:
            rows.pop(key, None)
        else:
            rows[key] = value

    def allows(self, flow: Flow) -> bool:
        """What happens to a flow: egress at its source, then ingress at its destination."""
        return all(
            self._direction_allows(id, flow, direction)
            for id, direction in (
                (flow.src_endpoint, "Egress"),
                (flow.dst_endpoint, "Ingress"),
            )
            if id is not None and id in self.endpoint and self.endpoint[id].local
        )

    def _direction_allows(self, id: EndpointId, flow: Flow, direction: str) -> bool:
        endpoint = self.endpoint[id]
        selecting = [
            (policy_id, policy)
            for policy_id, policy in self.policy.items()
            if direction in policy.spec.types and self._applies(policy, endpoint)
        ]
        for tier in sorted({policy.spec.tier for _, policy in selecting}, key=self._tier_order):
            mine = [(i, policy) for i, policy in selecting if policy.spec.tier == tier]
            verdict = self._default_action(tier)
            for _, policy in sorted(mine, key=lambda each: policy_order(*each)):
                found = self._first(rules_of(policy.spec, direction), flow, direction, policy)
                if found:
                    verdict = found
                    break
            if verdict != "Pass":
                return verdict == "Allow"
        for name in endpoint.profiles:
            if name in self.profile:
                found = self._first(rules_of(self.profile[name], direction), flow, direction, None)
                if found in ("Allow", "Deny"):
                    return found == "Allow"
        return False

    def _first(
        self, rules: Iterable[Rule], flow: Flow, direction: str, policy: Policy | None
    ) -> str | None:
        for rule in rules:
            if rule.action != "Log" and self._rule_matches(rule, flow, direction, policy):
                return rule.action
        return None

    def _tier_order(self, name: str) -> tuple[bool, float, str]:
        if name in BUILT_IN_TIERS:
            return False, BUILT_IN_TIERS[name][0], name
        if name in self.tier:
            order = self.tier[name].spec.order
            return False, math.inf if order is None else order, name
        return True, 0, name

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
        owners = [e for e in self.endpoint.values() if address in e.nets]
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
        elif own and policy:
            named = [e for e in owners if self._applies(policy, e)]
        return (
            not (entity.not_selector and self._any_matches(entity.not_selector, owners))
            and (not entity.nets or in_any(address, entity.nets))
            and not in_any(address, entity.not_nets)
            and (not entity.ports or has_port(entity.ports, port, flow.protocol, named))
            and not has_port(entity.not_ports, port, flow.protocol, named)
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


def policy_order(id: PolicyId, policy: Policy) -> tuple[float, str]:
    order = policy.spec.order
    return math.inf if order is None else order, f"{id.name}/{id.namespace}/{id.kind}"


def rules_of(rules: Any, direction: str) -> Iterable[Rule]:
    found: Iterable[Rule] = rules.ingress if direction == "Ingress" else rules.egress
    return found


def is_icmp(fields: ICMPFields, flow: Flow) -> bool:
    return fields.type in (None, flow.icmp_type) and fields.code in (None, flow.icmp_code)


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
