"""The members of the sets that rules refer to, kept up to date endpoint by endpoint.

A set is there while somebody uses it. Its members are never stored: they follow from the
label index. An address that several endpoints share is a member as long as one of those
that match has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from api.net import Net
from policy.compile import SetSpec
from policy.labelindex import LabelIndex
from policy.model import Endpoint, EndpointId, Member, NamedPortMember, SetKind


@dataclass(frozen=True, slots=True)
class SetDelta:
    """What became of a set since the last flush.

    ``created``: ``added`` is all there is. ``deleted``: nobody uses it any more; both member
    sets are empty.
    """

    kind: SetKind
    added: frozenset[Member]
    removed: frozenset[Member]
    created: bool
    deleted: bool


class Sets(Mapping[str, frozenset[Member]]):
    """All sets in use, by id, and their members now."""

    def __init__(self) -> None:
        self._index: LabelIndex[EndpointId] = LabelIndex()
        self._endpoints: dict[EndpointId, Endpoint] = {}
        self._owners: dict[Net, tuple[EndpointId, ...]] = {}
        self._users: dict[SetSpec, int] = {}
        self._specs: dict[str, SetSpec] = {}  # the sets that exist
        self._by_selector: dict[str, dict[str, SetSpec]] = {}  # selector id -> set id -> spec
        self._touched: set[SetSpec] = set()  # users changed since the last flush
        self._changes: dict[str, dict[Member, bool]] = {}
        self._cache: dict[str, frozenset[Member]] = {}

    def __getitem__(self, set_id: str) -> frozenset[Member]:
        members = self._cache.get(set_id)
        if members is None:
            members = self._cache[set_id] = frozenset(self._all_members(self._specs[set_id]))
        return members

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, set_id: object) -> bool:
        return set_id in self._specs

    def retain(self, spec: SetSpec) -> None:
        """One user more."""
        self._users[spec] = self._users.get(spec, 0) + 1
        self._touched.add(spec)

    def release(self, spec: SetSpec) -> None:
        """One user less."""
        self._users[spec] -= 1
        self._touched.add(spec)

    def set_endpoint(
        self, id: EndpointId, endpoint: Endpoint | None, labels: Mapping[str, str] | None
    ) -> None:
        """Take an endpoint and all its labels, inherited ones too; None: it is gone."""
        old = self._endpoints.pop(id, None)
        if endpoint is not None:
            self._endpoints[id] = endpoint
        self._change_owner(id, old.nets if old else (), endpoint.nets if endpoint else ())
        gained, lost = self._index.set_item(id, labels)
        for selector in lost:
            for spec in self._by_selector[selector.id].values():
                self._remove(spec, id, _members(spec, old))
        for selector in gained:
            for spec in self._by_selector[selector.id].values():
                self._add(spec, id, _members(spec, endpoint))
        if old and endpoint and (old.nets, old.ports) != (endpoint.nets, endpoint.ports):
            fresh = {selector.id for selector in gained}
            for selector in self._index.selectors_of(id):
                if selector.id not in fresh:
                    for spec in self._by_selector[selector.id].values():
                        before, after = _members(spec, old), _members(spec, endpoint)
                        self._remove(spec, id, before - after)
                        self._add(spec, id, after - before)

    def flush(self) -> dict[str, SetDelta]:
        """Create and delete sets as their users demand; all that changed since the last flush."""
        deltas: dict[str, SetDelta] = {}
        for spec in self._touched:
            exists, used = spec.id in self._specs, self._users[spec] > 0
            if not used:
                del self._users[spec]
            if used and not exists:
                self._create(spec)
                members = frozenset(self._all_members(spec))
                deltas[spec.id] = SetDelta(spec.kind, members, frozenset(), True, False)
            elif exists and not used:
                self._delete(spec)
                deltas[spec.id] = SetDelta(spec.kind, frozenset(), frozenset(), False, True)
        for set_id, changes in self._changes.items():
            if changes and set_id not in deltas:
                added = frozenset(member for member, present in changes.items() if present)
                removed = frozenset(member for member, present in changes.items() if not present)
                deltas[set_id] = SetDelta(self._specs[set_id].kind, added, removed, False, False)
        self._touched.clear()
        self._changes.clear()
        return deltas

    def _create(self, spec: SetSpec) -> None:
        self._specs[spec.id] = spec
        self._by_selector.setdefault(spec.selector.id, {})[spec.id] = spec
        self._index.add_selector(spec.selector)

    def _delete(self, spec: SetSpec) -> None:
        del self._specs[spec.id]
        self._cache.pop(spec.id, None)
        sharing = self._by_selector[spec.selector.id]
        del sharing[spec.id]
        if not sharing:
            del self._by_selector[spec.selector.id]
            self._index.remove_selector(spec.selector)

    def _all_members(self, spec: SetSpec) -> Iterator[Member]:
        for id in self._index.matches(spec.selector):
            yield from _members(spec, self._endpoints[id])

    def _change_owner(self, id: EndpointId, old: tuple[Net, ...], new: tuple[Net, ...]) -> None:
        if old == new:
            return
        for net in set(old):
            owners = tuple(owner for owner in self._owners[net] if owner != id)
            if owners:
                self._owners[net] = owners
            else:
                del self._owners[net]
        for net in set(new):
            self._owners[net] = (*self._owners.get(net, ()), id)

    def _add(self, spec: SetSpec, id: EndpointId, members: frozenset[Member]) -> None:
        for member in members:
            if not self._held_by_other(spec, id, member):
                self._record(spec, member, True)

    def _remove(self, spec: SetSpec, id: EndpointId, members: frozenset[Member]) -> None:
        for member in members:
            if not self._held_by_other(spec, id, member):
                self._record(spec, member, False)

    def _held_by_other(self, spec: SetSpec, id: EndpointId, member: Member) -> bool:
        net = member.net if isinstance(member, NamedPortMember) else member
        return any(
            owner != id
            and self._index.is_match(spec.selector, owner)
            and member in _members(spec, self._endpoints[owner])
            for owner in self._owners.get(net, ())
        )

    def _record(self, spec: SetSpec, member: Member, present: bool) -> None:
        """Note a member that came or went; coming and going between flushes is nothing."""
        self._cache.pop(spec.id, None)
        changes = self._changes.setdefault(spec.id, {})
        if changes.get(member) is (not present):
            del changes[member]
        else:
            changes[member] = present


class JoinedSets(Mapping[str, frozenset[Member]]):
    """Two tables of sets, whose ids differ, as one."""

    def __init__(self, first: Sets, second: Sets) -> None:
        self._first, self._second = first, second

    def __getitem__(self, set_id: str) -> frozenset[Member]:
        return (self._first if set_id in self._first else self._second)[set_id]

    def __iter__(self) -> Iterator[str]:
        yield from self._first
        yield from self._second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __contains__(self, set_id: object) -> bool:
        return set_id in self._first or set_id in self._second


def _members(spec: SetSpec, endpoint: Endpoint | None) -> frozenset[Member]:
    """What an endpoint that matches contributes to a set."""
    if endpoint is None:
        return frozenset()
    if not spec.port:
        return frozenset(endpoint.nets)
    return frozenset(
        NamedPortMember(net, port.protocol, port.port)
        for port in endpoint.ports
        if port.name == spec.port and spec.protocol in (0, port.protocol)
        for net in endpoint.nets
    )
