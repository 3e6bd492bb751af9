"""Routes: read those that are ours, apply a plan. See ip-route(8), rtnetlink(7).

Ours are recognised by their protocol number. A create never overwrites: where another
program has a route with the same key, it fails with EEXIST and says so. A delete takes
only a route that has our protocol.
"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Mapping
from typing import NamedTuple, Self

from api.net import BITS, V4, V6, Net, format_address, host_net
from kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    attribute,
    attribute_list,
    attribute_u32,
    attributes,
    u32,
)
from kernel.table import apply_plan
from reconcile.plan import Plan

RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26

PROTO_FELIX = 80  # routes to pods and to blocks on other nodes, as in Calico
PROTO_BIRD = 12  # what BIRD writes, ours or another (rtnetlink(7): RTPROT_BIRD)
PROTO_BGP = 179  # routes learned by BGP, and the blackholes of own blocks

TABLE_MAIN = 254

SCOPE_GLOBAL = 0
SCOPE_LINK = 253
SCOPE_HOST = 254

_KINDS = {
    "unicast": 1,
    "local": 2,
    "broadcast": 3,
    "anycast": 4,
    "multicast": 5,
    "blackhole": 6,
    "unreachable": 7,
    "prohibit": 8,
    "throw": 9,
}
_KIND_NAMES = {number: name for name, number in _KINDS.items()}
_WITHOUT_DEVICE = frozenset(("blackhole", "unreachable", "prohibit", "throw"))

# No route, or one that is unreachable, blackhole (EINVAL) or prohibit
_GO_NOWHERE = frozenset(
    (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ESRCH, errno.EINVAL, errno.EACCES)
)

_RTA_DST = 1
_RTA_OIF = 4
_RTA_GATEWAY = 5
_RTA_PRIORITY = 6
_RTA_PREFSRC = 7
_RTA_MULTIPATH = 9
_RTA_TABLE = 15
_RTA_VIA = 18  # a gateway of another family: struct rtvia

_RTNH_F_ONLINK = 4
_RTM_F_CLONED = 0x200
_RTM_F_FIB_MATCH = 0x2000
# The metric the kernel gives an IPv6 route that asks for none
_V6_DEFAULT_METRIC = 1024

# family, destination and source length, tos, table, protocol, scope, type, flags
_RTMSG = struct.Struct("=BBBBBBBBI")
_DESTINATION = struct.Struct("=HH")  # length, type
_RTNEXTHOP = struct.Struct("=HBBi")  # length, flags, weight - 1, ifindex
_FAMILY = {V4: 2, V6: 10}
_VIA_V6 = struct.pack("=H", _FAMILY[V6])
_VERSION = {2: V4, 10: V6}


class Hop(NamedTuple):
    """Where a route leads: an interface and, unless the destination is on it, a gateway.

    ``gateway`` is an address of the route's IP version, or, ``via_v6``, an IPv6 address whatever
    that is (``ip route add 10.0.0.0/8 via inet6 fe80::1 dev …``; BGP learns such by RFC 8950).
    ``onlink``: the gateway is reachable on the interface whatever the interface's addresses
    say. ``weight`` is the share among several hops, 1 to 256.
    """

    ifindex: int
    gateway: int | None = None
    onlink: bool = False
    weight: int = 1
    via_v6: bool = False

    def next_hop(self, version: int) -> Net | None:
        """The gateway as a /32 or /128, in a route of this IP version; None without one."""
        if self.gateway is None:
            return None
        return host_net(V6 if self.via_v6 else version, self.gateway)


class RouteKey(NamedTuple):
    """What the kernel allows only once (type of service aside)."""

    table: int
    net: Net
    metric: int


class _RouteFields(NamedTuple):
    net: Net
    hops: tuple[Hop, ...]
    kind: str
    protocol: int
    scope: int
    source: int | None
    metric: int
    table: int


class Route(_RouteFields):
    """A route. Several ``hops`` share the traffic (ECMP).

    ``scope`` None means what ip-route(8) would choose. ``metric`` 0 is the kernel's
    default (for IPv6 that is 1024). Fields that mean the same are made equal, so that a
    route read back equals the one written: IPv6 has no scopes, its gateways are all IPv6, hops
    have no order.

    A tuple, because there are thousands: it is made and compared at C speed. ``_replace``
    takes what it is given as it is.
    """

    __slots__ = ()

    def __new__(
        cls,
        net: Net,
        hops: tuple[Hop, ...] = (),
        kind: str = "unicast",
        protocol: int = PROTO_FELIX,
        scope: int | None = None,
        source: int | None = None,
        metric: int = 0,
        table: int = TABLE_MAIN,
    ) -> Self:
        """A route, with fields that mean the same made equal."""
        if net.version == V6:
            scope = SCOPE_GLOBAL
            if metric == _V6_DEFAULT_METRIC:
                metric = 0
            hops = tuple(hop._replace(via_v6=False) if hop.via_v6 else hop for hop in hops)
        elif scope is None:
            scope = _default_scope(kind, hops)
        if len(hops) > 1:
            hops = tuple(sorted(hops, key=lambda hop: (hop.ifindex, hop.gateway or 0)))
        return super().__new__(cls, net, hops, kind, protocol, scope, source, metric, table)

    def to(self, net: Net) -> Route:
        """The same way to another prefix of the same IP version."""
        return tuple.__new__(Route, (net, *self[1:]))

    @property
    def key(self) -> RouteKey:
        """Its place in the table."""
        return tuple.__new__(RouteKey, (self[7], self[0], self[6]))

    def __str__(self) -> str:
        words = [] if self.kind == "unicast" else [self.kind]
        words.append(str(self.net))
        for hop in self.hops:
            if len(self.hops) > 1:
                words.append("nexthop")
            if hop.gateway is not None:
                version = V6 if hop.via_v6 else self.net.version
                words += ("via", *(("inet6",) if hop.via_v6 else ()))
                words.append(format_address(version, hop.gateway))
            words += ("dev", f"#{hop.ifindex}")
            if hop.onlink:
                words.append("onlink")
        words += ("proto", str(self.protocol))
        if self.metric:
            words += ("metric", str(self.metric))
        if self.table != TABLE_MAIN:
            words += ("table", str(self.table))
        return " ".join(words)


def _default_scope(kind: str, hops: tuple[Hop, ...]) -> int:
    if kind == "local":
        return SCOPE_HOST
    if kind != "unicast":
        return SCOPE_GLOBAL
    for hop in hops:
        if hop.gateway is not None:
            return SCOPE_GLOBAL
    return SCOPE_LINK


class Routes:
    """The routes of the namespace that ``socket`` speaks to."""

    def __init__(self, socket: NetlinkSocket) -> None:
        self._socket = socket

    def read(
        self, *, version: int, table: int = TABLE_MAIN, protocol: int | None = None
    ) -> dict[RouteKey, Route]:
        """The routes of one table and, if given, protocol; the kernel does the filtering.

        ``ip route show table TABLE proto PROTOCOL``.
        """
        header = _RTMSG.pack(_FAMILY[version], 0, 0, 0, 0, protocol or 0, 0, 0, 0)
        message = Message(RTM_GETROUTE, 0, header + attribute_u32(_RTA_TABLE, table))
        try:
            bodies = self._socket.dump(message)
        except FileNotFoundError:
            return {}  # a table without routes does not exist
        found = map(parse_route, bodies)
        return {route.key: route for route in found if route is not None}

    def lookup(self, host: Net) -> Route | None:
        """The route that packets to ``host`` take, None if they go nowhere.

        ``ip route get fibmatch ADDRESS``. The kernel doesn't tell a route that drops them, of
        whatever kind; it answers with the error that who sends them gets.
        """
        header = _RTMSG.pack(_FAMILY[host.version], host.length, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
        message = Message(RTM_GETROUTE, 0, header + attribute(_RTA_DST, host.packed()))
        try:
            return parse_route(self._socket.request(message))
        except OSError as error:
            if error.errno in _GO_NOWHERE:
                return None
            raise

    def apply(self, plan: Plan[RouteKey, Route]) -> dict[RouteKey, OSError]:
        """Do the whole plan in one batch; returns the errors of the steps that failed.

        Creates and updates come before deletes, so that a destination which moves to
        another key stays reachable. A route to delete that is gone is no error.
        """
        return apply_plan(
            self._socket,
            plan,
            create=route_add,
            update=route_replace,
            delete=route_delete,
            gone=errno.ESRCH,
        )


def route_add(route: Route) -> Message:
    """``ip route add``: EEXIST where the key is taken."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, _body(route, route.hops))


