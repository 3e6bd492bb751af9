"""The wire between a container and its node: a veth pair, addresses, routes, neighbours.

What is made, for a pod 10.65.0.5 whose end is called eth0 (``ip`` says it in words):

    node      link add cali… up address ee:ee:ee:ee:ee:ee type veth peer eth0 netns POD
              sysctl net.ipv4.conf.cali….{rp_filter,forwarding,proxy_arp}=1
              route add 10.65.0.5 dev cali… scope link proto 80
              neighbour replace 10.65.0.5 lladdr MAC dev cali… nud permanent
    pod       link set eth0 up; address add 10.65.0.5/32 dev eth0
              route add 169.254.1.1 dev eth0 scope link; route add default via 169.254.1.1
              neighbour replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent

With neighbours known at both ends the first packet waits for no ARP; proxy_arp answers a pod
that flushed its own. rp_filter drops what a pod sends with another's address.

A link that we made bears the attachment's alias. Until its endpoint is in the datastore it is
in device group ``UNFINISHED``: a daemon that starts finds there what its predecessor left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from api.net import V4, V6, Net, parse_net
from cni.attachment import from_alias
from kernel import sysctl
from kernel.addresses import Address, Addresses, AddressKey, address_add
from kernel.links import (
    Ends,
    Link,
    Links,
    is_running,
    link_get,
    link_set,
    parse_ends,
    set_group,
    veth,
)
from kernel.neighbours import Neighbour, Neighbours, neighbour_replace
from kernel.netlink import Failure, Message, NetlinkSocket
from kernel.netns import inside, own_namespace
from kernel.routes import PROTO_FELIX, SCOPE_LINK, Hop, Route, Routes, route_add, route_replace

HOST_MAC = "ee:ee:ee:ee:ee:ee"
# What a container sends to: nobody has these addresses, the node's MAC address stands for them.
GATEWAYS = {V4: parse_net("169.254.1.1"), V6: parse_net("fe80::ecee:eeff:feee:eeee")}
DEFAULT_NETS = {V4: parse_net("0.0.0.0/0"), V6: parse_net("::/0")}

UNFINISHED = 0x6D616E01  # device groups; "man" and a number
DELETING = 0x6D616E02

DEFAULT_MTU = 1500
_READY_SECONDS = 5
_PROTO_BOOT = 3  # as `ip route` writes it: nobody's in particular
_FORWARDING = {
    V4: ("net", "ipv4", "ip_forward"),
    V6: ("net", "ipv6", "conf", "all", "forwarding"),
}
_HOST_CONF = {"rp_filter": 1, "forwarding": 1, "proxy_arp": 1}
# Nobody has these addresses, or a route of its own to them: RFC 7600, IPv4 dummy address; RFC 6666,
# discard-only prefix. The options are IP_MTU in linux/in.h and IPV6_MTU in linux/in6.h.
_PROBES = (
    (socket.AF_INET, "192.0.0.8", socket.IPPROTO_IP, 14),
    (socket.AF_INET6, "100::1", socket.IPPROTO_IPV6, 24),
)
_LARGEST_MTU = 65535  # of a veth; loopback has one byte more

_HERE = contextlib.nullcontext()

Step = tuple[object, Message]  # what a message is about, for the error


@dataclass(frozen=True, slots=True)
class Wire:
    """A wire as it ought to be. ``addresses``: host Nets. ``mtu`` in bytes, 0: any.

    ``routes``: where the container's traffic may go; none of a family: everywhere.
    ``forwarding``: the container may forward what it receives. ``exclusive``: IPAM gave the
    addresses, so no other attachment may have them.
    """

    host_interface: str
    interface: str
    mac: str
    alias: str
    addresses: tuple[Net, ...]
    mtu: int
    routes: tuple[Net, ...] = ()
    forwarding: bool = False
    exclusive: bool = False

    @property
    def versions(self) -> list[int]:
        """The IP versions of its addresses."""
        return sorted({net.version for net in self.addresses})

    def destinations(self, version: int) -> tuple[Net, ...]:
        """Where the container's traffic of a family goes through the gateway."""
        return tuple(net for net in self.routes if net.version == version) or (
            DEFAULT_NETS[version],
        )


