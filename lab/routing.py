"""The routing table of a member or pod, read from the kernel and said in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute

from kernel.netns import call_inside
from kernel.routes import PROTO_BGP, PROTO_FELIX, TABLE_MAIN
from lab.client import Place

AF_INET = 2

# Who wrote a route, by its protocol number; see /etc/iproute2/rt_protos, and docs/felix.md.
WRITERS = {
    2: "kernel",
    3: "boot",
    4: "static",
    11: "zebra",
    12: "bird",
    PROTO_FELIX: "felix",
    PROTO_BGP: "bird_glue",
    186: "bgpd",
    196: "static",
}
_KINDS = {6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}


@dataclass(frozen=True, slots=True)
class RouteLine:
    """A route in words. ``via``: one text a next hop, such as ``172.31.1.1 (rack-1)``."""

    destination: str
    via: tuple[str, ...]
    writer: str


def routes(place: Place) -> list[RouteLine]:
    """The IPv4 main table there, in the kernel's order: ``ip route show``. Raises OSError."""
    return call_inside(place.namespaces.net, _read)


def _read() -> list[RouteLine]:
    with IPRoute() as netlink:
        names = {link["index"]: str(link.get("ifname")) for link in netlink.get_links()}
        found = netlink.get_routes(family=AF_INET, table=TABLE_MAIN)
        return [_line(route, names) for route in found]


def _line(route: Any, names: dict[int, str]) -> RouteLine:
    target = route.get("dst")
    destination = f"{target}/{route['dst_len']}" if target else "default"
    writer = WRITERS.get(route["proto"], f"protocol {route['proto']}")
    return RouteLine(destination, tuple(_via(route, names)), writer)


def _via(route: Any, names: dict[int, str]) -> Iterator[str]:
    if route["type"] in _KINDS:
        yield _KINDS[route["type"]]
        return
    hops: Iterable[Any] = route.get("multipath") or [route]
    for hop in hops:
        index = hop["oif"] if hop is not route else route.get("oif")
        interface = names.get(index, f"interface #{index}")
        gateway = hop.get("gateway")
        yield f"{gateway} ({interface})" if gateway else interface
