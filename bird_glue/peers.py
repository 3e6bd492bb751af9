"""Who a node speaks BGP with: from Node, BGPConfiguration and BGPPeer to a list of peers.

A pure function of the resources, with Calico's meaning (its confd is the reference):

- the mesh, unless it is disabled, joins all nodes that are not route reflectors;
- a BGPPeer without ``node`` and ``nodeSelector`` is global, every node has it;
- a session that a BGPPeer wants between two nodes is made on both (``reversePeering``);
- where several say how to reach the same address and port, a global BGPPeer wins, then the
  first by name, an explicit one before a reverse one;
- of two mesh nodes, the one whose address is greater as text waits for the other to call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum

from api.bgp import BGPPassword, BGPPeer, split_peer_ip
from api.errors import Problem
from api.net import V4, V6, Net, format_address, parse_net
from api.registry import selectors
from bird_glue.secrets import SecretKey
from bird_glue.settings import Cluster, ClusterNode, Local, ObjectProblem, cluster_node
from bird_glue.workloads import Workload
from policy.selector import SelectorError
from policy.selector import parse as parse_selector

# IPv4 routes over IPv6 sessions as well (RFC 8950), which Calico's API has no field for
EXTENDED_NEXT_HOP = "projectcalico.org/ExtendedNextHop"
_VERSIONS = (V4, V6)


class PeerType(Enum):
    """Why there is a session, in the words of ``node status``."""

    MESH = "node-to-node mesh"
    GLOBAL = "global"
    NODE = "node specific"
    WORKLOAD = "local workload"


@dataclass(frozen=True, slots=True)
class Peer:
    """A session that the resources want this node to have.

    ``address`` is a /32 or /128, ``port`` None the default one, ``source`` the address to
    speak from (None: the kernel's choice). ``local_as`` overrides the node's.
    ``is_node``: the peer is a node of this cluster. ``cluster_id``: routes are reflected to
    this client under that id. ``owner`` is the object that asked for it (kind, name).
    ``interface``: of a workload of this node, which leads to it. ``extended_next_hop``: over
    IPv6, with IPv4 routes as well.
    """

    address: Net
    type: PeerType
    remote_as: int
    owner: tuple[str, str]
    port: int | None = None
    source: Net | None = None
    passive: bool = False
    is_node: bool = False
    local_as: int | None = None
    cluster_id: int | None = None
    next_hop_self: bool = False
    next_hop_keep: bool = False
    restart_seconds: int | None = None
    keepalive_seconds: int | None = None
    ttl_security: int | None = None
    allowed_own_as: int = 0
    reachable_by: Net | None = None
    filters: tuple[str, ...] = ()
    password: SecretKey | None = None
    interface: str = ""
    extended_next_hop: bool = False


def desired_peers(
    cluster: Cluster, local: Local, workloads: Iterable[Workload] = ()
) -> tuple[list[Peer], list[ObjectProblem]]:
    """All peers of the node, sorted by address and port, and what is wrong with BGPPeers.

    ``workloads``: those of this node.
    """
    return _Peers(cluster, local, tuple(workloads)).compute()


class _Peers:
    def __init__(self, cluster: Cluster, local: Local, workloads: tuple[Workload, ...]) -> None:
        self._workloads = workloads
        self._cluster = cluster
        self._local = local
        self._nodes = [cluster_node(node, cluster) for _, node in sorted(cluster.nodes.items())]
        self._by_host = {host: node for node in self._nodes for host in node.hosts.values()}
        self._found: dict[tuple[PeerType, Net, int | None], Peer] = {}
        self._problems: list[ObjectProblem] = []

    def compute(self) -> tuple[list[Peer], list[ObjectProblem]]:
        if self._cluster.default.node_to_node_mesh_enabled is not False:
            self._mesh()
        objects = [p for _, p in sorted(self._cluster.peers.items()) if self._selectors_parse(p)]
        for wanted in (PeerType.GLOBAL, PeerType.NODE):
            for peer in objects:
                if _type(peer) is wanted and self._is_local(peer):
                    for found in self._forward(peer):
                        self._emit(found)
        for peer in objects:
            if peer.spec.reverse_peering != "Manual" and not peer.spec.local_workload_selector:
                for found in self._reverse(peer):
                    self._emit(found)
        return sorted(self._found.values(), key=_order), self._problems

    def _emit(self, peer: Peer) -> None:
        if peer.address == self._local.node.hosts.get(peer.address.version):
            return
        if (PeerType.GLOBAL, peer.address, peer.port) not in self._found:
            self._found.setdefault((peer.type, peer.address, peer.port), peer)

    def _mesh(self) -> None:
        own = self._local.node
        spec = self._cluster.default
        if own.cluster_id is not None:
            return
        for node in self._nodes:
            if node.cluster_id is not None or node.name == own.name:
                continue
            for version, host in node.hosts.items():
                if version in own.hosts:
                    self._emit(
                        Peer(
                            address=host,
                            type=PeerType.MESH,
                            remote_as=node.asn,
                            owner=("Node", node.name),
                            port=self._cluster.listen_port(node.name),
                            source=own.hosts[version],
                            passive=greater(host, own.hosts[version]),
                            is_node=True,
                            restart_seconds=_seconds(spec.node_mesh_max_restart_time),
                            password=_password(spec.node_mesh_password),
                        )
                    )

    def _selectors_parse(self, peer: BGPPeer) -> bool:
        for field, text in selectors(peer):
            try:
                parse_selector(text)
            except SelectorError as error:
                problem = Problem(field, text, error.expected)
                self._problems.append(ObjectProblem("BGPPeer", peer.name, problem))
                return False
        return True

    def _is_local(self, peer: BGPPeer) -> bool:
        return any(node.name == self._local.node.name for node in self._local_nodes(peer))

    def _local_nodes(self, peer: BGPPeer) -> list[ClusterNode]:
        """The nodes that the BGPPeer is meant for."""
        if peer.spec.node_selector:
            return self._matching(peer.spec.node_selector)
        if peer.spec.node:
            return [node for node in self._nodes if node.name == peer.spec.node]
        return self._nodes

    def _matching(self, selector: str) -> list[ClusterNode]:
        parsed = parse_selector(selector)
        return [node for node in self._nodes if parsed.matches(node.labels)]

    def _forward(self, peer: BGPPeer) -> Iterator[Peer]:
        spec = peer.spec
        if spec.local_workload_selector:
            yield from self._with_workloads(peer)
        elif spec.peer_selector:
            for node in self._matching(spec.peer_selector):
                yield from self._with_node(peer, _type(peer), node, _VERSIONS)
        elif spec.peer_ip:
            yield from self._with_address(peer, spec.peer_ip)
        else:
            self._problem(peer, "peerIP", None, "required where peerSelector is absent")

    def _with_workloads(self, peer: BGPPeer) -> Iterator[Peer]:
        """Sessions with workloads of this node, which call."""
        selector = parse_selector(peer.spec.local_workload_selector)
        for workload in self._workloads:
            for version, host in workload.hosts.items():
                if selector.matches(workload.labels) and version in self._local.node.hosts:
                    session = self._session(
                        peer,
                        PeerType.WORKLOAD,
                        host,
                        peer.spec.as_number,
                        port=None,
                        is_node=False,
                        passive=True,
                        local_as=peer.spec.local_as_number,
                        allowed_own_as=peer.spec.num_allowed_local_as_numbers or 0,
                    )
                    source = self._local.peering.get(version)
                    yield replace(session, source=source, interface=workload.interface)

    def _with_address(self, peer: BGPPeer, peer_ip: str) -> Iterator[Peer]:
        """The session that a BGPPeer with ``peerIP`` names, be it a node or a router."""
        spec = peer.spec
        text, port = split_peer_ip(peer_ip)
        address = parse_net(text)
        node = self._by_host.get(address)
        own = self._local.node.hosts.get(address.version)
        remote_as = spec.as_number or (node.asn if node else 0)
        if not remote_as:
            expected = "required: no Node of this cluster has the address peerIP"
            self._problem(peer, "asNumber", spec.as_number, expected)
        elif own is not None:
            if port is None and node and node.asn == remote_as:
                port = self._cluster.listen_port(node.name)
            yield self._session(
                peer,
                _type(peer),
                address,
                remote_as,
                port=port,
                passive=_type(peer) is PeerType.GLOBAL and bool(node) and greater(address, own),
                is_node=node is not None,
                local_as=spec.local_as_number,
                allowed_own_as=spec.num_allowed_local_as_numbers or 0,
            )

    def _with_node(
        self, peer: BGPPeer, kind: PeerType, node: ClusterNode, versions: tuple[int, ...]
    ) -> Iterator[Peer]:
        """Sessions with a node of the cluster, one for each IP version both have."""
        for version, host in node.hosts.items():
            if version in versions and version in self._local.node.hosts:
                yield self._session(
                    peer,
                    kind,
                    host,
                    node.asn,
                    port=self._cluster.listen_port(node.name),
                    is_node=True,
                    peer_cluster_id=node.cluster_id,
                )

    def _reverse(self, peer: BGPPeer) -> Iterator[Peer]:
        """What the BGPPeer makes of this node when it is among the remote ends it names."""
        spec = peer.spec
        own = self._local.node
        versions: tuple[int, ...] = _VERSIONS
        if spec.peer_selector:
            meant = parse_selector(spec.peer_selector).matches(own.labels)
        elif spec.peer_ip:
            text, port = split_peer_ip(spec.peer_ip)
            address = parse_net(text)
            versions = (address.version,)
            meant = (
                address in own.hosts.values()
                and own.asn == (spec.as_number or self._cluster.asn)
                and (port is None or self._local.port in (None, port))
            )
        else:
            return
        if meant:
            for node in self._local_nodes(peer):
                if node.name != own.name:
                    yield from self._with_node(peer, PeerType.NODE, node, versions)

    def _session(
        self,
        peer: BGPPeer,
        kind: PeerType,
        address: Net,
        remote_as: int,
        *,
        port: int | None,
        is_node: bool,
        passive: bool = False,
        local_as: int | None = None,
        allowed_own_as: int = 0,
        peer_cluster_id: int | None = None,
    ) -> Peer:
        """The session, with what the BGPPeer says of all its sessions."""
        spec = peer.spec
        own = self._local.node
        internal = remote_as == (local_as or own.asn)
        keep = spec.next_hop_mode is None and spec.keep_original_next_hop and not internal
        return Peer(
            address=address,
            type=kind,
            remote_as=remote_as,
            owner=("BGPPeer", peer.name),
            port=port,
            source=own.hosts[address.version] if spec.source_address == "UseNodeIP" else None,
            passive=passive,
            is_node=is_node,
            local_as=local_as,
            cluster_id=own.cluster_id if internal and peer_cluster_id != own.cluster_id else None,
            next_hop_self=spec.next_hop_mode == "Self",
            next_hop_keep=spec.next_hop_mode == "Keep" or keep,
            restart_seconds=_seconds(spec.max_restart_time),
            keepalive_seconds=_seconds(spec.keepalive_time),
            ttl_security=spec.ttl_security or None,
            allowed_own_as=allowed_own_as,
            reachable_by=parse_net(spec.reachable_by) if spec.reachable_by else None,
            filters=tuple(spec.filters),
            password=_password(spec.password),
            extended_next_hop=self._extended_next_hop(peer, address),
        )

    def _extended_next_hop(self, peer: BGPPeer, address: Net) -> bool:
        text = peer.metadata.annotations.get(EXTENDED_NEXT_HOP, "false")
        expected = ""
        if text not in ("true", "false"):
            expected = "true or false"
        elif text == "true" and peer.spec.peer_ip and address.version == V4:
            expected = (
                "false: it is about IPv4 routes over IPv6, and spec.peerIP is an IPv4 address"
            )
        if expected:
            problem = Problem(f"metadata.annotations[{EXTENDED_NEXT_HOP}]", text, expected)
            found = ObjectProblem("BGPPeer", peer.name, problem)
            if found not in self._problems:
                self._problems.append(found)
        return text == "true" and address.version == V6

    def _problem(self, peer: BGPPeer, field: str, value: object, expected: str) -> None:
        problem = Problem(f"spec.{field}", value, expected)
        self._problems.append(ObjectProblem("BGPPeer", peer.name, problem))


def greater(address: Net, own: Net) -> bool:
    """Whether it is greater as text, which is how both ends must compare ("9" > "10")."""
    return format_address(*address[:2]) > format_address(*own[:2])


def _type(peer: BGPPeer) -> PeerType:
    spec = peer.spec
    return PeerType.NODE if spec.node or spec.node_selector else PeerType.GLOBAL


def _seconds(duration: timedelta | None) -> int | None:
    return None if duration is None else round(duration.total_seconds())


def _password(password: BGPPassword | None) -> SecretKey | None:
    if password is None:
        return None
    found = password.secret_key_ref
    return SecretKey(found.name, found.key) if found else SecretKey("", "")


def _order(peer: Peer) -> tuple[Net, int, str]:
    return peer.address, peer.port or 0, peer.type.value
