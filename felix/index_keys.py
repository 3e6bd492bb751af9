"""What an ``Index`` looks packets up in: keys, counted, and the sets that hold them.

What a ticket says is a key: the peer's network, the protocol, the port, each if it speaks of it.
Keys of one shape are a set of the kernel's; which shapes there are, and how keys are written, is
an enforcer's affair. A key that several tickets or members give is counted, and goes with the
last of them. All work is for what changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Set
from functools import partial
from typing import Generic, Protocol, TypeVar

from api.net import Net
from felix.chains import Index, Ticket
from policy.engine import SetDelta
from policy.model import Member

S = TypeVar("S", bound=Hashable)
K = TypeVar("K", bound=Hashable)
_S = TypeVar("_S", contravariant=True)
_K = TypeVar("_K", contravariant=True)

# What a set holds, of one IP version.
MembersOf = Callable[[str], Iterable[Member]]
# The keys of a ticket with peers in these networks, and their shapes.
KeysOf = Callable[[Ticket, Iterable[Net]], Iterable[tuple[S, K]]]


class KeySets(Protocol[_S, _K]):
    """Where the keys of an index go, by its name and their shape."""

    def come(self, name: str, shape: _S, keys: Callable[[], frozenset[_K]]) -> None:
        """There are keys of a shape; ``keys`` says which."""

    def change(self, name: str, shape: _S, came: Set[_K], went: Set[_K]) -> None:
        """Keys came that were not there, and went that were."""

    def go(self, name: str, shape: _S) -> None:
        """The last key of a shape is gone."""


class Indexes(Generic[S, K]):
    """All indexes of one IP version."""

    def __init__(
        self, version: int, sets: KeySets[S, K], keys_of: KeysOf[S, K], members: MembersOf
    ) -> None:
        self._version = version
        self._sets = sets
        self._keys_of = keys_of
        self._members = members
        self._keys: dict[str, Keys[S, K]] = {}  # by index
        self._shapes: dict[str, frozenset[S]] = {}
        self._users: dict[str, set[str]] = {}  # by set of the engine's

    def shapes(self, name: str) -> frozenset[S]:
        """The shapes of an index' keys."""
        return self._shapes[name]

    def want(self, name: str, index: Index) -> bool:
        """An index came or changed; whether its shapes did."""
        if name not in self._keys:
            self._keys[name] = Keys(self._version, self._keys_of, self._members)
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
            self._sets.go(name, shape)

    def change_set(self, set_id: str, change: SetDelta) -> Iterator[str]:
        """Members of a set came and went: the indexes whose chains are to be rendered again."""
        for name in tuple(self._users.get(set_id, ())):
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
        before, after = self._shapes.get(name, frozenset()), keys.shapes
        for shape, (came, went) in keys.flush().items():
            if shape not in before and shape in after:
                self._sets.come(name, shape, partial(keys.keys, shape))
            elif shape in before and shape not in after:
                self._sets.go(name, shape)
            elif shape in before:
                self._sets.change(name, shape, came, went)
        self._shapes[name] = after
        return before != after


class Keys(Generic[S, K]):
    """The keys of an index in one IP version, by shape."""

    def __init__(self, version: int, keys_of: KeysOf[S, K], members: MembersOf) -> None:
        self._version = version
        self._keys_of = keys_of
        self._members = members
        self._tickets: dict[str, tuple[Ticket, ...]] = {}  # by entry
        self._by_set: dict[str, Counter[Ticket]] = {}
        self._counted: dict[str, set[Net]] = {}  # the members of sets that are in the keys
        self._counts: dict[S, dict[K, int]] = {}
        self._touched: dict[S, dict[K, bool]] = {}  # whether they were there before

    @property
    def sets(self) -> Set[str]:
        """The engine's sets that the keys depend on."""
        return frozenset(self._by_set)

    @property
    def shapes(self) -> frozenset[S]:
        """Those of which there are keys."""
        return frozenset(self._counts)

    def keys(self, shape: S) -> frozenset[K]:
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

    def flush(self) -> dict[S, tuple[set[K], set[K]]]:
        """The keys that came since the last time, and those that went, by shape."""
        touched, self._touched = self._touched, {}
        found = {}
        for shape, keys in touched.items():
            present = self._counts.get(shape, {})
            came = {each for each, before in keys.items() if not before and each in present}
            went = {each for each, before in keys.items() if before and each not in present}
            found[shape] = came, went
        return found

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
        for shape, each in self._keys_of(ticket, own):
            counts = self._counts.setdefault(shape, {})
            self._touched.setdefault(shape, {}).setdefault(each, each in counts)
            counts[each] = counts.get(each, 0) + times
            if not counts[each]:
                del counts[each]
                if not counts:
                    del self._counts[shape]
