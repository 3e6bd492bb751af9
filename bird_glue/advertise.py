"""What is told to which peer.

Every node tells every peer its own routes: blocks, exactly, and nothing inside of them;
addresses of its pods outside of them (borrowed from another node's block), or whose routes
have a priority above the normal one (a machine that moves from node to node); addresses of
services. It never tells one peer what it learned from another, so it is never transit between
two routers. Only a route reflector (a Node with ``routeReflectorClusterID``) tells on, inside of
the IP pools and of services' ranges:

- what a client said, to all iBGP peers; what others said over iBGP, to clients (RFC 4456);
- what it learned over iBGP, to eBGP peers, and the other way round; never eBGP to eBGP.

What workloads of this node say (``localWorkloadSelector``) is told on likewise, by every node.

That is where no BGPFilter of the peer decides. A filter may take away any of it, and add what
else BGP permits: learned routes, and the kernel's. What it accepts is told as it leaves the
filter, without the communities of prefixAdvertisements, as Calico does it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from api.net import V4, Net
from bird_glue.announcement import Announcement, Announcements
from bird_glue.decision import Path, is_martian
from bird_glue.filters import (
    HIGHEST_PREFERENCE,
    Direction,
    Filter,
    RouteFacts,
    add_community,
    evaluate,
    preference_of,
)
from bird_glue.messages import Attributes
from bird_glue.nexthops import Topology
from bird_glue.pools import Pools
from bird_glue.settings import DEFAULT_PRIORITY

_NO_ADVERTISE = "65535:65282"  # RFC 1997
_NO_EXPORT = frozenset(("65535:65281", "65535:65283"))  # the second: nor within a confederation
# never told, not even their subnets: pods, and what kube-proxy puts service addresses on
_NEVER_DIRECT = ("cali*", "kube-ipvs*")

Communities = tuple[tuple[Net, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Speaking:
    """How this node speaks to one peer. ``cluster_id``: it is a client, reflected to so.

    ``filters``: its BGPFilters. ``communities``: to add to prefixes inside of each.
    ``workload``: it is a workload of this node; what it says is told as if it were ours.
    ``priority``: of routes of the session's IP version; ``ipv4_priority``: of IPv4 routes, if
    they are told over an IPv6 session as well (RFC 8950).
    """

    asn: int
    external: bool
    priority: int
    cluster_id: int | None = None
    next_hop_self: bool = False
    next_hop_keep: bool = False
    filters: tuple[Filter, ...] = ()
    communities: Communities = ()
    workload: bool = False
    ipv4_priority: int | None = None

    def versions(self, address: Net) -> tuple[int, ...]:
        """The IP versions of routes that the peer with this address is told."""
        if self.ipv4_priority is None:
            return (address.version,)
        return (address.version, V4)


@dataclass(frozen=True, slots=True)
class OwnRoute:
    """A route that this node has not learned by BGP.

    ``told``: whether peers are told where no filter decides. ``interface``: that its traffic
    leaves by, None if it ends here. ``priority``: None for the normal one.
    """

    net: Net
    told: bool
    interface: str | None = None
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class LearnedRoute:
    """A prefix that peers told, by its best path, whose peer has ``router_id``.

    ``told``: whether it is one that a reflector tells on where no filter decides.
    ``interface``: that its traffic leaves by, None if that isn't known.
    """

    net: Net
    path: Path
    router_id: int
    told: bool
    interface: str | None = None


def announcements(
    own: tuple[OwnRoute, ...],
    learned: Iterable[LearnedRoute],
    speaking: Mapping[Net, Speaking],
    cluster_id: int | None,
) -> dict[Net, Announcements]:
    """What each peer is told, by its address. ``cluster_id``: ours, if this node reflects.

    ``learned``: what there is to tell on; nothing where nobody is told any of it.
    """
    learned = tuple(learned)
    wanted: dict[Net, Announcements] = {}
    alike: dict[tuple[tuple[int, ...], Speaking], dict[Net, Announcement]] = {}
    for address, to in speaking.items():
        versions = to.versions(address)
        how = versions, to
        if how not in alike:
            alike[how] = {}
            for version in versions:
                alike[how] |= own_announcements(own, version, to)
        told = {}
        for route in learned:
            if route.net.version in versions and route.path.peer != address:
                found = learned_announcement(route, speaking[route.path.peer], to, cluster_id)
                if found is not None:
                    told[route.net] = found
        wanted[address] = told | alike[how] if told else alike[how]
    return wanted


def own_routes(
    blocks: Iterable[Net],
    services: Iterable[Net],
    pools: Pools,
    topology: Topology,
    priorities: Mapping[int, int],
    ignored_interfaces: tuple[str, ...] = (),
) -> tuple[OwnRoute, ...]:
    """All routes of this node. Those to pods inside of ``blocks`` are never told, unless they
    are better than normal: have a metric below that of ``priorities``, by IP version, and below
    what the kernel gives IPv6 routes without one.
    """
    blocks = tuple(blocks)
    found: dict[Net, OwnRoute] = {}
    for block in blocks:
        found[block] = OwnRoute(block, pools.exports_own(block))
    for net in services:
        found.setdefault(net, OwnRoute(net, True))
    for host, pod in topology.pods.items():
        interface = topology.names.get(pod.ifindex)
        if 0 < pod.metric < min(priorities[host.version], DEFAULT_PRIORITY):
            found[host] = OwnRoute(host, pools.exports_own(host), interface, pod.metric)
        elif not any(block.contains(host) for block in blocks):
            found.setdefault(host, OwnRoute(host, pools.exports_address(host), interface))
    never = (*ignored_interfaces, *_NEVER_DIRECT)
    for net, connected, hops in topology.routes():
        interface = topology.interface(hops)
        if is_martian(net) or (connected and _matches(interface, never)):
            continue
        found.setdefault(net, OwnRoute(net, False, interface))
    return tuple(found[net] for net in sorted(found))


def own_announcements(
    routes: Iterable[OwnRoute], version: int, speaking: Speaking
) -> dict[Net, Announcement]:
    """The routes of this node, of one IP version, for one peer."""
    priority = speaking.priority
    if version == V4 and speaking.ipv4_priority is not None:
        priority = speaking.ipv4_priority
    normal = Attributes(origin=0, local_preference=HIGHEST_PREFERENCE - priority)
    told: dict[Net, Announcement] = {}
    for route in routes:
        if route.net.version != version or not (route.told or speaking.filters):
            continue
        plain = normal
        if route.priority is not None:
            plain = replace(normal, local_preference=HIGHEST_PREFERENCE - route.priority)
        facts = RouteFacts(route.net, plain, speaking.external, False, route.interface)
        attributes = _leaving(facts, speaking, told=route.told)
        if attributes is not None:
            told[route.net] = _from_here(attributes, external=speaking.external)
    return told


@functools.lru_cache(maxsize=1024)
def _from_here(attributes: Attributes, *, external: bool) -> Announcement:
    """The same object for the same attributes: who compares it each time needn't look into it."""
    return Announcement(
        None, replace(attributes, local_preference=None) if external else attributes
    )