Pair = tuple[int, Wire, Ends]  # one that was made: with the netns_fd of its container


class HostInterfaceExistsError(Exception):
    """An interface of that name is on the node already: a leftover.

    ``link``: None if it has gone meanwhile, which it does by itself where its container's
    network namespace has ended (namespaces(7)).
    """

    def __init__(self, name: str, link: Link | None) -> None:
        super().__init__(f"interface {name} exists on the node")
        self.link = link


class ContainerInterfaceExistsError(Exception):
    """The container has an interface of that name which is not ours."""


class Sockets:
    """Netlink sockets to the node's own namespace, kept open and lent to one thread each.

    ``home``: that namespace.
    """

    def __init__(self) -> None:
        self.home = own_namespace()
        self._idle: list[NetlinkSocket] = []

    @contextlib.contextmanager
    def borrow(self) -> Iterator[NetlinkSocket]:
        """A socket for the block. One whose conversation broke is not lent again."""
        try:
            socket = self._idle.pop()
        except IndexError:
            socket = NetlinkSocket()
        try:
            yield socket
        except BaseException:
            socket.close()
            raise
        self._idle.append(socket)

    def close(self) -> None:
        """Close those that nobody has borrowed. Nothing may be asked of it any more."""
        while self._idle:
            self._idle.pop().close()
        if self.home >= 0:
            os.close(self.home)
            self.home = -1


def create_all(
    host: NetlinkSocket,
    pairs: Sequence[tuple[int, Wire]],
    aside: contextlib.AbstractContextManager[None] = _HERE,
) -> list[Ends | Exception]:
    """Make pairs, in group ``UNFINISHED``, or say what hindered each; ``pairs``: with the netns_fd.

    ``aside``: where the kernel is waited for. An OSError, HostInterfaceExistsError or
    ContainerInterfaceExistsError. Raises OSError when the conversation itself breaks.
    """
    messages = [
        veth(
            wire.host_interface,
            wire.interface,
            peer_netns_fd=netns_fd,
            mtu=wire.mtu,
            mac=HOST_MAC,
            peer_mac=wire.mac,
            group=UNFINISHED,
        )
        for netns_fd, wire in pairs
    ]
    with aside:
        failures, replies = host.transact(messages)
    outcomes: dict[int, Ends | Exception] = {
        reply.index: parse_ends(reply.body) for reply in replies
    }
    for failure in failures:
        outcomes[failure.index] = _not_created(host, *pairs[failure.index], failure)
    no_answer = OSError(errno.EPROTO, "veth: no answer")
    return [outcomes.get(index, no_answer) for index in range(len(pairs))]


def _not_created(host: NetlinkSocket, netns_fd: int, wire: Wire, failure: Failure) -> Exception:
    if failure.errno != errno.EEXIST:
        return failure.error(f"veth {wire.host_interface}")
    try:
        leftover = find(host, wire.host_interface)
        if leftover is None:
            with NetlinkSocket(netns_fd=netns_fd) as container:
                if find(container, wire.interface) is not None:
                    return ContainerInterfaceExistsError(wire.interface)
    except OSError as error:
        return error
    return HostInterfaceExistsError(wire.host_interface, leftover)