def route_replace(route: Route) -> Message:
    """``ip route replace``, without a moment in which there is no route."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _body(route, route.hops))


def route_delete(route: Route) -> Message:
    """``ip route del … proto …``: ESRCH where no route of this kind and protocol is.

    For IPv4 the kernel understands metric 0 as the lowest there is.
    """
    return Message(RTM_DELROUTE, 0, _body(route, ()))


def _body(route: Route, hops: tuple[Hop, ...]) -> bytes:
    version, address, length = route.net
    header, tail = _frame(version, length, hops, *route[2:])
    if not length:
        return header + tail
    return header + address.to_bytes(4 if version == V4 else 16, "big") + tail


@functools.lru_cache(maxsize=4096)
def _frame(
    version: int,
    length: int,
    hops: tuple[Hop, ...],
    kind: str,
    protocol: int,
    scope: int,
    source: int | None,
    metric: int,
    table: int,
) -> tuple[bytes, bytes]:
    """What stands before and behind the destination's address, which many routes share."""
    short = table if table < 256 else 0
    flags = _RTNH_F_ONLINK if len(hops) == 1 and hops[0].onlink else 0
    header = _RTMSG.pack(
        _FAMILY[version], length, 0, 0, short, protocol, scope, _KINDS[kind], flags
    )
    if length:
        header += _DESTINATION.pack(_DESTINATION.size + BITS[version] // 8, _RTA_DST)
    return header, _tail(version, 0 if short else table, metric, source, hops)


def _tail(
    version: int, table: int, metric: int, source: int | None, hops: tuple[Hop, ...]
) -> bytes:
    """The attributes behind the destination."""
    parts = []
    if table:
        parts.append(attribute_u32(_RTA_TABLE, table))
    # Said even where it is the default: a delete without it takes a route of any metric.
    metric = metric or (_V6_DEFAULT_METRIC if version == V6 else 0)
    if metric:
        parts.append(attribute_u32(_RTA_PRIORITY, metric))
    if source is not None:
        parts.append(attribute(_RTA_PREFSRC, Net(version, source, 0).packed()))
    if len(hops) == 1:
        parts.append(_hop_attributes(version, hops[0]))
        parts.append(attribute_u32(_RTA_OIF, hops[0].ifindex))
    elif hops:
        parts.append(attribute(_RTA_MULTIPATH, b"".join(_next_hop(version, h) for h in hops)))
    return b"".join(parts)


def _hop_attributes(version: int, hop: Hop) -> bytes:
    if hop.gateway is None:
        return b""
    if hop.via_v6 and version == V4:
        return attribute(_RTA_VIA, _VIA_V6 + Net(V6, hop.gateway, 0).packed())
    return attribute(_RTA_GATEWAY, Net(version, hop.gateway, 0).packed())


def _next_hop(version: int, hop: Hop) -> bytes:
    inner = _hop_attributes(version, hop)
    flags = _RTNH_F_ONLINK if hop.onlink else 0
    return _RTNEXTHOP.pack(8 + len(inner), flags, hop.weight - 1, hop.ifindex) + inner


def parse_route(body: bytes) -> Route | None:
    """The route of an RTM_NEWROUTE or RTM_DELROUTE message; None if it is a cached clone."""
    family, length, _, _, table, protocol, scope, kind, flags = _RTMSG.unpack_from(body)
    if flags & _RTM_F_CLONED:
        return None
    found = attributes(body, _RTMSG.size)
    version = _VERSION[family]
    name = _KIND_NAMES.get(kind, str(kind))
    hops: tuple[Hop, ...] = ()
    if _RTA_MULTIPATH in found:
        hops = _parse_hops(found[_RTA_MULTIPATH])
    elif _RTA_OIF in found and name not in _WITHOUT_DEVICE:  # the kernel gives IPv6 ones lo
        hops = (_parse_hop(u32(found[_RTA_OIF]), found, flags),)
    return Route(
        net=Net(version, int.from_bytes(found.get(_RTA_DST, b""), "big"), length),
        hops=hops,
        kind=name,
        protocol=protocol,
        scope=scope,
        source=_address(found.get(_RTA_PREFSRC)),
        metric=u32(found[_RTA_PRIORITY]) if _RTA_PRIORITY in found else 0,
        table=u32(found[_RTA_TABLE]) if _RTA_TABLE in found else table,
    )


def _parse_hops(data: bytes) -> tuple[Hop, ...]:
    hops = []
    offset = 0
    while offset + _RTNEXTHOP.size <= len(data):
        length, flags, weight, ifindex = _RTNEXTHOP.unpack_from(data, offset)
        inner = dict(attribute_list(data[offset + _RTNEXTHOP.size : offset + length]))
        hops.append(_parse_hop(ifindex, inner, flags, weight + 1))
        offset += (length + 3) & ~3
    return tuple(hops)


def _parse_hop(ifindex: int, found: Mapping[int, bytes], flags: int, weight: int = 1) -> Hop:
    onlink = bool(flags & _RTNH_F_ONLINK)
    via = found.get(_RTA_VIA, b"")
    if via.startswith(_VIA_V6):
        return Hop(ifindex, _address(via[len(_VIA_V6) :]), onlink, weight, via_v6=True)
    return Hop(ifindex, _address(found.get(_RTA_GATEWAY)), onlink, weight)


def _address(data: bytes | None) -> int | None:
    return None if data is None else int.from_bytes(data, "big")
