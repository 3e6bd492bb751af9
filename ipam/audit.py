"""Every disagreement between what IPAM gave, who uses it, and what is configured. Pure.

``audit`` looks at one reading, in which a pod that comes or goes meanwhile looks wrong.
``standing`` keeps what is found in two readings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, pairwise

from api.net import Net, format_address
from datastore.interface import Datastore
from ipam.inventory import Allocation, Inventory, User, allocations_of, host_of
from ipam.overlaps import of_other_clusters, overlapping, shared
from ipam.pools import Pool
from ipam.reading import read
from ipam.records import CONFIRMED


class Fault(StrEnum):
    """What can be wrong. The text names it in reports."""

    UNREADABLE = "unreadable object"
    HALF_DELETED = "half-deleted object"
    UNUSED = "leaked address"
    UNKNOWN_HOLDER = "address of an unknown holder"
    NOT_ALLOCATED = "address in use but free"
    OUTSIDE = "address in use outside all pools"
    OTHERS = "address of another holder"
    DOUBLED = "address used twice"
    RESERVED = "reserved address in use"
    NO_HANDLE = "address without handle"
    EMPTY_HANDLE = "handle without addresses"
    MISCOUNTED = "handle that miscounts"
    CLAIM = "half-made claim"
    UNCLAIMED = "block without claim"
    UNOWNED = "empty block of nobody"
    OVERLAP = "overlapping blocks"
    NO_POOL = "block outside all pools"
    GONE_NODE = "node that is gone"
    GONE_POD = "endpoint of a pod that is gone"
    POOL_OVERLAP = "overlapping pools"
    NODE_RANGE = "pool over addresses of nodes"
    SERVICE_RANGE = "pool over addresses of services"
    SHARED = "pool of another cluster, too"
    ROUTE = "kernel route"
    INTERFACE = "kernel interface"


# Facts that are worth knowing and that need not be wrong.
NOTES = frozenset(
    (Fault.UNKNOWN_HOLDER, Fault.OUTSIDE, Fault.RESERVED, Fault.UNOWNED, Fault.HALF_DELETED)
)


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One disagreement: what it is of (an address, an object's key), and what to know of it."""

    fault: Fault
    subject: str
    message: str

    @property
    def problem(self) -> bool:
        """Whether something is wrong; else it is a note."""
        return self.fault not in NOTES

    def __str__(self) -> str:
        return f"{self.subject}: {self.message}"


def standing(
    store: Datastore, kubernetes: Datastore | None = None
) -> tuple[Inventory, list[Finding]]:
    """The latest reading, and what is found in it and in one before. Raises StoreError.

    Store only read; twice only where the first time something is found. ``kubernetes``: where the
    pods are, if that is another store.
    """
    inventory = read(store, kubernetes)
    first = audit(inventory)
    if not first:
        return inventory, []
    again = read(store, kubernetes)
    known = set(first)
    return again, [finding for finding in audit(again) if finding in known]


def leaks(inventory: Inventory, findings: Iterable[Finding]) -> list[list[Allocation]]:
    """What may be released: for each handle all that it holds, if all of that is found unused."""
    if inventory.blind:
        return []
    unused = {finding.subject for finding in findings if finding.fault is Fault.UNUSED}
    return [
        sorted(held, key=lambda allocation: allocation.address)
        for held in inventory.by_handle.values()
        if all(_text(allocation.address) in unused for allocation in held)
    ]


def audit(inventory: Inventory) -> list[Finding]:
    """All findings of a reading, sorted."""
    return sorted(
        set(
            chain(
                _objects(inventory),
                _given(inventory),
                _in_use(inventory),
                _handles(inventory),
                _claims(inventory),
                _blocks(inventory),
                _nodes(inventory),
                _pods(inventory),
                _pools(inventory),
            )
        )
    )


