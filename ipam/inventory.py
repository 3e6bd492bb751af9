"""Everything that has to do with addresses, at one moment: the ground for audit and collection.

Nouns only: ``ipam.reading`` makes them from what is in a store.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from api.net import Net
from datastore.interface import Key
from ipam.block import WINDOWS_RESERVED, Block
from ipam.overlaps import Range
from ipam.pools import Pool
from ipam.records import Affinity, Handle, Stored

_TUNNEL = re.compile(r"(?:ipip|vxlan|vxlan-v6|wireguard|wireguard-v6)-tunnel-addr-(.+)")
_STAND_ALONE = "manx-ipam"  # what the CNI plugin of that name says of the addresses it gives
_POD = "ipamPod"  # and of the pod that one is for
_HOST = "host:"


@dataclass(frozen=True, slots=True)
class Allocation:
    """An address that IPAM gave to somebody.

    ``sequence`` is the block's when it was given (None: not recorded). Two that are equal are
    the same allocation, not one that was given back and given again.
    """

    address: Net
    block: Net
    handle: str
    sequence: int | None
    attributes: tuple[tuple[str, str], ...]

    def attribute(self, name: str) -> str:
        """What its holder said of itself; empty when it did not."""
        return dict(self.attributes).get(name, "")

    @property
    def machine(self) -> str:
        """The node that holds it itself, and as long as there is that node; else empty.

        For a tunnel, or as IPAM of another main plugin, of whose containers only it knows; unless
        they are of a pod, and Kubernetes can be asked for that.
        """
        found = _TUNNEL.fullmatch(self.handle)
        if found or self.attribute("type") == _STAND_ALONE:
            return self.attribute("node") or (found[1] if found else "")
        return ""

    @property
    def pod(self) -> tuple[str, str] | None:
        """Namespace and name of the pod it is for, if that is known."""
        if name := self.attribute("pod"):
            return self.attribute("namespace"), name
        namespace, _, name = self.attribute(_POD).partition("/")
        return (namespace, name) if name else None

    @property
    def workload(self) -> bool:
        """Whether a pod or another container holds it, of which the CNI plugin told."""
        return bool(self.handle and (self.attribute("pod") or self.attribute("attachment")))

    @property
    def containers(self) -> frozenset[str]:
        """What the container that holds it may be called in its WorkloadEndpoint."""
        attachment = self.attribute("attachment").split("/")
        if len(attachment) == 3:
            return frozenset((attachment[1], hashlib.sha256(attachment[1].encode()).hexdigest()))
        return frozenset(self.handle.split(".")[1:])

    @property
    def holder(self) -> str:
        """Who has it, for people: the handle, and the pod and node that are known of it."""
        node = self.attribute("node")
        pod = f" (pod {'/'.join(self.pod)})" if self.pod else ""
        return f"{self.handle or 'nobody known'}{pod}{f' on {node}' if node else ''}"


@dataclass(frozen=True, slots=True)
class User:
    """An object that says it has addresses: a WorkloadEndpoint, a Pod, or a Node with tunnels."""

    key: Key
    node: str
    addresses: tuple[Net, ...]
    pod: tuple[str, str] | None = None  # namespace and name
    container: str = ""
    interface: str = ""  # the node's end


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An object that makes no sense. ``user``: it may use addresses nobody can tell."""

    key: Key
    reason: str
    user: bool = False


