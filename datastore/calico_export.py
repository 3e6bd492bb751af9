"""The file that ``calicoctl datastore migrate export`` writes, read as objects. Pure.

Three parts, between lines ``===``: lists of resources in YAML; ClusterInformation in JSON; IPAM's
records in JSON as etcd holds them, each with its etcd key. Endpoints and profiles are not in it.
Source: calicoctl/commands/datastore/migrate/export.go, migrateipam.go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from api.syntax import SyntaxProblemError, documents
from datastore.etcd_keys import key_of
from datastore.etcd_values import decode
from datastore.interface import JSON

SEPARATOR = b"==="
_PARTS = ("resources", "the cluster's information", "IPAM")
_RECORDS = {
    "block_affinities": "BlockAffinity",
    "blocks": "IPAMBlock",
    "handles": "IPAMHandle",
    "config": "IPAMConfiguration",
}


class CalicoExportError(ValueError):
    """The text is not a whole export of calicoctl; says which part, and why."""


def objects(lines: list[bytes]) -> list[JSON]:
    """All objects in the file's lines. Raises CalicoExportError."""
    parts: list[list[bytes]] = [[]]
    for line in lines:
        if line.rstrip() == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(line)
    if len(parts) != len(_PARTS):
        raise CalicoExportError(
            f"{len(parts)} parts, expected {len(_PARTS)} between lines {SEPARATOR.decode()!r}:"
            f" {', '.join(_PARTS)}; export again"
        )
    resources, information, ipam = (b"".join(part) for part in parts)
    return [*_resources(resources), _information(information), *_ipam(ipam)]


def _resources(data: bytes) -> Iterator[JSON]:
    try:
        for number, value in documents(data.decode()):
            yield from _items(number, value)
    except (UnicodeDecodeError, SyntaxProblemError) as error:
        raise CalicoExportError(f"{_PARTS[0]}: {error}") from error


def _items(number: int, value: Any) -> Iterator[JSON]:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise CalicoExportError(f"{_PARTS[0]}: document {number}: expected an object with a kind")
    if "items" not in value:
        yield _tidy(value)
        return
    names = {"apiVersion": value.get("apiVersion"), "kind": kind.removesuffix("List")}
    for item in value["items"] or []:  # an empty list of Go's is null
        if not isinstance(item, dict):
            raise CalicoExportError(f"{_PARTS[0]}: document {number}: items: expected objects")
        yield _tidy(names | item)


def _tidy(value: JSON) -> JSON:
    """Without the nulls that Go writes into metadata."""
    metadata = value.get("metadata")
    if not isinstance(metadata, dict):
        return value
    return value | {"metadata": {name: item for name, item in metadata.items() if item is not None}}


def _information(data: bytes) -> JSON:
    found = _json(data, _PARTS[1])
    names = {"apiVersion": "projectcalico.org/v3", "kind": "ClusterInformation"}
    return _tidy(names | {name: part for name, part in found.items() if part})


def _ipam(data: bytes) -> Iterator[JSON]:
    found = _json(data, _PARTS[2])
    unknown = found.keys() - _RECORDS.keys()
    if unknown:
        raise CalicoExportError(f"{_PARTS[2]}: {', '.join(sorted(unknown))}: not known")
    for name, kind in _RECORDS.items():
        records = found.get(name) or []
        for record in records if isinstance(records, list) else [records]:
            yield _record(name, kind, record)


def _record(name: str, kind: str, record: Any) -> JSON:
    path = record.get("Key") if isinstance(record, dict) else None
    value = record.get("Value") if isinstance(record, dict) else None
    key = key_of(kind, path) if isinstance(path, str) else None
    if key is None or not isinstance(value, dict) or not isinstance(path, str):
        raise CalicoExportError(f"{_PARTS[2]}: {name}: {path!r}: expected Key (a path) and Value")
    if kind == "IPAMBlock":
        value = {"cidr": path.rpartition("/")[2].replace("-", "/")} | value
    return decode(key, path, orjson.dumps(value))


def _json(data: bytes, part: str) -> JSON:
    try:
        found = orjson.loads(data)
    except ValueError as error:
        raise CalicoExportError(f"{part}: {error}") from error
    if not isinstance(found, dict):
        raise CalicoExportError(f"{part}: expected a JSON object")
    return found
