"""What etcd holds for an object: Calico's JSON, to and from the shape of the CRDs. Pure.

Resources are kept as they are. IPAM's records have no envelope and some names of their own;
what they do not know of (metadata beyond the name, fields of newer versions) is carried along.
Source: libcalico-go/lib/backend/model (block.go, block_affinity.go, ipam_handle.go,
ipam_config.go).
"""

from __future__ import annotations

from typing import Any

import orjson

from api.kinds import KINDS
from datastore.etcd_keys import HANDLES, affinity_at
from datastore.interface import JSON, Key
from datastore.unreadable import stand_in

_CLAIMED = ("affinityClaimTime", "affinity_claim_time")  # in CRDs, in etcd
_STRICT = ("strictAffinity", "strict_affinity")
_AUTOMATIC = ("autoAllocateBlocks", "auto_allocate_blocks")
_IN_THE_PATH = frozenset(("node", "type", "cidr", "handleID"))
_EMPTY_LISTS = ("allocations", "unallocated", "attributes")
_NOT_STORED = frozenset(("name", "namespace", "resourceVersion"))


def encode(key: Key, value: JSON) -> bytes:
    """The bytes etcd holds for an object. Raises TypeError for what is no JSON."""
    match key.kind:
        case "IPAMBlock":
            record = _block_record(_spec(value))
        case "BlockAffinity" | "IPAMHandle":
            spec = _spec(value)
            record = {name: field for name, field in spec.items() if name not in _IN_THE_PATH}
        case "IPAMConfiguration":
            record = _configuration_record(_spec(value))
        case _:
            metadata = value.get("metadata")
            if isinstance(metadata, dict) and "resourceVersion" in metadata:
                metadata = {k: v for k, v in metadata.items() if k != "resourceVersion"}
                return orjson.dumps(value | {"metadata": metadata})
            return orjson.dumps(value)
    if metadata := _more_metadata(value):
        record["metadata"] = metadata
    return orjson.dumps(record)


def decode(key: Key, path: str, data: bytes) -> JSON:
    """The object in ``data``, found at ``path``.

    For what can't be read there is a stand-in that no model takes.
    """
    try:
        found = orjson.loads(data)
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object is expected, not {type(found).__name__}")
        return _decode(key, path, found)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return stand_in(key, path, error)


def _decode(key: Key, path: str, found: JSON) -> JSON:
    match key.kind:
        case "IPAMBlock":
            metadata = found.pop("metadata", None)
            spec = _block_spec(found)
        case "BlockAffinity":
            metadata = found.pop("metadata", None)
            type_, node, cidr = affinity_at(path)
            spec = {**found, "node": node, "type": type_, "cidr": cidr}
        case "IPAMHandle":
            metadata = found.pop("metadata", None)
            spec = {**found, "handleID": path.removeprefix(HANDLES)}
            spec["block"] = spec.get("block") or {}
        case "IPAMConfiguration":
            metadata = found.pop("metadata", None)
            spec = _configuration_spec(found)
        case _:
            metadata = found.get("metadata")
            if isinstance(metadata, dict):
                metadata.pop("resourceVersion", None)
            return found
    return _object(key, metadata or {}, spec)


def _object(key: Key, metadata: JSON, spec: JSON) -> JSON:
    kind = KINDS[key.kind]
    names = {"name": key.name, "namespace": key.namespace} if key.namespace else {"name": key.name}
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": names | metadata,
        "spec": spec,
    }


def _spec(value: JSON) -> JSON:
    return dict(value.get("spec") or {})


def _more_metadata(value: JSON) -> JSON:
    metadata = value.get("metadata") or {}
    return {name: field for name, field in metadata.items() if name not in _NOT_STORED}


def _block_record(spec: JSON) -> JSON:
    if not spec.get("strictAffinity"):
        spec.pop("strictAffinity", None)  # CRDs alone require it
    _rename(spec, *_CLAIMED)
    spec.setdefault("affinity", None)
    return spec


def _block_spec(record: JSON) -> JSON:
    _rename(record, *reversed(_CLAIMED))
    old = record.pop("hostAffinity", None)  # of Calico before 2.0: the node alone
    if record.get("affinity") is None:
        record.pop("affinity", None)
        if old:
            record["affinity"] = f"host:{old}"
    for name in _EMPTY_LISTS:  # an empty list of Go's is null
        if record.get(name) is None:
            record[name] = []
    if record.get("sequenceNumberForAllocation") is None:
        record["sequenceNumberForAllocation"] = {}
    record.setdefault("strictAffinity", False)
    return record


def _configuration_record(spec: JSON) -> JSON:
    spec.setdefault(_AUTOMATIC[0], True)  # the default of the CRD; absent in etcd is false
    for names in (_STRICT, _AUTOMATIC):
        _rename(spec, *names)
    return spec


def _configuration_spec(record: JSON) -> JSON:
    for in_crd, in_etcd in (_STRICT, _AUTOMATIC):
        record.setdefault(in_etcd, False)
        _rename(record, in_etcd, in_crd)
    return record


def _rename(fields: dict[str, Any], old: str, new: str) -> None:
    if old in fields:
        fields[new] = fields.pop(old)
