"""Workload endpoints as compact values.

One that can't be read as a whole is read as far as it goes. Where something is missing that counts
for itself, its interface stays closed; but others' policies know it as far as it can be known:
what denies those that it selects must not lose it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from api.endpoint import WorkloadEndpoint, WorkloadEndpointSpec
from api.fields import protocol_number
from api.net import Net, parse_net
from api.pods import namespace_profile, own_labels
from api.registry import dump, parse_as
from datastore.interface import JSON, Key
from felix.desired import UNLIMITED, Limit, Limits
from felix.names import is_interface
from policy import labels
from policy.model import NamedPort

T = TypeVar("T")

_FIELDS = {
    (field.alias or name).lower(): field.alias or name
    for name, field in WorkloadEndpointSpec.model_fields.items()
}
_NAMES = frozenset(_FIELDS.values())
_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class Workload:
    """A WorkloadEndpoint. ``nets`` are /32 and /128.

    ``sources``: what it may send with besides its own addresses, where the settings permit.
    ``nats``: addresses by which it is reached from outside, each with the one of its own.
    """

    node: str
    orchestrator: str
    pod: str
    interface: str
    container: str
    nets: tuple[Net, ...]
    sources: tuple[Net, ...]
    nats: tuple[tuple[Net, Net], ...]
    labels: tuple[tuple[str, str], ...]
    profiles: tuple[str, ...]
    ports: tuple[NamedPort, ...]
    limits: Limits = UNLIMITED


def read_workload(key: Key, value: JSON) -> Workload:
    """The hot one: thousands come at the start, so what is written plainly is read plainly.

    Raises InvalidObjectError.
    """
    try:
        return _plain_workload(key, value)
    except _UNREADABLE:
        # Invalid, or written in a way only the model understands.
        parsed = parse_as(key.kind, value)
        assert isinstance(parsed, WorkloadEndpoint)
        return _plain_workload(key, dump(parsed))


def workload_as_far_as_readable(key: Key, value: object) -> Workload:
    """What can be read of it. Never raises.

    What nobody here knows, or needs, costs it nothing; otherwise its ``interface`` is empty.
    """
    given = _part(value, "spec")
    names = ((name, _FIELDS.get(name.lower(), "")) for name in given if isinstance(name, str))
    # Of a field that is there twice, that one which is spelt right.
    spec = {known: given.get(known, given[name]) for name, known in names if known}
    metadata = _part(value, "metadata")
    for fields in (spec, spec | {"qosControls": None}):
        with contextlib.suppress(*_UNREADABLE):
            return _plain_workload(key, {"metadata": metadata, "spec": fields})
    own = dict(_each(_part(metadata, "labels").items(), _label))
    profiles = tuple(_each(_parts(spec.get("profiles")), _name))
    return Workload(
        node=_word(spec.get("node")),
        orchestrator=_word(spec.get("orchestrator")),
        pod=_word(spec.get("pod")),
        interface="",
        container="",
        nets=tuple(net for net in _each(_parts(spec.get("ipNetworks")), parse_net) if net.is_host),
        sources=(),
        nats=(),
        labels=_labels(
            key, own, _word(spec.get("orchestrator")), _word(spec.get("serviceAccountName"))
        ),
        profiles=profiles or (namespace_profile(key.namespace),),
        ports=tuple(_each(_parts(spec.get("ports")), _port)),
    )


def _plain_workload(key: Key, value: JSON) -> Workload:
    metadata, spec = value["metadata"], value["spec"]
    unknown = spec.keys() - _NAMES
    if unknown:
        raise ValueError(unknown)
    nets = tuple(parse_net(text) for text in _list(spec.get("ipNetworks")))
    interface = _text(spec["interfaceName"])
    if not all(net.is_host for net in nets) or not (interface == "*" or is_interface(interface)):
        raise ValueError(nets, interface)
    own = {_text(name): _text(label) for name, label in (metadata.get("labels") or {}).items()}
    return Workload(
        node=_text(spec.get("node")),
        orchestrator=_text(spec.get("orchestrator")),
        pod=_text(spec.get("pod")),
        interface=interface,
        container=_text(spec.get("containerID")),
        nets=nets,
        sources=tuple(parse_net(text) for text in _list(spec.get("allowSpoofedSourcePrefixes"))),
        nats=tuple(
            (parse_net(nat["externalIP"]), parse_net(nat["internalIP"]))
            for nat in _list(spec.get("ipNATs"))
        ),
        labels=_labels(
            key, own, _text(spec.get("orchestrator")), _text(spec.get("serviceAccountName"))
        ),
        profiles=tuple(_text(name) for name in _list(spec.get("profiles"))),
        ports=tuple(_port(port) for port in _list(spec.get("ports")) if port.get("name")),
        limits=_limits(spec["qosControls"]) if spec.get("qosControls") else UNLIMITED,
    )


def _limits(controls: Any) -> Limits:
    """Those of bandwidth."""
    return Limits(_limit(controls, "ingress"), _limit(controls, "egress"))


def _limit(controls: Any, direction: str) -> Limit | None:
    names = ("Bandwidth", "Burst", "Peakrate", "Minburst")
    numbers = [controls.get(direction + name) or 0 for name in names]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(numbers)
    return Limit(*numbers) if numbers[0] else None


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _labels(
    key: Key, own: dict[str, str], orchestrator: str, account: str
) -> tuple[tuple[str, str], ...]:
    # Where an endpoint comes from is not for it to choose.
    found = own_labels(own)
    found.pop(labels.SERVICE_ACCOUNT, None)
    found[labels.NAMESPACE] = key.namespace
    if orchestrator:
        found[labels.ORCHESTRATOR] = orchestrator
    if account:
        found[labels.SERVICE_ACCOUNT] = account
    return tuple(sorted(found.items()))


def _label(pair: tuple[Any, Any]) -> tuple[str, str]:
    return _text(pair[0]), _text(pair[1])


def _port(port: Any) -> NamedPort:
    protocol, number = protocol_number(port["protocol"]), int(port["port"])
    if not (0 < protocol <= 255 and 0 < number <= 65535):
        raise ValueError(protocol, number)
    return NamedPort(_name(port["name"]), protocol, number)


def _name(value: Any) -> str:
    if not value:
        raise ValueError(value)
    return _text(value)


def _word(value: object) -> str:
    return value if isinstance(value, str) else ""


def _part(value: object, name: str) -> Mapping[str, Any]:
    part = value.get(name) if isinstance(value, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _list(value: object) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise TypeError(value)
    return value or []


def _parts(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _each(parts: Iterable[Any], read: Callable[[Any], T]) -> Iterator[T]:
    """Those that can be read; what can't has been told of, as the object's problem."""
    for part in parts:
        with contextlib.suppress(*_UNREADABLE):
            yield read(part)
