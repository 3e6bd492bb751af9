"""What ``manxctl get`` shows of each kind: calicoctl's columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from api.kinds import Kind
from datastore.interface import JSON


@dataclass(frozen=True, slots=True)
class Column:
    """A title, where the cell's text comes from, and in which tables the column stands."""

    title: str
    cell: Callable[[JSON], str]
    narrow: bool = True
    wide: bool = True


def _at(path: str, otherwise: str = "") -> Callable[[JSON], str]:
    """The text of a field by its path; stored objects may be anything, so any step may fail."""
    steps = path.split(".")

    def cell(value: Any) -> str:
        for step in steps:
            value = value.get(step) if isinstance(value, Mapping) else None
        return otherwise if value is None or value == "" else text(value)

    return cell


def text(value: Any) -> str:
    """A JSON value as a cell: lists with commas, mappings as k=v, numbers without a zero."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e15 else str(value)
    if isinstance(value, list):
        return ",".join(map(text, value))
    if isinstance(value, Mapping):
        return ",".join(f"{key}={text(item)}" for key, item in value.items())
    return str(value)


def _peer_nodes(value: JSON) -> str:
    return _at("spec.node")(value) or _at("spec.nodeSelector")(value) or "(global)"


def _workload(value: JSON) -> str:
    return _at("spec.workload")(value) or _at("spec.pod")(value) or _at("metadata.name")(value)


def _pod_addresses(value: JSON) -> str:
    status = value.get("status")
    ips = status.get("podIPs") if isinstance(status, Mapping) else None
    many = [_at("ip")(item) for item in ips] if isinstance(ips, list) else []
    return ",".join(filter(None, many)) or _at("status.podIP")(value)


def _allocated(value: JSON) -> str:
    spec = value.get("spec")
    allocations = spec.get("allocations") if isinstance(spec, Mapping) else None
    if not isinstance(allocations, list):
        return ""
    return f"{sum(index is not None for index in allocations)}/{len(allocations)}"


def _selected_pods(value: JSON) -> str:
    """The pod selector as kubectl describes it: ``app=web,tier in (a,b)``."""
    spec = value.get("spec")
    selector = spec.get("podSelector") if isinstance(spec, Mapping) else None
    if not isinstance(selector, Mapping):
        return "<none>"
    parts = [_at("matchLabels")(dict(selector))]
    for item in selector.get("matchExpressions") or []:
        operator, values = _at("operator")(item), _at("values")(item)
        parts.append(f"{_at('key')(item)} {operator}{f' ({values})' if values else ''}")
    return ",".join(filter(None, parts)) or "<none>"


def _wide(title: str, path: str, otherwise: str = "") -> Column:
    return Column(title, _at(path, otherwise), narrow=False)


_NAME = Column("NAME", _at("metadata.name"))
_POLICY = (
    _NAME,
    Column("TIER", _at("spec.tier", "default")),
    _wide("ORDER", "spec.order"),
    _wide("SELECTOR", "spec.selector"),
)

COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "IPPool": (
        _NAME,
        Column("CIDR", _at("spec.cidr")),
        _wide("NAT", "spec.natOutgoing", "false"),
        _wide("IPIPMODE", "spec.ipipMode", "Never"),
        _wide("VXLANMODE", "spec.vxlanMode", "Never"),
        _wide("DISABLED", "spec.disabled", "false"),
        _wide("DISABLEBGPEXPORT", "spec.disableBGPExport", "false"),
        Column("SELECTOR", _at("spec.nodeSelector", "all()")),
        _wide("ASSIGNMENTMODE", "spec.assignmentMode", "Automatic"),
    ),
    "BGPConfiguration": (
        _NAME,
        Column("LOGSEVERITY", _at("spec.logSeverityScreen", "Info")),
        Column("MESHENABLED", _at("spec.nodeToNodeMeshEnabled")),
        Column("ASNUMBER", _at("spec.asNumber")),
    ),
    "BGPPeer": (
        _NAME,
        Column("PEERIP", _at("spec.peerIP")),
        Column("NODE", _peer_nodes),
        Column("ASN", _at("spec.asNumber")),
    ),
    "Node": (
        _NAME,
        _wide("ASN", "spec.bgp.asNumber"),
        _wide("IPV4", "spec.bgp.ipv4Address"),
        _wide("IPV6", "spec.bgp.ipv6Address"),
    ),
    "WorkloadEndpoint": (
        Column("NAME", _at("metadata.name"), narrow=False),
        Column("WORKLOAD", _workload),
        Column("NODE", _at("spec.node")),
        Column("NETWORKS", _at("spec.ipNetworks")),
        Column("INTERFACE", _at("spec.interfaceName")),
        _wide("PROFILES", "spec.profiles"),
        _wide("NATS", "spec.ipNATs"),
    ),
    "NetworkPolicy": _POLICY,
    "GlobalNetworkPolicy": _POLICY,
    "Tier": (_NAME, Column("ORDER", _at("spec.order"))),
    "BlockAffinity": (
        _NAME,
        Column("CIDR", _at("spec.cidr")),
        Column("NODE", _at("spec.node")),
        Column("TYPE", _at("spec.type", "host")),
        _wide("STATE", "spec.state", "confirmed"),
    ),
    "IPAMBlock": (
        _NAME,
        Column("CIDR", _at("spec.cidr")),
        Column("AFFINITY", _at("spec.affinity")),
        Column("ALLOCATED", _allocated, narrow=False),
    ),
    "IPAMHandle": (_NAME, Column("ID", _at("spec.handleID")), _wide("BLOCKS", "spec.block")),
    "IPAMConfiguration": (
        _NAME,
        Column("STRICTAFFINITY", _at("spec.strictAffinity", "false")),
        Column("MAXBLOCKSPERHOST", _at("spec.maxBlocksPerHost")),
        Column("AUTOALLOCATEBLOCKS", _at("spec.autoAllocateBlocks", "true")),
    ),
    "Namespace": (_NAME, _wide("LABELS", "metadata.labels")),
    "Pod": (
        _NAME,
        Column("NODE", _at("spec.nodeName")),
        Column("PHASE", _at("status.phase")),
        Column("ADDRESSES", _pod_addresses),
        _wide("LABELS", "metadata.labels"),
    ),
    "KubernetesNetworkPolicy": (_NAME, Column("POD-SELECTOR", _selected_pods)),
}


def columns(kind: Kind, *, wide: bool, namespace: bool) -> list[Column]:
    """The columns of a kind's table; ``namespace`` puts that first."""
    chosen = [
        column
        for column in COLUMNS.get(kind.id, (_NAME,))
        if (column.wide if wide else column.narrow)
    ]
    if namespace and kind.namespaced:
        chosen.insert(0, Column("NAMESPACE", _at("metadata.namespace")))
    return chosen
