"""Calico's view of Kubernetes' objects, and what writing it changes in them. Pure.

A WorkloadEndpoint is a Pod, a v3 Node a Kubernetes Node; both keep in annotations what Kubernetes
does not know of. A Profile is a Namespace (``kns.…``) or a ServiceAccount (``ksa.…``). Source:
libcalico-go/lib/backend/k8s (conversion, resources/node.go, resources/workloadendpoint.go).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from socket import AF_INET, inet_pton
from typing import Any

import orjson

from api import pods, qos
from api.kinds import CALICO
from api.names import workload_endpoint_name
from api.net import parse_as_number, parse_interface
from datastore.interface import JSON, Key

ENDPOINT = "eth0"
CONTAINER_ID = "cni.projectcalico.org/containerID"
ALLOWED_SOURCES = "cni.projectcalico.org/allowedSourcePrefixes"
FLOATING_IPS = "cni.projectcalico.org/floatingIPs"

_PREFIX = "projectcalico.org/"
_LABELS = _PREFIX + "labels"  # a v3 Node's own labels and annotations, as JSON
_ANNOTATIONS = _PREFIX + "annotations"
_ASN = _PREFIX + "ASNumber"
# annotation of a Kubernetes Node -> where in the v3 Node
_NODE_FIELDS = {
    _PREFIX + "IPv4Address": ("spec", "bgp", "ipv4Address"),
    _PREFIX + "IPv6Address": ("spec", "bgp", "ipv6Address"),
    _PREFIX + "IPv4IPIPTunnelAddr": ("spec", "bgp", "ipv4IPIPTunnelAddr"),
    _PREFIX + "RouteReflectorClusterID": ("spec", "bgp", "routeReflectorClusterID"),
    _PREFIX + "IPv4VXLANTunnelAddr": ("spec", "ipv4VXLANTunnelAddr"),
    _PREFIX + "VXLANTunnelMACAddr": ("spec", "vxlanTunnelMACAddr"),
    _PREFIX + "IPv6VXLANTunnelAddr": ("spec", "ipv6VXLANTunnelAddr"),
    _PREFIX + "VXLANTunnelMACAddrV6": ("spec", "vxlanTunnelMACAddrV6"),
    _PREFIX + "IPv4WireguardInterfaceAddr": ("spec", "wireguard", "interfaceIPv4Address"),
    _PREFIX + "IPv6WireguardInterfaceAddr": ("spec", "wireguard", "interfaceIPv6Address"),
    _PREFIX + "WireguardPublicKey": ("status", "wireguardPublicKey"),
    _PREFIX + "WireguardPublicKeyV6": ("status", "wireguardPublicKeyV6"),
}
_DIGITS = 11  # of a hash, at the end of an interface's name
_NAME_PART = re.compile(r"(?:[^-]|--)+")  # of a WorkloadEndpoint's name

_ALLOW = [{"action": "Allow"}]

_log = logging.getLogger(__name__)
# metadata that the view has in common with the object
_IDENTITY = ("uid", "creationTimestamp", "generateName")


def endpoint_of(pod: JSON) -> JSON | None:
    """The WorkloadEndpoint of a Pod; None for one on its node's network, or on no node yet."""
    metadata, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    node = spec.get("nodeName")
    if not node or spec.get("hostNetwork"):
        return None
    name, namespace = metadata["name"], metadata.get("namespace") or ""
    annotations = metadata.get("annotations") or {}
    account = spec.get("serviceAccountName") or ""
    nets = list(_pod_nets(metadata, status, annotations))
    fields = {
        "orchestrator": pods.KUBERNETES,
        "node": node,
        "pod": name,
        "containerID": annotations.get(CONTAINER_ID),
        "endpoint": ENDPOINT,
        "serviceAccountName": account,
        "ipNetworks": nets,
        "ipNATs": list(_nats(annotations, nets)),
        "profiles": list(pods.profiles(namespace, account)),
        "interfaceName": pods.interface(namespace, name, annotations),
        "ports": list(_ports(spec)),
        "allowSpoofedSourcePrefixes": _texts(annotations.get(ALLOWED_SOURCES)),
        "qosControls": qos.controls(annotations)[0],
    }
    own = pods.labels(metadata.get("labels") or {}, namespace, account)
    endpoint = workload_endpoint_name(node, pods.KUBERNETES, name, ENDPOINT)
    return _view(
        "WorkloadEndpoint",
        {"name": endpoint, "namespace": namespace, **_identity(metadata), "labels": own},
        {name: value for name, value in fields.items() if value},
    )


