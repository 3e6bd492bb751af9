"""A cluster as IPAM sees it: nodes, pods that come and go as the CNI plugin makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from api.net import Net
from cni.attachment import DEFAULT_IFNAME, DEFAULT_NETWORK, Attachment
from datastore.interface import JSON, AlreadyExistsError, Datastore, Key, NotFoundError
from ipam.allocator import Allocator

CALICO = "projectcalico.org/v3"


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def put(store: Datastore, kind: str, name: str, spec: JSON, **metadata: str) -> None:
    """Create an object, whatever it is worth."""
    version = "v1" if kind in ("Pod", "KubernetesNode") else CALICO
    value = {
        "apiVersion": version,
        "kind": kind.removeprefix("Kubernetes"),
        "metadata": {"name": name, **metadata},
        "spec": spec,
    }
    store.create(Key(kind, name, metadata.get("namespace", "")), value)


def remove(store: Datastore, kind: str, name: str, namespace: str = "") -> None:
    store.delete(Key(kind, name, namespace))


def add_nodes(store: Datastore, *names: str) -> None:
    for name in names:
        put(store, "Node", name, {})


def attachment(pod: str, container: str) -> Attachment:
    return Attachment(DEFAULT_NETWORK, container, DEFAULT_IFNAME, "shop", pod)


def assign(
    store: Datastore, node: str, pod: str, container: str, versions: Sequence[int] = (4,)
) -> list[Net]:
    """The first half of an ADD: addresses for a container."""
    made = attachment(pod, container)
    attributes = made.attributes(node, "2030-01-31 12:00:00 +0000 UTC")
    allocator = Allocator(store, node)
    return [
        allocator.assign(made.handle, attributes, version=version).address for version in versions
    ]


def endpoint(node: str, pod: str, container: str, addresses: Sequence[Net]) -> JSON:
    """The WorkloadEndpoint of a container."""
    key = attachment(pod, container).endpoint_key(node)
    return {
        "apiVersion": CALICO,
        "kind": "WorkloadEndpoint",
        "metadata": {"name": key.name, "namespace": key.namespace},
        "spec": {
            "orchestrator": "k8s",
            "node": node,
            "pod": pod,
            "endpoint": "eth0",
            "containerID": container,
            "interfaceName": "cali0123456789a",
            "ipNetworks": [str(address) for address in addresses],
        },
    }


def record(store: Datastore, node: str, pod: str, container: str, addresses: Sequence[Net]) -> None:
    """The second half of an ADD: the endpoint, instead of one of a container before."""
    key = attachment(pod, container).endpoint_key(node)
    value = endpoint(node, pod, container, addresses)
    try:
        store.create(key, value)
    except AlreadyExistsError:
        store.update(key, value)


def plug(
    store: Datastore, node: str, pod: str, container: str, versions: Sequence[int] = (4,)
) -> list[Net]:
    """An ADD."""
    addresses = assign(store, node, pod, container, versions)
    record(store, node, pod, container, addresses)
    return addresses


def forget(store: Datastore, node: str, pod: str, container: str) -> None:
    """The first half of a DEL: the endpoint, unless it is of another container."""
    key = attachment(pod, container).endpoint_key(node)
    try:
        entry = store.get(key)
        if entry.value["spec"]["containerID"] == container:
            store.delete(key, entry.revision)
    except NotFoundError:
        pass


def release(store: Datastore, node: str, pod: str, container: str) -> None:
    """The second half of a DEL."""
    Allocator(store, node).release(attachment(pod, container).handle)


def unplug(store: Datastore, node: str, pod: str, container: str) -> None:
    """A DEL."""
    forget(store, node, pod, container)
    release(store, node, pod, container)
