"""What felix enforces on packets that kube-proxy's mode ipvs sends to pods, as neutral chains.

A service's address is the node's own there, on the interface ``kube-ipvs0``. So a packet for a
service comes to INPUT, whoever sent it; only behind it does ipvs translate it, and sends it on by
OUTPUT, without FORWARD. It is judged in OUTPUT, where it shows where it goes: what comes from
somebody else's address is on its way through. From a workload it is by its source, which RAW
PREROUTING holds to be its own. By which interface it came is forgotten there: where host endpoints
have policies for what is forwarded, INPUT notes it in the packet's mark.

What ipvs leaves to the node itself, as a service's target or because it knows no such service, is
judged behind it, as what comes to INPUT is. iptables has no place for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from api.net import V4, Net
from felix import host_rules, names
from felix.chains import (
    Allow,
    Chain,
    ChainRule,
    ClearMarks,
    Condition,
    Dispatch,
    Drop,
    Goto,
    Jump,
    Mark,
    MarkAndReturn,
    Return,
    Side,
    SourceDispatch,
)
from felix.host_rules import Guard
from felix.policy_rules import ALLOWED, ESTABLISHED
from felix.settings import Settings
from policy.model import Direction, Match, Part

PORTED = (6, 17, 132)  # the protocols of node ports: TCP, UDP, SCTP
_ENTRY = (
    Mark.ENTRY_1,
    Mark.ENTRY_2,
    Mark.ENTRY_4,
    Mark.ENTRY_8,
    Mark.ENTRY_16,
    Mark.ENTRY_32,
)
_NOTES = ~(Mark.ACCEPT | Mark.PASS)
# A host without an address sends from these; ipvs sends nothing from there.
_UNSPECIFIED = tuple(Net(version, 0, length) for version, length in ((V4, 8), (6, 128)))
_FORWARDED = Condition(packet=Match(not_src_nets=_UNSPECIFIED), from_this_host=False)
_NOTED = Condition(marked=Mark.SERVICE)
_LEAST_MARKS = 2  # SERVICE and WORKLOAD
_NO_MARK = "The mark mask has no bit for it"
_UNKNOWN = ChainRule(Drop(), comment="Unknown interface")


def to_services(settings: Settings) -> Iterator[ChainRule]:
    """What ipvs is about to translate, among what comes to INPUT."""
    services = Condition(packet=Match(dst_sets=(names.SERVICE_ADDRESSES,)))
    yield ChainRule(Goto(names.IPVS_INPUT), services, "To a service")
    if settings.node_ports:
        for protocol in PORTED:
            match = Match(protocol=protocol, dst_ports=settings.node_ports)
            condition = Condition(packet=match, to_this_host=True)
            yield ChainRule(Goto(names.IPVS_INPUT), condition, "To a node port")


def to_targets(settings: Settings) -> Iterator[ChainRule]:
    """What ipvs has translated, among what comes to OUTPUT."""
    if _can_mark(settings):  # an IPv6 address of the host may be pretended
        yield ChainRule(Goto(names.IPVS_OUTPUT), _NOTED, "From ipvs")
    yield ChainRule(Goto(names.IPVS_OUTPUT), _FORWARDED, "From ipvs")


def to_host(settings: Settings, guard: Guard) -> Iterator[ChainRule]:
    """What becomes of what comes behind ipvs, and was noted before: it is for the node itself."""
    if _can_mark(settings):
        yield ChainRule(Return(), Condition(unmarked=Mark.SERVICE))
        for prefix in settings.interface_prefixes:
            condition = Condition(in_interface=f"{prefix}*")
            yield ChainRule(Goto(names.WORKLOAD_TO_HOST), condition)
        yield from host_rules.incoming(guard)


def _can_mark(settings: Settings) -> bool:
    return settings.spare_marks >= _LEAST_MARKS


def frame(settings: Settings, guard: Guard) -> Iterator[Chain]:
    """The chains that are gone to from INPUT and from OUTPUT."""
    yield Chain(names.IPVS_INPUT, tuple(_incoming(settings, guard)))
    yield Chain(names.IPVS_WORKLOAD, (ChainRule(MarkAndReturn(Mark.WORKLOAD)),))
    yield Chain(names.IPVS_OUTPUT, tuple(_outgoing(settings, guard)))


def _incoming(settings: Settings, guard: Guard) -> Iterator[ChainRule]:
    """It is not for the host: other rules have their say, then ipvs takes it."""
    workloads = [f"{prefix}*" for prefix in settings.interface_prefixes]
    for interface in workloads:
        states = ESTABLISHED.states
        yield ChainRule(Allow(), Condition(in_interface=interface, states=states))
    yield ChainRule(Return(), ESTABLISHED)
    yield ChainRule(ClearMarks(_NOTES))
    if not _can_mark(settings):
        yield ChainRule(Drop(), comment=_NO_MARK)
    for interface in workloads:
        yield ChainRule(Jump(names.FROM_IPVS_WORKLOAD), Condition(in_interface=interface))
    if Part.FORWARD in guard.parts:
        yield ChainRule(Jump(names.IPVS_ENTRY))
    yield ChainRule(MarkAndReturn(Mark.SERVICE))


def _outgoing(settings: Settings, guard: Guard) -> Iterator[ChainRule]:
    """As in FORWARD."""
    yield ChainRule(ClearMarks(Mark.PASS if guard.early else Mark.ACCEPT | Mark.PASS))
    if Part.FORWARD in guard.parts:
        yield ChainRule(Jump(names.FROM_IPVS_ENTRY), Condition(unmarked=Mark.ACCEPT))
    yield ChainRule(Jump(names.FROM_WORKLOAD_ADDRESS))
    for prefix in settings.interface_prefixes:
        yield ChainRule(Jump(names.TO_WORKLOAD), Condition(out_interface=f"{prefix}*"))
    if Part.FORWARD in guard.parts:
        yield ChainRule(Jump(names.TO_HOST_FORWARD))
    # A tunnel's packets take over the mark of what is in them.
    yield ChainRule(ClearMarks(_NOTES))
    yield ChainRule(Allow(), ALLOWED)


def dispatches(
    interfaces: Iterable[str], addresses: Mapping[Net, str]
) -> tuple[Dispatch, SourceDispatch]:
    """From workloads, for the interfaces that have endpoint chains, and by their addresses."""
    ordered = sorted(interfaces)
    goals = tuple(
        (address, names.endpoint_chain(Direction.EGRESS, interface))
        for address, interface in sorted(addresses.items())
    )
    known = tuple((interface, names.IPVS_WORKLOAD) for interface in ordered)
    stranger = ChainRule(Drop(), Condition(marked=Mark.WORKLOAD), "Unknown source of a workload")
    return (
        Dispatch(names.FROM_IPVS_WORKLOAD, Side.IN, known, (_UNKNOWN,)),
        SourceDispatch(names.FROM_WORKLOAD_ADDRESS, goals, (stranger,)),
    )


def entries(interfaces: Iterable[str], *, default: bool, settings: Settings) -> tuple[Chain, Chain]:
    """Notes by which host endpoint's interface a packet came, and leads to what that says.

    ``default``: there is an endpoint of all other interfaces.
    """
    digits = _ENTRY[: max(0, settings.spare_marks - _LEAST_MARKS)]
    every = _combined(digits)
    noting: list[ChainRule] = []
    leading: list[ChainRule] = []
    for number, interface in enumerate(sorted(interfaces), 1):
        where = Condition(in_interface=interface)
        if number >> len(digits):
            noting.append(ChainRule(Drop(), where, _NO_MARK))
            continue
        mark = _combined(digit for place, digit in enumerate(digits) if number >> place & 1)
        noting.append(ChainRule(MarkAndReturn(mark), where))
        goal = names.host_chain(Direction.INGRESS, interface, forward=True)
        leading.append(ChainRule(Goto(goal), Condition(marked=mark, unmarked=every & ~mark)))
    if default:
        goal = names.host_chain(Direction.INGRESS, names.ANY_INTERFACE, forward=True)
        leading.append(ChainRule(Goto(goal)))
    return Chain(names.IPVS_ENTRY, tuple(noting)), Chain(names.FROM_IPVS_ENTRY, tuple(leading))


def _combined(marks: Iterable[Mark]) -> Mark:
    combined = Mark.NONE
    for mark in marks:
        combined |= mark
    return combined