def pod_of(endpoint: Key) -> tuple[str, str] | None:
    """Node and pod in a WorkloadEndpoint's name; None when it is not that of a pod."""
    parts = [part.replace("--", "-") for part in _NAME_PART.findall(endpoint.name)]
    if len(parts) != 4 or parts[1] != pods.KUBERNETES or parts[3] != ENDPOINT:
        return None
    return parts[0], parts[2]


def pod_annotations(endpoint: JSON) -> dict[str, str | None]:
    """The annotations that keep what the CNI plugin knows of an endpoint, None for those to remove.

    One that says what is usual is left out.
    """
    spec = endpoint.get("spec") or {}
    nets = spec.get("ipNetworks") or []
    prefix = (spec.get("interfaceName") or "")[:-_DIGITS]
    result: dict[str, str | None] = {
        pods.POD_IP: nets[0] if nets else "",
        pods.POD_IPS: ",".join(nets),
        pods.INTERFACE_PREFIX: prefix if prefix not in ("", pods.DEFAULT_PREFIX) else None,
    }
    if spec.get("containerID"):
        result[CONTAINER_ID] = spec["containerID"]
    return result


# The container's id stays, so that a repeated DEL knows whose endpoint it was.
RELEASED = {pods.POD_IP: "", pods.POD_IPS: ""}


def namespace_profile_of(namespace: JSON) -> JSON:
    """The Profile of all pods in a Namespace: its labels, and everything is allowed."""
    metadata = namespace["metadata"]
    inherited = pods.inherited_labels(
        pods.NAMESPACE_PREFIX, metadata["name"], metadata.get("labels") or {}
    )
    return _view(
        "Profile",
        {"name": pods.namespace_profile(metadata["name"]), **_identity(metadata)},
        {"ingress": _ALLOW.copy(), "egress": _ALLOW.copy(), "labelsToApply": inherited},
    )


def account_profile_of(account: JSON) -> JSON:
    """The Profile of all pods of a ServiceAccount: its labels, and no rules."""
    metadata = account["metadata"]
    inherited = pods.inherited_labels(
        pods.SERVICE_ACCOUNT_PREFIX, metadata["name"], metadata.get("labels") or {}
    )
    name = pods.account_profile(metadata.get("namespace") or "", metadata["name"])
    return _view("Profile", {"name": name, **_identity(metadata)}, {"labelsToApply": inherited})


def node_of(kubernetes_node: JSON) -> JSON:
    """The v3 Node of a Kubernetes Node. The labels are both's; Kubernetes' win."""
    metadata = kubernetes_node["metadata"]
    annotations = metadata.get("annotations") or {}
    own_labels = _mapping(annotations.get(_LABELS)) | (metadata.get("labels") or {})
    own_annotations = _mapping(annotations.get(_ANNOTATIONS))
    names: JSON = {"name": metadata["name"], **_identity(metadata)}
    if own_labels:
        names["labels"] = own_labels
    if own_annotations:
        names["annotations"] = own_annotations
    node = _view("Node", names, {})
    for annotation, path in _NODE_FIELDS.items():
        if annotations.get(annotation):
            _set(node, path, annotations[annotation])
    if (number := _as_number(metadata["name"], annotations.get(_ASN) or "")) is not None:
        _set(node, ("spec", "bgp", "asNumber"), number)
    node["spec"]["orchRefs"] = [{"nodeName": metadata["name"], "orchestrator": pods.KUBERNETES}]
    if addresses := list(_node_addresses(node, kubernetes_node)):
        node["spec"]["addresses"] = addresses
    if cidrs := (kubernetes_node.get("spec") or {}).get("podCIDRs"):
        _set(node, ("status", "podCIDRs"), cidrs)
    return node


@lru_cache(maxsize=10_000)  # each is complained about once
def _as_number(node: str, text: str) -> int | None:
    """The number in a node's annotation; None where there is none."""
    try:
        return parse_as_number(text) if text else None
    except ValueError as error:
        _log.warning("Node(%s): metadata.annotations[%s]: ignored: %s", node, _ASN, error)
        return None


