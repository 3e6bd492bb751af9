"""What felix enforces at host endpoints, as neutral chains.

A host endpoint has a chain for each kind of packets its policies may be for and each direction:
``cali-fh-<interface>`` (into the host) and ``cali-th-<interface>`` (out of it) in the table
FILTER, and in RAW and MANGLE for what is untracked and before DNAT; ``cali-fhfw-…`` and
``cali-thfw-…`` for what is forwarded. An interface without an endpoint of its own goes to the
endpoint of all interfaces, if there is one.

What the host itself sends and DNAT sent elsewhere is judged in MANGLE POSTROUTING: in FILTER
OUTPUT the kernel still tells the interface of the way it would have gone before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from api.net import V6
from felix import names
from felix.chains import (
    Accept,
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
    MarkAndReturn,
    NoTrack,
    Return,
    Side,
    State,
    Table,
)
from felix.policy_rules import (
    ALLOWED,
    ESTABLISHED,
    NEIGHBOUR_DISCOVERY,
    profile_rules,
    tier_rules,
)
from felix.settings import Failsafe, Settings
from policy.model import (
    Direction,
    EndpointBinding,
    HostBinding,
    Match,
    Part,
    PolicyId,
    PortRange,
)

_BOTH = Mark.ACCEPT | Mark.PASS
_FROM_DNAT = Condition(from_this_host=True, translated=True)


class Place(NamedTuple):
    """Where a kind of a host endpoint's chains is, and for which packets."""

    part: Part
    table: Table
    direction: Direction

    @property
    def dispatch(self) -> str:
        """The chain that leads to them."""
        if self.part is Part.FORWARD:
            incoming = self.direction is Direction.INGRESS
            return names.FROM_HOST_FORWARD if incoming else names.TO_HOST_FORWARD
        return names.FROM_HOST if self.direction is Direction.INGRESS else names.TO_HOST

    def chain(self, interface: str) -> str:
        """The chain of an interface."""
        return names.host_chain(self.direction, interface, forward=self.part is Part.FORWARD)


_PLACES = (
    Place(Part.NORMAL, Table.FILTER, Direction.INGRESS),
    Place(Part.NORMAL, Table.FILTER, Direction.EGRESS),
    Place(Part.NORMAL, Table.MANGLE, Direction.EGRESS),
    Place(Part.FORWARD, Table.FILTER, Direction.INGRESS),
    Place(Part.FORWARD, Table.FILTER, Direction.EGRESS),
    Place(Part.PRE_DNAT, Table.MANGLE, Direction.INGRESS),
    Place(Part.UNTRACKED, Table.RAW, Direction.INGRESS),
    Place(Part.UNTRACKED, Table.RAW, Direction.EGRESS),
)


@dataclass(frozen=True, slots=True)
class Guard:
    """What host endpoints of this node have policies for: the rest takes no chains."""

    parts: frozenset[Part] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.parts)

    @property
    def early(self) -> bool:
        """Whether packets are allowed before the table FILTER sees them."""
        return bool(self.parts & {Part.PRE_DNAT, Part.UNTRACKED})

    @property
    def places(self) -> tuple[Place, ...]:
        """Where chains are."""
        return tuple(place for place in _PLACES if place.part in self.parts)


def guard(bindings: Collection[HostBinding]) -> Guard:
    """What there are policies for; of the normal kind is every host endpoint."""
    if not bindings:
        return Guard()
    parts = (part for part in Part if any(each.part(part).tiers for each in bindings))
    return Guard(frozenset((Part.NORMAL, *parts)))


def policies(
    guarded: Guard, bindings: Iterable[HostBinding]
) -> dict[tuple[Table, Direction], set[PolicyId]]:
    """The policies and profiles whose chains host endpoints jump to, by where they are."""
    found: dict[tuple[Table, Direction], set[PolicyId]] = {}
    for binding in bindings:
        for part, table, direction in guarded.places:
            used = found.setdefault((table, direction), set())
            used.update(binding.part(part).profiles)
            for tier in binding.part(part).tiers:
                used.update(tier.policies(direction))
    return found


def endpoint_chains(
    guarded: Guard, interface: str, binding: HostBinding, settings: Settings, version: int
) -> Iterator[tuple[Table, Chain]]:
    """All chains of a host endpoint."""
    for place in guarded.places:
        own = binding.part(place.part)
        rules: Iterable[ChainRule]
        match place.part:
            case Part.NORMAL:
                rules = _normal(own, place, settings, version)
            case Part.FORWARD:
                rules = _forward(own, place.direction, settings)
            case Part.PRE_DNAT:
                rules = _before_dnat(own, place.direction, settings)
            case Part.UNTRACKED:
                rules = _untracked(own, place.direction)
        yield place.table, Chain(place.chain(interface), tuple(rules))


