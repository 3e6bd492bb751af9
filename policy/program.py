"""All rules asked at an endpoint in one direction, so that it is known at once which match.

They are laid out in a row (``policy.walk``). A condition on addresses or ports is met by some of
them, which are the bits of an int. So for a packet the rules that match are the bits that its
source, its destination and its ports have in common. Which bits an address, or a port, stands for
is worked out once: addresses that are in the same sets share them, and so do ports between the
same bounds. What follows from the bits is worked out once for each that occur.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import replace
from typing import TypeVar

from api.net import BITS, V4, V6, Net
from policy.evaluate import Flow, Members, is_match, ports_match
from policy.model import Match, Member, NamedPortMember
from policy.walk import Outcome, Row

K = TypeVar("K")
V = TypeVar("V")

_MOST = 1 << 16  # remembered of one thing before all of it is forgotten

# The sets that an address is in, and its IP version.
_Class = frozenset[str | int]
_NO_SETS: _Class = frozenset()


class Addresses:
    """In which sets addresses are; and the members of sets of named ports."""

    def __init__(self, sets: Members) -> None:
        self.named: defaultdict[str, set[NamedPortMember]] = defaultdict(set)
        self.classes: dict[Net, _Class] = {}
        self._of: dict[Net, _Class] = {}  # the sets that have exactly this member
        self._lengths: dict[int, Counter[int]] = {V4: Counter(), V6: Counter()}
        self._shared: dict[_Class, _Class] = {}
        gathered: dict[Net, list[str]] = {}
        for set_id, members in sets.items():
            for net in self._nets(set_id, members, set.update):
                gathered.setdefault(net, []).append(set_id)
        for net, ids in gathered.items():
            self._put(net, frozenset(ids))

    def change(self, set_id: str, added: Iterable[Member], removed: Iterable[Member]) -> None:
        """Members of a set that came and went."""
        for net in self._nets(set_id, removed, set.difference_update):
            self._put(net, self._of.get(net, _NO_SETS) - {set_id})
        for net in self._nets(set_id, added, set.update):
            self._put(net, self._of.get(net, _NO_SETS) | {set_id})

    def forget(self, set_ids: Set[str]) -> None:
        """Sets that are gone: looked for among all members, as nobody says what they held."""
        for set_id in set_ids:
            self.named.pop(set_id, None)
        held = [(net, ids) for net, ids in self._of.items() if not ids.isdisjoint(set_ids)]
        for net, ids in held:
            self._put(net, ids - set_ids)

    def _nets(
        self,
        set_id: str,
        members: Iterable[Member],
        change: Callable[[set[NamedPortMember], Iterable[NamedPortMember]], None],
    ) -> list[Net]:
        """Those members that are networks; the named ports among them are dealt with."""
        nets, named = [], []
        for member in members:
            if isinstance(member, NamedPortMember):
                named.append(member)
            else:
                nets.append(member)
        if named:
            change(self.named[set_id], named)
        return nets

    def classify(self, address: Net) -> _Class:
        """The sets that hold an address, or a network around it; remembered in ``classes``."""
        version, number, _ = address
        found: _Class = frozenset((version,))
        for length in self._lengths[version]:
            spare = BITS[version] - length
            found |= self._of.get(Net(version, number >> spare << spare, length), _NO_SETS)
        if len(self.classes) >= _MOST:
            self.classes.clear()
        found = self.classes[address] = self._shared.setdefault(found, found)
        return found

    def _put(self, net: Net, ids: _Class) -> None:
        lengths = self._lengths[net.version]
        if net not in self._of and ids:
            lengths[net.length] += 1
        if ids:
            self._of[net] = self._shared.setdefault(ids, ids)
        elif self._of.pop(net, None) is not None:
            lengths[net.length] -= 1
            if not lengths[net.length]:
                del lengths[net.length]
        if net.is_host:
            self.classes.pop(net, None)
        else:
            self.classes.clear()
        if len(self._shared) >= _MOST:
            self._shared.clear()


class Program:
    """The rules of one stage."""

    __slots__ = (
        "_addresses",
        "_all",
        "_bounds",
        "_by_address",
        "_by_class",
        "_by_ports",
        "_class_conditions",
        "_classes",
        "_named",
        "_names",
        "_net_conditions",
        "_outcomes",
        "_port_conditions",
        "_row",
        "_sets",
        "_src_bounds",
    )

    def __init__(self, row: Row, addresses: Addresses) -> None:
        self._row = row
        self._outcomes: dict[int, Outcome] = {}
        self._addresses, self._classes = addresses, addresses.classes
        self._sets = addresses.named
        matches = row.matches
        self._all = (1 << len(matches)) - 1
        self._named = {
            1 << number: (match, _only_names(match))
            for number, match in enumerate(matches)
            if _has_names(match)
        }
        self._names = sum(self._named)
        self._class_conditions = (
            _conditions(matches, _source_sets),
            _conditions(matches, _destination_sets),
        )
        self._net_conditions = (
            _conditions(matches, _source_nets),
            _conditions(matches, _destination_nets),
        )
        self._port_conditions = _conditions(matches, _packet)
        self._bounds = _bounds(match.dst_ports + match.not_dst_ports for match in matches)
        self._src_bounds = _bounds(match.src_ports + match.not_src_ports for match in matches)
        self._by_class: tuple[dict[_Class, int], dict[_Class, int]] = ({}, {})
        self._by_address: tuple[dict[Net, int], dict[Net, int]] = ({}, {})
        self._by_ports: dict[tuple[int | None, ...], int] = {}

    def evaluate(self, flow: Flow) -> Outcome:
        """What is looked at, and what of it decides."""
        src, dst, classes = flow.src, flow.dst, self._classes
        by_source, by_destination = self._by_class
        if (of_source := classes.get(src)) is None:
            of_source = self._addresses.classify(src)
        if (lines := by_source.get(of_source)) is None:
            lines = self._lines_of_class(0, of_source)
        if (of_destination := classes.get(dst)) is None:
            of_destination = self._addresses.classify(dst)
        if (found := by_destination.get(of_destination)) is None:
            found = self._lines_of_class(1, of_destination)
        lines &= found
        src_port, dst_port = flow.src_port, flow.dst_port
        key = (
            flow.protocol,
            -1 if dst_port is None else bisect_right(self._bounds, dst_port),
            -1 if src_port is None else bisect_right(self._src_bounds, src_port),
            flow.icmp_type,
            flow.icmp_code,
        )
        if (found := self._by_ports.get(key)) is None:
            found = self._lines_of_packet(key, flow)
        lines &= found
        if self._net_conditions[0]:
            lines &= self._lines_of_address(0, src, flow)
        if self._net_conditions[1]:
            lines &= self._lines_of_address(1, dst, flow)
        unsure = lines & self._names
        while unsure:
            line = unsure & -unsure
            unsure ^= line
            match, names = self._named[line]
            if names:
                member = (dst, flow.protocol, dst_port)  # equal to a NamedPortMember
                for name in names:
                    if member in self._sets[name]:
                        break
                else:
                    lines ^= line
            elif not ports_match(match, flow, self._sets):
                lines ^= line
        if (outcome := self._outcomes.get(lines)) is None:
            outcome = _remember(self._outcomes, lines, self._row.walk(lines))
        return outcome

    def _lines_of_class(self, side: int, own: _Class) -> int:
        lines = self._all
        for match, those in self._class_conditions[side]:
            wanted = match.dst_sets if side else match.src_sets
            unwanted = match.not_dst_sets if side else match.not_src_sets
            if (
                not own.issuperset(wanted)
                or not own.isdisjoint(unwanted)
                or (match.version is not None and match.version not in own)
            ):
                lines &= ~those
        return _remember(self._by_class[side], own, lines)

    def _lines_of_address(self, side: int, address: Net, flow: Flow) -> int:
        lines = self._by_address[side].get(address)
        if lines is None:
            lines = self._without(self._net_conditions[side], flow)
            _remember(self._by_address[side], address, lines)
        return lines

    def _lines_of_packet(self, key: tuple[int | None, ...], flow: Flow) -> int:
        return _remember(self._by_ports, key, self._without(self._port_conditions, flow))

    def _without(self, conditions: tuple[tuple[Match, int], ...], flow: Flow) -> int:
        lines = self._all
        for match, those in conditions:
            if not is_match(match, flow, self._sets):
                lines &= ~those
        return lines


def _remember(table: dict[K, V], key: K, value: V) -> V:
    if len(table) >= _MOST:
        table.clear()
    table[key] = value
    return value


def _conditions(
    matches: Sequence[Match], aspect: Callable[[Match], Match]
) -> tuple[tuple[Match, int], ...]:
    """The conditions of one aspect that lines have, each with its lines."""
    lines: dict[Match, int] = {}
    for number, match in enumerate(matches):
        condition = aspect(match)
        if condition != _ANYTHING:
            lines[condition] = lines.get(condition, 0) | 1 << number
    return tuple(lines.items())


_ANYTHING = Match()


def _source_sets(match: Match) -> Match:
    return Match(version=match.version, src_sets=match.src_sets, not_src_sets=match.not_src_sets)


def _destination_sets(match: Match) -> Match:
    return Match(dst_sets=match.dst_sets, not_dst_sets=match.not_dst_sets)


def _source_nets(match: Match) -> Match:
    return Match(src_nets=match.src_nets, not_src_nets=match.not_src_nets)


def _destination_nets(match: Match) -> Match:
    return Match(dst_nets=match.dst_nets, not_dst_nets=match.not_dst_nets)


def _packet(match: Match) -> Match:
    """Protocol, ICMP and, where no name stands beside them, the numbers of ports."""
    packet = Match(
        protocol=match.protocol,
        not_protocol=match.not_protocol,
        icmp_type=match.icmp_type,
        icmp_code=match.icmp_code,
        not_icmp_type=match.not_icmp_type,
        not_icmp_code=match.not_icmp_code,
    )
    if _has_names(match):
        return packet
    return replace(
        packet,
        src_ports=match.src_ports,
        not_src_ports=match.not_src_ports,
        dst_ports=match.dst_ports,
        not_dst_ports=match.not_dst_ports,
    )


def _has_names(match: Match) -> bool:
    return bool(
        match.src_named_ports
        or match.not_src_named_ports
        or match.dst_named_ports
        or match.not_dst_named_ports
    )


def _only_names(match: Match) -> tuple[str, ...]:
    """The names of destination ports where they are all there is about ports."""
    others = (
        match.src_named_ports,
        match.not_src_named_ports,
        match.not_dst_named_ports,
        match.src_ports,
        match.not_src_ports,
        match.dst_ports,
        match.not_dst_ports,
    )
    return () if any(others) else match.dst_named_ports


def _bounds(ranges: Iterable[tuple[tuple[int, int], ...]]) -> list[int]:
    """Where ranges begin and where they have ended: between two of these, ports are alike."""
    pairs = [pair for some in ranges for pair in some]
    return sorted({first for first, _ in pairs} | {last + 1 for _, last in pairs})
