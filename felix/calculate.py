"""Snapshot → what the kernel should hold: routes, sets, chains, the tunnel. No I/O, no clock.

``calculate`` works off the snapshot's dirty keys and says what became different. The result
is a function of the snapshot alone, in whatever order it came about.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from api.net import V4, Net
from api.policy import Rule, Tier
from api.profile import DEFAULT_ALLOW
from datastore.interface import Key
from felix import ipvs_rules, names
from felix.addresses import HostAddresses
from felix.desired import UNLIMITED, Delta, Device, Limits, Local, Registration, SetKey
from felix.hosts import ALL_INTERFACES, HostPlace, resolve
from felix.overlay import Encapsulation, Overlay
from felix.policies import DRAFTS, POLICIES, profile_keys
from felix.ruleset import VERSIONS, Ruleset
from felix.settings import CLUSTER, NODE_PREFIX, Settings, settings
from felix.snapshot import PodView, Snapshot
from felix.workloads import Workload
from kernel.links import AddressEvent, LinkEvent
from policy import selector
from policy.engine import Changes, Engine, Profile
from policy.model import Endpoint, EndpointId, Member, PolicyId

K = TypeVar("K", bound=Hashable)

# A prefix and eleven digits of a hash, as CNI plugins call the node's ends.
_GIVEN_NAME = re.compile(r"(.{1,4})[0-9a-f-]{11}")
_ALL = (Rule(action="Allow"),)
_BUILT_IN = {DEFAULT_ALLOW: Profile((), _ALL, _ALL)}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an endpoint is, as last told: the interface is empty when it isn't ours."""

    node: str
    nets: tuple[Net, ...]
    interface: str
    sources: tuple[Net, ...]
    nats: tuple[tuple[Net, Net], ...]
    limits: Limits
    pod: Key

    @property
    def reached_at(self) -> tuple[Net, ...]:
        """All addresses whose packets are for its interface."""
        return (*self.nets, *(external for external, _ in self.nats))


class _Claims(Generic[K]):
    """Who claims what: several may, and always the same one of them holds it."""

    def __init__(self) -> None:
        self._claimants: dict[K, set[EndpointId]] = {}
        self.dirty: set[K] = set()

    def change(self, id: EndpointId, before: Iterable[K], after: Iterable[K]) -> None:
        """What an endpoint claimed and what it claims now."""
        for key in before:
            self._claimants[key].discard(id)
            if not self._claimants[key]:
                del self._claimants[key]
            self.dirty.add(key)
        for key in after:
            self._claimants.setdefault(key, set()).add(id)
            self.dirty.add(key)

    def holder(self, key: K) -> EndpointId | None:
        """The one that has it."""
        return min(self._claimants.get(key, ()), default=None)

    def conflicts(self) -> Iterator[tuple[K, list[EndpointId]]]:
        """What more than one endpoint claims, the holder first."""
        for key, claimants in self._claimants.items():
            if len(claimants) > 1:
                yield key, sorted(claimants)


