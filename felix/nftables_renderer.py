"""Neutral chains → rules of nftables, for one IP version.

A neutral rule becomes none (it can't match in this IP version), one or several: where any of
several things suffices, such as an address that is in a set's hosts or in its networks, each
has a rule. A ``Dispatch`` is a verdict map: to add an interface is to add an element.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from api.net import BITS, V4, Net
from felix import names
from felix.chains import (
    Accept,
    Action,
    Allow,
    Chain,
    ChainRule,
    ClearMarks,
    Condition,
    Deny,
    DestinationNat,
    Dispatch,
    Drop,
    Goto,
    Jump,
    Log,
    Mark,
    MarkAndReturn,
    Masquerade,
    NoTrack,
    Reject,
    Return,
    Side,
    SourceNat,
    State,
    Table,
)
from felix.settings import Manner
from kernel import nft_expressions as nft
from kernel.nft_expressions import Base, Compare, ConntrackState, FibFlag, FibResult, Meta, Verdict
from kernel.nft_sets import (
    ADDRESS4,
    ADDRESS6,
    INTERFACE,
    PORT,
    PROTOCOL,
    KeyType,
    NftSet,
    Range,
    Target,
    merge,
    ranges,
)
from kernel.nftables import MAX_COMMENT, NftRule
from policy.model import Match, PortRange, SetKind

ICMP = {4: 1, 6: 58}
PORT_PROTOCOLS = (6, 17, 132, 33, 136)  # TCP, UDP, SCTP, DCCP, UDP-Lite: ports come first

_SOURCE_OFFSET = {4: 12, 6: 8}
_DESTINATION_OFFSET = {4: 16, 6: 24}
_RTN_LOCAL = 2
_DST_NAT = 1 << 5  # IPS_DST_NAT (linux/netfilter/nf_conntrack_common.h)
_FAMILY = {4: 2, 6: 10}

_MOST_KNOWN = 4096  # rules that are remembered as rendered

_STATES = {
    State.RELATED: ConntrackState.RELATED,
    State.ESTABLISHED: ConntrackState.ESTABLISHED,
    State.INVALID: ConntrackState.INVALID,
}

# Whether a set holds networks besides hosts, by its name in the kernel.
HoldsNetworks = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class ConstantSet:
    """A list that rules refer to. Its name is a hash of its members: it never changes."""

    declaration: NftSet
    keys: tuple[bytes, ...] = ()
    spans: tuple[Range, ...] = ()


@dataclass(frozen=True, slots=True)
class RenderedChain:
    """A chain's rules; the constant sets that must be there before them; whose shape they took.

    ``sets`` are those of the engine and of felix's own: when one begins or ceases to hold
    networks, the chain is to be rendered again.
    """

    rules: tuple[NftRule, ...]
    constants: tuple[ConstantSet, ...] = ()
    sets: frozenset[str] = frozenset()

    @property
    def comments(self) -> tuple[str, ...]:
        """By which the chain is recognised in the kernel."""
        return tuple(rule.comment for rule in self.rules)


class NeverError(Exception):
    """The condition can't hold in this IP version: the rule is left out."""


