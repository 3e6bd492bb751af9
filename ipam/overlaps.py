"""What a pool shares addresses with, and should not: nodes, services, other clusters. Pure.

Pools that overlap each other are refused where they are written. What is said here is allowed,
as in Calico, and hardly meant: it is told by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from api.net import Net, parse_interface, parse_net

JSON = Mapping[str, Any]

_NODE_FIELDS = ("ipv4Address", "ipv6Address")
_SERVICE_FIELDS = ("serviceClusterIPs", "serviceExternalIPs", "serviceLoadBalancerIPs")
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
    """The networks nodes are in, from Node objects. What can't be read is left out."""
    seen: set[Net] = set()
    for node in nodes:
        bgp = _mapping(_mapping(node.get("spec")).get("bgp"))
        for field in _NODE_FIELDS:
            try:
                _, net = parse_interface(str(bgp.get(field)))
            except ValueError:
                continue
            if net not in seen:
                seen.add(net)
                yield Range(net, f"the network of node {_name(node)}")


def service_ranges(configurations: Iterable[JSON]) -> Iterator[Range]:
    """The addresses of services, from BGPConfiguration objects. The unreadable is left out."""
    for configuration in configurations:
        spec = _mapping(configuration.get("spec"))
        for field in _SERVICE_FIELDS:
            for block in spec.get(field) or ():
                try:
                    net = parse_net(str(_mapping(block).get("cidr")))
                except ValueError:
                    continue
                use = f"{field} of BGPConfiguration {_name(configuration)}"
                yield Range(net, use, field in _OF_LOAD_BALANCERS)


def shared(pool: Net, ranges: Iterable[Range], *, load_balancers: bool = False) -> Iterator[Range]:
    """The ranges a pool shares addresses with. ``load_balancers``: it is for those."""
    for range_ in ranges:
        if pool.overlaps(range_.net) and not (load_balancers and range_.for_load_balancers):
            yield range_


def of_other_clusters(
    pools: Mapping[str, Net], blocks: Collection[Net], announced: Iterable[tuple[str, Net]]
) -> Iterator[str]:
    """Warnings about pools that another cluster uses, too.

    ``pools``: by name. ``blocks``: all of this cluster. ``announced``: routes from elsewhere,
    each with who announced it. One into a pool that lies in no block of ours, and is none, is of
    somebody who gives out the same addresses.
    """
    for peer, net in announced:
        for name, pool in pools.items():
            if not pool.contains(net) or _is_ours(net, blocks):
                continue
            yield (
                f"IPPool {name} ({pool}): {peer} announces {net}, which no node of this cluster"
                " has claimed: another cluster uses this pool, too; give each a range of its own,"
                f" or reserve what it uses here (IPReservation with {net})"
            )


def _is_ours(net: Net, blocks: Collection[Net]) -> bool:
    return net in blocks or any(block.contains(net) for block in blocks)


def _mapping(value: object) -> JSON:
    return value if isinstance(value, Mapping) else {}


def _name(value: JSON) -> str:
    return str(_mapping(value.get("metadata")).get("name"))