def node_annotations(node: JSON, kubernetes_node: JSON) -> dict[str, str | None]:
    """The annotations that keep a v3 Node, None for those to remove.

    Raises ValueError for a label that Kubernetes has with another value: it would win.
    """
    result: dict[str, str | None] = {
        annotation: str(value) if (value := _at(node, path)) else None
        for annotation, path in _NODE_FIELDS.items()
    }
    number = _at(node, ("spec", "bgp", "asNumber"))
    metadata = node.get("metadata") or {}
    told = (kubernetes_node["metadata"].get("annotations") or {}).get(_ASN) or ""
    if number is not None:
        result[_ASN] = str(number)
    elif _as_number(kubernetes_node["metadata"]["name"], told) is not None or not told:
        result[_ASN] = None  # one that is none is left for its author to put right
    inherited = kubernetes_node["metadata"].get("labels") or {}
    own = metadata.get("labels") or {}
    for label, value in own.items():
        if inherited.get(label, value) != value:
            raise ValueError(
                f"metadata.labels: {label}={value}: Kubernetes' Node has {inherited[label]!r},"
                f" which wins; change it there: kubectl label node {metadata.get('name')}"
            )
    own = {label: value for label, value in own.items() if label not in inherited}
    result[_LABELS] = _text(own)
    result[_ANNOTATIONS] = _text(metadata.get("annotations") or {})
    return result


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> JSON:
    """The JSON merge patch (RFC 7386) that makes ``new`` of ``old``."""
    patch: JSON = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := difference(before, value):
                patch[name] = inner
        elif name not in old or not _same(before, value):
            patch[name] = value
    return patch


def _same(one: object, other: object) -> bool:
    """Whether two values are the same JSON: for Python, 1 is also True."""
    sorted_ = orjson.OPT_SORT_KEYS
    return orjson.dumps(one, option=sorted_) == orjson.dumps(other, option=sorted_)


def _view(kind: str, metadata: JSON, spec: JSON) -> JSON:
    return {"apiVersion": CALICO, "kind": kind, "metadata": metadata, "spec": spec}


def _identity(metadata: JSON) -> JSON:
    return {name: metadata[name] for name in _IDENTITY if metadata.get(name)}


def _pod_nets(metadata: JSON, status: JSON, annotations: Mapping[str, str]) -> Iterator[str]:
    deleting = bool(metadata.get("deletionTimestamp"))
    if pods.finished(status.get("phase"), deleting, annotations):
        return
    ips = [ip["ip"] for ip in status.get("podIPs") or [] if ip.get("ip")]
    for text in pods.addresses(status.get("podIP"), ips, annotations):
        try:
            yield _host(text)
        except ValueError:
            continue  # an annotation anybody may write; the status follows


def _host(text: str) -> str:
    """An address, with or without a length, as a /32 or /128. Raises ValueError."""
    bare = text.removesuffix("/32")
    try:  # of ten thousand pods nearly all have such a one; parsing it costs ten times as much
        inet_pton(AF_INET, bare)
    except (OSError, ValueError):
        return str(parse_interface(text)[0])
    return f"{bare}/32"


def _ports(spec: JSON) -> Iterator[JSON]:
    """Ports that have a name or are mapped to the host."""
    for container in (*(spec.get("containers") or ()), *(spec.get("initContainers") or ())):
        for port in container.get("ports") or ():
            if port.get("name") or port.get("hostPort"):
                fields = {
                    "name": port.get("name"),
                    "protocol": port.get("protocol") or "TCP",
                    "port": port.get("containerPort"),
                    "hostPort": port.get("hostPort"),
                    "hostIP": port.get("hostIP"),
                }
                yield {name: value for name, value in fields.items() if value}


def _nats(annotations: Mapping[str, str], nets: list[str]) -> Iterator[JSON]:
    """Each floating address stands for the pod's first of the same IP version."""
    for external in _texts(annotations.get(FLOATING_IPS)):
        for net in nets:
            if (":" in net) == (":" in external):
                yield {"internalIP": net.rpartition("/")[0], "externalIP": external}
                break


def _node_addresses(node: JSON, kubernetes_node: JSON) -> Iterator[JSON]:
    for field in ("ipv4Address", "ipv6Address"):
        if address := _at(node, ("spec", "bgp", field)):
            yield {"address": address, "type": "CalicoNodeIP"}
    for known in (kubernetes_node.get("status") or {}).get("addresses") or ():
        # an empty one, as clouds leave it where there is none, is absent here
        if known.get("type") in ("InternalIP", "ExternalIP") and known.get("address"):
            yield {"address": known["address"], "type": known["type"]}


def _texts(annotation: str | None) -> list[str]:
    """A JSON list of texts; empty when it is none."""
    found = _json(annotation)
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _mapping(annotation: str | None) -> dict[str, str]:
    """A JSON object of texts; empty when it is none."""
    found = _json(annotation)
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _json(annotation: str | None) -> object:
    try:
        return orjson.loads(annotation) if annotation else None
    except ValueError:
        return None


def _text(mapping: Mapping[str, str]) -> str | None:
    return orjson.dumps(mapping, option=orjson.OPT_SORT_KEYS).decode() if mapping else None


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _set(value: JSON, path: tuple[str, ...], item: object) -> None:
    for name in path[:-1]:
        value = value.setdefault(name, {})
    value[path[-1]] = item
