"""Blocks, affinities and handles as the store has them.

Every write names the revision that was read (compare-and-swap). An object marked
``deleted`` is one whose deletion was cut off: it is deleted here and counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Generic, TypeVar

from api.ipam import IPAMConfigurationSpec
from api.kinds import KINDS
from api.names import cidr_name
from api.net import V4, Net, parse_net
from api.registry import parse_as
from datastore.interface import (
    JSON,
    Datastore,
    Entry,
    GroupingDatastore,
    Key,
    Listing,
    NotFoundError,
    SelectingDatastore,
    StoreError,
    create_all,
    part,
)
from ipam.block import Block

PENDING = "pending"
CONFIRMED = "confirmed"
PENDING_DELETION = "pendingDeletion"

HOST = "host"  # the owner of a block is a node
VIRTUAL = "virtual"  # or somebody who is no machine, as the one all load balancers share
LOAD_BALANCER = "load-balancer"

ATTEMPTS = 100  # at a compare-and-swap that others keep changing

T = TypeVar("T")

net_of = lru_cache(maxsize=4096)(parse_net)  # the same few CIDRs are read again and again


@dataclass(frozen=True, slots=True)
class Stored(Generic[T]):
    """Something read from the store. Writing it succeeds only while ``entry`` is unchanged."""

    entry: Entry
    thing: T


@dataclass(frozen=True, slots=True)
class Affinity:
    """A node's claim on a block. ``type``: ``host``, or ``virtual`` for one that is no node."""

    node: str
    net: Net
    state: str
    type: str = HOST


@dataclass(frozen=True, slots=True)
class Handle:
    """How many addresses its holder has, by block."""

    id: str
    counts: Mapping[Net, int]


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds addresses of a block: the handle, and what is recorded with them."""

    handle: str
    attributes: Mapping[str, str]


def owner(node: str, type_: str = HOST) -> str:
    """The affinity of a node's blocks."""
    return f"{type_}:{node}"


