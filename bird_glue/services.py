"""Which service addresses this node announces: ranges as a whole, or single addresses.

As Calico does it, address by address:

- the ranges of BGPConfiguration are announced by every node, so that traffic for services
  with policy Cluster may come in anywhere; but not a range of a single address, and not those
  of load balancers where they are not to be aggregated;
- an address of a service with policy Local is announced by the nodes that have a ready endpoint
  of its IP version, and is more specific than the range;
- an address of a service with policy Cluster is announced by itself where no range covers it:
  a range of that address alone, or load balancers that are not aggregated.

``externalTrafficPolicy`` is meant, and for cluster addresses ``internalTrafficPolicy`` as well.
Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from api.bgp import BGPConfigurationSpec, ServiceBlock
from api.net import V4, V6, Net, host_net, parse_net
from api.services import EndpointSlice, Service

EXCLUDED = "node.kubernetes.io/exclude-from-external-load-balancers"

ServiceKey = tuple[str, str]  # namespace and name

_VERSIONS = {"IPv4": V4, "IPv6": V6}
_ANNOUNCED_TYPES = ("ClusterIP", "NodePort", "LoadBalancer")


@dataclass(frozen=True, slots=True)
class ServiceRanges:
    """Ranges of addresses that may be announced. ``aggregated``: those of load balancers too."""

    cluster: tuple[Net, ...] = ()
    external: tuple[Net, ...] = ()
    load_balancer: tuple[Net, ...] = ()
    aggregated: bool = True

    @property
    def whole(self) -> frozenset[Net]:
        """The ranges that every node announces. Nobody's routes inside of them are used."""
        found = {*self.cluster, *(net for net in self.external if not net.is_host)}
        if self.aggregated:
            found.update(net for net in self.load_balancer if not net.is_host)
        return frozenset(found)

    @property
    def reflected(self) -> tuple[Net, ...]:
        """The ranges whose routes a reflector tells on."""
        return (*self.load_balancer, *self.external)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a service has ready endpoints: IP versions, anywhere and on this node."""

    anywhere: frozenset[int] = frozenset()
    here: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ServiceAddresses:
    """What matters here of a service: its addresses by the kind of range, and its policies."""

    cluster: tuple[Net, ...]
    external: tuple[Net, ...]
    load_balancer: tuple[Net, ...]
    external_local: bool
    internal_local: bool


def service_ranges(spec: BGPConfigurationSpec) -> ServiceRanges:
    """The ranges that BGPConfiguration names."""
    return ServiceRanges(
        _nets(spec.service_cluster_ips),
        _nets(spec.service_external_ips),
        _nets(spec.service_load_balancer_ips),
        spec.service_load_balancer_aggregation == "Enabled",
    )


def service_addresses(service: Service) -> ServiceAddresses | None:
    """The addresses of a service; None if it has none to announce."""
    spec = service.spec
    cluster = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    if spec.type not in _ANNOUNCED_TYPES or not cluster or cluster[0] == "None":
        return None
    ingress = service.status.load_balancer.ingress if spec.type == "LoadBalancer" else []
    return ServiceAddresses(
        cluster=_hosts(cluster),
        external=_hosts(spec.external_ips),
        load_balancer=_hosts(entry.ip for entry in ingress if entry.ip),
        external_local=spec.external_traffic_policy == "Local",
        internal_local=spec.internal_traffic_policy == "Local",
    )


def endpoints_of(slices: Iterable[EndpointSlice], node: str) -> Endpoints:
    """Where the endpoints of these slices, of one service, are ready. None counts as ready."""
    anywhere, here = set(), set()
    for found in slices:
        version = _VERSIONS.get(found.address_type)
        for endpoint in found.endpoints if version else ():
            if endpoint.conditions.ready is not False and version:
                anywhere.add(version)
                if endpoint.node_name == node:
                    here.add(version)
    return Endpoints(frozenset(anywhere), frozenset(here))


def announced_services(
    ranges: ServiceRanges,
    services: Mapping[ServiceKey, ServiceAddresses],
    endpoints: Mapping[ServiceKey, Endpoints],
    *,
    excluded: bool = False,
) -> frozenset[Net]:
    """All that this node announces for services: nothing if it is ``excluded``."""
    if excluded:
        return frozenset()
    found = set(ranges.whole)
    for key, service in services.items():
        found.update(_announced(ranges, service, endpoints.get(key, Endpoints())))
    return frozenset(found)


def _announced(
    ranges: ServiceRanges, service: ServiceAddresses, endpoints: Endpoints
) -> Iterator[Net]:
    by_itself = set() if ranges.aggregated else endpoints.anywhere
    for address in service.cluster if ranges.cluster else ():
        local = service.external_local or service.internal_local
        if address.version in (endpoints.here if local else by_itself):
            yield address
    for addresses, allowed in (
        (service.external, ranges.external),
        (service.load_balancer, ranges.load_balancer),
    ):
        for address in addresses:
            if not any(net.contains(address) for net in allowed):
                continue
            if service.external_local:
                if address.version in endpoints.here:
                    yield address
            elif address in allowed or address.version in by_itself:
                yield address


def _nets(blocks: Iterable[ServiceBlock]) -> tuple[Net, ...]:
    return tuple(parse_net(block.cidr) for block in blocks if block.cidr)


def _hosts(texts: Iterable[str]) -> tuple[Net, ...]:
    """Addresses; what Kubernetes lets pass though it is none is left out."""
    found = []
    for text in texts:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        found.append(host_net(address.version, int(address)))
    return tuple(found)
