"""Neutral chains → rules of nftables, for one IP version.

A neutral rule becomes none (it can't match in this IP version), one or several: where any of
several things suffices, such as an address that is in a set's hosts or in its networks, each
has a rule. A ``Dispatch`` is a verdict map: to add an interface is to add an element.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
    Index,
    Jump,
    Log,
    Mark,
    MarkAndReturn,
    Masquerade,
    NoTrack,
    Reject,
    Return,
    Side,
    SourceDispatch,
    SourceNat,
    State,
    Table,
)
from felix.nftables_index import Shape, condition
from felix.nftables_matches import (
    ConstantSet,
    HoldsNetworks,
    Matches,
    NeverError,
    address_type,
    source,
)
from felix.settings import Manner
from kernel import nft_expressions as nft
from kernel.nft_expressions import Compare, ConntrackState, FibFlag, FibResult, Meta, Verdict
from kernel.nft_sets import (
    INTERFACE,
    NftSet,
    Target,
)
from kernel.nftables import MAX_COMMENT, NftRule

_RTN_LOCAL = 2
_DST_NAT = 1 << 5  # IPS_DST_NAT (linux/netfilter/nf_conntrack_common.h)
_FAMILY = {4: 2, 6: 10}

_MOST_KNOWN = 4096  # rules that are remembered as rendered

_STATES = {
    State.RELATED: ConntrackState.RELATED,
    State.ESTABLISHED: ConntrackState.ESTABLISHED,
    State.INVALID: ConntrackState.INVALID,
}


@dataclass(frozen=True, slots=True)
class RenderedChain:
    """A chain's rules; the constant sets that must be there before them; whose shape they took.

    ``sets`` are those of the engine and of felix's own: when one begins or ceases to hold
    networks, the chain is to be rendered again.
    """

    rules: tuple[NftRule, ...]
    constants: tuple[ConstantSet, ...] = ()
    sets: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _RenderedRule:
    """The alternatives that one neutral rule becomes, and what it refers to."""

    alternatives: tuple[bytes, ...]
    constants: Mapping[str, ConstantSet] = field(default_factory=dict)
    sets: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders for one IP version."""

    version: int
    manner: Manner
    holds_networks: HoldsNetworks
    known: dict[tuple[Table, ChainRule], _RenderedRule] = field(
        default_factory=dict, repr=False, compare=False
    )

    def render(self, table: Table, chain: Chain | Dispatch | SourceDispatch) -> RenderedChain:
        """The rules of a chain, or those that look up a dispatch."""
        name = chain_name(table, chain.name)
        match chain:
            case Chain():
                return self._chain(table, name, b"", chain.rules)
            case Dispatch():
                key = nft.load_meta(Meta.IIFNAME if chain.side is Side.IN else Meta.OIFNAME)
            case SourceDispatch():
                key = source(self.version)
        return self._chain(table, name, key + nft.lookup_verdict(name), chain.otherwise)

    def index(self, table: Table, index: Index, shapes: Iterable[Shape]) -> RenderedChain:
        """The rules that look up an index: one for each shape of its keys."""
        name = chain_name(table, index.name)
        action = nft.counter() + self._action(table, index.action)
        comment = "Many policies at once"
        made = [
            (condition(self.version, name, shape, index.side) + action, comment)
            for shape in sorted(shapes)
        ]
        return RenderedChain(tuple(_recognisable(name, made)))

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
        matches = Matches(self.version, self.holds_networks)
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
            value = self.manner.bits(condition.marked)
            bits = value | self.manner.bits(condition.unmarked)
            parts += (nft.load_meta(Meta.MARK), nft.mask(nft.host_order(bits)))
            parts.append(nft.compare(nft.host_order(value)))
        if condition.states:
            bits = sum(_STATES[state] for state in condition.states)
            parts += (nft.load_conntrack_state(), nft.mask(nft.host_order(bits)))
            parts.append(nft.compare(bytes(4), Compare.NOT_EQUAL))
        for is_own, flag in (
            (condition.to_this_host or None, FibFlag.DADDR),
            (condition.from_this_host, FibFlag.SADDR),
        ):
            if is_own is not None:
                parts.append(nft.load_fib(FibResult.ADDRTYPE, flag))
                how = Compare.EQUAL if is_own else Compare.NOT_EQUAL
                parts.append(nft.compare(nft.host_order(_RTN_LOCAL), how))
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
                return self._mark(self.manner.bits(marks), 0)
            case MarkAndReturn(mark):
                bits = self.manner.bits(mark)
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
        bits = self.manner.bits(Mark.ACCEPT)
        return self._mark(bits, bits) + nft.verdict(Verdict.RETURN)

    def _mark(self, bits: int, value: int) -> bytes:
        """``meta mark set``: of these bits, these."""
        kept = nft.host_order(0xFFFFFFFF ^ bits)
        return nft.load_meta(Meta.MARK) + nft.mask(kept, nft.host_order(value)) + nft.store_mark()


def chain_name(table: Table, name: str) -> str:
    """The kernel's name of a chain: nftables has one table where netfilter has several."""
    return f"{table.value.lower()}-{name}"


def dispatch_map(
    version: int, table: Table, dispatch: Dispatch | SourceDispatch
) -> tuple[NftSet, dict[bytes, Target]]:
    """The verdict map of a dispatch, and what it says."""
    match dispatch:
        case Dispatch():
            kind = INTERFACE
            goals = {nft.interface_name(name): chain for name, chain in dispatch.targets}
        case SourceDispatch():
            kind = address_type(version)
            goals = {address.packed(): chain for address, chain in dispatch.targets}
    return (
        NftSet(chain_name(table, dispatch.name), (kind,), verdicts=True),
        {key: Target(Verdict.GOTO, chain_name(table, chain)) for key, chain in goals.items()},
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
    if not text.isascii() or not text.isprintable() or '"' in text or "\\" in text:
        text = "".join(
            c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in text
        )
    return text[:MAX_COMMENT]
