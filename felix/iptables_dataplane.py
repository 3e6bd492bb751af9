"""Policy enforced by iptables and ipsets: reads what is ours once, and then knows it.

Ours are the chains that begin with ``cali-``, the rules with a comment ``cali:`` and a hash
in others' chains, and the sets of ``felix.iptables_sets``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from api.net import V4, V6
from felix import chains, names
from felix.chains import AnyChain, Chain, ChainRule, Index
from felix.dataplane import Members
from felix.desired import Delta, SetKey
from felix.index_keys import Indexes
from felix.iptables_index import IptablesKeySets, Shape, can_hold, chain_of, keys_of, name_of
from felix.iptables_order import Roles
from felix.iptables_renderer import RenderedChain, Renderer
from felix.iptables_sets import IptablesSets
from felix.settings import Settings
from felix.tables import Table
from kernel.iptables import IptablesTable, TableUpdate, rule_hashes
from kernel.iptables_variants import IptablesError, exists
from policy.engine import SetDelta
from policy.model import Direction, Member
from reconcile.plan import Plan

Fragments = tuple[str, ...]
Hashes = tuple[str, ...]

_DROP: Fragments = ("-j DROP",)
_UNKNOWN: Hashes = ("",)  # equal to nothing that is wanted


class _Table:
    """One table of one IP version. Keys of ``rules`` are chains, ours and those we hook into."""

    def __init__(
        self,
        version: int,
        kind: chains.Table,
        backend: str,
        renderer: Renderer,
        sets: IptablesSets,
        roles: Roles,
        indexes: Indexes[Shape, str],
    ) -> None:
        self.rules: Table[str, Hashes] = Table(self._apply)
        self._version = version
        self._kind = kind
        self._iptables = IptablesTable(version, kind.value, backend)
        self._renderer = renderer
        self._sets = sets
        self._roles = roles
        self._indexes = indexes
        self._lookups: dict[str, str] = {}  # indexes that are looked up in sets, by chain
        self._append = False
        self._dormant = False
        self._blocked: frozenset[str] = frozenset()  # sets that no chain may use now
        self._neutral: dict[str, AnyChain] = {}
        self._rendered: dict[str, dict[str, RenderedChain]] = {}  # by neutral chain
        self._fragments: dict[str, Fragments] = {}
        self._hooks: dict[str, Fragments] = {}

    def close(self) -> None:
        self._iptables.close()

    def configure(self, renderer: Renderer, *, append: bool) -> None:
        """Marks and places may have changed: everything is rendered again."""
        if append != self._append:
            # They are there, and may have to go, but not where they should be.
            self.rules.found({**self.rules.actual, **dict.fromkeys(self._hooks, _UNKNOWN)})
        self._renderer, self._append = renderer, append
        for chain in list(self._neutral.values()):
            self.want_chain(chain.name, chain)

    def want_chain(self, name: str, chain: AnyChain | None) -> None:
        before = self._rendered.pop(name, {})
        after: dict[str, RenderedChain] = {}
        if chain is None:
            del self._neutral[name]
        else:
            self._neutral[name] = chain
        self._look_up(name, chain)
        if chain is not None:
            after = self._rendered[name] = self._render(chain)
        for rendered in after.values():
            self._roles.come(rendered.fragments)
            for constant in rendered.sets:
                self._sets.want_constant(self._version, constant)
        for rendered in before.values():
            self._roles.go(rendered.fragments)
            for constant in rendered.sets:
                self._sets.unwant_constant(self._version, constant)
        for gone in before.keys() - after.keys():
            del self._fragments[gone]
            self.rules.want(gone, None)
        for made, rendered in after.items():
            self._fragments[made] = rendered.fragments
            self.rules.want(made, rule_hashes(made, rendered.fragments))

    def change_set(self, set_id: str, change: SetDelta) -> None:
        """Members came to a set, or went: indexes may depend on it."""
        for name in self._indexes.change_set(set_id, change):
            chain = chain_of(name)
            self.want_chain(chain, self._neutral[chain])

    def _look_up(self, name: str, chain: AnyChain | None) -> None:
        """Have the sets of an index, and no more those of the list that it was before."""
        before = self._lookups.pop(name, None)
        after = None
        if isinstance(chain, Index) and can_hold(chain):
            after = self._lookups[name] = name_of(chain)
            self._indexes.want(after, chain)
        if before is not None and before != after:
            self._indexes.forget(before)

    def _render(self, chain: AnyChain) -> dict[str, RenderedChain]:
        if isinstance(chain, Index) and chain.name in self._lookups:
            held = self._lookups[chain.name]
            return self._renderer.index(chain, held, self._indexes.shapes(held))
        return self._renderer.render(chain)

    def want_hook(self, place: str, rules: tuple[ChainRule, ...] | None) -> None:
        if rules is None:
            del self._hooks[place]
            self.rules.want(place, None)
            return
        hook = self._renderer.render(Chain(place, rules))[place].fragments
        self._hooks[place] = hook
        self.rules.want(place, rule_hashes(place, hook))

    def read(self) -> None:
        if not exists(self._version, self._kind.value, self._iptables.backend):
            self.rules.found({})
            return
        state = self._iptables.read()
        self._dormant = state.dormant
        insert, append = self._placed(self._hooks)
        wrong = state.update_to({}, insert, append).insert.keys()
        actual = dict(state.chains)
        for place in self._hooks.keys() | wrong:
            if place not in wrong:
                actual[place] = rule_hashes(place, self._hooks[place])
            elif any(state.inserted.get(place, ())):
                actual[place] = _UNKNOWN
        self.rules.found(actual)

    def do_without(self, blocked: frozenset[str]) -> None:
        """Chains drop that look up one of these sets: who uses it keeps it from being mended."""
        if changed := blocked ^ self._blocked:
            self.rules.vanished([name for name in self._fragments if self._uses(name, changed)])
        self._blocked = blocked

    def _uses(self, chain: str, sets: frozenset[str]) -> list[str]:
        texts = self._fragments[chain]
        return [name for name in sets if any(f"--match-set {name} " in text for text in texts)]

    def apply(self, now: float) -> int:
        steps = self._wake() + self.rules.apply(now)
        if self.rules.errors:
            # Perhaps somebody else changed our chains: begin from what is there.
            self.read()
            steps += self.rules.apply(now)
        if steps and self._kind is not chains.Table.FILTER:
            self._iptables.close()  # seldom needed: no reason to keep a process for it
        return steps

    def _wake(self) -> int:
        """Have packets see a table again that somebody put to sleep. Raises OSError."""
        if not self._dormant:
            return 0
        self._iptables.wake()
        self._dormant = False
        return 1

    def stands(self, chain: str) -> bool | None:
        """Whether a chain is in the kernel as it should be; None: it should not be there."""
        rendered = self._rendered.get(chain)
        if rendered is None:
            return None
        actual, desired = self.rules.actual, self.rules.desired
        return all(actual.get(made) == desired[made] for made in rendered)

    def problems(self) -> Iterator[tuple[str, str]]:
        for name, error in self.rules.errors.items():
            yield f"{self._iptables} chain {name}", str(error)

    def _placed(
        self, hooks: dict[str, Fragments]
    ) -> tuple[dict[str, Fragments], dict[str, Fragments]]:
        """Hooks as what to insert and what to append.

        Who translates the source first has the say about it: there, ours comes after others'.
        """
        insert: dict[str, Fragments] = {}
        append: dict[str, Fragments] = {}
        for place, rules in hooks.items():
            is_last = self._append or (self._kind, place) == (chains.Table.NAT, "POSTROUTING")
            (append if is_last else insert)[place] = rules
        return insert, append

    def _apply(self, plan: Plan[str, Hashes]) -> dict[str, Exception]:
        """In one transaction. A chain that iptables refuses is left as it is, or drops if new."""
        wanted = plan.create.keys() | plan.update.keys()
        fragments = {name: self._fragments[name] for name in wanted - self._hooks.keys()}
        refused: dict[str, Exception] = {}
        for name in fragments.keys() if self._blocked else ():
            if used := self._uses(name, self._blocked):
                fragments[name] = _DROP
                refused[name] = IptablesError(
                    f"drops until ipset {used[0]} is one of its type", name
                )
        while True:
            insert, append = self._placed({p: self._hooks[p] for p in wanted & self._hooks.keys()})
            gone = [name for name in plan.delete if not name.startswith("cali-")]
            update = TableUpdate(
                replace=fragments,
                delete=[name for name in plan.delete if name.startswith("cali-")],
                insert=insert | dict.fromkeys(gone, ()),
                append=append,
            )
            try:
                self._iptables.apply(update)
            except IptablesError as error:
                if error.chain not in fragments or fragments[error.chain] == _DROP:
                    return dict.fromkeys((*wanted, *plan.delete), error)
                refused[error.chain] = error
                if error.chain in plan.create:
                    fragments[error.chain] = _DROP
                else:
                    del fragments[error.chain]
                continue
            for name in refused.keys() & fragments.keys():
                self.rules.actual[name] = rule_hashes(name, _DROP)
            return refused


class IptablesDataplane:
    """The ``Enforcer`` that speaks to iptables and ipset."""

    def __init__(self, settings: Settings, members: Members, variant: str) -> None:
        """``variant`` is ``nft`` or ``legacy``."""
        self.variant = variant
        self._roles = Roles()
        self._sets = IptablesSets(members, self._roles)
        self._tables = {
            (version, kind): _Table(
                version,
                kind,
                variant,
                Renderer(version, settings.iptables, kind),
                self._sets,
                self._roles,
                Indexes(
                    version,
                    IptablesKeySets(version, self._sets),
                    keys_of,
                    partial(_members_of, members, version),
                ),
            )
            for version in (V4, V6)
            for kind in chains.Table
        }

    def close(self) -> None:
        """End the processes. What is in the kernel stays."""
        for table in self._tables.values():
            table.close()
        self._sets.close()

    def want(self, delta: Delta) -> None:
        """Take what became different."""
        if delta.settings is not None:
            self._configure(delta.settings)
        for set_key, change in delta.sets.items():
            self._sets.want(set_key, change)
            if not change.created:
                table = self._tables[set_key.version, chains.Table.FILTER]
                table.change_set(set_key.id, change)
        for key, chain in delta.chains.items():
            self._tables[key.version, key.table].want_chain(key.name, chain)
        for (version, hook), rules in delta.hooks.items():
            if not hook.behind_ipvs:
                self._tables[version, hook.table].want_hook(hook.chain, rules)

    def read(self) -> None:
        """See what is in the kernel. Raises IptablesError, OSError."""
        self._sets.read()
        for table in self._tables.values():
            table.read()

    def untouched(self) -> bool:
        """No: who changed what since, nobody tells."""
        return False

    def fill_sets(self, now: float) -> int:
        """Make sets and add members."""
        changes = self._sets.fill(now)
        blocked = self._sets.blocked()
        for table in self._tables.values():
            table.do_without(blocked)
        return changes

    def apply_chains(self, now: float) -> int:
        """Change chains and hooks, each table in one transaction."""
        return sum(table.apply(now) for table in self._tables.values())

    def trim_sets(self, now: float) -> int:
        """Remove members and destroy sets."""
        changes = self._sets.trim(now)
        self._roles.gone()
        return changes

    def enforces(self, interface: str) -> bool:
        """Whether the chains of a workload's interface stand, and packets are sent there."""
        ends = [names.endpoint_chain(direction, interface) for direction in Direction]
        known = False
        for (_, kind), table in self._tables.items():
            if kind is not chains.Table.FILTER:
                continue
            found = [table.stands(end) for end in ends]
            if False in found:
                return False
            if True in found:
                known = True
                if not (table.stands(names.FROM_WORKLOAD) and table.stands(names.TO_WORKLOAD)):
                    return False
        return known

    def problems(self) -> Iterator[tuple[str, str]]:
        """(object, what the kernel said)."""
        for name, error in self._sets.errors.items():
            yield f"ipset {name}", str(error)
        for table in self._tables.values():
            yield from table.problems()

    def next_retry(self) -> float | None:
        """When something that failed is due again."""
        times = [table.rules.next_retry() for table in self._tables.values()]
        times.append(self._sets.next_retry())
        return min((time for time in times if time is not None), default=None)

    def _configure(self, settings: Settings) -> None:
        self._sets.max_size = settings.max_set_size
        for (version, kind), table in self._tables.items():
            renderer = Renderer(version, settings.iptables, kind)
            table.configure(renderer, append=settings.append_hooks)


def _members_of(members: Members, version: int, set_id: str) -> frozenset[Member]:
    return members(SetKey(version, set_id))
