"""An ``Index`` as sets of nftables: whether a packet has any of its tickets, in a few lookups.

What a ticket says is a key: the peer's network, the protocol, the port, each if it speaks of it.
Keys of one shape (the same things, networks of the same length) are a set, and a packet is
looked up in the set of each shape: hashes all, however many policies there are. A key
that several tickets or members give is counted, and goes with the last of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from functools import partial
from itertools import product
from typing import NamedTuple

from api.net import BITS, Net
from felix.chains import Index, Peer, Ticket
from felix.nftables_matches import DESTINATION_OFFSET, SOURCE_OFFSET, address_type
from felix.nftables_sets import NftablesSets
from kernel import nft_expressions as nft
from kernel.nft_expressions import Base, Meta
from kernel.nft_sets import PORT, PROTOCOL, NftSet, key
from policy.engine import SetDelta
from policy.model import Member

# What a set holds, of one IP version.
MembersOf = Callable[[str], Iterable[Member]]


class Shape(NamedTuple):
    """Of what keys consist. ``length`` is that of the peer's network, 0: it is not in the key."""

    length: int
    protocol: bool
    port: bool


class Indexes:
    """All indexes of one IP version, whose sets are among ``sets``."""

    def __init__(self, version: int, sets: NftablesSets, members: MembersOf) -> None:
        self._version = version
        self._sets = sets
        self._members = members
        self._keys: dict[str, Keys] = {}  # by chain
        self._shapes: dict[str, tuple[Shape, ...]] = {}
        self._users: dict[str, set[str]] = {}  # by set of the engine's

    def __getitem__(self, name: str) -> Keys:
        """The keys of an index, by its chain in the kernel."""
        return self._keys[name]

    def want(self, name: str, index: Index) -> bool:
        """An index came or changed; whether its shapes did."""
        if name not in self._keys:
            self._keys[name] = Keys(self._version, name, self._members)
        keys = self._keys[name]
        before = keys.sets
        keys.want(index)
        for set_id in before - keys.sets:
            self._leave(set_id, name)
        for set_id in keys.sets - before:
            self._users.setdefault(set_id, set()).add(name)
        return self._tell(name)

    def forget(self, name: str) -> None:
        """An index went."""
        for set_id in self._keys.pop(name).sets:
            self._leave(set_id, name)
        for shape in self._shapes.pop(name):
            if shape != _ANYTHING:
                self._sets.unwant_keys(declaration(self._version, name, shape).name)

    def change_set(self, set_id: str, change: SetDelta) -> Iterator[str]:
        """Members of a set came and went: the indexes whose chains are to be rendered again."""
        for name in self._users.get(set_id, ()):
            self._keys[name].change_set(set_id, change.added, change.removed)
            if self._tell(name):
                yield name

    def _leave(self, set_id: str, name: str) -> None:
        self._users[set_id].discard(name)
        if not self._users[set_id]:
            del self._users[set_id]

    def _tell(self, name: str) -> bool:
        """Tell the sets what changed in an index; whether it has other shapes now."""
        keys = self._keys[name]
        before, after = self._shapes.get(name, ()), keys.shapes
        for shape, (came, went) in keys.flush().items():
            wanted = declaration(self._version, name, shape)
            if shape == _ANYTHING:
                continue
            if shape not in before and shape in after:
                self._sets.want_keys(wanted, partial(keys.keys, shape))
            elif shape in before and shape not in after:
                self._sets.unwant_keys(wanted.name)
            elif shape in before:
                self._sets.change_keys(wanted.name, came, went)
        self._shapes[name] = after
        return before != after