class Records:
    """What IPAM keeps in a store. The store's errors pass through, ConflictError above all."""

    def __init__(self, store: Datastore) -> None:
        self._store = store
        self._grouping = store if isinstance(store, GroupingDatastore) else None

    def configuration(self) -> IPAMConfigurationSpec:
        """The IPAMConfiguration ``default``, or its defaults. Raises InvalidObjectError."""
        try:
            value = self._store.get(Key("IPAMConfiguration", "default")).value
        except NotFoundError:
            return IPAMConfigurationSpec()
        return parse_as("IPAMConfiguration", value).spec  # type: ignore[attr-defined, no-any-return]

    def node_labels(self, node: str) -> Mapping[str, str]:
        """Labels of the Node object, none when there is no such object."""
        try:
            value = self._store.get(Key("Node", node)).value
        except NotFoundError:
            return {}
        return value["metadata"].get("labels") or {}

    # blocks

    def block(self, net: Net) -> Stored[Block] | None:
        """The block of that CIDR. Raises InvalidObjectError when it makes no sense."""
        entry = self._get(_block_key(net))
        return None if entry is None else _block(entry)

    def blocks(self, prefix: str = "") -> Iterator[Stored[Block]]:
        """All blocks whose names begin with ``prefix``."""
        for entry in self._list("IPAMBlock", prefix):
            yield _block(entry)

    def blocks_within(self, net: Net) -> Iterator[Stored[Block]]:
        """All blocks inside a network."""
        for stored in self.blocks(_name_prefix(net)):
            if net.contains(stored.thing.net):
                yield stored

    def holders(self) -> Iterator[Holder]:
        """All who hold addresses, once for each block; what makes no sense is left out."""
        for entry in self._store.list("IPAMBlock").entries:
            attributes = part(entry.value, "spec").get("attributes")
            for attribute in attributes if isinstance(attributes, list) else []:
                if isinstance(attribute, dict):
                    handle = str(attribute.get("handle_id") or "")
                    yield Holder(handle, part(attribute, "secondary"))

    def create_block(self, block: Block) -> Stored[Block]:
        """Store a new block. Raises AlreadyExistsError."""
        entry = self._store.create(
            _block_key(block.net), _object(_block_key(block.net), block.to_spec())
        )
        return Stored(entry, block)

    def write_block(self, stored: Stored[Block]) -> Stored[Block]:
        """Write what became of the block, under the next sequence number."""
        stored.thing.sequence += 1
        return Stored(self._update(stored.entry, stored.thing.to_spec()), stored.thing)

    @property
    def can_begin(self) -> bool:
        """Whether there is ``write_block_and_begin``."""
        return self._grouping is not None

    def write_block_and_begin(
        self, stored: Stored[Block], handles: Sequence[Handle]
    ) -> tuple[Stored[Block], list[Stored[Handle]]]:
        """``write_block`` and ``create_handle``, all or nothing.

        Raises AlreadyExistsError, with the ``handle_key`` of a handle that is there.
        """
        assert self._grouping is not None
        stored.thing.sequence += 1
        key, value, revision = stored.entry.key, stored.entry.value, stored.entry.revision
        entry, entries = self._grouping.update_with(
            key,
            {**value, "spec": stored.thing.to_spec()},
            revision,
            [_handle_object(handle) for handle in handles],
        )
        begun = [Stored(each, handle) for each, handle in zip(entries, handles, strict=True)]
        return Stored(entry, stored.thing), begun

    def delete_block(self, stored: Stored[Block]) -> None:
        """Delete the block."""
        self._store.delete(stored.entry.key, stored.entry.revision)

    # affinities

    def affinity(self, node: str, net: Net) -> Stored[Affinity] | None:
        """The node's claim on that block."""
        entry = self._get(_affinity_key(node, net))
        return None if entry is None else _affinity(entry)

    def affinities(self, node: str, type_: str = HOST) -> list[Stored[Affinity]]:
        """All claims of the node, in the order of their names."""
        found = [_affinity(entry) for entry in self._affinities(node)]
        return [s for s in found if s.thing.node == node and s.thing.type == type_]

    def claimed(self) -> set[Net]:
        """All blocks that anybody claims."""
        return {_affinity(entry).thing.net for entry in self._list("BlockAffinity", "")}

    def create_affinity(
        self, node: str, net: Net, state: str, type_: str = HOST
    ) -> Stored[Affinity]:
        """Store a new claim. Raises AlreadyExistsError."""
        key = _affinity_key(node, net)
        spec = {"state": state, "node": node, "type": type_, "cidr": str(net), "deleted": False}
        entry = self._store.create(key, _object(key, spec))
        return Stored(entry, Affinity(node, net, state, type_))

    def write_affinity(self, stored: Stored[Affinity], state: str) -> Stored[Affinity]:
        """Give the claim a state, and in any case a new revision."""
        entry = self._update(stored.entry, {**stored.entry.value["spec"], "state": state})
        return Stored(entry, replace(stored.thing, state=state))

    def delete_affinity(self, stored: Stored[Affinity]) -> None:
        """Delete the claim."""
        self._store.delete(stored.entry.key, stored.entry.revision)

    # handles

    def handle(self, id_: str) -> Stored[Handle] | None:
        """The handle."""
        entry = self._get(handle_key(id_))
        return None if entry is None else _handle(entry)

    def handles(self) -> Iterator[Stored[Handle]]:
        """All handles."""
        return map(_handle, self._list("IPAMHandle", ""))

    def create_handle(self, handle: Handle) -> Stored[Handle]:
        """Store a new handle. Raises AlreadyExistsError."""
        return Stored(self._store.create(*_handle_object(handle)), handle)

    def create_handles(self, handles: Sequence[Handle]) -> list[Stored[Handle] | StoreError]:
        """Store new handles; what became of each, AlreadyExistsError for one that is there."""
        outcomes = create_all(self._store, [_handle_object(handle) for handle in handles])
        return [
            outcome if isinstance(outcome, StoreError) else Stored(outcome, handle)
            for outcome, handle in zip(outcomes, handles, strict=True)
        ]

    def write_handle(self, stored: Stored[Handle], handle: Handle) -> Stored[Handle]:
        """Replace the handle."""
        return Stored(self._update(stored.entry, _handle_spec(handle)), handle)

    def delete_handle(self, stored: Stored[Handle]) -> None:
        """Delete the handle."""
        self._store.delete(stored.entry.key, stored.entry.revision)

    # any

    def _affinities(self, node: str) -> Iterator[Entry]:
        if isinstance(self._store, SelectingDatastore):
            return self._all_present(self._store.list_by_field("BlockAffinity", "spec.node", node))
        return self._list("BlockAffinity", f"{node}-")

    def _get(self, key: Key) -> Entry | None:
        try:
            return self._present(self._store.get(key))
        except NotFoundError:
            return None

    def _list(self, kind: str, prefix: str) -> Iterator[Entry]:
        return self._all_present(self._store.list(kind, prefix=prefix))

    def _all_present(self, listing: Listing) -> Iterator[Entry]:
        for entry in listing.entries:
            if present := self._present(entry):
                yield present

    def _present(self, entry: Entry) -> Entry | None:
        if not entry.value["spec"].get("deleted"):
            return entry
        self._store.delete(entry.key, entry.revision)
        return None

    def _update(self, entry: Entry, spec: JSON) -> Entry:
        return self._store.update(entry.key, {**entry.value, "spec": spec}, entry.revision)


