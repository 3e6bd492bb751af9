"""The report that ``manxctl ipam check`` writes and ``manxctl ipam release`` reads: JSON.

It names each leaked address together with its block's sequence number at its allocation, so that
a release can tell whether it is the same allocation still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from api.net import parse_net
from datastore.interface import Datastore, Key, NotFoundError
from ipam.audit import Finding
from ipam.inventory import Allocation, Inventory

KIND = "manx-ipam-report"
VERSION = 1

Leak = list[Allocation]  # all that one handle holds


class ReportError(ValueError):
    """A file that is no report, or that is another cluster's."""


@dataclass(frozen=True, slots=True)
class Report:
    """``cluster``: its GUID, empty if it has none."""

    made: datetime
    cluster: str
    leaks: Sequence[Leak]


def cluster_of(store: Datastore) -> str:
    """The GUID of the cluster; empty if it has none."""
    try:
        spec = store.get(Key("ClusterInformation", "default")).value.get("spec") or {}
    except NotFoundError:
        return ""
    return str(spec.get("clusterGUID") or "")


def write(
    path: Path,
    cluster: str,
    inventory: Inventory,
    findings: Sequence[Finding],
    leaks: Sequence[Leak],
) -> None:
    """Write a report. Raises OSError."""
    value = {
        "kind": KIND,
        "version": VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "clusterGUID": cluster,
        "findings": [
            {
                "fault": finding.fault.value,
                "subject": finding.subject,
                "message": finding.message,
                "problem": finding.problem,
            }
            for finding in findings
        ],
        "leaks": [
            {
                "handle": leak[0].handle,
                "addresses": [
                    {
                        "address": str(each.address),
                        "block": str(each.block),
                        "blockRevision": inventory.blocks[each.block].entry.revision,
                        "sequence": each.sequence,
                        "attributes": dict(each.attributes),
                    }
                    for each in leak
                ],
            }
            for leak in leaks
        ],
    }
    path.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def load(path: Path) -> Report:
    """Read a report. Raises OSError, ReportError."""
    try:
        value: Any = orjson.loads(path.read_bytes())
        if value["kind"] != KIND or value["version"] != VERSION:
            raise ValueError(f"kind and version: expected {KIND}, {VERSION}")
        made = datetime.fromisoformat(value["made"])
        if made.tzinfo is None:
            raise ValueError("made: expected a time with its zone")
        leaks = [
            [_allocation(str(leak["handle"]), each) for each in leak["addresses"]]
            for leak in value["leaks"]
        ]
        return Report(made, str(value["clusterGUID"]), [leak for leak in leaks if leak])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: no report of manxctl ipam check: {error!r}") from error


def _allocation(handle: str, value: Any) -> Allocation:
    sequence = value["sequence"]
    if sequence is not None and not isinstance(sequence, int):
        raise ValueError(f"sequence: {sequence!r}: expected a number or null")
    attributes = tuple(sorted((str(k), str(v)) for k, v in value["attributes"].items()))
    address = parse_net(value["address"])
    return Allocation(address, parse_net(value["block"]), handle, sequence, attributes)
