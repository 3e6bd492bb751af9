"""Names that Calico derives from other names."""

from __future__ import annotations

import hashlib

from api.net import Net, format_address


def workload_endpoint_name(node: str, orchestrator: str, pod: str, endpoint: str) -> str:
    """Name of a WorkloadEndpoint: ``node--1-k8s-web-eth0`` ('-' inside a part is doubled)."""
    return "-".join(part.replace("-", "--") for part in (node, orchestrator, pod, endpoint))


def interface_name(prefix: str, namespace: str, pod: str) -> str:
    """The host's end of a pod's veth: prefix and 11 hex digits, ``cali12d4a061371``."""
    return prefix + hashlib.sha1(f"{namespace}.{pod}".encode()).hexdigest()[:11]


def cidr_name(net: Net) -> str:
    """A CIDR as part of a resource's name: ``10-0-0-0-26``."""
    address = format_address(net.version, net.address)
    return f"{address}/{net.length}".replace(".", "-").replace(":", "-").replace("/", "-")
