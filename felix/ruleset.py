"""Chains, hooks and sets of both IP versions, from what the engine says about local endpoints.

An interface has chains in an IP version only where its endpoint has an address of that
version; everywhere else it is unknown, and what comes from it or goes to it is dropped. An IP
version in which no interface is known has no policies and no sets, only the frame; a host
endpoint is in force in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from api.net import V4, V6, Net
from felix import host_rules, ipvs_rules, names, rules
from felix.chains import AnyChain, ChainRule, Table
from felix.desired import ChainKey, Delta, HookKey, SetKey
from felix.host_rules import Guard
from felix.policy_rules import policy_chain
from felix.runs import Runs
from felix.settings import Settings
from policy.engine import Changes, Engine, SetDelta
from policy.model import (
    CompiledPolicy,
    Direction,
    EndpointBinding,
    EndpointId,
    HostBinding,
    Member,
    NamedPortMember,
    Part,
    PolicyId,
    SetKind,
)

K = TypeVar("K")
V = TypeVar("V")
OwnSets = Mapping[SetKey, frozenset[Member]]

VERSIONS = (V4, V6)
_POLICY_TABLES = (Table.FILTER, Table.RAW, Table.MANGLE)
_NONE: frozenset[Member] = frozenset()
# Policies whose chains must be in a table beside FILTER, by the direction of these.
Early = Mapping[tuple[Table, Direction], set[PolicyId]]


class Ruleset:
    """The desired chains, hooks and sets, kept up to date."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._vxlan = False
        self._own: OwnSets = {}
        self._kinds: dict[str, SetKind] = {}  # of the engine's sets
        self._holders: dict[str, EndpointId] = {}
        self._interfaces: dict[EndpointId, str] = {}
        self._nets: dict[str, tuple[Net, ...]] = {}  # of interfaces' endpoints
        self._known: dict[int, set[str]] = {version: set() for version in VERSIONS}
        self._dirty: set[str] = set()
        self._moved = False  # an interface has come, gone or got other addresses
        self._sources: dict[str, tuple[Net, ...]] = {}
        self._nats: dict[str, tuple[tuple[Net, Net], ...]] = {}
        self._services: tuple[Net, ...] = ()
        self._ipvs = False
        self._frame_changed = False
        self._started = False
        self._frame: dict[int, frozenset[ChainKey]] = dict.fromkeys(VERSIONS, frozenset())
        self._hosts: Mapping[str, EndpointId] = {}  # by interface
        self._bindings: Mapping[str, HostBinding] = {}  # theirs
        self._guard = Guard()
        self._host_chains: set[tuple[Table, str]] = set()
        self._early: Early = {}
        self._unfiltered: set[PolicyId] = set()
        self._runs = Runs()
        self.chains: dict[ChainKey, AnyChain] = {}
        self.hooks: dict[HookKey, tuple[ChainRule, ...]] = {}
        self.sets: set[SetKey] = set()

    @property
    def versions(self) -> tuple[int, ...]:
        """The IP versions in which a local endpoint has an address."""
        return tuple(version for version in VERSIONS if self._known[version])

    def members(self, key: SetKey) -> frozenset[Member]:
        """What a wanted set holds."""
        own = self._own.get(key)
        return _of_version(key.version, self._engine.sets[key.id]) if own is None else own

    def everything(self) -> Delta:
        """All that is wanted, for an enforcer that was told nothing yet."""
        delta = Delta(settings=self._settings, chains=dict(self.chains), hooks=dict(self.hooks))
        for key in self.sets:
            kind = self._kinds.get(key.id, SetKind.NET)
            delta.sets[key] = SetDelta(kind, self.members(key), _NONE, True, False)
        return delta

    def set_interface(self, name: str, holder: EndpointId | None, nets: Iterable[Net]) -> None:
        """Which endpoint an interface belongs to, and its addresses; None: to none."""
        before = self._holders.pop(name, None)
        if before is not None:
            del self._nets[name]
            if self._interfaces.get(before) == name:
                del self._interfaces[before]
        if holder is not None:
            self._holders[name] = holder
            self._interfaces[holder] = name
            self._nets[name] = tuple(nets)
        self._dirty.add(name)
        self._moved = True

    def set_hosts(self, hosts: Mapping[str, EndpointId]) -> None:
        """The host endpoints by interface; that of all others by ``names.ANY_INTERFACE``."""
        self._hosts = hosts

    def set_sources(self, name: str, sources: tuple[Net, ...]) -> bool:
        """With which networks an interface may send besides its own; whether that is news."""
        if self._sources.get(name, ()) == sources:
            return False
        if sources:
            self._sources[name] = sources
        else:
            del self._sources[name]
        self._frame_changed = True
        return True

    def set_nats(self, name: str, nats: tuple[tuple[Net, Net], ...]) -> None:
        """The addresses by which an interface's endpoint is reached, each with one of its own."""
        if self._nats.get(name, ()) != nats:
            self._frame_changed = True
            if nats:
                self._nats[name] = nats
            else:
                del self._nats[name]

    def set_services(self, services: tuple[Net, ...]) -> None:
        """The networks of services' addresses."""
        self._frame_changed |= services != self._services
        self._services = services

    def update(
        self, delta: Delta, changes: Changes, settings: Settings, own: OwnSets, *, vxlan: bool
    ) -> None:
        """Add to ``delta`` what follows from the changes.

        ``own`` are felix' own sets; ``vxlan``: this node takes part in the overlay.
        """
        ipvs = any(key.id == names.SERVICE_ADDRESSES for key in own)
        fresh = not self._started or settings != self._settings or ipvs != self._ipvs
        self._ipvs = ipvs
        hosts = {
            interface: binding
            for interface, id in self._hosts.items()
            if isinstance(binding := self._engine.endpoints.get(id), HostBinding)
        }
        guard = host_rules.guard(hosts.values())
        reframe = (
            fresh or guard != self._guard or vxlan != self._vxlan or own.keys() != self._own.keys()
        )
        reframe = reframe or self._frame_changed
        self._frame_changed = False
        before = {version: self._is_active(version) for version in VERSIONS}
        self._started, self._settings, self._vxlan = True, settings, vxlan
        self._guard = guard
        self._update_own(delta, own)
        for set_id, change in changes.sets.items():
            self._kinds[set_id] = change.kind
        self._dirty.update(
            self._interfaces[id] for id in changes.endpoints if id in self._interfaces
        )
        if fresh:
            self._dirty.update(self._holders)
        redispatch = self._update_known()
        indexes = self._update_runs(changes)
        rehost = fresh or hosts != self._bindings
        self._bindings = hosts
        moved = self._update_early(hosts) if rehost else set()
        for version in VERSIONS:
            if reframe:
                self._update_frame(delta, version)
            if fresh or version in redispatch:
                for dispatch in rules.dispatches(self._known[version]):
                    self._chain(delta, version, dispatch.name, dispatch)
            if fresh or (self._ipvs and self._moved):
                self._update_ipvs(delta, version)
            self._update_policies(delta, version, changes, moved, before[version], fresh)
            self._update_indexes(delta, version, indexes, before[version])
            self._update_sets(delta, version, changes, before[version])
            for name in self._dirty:
                self._update_endpoint(delta, version, name)
        if rehost:
            self._update_hosts(delta, hosts)
        for set_id, change in changes.sets.items():
            if change.deleted:
                del self._kinds[set_id]
        self._dirty.clear()
        self._moved = False

    def _is_active(self, version: int) -> bool:
        """Whether policies and sets are needed in an IP version."""
        return bool(self._known[version] or self._guard)

    def _update_early(self, hosts: Mapping[str, HostBinding]) -> set[PolicyId]:
        """Bring up to date which policies are where; those that came to a table or left it."""
        before, unfiltered = self._early, self._unfiltered
        self._early = {
            (table, direction): used
            for (table, direction), used in host_rules.policies(self._guard, hosts.values()).items()
            if table is not Table.FILTER
        }
        self._unfiltered = {
            id
            for binding in hosts.values()
            for part in (binding.pre_dnat, binding.untracked)
            for tier in part.tiers
            for id in (*tier.ingress, *tier.egress)
        }
        moved = unfiltered ^ self._unfiltered
        for place in before.keys() | self._early.keys():
            moved |= before.get(place, set()) ^ self._early.get(place, set())
        return moved

    def _update_hosts(self, delta: Delta, hosts: Mapping[str, HostBinding]) -> None:
        """The chains of host endpoints: there are few, so all of them are looked at."""
        made: set[tuple[Table, str]] = set()
        interfaces = hosts.keys() - {names.ANY_INTERFACE}
        for version in VERSIONS:
            dispatches = host_rules.dispatches(
                self._guard,
                interfaces,
                default=names.ANY_INTERFACE in hosts,
                settings=self._settings,
            )
            ends = (
                end
                for interface, binding in hosts.items()
                for end in host_rules.endpoint_chains(
                    self._guard, interface, binding, self._settings, version
                )
            )
            chains: list[tuple[Table, AnyChain]] = [*dispatches, *ends]
            if self._ipvs and Part.FORWARD in self._guard.parts:
                entries = ipvs_rules.entries(
                    interfaces, default=names.ANY_INTERFACE in hosts, settings=self._settings
                )
                chains += ((Table.FILTER, chain) for chain in entries)
            for table, chain in chains:
                made.add((table, chain.name))
                self._chain(delta, version, chain.name, chain, table)
            for table, name in self._host_chains - made:
                self._chain(delta, version, name, None, table)
        self._host_chains = made

    def _update_known(self) -> set[int]:
        """Bring up to date which interfaces are known; the versions in which some changed."""
        changed = set()
        for version in VERSIONS:
            known = self._known[version]
            now = {
                name
                for name in self._dirty
                if any(net.version == version for net in self._nets.get(name, ()))
            }
            if known & self._dirty != now:
                changed.add(version)
                known -= self._dirty
                known |= now
        return changed

    def _update_frame(self, delta: Delta, version: int) -> None:
        frame = rules.frame(
            self._settings,
            version,
            rules.Surroundings(
                vxlan=self._vxlan and version == V4,
                masquerade=SetKey(version, names.MASQUERADE_POOLS) in self._own,
                sources=_each_of_version(version, self._sources),
                services=tuple(net for net in self._services if net.version == version),
                nats=self._translations(version),
                guard=self._guard,
                ipvs=self._ipvs,
            ),
        )
        chains = {ChainKey(version, table, chain.name): chain for table, chain in frame.chains}
        hooks = {HookKey(version, hook): rules for hook, rules in frame.hooks}
        for hook_key in [k for k in self.hooks if k.version == version and k not in hooks]:
            _put(self.hooks, delta.hooks, hook_key, None)
        for hook_key, own in hooks.items():
            _put(self.hooks, delta.hooks, hook_key, own)
        for key in [*(k for k in self._frame[version] if k not in chains), *chains]:
            _put(self.chains, delta.chains, key, chains.get(key))
        self._frame[version] = frozenset(chains)

    def _update_ipvs(self, delta: Delta, version: int) -> None:
        """Where workloads' packets to services go, by interface and by address."""
        addresses = {
            net: name
            for name in sorted(self._known[version], key=self._holders.__getitem__, reverse=True)
            for net in self._nets[name]
            if net.version == version
        }
        for dispatch in ipvs_rules.dispatches(self._known[version], addresses):
            self._chain(delta, version, dispatch.name, dispatch if self._ipvs else None)

    def _translations(self, version: int) -> dict[Net, Net]:
        """An address from outside is the first endpoint's that claims it."""
        return {
            external: internal
            for name in sorted(self._nats, key=self._holders.__getitem__, reverse=True)
            for external, internal in self._nats[name]
            if external.version == version
        }

    def _update_policies(
        self,
        delta: Delta,
        version: int,
        changes: Changes,
        moved: set[PolicyId],
        was: bool,
        fresh: bool,
    ) -> None:
        changed: Mapping[PolicyId, CompiledPolicy | None] = changes.policies
        active = self._is_active(version)
        if moved:
            changed = {**{id: self._engine.policies.get(id) for id in moved}, **changed}
        if active and (fresh or not was):
            changed = {**changed, **self._engine.policies}
        elif was and not active:
            changed = {**changed, **dict.fromkeys(self._engine.policies)}
        elif not active:
            return
        for id, policy in changed.items():
            for direction in Direction:
                chain = None
                if active and policy is not None:
                    chain = policy_chain(policy, direction, self._settings)
                name = names.policy_chain(direction, id)
                for table in _POLICY_TABLES:
                    here = chain if self._is_in(table, direction, id) else None
                    self._chain(delta, version, name, here, table)

    def _is_in(self, table: Table, direction: Direction, id: PolicyId) -> bool:
        if table is Table.FILTER:
            return id not in self._unfiltered
        return id in self._early.get((table, direction), ())

    def _update_runs(self, changes: Changes) -> set[str]:
        """Bring the indexes up to date, and find the endpoints that use them differently now."""
        self._runs.change_sets(changes.sets)
        self._runs.change_policies(changes.policies)
        for interface in self._dirty:
            self._runs.bind(interface, self._binding(interface))
        interfaces, indexes = self._runs.flush()
        self._dirty |= interfaces
        return indexes

    def _update_indexes(
        self, delta: Delta, version: int, changed: Iterable[str], was: bool
    ) -> None:
        active = self._is_active(version)
        present = self._runs.indexes
        for name in changed if active is was else {*changed, *present}:
            self._chain(delta, version, name, present.get(name) if active else None)

    def _update_sets(self, delta: Delta, version: int, changes: Changes, was: bool) -> None:
        active = self._is_active(version)
        if not active and not was:
            return
        for set_id in changes.sets if active and was else self._kinds:
            key = SetKey(version, set_id)
            change = changes.sets.get(set_id)
            if not active or (change and change.deleted):
                self._drop_set(delta, key)
            elif key not in self.sets:
                self._create_set(delta, key, self._kinds[set_id])
            elif change:
                added = _of_version(version, change.added)
                removed = _of_version(version, change.removed)
                if added or removed:
                    delta.sets[key] = SetDelta(change.kind, added, removed, False, False)

    def _update_own(self, delta: Delta, own: OwnSets) -> None:
        before, self._own = self._own, own
        for key in before.keys() - own.keys():
            self._drop_set(delta, key)
        for key, members in own.items():
            if key not in before:
                self._create_set(delta, key, SetKind.NET)
            elif members != before[key]:
                added, removed = members - before[key], before[key] - members
                delta.sets[key] = SetDelta(SetKind.NET, added, removed, False, False)

    def _create_set(self, delta: Delta, key: SetKey, kind: SetKind) -> None:
        self.sets.add(key)
        delta.sets[key] = SetDelta(kind, self.members(key), _NONE, True, False)

    def _drop_set(self, delta: Delta, key: SetKey) -> None:
        if key in self.sets:
            self.sets.remove(key)
            kind = self._kinds.get(key.id, SetKind.NET)
            delta.sets[key] = SetDelta(kind, _NONE, _NONE, False, True)

    def _update_endpoint(self, delta: Delta, version: int, interface: str) -> None:
        binding = self._binding(interface)
        for direction in Direction:
            chain = None
            if binding is not None and interface in self._known[version]:
                chain = rules.endpoint_chain(
                    interface, binding, direction, self._settings, self._runs.steps
                )
            self._chain(delta, version, names.endpoint_chain(direction, interface), chain)

    def _binding(self, interface: str) -> EndpointBinding | None:
        """What decides about the workload behind an interface."""
        holder = self._holders.get(interface)
        binding = self._engine.endpoints.get(holder) if holder else None
        return binding if isinstance(binding, EndpointBinding) else None

    def _chain(
        self,
        delta: Delta,
        version: int,
        name: str,
        chain: AnyChain | None,
        table: Table = Table.FILTER,
    ) -> None:
        _put(self.chains, delta.chains, ChainKey(version, table, name), chain)


def _of_version(version: int, members: Iterable[Member]) -> frozenset[Member]:
    return frozenset(
        member
        for member in members
        if (member.net if isinstance(member, NamedPortMember) else member).version == version
    )


def _each_of_version(
    version: int, nets: Mapping[str, tuple[Net, ...]]
) -> dict[str, tuple[Net, ...]]:
    chosen = ((name, tuple(n for n in own if n.version == version)) for name, own in nets.items())
    return {name: own for name, own in chosen if own}


def _put(table: dict[K, V], changes: dict[K, V | None], key: K, value: V | None) -> None:
    """Make the entry ``value`` and note it, if that is news."""
    if table.get(key) == value:
        return
    changes[key] = value
    if value is None:
        del table[key]
    else:
        table[key] = value
