"""Addresses for a node: taken from its own blocks, from a block it claims, or borrowed.

Every step is a compare-and-swap, in an order in which a crash between any two leaves nothing
that the next ``assign`` or ``release`` would not put right:

- assign: handle counted up → address taken in the block.
- release: addresses given back in the block → handle deleted.

An address is found through its handle, so none can be lost; it is taken by a swap of its
block, so none can be given twice.

An assign from a block of the node's that is remembered, while the store is followed, is those
two writes and no read. Threads that want the same block are served by one write (``writer``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from api.net import Net, format_address
from datastore.interface import Datastore
from ipam import claims
from ipam.block import Block, Cooldown, ReleaseError
from ipam.errors import (
    AddressInUseError,
    AddressUnusableError,
    BlockLimitError,
    ContentionError,
    IpamError,
    NoPoolError,
    PoolExhaustedError,
)
from ipam.handles import Handles
from ipam.locks import KeyedLocks
from ipam.pools import Labels, Pool, Request, usable
from ipam.records import (
    ATTEMPTS,
    CONFIRMED,
    HOST,
    LOAD_BALANCER,
    VIRTUAL,
    Records,
    Stored,
    owner,
)
from ipam.search import Search, deserted
from ipam.view import View
from ipam.writer import BlockWriter, GiveBack, GiveBackSome, Offer, Take

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
_BORROW_FROM = 16  # blocks to try to borrow from
_WRITERS = 64  # blocks that are remembered


@dataclass(frozen=True, slots=True)
class Assignment:
    """An address (a /32 or /128), the block it comes from, and the name of its pool."""

    address: Net
    block: Net
    pool: str


class _Owner:
    """Whose blocks they are: the node's, or those of all load balancers."""

    def __init__(self, records: Records, node: str, type_: str) -> None:
        self.node = node
        self.type = type_
        self.affinity = owner(node, type_)
        self.search = Search(records, node, self.affinity)
        self.last: dict[int, Net] = {}  # by version: the block of the last success, tried first
        self.turn = threading.Lock()  # of the thread that looks for another block
        self.found = 0  # blocks since the start


@dataclass(frozen=True, slots=True)
class _Wanted:
    handle: str
    attributes: Mapping[str, str]
    owner: _Owner
    view: View
    reserved: Sequence[Net]


