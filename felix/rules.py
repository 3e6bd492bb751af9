"""What felix enforces, as neutral chains: the fixed frame, policies, endpoints.

The way of a packet: ``cali-FORWARD`` sends what comes from a workload's interface to
``cali-fw-<interface>`` and what goes to one to ``cali-tw-<interface>``; these walk the tiers'
policies, then the profiles, then drop. A policy that allows sets the mark ACCEPT, one that
passes sets PASS. An interface that no chain knows drops: that protects a pod just plugged in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from api.net import V6, Net
from felix import host_rules, ipvs_rules, names, nat_rules
from felix.chains import (
    Accept,
    Action,
    Allow,
    Chain,
    ChainRule,
    ClearMarks,
    Condition,
    Deny,
    Dispatch,
    Drop,
    Goto,
    Hook,
    Jump,
    Mark,
    Reject,
    Return,
    Side,
    State,
    Table,
)
from felix.host_rules import Guard
from felix.policy_rules import (
    ALLOWED,
    ESTABLISHED,
    NEIGHBOUR_DISCOVERY,
    Step,
    policy_steps,
    profile_rules,
    tier_rules,
)
from felix.settings import EndpointToHost, LoopPrevention, Settings
from policy.model import Direction, EndpointBinding, Match, Part, PortRange, TierBinding

IPIP = 4
UDP = 17

_UNKNOWN = ChainRule(Drop(), comment="Unknown interface")
_TO_HOST: Mapping[EndpointToHost, Action] = {
    EndpointToHost.DROP: Deny(),
    EndpointToHost.ACCEPT: Allow(),
    EndpointToHost.RETURN: Return(),
}


@dataclass(frozen=True, slots=True)
class Frame:
    """What is there whatever the policies: chains by table, and what hooks do, as a rule jump."""

    chains: tuple[tuple[Table, Chain], ...]
    hooks: tuple[tuple[Hook, tuple[ChainRule, ...]], ...]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the frame of one IP version depends on, besides the settings.

    ``vxlan``: this node takes part in the overlay. ``masquerade``: some pool wants it.
    ``sources``: what interfaces may send with besides the addresses of their endpoints.
    ``services``: where services have their addresses. ``nats``: an endpoint's address by one
    from outside. ``guard``: what host endpoints have policies for. ``ipvs``: kube-proxy has ipvs
    translate services' addresses.
    """

    vxlan: bool = False
    masquerade: bool = False
    sources: Mapping[str, tuple[Net, ...]] = field(default_factory=dict)
    services: tuple[Net, ...] = ()
    nats: Mapping[Net, Net] = field(default_factory=dict)
    guard: Guard = field(default_factory=Guard)
    ipvs: bool = False


def frame(settings: Settings, version: int, around: Surroundings) -> Frame:
    """The frame of one IP version. Where nothing is to be translated NAT is left alone."""
    guard = around.guard
    loops = _service_loops(settings, around.services)
    chains = [
        (Table.RAW, _prerouting(settings, guard)),
        (Table.RAW, _allowed_sources(around.sources)),
        (Table.FILTER, _forward(settings, guard, loops=loops is not None)),
        (Table.FILTER, _input(settings, around)),
        (Table.FILTER, _workload_to_host(settings, version)),
        *host_rules.failsafe_chains(guard, settings, version),
    ]
    if loops is not None:
        chains.append((Table.FILTER, loops))
    hooks: list[tuple[Hook, tuple[ChainRule, ...]]] = [
        (Hook(Table.RAW, "PREROUTING"), (ChainRule(Jump(names.PREROUTING)),)),
        (Hook(Table.FILTER, "FORWARD"), (ChainRule(Jump(names.FORWARD)),)),
        (Hook(Table.FILTER, "INPUT"), (ChainRule(Jump(names.INPUT)),)),
    ]
    tunnels = (_vxlan(settings, destinations=(names.VXLAN_NODES,)),) if around.vxlan else ()
    if around.ipvs:
        chains += ((Table.FILTER, chain) for chain in ipvs_rules.frame(settings, guard))
        if left := tuple(ipvs_rules.to_host(settings, guard)):
            hooks.append((Hook(Table.FILTER, "INPUT", behind_ipvs=True), left))
    through = tuple(ipvs_rules.to_targets(settings)) if around.ipvs else ()
    hooked = [
        *host_rules.frame(guard, settings, tunnels, through),
        *nat_rules.frame(masquerade=around.masquerade, floating=bool(around.nats)),
    ]
    for hook, (table, chain) in hooked:
        chains.append((table, chain))
        hooks.append((hook, (ChainRule(Jump(chain.name)),)))
    if around.nats:
        chains += ((Table.NAT, chain) for chain in nat_rules.floating(around.nats))
    if around.masquerade:
        chains.append((Table.NAT, nat_rules.outgoing(settings.nat_outgoing, version)))
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


def endpoint_chain(
    interface: str,
    binding: EndpointBinding,
    direction: Direction,
    settings: Settings,
    steps: Callable[[TierBinding, Direction], Iterable[Step]] = policy_steps,
) -> Chain:
    """What decides about a workload's packets in one direction; ``steps``: in each tier."""
    rules = [ChainRule(Allow(), ESTABLISHED)]
    if settings.drop_invalid:
        rules.append(ChainRule(Drop(), Condition(states=(State.INVALID,))))
    rules.append(ChainRule(ClearMarks(Mark.ACCEPT)))
    if direction is Direction.EGRESS:
        rules += _no_encapsulation(settings)
    rules += tier_rules(binding, direction, steps=steps)
    rules += profile_rules(binding, direction)
    rules.append(ChainRule(Deny(), comment="No policy or profile allows it"))
    return Chain(names.endpoint_chain(direction, interface), tuple(rules))


