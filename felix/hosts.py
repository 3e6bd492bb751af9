"""Host endpoints and network sets as compact values.

One that can't be read as a whole is read as far as it goes: a host without its endpoint would be
open, and a set without members could take away the ground of a denial.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from api.fields import protocol_number
from api.hostendpoint import HostEndpoint
from api.net import Net, parse_interface, parse_net
from api.networkset import GlobalNetworkSet, NetworkSet
from api.pods import namespace_profile, own_labels
from api.registry import parse_as
from datastore.interface import JSON, Key
from felix.names import is_interface
from policy import labels
from policy.model import Endpoint, EndpointId, NamedPort

ALL_INTERFACES = "*"


@dataclass(frozen=True, slots=True)
class HostPlace:
    """Where a host endpoint is: an interface of the node.

    ``interface`` is a name, ``*`` for all of them, or empty: then it is the one that has one of
    the addresses.
    """

    interface: str
    addresses: tuple[Net, ...]


@dataclass(frozen=True, slots=True)
class HostView:
    """A HostEndpoint."""

    node: str
    place: HostPlace
    labels: tuple[tuple[str, str], ...]
    profiles: tuple[str, ...]
    ports: tuple[NamedPort, ...]

    def endpoint(self, id: EndpointId, *, local: bool) -> Endpoint:
        """As the engine takes it."""
        return Endpoint(id, self.labels, self.profiles, self.place.addresses, self.ports, local)


@dataclass(frozen=True, slots=True)
class SetView:
    """A NetworkSet or GlobalNetworkSet."""

    nets: tuple[Net, ...]
    labels: tuple[tuple[str, str], ...]
    profiles: tuple[str, ...]

    def endpoint(self, id: EndpointId) -> Endpoint:
        """As the engine takes it."""
        return Endpoint(id, self.labels, self.profiles, self.nets)


def read_host(key: Key, value: JSON) -> HostView:
    """Raises InvalidObjectError."""
    host = parse_as(key.kind, value)
    assert isinstance(host, HostEndpoint)
    spec = host.spec
    return HostView(
        spec.node,
        HostPlace(spec.interface_name or "", tuple(map(parse_net, spec.expected_ips))),
        tuple(sorted(host.metadata.labels.items())),
        tuple(spec.profiles),
        tuple(NamedPort(p.name, protocol_number(p.protocol), p.port) for p in spec.ports),
    )


def host_as_far_as_readable(key: Key, value: object) -> HostView | None:
    """What can be read of a host endpoint; None when not even its node can. Never raises."""
    spec = _part(value, "spec")
    node, interface = spec.get("node"), spec.get("interfaceName")
    if not isinstance(node, str):
        return None
    place = HostPlace(
        interface if isinstance(interface, str) else ALL_INTERFACES,
        tuple(net for net in _nets(spec.get("expectedIPs")) if net.is_host),
    )
    # Without profiles what no policy allows is dropped, failsafe ports apart.
    return HostView(node, place, _labels(value), (), ())


def read_set(key: Key, value: JSON) -> SetView:
    """Raises InvalidObjectError."""
    found = parse_as(key.kind, value)
    assert isinstance(found, NetworkSet | GlobalNetworkSet)
    nets = (parse_interface(text)[1] for text in found.spec.nets)
    return _set(key, nets, tuple(found.metadata.labels.items()))


def set_as_far_as_readable(key: Key, value: object) -> SetView:
    """What can be read of a network set. Never raises."""
    return _set(key, _nets(_part(value, "spec").get("nets")), _labels(value))


def resolve(
    hosts: Mapping[EndpointId, HostPlace],
    addresses: Mapping[str, Collection[Net]],
    is_workload: Callable[[str], bool],
) -> dict[str, EndpointId]:
    """Which endpoint each interface has, of those that claim it the first by name.

    ``addresses`` are those of the node's interfaces. The endpoint of all other interfaces is
    that of ``ALL_INTERFACES``. An interface of a workload has none.
    """
    found: dict[str, EndpointId] = {}
    for id, place in sorted(hosts.items(), reverse=True):
        if place.interface:
            claimed = [place.interface]
        else:
            expected = set(place.addresses)
            claimed = [name for name, own in addresses.items() if not expected.isdisjoint(own)]
        found.update(
            (name, id)
            for name in claimed
            if name == ALL_INTERFACES or (is_interface(name) and not is_workload(name))
        )
    return found


def _set(key: Key, nets: Iterable[Net], own: tuple[tuple[str, str], ...]) -> SetView:
    # Where a set comes from is not for it to choose.
    named = {name: value for name, value in own if name != labels.NAMESPACE}
    profiles: tuple[str, ...] = ()
    if key.namespace:
        named = own_labels(named)
        named[labels.NAMESPACE] = key.namespace
        profiles = (namespace_profile(key.namespace),)
    return SetView(tuple(dict.fromkeys(nets)), tuple(sorted(named.items())), profiles)


def _part(value: object, name: str) -> Mapping[str, object]:
    part = value.get(name) if isinstance(value, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _labels(value: object) -> tuple[tuple[str, str], ...]:
    found = _part(_part(value, "metadata"), "labels")
    return tuple(
        sorted(
            (name, text)
            for name, text in found.items()
            if isinstance(name, str) and isinstance(text, str)
        )
    )


def _nets(texts: object) -> tuple[Net, ...]:
    found = []
    for text in texts if isinstance(texts, list) else ():
        # What is no address has been told of, as the object's problem.
        with contextlib.suppress(ValueError):
            if isinstance(text, str):
                found.append(parse_interface(text)[1])
    return tuple(found)