class Allocator:
    """IPAM of one node. Safe to use from several threads; any number may work on one store.

    ``follow``: between ``start`` and ``stop``, the store is followed instead of being asked for
    pools and claims each time. A request is never refused for what was only remembered.

    Every method may raise StoreError (the store did not answer) and InvalidObjectError (what
    it holds makes no sense); a ``release`` of the handle then puts right what was half done.
    """

    def __init__(self, store: Datastore, node: str, *, follow: bool = False) -> None:
        self.node = node
        self._records = Records(store)
        self._handles = Handles(self._records)
        self._now = View(store, self._records)
        self._view = View(store, self._records, follow=follow)
        self._host = _Owner(self._records, node, HOST)
        self._load_balancer = _Owner(self._records, LOAD_BALANCER, VIRTUAL)
        self._locks = KeyedLocks()  # by handle
        self._writers: OrderedDict[Net, BlockWriter] = OrderedDict()
        self._writers_lock = threading.Lock()

    def start(self) -> None:
        """Begin to follow the store, if so wished."""
        self._view.start()

    def stop(self) -> None:
        """Follow it no longer."""
        self._view.stop()

    @property
    def following(self) -> bool:
        """Whether the store is followed at this moment."""
        return self._view.remembers

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
        ``use``: ``Workload``, ``Tunnel``, or ``LoadBalancer``, which has blocks of its own.
        ``labels``: the node's; read from its Node object when None and needed.
        ``namespace_labels``: without them, pools with a namespaceSelector are left out.
        Raises NoPoolError, PoolExhaustedError, BlockLimitError, ContentionError.
        """
        [assignment] = self.assign_many(
            1,
            handle,
            attributes,
            version=version,
            pools=pools,
            use=use,
            labels=labels,
            namespace_labels=namespace_labels,
        )
        return assignment

    def assign_many(
        self,
        count: int,
        handle: str,
        attributes: Mapping[str, str],
        *,
        version: int = 4,
        pools: Sequence[str] = (),
        use: str = "Workload",
        labels: Labels | None = None,
        namespace_labels: Labels | None = None,
    ) -> list[Assignment]:
        """``count`` more addresses for ``handle``, or none: as ``assign`` does."""
        request = Request(
            node=self.node,
            version=version,
            use=use,
            pools=pools,
            node_labels=lambda: self._records.node_labels(self.node) if labels is None else labels,
            namespace_labels=namespace_labels,
        )
        with self._locks.hold(handle):
            if self._view.remembers:
                try:
                    return self._assign(self._view, request, count, handle, attributes)
                except IpamError:
                    self._view.forget()  # and see if it is still so
            return self._assign(self._now, request, count, handle, attributes)

    def assign_specific(
        self,
        address: Net,
        handle: str,
        attributes: Mapping[str, str],
        *,
        use: str | None = None,
    ) -> Assignment:
        """This very address for ``handle``; its block is claimed when nobody has it.

        ``use``: what the pool must be for; None: whatever it is for. Reservations don't count.
        Raises AddressInUseError, AddressUnusableError, ContentionError.
        """
        with self._locks.hold(handle):
            pool = self._pool_of(address, use)
            wanted = _Wanted(handle, attributes, self._owner(use), self._now, ())
            try:
                return self._assign_specific(address, pool, wanted)
            finally:
                self._handles.settle(handle)

    def release(self, handle: str) -> list[Net]:
        """Give back all addresses of a handle; returns them. Harmless when it has none."""
        released: list[Net] = []
        with self._locks.hold(handle):
            for attempt in range(ATTEMPTS):
                stored = self._handles.get(handle, fresh=attempt > 0)
                if stored is None:
                    break
                for net in stored.thing.counts:
                    wish = GiveBack(handle)
                    self._writer(net).run(wish)
                    released += wish.released
                if self._handles.delete(stored):
                    break
            else:
                raise _contended(handle)
        self._note_released(released)
        return released

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
        for net, wanted in by_block.items():
            wish = GiveBackSome(wanted, handle, sequences or {})
            try:
                self._writer(net).run(wish)
            except ReleaseError as error:
                problem = error
                continue
            released += wish.released.addresses
            for holder in wish.released.by_handle:
                with self._locks.hold(holder):
                    self._handles.recount(holder)
        self._note_released(released)
        if problem is not None:
            raise problem
        return released

    def addresses(self, handle: str) -> list[Net]:
        """The addresses a handle holds, of both families."""
        stored = self._handles.get(handle)
        if stored is None:
            return []
        blocks = [self._records.block(net) for net in stored.thing.counts]
        return [address for block in blocks if block for address in block.thing.held_by(handle)]

    # assign

    def _assign(
        self,
        view: View,
        request: Request,
        count: int,
        handle: str,
        attributes: Mapping[str, str],
    ) -> list[Assignment]:
        wanted = _Wanted(handle, attributes, self._owner(request.use), view, view.reservations())
        found: list[Assignment] = []
        try:
            for _ in range(ATTEMPTS):
                found += self._assign_once(request, count - len(found), wanted)
                if len(found) == count:
                    return found
            raise _contended(", ".join(map(str, view.pools())))
        except IpamError:
            if found:
                self._give_back(found, handle)
            raise
        finally:
            self._handles.settle(handle)

    def _assign_once(self, request: Request, count: int, wanted: _Wanted) -> list[Assignment]:
        """Up to ``count`` addresses; perhaps none, when others were quicker."""
        found_before = wanted.owner.found
        pools = usable(wanted.view.pools(), request)
        own = self._own_blocks(pools, request.version, wanted)
        found: list[Assignment] = []
        for net, pool, confirmed in own:
            found += self._from_own(net, pool, confirmed, count - len(found), wanted)
            if len(found) == count:
                return found
        with wanted.owner.turn:
            if found_before != wanted.owner.found:
                return found  # another thread found a block meanwhile
            try:
                return found + self._from_other(request, pools, own, count - len(found), wanted)
            except IpamError:
                if found:
                    self._give_back(found, wanted.handle)
                raise

    def _own_blocks(
        self, pools: Sequence[Pool], version: int, wanted: _Wanted
    ) -> list[tuple[Net, Pool, bool]]:
        """The owner's blocks in these pools, with whether the claim is confirmed."""
        own = [
            (claim.net, pool, claim.state == CONFIRMED)
            for claim in wanted.view.claims(wanted.owner.node, wanted.owner.type)
            for pool in pools
            if pool.net.contains(claim.net)
        ]
        last = wanted.owner.last.get(version)
        order = {pool: place for place, pool in enumerate(pools)}
        return sorted(own, key=lambda block: (block[0] != last, order[block[1]]))

    def _from_own(
        self, net: Net, pool: Pool, confirmed: bool, count: int, wanted: _Wanted
    ) -> list[Assignment]:
        if confirmed:
            found = self._take(net, pool, count, wanted, only_for=wanted.owner.affinity)
            if found or self._writer(net).affinity == wanted.owner.affinity:
                return found
        return self._claim_and_take(net, pool, count, wanted)  # it was left half-done

    def _from_other(
        self,
        request: Request,
        pools: Sequence[Pool],
        own: Sequence[tuple[Net, Pool, bool]],
        count: int,
        wanted: _Wanted,
    ) -> list[Assignment]:
        """From a new block, from an empty one of another node, or borrowed."""
        configuration = wanted.view.configuration()
        limit = configuration.max_blocks_per_host or MAX_BLOCKS
        if wanted.owner is self._host and len(own) >= limit:
            raise BlockLimitError(
                f"node {self.node}: its {len(own)} blocks in {_names(pools)} are full, and"
                f" it may have no more than {limit}; raise maxBlocksPerHost in the"
                " IPAMConfiguration 'default', or run fewer pods on this node"
            )
        if not configuration.auto_allocate_blocks:
            raise PoolExhaustedError(
                f"node {self.node}: its blocks in {_names(pools)} are full, and"
                " autoAllocateBlocks is false in the IPAMConfiguration 'default'"
            )
        self._give_up_unselected(request, wanted)
        for pool in pools:
            for net in wanted.owner.search.free(wanted.view, pool, wanted.reserved):
                if found := self._claim_and_take(net, pool, count, wanted):
                    return found
        strict = configuration.strict_affinity
        if found := self._from_blocks_of_others(pools, strict, count, wanted):
            return found
        raise PoolExhaustedError(
            f"node {self.node}: pool {_names(pools)} has no free address"
            f"{' of this node (strictAffinity)' if strict else ''}: every block is taken;"
            " create another IPPool, or find what holds them with: manxctl ipam show"
        )

    def _from_blocks_of_others(
        self, pools: Sequence[Pool], strict: bool, count: int, wanted: _Wanted
    ) -> list[Assignment]:
        """From a deserted block, which becomes ours; else, unless ``strict``, borrowed."""
        samples = [(pool, wanted.owner.search.of_others(pool)) for pool in pools]
        for _ in range(2):  # some of each pool, then all
            others = [(pool, stored) for pool, sample in samples for stored in next(sample, ())]
            cooldown = self._cooldown()
            for pool, stored in others:
                if stored.thing.collect(cooldown) and stored.thing.empty:
                    stored = self._records.write_block(stored)
                host = deserted(stored.thing, cooldown)
                net = stored.thing.net
                if (
                    host
                    and claims.release(self._records, host, net, only_empty=True)
                    and (found := self._claim_and_take(net, pool, count, wanted))
                ):
                    return found
            if strict:
                continue
            open_ = [(p, s) for p, s in others if s.thing.free(wanted.reserved)]
            for pool, stored in open_[:_BORROW_FROM]:
                if found := self._take(stored.thing.net, pool, count, wanted):
                    return found
        return []

    def _give_up_unselected(self, request: Request, wanted: _Wanted) -> None:
        """Empty blocks of the node in pools that no longer select it are for others."""
        if wanted.owner is not self._host:
            return
        pools = [pool for pool in wanted.view.pools() if pool.node_selector and not pool.disabled]
        if not pools:
            return
        labels = request.node_labels()
        for claim in wanted.view.claims(self.node, HOST):
            if any(pool.net.contains(claim.net) and not pool.selects(labels) for pool in pools):
                stored = self._records.block(claim.net)
                if stored is None or stored.thing.empty:
                    claims.release(self._records, self.node, claim.net, only_empty=True)
                    wanted.view.forget_claims(self.node)

    def _claim_and_take(
        self, net: Net, pool: Pool, count: int, wanted: _Wanted
    ) -> list[Assignment]:
        stored = claims.claim(self._records, wanted.owner.node, net, type_=wanted.owner.type)
        wanted.view.forget_claims(wanted.owner.node)
        if stored is None:
            return []
        wanted.owner.found += 1
        self._writer(net).adopt(stored)
        return self._take(net, pool, count, wanted, only_for=wanted.owner.affinity)

    def _take(
        self, net: Net, pool: Pool, count: int, wanted: _Wanted, *, only_for: str | None = None
    ) -> list[Assignment]:
        """Addresses of this block; none when it is full, gone, or no longer ``only_for``'s."""
        writer = self._writer(net)

        def wish(offer: Offer) -> Take:
            return Take(offer, wanted.handle, wanted.attributes, only_for, wanted.reserved)

        taken = self._count_and_take(
            writer,
            lambda: writer.offer(count, only_for=only_for, reserved=wanted.reserved),
            wish,
            wanted.handle,
        )
        if taken:
            wanted.owner.last[net.version] = net
        return [Assignment(address, net, pool.name) for address in taken]

    def _count_and_take(
        self,
        writer: BlockWriter,
        offered: Callable[[], Offer | None],
        wish: Callable[[Offer], Take],
        handle: str,
    ) -> list[Net]:
        """Count the handle up, take the addresses; what was not taken is counted back.

        When the store fails the outcome is unknown, so the handle stays counted.
        """
        counted = 0
        for _ in range(ATTEMPTS):
            offer = offered()
            if offer is None:
                break
            try:
                if counted == offer.count:
                    self._handles.renew(handle, writer.net, counted)
                else:
                    if counted:
                        self._handles.uncount(handle, writer.net, counted)
                        counted = 0
                    self._handles.count(handle, writer.net, offer.count)
                    counted = offer.count
            except BaseException:
                writer.decline(offer)
                raise
            take = wish(offer)
            try:
                writer.run(take)
            except ContentionError:
                self._handles.uncount(handle, writer.net, counted)
                raise
            if not take.void:
                counted -= len(take.taken)
                break
        else:
            self._handles.uncount(handle, writer.net, counted)
            raise _contended(f"block {writer.net}")
        if counted:
            self._handles.uncount(handle, writer.net, counted)
        return take.taken if offer else []

    def _give_back(self, found: Sequence[Assignment], handle: str) -> None:
        by_block: dict[Net, list[Net]] = {}
        for assignment in found:
            by_block.setdefault(assignment.block, []).append(assignment.address)
        for net, addresses in by_block.items():
            self._writer(net).run(GiveBackSome(addresses, handle, {}))
        self._handles.recount(handle)

    # this very address

    def _assign_specific(self, address: Net, pool: Pool, wanted: _Wanted) -> Assignment:
        strict = self._view.configuration().strict_affinity
        only_for = wanted.owner.affinity if strict else None

        def wish(offer: Offer) -> Take:
            return Take(offer, wanted.handle, wanted.attributes, only_for, address=address)

        for _ in range(ATTEMPTS):
            stored = self._block_of(address, pool, wanted)
            if stored is None:
                continue  # another node claimed it before us: now it is there
            block = stored.thing
            block.collect(self._cooldown())
            if strict and block.affinity != wanted.owner.affinity:
                raise AddressUnusableError(
                    f"{_text(address)}: its block {block.net} belongs to"
                    f" {block.affinity or 'no node'}, and strictAffinity keeps node {self.node}"
                    " out; ask for an address of this node's blocks, or set strictAffinity to false"
                )
            if holder := block.holder(address):
                raise AddressInUseError(f"{_text(address)}: {_held_by(holder)}")
            writer = self._writer(block.net)
            if self._count_and_take(writer, writer.offer_address, wish, wanted.handle):
                return Assignment(address, block.net, pool.name)
        raise _contended(_text(address))

    def _pool_of(self, address: Net, use: str | None) -> Pool:
        pools = [pool for pool in self._now.pools() if pool.net.contains(address)]
        reason = "it lies in no IPPool"
        for pool in pools:
            if pool.disabled:
                reason = f"its pool {pool} is disabled"
            elif use is not None and use not in pool.uses:
                reason = f"its pool {pool} is not for {use} addresses"
            else:
                return pool
        raise AddressUnusableError(f"{_text(address)}: {reason}; ask for one of a pool in use")

    def _block_of(self, address: Net, pool: Pool, wanted: _Wanted) -> Stored[Block] | None:
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
                f"{_text(address)}: its block {net} can't be made, because there are smaller ones"
                f" in it ({others[0].thing.net}) from a time when pool {pool} had another"
                " blockSize; ask for another address"
            )
        stored = claims.claim(self._records, wanted.owner.node, net, type_=wanted.owner.type)
        if stored is not None:
            self._view.forget_claims(wanted.owner.node)
            self._writer(net).adopt(stored)
        return stored

    # the rest

    def _owner(self, use: str | None) -> _Owner:
        return self._load_balancer if use == "LoadBalancer" else self._host

    def _writer(self, net: Net) -> BlockWriter:
        with self._writers_lock:
            writer = self._writers.get(net)
            if writer is None:
                writer = self._writers[net] = BlockWriter(self._records, net, self._cooldown)
            self._writers.move_to_end(net)
            if len(self._writers) > _WRITERS:
                self._writers.popitem(last=False)
            return writer

    def _cooldown(self) -> Cooldown:
        return Cooldown(self._view.configuration().ip_cooldown_seconds, datetime.now(UTC))

    def _note_released(self, released: Sequence[Net]) -> None:
        if released:
            for owner_ in (self._host, self._load_balancer):
                owner_.search.fruitful()


def _held_by(holder: Mapping[str, Any]) -> str:
    if at := holder.get("releasedAt"):
        return f"was released at {at} and rests (ipCooldownSeconds); wait, or ask for another"
    who = holder.get("handle_id") or "nobody known"
    return f"is held by {who} {holder.get('secondary') or ''}; release it first, or ask for another"


def _text(address: Net) -> str:
    return format_address(address.version, address.address)


def _names(pools: Sequence[Pool]) -> str:
    return ", ".join(map(str, pools))


def _contended(what: str) -> ContentionError:
    return ContentionError(f"{what}: changed by others {ATTEMPTS} times while we tried; try again")
