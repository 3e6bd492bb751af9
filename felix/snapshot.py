"""What the datastore says, as compact values in typed tables, and what changed in it.

An object that can't be read becomes a problem, and what stands in its place fails closed: a pod
gets no connectivity (``felix.workloads``), a policy denies wherever it would apply
(``felix.closed``).
So the result depends on the objects as they are now, never on what they were before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from api.bgp import BGPConfiguration
from api.clusterinformation import is_locked
from api.errors import InvalidObjectError, Problem
from api.ipam import BlockAffinity
from api.ippool import IPPool
from api.kubernetes import Pod
from api.net import Net, parse_interface, parse_net
from api.node import Node
from api.pods import own_labels
from api.policy import Tier
from api.registry import known_part, parse_as
from datastore.interface import JSON, Key
from felix.closed import closed_policy, tier_as_far_as_readable
from felix.hosts import (
    HostView,
    SetView,
    host_as_far_as_readable,
    read_host,
    read_set,
    set_as_far_as_readable,
)
from felix.overlay import Encapsulation, Host, Pool, tunnel_mac
from felix.policies import (
    DRAFTS,
    POLICIES,
    AnyPolicy,
    read_policy,
    read_profile,
    read_slice,
)
from felix.settings import Configuration, read_configuration
from felix.workloads import Workload, read_workload, workload_as_far_as_readable
from policy import convert, labels
from policy.engine import Profile
from policy.model import NamedPort, ServiceSlice

T = TypeVar("T")
_PolicyReader = Callable[[Key, JSON], tuple[AnyPolicy | None, tuple[Problem, ...]]]

# What others refer to comes first, which saves work at the start.
KINDS = (
    "ClusterInformation",
    "FelixConfiguration",
    "BGPConfiguration",
    "Tier",
    "IPPool",
    "Node",
    "BlockAffinity",
    "Namespace",
    "ServiceAccount",
    "Profile",
    "Pod",
    "WorkloadEndpoint",
    "HostEndpoint",
    "GlobalNetworkSet",
    "NetworkSet",
    "EndpointSlice",
    "ClusterNetworkPolicy",
    "AdminNetworkPolicy",
    "BaselineAdminNetworkPolicy",
    "GlobalNetworkPolicy",
    "NetworkPolicy",
    "KubernetesNetworkPolicy",
    "StagedGlobalNetworkPolicy",
    "StagedNetworkPolicy",
    "StagedKubernetesNetworkPolicy",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PodView:
    """What a Pod says about its endpoint. ``finished``: its addresses may be another's already."""

    labels: tuple[tuple[str, str], ...]
    profiles: tuple[str, ...]
    ports: tuple[NamedPort, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class Block:
    """A block that a node holds."""

    node: str
    net: Net


@dataclass(frozen=True, slots=True)
class PoolView:
    """An IPPool; ``tunnels``: tunnel addresses may be taken from it, on nodes it selects."""

    pool: Pool
    tunnels: bool
    node_selector: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """A Node. ``addresses``: all that it is known to have, that of BGP first."""

    host: Host
    labels: Mapping[str, str]
    addresses: tuple[Net, ...] = ()


class Snapshot:
    """The objects as of the last update. ``dirty`` are the keys changed since it was emptied.

    ``locked``: the datastore is being moved, and what it tells is not to be acted upon.
    """

    def __init__(self) -> None:
        self.workloads: dict[Key, Workload] = {}
        self.pods: dict[Key, PodView] = {}
        self.profiles: dict[Key, Profile] = {}  # by Namespace, ServiceAccount or Profile
        self.hosts: dict[Key, HostView] = {}
        self.network_sets: dict[Key, SetView] = {}
        self.slices: dict[Key, ServiceSlice] = {}
        self.policies: dict[Key, AnyPolicy] = {}
        self.tiers: dict[Key, Tier] = {}
        self.pools: dict[Key, PoolView] = {}
        self.nodes: dict[Key, NodeView] = {}
        self.blocks: dict[Key, Block] = {}
        self.configurations: dict[Key, Configuration] = {}
        self.services: dict[Key, tuple[Net, ...]] = {}  # their addresses, by BGPConfiguration
        self.problems: dict[Key, str] = {}
        self.dirty: set[Key] = set()
        self.locked = False

    def update(self, key: Key, value: JSON | None) -> None:
        """An object as it is now; None: it is gone. Never raises."""
        self.problems.pop(key, None)
        match key.kind:
            case "ClusterInformation":
                if key.name == "default":
                    self.locked = is_locked(value)
            case "WorkloadEndpoint":
                self._put(self.workloads, key, value, read_workload, workload_as_far_as_readable)
            case "Pod":
                self._put(self.pods, key, value, _read_pod)
            case "Namespace" | "ServiceAccount" | "Profile":
                self._put(self.profiles, key, value, read_profile)
            case "HostEndpoint":
                self._put(self.hosts, key, value, read_host, host_as_far_as_readable)
            case "NetworkSet" | "GlobalNetworkSet":
                self._put(self.network_sets, key, value, read_set, set_as_far_as_readable)
            case "EndpointSlice":
                self._put(self.slices, key, value, read_slice)
            case _ if key.kind in DRAFTS:
                self._put(self.policies, key, value, self._read_policy)
            case _ if key.kind in POLICIES:
                closed = partial(self._read_policy, read=closed_policy)
                self._put(self.policies, key, value, self._read_policy, closed)
            case "Tier":
                self._put(self.tiers, key, value, _read_tier, tier_as_far_as_readable)
            case "IPPool":
                self._put(self.pools, key, value, _read_pool, _of_what_is_known(_read_pool))
            case "Node":
                self._put(self.nodes, key, value, _read_node, _of_what_is_known(_read_node))
            case "BlockAffinity":
                self._put(self.blocks, key, value, _read_block, _of_what_is_known(_read_block))
            case "BGPConfiguration":
                read = _read_services
                self._put(self.services, key, value, read, _of_what_is_known(read))
            case "FelixConfiguration":
                self._put(self.configurations, key, value, self._read_configuration)
            case _:
                raise ValueError(f"{key}: not a kind that felix follows: {', '.join(KINDS)}")

    def touch(self) -> None:
        """Everything is dirty, as at the beginning."""
        for table in (
            self.workloads,
            self.pods,
            self.profiles,
            self.hosts,
            self.network_sets,
            self.slices,
            self.policies,
            self.tiers,
            self.pools,
            self.nodes,
            self.blocks,
            self.configurations,
            self.services,
        ):
            self.dirty.update(table)

    def _read_policy(
        self, key: Key, value: JSON, read: _PolicyReader = read_policy
    ) -> AnyPolicy | None:
        policy, problems = read(key, value)
        self._tell(key, *map(str, problems))
        return policy

    def _read_configuration(self, key: Key, value: JSON) -> Configuration:
        configuration, problems = read_configuration(key, value)
        if problems:
            self.problems[key] = f"{'; '.join(problems)}; what can be read of it is in force"
            _log.warning("%s: %s", key, self.problems[key])
        return configuration

    def _tell(self, key: Key, *texts: str) -> None:
        """What is wrong with an object, besides what was told of it."""
        if texts:
            known = (self.problems[key],) if key in self.problems else ()
            self.problems[key] = "; ".join((*known, *texts))

    def _put(
        self,
        table: dict[Key, T],
        key: Key,
        value: JSON | None,
        read: Callable[[Key, JSON], T | None],
        stand_in: Callable[[Key, JSON], T | None] = lambda key, value: None,
    ) -> None:
        new = None
        if value is not None:
            for attempt in (read, stand_in):
                try:
                    new = attempt(key, value)
                    break
                except InvalidObjectError as error:
                    self._tell(key, str(error))
                    _log.warning("%s can't be used: %s", key, error)
                except Exception as error:
                    # A mistake of ours; one object must not stop the others.
                    self._tell(key, repr(error))
                    _log.exception("%s can't be read", key)
        if new == table.get(key):
            return
        if new is None:
            del table[key]
        else:
            table[key] = new
        self.dirty.add(key)


def _parsed(key: Key, value: JSON, model: type[T]) -> T:
    parsed = parse_as(key.kind, value)
    assert isinstance(parsed, model)
    return parsed


def _of_what_is_known(read: Callable[[Key, JSON], T | None]) -> Callable[[Key, JSON], T | None]:
    """What stands in for an object with fields that only a newer Calico knows: the rest of it."""

    def attempt(key: Key, value: JSON) -> T | None:
        try:
            return read(key, dict(known_part(key.kind, value)))
        except InvalidObjectError:
            return None

    return attempt


def _read_pod(key: Key, value: JSON) -> PodView:
    pod = _parsed(key, value, Pod)
    own = own_labels(convert.pod_labels(pod))
    # Its label may be missing, as that of a long name is, or be the pod's own.
    own.pop(labels.SERVICE_ACCOUNT, None)
    if pod.spec.service_account_name:
        own[labels.SERVICE_ACCOUNT] = pod.spec.service_account_name
    return PodView(
        labels=tuple(sorted(own.items())),
        profiles=convert.pod_profiles(pod),
        ports=convert.named_ports(convert.pod_ports(pod)),
        finished=convert.pod_finished(pod),
    )


def _read_tier(key: Key, value: JSON) -> Tier:
    return _parsed(key, value, Tier)


def _read_pool(key: Key, value: JSON) -> PoolView:
    spec = _parsed(key, value, IPPool).spec
    return PoolView(
        Pool(spec.net, Encapsulation(spec.vxlan_mode), spec.nat_outgoing),
        tunnels=not spec.disabled and "Tunnel" in spec.allowed_uses,
        node_selector=spec.node_selector,
    )


def _read_node(key: Key, value: JSON) -> NodeView:
    node = _parsed(key, value, Node)
    address = network = None
    if node.spec.bgp is not None and node.spec.bgp.ipv4_address is not None:
        address, network = parse_interface(node.spec.bgp.ipv4_address)
    bgp = node.spec.bgp
    written = (
        *((bgp.ipv4_address, bgp.ipv6_address) if bgp else ()),
        *(known.address for known in node.spec.addresses),
    )
    tunnel = node.spec.ipv4_vxlan_tunnel_addr
    mac = node.spec.vxlan_tunnel_mac_addr or tunnel_mac(key.name)
    return NodeView(
        Host(
            address, network, parse_net(tunnel) if tunnel else None, mac.lower().replace("-", ":")
        ),
        dict(node.metadata.labels),
        tuple(dict.fromkeys(parse_interface(text)[0] for text in written if text)),
    )


def _read_block(key: Key, value: JSON) -> Block | None:
    """None for a claim that is not (or no longer) a node's own for sure."""
    spec = _parsed(key, value, BlockAffinity).spec
    if spec.deleted or spec.state not in ("", "confirmed") or spec.type not in (None, "host"):
        return None
    return Block(spec.node, spec.net)


def _read_services(key: Key, value: JSON) -> tuple[Net, ...]:
    spec = _parsed(key, value, BGPConfiguration).spec
    blocks = (
        *spec.service_cluster_ips,
        *spec.service_external_ips,
        *spec.service_load_balancer_ips,
    )
    return tuple(sorted({parse_interface(block.cidr)[1] for block in blocks if block.cidr}))
