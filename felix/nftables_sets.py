"""Neutral sets → nftables: a hash of hosts, and beside it, where there are any, ranges.

An address in a tree of ranges costs a search, one in a hash does not; so hosts are kept in a
hash of their own, and the second set is there only while there are networks. What a set holds
is not kept here, but for its ranges: after a change went well it holds what was wanted; when
one failed, and at a resync, it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from felix.nftables_matches import (
    ConstantSet,
    network_declaration,
    networks_holder,
    networks_name,
    set_declarations,
    set_name,
)
from kernel.nft_sets import ForeignElementError, NftSet, Range, key, ranges
from kernel.nftables import Nftables, Transaction
from policy.engine import SetDelta
from policy.model import Member, NamedPortMember, SetKind

# So many elements are put into a new set by a transaction of their own, before anything refers
# to it: the kernel does other things in between.
_BULK = 20_000

_NONE: frozenset[Member] = frozenset()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A set that should be there, and where to learn what it should hold."""

    kind: SetKind
    members: Callable[[], frozenset[Member]]


@dataclass(frozen=True, slots=True)
class _Keyed:
    """A set of the kernel's own form, and where to learn its keys."""

    declaration: NftSet
    keys: Callable[[], frozenset[bytes]]


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a set in the kernel should hold: keys, or ranges."""

    declaration: NftSet
    keys: frozenset[bytes] = frozenset()
    spans: frozenset[Range] = frozenset()


class NftablesSets:
    """The sets of one IP version. A transaction is told of all of them before it is committed.

    ``reshaped`` are the sets that began or ceased to hold networks since it was last cleared.
    """

    def __init__(self, nftables: Nftables) -> None:
        self._nftables = nftables
        self._version = nftables.version
        self._wanted: dict[str, _Wanted] = {}
        self._keyed: dict[str, _Keyed] = {}
        self._constants: dict[str, ConstantSet] = {}
        self._uses: dict[str, int] = {}  # of constant sets, by chains
        self._spans: dict[str, frozenset[Range]] = {}  # of those that hold networks
        self._present: dict[str, NftSet] = {}
        self._known: dict[str, frozenset[Range]] = {}  # ranges in the kernel
        self._compare: set[str] = set()  # what these hold is not known, or they are not there
        self._renetted: set[str] = set()  # whose ranges may have changed
        self._spare: set[str] = set()  # of the kernel's, that perhaps nobody wants
        self._add: dict[str, set[bytes]] = {}
        self._remove: dict[str, set[bytes]] = {}
        self.reshaped: set[str] = set()

    def holds_networks(self, name: str) -> bool:
        """Whether a set's networks stand in a second set of the kernel's."""
        return name in self._spans

    def declarations(self) -> Iterator[NftSet]:
        """The kernel's sets that should be there."""
        for name, wanted in self._wanted.items():
            yield set_declarations(self._version, name, wanted.kind)
            if name in self._spans:
                yield network_declaration(self._version, name)
        yield from (keyed.declaration for keyed in self._keyed.values())
        yield from (constant.declaration for constant in self._constants.values())

    def found(self, present: Mapping[str, NftSet]) -> None:
        """The sets in the kernel, just read; what they hold is compared at the next ``fill``."""
        self._present = dict(present)
        self._spare = set(present)
        self._compare = {*self._wanted, *self._keyed, *self._constants}
        self._known.clear()
        self._add.clear()
        self._remove.clear()

    def want(self, set_id: str, change: SetDelta, members: Callable[[], frozenset[Member]]) -> None:
        """A set came, changed or went."""
        name = set_name(set_id)
        if change.deleted:
            del self._wanted[name]
            self._spans.pop(name, None)
            self._forget(name)
            return
        if change.created:
            self._wanted[name] = _Wanted(change.kind, members)
            self._compare.add(name)
        else:
            self._change(name, _keys(change.added), _keys(change.removed))
        if change.created or any(map(_is_network, (*change.added, *change.removed))):
            self._update_spans(name)

    def want_keys(self, declaration: NftSet, keys: Callable[[], frozenset[bytes]]) -> None:
        """A set of that form came; it is to hold what ``keys`` says."""
        self._keyed[declaration.name] = _Keyed(declaration, keys)
        self._compare.add(declaration.name)

    def change_keys(self, name: str, added: Set[bytes], removed: Set[bytes]) -> None:
        """Keys came that were not in such a set, and went that were."""
        self._change(name, added, removed)

    def unwant_keys(self, name: str) -> None:
        """Such a set went."""
        del self._keyed[name]
        self._forget(name)

    def want_constant(self, constant: ConstantSet) -> None:
        """A chain refers to a list. One of several that do."""
        name = constant.declaration.name
        self._uses[name] = self._uses.get(name, 0) + 1
        if self._uses[name] == 1:
            self._constants[name] = constant
            self._compare.add(name)

    def unwant_constant(self, constant: ConstantSet) -> None:
        """A chain no longer refers to it."""
        name = constant.declaration.name
        self._uses[name] -= 1
        if not self._uses[name]:
            del self._uses[name], self._constants[name]
            self._forget(name)

    def preload(self) -> int:
        """Fill new sets that are large, or hold ranges, before the transaction to come.

        Ranges, because the kernel makes them ready to be looked up only after the rules of the
        same transaction are in force: for some microseconds packets would find none of them.
        Raises OSError.
        """
        changes = self._preload_ranges()
        for name in self._compare - self._present.keys():
            for contents in self._contents(name):
                if len(contents.keys) <= _BULK or contents.declaration.name in self._present:
                    continue
                every = list(contents.keys)
                for first in range(0, len(every), _BULK):
                    transaction = self._nftables.transaction()
                    transaction.create_table()
                    transaction.create_set(contents.declaration)
                    transaction.add_keys(contents.declaration.name, every[first : first + _BULK])
                    self._nftables.commit(transaction)
                self._present[contents.declaration.name] = contents.declaration
                changes += len(every)
        return changes

    def _preload_ranges(self) -> int:
        made = {
            contents.declaration.name: contents
            for name in self._compare | (self._renetted & self._spans.keys())
            for contents in self._contents(name)
            if contents.declaration.ranges and contents.declaration.name not in self._present
        }
        if not made:
            return 0
        transaction = self._nftables.transaction()
        transaction.create_table()
        for name, contents in sorted(made.items()):
            transaction.create_set(contents.declaration)
            transaction.add_ranges(name, contents.spans)
        self._nftables.commit(transaction)
        for name, contents in made.items():
            self._present[name] = contents.declaration
            if (holder := networks_holder(name)) is not None:
                self._known[holder] = contents.spans
        return len(made)

    def fill(self, transaction: Transaction) -> None:
        """Make the sets that are missing, and give all of them what they should hold."""
        for name in sorted(self._compare):
            for contents in self._contents(name):
                self._compare_one(transaction, contents)
        for name, keys in self._remove.items():
            transaction.delete_keys(name, keys)
        for name, keys in self._add.items():
            transaction.add_keys(name, keys)
        for name in self._renetted - self._compare:
            self._change_ranges(transaction, name)

    def trim(self, transaction: Transaction) -> None:
        """Remove the sets that nobody wants, once no rule refers to them."""
        for name in sorted(self._unwanted()):
            transaction.delete_set(name)

    def committed(self) -> None:
        """The transaction is in force."""
        wanted = {
            contents.declaration.name: contents.declaration
            for name in self._compare
            for contents in self._contents(name)
        }
        self._present.update(wanted)
        for name in self._renetted & self._spans.keys():
            declaration = network_declaration(self._version, name)
            self._present[declaration.name] = declaration
        for name in self._unwanted():
            del self._present[name]
        for name in self._renetted | self._compare:
            if name in self._spans:
                self._known[name] = self._spans[name]
            else:
                self._known.pop(name, None)
        for work in (self._compare, self._renetted, self._spare, self._add, self._remove):
            work.clear()

    def pending(self) -> bool:
        """Whether anything is to be done."""
        return bool(
            self._compare
            or self._renetted
            or any(self._add.values())
            or any(self._remove.values())
            or self._unwanted()
        )

    def _change(self, name: str, added: Set[bytes], removed: Set[bytes]) -> None:
        if name in self._compare:
            return
        add = self._add.setdefault(name, set())
        remove = self._remove.setdefault(name, set())
        # What came and went, or went and came, since the last transaction, is nothing.
        self._add[name] = (add - removed) | (added - remove)
        self._remove[name] = (remove - added) | (removed - add)

    def _forget(self, name: str) -> None:
        self._spare |= {name, networks_name(name)}
        self._known.pop(name, None)
        self._compare.discard(name)
        self._add.pop(name, None)
        self._remove.pop(name, None)

    def _unwanted(self) -> set[str]:
        """The sets in the kernel that should not be there."""
        return {n for n in self._spare if n in self._present and not self._is_wanted(n)}

    def _is_wanted(self, name: str) -> bool:
        if name in self._wanted or name in self._keyed or name in self._constants:
            return True
        holder = networks_holder(name)
        return holder is not None and holder in self._spans

    def _contents(self, name: str) -> Iterator[_Contents]:
        """The kernel's sets that a set takes."""
        constant = self._constants.get(name)
        if constant is not None:
            spans = frozenset(constant.spans)
            yield _Contents(constant.declaration, frozenset(constant.keys), spans)
            return
        keyed = self._keyed.get(name)
        if keyed is not None:
            yield _Contents(keyed.declaration, keyed.keys())
            return
        wanted = self._wanted[name]
        declaration = set_declarations(self._version, name, wanted.kind)
        yield _Contents(declaration, _keys(wanted.members()))
        if name in self._spans:
            yield _Contents(network_declaration(self._version, name), spans=self._spans[name])

    def _compare_one(self, transaction: Transaction, contents: _Contents) -> None:
        """Make one set of the kernel's, or change what is wrong about it."""
        name = contents.declaration.name
        if name not in self._present:
            transaction.create_set(contents.declaration)
            transaction.add_keys(name, contents.keys)
            transaction.add_ranges(name, contents.spans)
            return
        spans, keys = self._elements(transaction, contents.declaration)
        transaction.delete_ranges(name, spans - contents.spans)
        transaction.add_ranges(name, contents.spans - spans)
        transaction.delete_keys(name, keys - contents.keys)
        transaction.add_keys(name, contents.keys - keys)

    def _elements(
        self, transaction: Transaction, declaration: NftSet
    ) -> tuple[set[Range], set[bytes]]:
        """The ranges or keys of a set. One with elements that we never make is emptied first."""
        try:
            if declaration.ranges:
                return self._nftables.ranges(declaration.name), set()
            return set(), self._nftables.keys(declaration.name)
        except ForeignElementError:
            transaction.flush_set(declaration.name)
            return set(), set()

    def _change_ranges(self, transaction: Transaction, name: str) -> None:
        spans = self._spans.get(name)
        if spans is None:
            return  # the set goes
        if networks_name(name) not in self._present:
            transaction.create_set(network_declaration(self._version, name))
        before = self._known.get(name, frozenset())
        transaction.delete_ranges(networks_name(name), before - spans)
        transaction.add_ranges(networks_name(name), spans - before)

    def _update_spans(self, name: str) -> None:
        wanted = self._wanted[name]
        networks = [net for net in wanted.members() if _is_network(net)]
        had = name in self._spans
        if networks:
            self._spans[name] = frozenset(ranges(networks))  # type: ignore[arg-type]
        else:
            self._spans.pop(name, None)
            self._spare.add(networks_name(name))
        if had != bool(networks):
            self.reshaped.add(name)
        if had or networks:
            self._renetted.add(name)


def _is_network(member: Member) -> bool:
    return not isinstance(member, NamedPortMember) and not member.is_host


def _keys(members: Iterable[Member]) -> frozenset[bytes]:
    """The keys of hosts and of named ports."""
    found: set[bytes] = set()
    for member in members:
        if isinstance(member, NamedPortMember):
            port = member.port.to_bytes(2, "big")
            found.add(key(member.net.packed(), bytes((member.protocol,)), port))
        elif member.is_host:
            found.add(member.packed())
    return frozenset(found)
