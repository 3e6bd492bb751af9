"""Routes to pods and nodes, settings of their interfaces, and the tunnel they may need.

Ours are the routes of protocol 80 in the main table; everybody else's are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from api.net import V4, V6, Net
from felix.bandwidth import Bandwidth
from felix.desired import Device, Limits
from felix.overlay import Peer, Remote
from felix.tables import Table
from felix.tunnel import Tunnel
from kernel import sysctl
from kernel.addresses import Addresses
from kernel.links import Link, LinkEvent, Links
from kernel.netlink import NetlinkSocket
from kernel.routes import PROTO_FELIX, Hop, Route, RouteKey, Routes
from reconcile.plan import Plan

Path = tuple[str, ...]
LOOPBACK = "lo"
_ADDRESS_POLL = 1.0  # seconds
# rp_filter (RFC 3704). Its loose mode (2) drops all where the interface has no address, so what
# may send with others' addresses is left to the chains alone; conf/all must be 0 for that.
_STRICT, _LOOSE = "1", "0"
FORWARDING: Mapping[int, Path] = {
    V4: ("net", "ipv4", "ip_forward"),
    V6: ("net", "ipv6", "conf", "all", "forwarding"),
}


class Network:
    """What felix does with links and routes, in the calling thread's network namespace."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket()
        self._links: dict[str, Link] = {}
        self._host: Net | None = None  # this node's own address
        self._uplink: Link | None = None  # the interface that has it
        self._device: Device | None = None
        self._pods: dict[Net, str] = {}
        self._pods_of: dict[str, set[Net]] = {}
        self._loose: set[str] = set()  # interfaces that may send with others' addresses
        self._remotes: dict[Net, Remote] = {}
        self._routes: Table[RouteKey, Route] = Table(self._apply_routes)
        self._settings: Table[Path, str] = Table(_apply_settings)
        self._tunnel = Tunnel(self._socket)
        self._bandwidth = Bandwidth(self._socket)

    def close(self) -> None:
        """Let go of the socket. What is in the kernel stays."""
        self._socket.close()

    def read(self) -> None:
        """See what is there: interfaces, and everything of ours."""
        self._links = Links(self._socket).read()
        self._tunnel.read(self._links)
        self._find_uplink()
        for interface in self._pods_of:
            self._want_interface(interface)
        self._want_routes((*self._pods, *self._remotes))
        self._routes.found(self._read_routes())
        self._settings.found(_read_settings(self._settings.desired))
        self._bandwidth.read(self._links)

    def want_forwarding(self, versions: Iterable[int]) -> None:
        """Forward packets of these IP versions (``sysctl net.ipv4.ip_forward=1``)."""
        for version in versions:
            self._settings.want(FORWARDING[version], "1")

    def want_pod(self, address: Net, interface: str | None) -> None:
        """A pod's address (a /32 or /128) is behind an interface; None: behind none."""
        before = self._pods.pop(address, None)
        if before is not None:
            nets = self._pods_of[before]
            nets.discard(address)
            if not nets:
                del self._pods_of[before]
                self._want_interface(before)
        if interface is not None:
            self._pods[address] = interface
            self._pods_of.setdefault(interface, set()).add(address)
            self._want_interface(interface)
        self._want_routes((address,))

    def want_loose(self, interface: str, loose: bool) -> None:
        """Whether the kernel lets an interface send what is not routed back to it.

        Which sources exactly it may use is then for the chains to say.
        """
        (self._loose.add if loose else self._loose.discard)(interface)
        self._want_interface(interface)

    def want_limits(self, interface: str, limits: Limits) -> None:
        """How much a pod's interface may carry."""
        self._bandwidth.want(interface, limits)
        self._want_interface(interface)

    def want_remote(self, net: Net, remote: Remote | None) -> None:
        """How to reach a block or an address on another node; None: not our affair."""
        if remote is None:
            self._remotes.pop(net, None)
        else:
            self._remotes[net] = remote
        self._want_routes((net,))

    def want_tunnel(self, host: Net | None, device: Device | None) -> None:
        """This node's own address, and the VXLAN device it should have."""
        self._host, self._device = host, device
        self._find_uplink()

    def want_peer(self, node: str, peer: Peer | None) -> None:
        """Another node's end of the overlay; None: it has none."""
        self._tunnel.want_peer(node, peer)

    def link_changed(self, event: LinkEvent) -> None:
        """The kernel told of an interface."""
        if event.deleted or not event.up:
            # The kernel took its routes away, whatever became of the interface since.
            self._forget(event)
        link = self._now(event.name)
        for name, other in list(self._links.items()):
            if other.index == event.index and name != event.name:
                del self._links[name]  # it was renamed
                if name in self._pods_of:  # no chain knows it: nothing is to go there any more
                    self._want_interface(name)
                    self._want_routes(self._pods_of[name])
        if link == self._links.get(event.name):
            return
        if link is None:
            del self._links[event.name]
        else:
            self._links[event.name] = link
        if event.name in self._pods_of:
            self._want_interface(event.name)
            self._want_routes(self._pods_of[event.name])
        elif self._host is not None:
            self._find_uplink()

    def apply(self, now: float) -> int:
        """Do what is due; returns the number of steps."""
        if self._lost():
            self._find_uplink()
        index = self._tunnel.index
        steps = self._tunnel.apply(now)
        if self._tunnel.index != index:
            self._want_routes(self._remotes)
        steps += self._settings.apply(now) + self._bandwidth.table.apply(now)
        return steps + self._routes.apply(now)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(object, what is wrong) of everything that is not as it should be."""
        for table in self._retried():
            for error in table.errors.values():
                yield "network", str(error)
        if self._lost():
            yield "Node", f"the address {self._host} is on no interface: no way to other nodes"

    def next_retry(self) -> float | None:
        """When ``apply`` has something to try again, in monotonic seconds."""
        times = [due for table in self._retried() if (due := table.next_retry()) is not None]
        if self._lost():
            times.append(time.monotonic() + _ADDRESS_POLL)
        return min(times, default=None)

    def _retried(self) -> Iterator[Table[Any, Any]]:
        yield from self._tunnel.tables()
        yield self._settings
        yield self._bandwidth.table
        yield self._routes

    def _lost(self) -> bool:
        """The node's address is needed and nowhere to be found. Nobody tells when it comes."""
        return self._uplink is None and bool(self._device or self._remotes)

    def waiting(self, interface: str) -> bool:
        """Whether an interface that pods are behind is missing or down."""
        link = self._links.get(interface)
        return link is None or not link.up

    def _now(self, name: str) -> Link | None:
        try:
            return Links(self._socket).get(name)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return None

    def _forget(self, event: LinkEvent) -> None:
        self._tunnel.vanished(event.index)
        self._settings.vanished([_reverse_path(event.name)])
        if event.name in self._pods_of:
            keys = [Route(net).key for net in self._pods_of[event.name]]
        else:
            keys = list(self._routes.actual)
        actual = self._routes.actual
        self._routes.vanished(
            key
            for key in keys
            if key in actual and any(hop.ifindex == event.index for hop in actual[key].hops)
        )

    def _find_uplink(self) -> None:
        """Which interface has the node's address, and so the next nodes and the MTU."""
        indexes = {
            address.ifindex
            for address in Addresses(self._socket).read(version=V4).values()
            if address.host == self._host
        }
        before = self._uplink
        uplinks = (link for link in self._links.values() if link.index in indexes)
        self._uplink = next(uplinks, None)
        self._tunnel.want_device(self._device, self._uplink_mtu())
        if self._uplink != before:
            self._want_routes(self._remotes)

    def _uplink_mtu(self) -> int:
        """What the nodes can send each other; 0 while the node's address is nowhere."""
        if self._uplink is None or self._uplink.name != LOOPBACK:
            return self._uplink.mtu if self._uplink else 0
        # An address on the loopback is reached through whichever interface routing chooses.
        others = (
            link.mtu
            for link in self._links.values()
            if link.running
            and link.name not in self._pods_of
            and link.kind not in ("vxlan", "ifb")
            and link.name != LOOPBACK
        )
        return min(others, default=0)

    def _want_interface(self, interface: str) -> None:
        """A pod's interface accepts only packets whose source is routed back to it."""
        wanted = interface in self._pods_of and not self.waiting(interface)
        mode = _LOOSE if interface in self._loose else _STRICT
        self._settings.want(_reverse_path(interface), mode if wanted else None)
        self._bandwidth.place(interface, self._links[interface] if wanted else None)

    def _want_routes(self, nets: Iterable[Net]) -> None:
        for net in nets:
            route = self._route(net)
            self._routes.want(Route(net).key, route)

    def _route(self, net: Net) -> Route | None:
        """The route that ``net`` should have now; None while it can't have one."""
        interface = self._pods.get(net)
        if interface is not None:
            if self.waiting(interface):
                return None
            return Route(net, (Hop(self._links[interface].index),), protocol=PROTO_FELIX)
        remote = self._remotes.get(net)
        if remote is None:
            return None
        if remote.tunnelled:
            index = self._tunnel.index
        else:
            index = self._uplink.index if self._uplink and self._uplink.up else None
        if index is None:
            return None
        hop = Hop(index, remote.gateway.address, onlink=remote.tunnelled)
        return Route(net, (hop,), protocol=PROTO_FELIX)

    def _read_routes(self) -> dict[RouteKey, Route]:
        routes = Routes(self._socket)
        return {
            key: route
            for version in (V4, V6)
            for key, route in routes.read(version=version, protocol=PROTO_FELIX).items()
        }

    def _apply_routes(self, plan: Plan[RouteKey, Route]) -> Mapping[RouteKey, Exception]:
        """A route that turns out to be just as wanted, as the CNI plugin makes them, is fine."""
        errors = Routes(self._socket).apply(plan)
        return {
            key: error
            for key, error in errors.items()
            if key not in plan.create or not self._is_there(plan.create[key])
        }

    def _is_there(self, route: Route) -> bool:
        if route.net.is_host:
            return Routes(self._socket).lookup(route.net) == route
        return self._read_routes().get(route.key) == route


def _reverse_path(interface: str) -> Path:
    return ("net", "ipv4", "conf", interface, "rp_filter")


def _read_settings(paths: Iterable[Path]) -> dict[Path, str]:
    values = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # the interface has just gone
            values[path] = sysctl.read(path)
    return values


def _apply_settings(plan: Plan[Path, str]) -> dict[Path, Exception]:
    errors: dict[Path, Exception] = {}
    for path, value in (*plan.create.items(), *plan.update.items()):
        try:
            sysctl.write(path, value)
        except OSError as error:
            errors[path] = error
    return errors