def configure_all(
    host: NetlinkSocket,
    pairs: Sequence[Pair],
    aside: contextlib.AbstractContextManager[None] = _HERE,
    home: int | None = None,
) -> list[OSError | None]:
    """Everything else, at both ends of each pair; what hindered it.

    ``aside``: as for ``create_all``; ``home``: as for ``kernel.netns.inside``. Raises OSError when
    the conversation itself breaks.
    """
    problems: list[OSError | None] = [None] * len(pairs)
    steps = [(place, step) for place, (_, wire, ends) in enumerate(pairs)
             for step in _node_steps(wire, ends.index)]  # fmt: skip
    for failure in host.batch([message for _, (_, message) in steps]):
        place, (what, _) = steps[failure.index]
        problem: OSError | None = failure.error(what)
        if isinstance(what, Route) and failure.errno == errno.EEXIST:
            try:
                problem = _take_over(host, pairs[place][1], what)
            except OSError as error:
                problem = error
        problems[place] = problems[place] or problem
    for place, (netns_fd, wire, ends) in enumerate(pairs):
        if problems[place] is None:
            try:
                _configure_container(netns_fd, wire, ends, aside, home)
            except OSError as error:
                problems[place] = error
    return problems


def _take_over(host: NetlinkSocket, wire: Wire, route: Route) -> OSError | None:
    """Put our route in place of the one that is there, unless another attachment has the address.

    It may be one from BGP, or felix was quicker than we. What the datastore has forgotten, because
    an older copy of it was put back, still has its address, until felix cuts it off.
    """
    found = Routes(host).lookup(route.net)
    if wire.exclusive and found is not None and found.net == route.net and found.hops:
        with contextlib.suppress(OSError):  # it has gone meanwhile
            holder = Links(host).get(found.hops[0].ifindex)
            if holder.alias != wire.alias and from_alias(holder.alias) is not None:
                return OSError(
                    errno.EADDRINUSE,
                    f"{route.net}: {holder.name} has this address ({holder.alias}), of which the"
                    " datastore knows nothing: expected one that no container of the node has",
                )
    failures = host.batch([route_replace(route)])
    return failures[0].error(route) if failures else None


def _configure_container(
    netns_fd: int,
    wire: Wire,
    ends: Ends,
    aside: contextlib.AbstractContextManager[None],
    home: int | None,
) -> None:
    steps = _container_steps(wire, ends.peer_index)
    with NetlinkSocket(netns_fd=netns_fd, home_fd=home, brief=True) as container, aside:
        failed = container.batch([message for _, message in steps])
        if failed and (V6 not in wire.versions or failed[0].errno != errno.EACCES):
            raise failed[0].error(steps[failed[0].index][0])
        if failed:  # some runtimes make namespaces without IPv6
            _switch_ipv6_on(netns_fd, wire.interface)
            _do(container, [steps[each.index] for each in failed])


def _switch_ipv6_on(netns_fd: int, name: str) -> None:
    with inside(netns_fd):
        for interface in ("all", name):
            sysctl.write(("net", "ipv6", "conf", interface, "disable_ipv6"), "0")


def allow_forwarding(netns_fd: int, wire: Wire) -> None:
    """``sysctl net.ipv4.ip_forward=1`` in the container, and the same of IPv6. Raises OSError."""
    with inside(netns_fd):
        for version in wire.versions:
            sysctl.write(_FORWARDING[version], "1")


def finish(host: NetlinkSocket, index: int) -> None:
    """Take a wire out of group ``UNFINISHED``: its endpoint is recorded. Raises OSError."""
    _do(host, [(f"interface #{index}", set_group(index, 0))])


