"""Reading the inventory from a store. Nothing is written.

What gives addresses is read before those who use them, so that an address which nobody seems to
use had no user at a moment after it was given. One object that makes no sense does not hide the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

from api import pods
from api.errors import InvalidObjectError, Problem
from api.names import workload_endpoint_name
from api.net import Net, parse_interface, parse_net
from datastore.interface import (
    JSON,
    Datastore,
    Entry,
    Key,
    NotFoundError,
    SelectingDatastore,
)
from ipam.block import Block
from ipam.inventory import Allocation, Inventory, Unreadable, User
from ipam.overlaps import (
    learned_routes,
    node_ranges,
    service_addresses,
    service_cidrs,
    service_ranges,
)
from ipam.pools import Pools
from ipam.records import CONFIRMED, Affinity, Handle, Stored

# where a Node names the addresses of its tunnels
_TUNNELS = (
    ("bgp", "ipv4IPIPTunnelAddr"),
    ("ipv4VXLANTunnelAddr",),
    ("ipv6VXLANTunnelAddr",),
    ("wireguard", "interfaceIPv4Address"),
    ("wireguard", "interfaceIPv6Address"),
)
_OF_KUBERNETES = ("Pod", "Service", "ServiceCIDR")
_CONTAINER_ID = "cni.projectcalico.org/containerID"

T = TypeVar("T")


def read(store: Datastore, kubernetes: Datastore | None = None) -> Inventory:
    """Read everything; the pods from ``kubernetes`` where that is another store.

    Raises StoreError.
    """
    reader = _Reader(store, kubernetes)
    blocks = {stored.thing.net: stored for stored in reader.all("IPAMBlock", _block)}
    handles = {stored.thing.id: stored for stored in reader.all("IPAMHandle", _handle)}
    affinities = reader.all("BlockAffinity", _affinity)
    users = reader.users()
    node_entries = store.list("Node").entries
    nodes = reader.converted(node_entries, _tunnels, user=True)
    names = {node.key.name for node in nodes}
    # one that can't be read is there all the same
    names |= {each.key.name for each in reader.unreadable if each.key.kind == "Node"}
    return Inventory(
        blocks=blocks,
        handles=handles,
        affinities=[stored for stored in affinities if stored is not None],
        users=[*users, *(node for node in nodes if node.addresses)],
        nodes=frozenset(names),
        pools=Pools(store).all(),
        reserved=[net for nets in reader.all("IPReservation", _reserved) for net in nets],
        unreadable=reader.unreadable,
        half_deleted=reader.half_deleted,
        pods=reader.pods,
        node_ranges=list(node_ranges(entry.value for entry in node_entries)),
        service_ranges=[
            *service_ranges(reader.values("BGPConfiguration")),
            *service_cidrs(reader.values("ServiceCIDR")),
            *service_addresses(reader.values("Service")),
        ],
        announced=list(learned_routes(reader.values("CalicoNodeStatus"), datetime.now(UTC))),
    )


def users_of(
    store: Datastore, allocation: Allocation, kubernetes: Datastore | None = None
) -> list[User]:
    """The objects by whose names the holder of an address is found, as they are now.

    Raises StoreError; InvalidObjectError when one of them can't be understood.
    """
    reader = _Reader(store, kubernetes)
    found: list[User | None] = []
    if allocation.machine:
        if allocation.pod is None or reader.has_pod(*allocation.pod):
            found += reader.one(Key("Node", allocation.machine), _tunnels)
    else:
        namespace, pod = allocation.attribute("namespace"), allocation.attribute("pod")
        if pod:
            found += reader.one(Key("Pod", pod, namespace), _pod)
        names = [("k8s", pod)] if pod else [("cni", name) for name in allocation.containers]
        if "WorkloadEndpoint" in store.given:
            names = []  # they are views of pods
        for orchestrator, name in names:
            prefix = workload_endpoint_name(allocation.attribute("node"), orchestrator, name, "")
            found += reader.all("WorkloadEndpoint", _endpoint, prefix, user=True)
    for unreadable in reader.unreadable:
        problem = Problem("", None, unreadable.reason)
        raise InvalidObjectError(unreadable.key.kind, unreadable.key.name, [problem])
    return [user for user in found if user is not None]


def users_on(store: Datastore, node: str) -> list[User]:
    """The pods and other containers of one node, at the cost of those alone. Raises StoreError.

    What makes no sense is left out.
    """
    reader = _Reader(store, None)
    found: list[User | None] = []
    if "WorkloadEndpoint" not in store.given:
        prefix = workload_endpoint_name(node, "", "", "").rstrip("-") + "-"
        found += reader.all("WorkloadEndpoint", _endpoint, prefix)
    elif isinstance(store, SelectingDatastore):
        pods_of = store.list_by_field("Pod", "spec.nodeName", node)
        found += reader.converted(pods_of.entries, _pod)
    else:
        found += reader.all("Pod", _pod)
    return [user for user in found if user is not None and user.node == node]


class _Reader:
    def __init__(self, store: Datastore, kubernetes: Datastore | None) -> None:
        self._store = store
        self._kubernetes = kubernetes or store
        self._asks = kubernetes is not None or "WorkloadEndpoint" in store.given
        self.pods: frozenset[tuple[str, str]] | None = None
        self.unreadable: list[Unreadable] = []
        self.half_deleted: list[Key] = []

    def all(
        self, kind: str, convert: Callable[[Entry], T], prefix: str = "", *, user: bool = False
    ) -> list[T]:
        """What became of all objects of a kind that make sense."""
        return self.converted(self._of(kind).list(kind, prefix=prefix).entries, convert, user=user)

    def converted(
        self, entries: Iterable[Entry], convert: Callable[[Entry], T], *, user: bool = False
    ) -> list[T]:
        """What became of those of the objects that make sense."""
        found = []
        for entry in entries:
            found += self._converted(entry, convert, user)
        return found

    def one(self, key: Key, convert: Callable[[Entry], T]) -> list[T]:
        """What became of one object; nothing when there is none."""
        try:
            return self._converted(self._of(key.kind).get(key), convert, True)
        except NotFoundError:
            return []

    def users(self) -> list[User]:
        """The endpoints, and the pods. Where the one are views of the other, only the pods.

        A Kubernetes without any node is not believed when it has no pod, either.
        """
        entries = self._of("Pod").list("Pod").entries
        if self._asks and self._kubernetes.list("KubernetesNode").entries:
            self.pods = frozenset((entry.key.namespace, entry.key.name) for entry in entries)
        found: list[User | None] = list(self.converted(entries, _pod, user=True))
        if "WorkloadEndpoint" not in self._store.given:
            found += self.all("WorkloadEndpoint", _endpoint, user=True)
        return [user for user in found if user is not None]

    def values(self, kind: str) -> Iterator[JSON]:
        """All objects of a kind as they are."""
        return (entry.value for entry in self._of(kind).list(kind).entries)

    def has_pod(self, namespace: str, name: str) -> bool:
        """Whether there is that pod; so it may be where Kubernetes can't be asked."""
        return not self._asks or bool(self.one(Key("Pod", name, namespace), lambda entry: entry))

    def _of(self, kind: str) -> Datastore:
        return self._kubernetes if kind in _OF_KUBERNETES else self._store

    def _converted(self, entry: Entry, convert: Callable[[Entry], T], user: bool) -> list[T]:
        spec = entry.value.get("spec")
        if isinstance(spec, dict) and spec.get("deleted") is True:
            self.half_deleted.append(entry.key)
            return []
        try:
            return [convert(entry)]
        except (InvalidObjectError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, InvalidObjectError) else repr(error)
            self.unreadable.append(Unreadable(entry.key, reason, user))
            return []


