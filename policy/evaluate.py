"""The verdict on one flow, and why: the oracle of the tests and of ``explain``.

Reads the same tables the dataplanes render. It says what happens to the first packet of a
flow; what belongs to a flow that is allowed passes. What is not policy is not told: failsafe
ports, what a workload sends to its node once its egress policy allowed it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from api.net import BITS, Net
from policy.model import (
    Action,
    Binding,
    CompiledPolicy,
    Direction,
    EndpointId,
    HostBinding,
    Match,
    Member,
    NamedPortMember,
    Part,
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
    def endpoints(self) -> Mapping[EndpointId, Binding]:
        """What decides about each local endpoint."""


@dataclass(frozen=True, slots=True)
class Flow:
    """The first packet of a flow, as one node sees it.

    Addresses are /32 or /128, as after destination NAT; before it the packet was for
    ``original_dst`` and ``original_dst_port``, where they are given. Ports are None where the
    protocol has none, ICMP type and code where it isn't ICMP.

    ``src_endpoint`` and ``dst_endpoint`` are the node's: a workload, or a host endpoint where
    the node itself sends or receives; None where that end is elsewhere. ``entry`` and ``exit``:
    the host endpoints of the interfaces by which a packet comes in and goes out that is
    forwarded, or comes from a workload; None where there is none. Interfaces of workloads have
    that of all interfaces, if any.
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
    entry: EndpointId | None = None
    exit: EndpointId | None = None
    original_dst: Net | None = None
    original_dst_port: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was looked at.

    ``policy`` None: the end of the tier, or (``tier`` empty) of all that applies. ``rule_index``
    and ``action`` None: no rule of this policy matched. The action of a staged policy is what it
    would have done.
    """

    endpoint: EndpointId
    direction: Direction
    tier: str
    policy: PolicyId | None
    rule_index: int | None
    action: Action | None
    part: Part = Part.NORMAL

    @property
    def decides(self) -> bool:
        """Whether the step lets the packet through or stops it."""
        staged = self.policy is not None and self.policy.is_staged
        return not staged and self.action in (Action.ALLOW, Action.DENY)


class Verdict(NamedTuple):
    """ALLOW or DENY; tier, policy and rule index of what decided; all that was looked at.

    ``policy`` None: the end of a tier or of the profiles decided or, where no step of the trace
    ``decides``, nothing was asked: neither end is an endpoint of ours. ``rule_index`` counts the
    author's rules. Of several decisions, all ALLOW but perhaps the last, the last is told.
    """

    action: Action
    tier: str
    policy: PolicyId | None
    rule_index: int | None
    trace: tuple[Step, ...]


class Stage(NamedTuple):
    """Policy that a packet meets: of which endpoint, in which direction, for which packets."""

    endpoint: EndpointId
    direction: Direction
    part: Part


def evaluate(tables: Tables, flow: Flow) -> Verdict:
    """The verdict of all policy that the flow meets on its way through the node."""
    trace: list[Step] = []
    accepted: set[tuple[EndpointId, Direction]] = set()
    for stage in stages(flow):
        binding = tables.endpoints.get(stage.endpoint)
        if binding is None or stage[:2] in accepted:
            continue
        early = stage.part in EARLY
        steps = list(_steps(tables, original(flow) if early else flow, stage, binding))
        trace += steps
        if steps and steps[-1].decides:
            if steps[-1].action is Action.DENY:
                break
            if early:
                accepted.add(stage[:2])
    return verdict_of(tuple(trace))


def verdict_of(trace: tuple[Step, ...]) -> Verdict:
    """What follows from all that was looked at."""
    last = next((step for step in reversed(trace) if step.decides), None)
    if last is None:
        return Verdict(Action.ALLOW, "", None, None, trace)
    action = Action.DENY if last.action is Action.DENY else Action.ALLOW
    return Verdict(action, last.tier, last.policy, last.rule_index, trace)


EARLY = (Part.UNTRACKED, Part.PRE_DNAT)  # before destination NAT


def stages(flow: Flow) -> Iterator[Stage]:
    """What a flow meets, in order, where there is such an endpoint.

    As the kernel's hooks are: raw and mangle prerouting, then input, or forward, or output. What
    a node sends to itself or its workloads meets nothing. What a workload sends is never
    untracked, nor is it the host's to judge when it is for the host itself.
    """
    from_host, to_host = _is_host(flow.src_endpoint), _is_host(flow.dst_endpoint)
    if from_host and flow.dst_endpoint:
        return
    from_workload = bool(flow.src_endpoint) and not from_host
    incoming = flow.dst_endpoint if to_host and not from_workload else flow.entry
    if incoming and not from_host:
        for part in EARLY:
            if not (from_workload and part is Part.UNTRACKED):
                yield Stage(incoming, Direction.INGRESS, part)
    if flow.src_endpoint and from_host:
        yield Stage(flow.src_endpoint, Direction.EGRESS, Part.UNTRACKED)
    if flow.entry and not (from_host or to_host):
        yield Stage(flow.entry, Direction.INGRESS, Part.FORWARD)
    if flow.src_endpoint:
        yield Stage(flow.src_endpoint, Direction.EGRESS, Part.NORMAL)
    if flow.dst_endpoint and not (from_workload and to_host):
        yield Stage(flow.dst_endpoint, Direction.INGRESS, Part.NORMAL)
    if flow.exit and not (from_host or to_host):
        yield Stage(flow.exit, Direction.EGRESS, Part.FORWARD)


def original(flow: Flow) -> Flow:
    """The flow before destination NAT."""
    if flow.original_dst is None and flow.original_dst_port is None:
        return flow
    dst = flow.dst if flow.original_dst is None else flow.original_dst
    port = flow.dst_port if flow.original_dst_port is None else flow.original_dst_port
    return replace(flow, dst=dst, dst_port=port)


def _is_host(endpoint: EndpointId | None) -> bool:
    return endpoint is not None and endpoint.kind == "HostEndpoint"


def _steps(tables: Tables, flow: Flow, stage: Stage, binding: Binding) -> Iterator[Step]:
    """What is looked at in one stage. When the last step doesn't decide, the packet goes on."""
    endpoint, direction, part = stage
    rules = binding.part(part) if isinstance(binding, HostBinding) else binding
    for tier in rules.tiers:
        ids = tier.policies(direction)
        action: Action | None = None
        for id in ids:
            for rule in _matching(tables, flow, id, direction):
                index, does = (rule.index, rule.action) if rule else (None, None)
                yield Step(endpoint, direction, tier.name, id, index, does, part)
                if not id.is_staged:
                    action = None if does is Action.LOG else does
            if action:
                break
        else:
            if tier.ends(direction) and part not in EARLY:
                action = tier.default_action
                yield Step(endpoint, direction, tier.name, None, None, action, part)
        if action in (Action.ALLOW, Action.DENY):
            return
    if part is not Part.NORMAL:
        return
    for id in rules.profiles:
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
        and ports_match(match, flow, sets)
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


def ports_match(match: Match, flow: Flow, sets: Members) -> bool:
    """Whether a flow meets all of a rule's conditions on ports."""
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