@dataclass
class Inventory:
    """One reading. ``handles`` by id; ``affinities``: those of nodes; ``nodes``: their names.

    ``pods``: namespace and name of all that Kubernetes has; None where it can't be asked.
    ``announced``: routes that BGP peers told, each with who did.
    """

    blocks: Mapping[Net, Stored[Block]]
    handles: Mapping[str, Stored[Handle]]
    affinities: Sequence[Stored[Affinity]]
    users: Sequence[User]
    nodes: frozenset[str]
    pools: Sequence[Pool] = ()
    reserved: Sequence[Net] = ()
    unreadable: Sequence[Unreadable] = ()
    half_deleted: Sequence[Key] = field(default_factory=list)
    pods: frozenset[tuple[str, str]] | None = None
    node_ranges: Sequence[Range] = ()
    service_ranges: Sequence[Range] = ()
    announced: Sequence[tuple[str, Net]] = ()

    @property
    def blind(self) -> bool:
        """Whether somebody may use addresses that can't be told."""
        return any(problem.user for problem in self.unreadable)

    @cached_property
    def allocations(self) -> Mapping[Net, Allocation]:
        """Every address that somebody holds; not those that only rest after their release."""
        return {
            allocation.address: allocation
            for stored in self.blocks.values()
            for allocation in allocations_of(stored.thing)
        }

    @cached_property
    def by_handle(self) -> Mapping[str, list[Allocation]]:
        """The allocations of each handle; "" for those that have none."""
        found: dict[str, list[Allocation]] = defaultdict(list)
        for allocation in self.allocations.values():
            found[allocation.handle].append(allocation)
        return found

    @cached_property
    def used(self) -> Mapping[Net, list[User]]:
        """Who uses an address."""
        found: dict[Net, list[User]] = defaultdict(list)
        for user in self.users:
            for address in user.addresses:
                found[address].append(user)
        return found

    @cached_property
    def _containers(self) -> frozenset[str]:
        return frozenset(user.container for user in self.users if user.container)

    @cached_property
    def _expecting(self) -> frozenset[tuple[str, tuple[str, str] | None]]:
        return frozenset(
            (user.node, user.pod) for user in self.users if user.pod and not user.addresses
        )

    def unused(self, allocation: Allocation) -> bool:
        """Whether whoever holds the address is known, and is not there (any more).

        In doubt it is in use: while its container has an endpoint, whatever addresses that
        names, and while its pod has no address yet.
        """
        if allocation.address in self.used:
            return False
        if allocation.machine:
            if not self.nodes:
                return False
            pod_gone = allocation.pod and self.pods is not None and allocation.pod not in self.pods
            return allocation.machine not in self.nodes or bool(pod_gone)
        if not allocation.workload or allocation.containers & self._containers:
            return False
        return (allocation.attribute("node"), allocation.pod) not in self._expecting

    def gone(self, nodes: set[str]) -> set[str]:
        """Those of the nodes that do not exist. When no node does, that is not believed."""
        return nodes - self.nodes - {""} if self.nodes else set()

    def without_pod(self) -> Iterator[User]:
        """The endpoints whose pods Kubernetes has no more, on nodes that are there."""
        there = self.pods
        if there is None:
            return
        for user in self.users:
            pod = user.pod if user.key.kind == "WorkloadEndpoint" else None
            if pod and pod not in there and user.node in self.nodes:
                yield user

    def pool_of(self, net: Net) -> Pool | None:
        """The pool a block or an address lies in."""
        return next((pool for pool in self.pools if pool.net.contains(net)), None)


def allocations_of(block: Block) -> Iterator[Allocation]:
    """Every address of a block that somebody holds."""
    holders = []
    for attribute in block.attributes:
        handle = attribute.get("handle_id") or ""
        said = attribute.get("secondary") or {}
        free = "releasedAt" in attribute or handle.lower() == WINDOWS_RESERVED
        holders.append(None if free else (handle, tuple(sorted(said.items()))))
    for ordinal, index in enumerate(block.allocations):
        holder = None if index is None else holders[index]
        if holder is not None:
            sequence = block.sequences.get(ordinal)
            yield Allocation(block.address(ordinal), block.net, holder[0], sequence, holder[1])


def host_of(block: Block) -> str:
    """The node whose block it is; empty when it is nobody's, or no node's."""
    affinity = block.affinity or ""
    return affinity.removeprefix(_HOST) if affinity.startswith(_HOST) else ""
