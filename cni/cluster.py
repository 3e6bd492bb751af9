"""What the daemon reads from the datastore to wire a container, and what it records there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from api.clusterinformation import is_locked
from api.kubernetes import Pod
from api.names import workload_endpoint_name
from api.net import V4, V6, Net, format_address
from api.pods import DEFAULT_PREFIX, is_prefix
from cni.attachment import DEFAULT_IFNAME, Attachment, from_alias
from cni.errors import INVALID_CONFIGURATION, NO_ENDPOINT, TRY_AGAIN_LATER, CniError
from cni.features import Features
from cni.memory import Memory
from cni.wiring import Wire
from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Datastore,
    Entry,
    Key,
    NotFoundError,
    StoreError,
    create_all,
    part,
)
from policy import labels
from policy.convert import pod_labels, pod_ports, pod_profiles

# An annotation of endpoints whose addresses are another plugin's: the whole attachment, which
# the handle and the attributes of the addresses say otherwise.
ATTACHMENT = "cni.manx.dev/attachment"

# Objects that were looked at together, empty where there is none; or what hindered that.
Found = Mapping[Key, JSON | StoreError]

_CLUSTER_INFORMATION = Key("ClusterInformation", "default")

# Where the FelixConfiguration says what a tunnel carries, and what it adds to each packet, bytes:
# outer IP, UDP, VXLAN and Ethernet headers.
_VXLAN = {V4: ("vxlanMTU", 50), V6: ("vxlanMTUV6", 70)}
_IPIP = ("ipipMTU", 20)
_LEAST_MTU, _LARGEST_MTU = 68, 65535
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Namespace:
    """A Kubernetes namespace as far as its pods' addresses are concerned."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]