def dispatches(
    guarded: Guard, interfaces: Iterable[str], *, default: bool, settings: Settings
) -> Iterator[tuple[Table, Dispatch]]:
    """To the chains of the interfaces; ``default``: there is an endpoint of all the others."""
    ordered = sorted(interfaces)
    for place in guarded.places:
        side = Side.IN if place.direction is Direction.INGRESS else Side.OUT
        otherwise = []
        if default:
            if side is Side.OUT and place.part is not Part.FORWARD:
                # What the host sends to its workloads is its own affair.
                otherwise += [
                    ChainRule(Return(), Condition(out_interface=f"{p}*"), "To a workload")
                    for p in settings.interface_prefixes
                ]
            otherwise.append(ChainRule(Goto(place.chain(names.ANY_INTERFACE))))
        targets = tuple((interface, place.chain(interface)) for interface in ordered)
        yield place.table, Dispatch(place.dispatch, side, targets, tuple(otherwise))


# --- the frame ---


def failsafe_chains(
    guarded: Guard, settings: Settings, version: int
) -> Iterator[tuple[Table, Chain]]:
    """What stays reachable, in every table that could cut it off."""
    for table, direction in dict.fromkeys(
        (place.table, place.direction) for place in guarded.places if place.part in _WITH_FAILSAFES
    ):
        yield table, _failsafes(table, direction, settings, version)


_WITH_FAILSAFES = (Part.NORMAL, Part.PRE_DNAT, Part.UNTRACKED)
_FAILSAFE_CHAINS = {
    Direction.INGRESS: names.FAILSAFE_IN,
    Direction.EGRESS: names.FAILSAFE_OUT,
}


def prerouting(guarded: Guard, settings: Settings) -> Iterator[ChainRule]:
    """What comes last in RAW PREROUTING."""
    if Part.UNTRACKED in guarded.parts:
        for prefix in settings.interface_prefixes:
            yield ChainRule(Return(), Condition(in_interface=f"{prefix}*"), "From a workload")
        yield ChainRule(Jump(names.FROM_HOST))
        yield ChainRule(Accept(), ALLOWED)


def incoming(guarded: Guard) -> Iterator[ChainRule]:
    """What comes last in FILTER INPUT, for what no workload sent."""
    if guarded:
        if guarded.early:
            yield ChainRule(Allow(), ALLOWED, "Allowed before connection tracking or DNAT")
        yield ChainRule(ClearMarks(_BOTH))
        yield ChainRule(Jump(names.FROM_HOST))
        yield ChainRule(Allow(), ALLOWED)


def frame(
    guarded: Guard,
    settings: Settings,
    tunnels: Iterable[Match],
    through: tuple[ChainRule, ...] = (),
) -> Iterator[tuple[Hook, tuple[Table, Chain]]]:
    """Chains that are there only for host endpoints, and their hooks.

    ``tunnels``: what this node sends to others to carry workloads' packets. ``through``: where in
    OUTPUT packets go that the host only forwards; the chain is there for them, too.
    """
    own = _output(guarded, settings, tunnels) if guarded else ()
    output = Chain(names.OUTPUT, (*through, *own))
    if output.rules:
        yield Hook(Table.FILTER, "OUTPUT"), (Table.FILTER, output)
    if not guarded:
        return
    after = Chain(names.POSTROUTING, (ChainRule(Jump(names.TO_HOST), _FROM_DNAT),))
    yield Hook(Table.MANGLE, "POSTROUTING"), (Table.MANGLE, after)
    if Part.PRE_DNAT in guarded.parts:
        before = Chain(names.PREROUTING, tuple(_mangle_prerouting()))
        yield Hook(Table.MANGLE, "PREROUTING"), (Table.MANGLE, before)
    if Part.UNTRACKED in guarded.parts:
        rules = (
            *(ChainRule(Return(), rule.condition, "Not the host's own") for rule in through),
            ChainRule(ClearMarks(_BOTH)),
            ChainRule(Jump(names.TO_HOST)),
            ChainRule(Accept(), ALLOWED),
        )
        yield Hook(Table.RAW, "OUTPUT"), (Table.RAW, Chain(names.OUTPUT, rules))


