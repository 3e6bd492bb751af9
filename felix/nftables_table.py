"""The table of one IP version: what is wanted, what is in the kernel, and what may differ.

Ours is the table ``calico`` of families ip and ip6, and all that is in it. A transaction takes
everything that became different, so packets never see a new chain beside an old set.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from felix import names
from felix.chains import (
    AnyChain,
    Chain,
    ChainRule,
    Dispatch,
    Drop,
    Hook,
    Index,
    SourceDispatch,
    Table,
)
from felix.dataplane import Members
from felix.desired import Delta, SetKey
from felix.index_keys import Indexes
from felix.nftables_index import NftablesKeySets, keys_of
from felix.nftables_renderer import (
    RenderedChain,
    Renderer,
    chain_name,
    dispatch_map,
)
from felix.nftables_sets import NftablesSets
from felix.settings import Settings
from kernel.nft_expressions import interface_name
from kernel.nft_sets import ForeignElementError, NftSet, Target
from kernel.nftables import (
    BaseChain,
    ChainState,
    Nftables,
    NftablesError,
    TableState,
    Transaction,
)
from policy.model import Direction, Member
from reconcile.backoff import Backoff

TABLE = "calico"

# nft(8): raw, mangle, filter, dstnat and srcnat. In the last ours comes after others', whose
# translations stand.
_KINDS = {
    Table.RAW: "filter",
    Table.MANGLE: "filter",
    Table.FILTER: "filter",
    Table.NAT: "nat",
}
_PRIORITIES = {
    Hook(Table.RAW, "PREROUTING"): -300,
    Hook(Table.RAW, "OUTPUT"): -300,
    Hook(Table.MANGLE, "PREROUTING"): -150,
    Hook(Table.MANGLE, "POSTROUTING"): -150,
    Hook(Table.FILTER, "FORWARD"): 0,
    Hook(Table.FILTER, "INPUT"): 0,
    Hook(Table.FILTER, "OUTPUT"): 0,
    # ipvs: 98 and 99 (net/netfilter/ipvs/ip_vs_core.c), srcnat: 100
    Hook(Table.FILTER, "INPUT", behind_ipvs=True): 101,
    Hook(Table.NAT, "PREROUTING"): -100,
    Hook(Table.NAT, "OUTPUT"): -100,
    Hook(Table.NAT, "POSTROUTING"): 110,
}

_DISPATCHES = {
    Direction.EGRESS: names.FROM_WORKLOAD,
    Direction.INGRESS: names.TO_WORKLOAD,
}

_log = logging.getLogger(__name__)


class NftablesTable:
    """See the module. For one thread at a time."""

    def __init__(self, version: int, settings: Settings, members: Members) -> None:
        self._nftables = Nftables(version, TABLE)
        self._version = version
        self._members = members
        self._sets = NftablesSets(self._nftables)
        key_sets = NftablesKeySets(version, self._sets)
        self._indexes = Indexes(version, key_sets, keys_of, self._members_of)
        self._renderer = self._make_renderer(settings)
        self._neutral: dict[str, tuple[Table, AnyChain]] = {}
        self._rendered: dict[str, RenderedChain] = {}
        self._bases: dict[str, BaseChain] = {}
        self._maps: dict[str, tuple[NftSet, dict[bytes, Target]]] = {}
        self._users: dict[str, set[str]] = {}  # set -> the chains that look it up
        self._chains: dict[str, ChainState] = {}  # in the kernel
        self._targets: dict[str, dict[bytes, Target]] = {}  # of the maps in the kernel
        self._foreign: set[str] = set()  # maps with elements that we never make
        self._exists = False
        self._dormant = False
        self._obstructed = False  # the table has sets of our names that can't be ours
        self._dirty: set[str] = set()  # chains
        self._dirty_maps: set[str] = set()
        self._refused: dict[str, RenderedChain] = {}  # as which the kernel refused a chain
        self._news = False  # something else is wanted than at the last attempt
        self._backoff: Backoff[str] = Backoff()
        self.errors: dict[str, str] = {}

    def close(self) -> None:
        """Close the socket. What is in the kernel stays."""
        self._nftables.close()

    @property
    def port(self) -> int:
        """See ``Nftables.port``."""
        return self._nftables.port

    @property
    def commits(self) -> int:
        """See ``Nftables.commits``."""
        return self._nftables.commits

    def generation(self) -> int:
        """See ``Nftables.generation``. Raises OSError."""
        return self._nftables.generation()

    def configure(self, settings: Settings) -> None:
        """Marks may have changed: everything is rendered again."""
        self._renderer = self._make_renderer(settings)
        for name in self._neutral:
            self._render(name)

    def want_set(self, key: SetKey, delta: Delta) -> None:
        """A set of ``delta`` came, changed or went."""
        self._news = True
        change = delta.sets[key]
        self._sets.want(key.id, change, lambda: self._members(key))
        if not change.created:
            for full in self._indexes.change_set(key.id, change):
                self._render(full)

    def reshape(self) -> None:
        """Render again the chains that look up a set which took another shape."""
        for set_name in self._sets.reshaped:
            for name in tuple(self._users.get(set_name, ())):
                self._render(name)
        self._sets.reshaped.clear()

    def want_chain(self, table: Table, name: str, chain: AnyChain | None) -> None:
        """A chain as it should be; None: not there."""
        full = chain_name(table, name)
        if chain is None:
            self._forget(full)
            return
        _, before = self._neutral.get(full, (table, None))
        self._neutral[full] = table, chain
        if isinstance(chain, Index):
            reshaped = self._indexes.want(full, chain)
            if not reshaped and isinstance(before, Index) and before.action == chain.action:
                self._news = True
                return  # the same lookups, in sets that hold something else
        self._render(full)
        if isinstance(chain, Dispatch | SourceDispatch):
            self._maps[full] = dispatch_map(self._version, table, chain)
            self._dirty_maps.add(full)

    def want_hook(self, hook: Hook, rules: tuple[ChainRule, ...] | None) -> None:
        """What stands where the kernel hands packets over; None: nothing of ours."""
        name = hook.chain + ("-behind-ipvs" if hook.behind_ipvs else "")
        full = chain_name(hook.table, name)
        if rules is None:
            self._forget(full)
            del self._bases[full]
            return
        self._bases[full] = BaseChain(_KINDS[hook.table], hook.chain.lower(), _PRIORITIES[hook])
        self._neutral[full] = hook.table, Chain(name, rules)
        self._render(full)

    def read(self) -> None:
        """See what is in the kernel. Raises OSError."""
        state = self._nftables.read()
        self._obstructed = any(self._obstructions(state))
        if self._obstructed:
            state = TableState({}, {}, exists=False)
        self._exists, self._dormant = state.exists, state.dormant
        self._chains = {name: self._recognise(name, found) for name, found in state.chains.items()}
        maps = {name for name, found in state.sets.items() if found.verdicts}
        self._foreign.clear()
        self._targets.clear()
        for name in maps:
            # What somebody deletes just now isn't there; what else that was, a commit finds out.
            with contextlib.suppress(FileNotFoundError):
                self._targets[name] = self._read_targets(name)
        self._sets.found({name: s for name, s in state.sets.items() if name not in maps})
        self._dirty = self._rendered.keys() | state.chains.keys()
        self._dirty_maps = self._maps.keys() | maps

    def preload(self, now: float) -> int:
        """Fill large new sets."""
        if not self._is_due(now) or self._obstructed:
            return 0
        try:
            return self._sets.preload()
        except OSError as error:
            self._failed(error, now)
            return 0

    def apply(self, now: float) -> int:
        """Everything that is due, in one transaction; the number of its steps."""
        if not self._is_due(now) or not self._pending():
            return 0
        self._news = False
        if self._backoff.due(now):
            self._refused.clear()
        try:
            steps = self._commit()
        except NftablesError:
            # Perhaps somebody else changed our table: begin from what is there.
            try:
                self.read()
                steps = self._commit_in_part()
            except OSError as error:
                self._failed(error, now)
                return 0
        except OSError as error:
            self._failed(error, now)
            return 0
        self._note(now)
        return steps

    def next_retry(self) -> float | None:
        """When something that failed is due again."""
        return self._backoff.next_due()

    def enforces(self, interface: str) -> bool | None:
        """Whether the chains of an interface stand and are gone to; None: it has none here."""
        chosen: list[bool] = []
        for direction, dispatch in _DISPATCHES.items():
            full = chain_name(Table.FILTER, names.endpoint_chain(direction, interface))
            if full in self._rendered:
                entry = self._targets.get(chain_name(Table.FILTER, dispatch), {})
                known = interface_name(interface) in entry
                chosen.append(known and full not in self._dirty and not self._differs(full))
        return all(chosen) if chosen else None

    def problems(self) -> Iterator[tuple[str, str]]:
        """(object, what the kernel said)."""
        for what, message in self.errors.items():
            yield f"nftables {self._nftables} {what}".rstrip(), message

    def _obstructions(self, state: TableState) -> Iterator[str]:
        """Sets that have names of ours, but aren't of the kind: rules stand in their way to go."""
        for wanted in (*self._sets.declarations(), *(made for made, _ in self._maps.values())):
            present = state.sets.get(wanted.name)
            if present is not None and not present.is_of_kind(wanted):
                yield wanted.name

    def _recognise(self, name: str, found: ChainState) -> ChainState:
        """What a chain is: if it is as it should be, just that, and not as the kernel tells it."""
        if name not in self._rendered:
            return found
        wanted = self._state(name)
        return wanted if found.is_as(wanted) else found

    def _read_targets(self, name: str) -> dict[bytes, Target]:
        try:
            return self._nftables.targets(name)
        except ForeignElementError:
            self._foreign.add(name)
            return {}

    def _make_renderer(self, settings: Settings) -> Renderer:
        return Renderer(self._version, settings.nftables, self._sets.holds_networks)

    def _members_of(self, set_id: str) -> frozenset[Member]:
        return self._members(SetKey(self._version, set_id))

    def _render(self, full: str) -> None:
        table, chain = self._neutral[full]
        before = self._rendered.get(full)
        if isinstance(chain, Index):
            after = self._renderer.index(table, chain, self._indexes.shapes(full))
        else:
            after = self._renderer.render(table, chain)
        for constant in after.constants:
            self._sets.want_constant(constant)
        for constant in before.constants if before else ():
            self._sets.unwant_constant(constant)
        self._use(full, before.sets if before else frozenset(), after.sets)
        self._rendered[full] = after
        self._refused.pop(full, None)
        self._dirty.add(full)
        self._news = True

    def _forget(self, full: str) -> None:
        _, chain = self._neutral.pop(full)
        if isinstance(chain, Index):
            self._indexes.forget(full)
        before = self._rendered.pop(full)
        for constant in before.constants:
            self._sets.unwant_constant(constant)
        self._use(full, before.sets, frozenset())
        self._refused.pop(full, None)
        self._dirty.add(full)
        self._news = True
        if self._maps.pop(full, None) is not None:
            self._dirty_maps.add(full)

    def _use(self, full: str, before: frozenset[str], after: frozenset[str]) -> None:
        for name in before - after:
            self._users[name].discard(full)
            if not self._users[name]:
                del self._users[name]
        for name in after - before:
            self._users.setdefault(name, set()).add(full)

    def _pending(self) -> bool:
        return bool(self._dormant or self._dirty or self._dirty_maps) or self._sets.pending()

    def _is_due(self, now: float) -> bool:
        """What failed waits for its time, but what is new doesn't wait for that."""
        return self._news or not len(self._backoff) or bool(self._backoff.due(now))

    def _commit(self) -> int:
        """Build the transaction and have it carried out. Raises OSError."""
        woken = self._wake()
        transaction = self._transaction()
        self._nftables.commit(transaction)
        self._committed()
        return woken + len(transaction.messages)

    def _wake(self) -> int:
        """Have packets see a table again that somebody else put to sleep.

        In a transaction of its own: a kernel takes no base chain together with it.
        """
        if not self._dormant:
            return 0
        transaction = self._nftables.transaction()
        transaction.create_table()
        self._nftables.commit(transaction)
        self._dormant = False
        return 1

    def _commit_in_part(self) -> int:
        """As ``_commit``, but a chain that the kernel refuses stays as it is, or drops if new."""
        while True:
            try:
                return self._commit()
            except NftablesError as error:
                guilty = self._guilty(error)
                if not guilty:
                    raise
                for full, why in guilty.items():
                    self.errors[f"chain {full}"] = why
                    self._refused[full] = self._rendered[full]

    def _guilty(self, error: NftablesError) -> dict[str, str]:
        """The chains that were refused for what they are, and were not before."""
        found = {}
        for what, why in error.refused:
            kind, _, full = what.partition(" ")
            if kind == "chain" and full in self._rendered and full not in self._refused:
                found[full] = why
        return found

    def _transaction(self) -> Transaction:
        transaction = self._nftables.transaction()
        if self._obstructed:
            transaction.delete_table()  # and all is made anew, at the same moment
        if not self._exists:
            transaction.create_table()
        changed = {name for name in self._dirty if self._differs(name)}
        gone = [name for name in self._dirty if name in self._chains and name not in self._rendered]
        # A chain can't become a base chain, nor cease to be one: it is made anew.
        for name in sorted(changed):
            if name in self._chains and self._chains[name].base != self._bases.get(name):
                transaction.flush_chain(name)
                transaction.delete_chain(name)
                transaction.create_chain(name, self._bases.get(name))
            elif name not in self._chains:
                transaction.create_chain(name, self._bases.get(name))
        self._sets.fill(transaction)
        for name in sorted(self._dirty_maps & self._maps.keys() - self._targets.keys()):
            transaction.create_set(self._maps[name][0])
        for name in sorted(changed):
            if name in self._chains and self._chains[name].rules:
                transaction.flush_chain(name)
            transaction.append_rules(name, self._wanted(name).rules)
        for name in sorted(self._dirty_maps & self._maps.keys()):
            if name in self._foreign:
                transaction.flush_set(name)
            wanted, present = self._maps[name][1], self._targets.get(name, {})
            unlike = [k for k, target in present.items() if wanted.get(k) != target]
            transaction.delete_keys(name, unlike)
            fresh = {k: target for k, target in wanted.items() if present.get(k) != target}
            transaction.add_targets(name, fresh)
        for name in gone:
            transaction.flush_chain(name)
        # The map of a dispatch goes after the rule that looks it up, before what it leads to.
        for name in sorted(self._targets.keys() - self._maps.keys()):
            transaction.delete_set(name)
        for name in gone:
            transaction.delete_chain(name)
        self._sets.trim(transaction)
        return transaction

    def _differs(self, name: str) -> bool:
        if name not in self._rendered:
            return False
        if name in self._refused and name in self._chains:
            return False
        return self._chains.get(name) != self._state(name)

    def _state(self, name: str) -> ChainState:
        """How a chain is to be in the kernel."""
        return ChainState(self._bases.get(name), self._wanted(name).rules)

    def _wanted(self, name: str) -> RenderedChain:
        """A chain as it is to be: one that was refused drops."""
        if name in self._refused:
            table, _ = self._neutral[name]
            drop = Chain(name, (ChainRule(Drop(), comment="refused by the kernel"),))
            return self._renderer.render(table, drop)
        return self._rendered[name]

    def _committed(self) -> None:
        for name in self._dirty:
            if name not in self._rendered:
                self._chains.pop(name, None)
            elif self._differs(name):
                self._chains[name] = self._state(name)
        for name in self._dirty_maps & self._maps.keys():
            self._targets[name] = dict(self._maps[name][1])
        for name in self._targets.keys() - self._maps.keys():
            del self._targets[name]
        self._foreign.clear()
        self._exists, self._obstructed = True, False
        self._dirty.clear()
        self._dirty_maps.clear()
        self._sets.committed()

    def _note(self, now: float) -> None:
        if self._refused:
            self._backoff.failed(TABLE, now)
            self._dirty |= self._refused.keys()
        else:
            self._backoff.succeeded(TABLE)
            self.errors.clear()

    def _failed(self, error: OSError, now: float) -> None:
        """Nothing of the transaction is in force; all of it is tried again, later."""
        if self.errors.get("") != str(error):
            _log.warning("%s; will be tried again", error)
        self.errors[""] = str(error)
        self._backoff.failed(TABLE, now)