class Cluster:
    """The datastore as the daemon of one node needs it. All methods may raise StoreError."""

    def __init__(self, store: Datastore, node: str, *, follow: bool = False) -> None:
        self.store = store
        self.node = node
        self.memory = Memory(store, follow=follow)
        self._prefix = ""

    def require_unlocked(self) -> None:
        """Raise CniError while the datastore is locked, as it is when it is moved.

        The beginning of what changes anything, so memory is refreshed first.
        """
        self.look(())

    def look(self, attachments: Sequence[Attachment]) -> Found:
        """As ``require_unlocked``, and what is to be known of pods, all in one question.

        That is for ``pod`` and ``namespace``.
        """
        self.memory.refresh()
        keys = [_CLUSTER_INFORMATION]
        for attachment in attachments:
            if attachment.pod:
                keys += (_pod(attachment), _namespace(attachment))
        found = self.memory.look(keys)
        if is_locked(self._value(_CLUSTER_INFORMATION, found)):
            raise CniError(
                TRY_AGAIN_LATER,
                "the datastore is locked (ClusterInformation default: spec.datastoreReady:"
                " false): it is being moved; afterwards: manxctl datastore migrate unlock",
            )
        return found

    def require_endpoint(self, attachment: Attachment) -> None:
        """Raise CniError where the datastore has no place for the attachment's WorkloadEndpoint.

        Kubernetes' has one for each pod, at the pod itself.
        """
        if "WorkloadEndpoint" not in self.store.given:
            return
        where = "the Kubernetes datastore keeps endpoints at their pods"
        if not attachment.pod:
            raise CniError(
                NO_ENDPOINT,
                f"{attachment}: {where}: expected K8S_POD_NAMESPACE and K8S_POD_NAME in CNI_ARGS",
            )
        if attachment.endpoint != DEFAULT_IFNAME:
            raise CniError(
                NO_ENDPOINT,
                f"{attachment}: {where}, one for each: expected CNI_IFNAME {DEFAULT_IFNAME}",
            )

    def interface_prefix(self) -> str:
        """How names of the node's ends begin: FelixConfiguration ``interfacePrefix``.

        Read once: as for felix, a change needs a restart. Raises CniError.
        """
        if not self._prefix:
            name, text = self._felix_setting("interfacePrefix", sure=True)
            prefix = text.split(",")[0] or DEFAULT_PREFIX
            if not is_prefix(prefix):
                raise CniError(
                    INVALID_CONFIGURATION,
                    f"FelixConfiguration {name}: spec.interfacePrefix: {prefix!r}: expected 1 to 4"
                    " letters, digits, '_', '.', '-'",
                )
            self._prefix = prefix
        return self._prefix

    def mtu_pattern(self) -> re.Pattern[str] | None:
        """FelixConfiguration ``mtuIfacePattern``; None where it is not set. Raises CniError."""
        name, text = self._felix_setting("mtuIfacePattern")
        if not text:
            return None
        try:
            return re.compile(text)
        except re.error as error:
            raise CniError(
                INVALID_CONFIGURATION,
                f"FelixConfiguration {name}: spec.mtuIfacePattern: {text!r}: expected a regular"
                f" expression ({error})",
            ) from None

    def _felix_setting(self, field: str, *, sure: bool = False) -> tuple[str, str]:
        """A text in the FelixConfiguration, that of this node first, and in which it is."""
        for name in (f"node.{self.node}", "default"):
            key = Key("FelixConfiguration", name)
            spec = part(self.memory.value(key, sure=sure), "spec")
            if text := spec.get(field):
                return name, str(text)
        return "default", ""

    def node_labels(self) -> dict[str, str]:
        """The labels of this node; none if it is not registered."""
        return self._labels(Key("Node", self.node))

    def pod_cidrs(self) -> list[str]:
        """The ranges for pods that the cluster's controller gave this node."""
        status = self.memory.value(Key("Node", self.node)).get("status") or {}
        return list(status.get("podCIDRs") or [])

    def namespace(self, attachment: Attachment, found: Found | None = None) -> Namespace | None:
        """The pod's namespace; None for a container that is in none. ``found``: by ``look``."""
        if not attachment.pod:
            return None
        metadata = self._value(_namespace(attachment), found).get("metadata") or {}
        return Namespace(
            dict(metadata.get("labels") or {}), dict(metadata.get("annotations") or {})
        )

    def namespace_labels(self, attachment: Attachment) -> Mapping[str, str] | None:
        """The labels of the pod's namespace; None for a container that is in none."""
        namespace = self.namespace(attachment)
        return namespace.labels if namespace else None

    def pod(self, attachment: Attachment, found: Found | None = None) -> Pod | None:
        """The pod; None if there is no such object, as outside Kubernetes. ``found``: by ``look``.

        Raises CniError.
        """
        key = _pod(attachment)
        value = self._value(key, found) if attachment.pod else {}
        try:
            return Pod.model_validate(value) if value else None
        except ValidationError as error:
            raise CniError(INVALID_CONFIGURATION, f"{key}: {error}") from error

    def pod_mtu(self, uplink: int) -> int:
        """What fits through the way out and all tunnels that pools may use. Raises CniError.

        Of disabled pools, too: pods that have their addresses are still reached by them.
        """
        tunnels = set()
        for pool in self.memory.values("IPPool"):
            spec = part(pool, "spec")
            version = V6 if ":" in str(spec.get("cidr")) else V4
            if spec.get("vxlanMode", "Never") != "Never":
                tunnels.add(_VXLAN[version])
            if spec.get("ipipMode", "Never") != "Never":
                tunnels.add(_IPIP)
        return min(
            (self._felix_mtu(field) or uplink - size for field, size in tunnels), default=uplink
        )

    def _felix_mtu(self, field: str) -> int:
        """The MTU of a kind of tunnel, 0 where it is not set."""
        name, text = self._felix_setting(field)
        if not text:
            return 0
        if not text.isdecimal() or not _LEAST_MTU <= int(text) <= _LARGEST_MTU:
            raise CniError(
                INVALID_CONFIGURATION,
                f"FelixConfiguration {name}: spec.{field}: {text!r}: expected {_LEAST_MTU} to"
                f" {_LARGEST_MTU}",
            )
        return int(text)

    def endpoint(self, attachment: Attachment) -> Entry | None:
        """The WorkloadEndpoint under the attachment's name, whichever container it is of."""
        try:
            return self.store.get(attachment.endpoint_key(self.node))
        except NotFoundError:
            return None

    def delegated(self) -> Iterator[Attachment]:
        """The attachments of this node whose addresses are another plugin's."""
        prefix = workload_endpoint_name(self.node, "", "", "").rstrip("-") + "-"
        for entry in self.store.list("WorkloadEndpoint", prefix=prefix).entries:
            spec, metadata = part(entry.value, "spec"), part(entry.value, "metadata")
            attachment = from_alias(str(part(metadata, "annotations").get(ATTACHMENT)))
            if attachment is not None and spec.get("node") == self.node:
                pod = spec.get("pod") or ""
                namespace = entry.key.namespace if pod else ""
                yield replace(attachment, pod=pod, namespace=namespace)

    def record_all(self, endpoints: Sequence[tuple[Attachment, JSON]]) -> list[StoreError | None]:
        """Write WorkloadEndpoints, those of containers before them give way; what hindered each."""
        keys = [attachment.endpoint_key(self.node) for attachment, _ in endpoints]
        values = [endpoint for _, endpoint in endpoints]
        problems: list[StoreError | None] = []
        created = create_all(self.store, list(zip(keys, values, strict=True)))
        for key, value, outcome in zip(keys, values, created, strict=True):
            problem = outcome if isinstance(outcome, StoreError) else None
            if isinstance(problem, AlreadyExistsError):
                problem = self._replace(key, value)
            problems.append(problem)
        return problems

    def _replace(self, key: Key, endpoint: JSON) -> StoreError | None:
        try:
            for _ in range(_ATTEMPTS):
                try:
                    self._give_way(key, endpoint)
                    return None
                except (NotFoundError, ConflictError):
                    pass
                try:
                    self.store.create(key, endpoint)
                    return None
                except AlreadyExistsError:
                    pass
        except StoreError as error:
            return error
        return ConflictError(f"{key}: changed by others {_ATTEMPTS} times in a row", key)

    def _give_way(self, key: Key, endpoint: JSON) -> None:
        found = self.store.get(key)
        metadata = found.value.get("metadata", {}) | endpoint["metadata"]
        if "annotations" not in endpoint["metadata"]:  # what it says is of that container
            others = part(metadata, "annotations")
            kept = {name: text for name, text in others.items() if name != ATTACHMENT}
            metadata = metadata | {"annotations": kept}
        self.store.update(key, endpoint | {"metadata": metadata}, found.revision)

    def forget(self, attachment: Attachment) -> Entry | None:
        """Delete its WorkloadEndpoint, and return it; never one of another container."""
        for _ in range(_ATTEMPTS):
            found = self.endpoint(attachment)
            if found is None or not owns(attachment, found):
                return None
            try:
                return self.store.delete(found.key, found.revision)
            except (NotFoundError, ConflictError):
                continue
        key = attachment.endpoint_key(self.node)
        raise ConflictError(f"{key}: changed by others {_ATTEMPTS} times in a row", key)

    def _value(self, key: Key, found: Found | None) -> JSON:
        value = self.memory.value(key) if found is None else found[key]
        if isinstance(value, StoreError):
            raise value
        return value

    def _labels(self, key: Key) -> dict[str, str]:
        metadata = self.memory.value(key).get("metadata") or {}
        return dict(metadata.get("labels") or {})


