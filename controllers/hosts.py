"""Host endpoints that are made by themselves: for every node, as KubeControllersConfiguration says.

Ours are those with the label ``projectcalico.org/created-by: calico-kube-controllers``; others are
left alone. They have the node's labels and the profile that allows all, so that nothing changes
before a policy selects them.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from api.controllers import AutoHostEndpointConfig, HostEndpointTemplate
from api.errors import InvalidObjectError
from api.net import format_address, parse_interface, parse_net
from api.node import Node
from api.profile import DEFAULT_ALLOW
from api.registry import parse_as
from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Datastore,
    Entry,
    Key,
    NotFoundError,
)
from ipam.collector import HaltedError
from policy import selector

CREATOR_LABEL, CREATOR = "projectcalico.org/created-by", "calico-kube-controllers"

_KIND = "HostEndpoint"
_SUFFIX = "auto-hep"
_LONGEST = 253  # characters of an object's name
_ALL_INTERFACES = "*"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Kept:
    """What a run did: names of host endpoints, and what is in the way of others."""

    made: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def keep_hosts(
    store: Datastore,
    wanted: AutoHostEndpointConfig,
    *,
    proceed: Callable[[], bool] = lambda: True,
) -> Kept:
    """Make, change and delete host endpoints until they are those that are wanted.

    Raises StoreError, HaltedError.
    """
    kept = Kept()
    present = {
        entry.key.name: entry for entry in store.list(_KIND).entries if _is_ours(entry.value)
    }
    desired: dict[str, JSON] = {}
    unreadable: set[str] = set()
    if wanted.auto_create == "Enabled":
        for entry in store.list("Node").entries:
            try:
                node = parse_as("Node", entry.value)
            except InvalidObjectError as error:
                # What there is of it stays: without, the node could be open.
                unreadable.add(entry.key.name)
                kept.problems.append(str(error))
                continue
            assert isinstance(node, Node)
            desired |= {each["metadata"]["name"]: each for each in host_endpoints(node, wanted)}
    for name, value in sorted(desired.items()):
        _halt_unless(proceed)
        _bring(store, present.get(name), value, kept)
    for name, entry in sorted(present.items()):
        node_name = (entry.value.get("spec") or {}).get("node")
        if name not in desired and node_name not in unreadable:
            _halt_unless(proceed)
            try:
                store.delete(entry.key, entry.revision)
            except (NotFoundError, ConflictError):
                continue  # seen again at the next run
            kept.deleted.append(name)
            _log.info("%s: deleted: no longer wanted", entry.key)
    return kept


def host_endpoints(node: Node, wanted: AutoHostEndpointConfig) -> Iterator[JSON]:
    """Those that one node should have: that of all interfaces, and those of templates."""
    if wanted.create_default_host_endpoint != "Disabled":
        yield _endpoint(node, (), _addresses(node), _ALL_INTERFACES)
    for template in wanted.templates:
        if not selector.parse(template.node_selector).matches(node.metadata.labels):
            continue
        nets = [parse_interface(cidr)[1] for cidr in template.interface_cidrs]
        within = [
            text for text in _addresses(node) if any(net.contains(parse_net(text)) for net in nets)
        ]
        name = template.generate_name or ""
        if template.interface_pattern is None:
            if within:
                yield _endpoint(node, (name,), within, None, template)
            continue
        for interface in node.spec.interfaces:
            if interface.name and re.search(template.interface_pattern, interface.name):
                own = list(dict.fromkeys((*within, *_plain(interface.addresses))))
                yield _endpoint(node, (name, interface.name), own, interface.name, template)


def _endpoint(
    node: Node,
    parts: tuple[str, ...],
    addresses: list[str],
    interface: str | None,
    template: HostEndpointTemplate | None = None,
) -> JSON:
    """``parts``: what stands in its name between the node's and the suffix."""
    metadata: dict[str, Any] = {
        "name": _name((node.name, *parts, _SUFFIX)),
        "labels": {
            **node.metadata.labels,
            **(template.labels if template else {}),
            CREATOR_LABEL: CREATOR,
        },
    }
    if template and template.annotations:
        metadata["annotations"] = dict(template.annotations)
    spec: dict[str, Any] = {"node": node.name, "profiles": [DEFAULT_ALLOW]}
    if interface is not None:
        spec["interfaceName"] = interface
    if addresses:
        spec["expectedIPs"] = addresses
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": _KIND,
        "metadata": metadata,
        "spec": spec,
    }


def _name(parts: tuple[str, ...]) -> str:
    name = "-".join(part for part in parts if part)
    if len(name) <= _LONGEST:
        return name
    return f"{hashlib.sha256(name.encode()).hexdigest()}-{_SUFFIX}"


def _addresses(node: Node) -> list[str]:
    """All addresses of a node that its Node tells."""
    spec = node.spec
    bgp, wireguard = spec.bgp, spec.wireguard
    texts = (
        bgp.ipv4_address if bgp else None,
        bgp.ipv6_address if bgp else None,
        bgp.ipv4_ipip_tunnel_addr if bgp else None,
        spec.ipv4_vxlan_tunnel_addr,
        spec.ipv6_vxlan_tunnel_addr,
        wireguard.interface_ipv4_address if wireguard else None,
        wireguard.interface_ipv6_address if wireguard else None,
        *(each.address for each in spec.addresses if each.type == "InternalIP"),
        *(text for interface in spec.interfaces for text in interface.addresses),
    )
    return list(dict.fromkeys(_plain(text for text in texts if text)))


def _plain(texts: Iterable[str]) -> Iterator[str]:
    """Addresses without the lengths of their networks; some fields take any text."""
    for text in texts:
        try:
            net = parse_interface(text)[0]
        except ValueError:
            continue
        yield format_address(net.version, net.address)


def _bring(store: Datastore, entry: Entry | None, value: JSON, kept: Kept) -> None:
    key = Key(_KIND, value["metadata"]["name"])
    try:
        if entry is None:
            store.create(key, value)
            kept.made.append(key.name)
            _log.info("%s: made for node %s", key, value["spec"]["node"])
        elif _differs(entry.value, value):
            metadata = {**entry.value["metadata"], **value["metadata"]}
            if "annotations" not in value["metadata"]:
                metadata.pop("annotations", None)
            store.update(key, {**entry.value, **value, "metadata": metadata}, entry.revision)
            kept.changed.append(key.name)
    except AlreadyExistsError:
        kept.problems.append(f"{key}: is somebody else's: rename it, or label it {CREATOR_LABEL}")
    except (NotFoundError, ConflictError):
        pass  # seen again at the next run


def _differs(present: JSON, wanted: JSON) -> bool:
    def shown(value: JSON) -> tuple[Any, ...]:
        metadata = value.get("metadata") or {}
        return metadata.get("labels") or {}, metadata.get("annotations") or {}, value.get("spec")

    return shown(present) != shown(wanted)


def _is_ours(value: Mapping[str, Any]) -> bool:
    labels = (value.get("metadata") or {}).get("labels") or {}
    return isinstance(labels, Mapping) and labels.get(CREATOR_LABEL) == CREATOR


def _halt_unless(proceed: Callable[[], bool]) -> None:
    if not proceed():
        raise HaltedError
