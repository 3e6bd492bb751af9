"""The objects that stores are measured with."""

from __future__ import annotations

from datastore.interface import JSON, Key


def block(number: int) -> tuple[Key, JSON]:
    """A block as it is in use, about 2 KB."""
    key = Key("IPAMBlock", f"10-0-{number}-0-26")
    used = 12
    attributes = [
        {
            "handle_id": f"k8s-pod-network.{index:064x}",
            "secondary": {"namespace": "default", "node": "node-1", "pod": f"pod-{index}"},
        }
        for index in range(used)
    ]
    spec = {
        "cidr": f"10.0.{number}.0/26",
        "affinity": "host:node-1",
        "allocations": [*range(used), *[None] * (64 - used)],
        "unallocated": [*range(used, 64)],
        "attributes": attributes,
        "sequenceNumber": 1,
        "sequenceNumberForAllocation": {str(index): 1 for index in range(used)},
        "deleted": False,
        "strictAffinity": False,
    }
    value: JSON = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "IPAMBlock",
        "metadata": {"name": key.name},
        "spec": spec,
    }
    return key, value


def endpoint(number: int) -> tuple[Key, JSON]:
    """One of the WorkloadEndpoints to list."""
    pod, node = f"web-{number}", f"node-{number % 100}"
    dashes = [part.replace("-", "--") for part in (node, pod)]
    key = Key("WorkloadEndpoint", f"{dashes[0]}-k8s-{dashes[1]}-eth0", "shop")
    labels = {
        "app": "web",
        "pod-template-hash": "7d4b9c6f5",
        "projectcalico.org/namespace": "shop",
        "projectcalico.org/orchestrator": "k8s",
        "projectcalico.org/serviceaccount": "default",
    }
    spec = {
        "orchestrator": "k8s",
        "node": node,
        "pod": pod,
        "containerID": f"{number:064x}",
        "endpoint": "eth0",
        "serviceAccountName": "default",
        "ipNetworks": [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32"],
        "profiles": ["kns.shop", "ksa.shop.default"],
        "interfaceName": f"cali{number:011x}",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
    }
    value: JSON = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "WorkloadEndpoint",
        "metadata": {"name": key.name, "namespace": "shop", "labels": labels},
        "spec": spec,
    }
    return key, value
