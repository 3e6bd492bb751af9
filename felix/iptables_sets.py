"""Neutral sets → ipsets: filled before rules refer to them, trimmed after.

Ours are the sets whose names begin with ``cali``. What they hold is not kept here: after a
change went well a set holds what was wanted; when one failed, and at a resync, it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

from felix import names
from felix.dataplane import Members
from felix.desired import SetKey
from felix.iptables_matches import ConstantSet
from felix.iptables_order import Roles
from kernel.ipsets import IpSet, IpSets, net_members, port_member
from policy.engine import SetDelta
from policy.model import Member, NamedPortMember, SetKind
from reconcile.backoff import Backoff

_TYPES = {SetKind.NET: "hash:net", SetKind.NAMED_PORT: "hash:ip,port"}

_PATIENCE = 2.0  # seconds between attempts, from which on a set that stays in use is a problem
_BUSY = 4100  # IPSET_ERR_BUSY: a rule refers to the set

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A set that should be there, and where to learn what it should hold."""

    ipset: IpSet
    texts: Callable[[], frozenset[str]]


class IptablesSets:
    """The ipsets of both IP versions. ``errors`` are the sets that are not as they should be."""

    def __init__(self, members: Members, roles: Roles) -> None:
        self._ipsets = IpSets("cali")
        self._roles = roles
        self._members = members
        self._wanted: dict[str, _Wanted] = {}
        self._uses: dict[str, int] = {}  # of constant sets, by chains
        self._present: dict[str, IpSet] = {}
        self._compare: set[str] = set()  # what these hold is not known
        self._doomed: set[str] = set()
        self._add: dict[str, set[str]] = {}
        self._remove: dict[str, set[str]] = {}
        self._backoff: Backoff[str] = Backoff()
        self.max_size = 1 << 20
        self.errors: dict[str, Exception] = {}

    def close(self) -> None:
        """Close the socket."""
        self._ipsets.close()

    def read(self) -> None:
        """See which sets are there; what they hold is compared at the next ``fill``."""
        self._present = self._ipsets.headers()
        self._compare = set(self._wanted)
        self._doomed = self._present.keys() - self._wanted.keys()

    def want(self, key: SetKey, change: SetDelta) -> None:
        """A set came, changed or went."""
        name = names.set_name(key.id, key.version)
        if change.deleted:
            self._unwant(name)
        elif change.created:
            kind = _TYPES[change.kind]
            self._want(name, key.version, kind, lambda: _texts(self._members(key)))
        else:
            self._change(name, _texts(change.added), _texts(change.removed))

    def want_texts(
        self, version: int, set_id: str, kind: str, texts: Callable[[], frozenset[str]]
    ) -> None:
        """A set of members as ipset writes them came, to hold what ``texts`` says."""
        self._want(names.set_name(set_id, version), version, kind, texts)

    def change_texts(self, version: int, set_id: str, came: Set[str], went: Set[str]) -> None:
        """Members of such a set came and went."""
        self._change(names.set_name(set_id, version), came, went)

    def unwant_texts(self, version: int, set_id: str) -> None:
        """Such a set went."""
        self._unwant(names.set_name(set_id, version))

    def want_constant(self, version: int, constant: ConstantSet) -> None:
        """A chain refers to a list of networks. One of several that do."""
        name = names.set_name(constant.id, version)
        self._uses[name] = self._uses.get(name, 0) + 1
        if self._uses[name] == 1:
            self._want(name, version, _TYPES[SetKind.NET], lambda: _texts(constant.members))

    def unwant_constant(self, version: int, constant: ConstantSet) -> None:
        """A chain no longer refers to it."""
        name = names.set_name(constant.id, version)
        self._uses[name] -= 1
        if not self._uses[name]:
            del self._uses[name]
            self._unwant(name)

    def blocked(self) -> frozenset[str]:
        """Sets in whose place there is another of their name, of another type, that rules use."""
        return frozenset(name for name in self.errors if self._is_obstructed(name))

    def fill(self, now: float) -> int:
        """Make the sets that are missing and add the members that are; so many changes."""
        due = self._backoff.due(now)
        if due:
            # Perhaps they failed because somebody else changed them.
            self._present = self._ipsets.headers()
            self._compare.update(filter(self._is_obstructed, self._wanted))
        for name in due:
            (self._compare if name in self._wanted else self._doomed).add(name)
        changes = sum(self._attempt(name, self._make, now) for name in self._compare)
        self._compare.clear()
        adding, self._add = self._add, {}
        in_turn = sorted(adding, key=self._roles.of)
        return changes + self._update({name: (adding[name], ()) for name in in_turn}, now)

    def trim(self, now: float) -> int:
        """Remove the members that do not belong, and the sets that nobody wants."""
        removing, self._remove = self._remove, {}
        in_turn = sorted(removing.keys() & self._wanted.keys(), key=self._roles.of, reverse=True)
        changes = self._update({name: ((), removing[name]) for name in in_turn}, now)
        changes += sum(self._attempt(name, self._destroy, now) for name in self._doomed)
        self._doomed.clear()
        return changes

    def next_retry(self) -> float | None:
        """When something that failed is due again."""
        return self._backoff.next_due()

    def _want(
        self, name: str, version: int, kind: str, texts: Callable[[], frozenset[str]]
    ) -> None:
        self._wanted[name] = _Wanted(IpSet(name, kind, version, self.max_size), texts)
        self._compare.add(name)
        self._doomed.discard(name)

    def _change(self, name: str, added: Set[str], removed: Set[str]) -> None:
        if name not in self._compare:
            self._add[name] = (self._add.get(name, set()) - removed) | added
            self._remove[name] = (self._remove.get(name, set()) - added) | removed

    def _unwant(self, name: str) -> None:
        del self._wanted[name]
        self._compare.discard(name)
        self._add.pop(name, None)
        self._remove.pop(name, None)
        self._doomed.add(name)

    def _attempt(self, name: str, step: Callable[[str], int], now: float) -> int:
        try:
            changes = step(name)
        except OSError as error:
            self._failed(name, error, now)
            return 0
        self._backoff.succeeded(name)
        self.errors.pop(name, None)
        return changes

    def _failed(self, name: str, error: OSError, now: float) -> None:
        again = self._backoff.failed(name, now)
        if error.errno == _BUSY and name not in self._wanted and again - now < _PATIENCE:
            return  # the kernel lets go of a deleted rule only some milliseconds later
        if str(self.errors.get(name)) != str(error):
            _log.warning("%s; will be tried again", error)
        self.errors[name] = error

    def _make(self, name: str) -> int:
        """Make the set; of one that is there, note what is missing and what is too much."""
        ipset, wanted = self._wanted[name].ipset, self._wanted[name].texts()
        if self._is_obstructed(name):
            self._destroy(name)
        actual = self._ipsets.members(name) if name in self._present else None
        if actual is None:
            self._ipsets.create(ipset, wanted)
            self._present[name] = ipset
            return 1 + len(wanted)
        self._add[name] = set(wanted - actual)
        self._remove[name] = set(actual - wanted)
        return 0

    def _is_obstructed(self, name: str) -> bool:
        """Whether a set is wanted where there is one of another type."""
        wanted, present = self._wanted.get(name), self._present.get(name)
        if wanted is None or present is None:
            return False
        return (present.kind, present.family) != (wanted.ipset.kind, wanted.ipset.family)

    def _destroy(self, name: str) -> int:
        if name not in self._present:
            return 0
        self._ipsets.destroy(name)
        del self._present[name]
        return 1

    def _update(self, deltas: dict[str, tuple[Iterable[str], Iterable[str]]], now: float) -> int:
        sized = {name: (tuple(added), tuple(removed)) for name, (added, removed) in deltas.items()}
        # What is in another set's place is not to be changed, but made anew, with all members.
        sized = {n: both for n, both in sized.items() if any(both) and not self._is_obstructed(n)}
        if not sized:
            return 0
        for name, error in self._ipsets.update(sized).items():
            self._failed(name, error, now)
        return sum(len(added) + len(removed) for added, removed in sized.values())


def _texts(members: Iterable[Member]) -> frozenset[str]:
    """Members as ipset writes them."""
    texts: set[str] = set()
    for member in members:
        if isinstance(member, NamedPortMember):
            texts.add(port_member(*member))
        else:
            texts.update(net_members(member))
    return frozenset(texts)
