"""What must hold between the parts of a fabric, beyond the shape of each.

Pure: a fabric in, the list of problems out. All are found in one pass, so that an author
mends a file once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, ip_network

from api.bgp import split_peer_ip
from api.errors import Problem
from api.registry import key_parts
from lab.fabric import Fabric, Host, Rack

_NOT_FOR_FABRICS = {
    IPv4Network("0.0.0.0/8"): "this network (RFC 1122)",
    IPv4Network("127.0.0.0/8"): "loopback",
    IPv4Network("169.254.0.0/16"): "link-local; 169.254.1.1 is the gateway of every pod",
    IPv4Network("224.0.0.0/3"): "multicast or reserved",
}


def contradictions(fabric: Fabric, places: Sequence[str]) -> list[Problem]:
    """Everything in the fabric that contradicts something else in it.

    ``places``: of each of its resources, where it stands: ``spec.resources[0].file(a.yaml)[1]``.
    """
    problems = [
        *_names(fabric),
        *_racks(fabric),
        *_links(fabric),
        *_hosts(fabric),
        *_overlaps(fabric, places),
        *_pods(fabric),
        *_resources(fabric, places),
    ]
    # addresses of routers can only be worked out once subnets are large enough
    return problems or list(_peers(fabric, places))


def _names(fabric: Fabric) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for field, name in _all_names(fabric):
        if name in first:
            yield Problem(field, name, f"a name of its own: {first[name]} has this one")
        first.setdefault(name, field)


def _all_names(fabric: Fabric) -> Iterator[tuple[str, str]]:
    for r, rack in enumerate(fabric.spec.racks):
        yield f"spec.racks[{r}].name", rack.name
        yield f"spec.racks[{r}].tor.name", rack.tor.name
        for n, node in enumerate(rack.nodes):
            yield f"spec.racks[{r}].nodes[{n}].name", node.name
    for r, router in enumerate(fabric.spec.routers):
        yield f"spec.routers[{r}].name", router.name
    for h, host in enumerate(fabric.spec.hosts):
        yield f"spec.hosts[{h}].name", host.name


def _usable(address: IPv4Address, subnet: IPv4Network) -> bool:
    return address in subnet and address not in (subnet.network_address, subnet.broadcast_address)


def _range(subnet: IPv4Network) -> str:
    return f"{subnet.network_address + 1} to {subnet.broadcast_address - 1}"


def _racks(fabric: Fabric) -> Iterator[Problem]:
    for r, rack in enumerate(fabric.spec.racks):
        at = f"spec.racks[{r}]"
        if rack.subnet.prefixlen > 30:
            yield Problem(f"{at}.subnet", str(rack.subnet), "a /30 or larger, for router and nodes")
            continue
        if not _usable(rack.gateway, rack.subnet):
            yield Problem(
                f"{at}.tor.address",
                str(rack.gateway),
                f"an address of rack {rack.name}, {rack.subnet}: {_range(rack.subnet)}",
            )
        yield from _rack_nodes(at, rack)


def _rack_nodes(at: str, rack: Rack) -> Iterator[Problem]:
    owner = {rack.gateway: f"router {rack.tor.name}"}
    for n, node in enumerate(rack.nodes):
        field = f"{at}.nodes[{n}].address"
        if not _usable(node.address, rack.subnet):
            yield Problem(
                field,
                str(node.address),
                f"an address of rack {rack.name}, {rack.subnet}, for node {node.name}: "
                f"{_range(rack.subnet)}",
            )
        elif node.address in owner:
            yield Problem(
                field,
                str(node.address),
                f"an address of its own for node {node.name}: {owner[node.address]} has this one",
            )
        owner.setdefault(node.address, f"node {node.name}")


def _links(fabric: Fabric) -> Iterator[Problem]:
    routers = {router.name for router in fabric.all_routers()}
    seen: dict[frozenset[str], str] = {}
    for i, link in enumerate(fabric.spec.links):
        field = f"spec.links[{i}]"
        for end in link.between:
            if end not in routers:
                yield Problem(f"{field}.between", end, f"a router: {', '.join(sorted(routers))}")
        pair = frozenset(link.between)
        if len(pair) == 1:
            yield Problem(f"{field}.between", list(link.between), "two different routers")
        elif pair in seen:
            yield Problem(
                f"{field}.between", list(link.between), f"one link a pair: {seen[pair]} is this one"
            )
        seen.setdefault(pair, field)
        if link.subnet.prefixlen > 31:
            yield Problem(f"{field}.subnet", str(link.subnet), "a /31 or larger, for two ends")
    linked = {end for link in fabric.spec.links for end in link.between}
    for r, router in enumerate(fabric.spec.routers):
        if router.name not in linked:
            yield Problem(
                f"spec.routers[{r}].name", router.name, "a router that spec.links connects"
            )


def _hosts(fabric: Fabric) -> Iterator[Problem]:
    routers = {router.name for router in fabric.all_routers()}
    for h, host in enumerate(fabric.spec.hosts):
        field = f"spec.hosts[{h}]"
        if host.router not in routers:
            known = ", ".join(sorted(routers))
            yield Problem(f"{field}.router", host.router, f"a router: {known}")
        yield from _host_addresses(field, host)


def _host_addresses(field: str, host: Host) -> Iterator[Problem]:
    subnet = host.address.network
    if subnet.prefixlen > 30:
        yield Problem(f"{field}.address", str(host.address), "a /30 or larger, for host and router")
        return
    if not _usable(host.address.ip, subnet):
        yield Problem(
            f"{field}.address",
            str(host.address),
            f"an address of a machine in {subnet}: {_range(subnet)}",
        )
    gateway = host.gateway_interface.ip
    if not _usable(gateway, subnet) or gateway == host.address.ip:
        yield Problem(
            f"{field}.gateway",
            str(gateway),
            f"another address of {subnet} than the host's, for router {host.router}",
        )


def _subnets(fabric: Fabric) -> Iterator[tuple[str, str, str, IPv4Network]]:
    """Field, what stands there, whose it is, subnet."""
    for r, rack in enumerate(fabric.spec.racks):
        yield f"spec.racks[{r}].subnet", str(rack.subnet), f"rack {rack.name}", rack.subnet
    for i, link in enumerate(fabric.spec.links):
        owner = f"the link {' - '.join(link.between)}"
        yield f"spec.links[{i}].subnet", str(link.subnet), owner, link.subnet
    for h, host in enumerate(fabric.spec.hosts):
        owner, subnet = f"host {host.name}", host.address.network
        yield f"spec.hosts[{h}].address", str(host.address), owner, subnet


def _overlaps(fabric: Fabric, places: Sequence[str]) -> Iterator[Problem]:
    taken: list[tuple[str, IPv4Network]] = []
    for field, value, owner, subnet in _subnets(fabric):
        for reserved, why in _NOT_FOR_FABRICS.items():
            if subnet.overlaps(reserved):
                yield Problem(field, value, f"a unicast subnet: {reserved} is {why}")
        for other, theirs in taken:
            if subnet.overlaps(theirs):
                yield Problem(field, value, f"a subnet of its own: it overlaps {theirs} of {other}")
        taken.append((owner, subnet))
    for field, name, cidr in _pools(fabric, places):
        for owner, subnet in taken:
            if cidr.overlaps(subnet):
                yield Problem(
                    field,
                    str(cidr),
                    f"a range for pods alone in IPPool {name}: it overlaps {subnet} of {owner}",
                )
        taken.append((f"IPPool {name}", cidr))


def _pools(fabric: Fabric, places: Sequence[str]) -> Iterator[tuple[str, str, IPv4Network]]:
    for place, resource in zip(places, fabric.spec.resources, strict=True):
        if resource["kind"] == "IPPool":
            cidr = ip_network(resource["spec"]["cidr"])
            if isinstance(cidr, IPv4Network):
                yield f"{place}.spec.cidr", resource["metadata"]["name"], cidr


def _pods(fabric: Fabric) -> Iterator[Problem]:
    nodes = {node.name for _, node in fabric.all_nodes()}
    keys = Counter(pod.key for pod in fabric.spec.pods)
    for p, pod in enumerate(fabric.spec.pods):
        if pod.node not in nodes:
            yield Problem(
                f"spec.pods[{p}].node",
                pod.node,
                f"a node, for pod {pod.key}: {', '.join(sorted(nodes)) or 'the fabric has none'}",
            )
        if keys[pod.key] > 1:
            yield Problem(f"spec.pods[{p}].name", pod.name, f"one pod {pod.key} only")


def _resources(fabric: Fabric, places: Sequence[str]) -> Iterator[Problem]:
    seen: dict[tuple[str, str, str], str] = {}
    for field, resource in zip(places, fabric.spec.resources, strict=True):
        key = key_parts(resource)
        if key in seen:
            yield Problem(
                f"{field}.metadata.name", key[2], f"one {key[0]} of a name: {seen[key]} is this one"
            )
        seen.setdefault(key, field)
        if key[0] == "Node":
            yield Problem(
                f"{field}.kind", "Node", "no Node: the lab writes one for each node of spec.racks"
            )


def _peers(fabric: Fabric, places: Sequence[str]) -> Iterator[Problem]:
    """A peering with a router of the fabric that has another AS number would never come up."""
    routers = {
        str(interface.ip): router
        for router in fabric.all_routers()
        for interface in fabric.addresses_of(router.name)
    }
    for place, resource in zip(places, fabric.spec.resources, strict=True):
        if resource["kind"] != "BGPPeer" or not resource["spec"].get("peerIP"):
            continue
        address, _ = split_peer_ip(resource["spec"]["peerIP"])
        number = resource["spec"].get("asNumber")
        router = routers.get(address)
        if router is not None and number != router.as_number:
            yield Problem(
                f"{place}.spec.asNumber",
                number,
                f"{router.as_number}, as peerIP {address} is router {router.name} of this fabric",
            )
