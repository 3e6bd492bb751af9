"""What a node's kernel has, against what the datastore says of the node's pods, and of pools."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from api.net import V4, V6, Net, format_address
from api.pods import DEFAULT_PREFIX
from datastore.interface import Datastore, Key, NotFoundError, part
from ipam.audit import Fault, Finding, shared_pools
from ipam.inventory import User
from ipam.pools import Pools
from ipam.records import Records
from kernel.links import Links
from kernel.netlink import NetlinkSocket
from kernel.routes import PROTO_BGP, PROTO_BIRD, PROTO_FELIX, Routes

_READ = 64  # blocks at most that are looked up to see if they are ours


def interface_prefixes(store: Datastore, node: str) -> tuple[str, ...]:
    """How names of the node's ends of pods' interfaces begin. Raises StoreError.

    FelixConfiguration ``interfacePrefix``, that of the node first. The CNI plugin uses the first.
    """
    for name in (f"node.{node}", "default"):
        try:
            value = store.get(Key("FelixConfiguration", name)).value
        except NotFoundError:
            continue
        text = str(part(value, "spec").get("interfacePrefix") or "")
        if prefixes := tuple(filter(None, map(str.strip, text.split(",")))):
            return prefixes
    return (DEFAULT_PREFIX,)


def audit_kernel(users: Iterable[User], node: str, prefixes: Sequence[str]) -> list[Finding]:
    """Compare with the kernel of the network namespace we are in. Raises OSError.

    ``users``: those of the node among them count. ``prefixes``: see ``interface_prefixes``.
    """
    with NetlinkSocket() as socket:
        links = {link.index: link.name for link in Links(socket).read().values()}
        routes = {
            route.net: links.get(route.hops[0].ifindex, "")
            for version in (V4, V6)
            for route in Routes(socket).read(version=version, protocol=PROTO_FELIX).values()
            if len(route.hops) == 1 and route.hops[0].gateway is None
        }
    of_node = [user for user in users if user.node == node]
    return sorted(set(disagreements(of_node, prefixes, links.values(), routes)))


def learned_routes() -> list[tuple[str, Net]]:
    """What BGP peers announce, by whom: the kernel's routes of protocol bgp and bird.

    ``ip route show proto bgp``, of the network namespace we are in. Raises OSError.
    """
    with NetlinkSocket() as socket:
        found = [
            route
            for version in (V4, V6)
            for protocol in (PROTO_BGP, PROTO_BIRD)
            for route in Routes(socket).read(version=version, protocol=protocol).values()
        ]
    return [
        (f"the next hop {format_address(route.net.version, gateway)}", route.net)
        for route in found
        if route.hops and (gateway := route.hops[0].gateway) is not None
    ]


def audit_learned(store: Datastore, claimed: Callable[[], Collection[Net]]) -> list[Finding]:
    """Pools that peers of this node announce addresses of, which nobody here has claimed.

    ``claimed``: all blocks that somebody claims. Raises StoreError, InvalidObjectError, OSError.
    """
    announced = learned_routes()
    pools = Pools(store).all() if announced else []
    inside = [each for each in announced if any(pool.net.contains(each[1]) for pool in pools)]
    if not inside:
        return []
    ours = set(claimed())
    # A borrowed address may lie in a block of nobody, which nobody claims.
    unclaimed = {
        pool.block_of(net)
        for _, net in inside
        for pool in pools
        if net.is_host and pool.net.contains(net) and pool.block_of(net) not in ours
    }
    records = Records(store)
    ours |= {net for net in sorted(unclaimed)[:_READ] if records.block(net) is not None}
    return sorted(set(shared_pools(pools, ours, inside)))


def disagreements(
    users: Iterable[User],
    prefixes: Sequence[str],
    links: Iterable[str],
    routes: Mapping[Net, str],
) -> Iterator[Finding]:
    """Pure; of one node. ``routes``: felix's to what is on an interface, by whose name.

    A pod that has no address yet need not have an interface, and may.
    """
    there = set(links)
    known = set()
    expected: dict[Net, str] = {}
    for user in users:
        if not user.interface:
            continue
        name = user.interface
        known.add(name)
        if name not in there:
            if user.addresses:
                yield Finding(Fault.INTERFACE, str(user.key), f"has no interface {name}")
            continue
        for address in user.addresses:
            expected[address] = name
            routed = routes.get(address)
            if routed != name:
                other = f", but one by {routed}" if routed else ""
                message = f"has no route to {_text(address)} by {name}{other}"
                yield Finding(Fault.ROUTE, str(user.key), message)
    begins = tuple(prefixes)
    for name in there - known:
        if name.startswith(begins):
            yield Finding(Fault.INTERFACE, name, "is of no endpoint of this node")
    for net, name in routes.items():
        if net.is_host and name.startswith(begins) and net not in expected:
            yield Finding(Fault.ROUTE, _text(net), f"is routed to {name}, and of no endpoint there")


def _text(address: Net) -> str:
    return format_address(address.version, address.address)