def _block(entry: Entry) -> Stored[Block]:
    return Stored(entry, Block.from_spec(entry.key.name, entry.value["spec"]))


def _handle(entry: Entry) -> Stored[Handle]:
    spec = entry.value["spec"]
    counts = {parse_net(cidr): count for cidr, count in (spec.get("block") or {}).items()}
    return Stored(entry, Handle(spec["handleID"], counts))


def _affinity(entry: Entry) -> Stored[Affinity] | None:
    spec = entry.value["spec"]
    if (spec.get("type") or "host") != "host":
        return None
    state = spec.get("state") or CONFIRMED
    return Stored(entry, Affinity(spec["node"], parse_net(spec["cidr"]), state))


def _reserved(entry: Entry) -> list[Net]:
    cidrs = (entry.value.get("spec") or {}).get("reservedCIDRs") or []
    return [parse_net(cidr, strict=False) for cidr in cidrs]


def _endpoint(entry: Entry) -> User:
    spec = entry.value["spec"]
    pod = spec.get("pod")
    return User(
        entry.key,
        spec.get("node") or "",
        tuple(_address(text) for text in spec.get("ipNetworks") or ()),
        (entry.key.namespace, pod) if pod else None,
        spec.get("containerID") or "",
        spec.get("interfaceName") or "",
    )


def _pod(entry: Entry) -> User | None:
    """A pod that has, or will have, an address of its own.

    The status and the CNI plugin's annotations both count: the one may be older than the other.
    """
    metadata, spec = entry.value["metadata"], entry.value.get("spec") or {}
    status = entry.value.get("status") or {}
    annotations = metadata.get("annotations") or {}
    deleting = bool(metadata.get("deletionTimestamp"))
    node = spec.get("nodeName")
    if not node or spec.get("hostNetwork"):
        return None
    if pods.finished(status.get("phase"), deleting, annotations):
        return None
    ips = [ip["ip"] for ip in status.get("podIPs") or () if ip.get("ip")]
    known = [_address(text) for text in pods.addresses(status.get("podIP"), ips, {})]
    for text in pods.addresses(None, (), annotations):
        try:
            known.append(_address(text))
        except ValueError:
            continue  # an annotation anybody may write; the status follows
    return User(
        entry.key,
        node,
        tuple(dict.fromkeys(known)),
        (entry.key.namespace, entry.key.name),
        annotations.get(_CONTAINER_ID) or "",
        pods.interface(entry.key.namespace, entry.key.name, annotations),
    )


def _tunnels(entry: Entry) -> User:
    spec: JSON = entry.value.get("spec") or {}
    found = []
    for path in _TUNNELS:
        value: Any = spec
        for name in path:
            value = (value or {}).get(name)
        if value:
            found.append(_address(value))
    return User(entry.key, entry.key.name, tuple(found))


def _address(text: str) -> Net:
    return parse_interface(text)[0]
