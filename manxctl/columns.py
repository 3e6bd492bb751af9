"""What ``manxctl get`` shows of each kind: calicoctl's columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from api.kinds import Kind
from datastore.interface import JSON

MAX_LIST = 80  # characters of a list of networks


@dataclass(frozen=True, slots=True)
class Column:
    """A title, where the cell's text comes from, and in which tables the column stands."""

    title: str
    cell: Callable[[JSON], str]
    narrow: bool = True
    wide: bool = True


def _at(path: str, otherwise: str = "") -> Callable[[JSON], str]:
    """The text of a field by its path."""

    def cell(value: Any) -> str:
        found = _find(value, path)
        return otherwise if found is None or found == "" else text(found)

    return cell


def _find(value: Any, path: str) -> Any:
    """A field by its path, or None; stored objects may be anything, so any step may fail."""
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _list(value: Any, path: str) -> list[Any]:
    found = _find(value, path)
    return found if isinstance(found, list) else []


def _length(path: str) -> Callable[[JSON], str]:
    """How many elements a list has."""
    return lambda value: str(len(_list(value, path)))


def _short(path: str) -> Callable[[JSON], str]:
    """As ``_at``, but not wider than a list of networks may be in a table."""

    def cell(value: JSON) -> str:
        full = _at(path)(value)
        return full if len(full) <= MAX_LIST else f"{full[: MAX_LIST - 1]}…"

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
    many = [_at("ip")(item) for item in _list(value, "status.podIPs")]
    return ",".join(filter(None, many)) or _at("status.podIP")(value)


def _node_addresses(value: JSON) -> str:
    return ",".join(_at("address")(item) for item in _list(value, "status.addresses"))


def _service_ports(value: JSON) -> str:
    return ",".join(
        f"{_at('port')(item)}/{_at('protocol', 'TCP')(item)}" for item in _list(value, "spec.ports")
    )


def _service_outside(value: JSON) -> str:
    given = [
        _at("ip")(item) or _at("hostname")(item)
        for item in _list(value, "status.loadBalancer.ingress")
    ]
    return ",".join(filter(None, [*given, _at("spec.externalIPs")(value)]))


def _slice_ports(value: JSON) -> str:
    return ",".join(_at("port", "*")(item) for item in _list(value, "ports"))


def _slice_addresses(value: JSON) -> str:
    return ",".join(_at("addresses")(item) for item in _list(value, "endpoints"))


def _allocated(value: JSON) -> str:
    allocations = _list(value, "spec.allocations")
    if not allocations:
        return ""
    return f"{sum(index is not None for index in allocations)}/{len(allocations)}"


def _selected_pods(value: JSON) -> str:
    """The pod selector as kubectl describes it: ``app=web,tier in (a,b)``."""
    parts = [_at("spec.podSelector.matchLabels")(value)]
    for item in _list(value, "spec.podSelector.matchExpressions"):
        operator, values = _at("operator")(item), _at("values")(item)
        parts.append(f"{_at('key')(item)} {operator}{f' ({values})' if values else ''}")
    return ",".join(filter(None, parts)) or "<none>"


def _wide(title: str, path: str, otherwise: str = "") -> Column:
    return Column(title, _at(path, otherwise), narrow=False)


_NAMESPACE = Column("NAMESPACE", _at("metadata.namespace"))
_NAME = Column("NAME", _at("metadata.name"))
_NETS = (_NAME, Column("NETS", _short("spec.nets"), narrow=False))
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
    "IPReservation": (_NAME, Column("CIDRS", _short("spec.reservedCIDRs"), narrow=False)),
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
    "BGPFilter": (
        _NAME,
        Column("NUMEXPORTV4", _length("spec.exportV4")),
        Column("NUMIMPORTV4", _length("spec.importV4")),
        Column("NUMEXPORTV6", _length("spec.exportV6")),
        Column("NUMIMPORTV6", _length("spec.importV6")),
    ),
    "Node": (
        _NAME,
        _wide("ASN", "spec.bgp.asNumber"),
        _wide("IPV4", "spec.bgp.ipv4Address"),
        _wide("IPV6", "spec.bgp.ipv6Address"),
    ),
    "CalicoNodeStatus": (
        _NAME,
        Column("NODE", _at("spec.node")),
        _wide("CLASSES", "spec.classes"),
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
    "HostEndpoint": (
        _NAME,
        Column("NODE", _at("spec.node")),
        _wide("INTERFACE", "spec.interfaceName"),
        _wide("IPS", "spec.expectedIPs"),
        _wide("PROFILES", "spec.profiles"),
    ),
    "Profile": (_NAME, _wide("LABELS", "spec.labelsToApply")),
    "NetworkPolicy": _POLICY,
    "GlobalNetworkPolicy": _POLICY,
    "Tier": (_NAME, Column("ORDER", _at("spec.order"))),
    "StagedNetworkPolicy": _POLICY,
    "StagedGlobalNetworkPolicy": _POLICY,
    "StagedKubernetesNetworkPolicy": (
        _NAME,
        Column("PODSELECTOR", _selected_pods, narrow=False),
    ),
    "NetworkSet": _NETS,
    "GlobalNetworkSet": _NETS,
    "ClusterInformation": (
        _NAME,
        Column("CLUSTERGUID", _at("spec.clusterGUID")),
        Column("CLUSTERTYPE", _at("spec.clusterType")),
        Column("CALICOVERSION", _at("spec.calicoVersion")),
        Column("DATASTOREREADY", _at("spec.datastoreReady")),
    ),
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
    "KubernetesNode": (
        _NAME,
        Column("ADDRESSES", _node_addresses),
        _wide("LABELS", "metadata.labels"),
    ),
    "ServiceAccount": (_NAME, _wide("LABELS", "metadata.labels")),
    "Service": (
        _NAME,
        Column("TYPE", _at("spec.type", "ClusterIP")),
        Column("CLUSTER-IP", _at("spec.clusterIP")),
        Column("EXTERNAL-IP", _service_outside),
        Column("PORTS", _service_ports),
        _wide("SELECTOR", "spec.selector"),
    ),
    "ServiceCIDR": (_NAME, Column("CIDRS", lambda value: ",".join(_list(value, "spec.cidrs")))),
    "EndpointSlice": (
        _NAME,
        Column("ADDRESSTYPE", _at("addressType")),
        Column("PORTS", _slice_ports),
        Column("ENDPOINTS", _slice_addresses),
    ),
    "Lease": (_NAME, Column("HOLDER", _at("spec.holderIdentity"))),
    "KubernetesNetworkPolicy": (_NAME, Column("POD-SELECTOR", _selected_pods)),
    "ClusterNetworkPolicy": (
        _NAME,
        Column("TIER", _at("spec.tier")),
        Column("PRIORITY", _at("spec.priority")),
    ),
    "AdminNetworkPolicy": (_NAME, Column("PRIORITY", _at("spec.priority"))),
}


def all_columns(kind: Kind) -> list[Column]:
    """Every column a kind's tables may have."""
    found = list(COLUMNS.get(kind.id, (_NAME,)))
    return [_NAMESPACE, *found] if kind.namespaced else found


def columns(kind: Kind, *, wide: bool, namespace: bool) -> list[Column]:
    """The columns of a kind's table; ``namespace`` puts that first."""
    chosen = [
        column
        for column in COLUMNS.get(kind.id, (_NAME,))
        if (column.wide if wide else column.narrow)
    ]
    if namespace and kind.namespaced:
        chosen.insert(0, _NAMESPACE)
    return chosen
