"""What felix enforces, as neutral chains: the fixed frame, policies, endpoints.

The way of a packet: ``cali-FORWARD`` sends what comes from a workload's interface to
``cali-fw-<interface>`` and what goes to one to ``cali-tw-<interface>``; these walk the tiers'
policies, then the profiles, then drop. A policy that allows sets the mark ACCEPT, one that
passes sets PASS. An interface that no chain knows drops: that protects a pod just plugged in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from api.net import V4, V6, Net
from felix import names
from felix.chains import (
    Accept,
    Action,
    Chain,
    ChainRule,
    ClearMarks,
    Condition,
    Dispatch,
    Drop,
    Goto,
    Hook,
    Jump,
    Log,
    Mark,
    MarkAndReturn,
    Masquerade,
    Return,
    Side,
    State,
    Table,
)
from felix.settings import EndpointToHost, Settings
from policy.model import (
    Action as PolicyAction,
)
from policy.model import (
    CompiledPolicy,
    Direction,
    EndpointBinding,
    Match,
    PortRange,
    Rule,
)

IPIP = 4
UDP = 17
ICMPV6 = 58

# RFC 4890, 4.4.1: multicast listener messages and neighbour discovery, without which a
# workload never finds its gateway.
_NEIGHBOUR_DISCOVERY = (130, 131, 132, 133, 135, 136)

_ALLOWED = Condition(marked=Mark.ACCEPT)
_UNDECIDED = Condition(unmarked=Mark.PASS)
_UNKNOWN = ChainRule(Drop(), comment="Unknown interface")
_TO_HOST: Mapping[EndpointToHost, Action] = {
    EndpointToHost.DROP: Drop(),
    EndpointToHost.ACCEPT: Accept(),
    EndpointToHost.RETURN: Return(),
}


@dataclass(frozen=True, slots=True)
class Frame:
    """What is there whatever the policies: chains by table, and the hooks that jump to them."""

    chains: tuple[tuple[Table, Chain], ...]
    hooks: tuple[tuple[Hook, ChainRule], ...]


def frame(
    settings: Settings,
    version: int,
    *,
    vxlan: bool,
    masquerade: bool,
    sources: Mapping[str, tuple[Net, ...]],
) -> Frame:
    """The frame of one IP version. Without ``masquerade`` the NAT table is left alone.

    ``sources``: what interfaces may send with besides the addresses of their endpoints.
    """
    chains = [
        (Table.RAW, _prerouting(settings)),
        (Table.RAW, _allowed_sources(sources, version)),
        (Table.FILTER, _forward(settings)),
        (Table.FILTER, _input(settings, vxlan=vxlan and version == V4)),
        (Table.FILTER, _workload_to_host(settings, version)),
    ]
    hooks = [
        (Hook(Table.RAW, "PREROUTING"), ChainRule(Jump(names.PREROUTING))),
        (Hook(Table.FILTER, "FORWARD"), ChainRule(Jump(names.FORWARD))),
        (Hook(Table.FILTER, "INPUT"), ChainRule(Jump(names.INPUT))),
    ]
    if masquerade:
        chains.extend((Table.NAT, chain) for chain in _nat_outgoing())
        hooks.append((Hook(Table.NAT, "POSTROUTING"), ChainRule(Jump(names.POSTROUTING))))
    return Frame(tuple(chains), tuple(hooks))


def dispatches(interfaces: Iterable[str]) -> tuple[Dispatch, Dispatch]:
    """From and to workloads, for the interfaces that have endpoint chains."""
    ordered = sorted(interfaces)

    def dispatch(name: str, side: Side, direction: Direction) -> Dispatch:
        targets = tuple((i, names.endpoint_chain(direction, i)) for i in ordered)
        return Dispatch(name, side, targets, (_UNKNOWN,))

    return (
        dispatch(names.FROM_WORKLOAD, Side.IN, Direction.EGRESS),
        dispatch(names.TO_WORKLOAD, Side.OUT, Direction.INGRESS),
    )


def policy_chain(policy: CompiledPolicy, direction: Direction, settings: Settings) -> Chain | None:
    """A policy's or profile's chain; None where it does not apply in that direction."""
    rules = policy.ingress if direction is Direction.INGRESS else policy.egress
    if rules is None:
        return None
    return Chain(
        names.policy_chain(direction, policy.id),
        tuple(
            _policy_rule(rule, f"{policy.id} {direction.value} rule {rule.index}", settings)
            for rule in rules
        ),
    )


def endpoint_chain(
    interface: str,
    binding: EndpointBinding,
    direction: Direction,
    settings: Settings,
) -> Chain:
    """What decides about an endpoint's packets in one direction."""
    rules = [ChainRule(Accept(), Condition(states=(State.RELATED, State.ESTABLISHED)))]
    if settings.drop_invalid:
        rules.append(ChainRule(Drop(), Condition(states=(State.INVALID,))))
    rules.append(ChainRule(ClearMarks(Mark.ACCEPT)))
    if direction is Direction.EGRESS:
        rules += _no_encapsulation(settings)
    for tier in binding.tiers:
        chosen = [policy for policy in tier.policies(direction) if not policy.is_staged]
        if not chosen:
            continue
        rules.append(ChainRule(ClearMarks(Mark.PASS), comment=f"Tier {tier.name}"))
        for policy in chosen:
            rules.append(ChainRule(Jump(names.policy_chain(direction, policy)), _UNDECIDED))
            rules.append(ChainRule(Return(), _ALLOWED))
        if tier.default_action is PolicyAction.DENY:
            rules.append(ChainRule(Drop(), _UNDECIDED, comment=f"End of tier {tier.name}"))
    for profile in binding.profiles:
        rules.append(ChainRule(Jump(names.policy_chain(direction, profile))))
        rules.append(ChainRule(Return(), _ALLOWED))
    rules.append(ChainRule(Drop(), comment="No policy or profile allows it"))
    return Chain(names.endpoint_chain(direction, interface), tuple(rules))