class Keys:
    """The keys of an index in one IP version, by shape."""

    def __init__(self, version: int, name: str, members: MembersOf) -> None:
        self._version = version
        self._name = name
        self._members = members
        self._tickets: dict[str, tuple[Ticket, ...]] = {}  # by entry
        self._by_set: dict[str, Counter[Ticket]] = {}
        self._counted: dict[str, set[Net]] = {}  # the members of sets that are in the keys
        self._counts: dict[Shape, dict[bytes, int]] = {}
        self._touched: dict[Shape, dict[bytes, bool]] = {}  # whether they were there before

    @property
    def sets(self) -> Set[str]:
        """The engine's sets that the keys depend on."""
        return frozenset(self._by_set)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Those of which there are keys, in order."""
        return tuple(sorted(self._counts))

    def keys(self, shape: Shape) -> frozenset[bytes]:
        """The keys of a shape."""
        return frozenset(self._counts.get(shape, ()))

    def want(self, index: Index) -> None:
        """Another index takes the place of the one before."""
        entries = dict(index.entries)
        for chain in [chain for chain in self._tickets if chain not in entries]:
            self._change(self._tickets.pop(chain), ())
        for chain, tickets in entries.items():
            before = self._tickets.get(chain, ())
            if before is not tickets and before != tickets:
                self._change(before, tickets)
            self._tickets[chain] = tickets

    def change_set(self, set_id: str, added: Iterable[Member], removed: Iterable[Member]) -> None:
        """Members came and went of a set."""
        tickets = self._by_set.get(set_id)
        if tickets is None:
            return
        counted = self._counted[set_id]
        for members, step in ((added, 1), (removed, -1)):
            nets = [net for net in members if isinstance(net, Net)]
            for ticket, times in tickets.items():
                self._count(ticket, nets, step * times)
            (counted.update if step > 0 else counted.difference_update)(nets)

    def flush(self) -> dict[Shape, tuple[set[bytes], set[bytes]]]:
        """The keys that came since the last time, and those that went, by shape."""
        touched, self._touched = self._touched, {}
        found = {}
        for shape, keys in touched.items():
            present = self._counts.get(shape, {})
            came = {each for each, before in keys.items() if not before and each in present}
            went = {each for each, before in keys.items() if before and each not in present}
            found[shape] = came, went
        return found

    def condition(self, shape: Shape, peer: Peer) -> bytes:
        """``ip saddr & 255.255.255.0 . meta l4proto . th dport @…``."""
        if shape == _ANYTHING:
            return b""
        register = nft.NARROW_REGISTER
        parts = []
        if shape.length:
            bits = BITS[self._version]
            offset = (SOURCE_OFFSET if peer is Peer.SOURCE else DESTINATION_OFFSET)[self._version]
            parts.append(nft.load_payload(Base.NETWORK, offset, bits // 8, register))
            if shape.length < bits:
                mask = ((1 << shape.length) - 1) << (bits - shape.length)
                parts.append(nft.mask(mask.to_bytes(bits // 8, "big"), register=register))
            register += bits // 32
        if shape.protocol:
            parts.append(nft.load_meta(Meta.L4PROTO, register))
            register += 1
        if shape.port:
            parts.append(nft.load_payload(Base.TRANSPORT, 2, 2, register))
        name = declaration(self._version, self._name, shape).name
        return b"".join(parts) + nft.lookup(name, register=nft.NARROW_REGISTER)

    def _change(self, before: Iterable[Ticket], after: Iterable[Ticket]) -> None:
        old, new = Counter(before), Counter(after)
        for ticket, times in (new - old).items():
            self._count(ticket, self._add(ticket, times), times)
        for ticket, times in (old - new).items():
            self._count(ticket, self._nets(ticket), -times)
            self._remove(ticket, times)

    def _add(self, ticket: Ticket, times: int) -> Iterable[Net]:
        """Note that the ticket depends on its set; the networks of its peer."""
        if ticket.set_id:
            self._by_set.setdefault(ticket.set_id, Counter())[ticket] += times
            if ticket.set_id not in self._counted:
                members = self._members(ticket.set_id)
                self._counted[ticket.set_id] = {net for net in members if isinstance(net, Net)}
        return self._nets(ticket)

    def _remove(self, ticket: Ticket, times: int) -> None:
        if ticket.set_id:
            users = self._by_set[ticket.set_id]
            users[ticket] -= times
            if not users[ticket]:
                del users[ticket]
            if not users:
                del self._by_set[ticket.set_id], self._counted[ticket.set_id]

    def _nets(self, ticket: Ticket) -> Iterable[Net]:
        if ticket.set_id:
            return self._counted[ticket.set_id]
        if ticket.nets is None:
            return (Net(self._version, 0, 0),)
        return ticket.nets

    def _count(self, ticket: Ticket, nets: Iterable[Net], times: int) -> None:
        """Count the ticket's keys for these networks so many times more."""
        own = [net for net in nets if net.version == self._version]
        for shape, each in _keys(ticket, own):
            counts = self._counts.setdefault(shape, {})
            self._touched.setdefault(shape, {}).setdefault(each, each in counts)
            counts[each] = counts.get(each, 0) + times
            if not counts[each]:
                del counts[each]
                if not counts:
                    del self._counts[shape]


_ANYTHING = Shape(0, False, False)


def declaration(version: int, name: str, shape: Shape) -> NftSet:
    """The set of an index' keys of a shape. One that is of anything has none."""
    fields = (
        *((address_type(version),) if shape.length else ()),
        *((PROTOCOL,) if shape.protocol else ()),
        *((PORT,) if shape.port else ()),
    )
    said = "".join(("p" if shape.protocol else "", "d" if shape.port else ""))
    return NftSet(f"{name}-{shape.length}{said}", fields)


def _keys(ticket: Ticket, nets: Iterable[Net]) -> Iterator[tuple[Shape, bytes]]:
    protocol = (bytes((ticket.protocol,)),) if ticket.protocol is not None else ()
    ports: list[tuple[bytes, ...]] = [(port.to_bytes(2, "big"),) for port in ticket.ports] or [()]
    for net, port in product(nets, ports):
        shape = Shape(net.length, bool(protocol), bool(port))
        fields = (*((net.packed(),) if net.length else ()), *protocol, *port)
        yield shape, key(*fields) if fields else b""
