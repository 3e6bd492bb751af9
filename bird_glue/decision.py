"""Which of several paths to a prefix is best, and which are refused.

The order of RFC 4271 9.1, with every comparison total, so that the result doesn't depend on
the order of arrival:

1. the highest local preference (100 where the path has none, as all of eBGP);
2. the shortest AS path (a set counts as one);
3. the lowest origin (IGP, EGP, INCOMPLETE);
4. the lowest MED (0 where it has none; compared whatever the neighbouring AS);
5. eBGP before iBGP;
6. a next hop on a connected subnet before one behind a gateway;
   -- paths equal up to here are used together (ECMP) --
7. the lowest originator or router id;
8. the shortest cluster list;
9. the lowest peer address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from api.net import BITS, Net, parse_net
from bird_glue.filters import Filter, preference_of
from bird_glue.messages import Attributes
from bird_glue.nexthops import never_a_hop

MARTIANS = tuple(
    parse_net(text)
    for text in (
        "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4",
        "::1/128", "fe80::/10", "ff00::/8",
    )
)  # fmt: skip
_MARTIAN_STARTS = tuple(  # version, leading bits, how many of them there are, and of others
    (version, address >> BITS[version] - length, length, BITS[version] - length)
    for version, address, length in MARTIANS
)
_NEAR = 16  # leading bits by which prefixes are told apart from those that matter here
_NEAR_SHIFT = {version: bits - _NEAR for version, bits in BITS.items()}


class Path(NamedTuple):
    """A way to a prefix, as a peer told it."""

    peer: Net
    next_hop: Net
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Session:
    """How paths of a peer are looked at.

    ``external``: over eBGP. ``own_asns``: the AS numbers this node goes by; ``allowed``: how
    often they may be in an AS path all the same. ``filters``: the BGPFilters of the peer.
    ``extended``: an IPv6 session with IPv4 routes as well (RFC 8950).
    """

    external: bool
    own_asns: frozenset[int]
    allowed: int = 0
    filters: tuple[Filter, ...] = ()
    extended: bool = False


@dataclass(frozen=True, slots=True)
class Guard:
    """What of this node a peer may never announce, and how loops are recognised.

    ``neighbours``: addresses on the connected ``subnets`` that others rely on being there: of
    peers, gateways and nodes.
    """

    router_id: int = 0
    cluster_id: int | None = None
    blocks: tuple[Net, ...] = ()
    hosts: frozenset[Net] = frozenset()
    subnets: frozenset[Net] = frozenset()
    neighbours: frozenset[Net] = frozenset()

    def takes_over(self, net: Net) -> bool:
        """Whether a prefix is a part of a connected subnet with a neighbour in it, whose
        traffic it would lead elsewhere. Others, such as the address of a load balancer, may be.
        """
        if net.is_host:
            return net in self.neighbours
        return any(subnet.length and subnet.contains(net) for subnet in self.subnets) and any(
            net.contains(host) for host in self.neighbours
        )


def cost(path: Path, *, external: bool, direct: bool) -> tuple[int, ...]:
    """Steps 1 to 6, lowest first. Paths of equal cost share the traffic."""
    attributes = path.attributes
    return (
        -preference_of(attributes),
        attributes.path_length,
        attributes.origin,
        attributes.med or 0,
        0 if external else 1,
        0 if direct else 1,
    )


def tie_break(path: Path, router_id: int) -> tuple[int, int, Net]:
    """Steps 7 to 9, lowest first; ``router_id`` is the peer's."""
    attributes = path.attributes
    identity = router_id if attributes.originator is None else attributes.originator
    return identity, len(attributes.clusters), path.peer


def refusal(net: Net, path: Path, session: Session, guard: Guard) -> str:
    """Why a path is not used, in words; empty if it may be."""
    return path_refusal(path, session, guard) or prefix_refusal(net, path.next_hop, guard)


def path_refusal(path: Path, session: Session, guard: Guard) -> str:
    """Why a path is not used whatever the prefix; empty if it may be."""
    attributes = path.attributes
    own = session.own_asns
    seen = sum(asn in own for segment in attributes.as_path for asn in segment.asns)
    if seen > session.allowed:
        return "our own AS is in its AS path"
    if guard.router_id and attributes.originator == guard.router_id:
        return "this node is its originator"
    if guard.cluster_id is not None and guard.cluster_id in attributes.clusters:
        return "our own cluster is in its cluster list"
    if path.next_hop in guard.hosts:
        return "its next hop is an address of this node"
    if never_a_hop(path.next_hop):
        return "its next hop is not an address of a machine"
    return ""


def prefix_refusal(net: Net, next_hop: Net, guard: Guard) -> str:
    """Why no path to a prefix by this next hop is used; empty if one may be."""
    for block in guard.blocks:
        # an address of it may be borrowed by another node; a pod here has a better route to its own
        if block.contains(net) and not (net.is_host and net != block):
            return "it is inside a block of this node"
    if net in guard.subnets:
        return "it is a subnet this node is on"
    if net in guard.hosts:
        return "it is an address of this node"
    if net == next_hop:
        return "it is its own next hop"
    if guard.takes_over(net):
        return "a peer, gateway or node on a link of this node is in it"
    if is_martian(net):
        return "it is not an address that is routed"
    return ""


class Vicinity:
    """Which prefixes ``prefix_refusal`` has to look at, because they begin as one that it may be
    about does: of thousands, few. The others it only has something against if they are
    their own next hop.
    """

    def __init__(self, guard: Guard) -> None:
        self._starts: dict[int, set[int]] = {version: set() for version in BITS}
        for group in (MARTIANS, guard.blocks, guard.hosts, guard.subnets, guard.neighbours):
            for version, address, length in group:
                first = address >> _NEAR_SHIFT[version]
                self._starts[version].update(range(first, first + (1 << max(0, _NEAR - length))))

    def has(self, net: Net) -> bool:
        """Whether to look."""
        version, address, length = net
        return length < _NEAR or address >> _NEAR_SHIFT[version] in self._starts[version]


def is_martian(net: Net) -> bool:
    """Whether a prefix is never routed: loopback, link-local, multicast, reserved."""
    version, address, length = net
    for known, start, shortest, shift in _MARTIAN_STARTS:
        if version == known and length >= shortest and address >> shift == start:
            return True
    return False
