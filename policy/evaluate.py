"""The verdict on one flow, and why: the oracle of the tests and of ``explain``.

Reads the same tables the dataplanes render. It says what happens to the first packet of a
flow; what belongs to a flow that is allowed passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from api.net import BITS, Net
from policy.model import (
    Action,
    CompiledPolicy,
    Direction,
    EndpointBinding,
    EndpointId,
    Match,
    Member,
    NamedPortMember,
    PolicyId,
    PortRange,
    Rule,
)

Members = Mapping[str, Collection[Member]]


class Tables(Protocol):
    """What to enforce: an ``Engine``, or a copy of its tables."""

    @property
    def sets(self) -> Members:
        """Members by set id."""

    @property
    def policies(self) -> Mapping[PolicyId, CompiledPolicy]:
        """Active policies and profiles."""

    @property
    def endpoints(self) -> Mapping[EndpointId, EndpointBinding]:
        """What decides about each local endpoint."""


@dataclass(frozen=True, slots=True)
class Flow:
    """The first packet of a flow. Addresses are /32 or /128, as after destination NAT.

    Ports are None where the protocol has none, ICMP type and code where it isn't ICMP. An
    endpoint is None where that end isn't one of ours (the other node, the outside).
    """

    src: Net
    dst: Net
    protocol: int
    src_port: int | None = None
    dst_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    src_endpoint: EndpointId | None = None
    dst_endpoint: EndpointId | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was looked at.

    ``policy`` None: the end of the tier, or (``tier`` empty) of the profiles. ``rule_index``
    and ``action`` None: no rule of this policy matched.
    """

    endpoint: EndpointId
    direction: Direction
    tier: str
    policy: PolicyId | None
    rule_index: int | None
    action: Action | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """ALLOW or DENY; tier, policy and rule index of what decided; all that was looked at.

    ``policy`` None: the end of a tier or of the profiles decided or, when the trace is empty,
    neither end is an endpoint of ours. ``rule_index`` counts the author's rules.
    """

    action: Action
    tier: str
    policy: PolicyId | None
    rule_index: int | None
    trace: tuple[Step, ...]


def evaluate(tables: Tables, flow: Flow) -> Verdict:
    """Egress policy of the source endpoint, then ingress policy of the destination's."""
    trace: list[Step] = []
    for endpoint, direction in (
        (flow.src_endpoint, Direction.EGRESS),
        (flow.dst_endpoint, Direction.INGRESS),
    ):
        binding = tables.endpoints.get(endpoint) if endpoint else None
        if endpoint and binding:
            trace += _steps(tables, flow, endpoint, binding, direction)
            if trace[-1].action is Action.DENY:
                break
    if not trace:
        return Verdict(Action.ALLOW, "", None, None, ())
    last = trace[-1]
    action = Action.DENY if last.action is Action.DENY else Action.ALLOW
    return Verdict(action, last.tier, last.policy, last.rule_index, tuple(trace))


def _steps(
    tables: Tables,
    flow: Flow,
    endpoint: EndpointId,
    binding: EndpointBinding,
    direction: Direction,
) -> Iterator[Step]:
    """What is looked at in one direction; the last step decides: ALLOW or DENY."""
    for tier in binding.tiers:
        ids = tier.ingress if direction is Direction.INGRESS else tier.egress
        action: Action | None = None
        for id in ids:
            for rule in _matching(tables, flow, id, direction):
                action = None if rule is None or rule.action is Action.LOG else rule.action
                yield Step(
                    endpoint,
                    direction,
                    tier.name,
                    id,
                    rule.index if rule else None,
                    rule.action if rule else None,
                )
            if action:
                break
        else:
            if ids:
                action = tier.default_action
                yield Step(endpoint, direction, tier.name, None, None, action)
        if action in (Action.ALLOW, Action.DENY):
            return
    for id in binding.profiles:
        for rule in _matching(tables, flow, id, direction):
            index, action = (rule.index, rule.action) if rule else (None, None)
            yield Step(endpoint, direction, "", id, index, action)
            if action in (Action.ALLOW, Action.DENY):
                return
    yield Step(endpoint, direction, "", None, None, Action.DENY)


def _matching(
    tables: Tables, flow: Flow, id: PolicyId, direction: Direction
) -> Iterator[Rule | None]:
    """The rules that match up to the first that decides; None at last when none does."""
    policy = tables.policies[id]
    rules = policy.ingress if direction is Direction.INGRESS else policy.egress
    for rule in rules or ():
        if is_match(rule.match, flow, tables.sets):
            yield rule
            if rule.action is not Action.LOG:
                return
    yield None


def is_match(match: Match, flow: Flow, sets: Members) -> bool:
    """Whether a flow meets all of a rule's conditions."""
    return (
        (match.version is None or match.version == flow.src.version)
        and (match.protocol is None or match.protocol == flow.protocol)
        and (match.not_protocol is None or match.not_protocol != flow.protocol)
        and _icmp_matches(match, flow)
        and _address_matches(flow.src, match.src_nets, match.not_src_nets)
        and _address_matches(flow.dst, match.dst_nets, match.not_dst_nets)
        and all(_contains(sets[set_id], flow.src) for set_id in match.src_sets)
        and not any(_contains(sets[set_id], flow.src) for set_id in match.not_src_sets)
        and all(_contains(sets[set_id], flow.dst) for set_id in match.dst_sets)
        and not any(_contains(sets[set_id], flow.dst) for set_id in match.not_dst_sets)
        and _ports_match(match, flow, sets)
    )


def _icmp_matches(match: Match, flow: Flow) -> bool:
    return (
        (match.icmp_type is None or match.icmp_type == flow.icmp_type)
        and (match.icmp_code is None or match.icmp_code == flow.icmp_code)
        and (match.not_icmp_type is None or match.not_icmp_type != flow.icmp_type)
        and (match.not_icmp_code is None or match.not_icmp_code != flow.icmp_code)
    )


def _address_matches(address: Net, nets: tuple[Net, ...], not_nets: tuple[Net, ...]) -> bool:
    return (not nets or any(net.contains(address) for net in nets)) and not any(
        net.contains(address) for net in not_nets
    )


def _contains(members: Collection[Member], address: Net) -> bool:
    """Whether a set holds the address, or a network around it."""
    if address in members:
        return True
    version, number, bits = address
    for length in range(bits - 1, -1, -1):
        mask = BITS[version] - length
        if Net(version, number >> mask << mask, length) in members:
            return True
    return False


def _ports_match(match: Match, flow: Flow, sets: Members) -> bool:
    src, dst = (flow.src, flow.src_port), (flow.dst, flow.dst_port)
    positive = (
        (src, match.src_ports, match.src_named_ports),
        (dst, match.dst_ports, match.dst_named_ports),
    )
    negative = (
        (src, match.not_src_ports, match.not_src_named_ports),
        (dst, match.not_dst_ports, match.not_dst_named_ports),
    )
    return all(
        _has_port(end, flow.protocol, ranges, named, sets)
        for end, ranges, named in positive
        if ranges or named
    ) and not any(
        _has_port(end, flow.protocol, ranges, named, sets) for end, ranges, named in negative
    )


def _has_port(
    end: tuple[Net, int | None],
    protocol: int,
    ranges: tuple[PortRange, ...],
    named: tuple[str, ...],
    sets: Members,
) -> bool:
    address, port = end
    if port is None:
        return False
    return any(first <= port <= last for first, last in ranges) or any(
        NamedPortMember(address, protocol, port) in sets[set_id] for set_id in named
    )