@dataclass(frozen=True, slots=True)
class _RenderedRule:
    """The alternatives that one neutral rule becomes, and what it refers to."""

    alternatives: tuple[bytes, ...]
    constants: Mapping[str, ConstantSet] = field(default_factory=dict)
    sets: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Option:
    """One of several conditions of which any suffices, and its contrary."""

    holds: bytes
    fails: bytes = b""


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders for one IP version."""

    version: int
    manner: Manner
    holds_networks: HoldsNetworks
    known: dict[tuple[Table, ChainRule], _RenderedRule] = field(
        default_factory=dict, repr=False, compare=False
    )

    def render(self, table: Table, chain: Chain | Dispatch) -> RenderedChain:
        """The rules of a chain, or those that look up a dispatch."""
        name = chain_name(table, chain.name)
        if isinstance(chain, Chain):
            return self._chain(table, name, b"", chain.rules)
        key = Meta.IIFNAME if chain.side is Side.IN else Meta.OIFNAME
        return self._chain(
            table, name, nft.load_meta(key) + nft.lookup_verdict(name), chain.otherwise
        )

    def _chain(
        self, table: Table, name: str, first: bytes, rules: Sequence[ChainRule]
    ) -> RenderedChain:
        made = [(first, "")] if first else []
        constants: dict[str, ConstantSet] = {}
        sets: set[str] = set()
        for rule in rules:
            rendered = self._rule(table, rule)
            made.extend((expressions, rule.comment) for expressions in rendered.alternatives)
            constants.update(rendered.constants)
            sets |= rendered.sets
        return RenderedChain(
            tuple(_recognisable(name, made)), tuple(constants.values()), frozenset(sets)
        )

    def _rule(self, table: Table, rule: ChainRule) -> _RenderedRule:
        """What endpoints have in common is rendered once: of hundreds, nearly all of it is."""
        known = self.known.get((table, rule))
        if known is not None:
            return known
        matches = _Matches(self.version, self.holds_networks)
        try:
            packets = matches.alternatives(
                rule.condition.packet, exclusive=isinstance(rule.action, Log)
            )
        except NeverError:
            return _RenderedRule(())
        head = self._head(rule.condition)
        action = self._action(table, rule.action)
        if rule.comment:
            action = nft.counter() + action
        rendered = _RenderedRule(
            tuple(head + packet + action for packet in packets),
            dict(matches.constants),
            frozenset(matches.sets),
        )
        if not rendered.sets:  # those may take another shape
            if len(self.known) >= _MOST_KNOWN:
                self.known.clear()
            self.known[table, rule] = rendered
        return rendered

    def _head(self, condition: Condition) -> bytes:
        """What a condition says besides the packet's header."""
        parts: list[bytes] = []
        for key, interface in (
            (Meta.IIFNAME, condition.in_interface),
            (Meta.OIFNAME, condition.out_interface),
        ):
            if interface:
                parts += (nft.load_meta(key), nft.compare(nft.interface_name(interface)))
        if condition.marked or condition.unmarked:
            value = self._bits(condition.marked)
            bits = value | self._bits(condition.unmarked)
            parts += (nft.load_meta(Meta.MARK), nft.mask(nft.host_order(bits)))
            parts.append(nft.compare(nft.host_order(value)))
        if condition.states:
            bits = sum(_STATES[state] for state in condition.states)
            parts += (nft.load_conntrack_state(), nft.mask(nft.host_order(bits)))
            parts.append(nft.compare(bytes(4), Compare.NOT_EQUAL))
        for is_asked, flag in (
            (condition.to_this_host, FibFlag.DADDR),
            (condition.from_this_host, FibFlag.SADDR),
        ):
            if is_asked:
                parts.append(nft.load_fib(FibResult.ADDRTYPE, flag))
                parts.append(nft.compare(nft.host_order(_RTN_LOCAL)))
        if condition.translated is not None:
            parts += (nft.load_conntrack_status(), nft.mask(nft.host_order(_DST_NAT)))
            how = Compare.NOT_EQUAL if condition.translated else Compare.EQUAL
            parts.append(nft.compare(bytes(4), how))
        if condition.spoofed:
            # fib saddr . mark . iif oif missing: xt_rpfilter with validmark, inverted
            asked = FibFlag.SADDR | FibFlag.MARK | FibFlag.IIF | FibFlag.PRESENT
            parts += (nft.load_fib(FibResult.OIF, asked), nft.compare(b"\0"))
        return b"".join(parts)

    def _action(self, table: Table, action: Action) -> bytes:
        match action:
            case Accept():
                return nft.verdict(Verdict.ACCEPT)
            case Allow():
                return self._allow(table)
            case Drop():
                return nft.verdict(Verdict.DROP)
            case Deny():
                if self.manner.rejects and table is Table.FILTER:
                    return nft.reject(self.version)
                return nft.verdict(Verdict.DROP)
            case Reject():
                return nft.reject(self.version)
            case Return():
                return nft.verdict(Verdict.RETURN)
            case Jump(chain):
                return nft.verdict(Verdict.JUMP, chain_name(table, chain))
            case Goto(chain):
                return nft.verdict(Verdict.GOTO, chain_name(table, chain))
            case ClearMarks(marks):
                return self._mark(self._bits(marks), 0)
            case MarkAndReturn(mark):
                bits = self._bits(mark)
                return self._mark(bits, bits) + nft.verdict(Verdict.RETURN)
            case Log(prefix):
                return nft.log(prefix)
            case NoTrack():
                return nft.notrack()
            case Masquerade(ports):
                return nft.masquerade(ports=ports, random=True)
            case SourceNat(address, ports):
                return nft.source_nat(
                    _FAMILY[self.version], address.packed(), ports=ports, random=True
                )
            case DestinationNat(address):
                return nft.destination_nat(_FAMILY[self.version], address.packed())

    def _allow(self, table: Table) -> bytes:
        returns = {Table.FILTER: self.manner.returns, Table.MANGLE: self.manner.mangle_returns}
        if not returns.get(table, False):
            return nft.verdict(Verdict.ACCEPT)
        bits = self._bits(Mark.ACCEPT)
        return self._mark(bits, bits) + nft.verdict(Verdict.RETURN)

    def _mark(self, bits: int, value: int) -> bytes:
        """``meta mark set``: of these bits, these."""
        kept = nft.host_order(0xFFFFFFFF ^ bits)
        return nft.load_meta(Meta.MARK) + nft.mask(kept, nft.host_order(value)) + nft.store_mark()

    def _bits(self, marks: Mark) -> int:
        return (self.manner.accept if Mark.ACCEPT in marks else 0) | (
            self.manner.passed if Mark.PASS in marks else 0
        )