def _output(guarded: Guard, settings: Settings, tunnels: Iterable[Match]) -> Iterator[ChainRule]:
    if Part.UNTRACKED in guarded.parts:
        yield ChainRule(Allow(), ALLOWED, "Allowed before connection tracking")
    for prefix in settings.interface_prefixes:
        yield ChainRule(Return(), Condition(out_interface=f"{prefix}*"), "To a workload")
    for tunnel in tunnels:
        yield ChainRule(Allow(), Condition(packet=tunnel), "Tunnel to a known node")
    yield ChainRule(ClearMarks(_BOTH))
    yield ChainRule(Jump(names.TO_HOST), Condition(translated=False))
    yield ChainRule(Allow(), ALLOWED)


def _mangle_prerouting() -> Iterator[ChainRule]:
    yield ChainRule(Allow(), ESTABLISHED)
    yield ChainRule(Allow(), ALLOWED)
    yield ChainRule(Jump(names.FROM_HOST))
    yield ChainRule(Allow(), ALLOWED)


# --- chains of endpoints ---


def _normal(
    binding: EndpointBinding, place: Place, settings: Settings, version: int
) -> Iterator[ChainRule]:
    # In MANGLE others mark and shape what is allowed: it goes on there.
    passes = Allow() if place.table is Table.FILTER else Return()
    yield ChainRule(passes, ESTABLISHED)
    yield from _no_invalid(settings)
    if version == V6:
        yield from (ChainRule(passes, condition) for condition in NEIGHBOUR_DISCOVERY)
    yield ChainRule(Jump(_FAILSAFE_CHAINS[place.direction]))
    yield ChainRule(ClearMarks(_BOTH))
    yield from tier_rules(binding, place.direction)
    yield from profile_rules(binding, place.direction)
    yield ChainRule(Deny(), comment="No policy or profile allows it")


def _forward(
    binding: EndpointBinding, direction: Direction, settings: Settings
) -> Iterator[ChainRule]:
    """What no tier decides goes on as it came, perhaps allowed at another endpoint."""
    decides = any(tier.ends(direction) for tier in binding.tiers)
    if decides:
        yield ChainRule(Allow(), ESTABLISHED)
        yield from _no_invalid(settings)
        yield ChainRule(ClearMarks(_BOTH))
    yield from tier_rules(binding, direction)
    if decides:
        yield ChainRule(MarkAndReturn(Mark.ACCEPT), comment="All tiers passed it")


def _before_dnat(
    binding: EndpointBinding, direction: Direction, settings: Settings
) -> Iterator[ChainRule]:
    yield from _no_invalid(settings)
    yield ChainRule(Jump(_FAILSAFE_CHAINS[direction]))
    yield ChainRule(ClearMarks(_BOTH))
    yield from tier_rules(binding, direction, ends=False)


def _untracked(binding: EndpointBinding, direction: Direction) -> Iterator[ChainRule]:
    yield ChainRule(Jump(_FAILSAFE_CHAINS[direction]))
    yield ChainRule(ClearMarks(_BOTH))
    allowed = (ChainRule(NoTrack(), ALLOWED), ChainRule(Return(), ALLOWED))
    yield from tier_rules(binding, direction, ends=False, allowed=allowed)


def _no_invalid(settings: Settings) -> Iterator[ChainRule]:
    if settings.drop_invalid:
        yield ChainRule(Drop(), Condition(states=(State.INVALID,)))


def _failsafes(table: Table, direction: Direction, settings: Settings, version: int) -> Chain:
    """Before connection tracking, replies have to be told by their ports."""
    here: Mapping[Direction, tuple[Failsafe, ...]] = {
        Direction.INGRESS: settings.failsafe_in,
        Direction.EGRESS: settings.failsafe_out,
    }
    incoming = direction is Direction.INGRESS
    matches = [_failsafe(each, of_reply=False, far_is_source=incoming) for each in here[direction]]
    if table is Table.RAW:
        other = Direction.EGRESS if incoming else Direction.INGRESS
        matches += [_failsafe(each, of_reply=True, far_is_source=incoming) for each in here[other]]
    return Chain(
        _FAILSAFE_CHAINS[direction],
        tuple(ChainRule(Accept(), Condition(packet=match)) for match in matches),
    )


def _failsafe(failsafe: Failsafe, *, of_reply: bool, far_is_source: bool) -> Match:
    ports = (PortRange(failsafe.port, failsafe.port),)
    nets = (failsafe.net,) if failsafe.net else ()
    return Match(
        protocol=failsafe.protocol,
        src_ports=ports if of_reply else (),
        dst_ports=() if of_reply else ports,
        src_nets=nets if far_is_source else (),
        dst_nets=() if far_is_source else nets,
    )