def _object(key: Key, spec: JSON) -> JSON:
    return {
        "apiVersion": KINDS[key.kind].api_version,
        "kind": KINDS[key.kind].kind,
        "metadata": {"name": key.name},
        "spec": spec,
    }


def _block_key(net: Net) -> Key:
    return Key("IPAMBlock", cidr_name(net))


def _name_prefix(net: Net) -> str:
    """How the names of all blocks inside a network begin, as far as that is certain."""
    if net.version == V4:
        groups = str(net).split(".")[: net.length // 8]
    else:
        # Up to the first zero: from there on a run of zeros may be left out, or not.
        words = [net.address >> shift & 0xFFFF for shift in range(112, -1, -16)]
        groups = [f"{word:x}" for word in takewhile(bool, words[: net.length // 16])]
    return "".join(f"{group}-" for group in groups)


def _affinity_key(node: str, net: Net) -> Key:
    return Key("BlockAffinity", f"{node}-{cidr_name(net)}")


def handle_key(id_: str) -> Key:
    """The name of the object of a handle."""
    return Key("IPAMHandle", id_.lower())


def _block(entry: Entry) -> Stored[Block]:
    return Stored(entry, Block.from_spec(entry.key.name, entry.value["spec"]))


def _affinity(entry: Entry) -> Stored[Affinity]:
    spec = entry.value["spec"]
    state = spec.get("state") or CONFIRMED  # as the oldest versions of Calico wrote it
    affinity = Affinity(spec["node"], net_of(spec["cidr"]), state, spec.get("type") or HOST)
    return Stored(entry, affinity)


def _handle(entry: Entry) -> Stored[Handle]:
    spec = entry.value["spec"]
    counts = {net_of(cidr): count for cidr, count in (spec.get("block") or {}).items()}
    return Stored(entry, Handle(spec["handleID"], counts))


def _handle_object(handle: Handle) -> tuple[Key, JSON]:
    key = handle_key(handle.id)
    return key, _object(key, _handle_spec(handle))


def _handle_spec(handle: Handle) -> JSON:
    return {
        "handleID": handle.id,
        "block": {str(net): count for net, count in handle.counts.items()},
        "deleted": False,
    }