def _no_encapsulation(settings: Settings) -> Iterator[ChainRule]:
    """A workload that speaks VXLAN or IPIP could pretend to be a node."""
    if not settings.allow_vxlan:
        yield ChainRule(Drop(), Condition(packet=_vxlan(settings)), "VXLAN from a workload")
    if not settings.allow_ipip:
        yield ChainRule(Drop(), Condition(packet=Match(protocol=IPIP)), "IPIP from a workload")


def _vxlan(
    settings: Settings, *, sources: tuple[str, ...] = (), destinations: tuple[str, ...] = ()
) -> Match:
    port = PortRange(settings.vxlan_port, settings.vxlan_port)
    return Match(protocol=UDP, dst_ports=(port,), src_sets=sources, dst_sets=destinations)


def _prerouting(settings: Settings, guard: Guard) -> Chain:
    prefixes = settings.interface_prefixes
    # Marks are heeded in later tables only where something allows before them.
    clear = (ChainRule(ClearMarks(Mark.ACCEPT | Mark.PASS)),) if guard.early else ()
    return Chain(
        names.PREROUTING,
        (
            *clear,
            *(
                ChainRule(Jump(names.ALLOWED_SOURCES), Condition(in_interface=f"{p}*"))
                for p in prefixes
                if settings.allow_sources
            ),
            *(
                ChainRule(Drop(), Condition(in_interface=f"{p}*", spoofed=True), "Spoofed source")
                for p in prefixes
            ),
            *host_rules.prerouting(guard, settings),
        ),
    )


def _allowed_sources(sources: Mapping[str, tuple[Net, ...]]) -> Chain:
    """Accepted here is accepted in this table only: policy comes later, in another."""
    return Chain(
        names.ALLOWED_SOURCES,
        tuple(
            ChainRule(Accept(), Condition(packet=Match(src_nets=nets), in_interface=interface))
            for interface, nets in sorted(sources.items())
        ),
    )


def _service_loops(settings: Settings, services: tuple[Net, ...]) -> Chain | None:
    """What is still for a service's address when it is forwarded is for a service that is not.

    Sent on by the default route, it could come back, again and again.
    """
    actions: Mapping[LoopPrevention, Action] = {
        LoopPrevention.DROP: Drop(),
        LoopPrevention.REJECT: Reject(),
    }
    action = actions.get(settings.loop_prevention)
    if action is None or not services:
        return None
    match = Match(dst_nets=services)
    return Chain(names.SERVICE_LOOPS, (ChainRule(action, Condition(packet=match), "No service"),))


def _forward(settings: Settings, guard: Guard, *, loops: bool) -> Chain:
    prefixes = settings.interface_prefixes
    rules = [ChainRule(ClearMarks(Mark.PASS if guard.early else Mark.ACCEPT | Mark.PASS))]
    if Part.FORWARD in guard.parts:
        rules.append(ChainRule(Jump(names.FROM_HOST_FORWARD), Condition(unmarked=Mark.ACCEPT)))
    rules += (
        ChainRule(Jump(names.FROM_WORKLOAD), Condition(in_interface=f"{p}*")) for p in prefixes
    )
    rules += (
        ChainRule(Jump(names.TO_WORKLOAD), Condition(out_interface=f"{p}*")) for p in prefixes
    )
    if Part.FORWARD in guard.parts:
        rules.append(ChainRule(Jump(names.TO_HOST_FORWARD)))
    if loops:
        rules.append(ChainRule(Jump(names.SERVICE_LOOPS)))
    rules.append(ChainRule(Allow(), ALLOWED))
    return Chain(names.FORWARD, tuple(rules))


def _input(settings: Settings, around: Surroundings) -> Chain:
    rules = []
    if around.vxlan:
        for action, sources, comment in (
            (Allow(), (names.VXLAN_NODES,), "VXLAN from a known node"),
            (Drop(), (), "VXLAN from elsewhere"),
        ):
            match = _vxlan(settings, sources=sources)
            rules.append(ChainRule(action, Condition(packet=match, to_this_host=True), comment))
    if around.ipvs:
        rules += ipvs_rules.to_services(settings)
    rules += (
        ChainRule(Goto(names.WORKLOAD_TO_HOST), Condition(in_interface=f"{p}*"))
        for p in settings.interface_prefixes
    )
    rules += host_rules.incoming(around.guard)
    return Chain(names.INPUT, tuple(rules))


def _workload_to_host(settings: Settings, version: int) -> Chain:
    rules: list[ChainRule] = []
    if version == V6:
        rules += (ChainRule(Allow(), condition) for condition in NEIGHBOUR_DISCOVERY)
    rules += (
        ChainRule(ClearMarks(Mark.ACCEPT | Mark.PASS)),
        ChainRule(Jump(names.FROM_WORKLOAD)),
        # Where what is allowed is returned, answers to the host come back here as all else does.
        ChainRule(Allow(), ESTABLISHED),
        ChainRule(_TO_HOST[settings.endpoint_to_host], comment="DefaultEndpointToHostAction"),
    )
    return Chain(names.WORKLOAD_TO_HOST, tuple(rules))
