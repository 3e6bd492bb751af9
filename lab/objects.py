"""What the lab writes into the datastore: the objects an API server would hold.

Nodes of the fabric, its resources, namespaces, and for each pod a Pod as kubelet and API
server keep it.
"""

from __future__ import annotations

import uuid
from typing import Any

from api import registry
from datastore.interface import AlreadyExistsError, ConflictError, Datastore, Key, NotFoundError
from lab.fabric import Fabric, Node, Pod, Rack

JSON = dict[str, Any]

RACK_LABEL = "lab.manx.dev/rack"  # on every Node object: the name of its rack


def write_fabric(store: Datastore, fabric: Fabric) -> None:
    """The fabric's nodes, namespaces and resources. Raises StoreError."""
    for rack, node in fabric.all_nodes():
        _create(store, node_object(rack, node))
    for namespace in sorted({"default", *(pod.namespace for pod in fabric.spec.pods)}):
        ensure_namespace(store, namespace)
    for resource in fabric.spec.resources:
        _create(store, resource)


def node_object(rack: Rack, node: Node) -> JSON:
    """The Node of a node: its BGP address and AS number, its labels and the rack's."""
    bgp: JSON = {"ipv4Address": f"{node.address}/{rack.subnet.prefixlen}"}
    if node.as_number is not None:
        bgp["asNumber"] = node.as_number
    labels = {"kubernetes.io/hostname": node.name, RACK_LABEL: rack.name, **node.labels}
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": labels},
        "spec": {"bgp": bgp, "addresses": [{"address": str(node.address), "type": "InternalIP"}]},
    }


def ensure_namespace(store: Datastore, name: str) -> None:
    """The Namespace, with the label the API server gives it, unless it is there."""
    labels = {"kubernetes.io/metadata.name": name}
    value = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    _create(store, value)


def create_pod(store: Datastore, pod: Pod) -> str:
    """Write the Pod, scheduled but not running; its UID. Raises AlreadyExistsError."""
    ensure_namespace(store, pod.namespace)
    uid = str(uuid.uuid4())
    ports = [port.model_dump(mode="json") for port in pod.ports]
    value = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            "uid": uid,
            "labels": dict(pod.labels),
            "annotations": dict(pod.annotations),
        },
        "spec": {
            "nodeName": pod.node,
            "serviceAccountName": pod.service_account_name,
            "containers": [{"name": "lab", "ports": ports}],
        },
        "status": {"phase": "Pending"},
    }
    store.create(Key("Pod", pod.name, pod.namespace), value)
    return uid


def set_pod_running(store: Datastore, pod: Pod, addresses: list[str]) -> None:
    """Its addresses and phase, as kubelet reports them. Raises StoreError."""
    status: JSON = {"phase": "Running", "podIPs": [{"ip": address} for address in addresses]}
    if addresses:
        status["podIP"] = addresses[0]
    while True:
        entry = store.get(Key("Pod", pod.name, pod.namespace))
        try:
            store.update(entry.key, {**entry.value, "status": status}, entry.revision)
        except ConflictError:
            continue  # somebody else wrote in between: once more, from what is there now
        return


def delete_pod(store: Datastore, pod: Pod) -> None:
    """Remove the Pod; none is no error."""
    try:
        store.delete(Key("Pod", pod.name, pod.namespace))
    except NotFoundError:
        return


def _create(store: Datastore, value: JSON) -> None:
    """Store an object unless one of its name is there."""
    kind, namespace, name = registry.key_parts(value)
    try:
        store.create(Key(kind, name, namespace), value)
    except AlreadyExistsError:
        return