def learned_announcement(
    route: LearnedRoute, learned: Speaking, to: Speaking, cluster_id: int | None
) -> Announcement | None:
    """A learned route as it is told on; None if that peer is not to know it.

    ``learned``: how we speak with the peer it came from. ``cluster_id``: ours, if this node is
    a reflector.
    """
    attributes = route.path.attributes
    between_clients = learned.cluster_id is not None or to.cluster_id is not None
    internal = not learned.external and not to.external
    if internal and (cluster_id is None or not between_clients):
        return None
    if _NO_ADVERTISE in attributes.communities:
        return None
    if to.external and not _NO_EXPORT.isdisjoint(attributes.communities):
        return None
    by_itself = route.told and learned.workload
    if cluster_id is not None:
        by_itself |= route.told and not (learned.external and to.external)
    facts = RouteFacts(route.net, attributes, to.external, True, route.interface)
    leaving = _leaving(facts, to, told=by_itself)
    if leaving is None:
        return None
    own_hop = to.next_hop_self or (to.external and not to.next_hop_keep) or learned.workload
    if route.path.next_hop.version != route.net.version and to.ipv4_priority is None:
        own_hop = True  # an IPv6 address, which can't be told over an IPv4 session
    if to.external:
        leaving = replace(leaving, local_preference=None, med=None, originator=None, clusters=())
    elif leaving.local_preference is None:
        leaving = replace(leaving, local_preference=preference_of(leaving))
    if internal and cluster_id is not None:
        originator = route.router_id if leaving.originator is None else leaving.originator
        leaving = replace(leaving, originator=originator, clusters=(cluster_id, *leaving.clusters))
    return Announcement(None if own_hop else route.path.next_hop, leaving)


def _leaving(facts: RouteFacts, to: Speaking, *, told: bool) -> Attributes | None:
    """What the filters and then the rules for all peers make of a route; None: not told."""
    decision = evaluate(to.filters, Direction.EXPORT, facts)
    if decision.accept is not None:
        return decision.attributes if decision.accept else None
    if not told:
        return None
    attributes = facts.attributes
    for value in _communities(facts.net, to.communities):
        attributes = add_community(attributes, value)
    return attributes


def _communities(net: Net, communities: Communities) -> Iterator[str]:
    for prefix, values in communities:
        if prefix.contains(net):
            yield from values


def _matches(interface: str | None, patterns: Iterable[str]) -> bool:
    return interface is not None and any(fnmatchcase(interface, text) for text in patterns)
