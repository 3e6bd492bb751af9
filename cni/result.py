"""The result of an ADD, in the words of each version of the spec (section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.errors import Problem
from api.net import Net, format_address, parse_net
from cni.call import Call
from cni.config import Result
from cni.errors import invalid_configuration
from cni.wiring import GATEWAYS, HOST_MAC, Wire
from kernel.routes import SCOPE_LINK

# Up to 0.4.0 an address says which IP version it is of; 1.1.0 brought MTU and scope.
WITH_IP_VERSION = ("0.3.0", "0.3.1", "0.4.0")
_WITH_MTU_AND_SCOPE = ("1.1.0",)
_BY_FAMILY = ("0.1.0", "0.2.0")


def result(call: Call, wire: Wire, dns: Mapping[str, Any]) -> dict[str, Any]:
    """What was made. A plugin that ran before us comes first, as it said it (prevResult).

    ``dns``: settings for where neither it nor the configuration has any.
    """
    version = call.configuration.cni_version
    previous = call.previous.model_dump(exclude_unset=True) if call.previous else {}
    interfaces = previous.get("interfaces") or []
    own = call.dns.model_dump(exclude_none=True)
    node_end: dict[str, Any] = {"name": wire.host_interface, "mac": HOST_MAC}
    container_end: dict[str, Any] = {"name": wire.interface, "mac": wire.mac}
    if version in _WITH_MTU_AND_SCOPE:
        node_end["mtu"] = container_end["mtu"] = wire.mtu
    container_end["sandbox"] = call.netns
    document = {
        "cniVersion": version,
        "interfaces": [*interfaces, node_end, container_end],
        "ips": [*(previous.get("ips") or []), *_addresses(wire, version, len(interfaces) + 1)],
        "routes": [*(previous.get("routes") or []), *_routes(wire, version)],
        "dns": previous.get("dns") or own or dict(dns),
    }
    return as_of(version, document)


def as_of(version: str, document: dict[str, Any]) -> dict[str, Any]:
    """A result in the words of ``version``: up to 0.2.0 there is one address of each family, which
    has routes of its own, and no interfaces.
    """
    if version not in _BY_FAMILY:
        return document
    old = {"cniVersion": version, "dns": document["dns"]}
    for entry in document["ips"]:
        family = 6 if ":" in entry["address"] else 4
        routes = [each for each in document["routes"] if (":" in each["dst"]) == (family == 6)]
        told = {"ip": entry["address"], "gateway": entry.get("gateway"), "routes": routes}
        old.setdefault(f"ip{family}", {k: value for k, value in told.items() if value})
    return old


def of_families(document: object) -> object:
    """A result of before 0.3.0 in later words; any other as it is."""
    if not isinstance(document, dict) or not document.keys() & {"ip4", "ip6"}:
        return document
    families = [each for each in (document.get("ip4"), document.get("ip6")) if each]
    if not all(isinstance(each, dict) for each in families):
        return document
    return {
        "ips": [{"address": each.get("ip")} for each in families],
        "routes": [route for each in families for route in each.get("routes") or []],
        "dns": document.get("dns"),
    }


def previous_routes(previous: Result) -> tuple[Net, ...]:
    """Where a ``prevResult`` says that a container's traffic goes through our gateway.

    Raises CniError.
    """
    gateways = [format_address(net.version, net.address) for net in GATEWAYS.values()]
    nets = []
    for index, route in enumerate(previous.routes or []):
        if route.get("gw") in gateways:
            try:
                nets.append(parse_net(str(route.get("dst"))))
            except ValueError as error:
                path = f"prevResult.routes[{index}].dst"
                raise invalid_configuration([Problem(path, route.get("dst"), str(error))]) from None
    return tuple(nets)


def _addresses(wire: Wire, version: str, interface: int) -> list[dict[str, Any]]:
    addresses = []
    for net in wire.addresses:
        gateway = GATEWAYS[net.version]
        entry: dict[str, Any] = {
            "interface": interface,
            "address": str(net),
            "gateway": format_address(gateway.version, gateway.address),
        }
        if version in WITH_IP_VERSION:
            entry["version"] = str(net.version)
        addresses.append(entry)
    return addresses


def _routes(wire: Wire, version: str) -> list[dict[str, Any]]:
    routes: list[dict[str, Any]] = []
    for family in wire.versions:
        gateway = GATEWAYS[family]
        link: dict[str, Any] = {"dst": str(gateway)}
        if version in _WITH_MTU_AND_SCOPE:
            link["scope"] = SCOPE_LINK
        address = format_address(gateway.version, gateway.address)
        routes.append(link)
        routes += [{"dst": str(net), "gw": address} for net in wire.destinations(family)]
    return routes
