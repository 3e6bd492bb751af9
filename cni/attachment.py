"""An attachment, and the names of everything that belongs to it.

One container's interface in one network: (network name, CNI_CONTAINERID, CNI_IFNAME), and
the pod it is for where Kubernetes is the caller. Each object that an ADD makes can be traced
back to its attachment: the address by its IPAM handle and attributes, the host's interface
by its alias, the WorkloadEndpoint by its containerID.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from api.names import interface_name, workload_endpoint_name
from datastore.interface import Key

ORCHESTRATOR_KUBERNETES = "k8s"
ORCHESTRATOR_CNI = "cni"
DEFAULT_NETWORK = "k8s-pod-network"
DEFAULT_IFNAME = "eth0"
DEFAULT_NAMESPACE = "default"  # of endpoints of containers that no namespace was named for

# CNI allows more in a network's name and a container ID than the names of objects may hold.
NAME_LENGTH = 64
CONTAINER_ID_LENGTH = 128
_PLAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_PLAIN_HANDLE = re.compile(rf"{_PLAIN.pattern}(\.{_PLAIN.pattern})*")

_ALIAS = "manx "


@dataclass(frozen=True, slots=True)
class Attachment:
    """``pod`` and ``namespace`` are empty for a container that is not Kubernetes'."""

    network: str
    container_id: str
    ifname: str
    namespace: str = ""
    pod: str = ""

    def __str__(self) -> str:
        name = f"{self.network}/{self.container_id[:13]}/{self.ifname}"
        return f"{name} (pod {self.namespace}/{self.pod})" if self.pod else name

    @property
    def orchestrator(self) -> str:
        """Who runs the container: part of the endpoint's name and labels."""
        return ORCHESTRATOR_KUBERNETES if self.pod else ORCHESTRATOR_CNI

    @property
    def alias(self) -> str:
        """What ``ip link`` shows at the host's interface: the whole key, at most 214 bytes."""
        return f"{_ALIAS}{self.network}/{self.container_id}/{self.ifname}"

    @property
    def handle(self) -> str:
        """The IPAM handle that owns its addresses: ``k8s-pod-network.0a1b…``, as in Calico.

        An interface other than eth0 has a handle of its own: ``k8s-pod-network.0a1b….net1``.
        """
        return _handle(self.network, self.container_id, self.ifname)

    def attributes(self, node: str, timestamp: str) -> dict[str, str]:
        """What is recorded with its addresses: as in Calico, more where that does not say all."""
        attributes = {"node": node, "timestamp": timestamp}
        if self.pod:
            attributes |= {"namespace": self.namespace, "pod": self.pod}
        if from_allocation(self.handle, attributes) != self:
            attributes["attachment"] = self.alias
        return attributes

    @property
    def endpoint(self) -> str:
        """``spec.endpoint`` of its WorkloadEndpoint: the interface's name."""
        return _plain(self.ifname)

    @property
    def endpoint_container_id(self) -> str:
        """``spec.containerID`` of its WorkloadEndpoint."""
        return _plain(self.container_id)

    def endpoint_key(self, node: str) -> Key:
        """The key of its WorkloadEndpoint."""
        return _endpoint_key(self, node)

    def host_interface(self, prefix: str) -> str:
        """The name of the host's end; that of a pod's eth0 is as in Calico."""
        if not self.pod:
            return interface_name(prefix, self.container_id, self.ifname)
        if self.ifname == DEFAULT_IFNAME:
            return interface_name(prefix, self.namespace, self.pod)
        return interface_name(prefix, self.namespace, f"{self.pod}/{self.ifname}")

    @property
    def mac(self) -> str:
        """The MAC address of the container's end: always the same, so an ADD can be repeated.

        Locally administered (IEEE 802-2014, 8.4).
        """
        digest = hashlib.sha256(self.alias.encode()).digest()
        return f"02:{digest[:5].hex(':')}"


def from_alias(alias: str) -> Attachment | None:
    """The attachment an interface's alias names (without its pod); None if it names none."""
    parts = alias.removeprefix(_ALIAS).split("/")
    if not alias.startswith(_ALIAS) or len(parts) != 3:
        return None
    return Attachment(*parts)


def from_allocation(handle: str, attributes: Mapping[str, str]) -> Attachment | None:
    """The attachment that an allocated address belongs to; None for a tunnel's and the like."""
    pod, namespace = attributes.get("pod", ""), attributes.get("namespace", "")
    if "attachment" in attributes:
        attachment = from_alias(attributes["attachment"])
        return replace(attachment, pod=pod, namespace=namespace) if attachment else None
    network, _, container_id = handle.partition(".")
    if not pod or network != DEFAULT_NETWORK:
        return None
    return Attachment(network, container_id, DEFAULT_IFNAME, namespace, pod)


# Each ADD asks for these several times.


@lru_cache(maxsize=256)
def _handle(network: str, container_id: str, ifname: str) -> str:
    handle = f"{network}.{container_id}"
    if ifname != DEFAULT_IFNAME:
        handle += f".{ifname}"
    if _PLAIN_HANDLE.fullmatch(handle):
        return handle
    return f"attachment.{_digest(Attachment(network, container_id, ifname).alias)}"


@lru_cache(maxsize=256)
def _endpoint_key(attachment: Attachment, node: str) -> Key:
    of = attachment.pod or attachment.endpoint_container_id
    name = workload_endpoint_name(node, attachment.orchestrator, of, attachment.endpoint)
    return Key("WorkloadEndpoint", name, attachment.namespace or DEFAULT_NAMESPACE)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(text: str) -> str:
    """The text, or its hash where it can't be part of an object's name."""
    return text if _PLAIN.fullmatch(text) else _digest(text)
