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
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from api.bgp import BGPConfigurationSpec, ServiceBlock
from api.errors import InvalidObjectError
from api.metadata import Resource
from api.net import V4, V6, Net, host_net, parse_net
from api.registry import parse_as
from api.services import EndpointSlice, Service
from bird_glue.settings import ObjectProblem
from datastore.interface import JSON, Key

SERVICE_KINDS = ("Service", "EndpointSlice")
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

    def __bool__(self) -> bool:
        return bool(self.cluster or self.external or self.load_balancer)

    @property
    def whole(self) -> frozenset[Net]:
        """The ranges that every node announces; what is learned inside of them is not used."""
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

    def __or__(self, other: Endpoints) -> Endpoints:
        return Endpoints(self.anywhere | other.anywhere, self.here | other.here)


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


def endpoints_of(found: EndpointSlice, node: str) -> Endpoints:
    """Where the endpoints of a slice are ready; unknown counts as ready."""
    version = _VERSIONS.get(found.address_type)
    ready = [e for e in found.endpoints if e.conditions.ready is not False]
    if version is None or not ready:
        return Endpoints()
    versions = frozenset((version,))
    here = any(endpoint.node_name == node for endpoint in ready)
    return Endpoints(versions, versions if here else frozenset())


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


class Services:
    """Services and where their endpoints are, kept small: there may be many of both.

    An object that is not valid keeps its last valid version, if it had one.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._addresses: dict[ServiceKey, ServiceAddresses] = {}
        self._slices: dict[Key, tuple[ServiceKey, Endpoints]] = {}
        self._of_service: dict[ServiceKey, set[Key]] = {}
        self._endpoints: dict[ServiceKey, Endpoints] = {}
        self._problems: dict[Key, list[ObjectProblem]] = {}

    @property
    def problems(self) -> list[ObjectProblem]:
        """What is wrong with objects that are not valid."""
        return [problem for found in self._problems.values() for problem in found]

    def update(self, key: Key, value: JSON | None) -> bool:
        """Take in a Service or an EndpointSlice; returns whether it may matter."""
        known = bool(self._problems.pop(key, None))
        try:
            parsed = None if value is None else parse_as(key.kind, value)
        except InvalidObjectError as error:
            name = f"{key.namespace}/{key.name}"
            self._problems[key] = [ObjectProblem(key.kind, name, p) for p in error.problems]
            return True
        if key.kind == "Service":
            return self._set_service(key, parsed) or known
        return self._set_slice(key, parsed) or known

    def announced(self, ranges: ServiceRanges, *, excluded: bool) -> frozenset[Net]:
        """All that this node announces for services."""
        return announced_services(ranges, self._addresses, self._endpoints, excluded=excluded)

    def _set_service(self, key: Key, service: Resource | None) -> bool:
        where = (key.namespace, key.name)
        before = self._addresses.pop(where, None)
        after = service_addresses(service) if isinstance(service, Service) else None
        if after is not None:
            self._addresses[where] = after
        return before != after

    def _set_slice(self, key: Key, found: Resource | None) -> bool:
        affected: set[ServiceKey] = set()
        if key in self._slices:
            where, _ = self._slices.pop(key)
            self._of_service[where].discard(key)
            affected.add(where)
        if isinstance(found, EndpointSlice) and found.service:
            where = (key.namespace, found.service)
            self._slices[key] = (where, endpoints_of(found, self._node))
            self._of_service.setdefault(where, set()).add(key)
            affected.add(where)
        changed = {self._sum_up(where) for where in affected}
        return True in changed

    def _sum_up(self, where: ServiceKey) -> bool:
        """Whether the endpoints of a service are elsewhere now."""
        before = self._endpoints.pop(where, Endpoints())
        after = Endpoints()
        for key in self._of_service[where]:
            after |= self._slices[key][1]
        if self._of_service[where]:
            self._endpoints[where] = after
        else:
            del self._of_service[where]
        return before != after


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
