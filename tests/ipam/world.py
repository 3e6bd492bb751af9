"""Stores with pools in them, and a store whose user dies or is overtaken between two writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from api.net import Net, parse_net
from datastore.interface import JSON, Datastore, Entry, Event, Key, Listing, StoreError, Watch
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator
from ipam.block import Block
from ipam.records import CONFIRMED, Affinity, Handle, Records, owner

T = TypeVar("T")


def add_pool(store: Datastore, name: str, cidr: str, block_size: int, **spec: Any) -> None:
    """Create an IPPool; ``spec`` in JSON names."""
    store.create(
        Key("IPPool", name),
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "IPPool",
            "metadata": {"name": name},
            "spec": {"cidr": cidr, "blockSize": block_size, **spec},
        },
    )


def configure(store: Datastore, **spec: Any) -> None:
    """Create the IPAMConfiguration; ``spec`` in JSON names."""
    store.create(
        Key("IPAMConfiguration", "default"),
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "IPAMConfiguration",
            "metadata": {"name": "default"},
            "spec": spec,
        },
    )


def reserve(store: Datastore, *cidrs: str) -> None:
    """Create an IPReservation."""
    store.create(
        Key("IPReservation", f"r-{'-'.join(cidrs).replace('/', '-').replace(':', '-')}"),
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "IPReservation",
            "metadata": {"name": "r"},
            "spec": {"reservedCIDRs": list(cidrs)},
        },
    )


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that must come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def until_heard(allocator: Allocator, store: Datastore) -> None:
    """Until an allocator that follows the store has heard of all that was written before."""
    fence = parse_net("192.0.2.0/26")  # of a node that nobody asks about
    Records(store).create_affinity("fence", fence, CONFIRMED)
    until(lambda: fence in allocator.claimed())


class Died(BaseException):
    """The program was killed here. No ``except`` of the program may stop it."""


class Interposed:
    """A client of a store, at each of whose calls something can happen.

    ``before`` and ``after`` are called around every write with the number of writes before it,
    ``call`` before every call, reads too, with the number of calls before it.
    ``reads`` counts calls that read.
    """

    def __init__(
        self,
        store: Datastore,
        *,
        before: Callable[[int], object] = lambda number: None,
        after: Callable[[int], object] = lambda number: None,
        call: Callable[[int], object] = lambda number: None,
    ) -> None:
        self._store = store
        self._before = before
        self._after = after
        self._call = call
        self.calls = 0
        self.listed: list[str] = []
        self.writes = 0
        self.reads = 0

    @property
    def given(self) -> frozenset[str]:
        return self._store.given

    def get(self, key: Key) -> Entry:
        self._read()
        return self._store.get(key)

    def list(self, kind: str, namespace: str | None = None, prefix: str = "") -> Listing:
        self._read()
        self.listed.append(kind)
        return self._store.list(kind, namespace, prefix)

    def create(self, key: Key, value: JSON) -> Entry:
        return self._write(lambda: self._store.create(key, value))

    def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
        return self._write(lambda: self._store.update(key, value, revision))

    def delete(self, key: Key, revision: str | None = None) -> Entry:
        return self._write(lambda: self._store.delete(key, revision))

    def watch(self, kinds: Iterable[str], revision: str | Mapping[str, str]) -> Watch:
        return self._store.watch(kinds, revision)

    def close(self) -> None:
        self._store.close()

    def _read(self) -> None:
        self.reads += 1
        self._called()

    def _called(self) -> None:
        number = self.calls
        self.calls += 1
        self._call(number)

    def _write(self, write: Callable[[], T]) -> T:
        self._called()
        number = self.writes
        self._before(number)
        entry = write()
        self.writes += 1
        self._after(number)
        return entry


class Remembering(Interposed):
    """A client that hears of changes, so that its user may remember what it read before.

    ``late``: it hears of them only when told to, by ``hear``; else at once.
    """

    prompt = True  # as SqliteDatastore says of itself

    def __init__(self, store: Datastore, *, late: bool, **hooks: Callable[[int], object]) -> None:
        super().__init__(store, **hooks)
        self._late = late
        self._watches: list[LateWatch] = []

    def watch(self, kinds: Iterable[str], revision: str | Mapping[str, str]) -> Watch:
        watch = LateWatch(super().watch(kinds, revision), 0 if self._late else None)
        self._watches.append(watch)
        return watch

    def hear(self, count: int | None) -> None:
        """Of so many of the changes it has not heard of yet; None: of all there are."""
        for watch in self._watches:
            watch.hear(count)


class Grouping(Remembering):
    """One whose store writes several objects in one go: nobody dies in the midst of that."""

    def __init__(
        self, store: SqliteDatastore, *, late: bool, **hooks: Callable[[int], object]
    ) -> None:
        super().__init__(store, late=late, **hooks)
        self._sqlite = store

    def get_all(self, keys: Sequence[Key]) -> Sequence[Entry | StoreError]:
        self._read()
        return self._sqlite.get_all(keys)

    def create_all(self, objects: Sequence[tuple[Key, JSON]]) -> Sequence[Entry | StoreError]:
        return self._write(lambda: self._sqlite.create_all(objects))

    def update_with(
        self, key: Key, value: JSON, revision: str, objects: Sequence[tuple[Key, JSON]]
    ) -> tuple[Entry, Sequence[Entry]]:
        return self._write(lambda: self._sqlite.update_with(key, value, revision, objects))


class LateWatch:
    """A watch that tells only what it may. ``count`` None: everything, at once."""

    def __init__(self, watch: Watch, count: int | None) -> None:
        self._watch = watch
        self._at_once = count is None
        self._may_tell = count or 0
        self._held: list[Event] = []

    def hear(self, count: int | None) -> None:
        """Let it tell so many more; None: all that there are now."""
        self._collect()
        self._may_tell += len(self._held) if count is None else count

    def next(self, timeout: float | None = None) -> Sequence[Event]:
        self._collect()
        count = len(self._held) if self._at_once else min(self._may_tell, len(self._held))
        told, self._held = self._held[:count], self._held[count:]
        self._may_tell -= count
        return told

    def close(self) -> None:
        self._watch.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _collect(self) -> None:
        while events := self._watch.next(0):
            self._held += events


def dies_after(store: Datastore, writes: int) -> Interposed:
    """Lets that many writes through; the user dies right after the last of them."""

    def before(number: int) -> None:
        if number >= writes:
            raise Died

    def after(number: int) -> None:
        if number + 1 >= writes:
            raise Died

    return Interposed(store, before=before, after=after)


def overtaken_at(store: Datastore, write: int, action: Callable[[], object]) -> Interposed:
    """Somebody else does ``action`` just before the write of that number."""

    def before(number: int) -> None:
        if number == write and not done:
            done.append(number)
            action()

    done: list[int] = []
    return Interposed(store, before=before)


def blocks(store: Datastore) -> dict[Net, Block]:
    return {stored.thing.net: stored.thing for stored in Records(store).blocks()}


def handles(store: Datastore, prefix: str = "") -> dict[str, Handle]:
    entries = store.list("IPAMHandle", prefix=prefix).entries
    found = [Records(store).handle(entry.value["spec"]["handleID"]) for entry in entries]
    return {stored.thing.id: stored.thing for stored in found if stored}


def affinities(store: Datastore) -> list[Affinity]:
    return [
        Affinity(spec["node"], parse_net(spec["cidr"]), spec["state"])
        for spec in (entry.value["spec"] for entry in store.list("BlockAffinity").entries)
    ]


def allocated(store: Datastore) -> dict[Net, str]:
    """Every address in use, and the handle that has it."""
    return {
        block.address(ordinal): block.attributes[index]["handle_id"]
        for block in blocks(store).values()
        for ordinal, index in enumerate(block.allocations)
        if index is not None and "handle_id" in block.attributes[index]
    }


def check_consistency(store: Datastore) -> None:
    """What holds at every moment, also between any two writes of anybody."""
    by_net = blocks(store)
    claimed = {claim.net for claim in affinities(store) if claim.state == CONFIRMED}
    # A block being claimed, by one who does not yet know that the pool has another block size,
    # may lie over others for a moment; nobody takes addresses from it.
    nets = sorted(net for net, block in by_net.items() if net in claimed or not block.empty)
    for one, other in pairwise(nets):
        assert not one.overlaps(other)
    for claim in affinities(store):
        if claim.state == CONFIRMED:
            assert by_net[claim.net].affinity == owner(claim.node), claim
    counted = handles(store)
    for net, block in by_net.items():
        for attribute in block.attributes:
            if "releasedAt" in attribute:
                continue
            handle = attribute["handle_id"]
            assert counted[handle].counts[net] >= len(block.held_by(handle))
