"""Long lists of policies: those of a tier that a packet may be looked up in, all at once.

An endpoint walks the policies of a tier one after the other. Where many of them in a row do
nothing but allow, or nothing but deny, or nothing but pass, their order doesn't matter; so those
whose rules are plain (protocol, ports, a peer) become an ``Index``, which comes first, and
the others of the row are walked behind it. Endpoints with the same list share it.

An index is called after the first interface that uses it, not after what is in it: so a policy
that comes, changes or goes changes an index rather than make another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from felix import names
from felix.chains import PORT_PROTOCOLS, Index, Peer, Ticket
from felix.policy_rules import UNIFORM, Step, policy_steps
from policy.engine import SetDelta
from policy.model import (
    Action,
    CompiledPolicy,
    Direction,
    EndpointBinding,
    Match,
    PolicyId,
    Rule,
    SetKind,
    TierBinding,
)

LEAST = 12  # so many policies in a row are worth an index
# A rule has a key for each peer and port. Of a set's members, of a rule's nets, and of its ports,
# with one peer and with more:
MOST_MEMBERS = 256
MOST_NETS = 256
MOST_PORTS = 16
MOST_PORTS_EACH = 4

_PEERS = {Direction.INGRESS: Peer.SOURCE, Direction.EGRESS: Peer.DESTINATION}


class _Outline(NamedTuple):
    """A policy of which all rules do the same; ``action`` None: it has none.

    ``entry`` is what an index holds of it; None: some rule is more than a ticket can say.
    """

    action: Action | None
    entry: tuple[str, tuple[Ticket, ...]] | None
    sets: frozenset[str] = frozenset()


class _RollKey(NamedTuple):
    direction: Direction
    tier: str
    policies: tuple[PolicyId, ...]


@dataclass(slots=True)
class _Roll:
    """A long list of policies, and the interfaces of the endpoints that have it."""

    users: set[str] = field(default_factory=set)
    steps: tuple[Step, ...] = ()
    indexes: dict[str, Index] = field(default_factory=dict)
    positions: dict[PolicyId, tuple[str, int]] = field(default_factory=dict)  # in indexes


@dataclass(slots=True)
class _Way:
    """What is known of policies in one direction."""

    outlines: dict[PolicyId, _Outline] = field(default_factory=dict)
    users: dict[PolicyId, set[_RollKey]] = field(default_factory=dict)
    by_set: dict[str, set[PolicyId]] = field(default_factory=dict)


class Runs:
    """What becomes of the long lists of all workloads. ``indexes`` are the present ones by name."""

    def __init__(self) -> None:
        self._ways = {direction: _Way() for direction in Direction}
        self._large: set[str] = set()  # sets with too many members
        self._sizes: dict[str, int] = {}
        self._rolls: dict[_RollKey, _Roll] = {}
        self._bound: dict[str, tuple[_RollKey, ...]] = {}  # by interface
        self._dirty: set[_RollKey] = set()
        self._edited: dict[_RollKey, set[PolicyId]] = {}  # policies that stay where they are
        self.indexes: dict[str, Index] = {}

    def change_policies(self, changed: Mapping[PolicyId, CompiledPolicy | None]) -> None:
        """Active policies as they are now."""
        for direction, way in self._ways.items():
            for id, policy in changed.items():
                self._change_policy(way, id, _outline(policy, direction) if policy else None)

    def _change_policy(self, way: _Way, id: PolicyId, after: _Outline | None) -> None:
        before = way.outlines.pop(id, None)
        if after is not None:
            way.outlines[id] = after
        if before == after:
            return
        for set_id in before.sets if before else ():
            way.by_set[set_id].discard(id)
            if not way.by_set[set_id]:
                del way.by_set[set_id]
        for set_id in after.sets if after else ():
            way.by_set.setdefault(set_id, set()).add(id)
        stays = (
            before is not None
            and after is not None
            and before.action is after.action
            and self._is_plain(before)
            and self._is_plain(after)
        )
        for key in way.users.get(id, ()):
            if stays:
                self._edited.setdefault(key, set()).add(id)
            else:
                self._dirty.add(key)

    def change_sets(self, changed: Mapping[str, SetDelta]) -> None:
        """What became of sets: whether they are small enough."""
        for set_id, change in changed.items():
            if change.kind is not SetKind.NET:
                continue
            if change.deleted:
                self._sizes.pop(set_id, None)
                self._large.discard(set_id)
                continue
            before = 0 if change.created else self._sizes[set_id]
            size = self._sizes[set_id] = before + len(change.added) - len(change.removed)
            if (size > MOST_MEMBERS) is (set_id in self._large):
                continue
            self._large ^= {set_id}
            for way in self._ways.values():
                for id in way.by_set.get(set_id, ()):
                    self._dirty |= way.users.get(id, set())

    def bind(self, interface: str, binding: EndpointBinding | None) -> None:
        """The policies of an interface's endpoint as they are now; None: it has no chains."""
        after = tuple(_long_lists(binding)) if binding else ()
        before = self._bound.get(interface, ())
        if before == after:
            return
        if after:
            self._bound[interface] = after
        else:
            del self._bound[interface]
        for key in before:
            self._rolls[key].users.discard(interface)
        for key in after:
            if key not in self._rolls:
                self._rolls[key] = _Roll()
                users = self._ways[key.direction].users
                for id in key.policies:
                    users.setdefault(id, set()).add(key)
            self._rolls[key].users.add(interface)
        self._dirty.update(before, after)

    def flush(self) -> tuple[set[str], set[str]]:
        """Bring all up to date: the indexes that may be different, the interfaces that are."""
        named: set[str] = set()
        interfaces: set[str] = set()
        touched = {key: self._rolls[key] for key in self._dirty if key in self._rolls}
        self._dirty.clear()
        for key, roll in touched.items():
            named |= roll.indexes.keys()
            for name in roll.indexes:
                self.indexes.pop(name, None)
            if not roll.users:
                self._drop(key)
        for key, roll in touched.items():
            if not roll.users:
                continue
            before, roll.indexes = roll.steps, {}
            roll.steps = tuple(self._lay_out(key, roll))
            if roll.steps != before:
                interfaces |= roll.users
            named |= roll.indexes.keys()
            self.indexes |= roll.indexes
        for key, policies in self._edited.items():
            if key in self._rolls and key not in touched:
                named |= self._edit(key, policies)
        self._edited.clear()
        return interfaces, named

    def steps(self, tier: TierBinding, direction: Direction) -> Iterable[Step]:
        """What to walk for a tier of an endpoint that was bound, in order."""
        policies = tier.policies(direction)
        if len(policies) < LEAST:
            return policy_steps(tier, direction)
        return self._rolls[_RollKey(direction, tier.name, policies)].steps

    def _drop(self, key: _RollKey) -> None:
        del self._rolls[key]
        users = self._ways[key.direction].users
        for id in key.policies:
            users[id].discard(key)
            if not users[id]:
                del users[id]

    def _edit(self, key: _RollKey, policies: Iterable[PolicyId]) -> set[str]:
        """Change what policies say in the indexes of a roll; the names of these."""
        roll, outlines = self._rolls[key], self._ways[key.direction].outlines
        entries: dict[str, list[tuple[str, tuple[Ticket, ...]]]] = {}
        for id in policies:
            if id in roll.positions:
                name, position = roll.positions[id]
                changed = entries.setdefault(name, list(roll.indexes[name].entries))
                changed[position] = outlines[id].entry or changed[position]
        for name, changed in entries.items():
            index = replace(roll.indexes[name], entries=tuple(changed))
            roll.indexes[name] = self.indexes[name] = index
        return set(entries)

    def _lay_out(self, key: _RollKey, roll: _Roll) -> Iterator[Step]:
        """The steps of a roll; its indexes are noted there."""
        roll.positions = {}
        outlines = self._ways[key.direction].outlines
        for row in self._rows(key):
            plain = [id for id in row if id in outlines and self._is_plain(outlines[id])]
            if len(plain) < LEAST:
                plain = []
            else:
                index = self._index(key, roll, plain)
                roll.indexes[index.name] = index
                roll.positions |= {id: (index.name, at) for at, id in enumerate(plain)}
                yield Step(index.name)
            for id in row:
                if id not in roll.positions:
                    yield Step(names.policy_chain(key.direction, id), not id.is_staged)

    def _rows(self, key: _RollKey) -> Iterator[list[PolicyId]]:
        """Neighbours that do the same, or nothing."""
        outlines = self._ways[key.direction].outlines
        row: list[PolicyId] = []
        action: Action | None = None
        for id in key.policies:
            outline = outlines.get(id)
            fits = outline and (None in (action, outline.action) or action is outline.action)
            if row and not fits:
                yield row
                row, action = [], None
            row.append(id)
            if outline is None:
                yield row
                row, action = [], None
            else:
                action = action or outline.action
        if row:
            yield row

    def _is_plain(self, outline: _Outline) -> bool:
        return outline.entry is not None and self._large.isdisjoint(outline.sets)

    def _index(self, key: _RollKey, roll: _Roll, policies: Iterable[PolicyId]) -> Index:
        outlines = [self._ways[key.direction].outlines[id] for id in policies]
        entries = tuple(outline.entry for outline in outlines if outline.entry is not None)
        action = next((o.action for o in outlines if o.action is not None), Action.ALLOW)
        place = f"{key.tier}/{len(roll.indexes)}/{min(roll.users)}"
        name = names.index_chain(key.direction, place)
        return Index(name, _PEERS[key.direction], UNIFORM[action], entries)