def _objects(inventory: Inventory) -> Iterator[Finding]:
    for problem in inventory.unreadable:
        more = "; while it stands no address is collected" if problem.user else ""
        yield Finding(Fault.UNREADABLE, str(problem.key), problem.reason + more)
    for key in inventory.half_deleted:
        yield Finding(
            Fault.HALF_DELETED, str(key), "is marked as deleted; its next reader deletes it"
        )


def _given(inventory: Inventory) -> Iterator[Finding]:
    """What was given: is it used, and by whom?"""
    for allocation in inventory.allocations.values():
        text = _text(allocation.address)
        if inventory.unused(allocation):
            yield Finding(
                Fault.UNUSED, text, f"was given to {allocation.holder}, which is not there"
            )
        elif not (allocation.workload or allocation.machine or allocation.handle[:3] == "lb-"):
            yield Finding(
                Fault.UNKNOWN_HOLDER, text, f"was given to {allocation.holder}: nobody we know"
            )
        if any(net.contains(allocation.address) for net in inventory.reserved):
            yield Finding(Fault.RESERVED, text, f"was given to {allocation.holder} before")


def _in_use(inventory: Inventory) -> Iterator[Finding]:
    """What is used: was it given, and to that user?"""
    for address, users in inventory.used.items():
        text = _text(address)
        names = _names(users)
        if len(_parties(users)) > 1:
            yield Finding(Fault.DOUBLED, text, f"is used by {names}")
        allocation = inventory.allocations.get(address)
        if allocation is not None:
            if not any(_matches(allocation, user) for user in users):
                message = f"was given to {allocation.holder}, but is used by {names}"
                yield Finding(Fault.OTHERS, text, message)
        elif (pool := inventory.pool_of(address)) is not None:
            message = f"is used by {names}, but free in pool {pool}: it may be given once more"
            yield Finding(Fault.NOT_ALLOCATED, text, message)
        else:
            yield Finding(Fault.OUTSIDE, text, f"is used by {names}, and in no pool")


def _handles(inventory: Inventory) -> Iterator[Finding]:
    for id_, allocations in inventory.by_handle.items():
        stored = inventory.handles.get(id_)
        counts = {} if stored is None else stored.thing.counts
        for allocation in allocations:
            if id_ and allocation.block not in counts:
                yield Finding(
                    Fault.NO_HANDLE,
                    _text(allocation.address),
                    f"was given to {allocation.holder}, whose IPAMHandle does not name"
                    f" {allocation.block}: a release by handle will not find it",
                )
    for id_, stored in inventory.handles.items():
        subject = f"IPAMHandle({id_})"
        held: dict[Net, int] = defaultdict(int)
        for allocation in inventory.by_handle.get(id_, ()):
            held[allocation.block] += 1
        if not held:
            nets = ", ".join(map(str, stored.thing.counts)) or "no block"
            yield Finding(Fault.EMPTY_HANDLE, subject, f"names {nets} and holds nothing there")
            continue
        for net, count in stored.thing.counts.items():
            if count != held[net]:
                message = f"counts {count} addresses in {net}, where it holds {held[net]}"
                yield Finding(Fault.MISCOUNTED, subject, message)


def _claims(inventory: Inventory) -> Iterator[Finding]:
    claimed = set()
    for stored in inventory.affinities:
        claim = stored.thing
        claimed.add((claim.node, claim.net))
        block = inventory.blocks.get(claim.net)
        owner = "no block" if block is None else f"a block of {block.thing.affinity or 'nobody'}"
        if block is not None and host_of(block.thing) == claim.node:
            owner = ""
        if owner or claim.state != CONFIRMED:
            there = f", and there is {owner}" if owner else ""
            message = f"{claim.node} claims {claim.net} ({claim.state}){there}"
            yield Finding(Fault.CLAIM, str(stored.entry.key), message)
    for net, stored_block in inventory.blocks.items():
        node = host_of(stored_block.thing)
        if node and (node, net) not in claimed:
            message = f"is {node}'s, which has no BlockAffinity for it: it is not announced"
            yield Finding(Fault.UNCLAIMED, f"block {net}", message)