def finish_all(
    host: NetlinkSocket, pairs: Sequence[Pair], before_waiting: Callable[[], object]
) -> Iterator[tuple[int, OSError | None]]:
    """``finish`` for each. Tells its place when it passes packets, or what hindered it.

    Those that must be waited for come last, after a call of ``before_waiting``; they have 5 s, all
    together. Raises OSError when the conversation itself breaks.
    """
    deadline = time.monotonic() + _READY_SECONDS
    indexes = [ends.index for _, _, ends in pairs]
    messages = [message for index in indexes for message in (set_group(index, 0), link_get(index))]
    failures, replies = host.transact(messages)
    failed = {each.index // 2: each for each in failures}
    running = {each.index // 2 for each in replies if is_running(each.body)}
    for place, failure in failed.items():
        yield place, failure.error(f"interface #{indexes[place]}")
    waiting = [place for place in range(len(pairs)) if place not in failed]
    while waiting:
        late = time.monotonic() > deadline
        for place in tuple(waiting):
            problem: OSError | None = None
            try:
                missing = _missing(host, *pairs[place], running=place in running)
                if missing and late:
                    problem = OSError(errno.ETIMEDOUT, missing)
            except OSError as error:
                missing, problem = "", error
            if not missing or late:
                waiting.remove(place)
                yield place, problem
        if waiting:
            before_waiting()
            time.sleep(0.001)


def _missing(host: NetlinkSocket, netns_fd: int, wire: Wire, ends: Ends, *, running: bool) -> str:
    """Why the wire does not pass packets yet; empty when it does. Raises OSError.

    The node's end was up before the other was, so the kernel drops what it sends until a worker
    has noticed the carrier; or until somebody asks for the link's state (``ip link show``), which
    since Linux 6.9 does the worker's job. ``running``: it is known to have one. A worker also makes
    the local routes of the container's IPv6 addresses, which takes tens of milliseconds where
    others keep the processors.
    """
    if not (running or Links(host).get(ends.index).running):
        return f"interface {wire.host_interface}: no carrier"
    if V6 in wire.versions:
        with NetlinkSocket(netns_fd=netns_fd, brief=True) as container:
            routes = Routes(container)
            for net in (net for net in wire.addresses if net.version == V6):
                if not ((found := routes.lookup(net)) and found.kind == "local"):
                    return f"{net}: no local route in the container"
    return ""


def find(netlink: NetlinkSocket, name: str) -> Link | None:
    """The interface of that name, in the namespace of ``netlink``."""
    try:
        return Links(netlink).get(name)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def uplink_mtu() -> int:
    """The MTU of the way out of the node that this thread is in; 1500 when there is none.

    The smaller one where IPv4 and IPv6 have ways of their own. ``ip route get 192.0.0.8``: what
    a UDP socket that is connected, and sends nothing, is told (ip(7), IP_MTU; ipv6(7)), at most
    what an interface can have. It takes a third of asking for the route and then its interface,
    which every ADD would.
    """
    found = []
    for family, address, level, option in _PROBES:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            found.append(probe.getsockopt(level, option))
    return min(*found, _LARGEST_MTU) if found else DEFAULT_MTU


def smallest_mtu(host: NetlinkSocket, pattern: re.Pattern[str]) -> int:
    """The smallest MTU of the node's interfaces in whose names the pattern is found; 0: none is."""
    links = Links(host).read().values()
    return min((link.mtu for link in links if pattern.search(link.name)), default=0)


def faults(host: NetlinkSocket, netns_fd: int, wire: Wire) -> list[str]:
    """In which points the wire is not as it ought to be, one sentence each."""
    near = find(host, wire.host_interface)
    if near is None:
        return [f"node: interface {wire.host_interface} is missing"]
    with NetlinkSocket(netns_fd=netns_fd) as container:
        far = find(container, wire.interface)
        if far is None or far.index != near.peer_index or near.index != far.peer_index:
            return [
                f"container: interface {wire.interface} is missing or not the other end of"
                f" {wire.host_interface}"
            ]
        return [
            *_link_faults("node", near, HOST_MAC, 0),
            *_link_faults("container", far, wire.mac, wire.mtu),
            *(fault for net in wire.addresses for fault in _node_faults(host, near, net, far.mac)),
            *(fault for net in wire.addresses for fault in _address_faults(container, far, net)),
            *(
                fault
                for version in wire.versions
                for fault in _exits(container, far, wire, version)
            ),
        ]


def _node_steps(wire: Wire, index: int) -> list[Step]:
    name = wire.host_interface
    settings = link_set(index, alias=wire.alias, inet_conf=_HOST_CONF)
    steps: list[Step] = [(f"interface {name}", settings)]
    for net in wire.addresses:
        route = Route(net, (Hop(index),), protocol=PROTO_FELIX, scope=SCOPE_LINK)
        neighbour = Neighbour(index, net, wire.mac, _PROTO_BOOT)
        steps += [(route, route_add(route)), (neighbour, neighbour_replace(neighbour))]
    return steps


def _container_steps(wire: Wire, index: int) -> list[Step]:
    steps = [_up_step(index, wire.interface, wire.forwarding)]
    for net in wire.addresses:
        address = Address(index, net, net.length)
        steps.append((address, address_add(address)))
    for version in wire.versions:
        steps += _exit_steps(index, version, wire.destinations(version))
    return steps


# In its namespace nearly every container's interface has the same index, and all have the same
# way out.
@lru_cache(maxsize=64)
def _up_step(index: int, name: str, forwarding: bool) -> Step:
    # IPv4's is what the node has, IPv6's is 0 in a namespace that is new
    conf = {"forwarding": int(forwarding)}
    return f"interface {name}", link_set(index, up=True, inet_conf=conf)


@lru_cache(maxsize=64)
def _exit_steps(index: int, version: int, destinations: tuple[Net, ...]) -> tuple[Step, ...]:
    neighbour = Neighbour(index, GATEWAYS[version], HOST_MAC, _PROTO_BOOT)
    routes = _container_routes(destinations, version, index)
    return (
        *((route, route_add(route)) for route in routes),
        (neighbour, neighbour_replace(neighbour)),
    )


def _container_routes(destinations: Sequence[Net], version: int, index: int) -> list[Route]:
    gateway = GATEWAYS[version]
    through = (Hop(index, gateway.address),)
    return [
        Route(gateway, (Hop(index),), protocol=_PROTO_BOOT),
        *(Route(net, through, protocol=_PROTO_BOOT) for net in destinations),
    ]


def _do(socket: NetlinkSocket, steps: Sequence[Step]) -> None:
    failures = socket.batch([message for _, message in steps])
    if failures:
        raise failures[0].error(steps[failures[0].index][0])


def _link_faults(where: str, link: Link, mac: str, mtu: int) -> Iterator[str]:
    if not link.up:
        yield f"{where}: interface {link.name} is down"
    if link.mac != mac:
        yield f"{where}: interface {link.name} has MAC address {link.mac}, not {mac}"
    if mtu and link.mtu != mtu:
        yield f"{where}: interface {link.name} has MTU {link.mtu}, not {mtu}"


def _node_faults(host: NetlinkSocket, link: Link, net: Net, mac: str) -> Iterator[str]:
    route = Routes(host).lookup(net)
    if route is None or route.net != net or [hop.ifindex for hop in route.hops] != [link.index]:
        yield f"node: no route to {net} through {link.name}"
    known = Neighbours(host).read(version=net.version, ifindex=link.index, protocol=None)
    if not any(entry.net == net and entry.mac == mac for entry in known.values()):
        yield f"node: no neighbour entry for {net} at {mac} on {link.name}"


def _address_faults(container: NetlinkSocket, link: Link, net: Net) -> Iterator[str]:
    found = Addresses(container).read(version=net.version, ifindex=link.index)
    if AddressKey(link.index, net, net.length) not in found:
        yield f"container: interface {link.name} does not have address {net}"


def _exits(container: NetlinkSocket, link: Link, wire: Wire, version: int) -> Iterator[str]:
    """The way out: a chained plugin may have added routes, so only ours are looked for."""
    found = Routes(container).read(version=version)
    for wanted in _container_routes(wire.destinations(version), version, link.index):
        route = found.get(wanted.key)
        if route is None or route.hops != wanted.hops:
            yield f"container: no route {wanted.net} on {link.name}"
