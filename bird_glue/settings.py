"""What BGP is on this node whoever its peers are: addresses, AS number, router id, priorities."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from api.bgp import DEFAULT_AS_NUMBER, BGPConfiguration, BGPConfigurationSpec, BGPPeer
from api.errors import Problem
from api.net import V4, V6, Net, format_address, parse_interface, parse_net
from api.node import Node

_MULTICAST = 224 << 24
DEFAULT_PRIORITY = 1024  # metric of learned routes, as in Calico


@dataclass(frozen=True, slots=True)
class ObjectProblem:
    """What is wrong with an object, from this node's point of view."""

    kind: str
    name: str
    problem: Problem

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Cluster:
    """The resources, by name, that decide about sessions."""

    nodes: Mapping[str, Node]
    peers: Mapping[str, BGPPeer]
    configurations: Mapping[str, BGPConfiguration]

    @property
    def default(self) -> BGPConfigurationSpec:
        """The cluster's BGPConfiguration, ``default``; Calico's defaults where it is absent."""
        found = self.configurations.get("default")
        return found.spec if found else BGPConfigurationSpec()

    @property
    def asn(self) -> int:
        """AS number of the nodes that have none of their own."""
        return self.default.as_number or DEFAULT_AS_NUMBER

    def listen_port(self, node: str) -> int | None:
        """Where the node listens, if anything says so."""
        own = self.configurations.get(f"node.{node}")
        return (own.spec.listen_port if own else None) or self.default.listen_port


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """What BGP has to know of a node. ``hosts`` and ``subnets`` are keyed by IP version."""

    name: str
    labels: Mapping[str, str]
    hosts: Mapping[int, Net]
    subnets: Mapping[int, Net]
    asn: int
    cluster_id: int | None  # of a route reflector


@dataclass(frozen=True, slots=True)
class Local:
    """This node's settings."""

    node: ClusterNode
    router_id: int
    port: int | None
    bind_node_address: bool
    priorities: Mapping[int, int]  # metric of learned routes, by IP version
    program_unencapsulated: bool  # whether learned routes of such pools are ours to program
    communities: tuple[tuple[Net, tuple[str, ...]], ...] = ()  # for prefixes inside of one
    ignored_interfaces: tuple[str, ...] = ()  # whose subnets BGP doesn't know; with wildcards
    peering: Mapping[int, Net] = field(default_factory=dict)  # address workloads call, by version

    @property
    def asn(self) -> int:
        """The AS number of this node."""
        return self.node.asn

    @property
    def metrics(self) -> dict[int, int]:
        """Of the routes that BGP writes, by IP version. IPv6 has no metric 0: a route for which
        none is asked, of a pod or by hand, gets 1024, and must come before those of BGP.
        """
        return {
            V4: self.priorities[V4],
            V6: max(self.priorities[V6], DEFAULT_PRIORITY) + 1,
        }


def cluster_node(node: Node, cluster: Cluster) -> ClusterNode:
    """What matters here of a Node."""
    bgp = node.spec.bgp
    hosts: dict[int, Net] = {}
    subnets: dict[int, Net] = {}
    for host, subnet in node_addresses(node):
        hosts[host.version], subnets[host.version] = host, subnet
    cluster_id = bgp.route_reflector_cluster_id if bgp else None
    return ClusterNode(
        node.name,
        node.metadata.labels,
        hosts,
        subnets,
        (bgp.as_number if bgp else None) or cluster.asn,
        parse_net(cluster_id).address if cluster_id else None,
    )


def node_addresses(node: Node) -> Iterator[tuple[Net, Net]]:
    """The addresses of a Node, each with the subnet it is in."""
    bgp = node.spec.bgp
    for text in (bgp.ipv4_address, bgp.ipv6_address) if bgp else ():
        if text:
            yield _interface(text)


_interface = functools.lru_cache(maxsize=16384)(parse_interface)


def local_settings(cluster: Cluster, name: str, router_id: str = "") -> Local | None:
    """This node's settings; None while its Node object is missing.

    ``router_id``: an IPv4 address, ``hash`` (of the name), or empty for the node's IPv4
    address, and the hash where it has none.
    """
    if name not in cluster.nodes:
        return None
    node = cluster_node(cluster.nodes[name], cluster)
    spec = cluster.default
    if router_id and router_id != "hash":
        number = parse_net(router_id).address
    elif V4 in node.hosts and not router_id:
        number = node.hosts[V4].address
    else:
        number = hashed_router_id(name)
    return Local(
        node=node,
        router_id=number,
        port=cluster.listen_port(name),
        bind_node_address=spec.bind_mode == "NodeIP",
        priorities={
            V4: spec.ipv4_normal_route_priority or DEFAULT_PRIORITY,
            V6: spec.ipv6_normal_route_priority or DEFAULT_PRIORITY,
        },
        program_unencapsulated=spec.program_cluster_routes
        in (None, "Enabled", "EnabledNoEncapOnly"),
        communities=prefix_communities(cluster, name),
        ignored_interfaces=tuple(spec.ignored_interfaces),
        peering={
            host.version: host
            for text in (spec.local_workload_peering_ipv4, spec.local_workload_peering_ipv6)
            for host in ([parse_net(text)] if text else [])
        },
    )


def prefix_communities(cluster: Cluster, name: str) -> tuple[tuple[Net, tuple[str, ...]], ...]:
    """prefixAdvertisements of a node, else of the cluster, with the values of the names in it."""
    own = cluster.configurations.get(f"node.{name}")
    spec = own.spec if own and own.spec.prefix_advertisements else cluster.default
    values = {community.name: community.value for community in spec.communities}
    return tuple(
        (
            parse_net(advertisement.cidr),
            tuple(dict.fromkeys(values.get(text, text) for text in advertisement.communities)),
        )
        for advertisement in spec.prefix_advertisements
    )


def parse_router_id(text: str) -> str:
    """MANX_ROUTER_ID: an IPv4 address that a machine may have (RFC 4271 4.2), ``hash``, or empty.

    Raises ValueError.
    """
    if text in ("", "hash"):
        return text
    with contextlib.suppress(ValueError):
        net = parse_net(text)
        if net.version == V4 and net.is_host and 0 < net.address < _MULTICAST:
            return format_address(*net[:2])
    raise ValueError(f"MANX_ROUTER_ID={text!r}: expected 0.0.0.1 to 223.255.255.255, or hash")


def hashed_router_id(name: str) -> int:
    """A router id from a name, outside of 224.0.0.0 and above, equal to Calico's."""
    digest = bytearray(hashlib.sha256(name.encode()).digest()[:4])
    if digest[0] > 223:
        digest[0] -= 32
    return int.from_bytes(digest, "big")