def _blocks(inventory: Inventory) -> Iterator[Finding]:
    nets = sorted(inventory.blocks)
    for one, other in pairwise(nets):
        if one.overlaps(other):
            yield Finding(Fault.OVERLAP, f"block {one}", f"shares addresses with block {other}")
    for net, stored in inventory.blocks.items():
        if stored.thing.affinity is None and stored.thing.empty:
            yield Finding(Fault.UNOWNED, f"block {net}", "is empty and nobody's")
        if inventory.pool_of(net) is None:
            used = sum(1 for _ in allocations_of(stored.thing))
            message = f"lies in no IPPool, and {used} of its addresses are in use"
            yield Finding(Fault.NO_POOL, f"block {net}", message)


def _nodes(inventory: Inventory) -> Iterator[Finding]:
    blocks: dict[str, int] = defaultdict(int)
    endpoints: dict[str, int] = defaultdict(int)
    for stored in inventory.blocks.values():
        blocks[host_of(stored.thing)] += 1
    for user in inventory.users:
        if user.key.kind == "WorkloadEndpoint":
            endpoints[user.node] += 1
    claims = {stored.thing.node for stored in inventory.affinities}
    for node in inventory.gone({*claims, *blocks, *endpoints}):
        message = f"does not exist, but has {blocks[node]} blocks and {endpoints[node]} endpoints"
        yield Finding(Fault.GONE_NODE, f"Node({node})", message)


def _pods(inventory: Inventory) -> Iterator[Finding]:
    for user in inventory.without_pod():
        namespace, name = user.pod or ("", "")
        held = ", ".join(map(_text, user.addresses)) or "no address"
        message = f"has {held}, and there is no Pod {namespace}/{name}"
        yield Finding(Fault.GONE_POD, str(user.key), message)


def _pools(inventory: Inventory) -> Iterator[Finding]:
    for one, other in overlapping(inventory.pools):
        message = f"{one.net} shares addresses with {other.net} of IPPool {other.name}"
        yield Finding(Fault.POOL_OVERLAP, f"IPPool({one.name})", message)
    for pool in inventory.pools:
        for fault, ranges in (
            (Fault.NODE_RANGE, inventory.node_ranges),
            (Fault.SERVICE_RANGE, inventory.service_ranges),
        ):
            for range_ in shared(pool.net, ranges, load_balancers="LoadBalancer" in pool.uses):
                message = f"{pool.net} shares addresses with {range_.net}, {range_.use}"
                yield Finding(fault, f"IPPool({pool.name})", message)
    yield from shared_pools(inventory.pools, inventory.blocks, inventory.announced)


def shared_pools(
    pools: Iterable[Pool], blocks: Collection[Net], announced: Iterable[tuple[str, Net]]
) -> Iterator[Finding]:
    """See ``overlaps.of_other_clusters``."""
    for pool, message in of_other_clusters(pools, blocks, announced):
        yield Finding(Fault.SHARED, f"IPPool({pool.name})", message)


def _matches(allocation: Allocation, user: User) -> bool:
    """Whether the user is whom the address was given to, as far as both say who they are."""
    if user.key.kind == "Node":
        return not allocation.machine or allocation.machine == user.node
    if allocation.machine:
        return allocation.pod is not None and allocation.pod == user.pod
    if user.container and allocation.containers and allocation.workload:
        return user.container in allocation.containers
    return user.pod is None or allocation.pod is None or user.pod == allocation.pod


def _parties(users: Iterable[User]) -> set[object]:
    """Those who are not the same: a pod and its endpoint are."""
    return {user.pod or user.key for user in users}


def _names(users: Iterable[User]) -> str:
    return " and ".join(sorted(str(user.key) for user in users))


def _text(address: Net) -> str:
    return format_address(address.version, address.address)