def _policy_rule(rule: Rule, comment: str, settings: Settings) -> ChainRule:
    actions: dict[PolicyAction, Action] = {
        PolicyAction.ALLOW: MarkAndReturn(Mark.ACCEPT),
        PolicyAction.DENY: Drop(),
        PolicyAction.PASS: MarkAndReturn(Mark.PASS),
        PolicyAction.LOG: Log(f"{settings.log_prefix}: "),
    }
    return ChainRule(actions[rule.action], Condition(packet=rule.match), comment)


def _no_encapsulation(settings: Settings) -> Iterator[ChainRule]:
    """A workload that speaks VXLAN or IPIP could pretend to be a node."""
    if not settings.allow_vxlan:
        yield ChainRule(Drop(), Condition(packet=_vxlan(settings)), "VXLAN from a workload")
    if not settings.allow_ipip:
        yield ChainRule(Drop(), Condition(packet=Match(protocol=IPIP)), "IPIP from a workload")


def _vxlan(settings: Settings, sources: tuple[str, ...] = ()) -> Match:
    port = PortRange(settings.vxlan_port, settings.vxlan_port)
    return Match(protocol=UDP, dst_ports=(port,), src_sets=sources)


def _prerouting(settings: Settings) -> Chain:
    prefixes = settings.interface_prefixes
    return Chain(
        names.PREROUTING,
        (
            *(
                ChainRule(Jump(names.ALLOWED_SOURCES), Condition(in_interface=f"{p}*"))
                for p in prefixes
                if settings.allow_sources
            ),
            *(
                ChainRule(Drop(), Condition(in_interface=f"{p}*", spoofed=True), "Spoofed source")
                for p in prefixes
            ),
        ),
    )


def _allowed_sources(sources: Mapping[str, tuple[Net, ...]], version: int) -> Chain:
    """Accepted here is accepted in this table only: policy comes later, in another."""
    return Chain(
        names.ALLOWED_SOURCES,
        tuple(
            ChainRule(Accept(), Condition(packet=Match(src_nets=own), in_interface=interface))
            for interface, nets in sorted(sources.items())
            if (own := tuple(net for net in nets if net.version == version))
        ),
    )


def _forward(settings: Settings) -> Chain:
    prefixes = settings.interface_prefixes
    return Chain(
        names.FORWARD,
        (
            ChainRule(ClearMarks(Mark.ACCEPT | Mark.PASS)),
            *(
                ChainRule(Jump(names.FROM_WORKLOAD), Condition(in_interface=f"{p}*"))
                for p in prefixes
            ),
            *(
                ChainRule(Jump(names.TO_WORKLOAD), Condition(out_interface=f"{p}*"))
                for p in prefixes
            ),
            ChainRule(Accept(), _ALLOWED),
        ),
    )


def _input(settings: Settings, *, vxlan: bool) -> Chain:
    rules = []
    if vxlan:
        for action, sources, comment in (
            (Accept(), (names.VXLAN_NODES,), "VXLAN from a known node"),
            (Drop(), (), "VXLAN from elsewhere"),
        ):
            condition = Condition(packet=_vxlan(settings, sources), to_this_host=True)
            rules.append(ChainRule(action, condition, comment))
    rules += (
        ChainRule(Goto(names.WORKLOAD_TO_HOST), Condition(in_interface=f"{p}*"))
        for p in settings.interface_prefixes
    )
    return Chain(names.INPUT, tuple(rules))


def _workload_to_host(settings: Settings, version: int) -> Chain:
    rules: list[ChainRule] = []
    if version == V6:
        rules += (
            ChainRule(Accept(), Condition(packet=Match(protocol=ICMPV6, icmp_type=kind)))
            for kind in _NEIGHBOUR_DISCOVERY
        )
    rules += (
        ChainRule(ClearMarks(Mark.ACCEPT | Mark.PASS)),
        ChainRule(Jump(names.FROM_WORKLOAD)),
        ChainRule(_TO_HOST[settings.endpoint_to_host], comment="DefaultEndpointToHostAction"),
    )
    return Chain(names.WORKLOAD_TO_HOST, tuple(rules))


def _nat_outgoing() -> Iterator[Chain]:
    outgoing = Match(src_sets=(names.MASQUERADE_POOLS,), not_dst_sets=(names.ALL_POOLS,))
    yield Chain(names.NAT_OUTGOING, (ChainRule(Masquerade(), Condition(packet=outgoing)),))
    yield Chain(names.POSTROUTING, (ChainRule(Jump(names.NAT_OUTGOING)),))
