"""How an address is reached: what the kernel's own routes say of a BGP next hop.

``Topology`` is a picture of the kernel without what Manx itself put there: connected
subnets, static and default routes. A next hop on a connected subnet is used as it is; one
behind a gateway resolves to that gateway, as BIRD's ``gateway recursive`` does; and one
that only a BGP route leads to, to the next hops of that route, one level deep.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Generic, NamedTuple, TypeVar

from api.net import BITS, V4, V6, Net, parse_net
from bird_glue.messages import is_link_local
from kernel.routes import PROTO_BGP, PROTO_FELIX, Hop, Route

V = TypeVar("V")

NO_HOPS = tuple(
    parse_net(text) for text in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3", "::/127", "ff00::/8")
)


@functools.lru_cache(maxsize=4096)
def never_a_hop(host: Net) -> bool:
    """Whether an address is none that a machine can be reached at: loopback, multicast."""
    return any(net.contains(host) for net in NO_HOPS)


class PrefixTable(Generic[V]):
    """Values by prefix, with longest-prefix match."""

    def __init__(self) -> None:
        self._lengths: dict[int, dict[int, dict[int, V]]] = {V4: {}, V6: {}}
        self._order: dict[int, tuple[int, ...]] = {V4: (), V6: ()}

    def __setitem__(self, net: Net, value: V) -> None:
        by_length = self._lengths[net.version]
        if net.length not in by_length:
            by_length[net.length] = {}
            self._order[net.version] = tuple(sorted(by_length, reverse=True))
        by_length[net.length][net.address] = value

    def get(self, net: Net) -> V | None:
        """The value of exactly this prefix."""
        return self._lengths[net.version].get(net.length, {}).get(net.address)

    def pop(self, net: Net) -> V | None:
        """Remove exactly this prefix; returns its value."""
        return self._lengths[net.version].get(net.length, {}).pop(net.address, None)

    def match(self, host: Net) -> tuple[Net, V] | None:
        """The longest prefix that contains the address, and its value."""
        version, address, _ = host
        bits = BITS[version]
        by_length = self._lengths[version]
        for length in self._order[version]:
            start = address >> (bits - length) << (bits - length)
            values = by_length[length]
            if start in values:
                return Net(version, start, length), values[start]
        return None


@dataclass(frozen=True, slots=True)
class Resolution:
    """Where traffic for a next hop goes. ``via``: the prefix that says so.

    ``direct``: the next hop is on a connected subnet.
    """

    hops: tuple[Hop, ...]
    direct: bool
    via: Net


class PodRoute(NamedTuple):
    """felix's route to a pod of this node."""

    ifindex: int
    metric: int


class Topology:
    """The kernel's routes and addresses, less the routes of Manx.

    ``running``: the interfaces that have a carrier; without it all count. ``names``: what
    they are called. ``pods``: addresses of pods that felix has routed here.
    """

    def __init__(
        self,
        routes: Iterable[Route] = (),
        hosts: Iterable[Net] = (),
        running: frozenset[int] | None = None,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.hosts = frozenset(hosts)
        self.names = names or {}
        self.pods: dict[Net, PodRoute] = {}
        self._ways: dict[Net, Net] = {}
        self._ignored: frozenset[int] = frozenset()
        self._table: PrefixTable[Route] = PrefixTable()
        facts = []
        # of equal prefixes the lowest metric counts, and comes last
        for route in sorted(routes, key=lambda route: -route.metric):
            if route.protocol in (PROTO_BGP, PROTO_FELIX):
                if route.protocol == PROTO_FELIX and route.net.is_host and _connected(route.hops):
                    self.pods[route.net] = PodRoute(route.hops[0].ifindex, route.metric)
                continue
            hops = tuple(hop for hop in route.hops if running is None or hop.ifindex in running)
            if hops or not route.hops:
                self._table[route.net] = route._replace(hops=hops)
                facts.append((route.net, route.kind, hops))
        self._facts = frozenset(facts)
        used = {hop.ifindex for _, _, hops in facts for hop in hops}
        self._used = {index: name for index, name in self.names.items() if index in used}

    def same(self, other: Topology) -> bool:
        """Whether both mean the same, and call it the same: settings and filters go by names."""
        mine, others = (
            (self.hosts, self._facts, self._used),
            (other.hosts, other._facts, other._used),
        )
        return mine == others

    def configure(self, ways: Mapping[Net, Net], ignored: tuple[str, ...] = ()) -> bool:
        """``ways``: addresses that only a gateway leads to, and which; ``ignored``: interfaces
        whose subnets have no next hops on them, with wildcards. Returns whether it is news.
        """
        found = frozenset(
            index
            for index, name in self.names.items()
            if any(fnmatchcase(name, p) for p in ignored)
        )
        if (ways, found) == (self._ways, self._ignored):
            return False
        self._ways, self._ignored = dict(ways), found
        return True

    def interface(self, hops: Sequence[Hop]) -> str | None:
        """The name of the interface that the first hop leaves by."""
        return self.names.get(hops[0].ifindex) if hops else None

    def routes(self) -> Iterator[tuple[Net, bool, tuple[Hop, ...]]]:
        """Prefix, whether it is a connected subnet, and hops of each route; in no order."""
        for net, kind, hops in self._facts:
            yield net, kind == "unicast" and _connected(hops), hops

    @property
    def subnets(self) -> frozenset[Net]:
        """The connected subnets."""
        return frozenset(
            net for net, kind, hops in self._facts if kind == "unicast" and _connected(hops)
        )

    def neighbours(self, hosts: Iterable[Net]) -> frozenset[Net]:
        """Those of the addresses that are on connected subnets, and so the kernel's gateways."""
        subnets = [net for net in self.subnets if net.length]
        gateways = (hop.next_hop(net.version) for net, _, hops in self._facts for hop in hops)
        found = {*hosts, *(gateway for gateway in gateways if gateway is not None)}
        return frozenset(host for host in found if any(net.contains(host) for net in subnets))

    def resolve(self, host: Net) -> Resolution | None:
        """Where an address is; None if nowhere, or here.

        ``ip route get``, ignoring what BGP and felix have put there.
        """
        if host in self.hosts or is_link_local(host) or never_a_hop(host):
            return None
        if host in self._ways and self._ways[host] not in self._ways:
            found_by = self.resolve(self._ways[host])
            return None if found_by is None else Resolution(found_by.hops, False, host)
        if host in self.pods:
            return Resolution((_to(host, self.pods[host].ifindex),), True, host)
        found = self._table.match(host)
        if found is None or found[1].kind != "unicast":
            return None
        via, route = found
        if _connected(route.hops):
            usable = (hop for hop in route.hops if hop.ifindex not in self._ignored)
            hops = tuple(_to(host, hop.ifindex) for hop in usable)
            return Resolution(hops, True, via) if hops else None
        if host.version == V6:  # said of each hop, as the route may be one of IPv4
            return Resolution(tuple(hop._replace(via_v6=True) for hop in route.hops), False, via)
        return Resolution(route.hops, False, via)


def _to(host: Net, ifindex: int) -> Hop:
    return Hop(ifindex, host.address, via_v6=host.version == V6)


def _connected(hops: tuple[Hop, ...]) -> bool:
    return bool(hops) and all(hop.gateway is None for hop in hops)
