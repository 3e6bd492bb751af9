"""Where etcd holds which object: Calico's key layout, from keys to paths and back. Pure.

- Resources: ``/calico/resources/v3/projectcalico.org/<plural>/[<namespace>/]<name>``.
- IPAM, named by CIDR and by the handle as it is written:
  ``/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26``,
  ``/calico/ipam/v2/host/<node>/ipv4/block/10.0.0.0-26`` (``virtual`` instead of ``host`` for
  load balancers), ``/calico/ipam/v2/handle/<id>``, ``/calico/ipam/v2/config``.
- Kubernetes' own kinds, which Calico does not keep in etcd, in a place of Manx:
  ``/calico/manx/kubernetes/<plural>/[<namespace>/]<name>``.

Source: libcalico-go/lib/backend/model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from api.kinds import CALICO, KINDS
from api.names import cidr_name
from api.net import V4, Net, parse_net
from datastore.interface import Key

RESOURCES = "/calico/resources/v3/projectcalico.org/"
KUBERNETES = "/calico/manx/kubernetes/"
BLOCKS = "/calico/ipam/v2/assignment/"
HANDLES = "/calico/ipam/v2/handle/"
CONFIGURATION = "/calico/ipam/v2/config"
CONFIGURATION_NAME = "default"

_IPAM = "/calico/ipam/v2/"
_AFFINITY_TYPES = ("host", "virtual")
_V4_NAME = re.compile(r"(\d+)-(\d+)-(\d+)-(\d+)-(\d+)")
_BLOCK_PATH = re.compile(r"/calico/ipam/v2/assignment/ipv[46]/block/([^/]+)")
_AFFINITY_PATH = re.compile(r"/calico/ipam/v2/(?:host|virtual)/([^/]+)/ipv[46]/block/([^/]+)")


@dataclass(frozen=True, slots=True)
class Range:
    """The etcd keys from ``begin`` up to, but not including, ``end``."""

    begin: bytes
    end: bytes

    @classmethod
    def below(cls, prefix: str) -> Range:
        """All keys that begin with ``prefix``."""
        data = prefix.encode()
        return cls(data, data[:-1] + bytes([data[-1] + 1]))  # UTF-8 has no byte 0xff

    @classmethod
    def only(cls, path: str) -> Range:
        """One key."""
        data = path.encode()
        return cls(data, data + b"\0")


def path_of(key: Key, value: Mapping[str, Any]) -> str:
    """Where an object belongs. Raises ValueError when its name contradicts its content."""
    spec = value.get("spec") or {}
    match key.kind:
        case "IPAMBlock":
            return _path_of_block(key.name, str(spec.get("cidr")))
        case "BlockAffinity":
            net, node = parse_net(str(spec.get("cidr"))), spec.get("node") or ""
            _agree(key, f"{node}-{cidr_name(net)}", "spec.node and spec.cidr")
            return _affinity_path(spec.get("type") or _AFFINITY_TYPES[0], node, net)
        case "IPAMHandle":
            handle = spec.get("handleID") or ""
            _agree(key, handle.lower(), "spec.handleID, in lower case")
            return HANDLES + handle
        case "IPAMConfiguration":
            _agree(key, CONFIGURATION_NAME, "the only IPAMConfiguration there is")
            return CONFIGURATION
    return _resource_path(key)


def candidates(key: Key) -> tuple[str, ...]:
    """The paths at which an object of that name can be; none when there is no such name.

    Several for affinities, whose names leave open what they are of. A handle whose id has
    capitals has a path that its name does not tell: ``EtcdDatastore`` looks for it.
    """
    match key.kind:
        case "IPAMBlock":
            net = _net_named(key.name)
            return () if net is None else (_block_path(net),)
        case "BlockAffinity":
            return tuple(
                _affinity_path(type_, node, net)
                for node, net in _affinities_named(key.name)
                for type_ in _AFFINITY_TYPES
            )
        case "IPAMHandle":
            return (HANDLES + key.name,)
        case "IPAMConfiguration":
            return (CONFIGURATION,) if key.name == CONFIGURATION_NAME else ()
    return (_resource_path(key),)


def ranges(kind: str, namespace: str | None = None, prefix: str = "") -> tuple[Range, ...]:
    """The ranges in which all objects of a kind are, perhaps with others: see ``key_of``."""
    match kind:
        case "IPAMBlock":
            return tuple(_block_ranges(prefix))
        case "BlockAffinity":
            return tuple(_affinity_ranges(prefix))
        case "IPAMHandle":
            return (Range.below(HANDLES),)
        case "IPAMConfiguration":
            return (Range.only(CONFIGURATION),)
    begin = _root(kind)
    if not KINDS[kind].namespaced:
        return (Range.below(begin + prefix),)
    if namespace is None:
        return (Range.below(begin),)
    return (Range.below(f"{begin}{namespace}/{prefix}"),)


def key_of(kind: str, path: str) -> Key | None:
    """The object of ``kind`` at ``path``; None when something else is there."""
    match kind:
        case "IPAMBlock":
            found = _BLOCK_PATH.fullmatch(path)
            net = _net_at(found[1]) if found else None
            return None if net is None else Key(kind, cidr_name(net))
        case "BlockAffinity":
            found = _AFFINITY_PATH.fullmatch(path)
            net = _net_at(found[2]) if found else None
            return None if net is None or not found else Key(kind, f"{found[1]}-{cidr_name(net)}")
        case "IPAMHandle":
            handle = path.removeprefix(HANDLES)
            return Key(kind, handle.lower()) if handle and "/" not in handle else None
        case "IPAMConfiguration":
            return Key(kind, CONFIGURATION_NAME) if path == CONFIGURATION else None
    parts = path.removeprefix(_root(kind)).split("/")
    if len(parts) != 1 + KINDS[kind].namespaced or not all(parts):
        return None
    return Key(kind, parts[-1], parts[0] if KINDS[kind].namespaced else "")


def affinity_at(path: str) -> tuple[str, str, str]:
    """Type, node and CIDR of the affinity at a path."""
    type_, node, _, _, block = path.removeprefix(_IPAM).split("/")
    return type_, node, block.replace("-", "/")


def _root(kind: str) -> str:
    place = RESOURCES if KINDS[kind].api_version == CALICO else KUBERNETES
    return f"{place}{KINDS[kind].plural}/"


def _resource_path(key: Key) -> str:
    namespace = f"{key.namespace}/" if KINDS[key.kind].namespaced else ""
    return f"{_root(key.kind)}{namespace}{key.name}"


@lru_cache(maxsize=4096)  # a few blocks are written again and again
def _path_of_block(name: str, cidr: str) -> str:
    net = parse_net(cidr)
    _agree(Key("IPAMBlock", name), cidr_name(net), "spec.cidr")
    return _block_path(net)


def _block_path(net: Net) -> str:
    return f"{BLOCKS}ipv{net.version}/block/{_segment(net)}"


def _affinity_path(type_: str, node: str, net: Net) -> str:
    return f"{_IPAM}{type_}/{node}/ipv{net.version}/block/{_segment(net)}"


def _segment(net: Net) -> str:
    return str(net).replace("/", "-")


def _net_at(segment: str) -> Net | None:
    return _net(segment.replace("-", "/"))


def _net_named(name: str) -> Net | None:
    """The network whose ``cidr_name`` this is."""
    if found := _V4_NAME.fullmatch(name):
        net = _net(".".join(found.groups()[:4]) + "/" + found[5])
    else:
        address, _, length = name.rpartition("-")
        net = _net(address.replace("-", ":") + "/" + length)
    return net if net is not None and cidr_name(net) == name else None


def _affinities_named(name: str) -> Iterator[tuple[str, Net]]:
    """Every node and network whose affinity would have that name; the longest node first."""
    parts = name.split("-")
    for length in range(len(parts) - 1, 0, -1):
        net = _net_named("-".join(parts[length:]))
        node = "-".join(parts[:length])
        if net is not None and node:
            yield node, net


def _net(text: str) -> Net | None:
    try:
        return parse_net(text) if "/" in text else None
    except ValueError:
        return None


def _agree(key: Key, expected: str, field: str) -> None:
    if key.name != expected:
        raise ValueError(f"{key}: metadata.name: {key.name!r}: expected {expected!r}, from {field}")


def _block_ranges(prefix: str) -> Iterator[Range]:
    """A prefix of names says less than one of paths, where dashes are dots or colons."""
    v4 = re.fullmatch(r"\d*(-\d*){0,4}", prefix)
    if v4:
        text = prefix.replace("-", ".", 3)
        yield Range.below(f"{BLOCKS}ipv{V4}/block/{text}")
    certain = prefix.rpartition("-")[0]  # the last dash may stand before the length
    yield Range.below(f"{BLOCKS}ipv6/block/{certain.replace('-', ':')}")


def _affinity_ranges(prefix: str) -> Iterator[Range]:
    """Nodes whose names begin with ``prefix``, and those with which ``prefix`` begins."""
    dashes = [place for place, letter in enumerate(prefix) if letter == "-" and place]
    for type_ in _AFFINITY_TYPES:
        yield Range.below(f"{_IPAM}{type_}/{prefix}")
        for place in dashes:
            yield Range.below(f"{_IPAM}{type_}/{prefix[:place]}/")
