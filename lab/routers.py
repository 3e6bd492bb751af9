"""What BIRD 2 and FRR are told. Pure: a fabric in, configuration files and programs out.

A router announces the subnets it is connected to, and passes on everything it learns.
Towards the nodes of its rack it is passive, as with a listen range in real racks. Where it
shares their AS number it reflects their routes (RFC 4456) and puts itself as next hop into
what came from other AS; where it does not, the sessions are eBGP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from api.bgp import DEFAULT_AS_NUMBER
from lab.fabric import Fabric, Node, Router
from lab.wiring import ports

# Seconds: shorter than the defaults, so that a lab notices a dead neighbour soon.
HOLD, KEEPALIVE = 30, 10


@dataclass(frozen=True, slots=True)
class Program:
    """A program the lab runs. ``socket``: the Unix socket it listens on once it is up."""

    name: str
    argv: tuple[str, ...]
    socket: str


@dataclass(frozen=True, slots=True)
class RouterSetup:
    """``files``: absolute path inside the router → text. ``programs`` in starting order."""

    files: dict[str, str]
    programs: tuple[Program, ...]
    owner: str  # the user the programs run as, to whom their directories belong


@dataclass(frozen=True, slots=True)
class _Peer:
    name: str
    address: IPv4Address
    as_number: int
    passive: bool


def setup(fabric: Fabric, router: Router) -> RouterSetup:
    """How to run a router of the fabric."""
    if router.router == "frr":
        return _frr(fabric, router)
    return _bird(fabric, router)


def node_as_number(fabric: Fabric, node: Node) -> int:
    """The AS number a node speaks with: its own, the cluster's, or Calico's default."""
    if node.as_number is not None:
        return node.as_number
    for resource in fabric.spec.resources:
        if resource["kind"] == "BGPConfiguration" and resource["metadata"]["name"] == "default":
            number = resource.get("spec", {}).get("asNumber")
            if number is not None:
                return int(number)
    return DEFAULT_AS_NUMBER


def _peers(fabric: Fabric, router: str) -> Iterator[_Peer]:
    rack = fabric.rack_of(router)
    for node in rack.nodes if rack else ():
        yield _Peer(node.name, node.address, node_as_number(fabric, node), passive=True)
    numbers = {each.name: each.as_number for each in fabric.all_routers()}
    for other, _, theirs in fabric.links_of(router):
        yield _Peer(other, theirs.ip, numbers[other], passive=False)


def _bird(fabric: Fabric, router: Router) -> RouterSetup:
    connected = ", ".join(f'"{name}"' for name in _routed_ports(fabric, router))
    blocks = [
        "log stderr all;",
        f"router id {fabric.addresses_of(router.name)[0].ip};",
        "protocol device {\n}",
        f"protocol direct connected {{\n  ipv4;\n  interface {connected};\n}}",
        "protocol kernel {\n  merge paths on;\n  ipv4 { export where source != RTS_DEVICE; };\n}",
        *(_bird_peer(router, peer) for peer in _peers(fabric, router.name)),
    ]
    return RouterSetup(
        files={"/etc/bird/bird.conf": "\n".join(blocks) + "\n"},
        programs=(
            Program("bird", ("bird", "-f", "-c", "/etc/bird/bird.conf"), "/run/bird/bird.ctl"),
        ),
        owner="root",
    )


def _bird_peer(router: Router, peer: _Peer) -> str:
    internal = peer.as_number == router.as_number
    options = [
        f"local as {router.as_number};",
        f"neighbor {peer.address} as {peer.as_number};",
        "direct;",
        f"hold time {HOLD}; keepalive time {KEEPALIVE};",
        "connect delay time 1; connect retry time 2; error wait time 1, 5;",
    ]
    if peer.passive:
        options.append("passive;")
    if internal:
        options.append("rr client;")
    next_hop = " next hop self ebgp;" if internal else ""
    options.append(f"ipv4 {{ import all; export all;{next_hop} }};")
    return f"protocol bgp '{peer.name}' {{\n" + "".join(f"  {o}\n" for o in options) + "}"


def _routed_ports(fabric: Fabric, router: Router) -> list[str]:
    """Interfaces with an address: the rack's switch, cables, ports of hosts."""
    rack = fabric.rack_of(router.name)
    bridged = {node.name for node in rack.nodes} if rack else set()
    return [port for other, port in ports(fabric, router.name).items() if other not in bridged]


def _frr(fabric: Fabric, router: Router) -> RouterSetup:
    common = ["frr defaults datacenter", f"hostname {router.name}", "log stdout informational", "!"]
    zebra = [*common, "ip forwarding"]
    bgp = [
        *common,
        f"router bgp {router.as_number}",
        f" bgp router-id {fabric.addresses_of(router.name)[0].ip}",
        " no bgp ebgp-requires-policy",
        " bgp bestpath as-path multipath-relax",
        f" timers bgp {KEEPALIVE} {HOLD}",
    ]
    family = [" address-family ipv4 unicast", "  redistribute connected"]
    family += ["  maximum-paths 8", "  maximum-paths ibgp 8"]
    for peer in _peers(fabric, router.name):
        bgp.append(f" neighbor {peer.address} remote-as {peer.as_number}")
        bgp.append(f" neighbor {peer.address} description {peer.name}")
        bgp.append(f" neighbor {peer.address} timers connect 2")
        if peer.passive:
            bgp.append(f" neighbor {peer.address} passive")
        family.append(f"  neighbor {peer.address} activate")
        if peer.as_number == router.as_number:
            family.append(f"  neighbor {peer.address} route-reflector-client")
            family.append(f"  neighbor {peer.address} next-hop-self")
    bgp += [*family, " exit-address-family"]
    daemon = "/usr/lib/frr"
    return RouterSetup(
        files={
            "/etc/frr/zebra.conf": "\n".join(zebra) + "\n",
            "/etc/frr/bgpd.conf": "\n".join(bgp) + "\n",
            "/etc/frr/vtysh.conf": "no service integrated-vtysh-config\n",
        },
        programs=tuple(
            Program(
                name,
                (f"{daemon}/{name}", "-f", f"/etc/frr/{name}.conf", "-A", "127.0.0.1", "-P", "0"),
                ready,
            )
            for name, ready in (("zebra", "/run/frr/zserv.api"), ("bgpd", "/run/frr/bgpd.vty"))
        ),
        owner="frr",
    )
