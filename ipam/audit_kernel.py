"""What a node's kernel has, against what the datastore says of the node's pods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from api.net import V4, V6, Net, format_address
from ipam.audit import Fault, Finding
from ipam.inventory import Inventory
from kernel.links import Links
from kernel.netlink import NetlinkSocket
from kernel.routes import PROTO_FELIX, Routes

_PREFIX = "cali"  # of the node's ends of pods' interfaces


def audit_kernel(inventory: Inventory, node: str) -> list[Finding]:
    """Compare with the kernel of the network namespace we are in. Raises OSError."""
    with NetlinkSocket() as socket:
        links = {link.index: link.name for link in Links(socket).read().values()}
        routes = {
            route.net: links.get(route.hops[0].ifindex, "")
            for version in (V4, V6)
            for route in Routes(socket).read(version=version, protocol=PROTO_FELIX).values()
            if len(route.hops) == 1 and route.hops[0].gateway is None
        }
    return sorted(set(disagreements(inventory, node, links.values(), routes)))


def disagreements(
    inventory: Inventory, node: str, links: Iterable[str], routes: Mapping[Net, str]
) -> Iterator[Finding]:
    """Pure. ``links``: names of interfaces; ``routes``: felix's to what is on an interface."""
    there = set(links)
    known = set()
    expected: dict[Net, str] = {}
    for user in inventory.users:
        if not user.interface or user.node != node:
            continue
        known.add(user.interface)
        if user.interface not in there:
            yield Finding(Fault.INTERFACE, str(user.key), f"has no interface {user.interface}")
            continue
        for address in user.addresses:
            expected[address] = user.interface
            routed = routes.get(address)
            if routed != user.interface:
                other = f", but one by {routed}" if routed else ""
                message = f"has no route to {_text(address)} by {user.interface}{other}"
                yield Finding(Fault.ROUTE, str(user.key), message)
    for name in there - known:
        if name.startswith(_PREFIX):
            yield Finding(Fault.INTERFACE, name, "is of no endpoint of this node")
    for net, name in routes.items():
        if net.is_host and name.startswith(_PREFIX) and net not in expected:
            yield Finding(Fault.ROUTE, _text(net), f"is routed to {name}, and of no endpoint there")


def _text(address: Net) -> str:
    return format_address(address.version, address.address)