class _Matches:
    """Renders policy matches; collects the constant sets they need and the sets they look up."""

    def __init__(self, version: int, holds_networks: HoldsNetworks) -> None:
        self._version = version
        self._holds_networks = holds_networks
        self.constants: dict[str, ConstantSet] = {}
        self.sets: set[str] = set()

    def alternatives(self, match: Match, *, exclusive: bool) -> list[bytes]:
        """Conditions of which any suffices. Raises NeverError when none could hold.

        ``exclusive``: at most one of them holds.
        """
        if match.version is not None and match.version != self._version:
            raise NeverError
        choices = [
            *self._protocol(match),
            *self._icmp(match),
            *self._nets(_SOURCE_OFFSET, match.src_nets, match.not_src_nets),
            *self._nets(_DESTINATION_OFFSET, match.dst_nets, match.not_dst_nets),
            *self._sets(_SOURCE_OFFSET, match.src_sets, match.not_src_sets),
            *self._sets(_DESTINATION_OFFSET, match.dst_sets, match.not_dst_sets),
            *self._ports(0, match.src_ports, match.src_named_ports),
            *self._ports(2, match.dst_ports, match.dst_named_ports),
        ]
        if match.protocol is None or match.protocol in PORT_PROTOCOLS:
            choices += self._no_ports(0, match.not_src_ports, match.not_src_named_ports)
            choices += self._no_ports(2, match.not_dst_ports, match.not_dst_named_ports)
        if exclusive:
            choices = [_exclude(options) for options in choices]
        return [
            b"".join(option.holds for option in chosen) for chosen in itertools.product(*choices)
        ]

    def _protocol(self, match: Match) -> Iterator[tuple[_Option, ...]]:
        wanted = match.protocol
        if wanted is None and _speaks_of_icmp(match):
            wanted = ICMP[self._version]
        load = nft.load_meta(Meta.L4PROTO)
        if wanted is not None:
            portless = wanted not in PORT_PROTOCOLS
            if wanted == match.not_protocol or (portless and _demands_ports(match)):
                raise NeverError
            yield (_Option(load + nft.compare(bytes((wanted,)))),)
            return
        if match.not_protocol is not None:
            unwanted = bytes((match.not_protocol,))
            yield (_Option(load + nft.compare(unwanted, Compare.NOT_EQUAL)),)
        if _speaks_of_ports(match):
            keys = tuple(bytes((number,)) for number in PORT_PROTOCOLS)
            yield (_Option(load + nft.lookup(self._constant(PROTOCOL, keys))),)

    def _icmp(self, match: Match) -> Iterator[tuple[_Option, ...]]:
        if not _speaks_of_icmp(match):
            return
        if match.protocol not in (None, ICMP[self._version]):
            raise NeverError
        for offset, wanted, how in (
            (0, match.icmp_type, Compare.EQUAL),
            (1, match.icmp_code, Compare.EQUAL),
            (0, match.not_icmp_type, Compare.NOT_EQUAL),
            (1, match.not_icmp_code, Compare.NOT_EQUAL),
        ):
            if wanted is not None:
                load = nft.load_payload(Base.TRANSPORT, offset, 1)
                yield (_Option(load + nft.compare(bytes((wanted,)), how)),)

    def _nets(
        self, offsets: dict[int, int], wanted: tuple[Net, ...], unwanted: tuple[Net, ...]
    ) -> Iterator[tuple[_Option, ...]]:
        offset = offsets[self._version]
        if wanted:
            nets = self._own_version(wanted)
            if not nets:
                raise NeverError
            if all(net.length for net in nets):
                yield (_Option(self._in_nets(offset, nets, inverted=False)),)
        nets = self._own_version(unwanted)
        if any(net.length == 0 for net in nets):
            raise NeverError
        if nets:
            yield (_Option(self._in_nets(offset, nets, inverted=True)),)

    def _in_nets(self, offset: int, nets: Sequence[Net], *, inverted: bool) -> bytes:
        size = BITS[self._version] // 8
        if len(nets) > 1:
            name = (
                self._constant(self._address, tuple(net.packed() for net in nets))
                if all(net.is_host for net in nets)
                else self._constant_ranges(self._address, ranges(nets))
            )
            return self._address_at(offset) + nft.lookup(name, inverted=inverted)
        how = Compare.NOT_EQUAL if inverted else Compare.EQUAL
        net = nets[0]
        whole, rest = divmod(net.length, 8)
        if not rest:
            load = nft.load_payload(Base.NETWORK, offset, whole)
            return load + nft.compare(net.packed()[:whole], how)
        bits = BITS[self._version]
        mask = ((1 << net.length) - 1) << (bits - net.length)
        return (
            self._address_at(offset)
            + nft.mask(mask.to_bytes(size, "big"))
            + nft.compare(net.packed(), how)
        )

    def _sets(
        self, offsets: dict[int, int], wanted: Sequence[str], unwanted: Sequence[str]
    ) -> Iterator[tuple[_Option, ...]]:
        load = self._address_at(offsets[self._version])
        for set_id in wanted:
            found, missed = (
                [load + nft.lookup(name, inverted=inverted) for name in self._parts(set_id)]
                for inverted in (False, True)
            )
            yield tuple(map(_Option, found, missed))
        for set_id in unwanted:
            for name in self._parts(set_id):
                yield (_Option(load + nft.lookup(name, inverted=True)),)

    def _parts(self, set_id: str) -> list[str]:
        """The kernel's sets that hold the members of a set of addresses."""
        name = set_name(set_id)
        self.sets.add(name)
        return [name, networks_name(name)] if self._holds_networks(name) else [name]

    def _ports(
        self, offset: int, ports: Sequence[PortRange], named: Sequence[str]
    ) -> Iterator[tuple[_Option, ...]]:
        if ports or named:
            yield tuple(
                _Option(self._in_ports(offset, each, False), self._in_ports(offset, each, True))
                for each in ([ports] if ports else []) + list(named)
            )

    def _no_ports(
        self, offset: int, ports: Sequence[PortRange], named: Sequence[str]
    ) -> Iterator[tuple[_Option, ...]]:
        for each in ([ports] if ports else []) + list(named):
            yield (_Option(self._in_ports(offset, each, True)),)

    def _in_ports(self, offset: int, ports: Sequence[PortRange] | str, inverted: bool) -> bytes:
        if isinstance(ports, str):
            addresses = _SOURCE_OFFSET if offset == 0 else _DESTINATION_OFFSET
            next_register = nft.NARROW_REGISTER + BITS[self._version] // 32
            return (
                self._address_at(addresses[self._version])
                + nft.load_meta(Meta.L4PROTO, next_register)
                + nft.load_payload(Base.TRANSPORT, offset, 2, next_register + 1)
                + nft.lookup(set_name(ports), inverted=inverted)
            )
        load = nft.load_payload(Base.TRANSPORT, offset, 2)
        spans = merge(Range(16, first, last) for first, last in ports)
        if len(spans) > 1:
            name = self._constant_ranges(PORT, spans)
            return load + nft.lookup(name, inverted=inverted)
        first, last = (struct.pack(">H", port) for port in spans[0][1:])
        if first == last:
            return load + nft.compare(first, Compare.NOT_EQUAL if inverted else Compare.EQUAL)
        return load + nft.within(first, last, inverted=inverted)

    @property
    def _address(self) -> KeyType:
        return address_type(self._version)

    def _address_at(self, offset: int) -> bytes:
        return nft.load_payload(Base.NETWORK, offset, BITS[self._version] // 8)

    def _own_version(self, nets: Sequence[Net]) -> list[Net]:
        return sorted({net for net in nets if net.version == self._version})

    def _constant(self, key: KeyType, keys: tuple[bytes, ...]) -> str:
        name = f"c-{names.digest(repr((key, keys)), 23)}"
        self.constants[name] = ConstantSet(NftSet(name, (key,)), keys=keys)
        return name

    def _constant_ranges(self, key: KeyType, spans: Sequence[Range]) -> str:
        name = f"c-{names.digest(repr((key, spans)), 23)}"
        declaration = NftSet(name, (key,), ranges=True)
        self.constants[name] = ConstantSet(declaration, spans=tuple(spans))
        return name


def chain_name(table: Table, name: str) -> str:
    """The kernel's name of a chain: nftables has one table where netfilter has several."""
    return f"{table.value.lower()}-{name}"


def set_name(set_id: str) -> str:
    """The kernel's name of a set: nft(8) reads no colons in names."""
    return set_id.replace(":", "-")


def networks_name(name: str) -> str:
    """Beside the set of a set's hosts, that of its networks."""
    return f"{name}-networks"


def address_type(version: int) -> KeyType:
    """The type of an address."""
    return ADDRESS4 if version == V4 else ADDRESS6


def set_declarations(version: int, name: str, kind: SetKind) -> NftSet:
    """The set that holds the hosts, or the named ports, of a set."""
    address = address_type(version)
    if kind is SetKind.NAMED_PORT:
        return NftSet(name, (address, PROTOCOL, PORT))
    return NftSet(name, (address,))


def network_declaration(version: int, name: str) -> NftSet:
    """The set that holds the networks of a set."""
    return NftSet(networks_name(name), (address_type(version),), ranges=True)


def dispatch_map(table: Table, dispatch: Dispatch) -> tuple[NftSet, dict[bytes, Target]]:
    """The verdict map of a dispatch, and what it says."""
    return (
        NftSet(chain_name(table, dispatch.name), (INTERFACE,), verdicts=True),
        {
            nft.interface_name(interface): Target(Verdict.GOTO, chain_name(table, chain))
            for interface, chain in dispatch.targets
        },
    )


def _exclude(options: tuple[_Option, ...]) -> tuple[_Option, ...]:
    """The same options, but each only where those before it do not hold."""
    return tuple(
        _Option(b"".join(before.fails for before in options[:index]) + option.holds)
        for index, option in enumerate(options)
    )


def _recognisable(name: str, rules: Sequence[tuple[bytes, str]]) -> Iterator[NftRule]:
    """Rules with comments that begin with a hash over the chain so far."""
    state = hashlib.sha256(name.encode())
    for expressions, comment in rules:
        state.update(b"\n" + expressions + comment.encode())
        mark = f"cali:{base64.urlsafe_b64encode(state.digest()[:12]).decode()}"
        text = f"{mark} {comment}" if comment else mark
        yield NftRule(expressions, _printable(text))


def _printable(text: str) -> str:
    """What a comment may hold: nft(8) writes it in quotes and knows no escapes."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in text)
    return plain[:MAX_COMMENT]


def _speaks_of_icmp(match: Match) -> bool:
    return any(
        value is not None
        for value in (match.icmp_type, match.icmp_code, match.not_icmp_type, match.not_icmp_code)
    )


def _demands_ports(match: Match) -> bool:
    return bool(
        match.src_ports or match.dst_ports or match.src_named_ports or match.dst_named_ports
    )


def _speaks_of_ports(match: Match) -> bool:
    return _demands_ports(match) or bool(
        match.not_src_ports
        or match.not_dst_ports
        or match.not_src_named_ports
        or match.not_dst_named_ports
    )