class Calculator:
    """The desired state of one node."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._settings = settings()
        self._unsure = False  # how interfaces of workloads begin
        self._engine = Engine()
        for name, profile in _BUILT_IN.items():
            self._engine.set_profile(name, profile)
        self._ruleset = Ruleset(self._engine, self._settings)
        self._overlay = Overlay(node)
        self._places: dict[EndpointId, _Place] = {}
        self._interfaces: _Claims[str] = _Claims()
        self._addresses: _Claims[Net] = _Claims()
        self._of_pod: dict[Key, set[Key]] = {}
        self._blocks: dict[Key, tuple[str, Net]] = {}
        self._misnamed: dict[EndpointId, str] = {}
        self._unallowed: set[EndpointId] = set()  # that want to send with more than they may
        self._limits: dict[str, Limits] = {}  # of interfaces that have any
        self._tunnel: tuple[Net | None, Device | None] = (None, None)
        self._own_sets: dict[SetKey, frozenset[Member]] = {}
        self._fresh = True
        self._hosts_changed = False
        self._service_sets: dict[SetKey, frozenset[Member]] = {}  # none where there is no ipvs
        self._guarding: frozenset[EndpointId] = frozenset()
        self.host_addresses = HostAddresses()
        self.hosts: dict[EndpointId, HostPlace] = {}  # this node's
        self.guards: Mapping[str, EndpointId] = {}  # by interface, as ``Ruleset.set_hosts`` says
        self.changes = Changes({}, {}, {})  # of policy, by the last calculation
        self.pods: dict[Net, str] = {}
        self.registration: Registration | None = None  # before the first calculation

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    @property
    def ruleset(self) -> Ruleset:
        """The desired chains, hooks and sets."""
        return self._ruleset

    @property
    def overlay(self) -> Overlay:
        """The desired routes to other nodes, and the tunnel's peers."""
        return self._overlay

    @property
    def engine(self) -> Engine:
        """Who may talk to whom."""
        return self._engine

    @property
    def places(self) -> Mapping[EndpointId, str]:
        """The interfaces of local endpoints."""
        return {id: place.interface for id, place in self._places.items() if place.interface}

    def holds(self, id: EndpointId, interface: str) -> bool:
        """Whether the interface is this endpoint's, of all that claim it."""
        return self._interfaces.holder(interface) == id

    def owner(self, address: Net) -> EndpointId | None:
        """The local endpoint that has an address, or is reached by it from outside."""
        return self._addresses.holder(address)

    def addresses(self, id: EndpointId) -> tuple[Net, ...]:
        """Those of a workload, of whatever node."""
        place = self._places.get(id)
        return place.nets if place else ()

    def taken(self) -> frozenset[Net]:
        """The addresses that any workload has."""
        return frozenset(net for place in self._places.values() for net in place.nets)

    @property
    def blocks(self) -> tuple[Net, ...]:
        """From which networks local endpoints get their addresses."""
        return tuple(net for node, net in self._blocks.values() if node == self._node)

    @property
    def has_ipvs(self) -> bool:
        """Whether kube-proxy has ipvs translate services' addresses here."""
        return bool(self._service_sets)

    def is_for_ipvs(self, address: Net, protocol: int, port: int | None) -> bool:
        """Whether what comes for an address of the node is a service's, as INPUT can tell."""
        if not self.has_ipvs:
            return False
        if address in self._service_sets[SetKey(address.version, names.SERVICE_ADDRESSES)]:
            return True
        if protocol not in ipvs_rules.PORTED or port is None:
            return False
        return any(first <= port <= last for first, last in self._settings.node_ports)

    def set_host_addresses(self, addresses: HostAddresses) -> None:
        """The addresses of the node's interfaces, all of them."""
        before, self.host_addresses = self.host_addresses, addresses
        were, are = before.by_interface(), addresses.by_interface()
        self._note_moved(
            name for name in were.keys() | are.keys() if were.get(name) != are.get(name)
        )
        addresses.services_changed = (
            before.services_changed or before.services != addresses.services
        )

    def host_changed(self, event: LinkEvent | AddressEvent) -> None:
        """The kernel told of an interface, or of an address."""
        self._note_moved(self.host_addresses.take(event))

    def _note_moved(self, interfaces: Iterable[str]) -> None:
        if any(not place.interface for place in self.hosts.values()):
            self._hosts_changed |= not all(map(self._settings.is_workload, interfaces))

    @property
    def hosts_changed(self) -> bool:
        """Whether addresses of the node moved in a way for which ``calculate`` is needed."""
        return self._hosts_changed or self.host_addresses.services_changed

    def calculate(self, snapshot: Snapshot) -> Delta:
        """What became different through the snapshot's dirty keys, which are then clean."""
        dirty, snapshot.dirty = snapshot.dirty, set()
        kinds = {key.kind for key in dirty}
        delta = Delta()
        workloads = {key for key in dirty if key.kind == "WorkloadEndpoint"}
        if self._fresh or "FelixConfiguration" in kinds or (self._unsure and workloads):
            before = self._settings
            self._take_settings(snapshot)
            if self._fresh or self._settings != before:
                delta.settings = self._settings
                workloads.update(snapshot.workloads)
        for key in dirty:
            self._take(key, snapshot, workloads)
        for key in workloads:
            self._take_workload(key, snapshot, delta)
        pools_changed = delta.settings is not None or "IPPool" in kinds
        if pools_changed:
            pools = (view.pool for view in snapshot.pools.values())
            self._overlay.set_pools(pools, self._settings.vxlan_enabled)
        self._update_overlay(delta)
        self._update_pods(delta)
        if "BGPConfiguration" in kinds:
            services = snapshot.services.get(Key("BGPConfiguration", CLUSTER), ())
            self._ruleset.set_services(services)
        if self._hosts_changed or delta.settings is not None:
            self._update_hosts()
        spared = self._settings.nat_outgoing.spare_hosts and "Node" in kinds
        if pools_changed or delta.peers or spared:
            self._own_sets = dict(self._make_own_sets(snapshot))
        if self.host_addresses.services_changed:
            self._update_service_sets()
        self.changes = self._engine.flush()
        self._ruleset.update(
            delta,
            self.changes,
            self._settings,
            {**self._own_sets, **self._service_sets},
            vxlan=self._overlay.enabled,
        )
        delta.forwarding = (V4, *(version for version in self._ruleset.versions if version != V4))
        if pools_changed or "Node" in kinds:
            self.registration = self._register(snapshot)
        self._fresh = False
        return delta

    def problems(self, snapshot: Snapshot) -> Iterator[tuple[str, str]]:
        """(object, what is wrong with it), of everything that was written."""
        for key, problem in snapshot.problems.items():
            yield str(key), problem
        for key in snapshot.configurations:
            if key.name != CLUSTER and not key.name.startswith(NODE_PREFIX):
                yield str(key), f"is not in force: only {CLUSTER} and {NODE_PREFIX}<name> are"
        for policy, faults in self._engine.problems.items():
            yield str(policy), "; ".join(map(str, faults))
        for id, problem in self._misnamed.items():
            yield f"WorkloadEndpoint({names.endpoint_text(id)})", problem
        for id in self._unallowed:
            yield (
                f"WorkloadEndpoint({names.endpoint_text(id)})",
                "spec.allowSpoofedSourcePrefixes: not in force: FelixConfiguration"
                " workloadSourceSpoofing is Disabled; expected Any",
            )
        for id in self.hosts.keys() - self._guarding:
            yield (
                f"HostEndpoint({id.name})",
                "guards no interface: none has its expectedIPs, or all that it claims are"
                " another's, or a workload's",
            )
        for what, claimants in (*self._interfaces.conflicts(), *self._addresses.conflicts()):
            first, *others = map(names.endpoint_text, claimants)
            for other in others:
                yield f"WorkloadEndpoint({other})", f"{what} belongs to {first}; delete one of them"

    def _take_settings(self, snapshot: Snapshot) -> None:
        places = (NODE_PREFIX + self._node, CLUSTER)
        found = (snapshot.configurations.get(Key("FelixConfiguration", name)) for name in places)
        levels = [level for level in found if level is not None]
        chosen = next((level.forbidden_flows for level in levels if level.forbidden_flows), None)
        self._settings = replace(
            settings([level.spec for level in levels]),
            ends_forbidden=None if chosen is None else chosen == "end",
        )
        saying = (level for level in levels if level.unsure or level.spec.interface_prefix)
        self._unsure = next((level.unsure for level in saying), False)
        if self._unsure:
            prefixes = {*self._settings.interface_prefixes, *self._shown_prefixes(snapshot)}
            self._settings = replace(self._settings, interface_prefixes=tuple(sorted(prefixes)))

    def _shown_prefixes(self, snapshot: Snapshot) -> Iterator[str]:
        """How interfaces of this node's workloads begin."""
        for workload in snapshot.workloads.values():
            match = _GIVEN_NAME.fullmatch(workload.interface)
            if match and workload.node == self._node:
                yield match[1]

    def _take(self, key: Key, snapshot: Snapshot, workloads: set[Key]) -> None:
        match key.kind:
            case "Pod":
                workloads.update(self._of_pod.get(key, ()))
            case "Namespace" | "ServiceAccount" | "Profile":
                name, sources = profile_keys(key)
                found = (snapshot.profiles.get(source) for source in sources)
                self._engine.set_profile(name, next(filter(None, found), _BUILT_IN.get(name)))
            case "HostEndpoint":
                self._take_host(key, snapshot)
            case "NetworkSet" | "GlobalNetworkSet":
                set_id = EndpointId(key.kind, key.namespace, key.name)
                nets = snapshot.network_sets.get(key)
                self._engine.set_endpoint(nets.endpoint(set_id) if nets else None, set_id)
            case "EndpointSlice":
                slice = snapshot.slices.get(key)
                self._engine.set_service_slice(key.namespace, key.name, slice)
            case _ if key.kind in POLICIES or key.kind in DRAFTS:
                id = PolicyId(key.kind, key.namespace, key.name)
                self._engine.set_policy(id, snapshot.policies.get(key))
            case "Tier":
                tier: Tier | None = snapshot.tiers.get(key)
                self._engine.set_tier(key.name, tier)
            case "Node":
                view = snapshot.nodes.get(key)
                self._overlay.set_host(key.name, view.host if view else None)
            case "BlockAffinity":
                before = self._blocks.pop(key, None)
                if before is not None:
                    self._overlay.set_block(*before, held=False)
                block = snapshot.blocks.get(key)
                if block is not None:
                    self._blocks[key] = (block.node, block.net)
                    self._overlay.set_block(block.node, block.net, held=True)

    def _take_host(self, key: Key, snapshot: Snapshot) -> None:
        id = EndpointId(key.kind, key.namespace, key.name)
        view = snapshot.hosts.get(key)
        local = view is not None and view.node == self._node
        self._engine.set_endpoint(view.endpoint(id, local=local) if view else None, id)
        if view is not None and local:
            self.hosts[id] = view.place
        else:
            self.hosts.pop(id, None)
        self._hosts_changed = True

    def _update_hosts(self) -> None:
        """Which interfaces host endpoints guard."""
        addresses = self.host_addresses.by_interface()
        found = resolve(self.hosts, addresses, self._settings.is_workload)
        self._guarding = frozenset(found.values())
        if ALL_INTERFACES in found:
            found[names.ANY_INTERFACE] = found.pop(ALL_INTERFACES)
        self.guards = found
        self._ruleset.set_hosts(found)
        self._hosts_changed = False

    def _take_workload(self, key: Key, snapshot: Snapshot, delta: Delta) -> None:
        id = EndpointId(key.kind, key.namespace, key.name)
        workload = snapshot.workloads.get(key)
        before, after = self._places.pop(id, None), None
        if before is not None:
            self._of_pod[before.pod].discard(key)
            if not self._of_pod[before.pod]:
                del self._of_pod[before.pod]
        self._misnamed.pop(id, None)
        self._unallowed.discard(id)
        if workload is None:
            self._engine.set_endpoint(None, id)
        else:
            pod_key = Key("Pod", workload.pod, key.namespace)
            self._of_pod.setdefault(pod_key, set()).add(key)
            pod = snapshot.pods.get(pod_key) if workload.orchestrator == "k8s" else None
            nets = () if pod and pod.finished else workload.nets
            interface = self._own_interface(id, workload)
            sources = self._sources(id, workload) if interface else ()
            nats = self._nats(workload, nets) if interface else ()
            after = _Place(workload.node, nets, interface, sources, nats, workload.limits, pod_key)
            self._places[id] = after
            if interface:
                delta.endpoints[id] = Local(interface, workload.container)
            self._engine.set_endpoint(_endpoint(id, workload, pod, after), id)
        if before is not None and before.interface and id not in delta.endpoints:
            delta.endpoints[id] = None
        self._move(id, before, after)

    def _own_interface(self, id: EndpointId, workload: Workload) -> str:
        """The workload's interface; empty when it is another node's, or no workload's by name."""
        if workload.node != self._node or not workload.interface:
            return ""
        if not self._settings.is_workload(workload.interface):
            prefixes = " or ".join(self._settings.interface_prefixes)
            self._misnamed[id] = (
                f"spec.interfaceName: {workload.interface!r}: expected a name that begins with"
                f" {prefixes} (FelixConfiguration interfacePrefix); it gets no connectivity"
            )
            return ""
        return workload.interface

    def _sources(self, id: EndpointId, workload: Workload) -> tuple[Net, ...]:
        """What it may send with besides its own addresses."""
        if workload.sources and not self._settings.allow_sources:
            self._unallowed.add(id)
            return ()
        return workload.sources

    def _nats(self, workload: Workload, nets: tuple[Net, ...]) -> tuple[tuple[Net, Net], ...]:
        """Its floating addresses, of those that it has now."""
        if not self._settings.floating_ips:
            return ()
        return tuple(nat for nat in workload.nats if nat[1] in nets)

    def _move(self, id: EndpointId, before: _Place | None, after: _Place | None) -> None:
        if before == after:
            return
        for place, held in ((before, False), (after, True)):
            if place is not None and place.node != self._node:
                for net in place.nets:
                    self._overlay.set_address(place.node, net, held)
        was, now = ((place,) if place and place.interface else () for place in (before, after))
        self._interfaces.change(id, (p.interface for p in was), (p.interface for p in now))
        self._addresses.change(
            id,
            (net for p in was for net in p.reached_at),
            (net for p in now for net in p.reached_at),
        )

    def _update_pods(self, delta: Delta) -> None:
        for interface in self._interfaces.dirty:
            holder = self._interfaces.holder(interface)
            place = self._places[holder] if holder else None
            self._ruleset.set_interface(interface, holder, place.nets if place else ())
            sources = place.sources if place else ()
            if self._ruleset.set_sources(interface, sources):
                delta.loose[interface] = bool(sources)
            self._ruleset.set_nats(interface, place.nats if place else ())
            limits = place.limits if place else UNLIMITED
            if self._limits.get(interface, UNLIMITED) != limits:
                delta.limits[interface] = limits
                if limits == UNLIMITED:
                    del self._limits[interface]
                else:
                    self._limits[interface] = limits
        for net in self._addresses.dirty:
            owner = self._addresses.holder(net)
            wanted = self._places[owner].interface if owner else None
            if self.pods.get(net) != wanted:
                delta.pods[net] = wanted
                if wanted is None:
                    del self.pods[net]
                else:
                    self.pods[net] = wanted
        self._interfaces.dirty.clear()
        self._addresses.dirty.clear()

    def _update_overlay(self, delta: Delta) -> None:
        changes = self._overlay.flush()
        delta.remotes, delta.peers = changes.routes, changes.peers
        host = self._overlay.host
        device = None
        if self._overlay.enabled and host and host.address and host.tunnel:
            own = self._settings
            device = Device(
                own.vxlan_vni, own.vxlan_port, host.address, host.tunnel, host.mac, own.vxlan_mtu
            )
        tunnel = (host.address if host else None, device)
        if tunnel != self._tunnel:
            self._tunnel = delta.tunnel = tunnel

    def _make_own_sets(self, snapshot: Snapshot) -> Iterator[tuple[SetKey, frozenset[Member]]]:
        pools = [view.pool for view in snapshot.pools.values()]
        for version in VERSIONS:
            own = [pool for pool in pools if pool.net.version == version]
            masqueraded = frozenset(pool.net for pool in own if pool.nat_outgoing)
            if masqueraded:
                yield SetKey(version, names.MASQUERADE_POOLS), masqueraded
                yield SetKey(version, names.ALL_POOLS), frozenset(pool.net for pool in own)
                if self._settings.nat_outgoing.spare_hosts:
                    hosts = (view.host.address for view in snapshot.nodes.values())
                    yield (
                        SetKey(version, names.ALL_HOSTS),
                        frozenset(net for net in hosts if net and net.version == version),
                    )
        if self._overlay.enabled:
            peers = frozenset(peer.address for peer in self._overlay.peers.values())
            yield SetKey(V4, names.VXLAN_NODES), peers

    def _update_service_sets(self) -> None:
        """What ipvs translates."""
        services = self.host_addresses.services or {}
        self._service_sets = {
            SetKey(version, names.SERVICE_ADDRESSES): frozenset(own)
            for version, own in services.items()
        }
        self.host_addresses.services_changed = False

    def _register(self, snapshot: Snapshot) -> Registration:
        key = Key("Node", self._node)
        node = snapshot.nodes.get(key)
        own_labels = node.labels if node else {}
        encapsulated = [
            view
            for view in snapshot.pools.values()
            if view.pool.vxlan is not Encapsulation.NEVER and view.pool.net.version == V4
        ]
        pools = tuple(
            str(view.pool.net)
            for view in encapsulated
            if view.tunnels and selector.parse(view.node_selector).matches(own_labels)
        )
        tunnel = node.host.tunnel if node else None
        if tunnel and not any(view.pool.net.contains(tunnel) for view in encapsulated):
            tunnel = None
        return Registration(
            missing=node is None and key not in snapshot.problems,
            unaddressed=node is not None and node.host.address is None,
            overlay=self._overlay.enabled,
            pools=tuple(sorted(pools)),
            tunnel=tunnel,
        )


def _endpoint(id: EndpointId, workload: Workload, pod: PodView | None, place: _Place) -> Endpoint:
    """A pod's labels and ports count as they are now, not as they were when it was wired."""
    view = pod or workload
    return Endpoint(
        id, view.labels, view.profiles, place.nets, view.ports, local=bool(place.interface)
    )
