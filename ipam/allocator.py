"""Addresses for a node: taken from its own blocks, from a block it claims, or borrowed.

Every step is a compare-and-swap, in an order in which a crash between any two leaves nothing
that the next ``assign`` or ``release`` would not put right:

- assign: handle counted up → address taken in the block.
- release: addresses given back in the block → handle deleted.

An address is found through its handle, so none can be lost; it is taken by a swap of its
block, so none can be given twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from api.ipam import IPAMConfigurationSpec
from api.net import Net, format_address
from datastore.interface import ConflictError, Datastore, NotFoundError
from ipam import claims, handles
from ipam.block import AssignedError, Block, ReleaseError
from ipam.errors import (
    AddressInUseError,
    AddressUnusableError,
    BlockLimitError,
    ContentionError,
    IpamError,
    NoPoolError,
    PoolExhaustedError,
)
from ipam.pools import Labels, Pool, Pools, Request
from ipam.records import ATTEMPTS, CONFIRMED, Records, Stored, owner

__all__ = [
    "AddressInUseError",
    "AddressUnusableError",
    "Allocator",
    "Assignment",
    "BlockLimitError",
    "ContentionError",
    "IpamError",
    "NoPoolError",
    "PoolExhaustedError",
    "ReleaseError",
]

MAX_BLOCKS = 20  # of a node in the pools of a request, unless maxBlocksPerHost says otherwise
RECLAIM_AFTER = timedelta(minutes=1)  # an empty block of another node is taken over
_BORROW_FROM = 16  # blocks to try to borrow from, in each pool


@dataclass(frozen=True, slots=True)
class Assignment:
    """An address (a /32 or /128), the block it comes from, and the name of its pool."""

    address: Net
    block: Net
    pool: str


@dataclass(frozen=True, slots=True)
class _Wanted:
    handle: str
    attributes: Mapping[str, str]


class Allocator:
    """IPAM of one node. Safe to use from several threads; any number may work on one store.

    Every method may raise StoreError (the store did not answer) and InvalidObjectError (what
    it holds makes no sense); a ``release`` of the handle then puts right what was half done.
    """

    def __init__(self, store: Datastore, node: str) -> None:
        self.node = node
        self._records = Records(store)
        self._pools = Pools(store)
        self._owner = owner(node)
        self._last: Net | None = None  # the block of the last success: tried first
        # Threads of one node want the same block, and would only repeat each other's swaps.
        self._lock = threading.Lock()

    def assign(
        self,
        handle: str,
        attributes: Mapping[str, str],
        *,
        version: int = 4,
        pools: Sequence[str] = (),
        use: str = "Workload",
        labels: Labels | None = None,
        namespace_labels: Labels | None = None,
    ) -> Assignment:
        """One more address for ``handle``, whatever it holds already.

        ``pools``: names or CIDRs of the pools to use, instead of those that select the node.
        ``labels``: the node's; read from its Node object when None and needed.
        ``namespace_labels``: without them, pools with a namespaceSelector are left out.
        Raises NoPoolError, PoolExhaustedError, BlockLimitError, ContentionError.
        """
        request = Request(
            node=self.node,
            version=version,
            use=use,
            pools=pools,
            node_labels=lambda: self._records.node_labels(self.node) if labels is None else labels,
            namespace_labels=namespace_labels,
        )
        wanted = _Wanted(handle, attributes)
        with self._lock:
            usable = self._pools.usable(request)
            own = self._own_blocks(usable)
            for net, pool, confirmed in own:
                if found := self._from_own(net, pool, confirmed, wanted):
                    return found
            return self._from_other(usable, len(own), wanted)

    def assign_specific(
        self, address: Net, handle: str, attributes: Mapping[str, str]
    ) -> Assignment:
        """This very address for ``handle``; its block is claimed when nobody has it.

        Raises AddressInUseError, AddressUnusableError, ContentionError.
        """
        text = format_address(address.version, address.address)
        with self._lock:
            pool = self._pool_of(address)
            strict = self._records.configuration().strict_affinity
            for _ in range(ATTEMPTS):
                stored = self._block_of(address, pool)
                if stored is None:
                    continue  # another node claimed it before us: now it is there
                block = stored.thing
                if strict and block.affinity != self._owner:
                    raise AddressUnusableError(
                        f"{text}: its block {block.net} belongs to {block.affinity or 'no node'},"
                        f" and strictAffinity keeps node {self.node} out; ask for an address of"
                        " this node's blocks, or set strictAffinity to false"
                    )
                try:
                    block.take_address(address, handle, attributes)
                except AssignedError:
                    holder = block.holder(address) or {}
                    raise AddressInUseError(
                        f"{text}: is held by {holder.get('handle_id') or 'nobody known'}"
                        f" {holder.get('secondary') or ''}; release it first, or ask for another"
                    ) from None
                if self._write(stored, handle):
                    return Assignment(address, block.net, pool.name)
        raise _contended(text)

    def release(self, handle: str) -> list[Net]:
        """Give back all addresses of a handle; returns them. Harmless when it has none."""
        released: list[Net] = []
        with self._lock:
            for _ in range(ATTEMPTS):
                stored = self._records.handle(handle)
                if stored is None or stored.thing.id != handle:
                    return released
                for net in stored.thing.counts:
                    released += self._release_in(net, handle)
                try:
                    self._records.delete_handle(stored)
                except (ConflictError, NotFoundError):
                    continue
        raise _contended(handle)

    def release_addresses(
        self,
        addresses: Iterable[Net],
        *,
        handle: str | None = None,
        sequences: Mapping[Net, int] | None = None,
    ) -> list[Net]:
        """Give back some addresses; returns those that were in use.

        ``handle``: who must hold them. ``sequences``: at which sequence number of its block
        (``Block.sequences``) an address must have been allocated. In a block of which one address
        is another's, or was given anew since, nothing is released: raises ReleaseError, when the
        other blocks are done.
        """
        by_block: dict[Net, list[Net]] = {}
        for address in dict.fromkeys(addresses):
            if stored := claims.block_holding(self._records, address):
                by_block.setdefault(stored.thing.net, []).append(address)
        released: list[Net] = []
        problem: ReleaseError | None = None
        with self._lock:
            for net, wanted in by_block.items():
                try:
                    released += self._release_some(net, wanted, handle, sequences or {})
                except ReleaseError as error:
                    problem = error
        if problem is not None:
            raise problem
        return released

    def addresses(self, handle: str) -> list[Net]:
        """The addresses a handle holds, of both families."""
        stored = self._records.handle(handle)
        if stored is None or stored.thing.id != handle:
            return []
        blocks = [self._records.block(net) for net in stored.thing.counts]
        return [address for block in blocks if block for address in block.thing.held_by(handle)]

    def _own_blocks(self, usable: Sequence[Pool]) -> list[tuple[Net, Pool, bool]]:
        """The node's blocks in these pools, with whether the claim is confirmed."""
        own = [
            (stored.thing.net, pool, stored.thing.state == CONFIRMED)
            for stored in self._records.affinities(self.node)
            for pool in usable
            if pool.net.contains(stored.thing.net)
        ]
        order = {pool: place for place, pool in enumerate(usable)}
        return sorted(own, key=lambda block: (block[0] != self._last, order[block[1]]))

    def _from_own(
        self, net: Net, pool: Pool, confirmed: bool, wanted: _Wanted
    ) -> Assignment | None:
        stored = self._records.block(net) if confirmed else None
        if stored is None or stored.thing.affinity != self._owner:
            stored = claims.claim(self._records, self.node, net)  # it was left half-done
        if stored is None:
            return None
        return self._take(stored, pool, wanted, only_for=self._owner)

    def _from_other(self, usable: Sequence[Pool], own: int, wanted: _Wanted) -> Assignment:
        """From a new block, from an empty one of another node, or borrowed."""
        configuration = self._records.configuration()
        limit = configuration.max_blocks_per_host or MAX_BLOCKS
        if own >= limit:
            raise BlockLimitError(
                f"node {self.node}: its {own} blocks in {_names(usable)} are full, and"
                f" it may have no more than {limit}; raise maxBlocksPerHost in the"
                " IPAMConfiguration 'default', or run fewer pods on this node"
            )
        if not configuration.auto_allocate_blocks:
            raise PoolExhaustedError(
                f"node {self.node}: its blocks in {_names(usable)} are full, and"
                " autoAllocateBlocks is false in the IPAMConfiguration 'default'"
            )
        for attempt in self._attempts(usable, configuration, wanted):
            if attempt is not None:
                return attempt
        strict = " of this node (strictAffinity)" if configuration.strict_affinity else ""
        raise PoolExhaustedError(
            f"node {self.node}: pool {_names(usable)} has no free address{strict}: every block"
            " is taken; create another IPPool, or find what holds them with: manxctl ipam show"
        )

    def _attempts(
        self, usable: Sequence[Pool], configuration: IPAMConfigurationSpec, wanted: _Wanted
    ) -> Iterator[Assignment | None]:
        reclaimable: list[tuple[Pool, Net, str]] = []
        borrowable: list[tuple[Pool, Net]] = []
        for pool in usable:
            in_pool = len(borrowable)
            for net in pool.blocks(self.node):
                stored = self._records.block(net)
                if stored is None or stored.thing.affinity == self._owner:
                    yield self._claim_and_take(net, pool, wanted)
                elif host := _deserted(stored.thing):
                    reclaimable.append((pool, net, host))
                elif stored.thing.unallocated and len(borrowable) - in_pool < _BORROW_FROM:
                    borrowable.append((pool, net))
        for pool, net, host in reclaimable:
            if claims.release(self._records, host, net, only_empty=True):
                yield self._claim_and_take(net, pool, wanted)
        if not configuration.strict_affinity:
            for pool, net in borrowable:
                if stored := self._records.block(net):
                    yield self._take(stored, pool, wanted)

    def _claim_and_take(self, net: Net, pool: Pool, wanted: _Wanted) -> Assignment | None:
        stored = claims.claim(self._records, self.node, net)
        if stored is None:
            return None
        return self._take(stored, pool, wanted, only_for=self._owner)

    def _take(
        self, stored: Stored[Block], pool: Pool, wanted: _Wanted, *, only_for: str | None = None
    ) -> Assignment | None:
        """An address of this block; None when it is full, gone, or no longer ``only_for``'s."""
        current: Stored[Block] | None = stored
        net = stored.thing.net
        for _ in range(ATTEMPTS):
            if current is None or (only_for and current.thing.affinity != only_for):
                return None
            taken = current.thing.take(1, wanted.handle, wanted.attributes)
            if not taken:
                return None
            if self._write(current, wanted.handle):
                self._last = net
                return Assignment(taken[0], net, pool.name)
            current = self._records.block(net)
        raise _contended(f"block {net}")

    def _write(self, stored: Stored[Block], handle: str) -> bool:
        """Count the handle up, write the block; False when somebody else changed it.

        When the store fails in another way the outcome is unknown, so the handle stays counted.
        """
        net = stored.thing.net
        handles.increment(self._records, handle, net)
        try:
            self._records.write_block(stored)
        except (ConflictError, NotFoundError):
            handles.decrement(self._records, handle, net)
            return False
        return True

    def _release_in(self, net: Net, handle: str) -> list[Net]:
        for _ in range(ATTEMPTS):
            stored = self._records.block(net)
            if stored is None:
                return []
            released = stored.thing.release_handle(handle)
            try:
                if stored.thing.empty and stored.thing.affinity is None:
                    self._records.delete_block(stored)
                else:
                    # Also when nothing was released: an assign for this handle that has
                    # counted it up, and was overtaken by us, must fail and begin again.
                    self._records.write_block(stored)
            except (ConflictError, NotFoundError):
                continue
            return released
        raise _contended(f"block {net}")

    def _release_some(
        self, net: Net, addresses: Sequence[Net], handle: str | None, sequences: Mapping[Net, int]
    ) -> list[Net]:
        for _ in range(ATTEMPTS):
            stored = self._records.block(net)
            if stored is None:
                return []
            # All are looked at before the first is given back.
            trial = Block.from_spec(stored.entry.key.name, stored.thing.to_spec())
            results = [
                block.release([address], handle=handle, sequence=sequences.get(address))
                for block in (trial, stored.thing)
                for address in addresses
            ][len(addresses) :]
            released = [address for result in results for address in result.addresses]
            if not released:
                return []
            try:
                if stored.thing.empty and stored.thing.affinity is None:
                    self._records.delete_block(stored)
                else:
                    self._records.write_block(stored)
            except (ConflictError, NotFoundError):
                continue
            for result in results:
                for holder, count in result.by_handle.items():
                    for _ in range(count):
                        handles.decrement(self._records, holder, net)
            return released
        raise _contended(f"block {net}")

    def _pool_of(self, address: Net) -> Pool:
        pools = [pool for pool in self._pools.all() if pool.net.contains(address)]
        for pool in pools:
            if not pool.disabled:
                return pool
        text = format_address(address.version, address.address)
        reason = f"its pool {pools[0]} is disabled" if pools else "it lies in no IPPool"
        raise AddressUnusableError(f"{text}: {reason}; ask for an address of a pool in use")

    def _block_of(self, address: Net, pool: Pool) -> Stored[Block] | None:
        """The block of an address, claimed if need be; None when somebody was faster."""
        net = pool.block_of(address)
        stored = self._records.block(net)
        if stored is not None:
            return stored
        others = list(claims.overlapping(self._records, net))
        for other in others:
            if other.thing.net.contains(address):
                return other
        if others:
            raise AddressUnusableError(
                f"{format_address(address.version, address.address)}: its block {net} can't be"
                f" made, because there are smaller ones in it ({others[0].thing.net}) from a time"
                f" when pool {pool} had another blockSize; ask for another address"
            )
        return claims.claim(self._records, self.node, net)


def _deserted(block: Block) -> str | None:
    """The node whose empty block it has been for so long that another may have it."""
    if block.affinity is None or not block.affinity.startswith("host:") or not block.empty:
        return None
    if block.claimed is not None:
        claimed = datetime.fromisoformat(block.claimed)
        if datetime.now(UTC) - claimed < RECLAIM_AFTER:
            return None
    return block.affinity.removeprefix("host:")


def _names(pools: Sequence[Pool]) -> str:
    return ", ".join(map(str, pools))


def _contended(what: str) -> ContentionError:
    return ContentionError(f"{what}: changed by others {ATTEMPTS} times while we tried; try again")
