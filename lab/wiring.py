"""Which interfaces, addresses, routes and settings every member of a fabric gets.

Pure: a fabric in, ``ip`` commands and sysctls out. A router that sits on top of a rack is
also the rack's switch: a bridge named after the rack, with a port for each node. Every
other cable is a veth pair whose ends are named after what is at the other side; nodes and
hosts call theirs ``eth0``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface

from lab.fabric import Fabric

_INTERFACE_LENGTH = 15  # IFNAMSIZ without the final zero byte

_FORWARDING = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
}
# What a new namespace inherits from the machine, set to what a fresh kernel has.
_FRESH = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
}
_ROUTER = _FRESH | _FORWARDING | {"net/ipv4/fib_multipath_hash_policy": "1"}  # by flow
_NODE = _FRESH | _FORWARDING  # as kubeadm wants a node to be
_HOST = _FRESH | {"net/ipv4/ip_forward": "0", "net/ipv6/conf/all/forwarding": "0"}


@dataclass(frozen=True, slots=True)
class Wiring:
    """What to do inside one member, in the order of the fields.

    ``sysctls``: path below /proc/sys → value. ``cables``: ``ip`` commands that make links,
    each in one of its two ends. ``configuration``: ``ip`` commands once all cables lie.
    """

    sysctls: dict[str, str]
    cables: tuple[str, ...]
    configuration: tuple[str, ...]


def wiring(fabric: Fabric) -> dict[str, Wiring]:
    """The wiring of each member: routers, nodes and hosts by name."""
    result = {router.name: _router(fabric, router.name) for router in fabric.all_routers()}
    for rack, node in fabric.all_nodes():
        address = IPv4Interface((int(node.address), rack.subnet.prefixlen))
        result[node.name] = _machine(_NODE, address, rack.gateway)
    for host in fabric.spec.hosts:
        result[host.name] = _machine(_HOST, host.address, host.gateway_interface.ip)
    return result


def ports(fabric: Fabric, router: str) -> dict[str, str]:
    """The interfaces of a router: what is at the other end → name of the interface."""
    rack = fabric.rack_of(router)
    others = [rack.name, *(node.name for node in rack.nodes)] if rack else []
    others += [other for other, _, _ in fabric.links_of(router)]
    others += [host.name for host in fabric.hosts_of(router)]
    taken = {name for name in others if len(name) <= _INTERFACE_LENGTH}
    names = {}
    for name in others:
        names[name] = name if name in taken else _free_name(taken)
        taken.add(names[name])
    return names


def _free_name(taken: set[str]) -> str:
    return next(name for i in range(len(taken) + 1) if (name := f"port{i}") not in taken)


def _router(fabric: Fabric, router: str) -> Wiring:
    mtu = fabric.spec.mtu
    names = ports(fabric, router)
    cables = []
    configuration = ["link set lo up"]
    rack = fabric.rack_of(router)
    if rack is not None:
        switch = names[rack.name]
        cables.append(f"link add {switch} mtu {mtu} type bridge stp_state 0 forward_delay 0")
        for node in rack.nodes:
            cables.append(_cable(names[node.name], mtu, "eth0", node.name))
            configuration.append(f"link set {names[node.name]} master {switch} up")
        gateway = IPv4Interface((int(rack.gateway), rack.subnet.prefixlen))
        configuration += _address(switch, gateway)
    for link in fabric.spec.links:
        if link.between[0] == router:
            other = link.between[1]
            cables.append(_cable(names[other], mtu, ports(fabric, other)[router], other))
    for other, own, _ in fabric.links_of(router):
        configuration += _address(names[other], own)
    for host in fabric.hosts_of(router):
        cables.append(_cable(names[host.name], mtu, "eth0", host.name))
        configuration += _address(names[host.name], host.gateway_interface)
    return Wiring(_ROUTER, tuple(cables), tuple(configuration))


def _cable(name: str, mtu: int, peer: str, member: str) -> str:
    return f"link add {name} mtu {mtu} type veth peer name {peer} mtu {mtu} netns {member}"


def _address(interface: str, address: IPv4Interface) -> Iterable[str]:
    return (f"address add {address} dev {interface}", f"link set {interface} up")


def _machine(sysctls: dict[str, str], address: IPv4Interface, gateway: IPv4Address) -> Wiring:
    return Wiring(
        sysctls,
        (),
        ("link set lo up", *_address("eth0", address), f"route add default via {gateway}"),
    )


def hosts_file(fabric: Fabric) -> str:
    """/etc/hosts of all members: everybody by name; see hosts(5)."""
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    for router in fabric.all_routers():
        for address in fabric.addresses_of(router.name)[:1]:
            lines.append(f"{address.ip} {router.name}")
    lines += [f"{node.address} {node.name}" for _, node in fabric.all_nodes()]
    lines += [f"{host.address.ip} {host.name}" for host in fabric.spec.hosts]
    return "\n".join(lines) + "\n"