def owns(attachment: Attachment, endpoint: Entry) -> bool:
    """Whether the WorkloadEndpoint is that of the attachment's container."""
    spec = part(endpoint.value, "spec")
    return spec.get("containerID") == attachment.endpoint_container_id


def workload_endpoint(
    attachment: Attachment,
    pod: Pod | None,
    *,
    node: str,
    wire: Wire,
    features: Features,
) -> JSON:
    """The WorkloadEndpoint of a wired container, as JSON."""
    key = attachment.endpoint_key(node)
    spec: dict[str, Any] = {
        "orchestrator": attachment.orchestrator,
        "node": node,
        "containerID": attachment.endpoint_container_id,
        "endpoint": attachment.endpoint,
        "interfaceName": wire.host_interface,
        "mac": wire.mac,
        "ipNetworks": [str(net) for net in wire.addresses],
        "profiles": [f"kns.{key.namespace}"],
    }
    own = {labels.NAMESPACE: key.namespace, labels.ORCHESTRATOR: attachment.orchestrator}
    if attachment.pod:
        spec["pod"] = attachment.pod
    if pod is not None:
        own = pod_labels(pod)
        spec["profiles"] = list(pod_profiles(pod))
        spec["ports"] = [
            port.model_dump(mode="json", by_alias=True, exclude_none=True)
            for port in pod_ports(pod)
        ]
        if account := pod.spec.service_account_name:
            spec["serviceAccountName"] = account
    if nats := features.nats(wire.addresses):
        spec["ipNATs"] = [
            {"internalIP": _address(internal), "externalIP": _address(external)}
            for external, internal in nats
        ]
    if features.sources:
        spec["allowSpoofedSourcePrefixes"] = [str(net) for net in features.sources]
    if features.controls:
        spec["qosControls"] = dict(features.controls)
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": "WorkloadEndpoint",
        "metadata": {"name": key.name, "namespace": key.namespace, "labels": own},
        "spec": spec,
    }


def _pod(attachment: Attachment) -> Key:
    return Key("Pod", attachment.pod, attachment.namespace)


def _namespace(attachment: Attachment) -> Key:
    return Key("Namespace", attachment.namespace)


def _address(net: Net) -> str:
    return format_address(net.version, net.address)