def _long_lists(binding: EndpointBinding) -> Iterator[_RollKey]:
    for tier in binding.tiers:
        for direction in Direction:
            policies = tier.policies(direction)
            if len(policies) >= LEAST:
                yield _RollKey(direction, tier.name, policies)


def _outline(policy: CompiledPolicy, direction: Direction) -> _Outline | None:
    """None: its rules do different things, or some log, or it is staged, or not for this way."""
    rules = policy.ingress if direction is Direction.INGRESS else policy.egress
    if rules is None or policy.id.is_staged:
        return None
    actions = {rule.action for rule in rules}
    name = names.policy_chain(direction, policy.id)
    if not actions:
        return _Outline(None, (name, ()))
    if len(actions) > 1 or Action.LOG in actions:
        return None
    tickets = [_ticket(rule, direction) for rule in rules]
    plain = tuple(ticket for ticket in tickets if ticket is not None)
    if len(plain) < len(tickets):
        return _Outline(actions.pop(), None)
    sets = frozenset(ticket.set_id for ticket in plain if ticket.set_id)
    return _Outline(actions.pop(), (name, plain), sets)


def _ticket(rule: Rule, direction: Direction) -> Ticket | None:
    """The rule as a ticket; None: it says more, or would take too many entries."""
    match = rule.match
    if direction is Direction.INGRESS:
        nets, sets = match.src_nets, match.src_sets
        said = Match(
            protocol=match.protocol, src_nets=nets, src_sets=sets, dst_ports=match.dst_ports
        )
    else:
        nets, sets = match.dst_nets, match.dst_sets
        said = Match(
            protocol=match.protocol, dst_nets=nets, dst_sets=sets, dst_ports=match.dst_ports
        )
    if said != match or len(sets) + bool(nets) > 1 or len(nets) > MOST_NETS:
        return None
    if match.dst_ports and match.protocol not in PORT_PROTOCOLS:
        return None
    most = MOST_PORTS_EACH if sets or len(nets) > 1 else MOST_PORTS
    if sum(last - first + 1 for first, last in match.dst_ports) > most:
        return None
    ports = {port for first, last in match.dst_ports for port in range(first, last + 1)}
    return Ticket(match.protocol, tuple(sorted(ports)), sets[0] if sets else "", nets or None)
