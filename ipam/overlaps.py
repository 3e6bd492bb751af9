"""What a pool shares addresses with, and should not: pools, nodes, services, other clusters. Pure.

All of it can be written where nobody checks (``kubectl apply``), and from either side, so the audit
looks for it again and again. What can't be read is left out: its own reader tells of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import combinations
from typing import Any

from api.net import BITS, Net, parse_interface, parse_net
from ipam.pools import Pool

JSON = Mapping[str, Any]

_NODE_FIELDS = ("ipv4Address", "ipv6Address")
_SERVICE_FIELDS = ("serviceClusterIPs", "serviceExternalIPs", "serviceLoadBalancerIPs")
_PEERS = frozenset(("NodeMesh", "BGPPeer"))
_LATE = timedelta(minutes=10)  # and the clocks of two machines
_OF_LOAD_BALANCERS = frozenset(_SERVICE_FIELDS[1:])


@dataclass(frozen=True, slots=True)
class Range:
    """A range that is used by others than pods; ``use`` says by whom, in words.

    ``for_load_balancers``: a pool for load balancers may lie in it.
    """

    net: Net
    use: str
    for_load_balancers: bool = False


def node_ranges(nodes: Iterable[JSON]) -> Iterator[Range]:
    """The networks nodes are in, and their addresses outside of those, from Node objects."""
    networks: set[Net] = set()
    hosts: dict[Net, str] = {}
    for node in nodes:
        spec = _mapping(node.get("spec"))
        bgp = _mapping(spec.get("bgp"))
        for text in (bgp.get(field) for field in _NODE_FIELDS):
            if (interface := _interface(text)) and interface[1] not in networks:
                networks.add(interface[1])
                yield Range(interface[1], f"the network of node {_name(node)}")
        for address in _list(spec.get("addresses")):
            if interface := _interface(_mapping(address).get("address")):
                hosts.setdefault(interface[0], _name(node))
    for host, name in hosts.items():
        if not any(net.contains(host) for net in networks):
            yield Range(host, f"the address of node {name}")


def service_ranges(configurations: Iterable[JSON]) -> Iterator[Range]:
    """The addresses of services, from BGPConfiguration objects."""
    for configuration in configurations:
        spec = _mapping(configuration.get("spec"))
        for field in _SERVICE_FIELDS:
            for block in _list(spec.get(field)):
                try:
                    net = parse_net(str(_mapping(block).get("cidr")))
                except ValueError:
                    continue
                use = f"{field} of BGPConfiguration {_name(configuration)}"
                yield Range(net, use, field in _OF_LOAD_BALANCERS)


def service_cidrs(cidrs: Iterable[JSON]) -> Iterator[Range]:
    """Where Kubernetes takes addresses of services from, from ServiceCIDR objects."""
    for value in cidrs:
        for text in _list(_mapping(value.get("spec")).get("cidrs")):
            try:
                yield Range(parse_net(str(text)), f"ServiceCIDR {_name(value)}")
            except ValueError:
                continue


def service_addresses(services: Iterable[JSON]) -> Iterator[Range]:
    """The addresses that Services have inside the cluster, each a range of its own."""
    for service in services:
        spec = _mapping(service.get("spec"))
        name = f"{_mapping(service.get('metadata')).get('namespace')}/{_name(service)}"
        for text in dict.fromkeys([spec.get("clusterIP"), *_list(spec.get("clusterIPs"))]):
            if interface := _interface(text):
                yield Range(interface[0], f"the address of Service {name}")


def shared(pool: Net, ranges: Iterable[Range], *, load_balancers: bool = False) -> Iterator[Range]:
    """The ranges a pool shares addresses with; of single addresses only the lowest.

    ``load_balancers``: the pool is for those.
    """
    lowest: Range | None = None
    for range_ in ranges:
        if not pool.overlaps(range_.net) or (load_balancers and range_.for_load_balancers):
            continue
        if not range_.net.is_host:
            yield range_
        elif lowest is None or range_.net < lowest.net:
            lowest = range_
    if lowest is not None:
        yield lowest


def overlapping(pools: Sequence[Pool]) -> Iterator[tuple[Pool, Pool]]:
    """The pairs of pools that share addresses."""
    for one, other in combinations(pools, 2):
        if one.net.overlaps(other.net):
            yield one, other


def learned_routes(statuses: Iterable[JSON], now: datetime) -> Iterator[tuple[str, Net]]:
    """What BGP peers announce, and to whom, from CalicoNodeStatus objects that are kept up to date.

    ``now`` in UTC.
    """
    for value in statuses:
        spec, status = _mapping(value.get("spec")), _mapping(value.get("status"))
        try:
            period = timedelta(seconds=int(spec.get("updatePeriodSeconds") or 0))
            updated = datetime.fromisoformat(str(status.get("lastUpdated")))
            if not period or now - updated > 3 * period + _LATE:
                continue
        except (ValueError, TypeError, OverflowError):
            continue
        routes = _mapping(status.get("routes"))
        for field in ("routesV4", "routesV6"):
            for route in map(_mapping, _list(routes.get(field))):
                source = _mapping(route.get("learnedFrom"))
                if source.get("sourceType") not in _PEERS:
                    continue
                try:
                    net = parse_net(str(route.get("destination")))
                except ValueError:
                    continue
                yield f"{source.get('peerIP')}, a peer of node {spec.get('node')},", net


def of_other_clusters(
    pools: Iterable[Pool], blocks: Collection[Net], announced: Iterable[tuple[str, Net]]
) -> Iterator[tuple[Pool, str]]:
    """Pools that another cluster uses, too, and what is to be said of that.

    ``blocks``: all of this cluster. ``announced``: routes from elsewhere, each with who announced
    it. One into a pool that lies in no block of ours, is none, and has none in it, is of somebody
    who gives out the same addresses.
    """
    pools = list(pools)
    ordered, known = sorted(blocks), frozenset(blocks)
    lengths = sorted({block.length for block in blocks})
    for peer, net in announced:
        for pool in pools:
            if pool.net.contains(net) and not _is_ours(net, known, ordered, lengths):
                yield (
                    pool,
                    f"{peer} announces {net}, which no node of this cluster has claimed: another"
                    f" cluster uses {pool.net}, too; give each a range of its own, or reserve what"
                    f" it uses here (IPReservation with {net})",
                )


def _is_ours(
    net: Net, blocks: Collection[Net], ordered: Sequence[Net], lengths: Sequence[int]
) -> bool:
    """Whether a range shares addresses with a block, of which there may be many."""
    for length in lengths:
        if length > net.length:
            break
        shift = BITS[net.version] - length
        if Net(net.version, net.address >> shift << shift, length) in blocks:
            return True
    following = bisect_left(ordered, Net(net.version, net.address, 0))
    return following < len(ordered) and net.contains(ordered[following])


def _interface(text: object) -> tuple[Net, Net] | None:
    """The address as a /32 or /128, and the network it is in."""
    try:
        return parse_interface(str(text))
    except ValueError:
        return None


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _mapping(value: object) -> JSON:
    return value if isinstance(value, Mapping) else {}


def _name(value: JSON) -> str:
    return str(_mapping(value.get("metadata")).get("name"))
