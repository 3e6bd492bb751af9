"""Addresses for a node: taken from its own blocks, from a block it claims, or borrowed.

Every step is a compare-and-swap, in an order in which a crash between any two leaves nothing
that the next ``assign`` or ``release`` would not put right:

- assign: handle counted up → address taken in the block.
- release: addresses given back in the block → handle deleted.

An address is found through its handle, so none can be lost; it is taken by a swap of its
block, so none can be given twice.

An assign from a block of the node's that is remembered, while the store is followed, is those
two writes and no read. Threads that want the same block are served by one write (``writer``).
New handles are begun together with their block in one transaction, where the store has such
(``assign_each``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from api.errors import InvalidObjectError
from api.net import Net, format_address
from datastore.follower import Follower
from datastore.interface import Datastore, StoreError
from ipam import claims
from ipam.assigner import Assigner, Assignment, Owner, Wanted
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
from ipam.holdings import Holdings
from ipam.locks import KeyedLocks
from ipam.pools import Labels, Pool, Request
from ipam.records import ATTEMPTS, HOST, LOAD_BALANCER, VIRTUAL, Records, Stored
from ipam.view import View

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

_log = logging.getLogger(__name__)


class Allocator:
    """IPAM of one node. Safe to use from several threads; any number may work on one store.

    ``follow``: between ``start`` and ``stop``, the store is followed instead of being asked for
    pools and claims each time. A PromptDatastore is then asked only for what has changed,
    without it, too. ``follower``: somebody's who follows the store anyway, for us to hear of it
    through him: he starts it, or has it catch up before each operation. A request is never refused
    for what was only remembered.

    Every method may raise StoreError (the store did not answer) and InvalidObjectError (what
    it holds makes no sense); a ``release`` of the handle then puts right what was half done.
    """

    def __init__(
        self,
        store: Datastore,
        node: str,
        *,
        follow: bool = False,
        follower: Follower | None = None,
    ) -> None:
        self.node = node
        self._records = Records(store)
        self._now = View(store, self._records)
        self._view = View(store, self._records, follow=follow, follower=follower)
        self._holdings = Holdings(self._records, self._cooldown)
        self._assigner = Assigner(self._records, self._holdings, self._cooldown)
        self._host = Owner(self._records, node, HOST)
        self._load_balancer = Owner(self._records, LOAD_BALANCER, VIRTUAL)
        self._locks = KeyedLocks()  # by handle

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
        request = self._request(version, pools, use, labels, namespace_labels)
        with self._locks.hold(handle):
            self._view.refresh()
            if self._view.remembers:
                try:
                    wanted = self._wanted(handle, attributes, use, self._view)
                    return self._assigner.assign(request, count, wanted)
                except IpamError:
                    pass  # see if it is still so
            wanted = self._wanted(handle, attributes, use, self._now)
            try:
                return self._assigner.assign(request, count, wanted)
            finally:
                self._view.forget()  # what was otherwise than remembered, and what was claimed now

    def assign_each(
        self,
        newcomers: Mapping[str, Mapping[str, str]],
        *,
        version: int = 4,
        pools: Sequence[str] = (),
        use: str = "Workload",
        namespace_labels: Labels | None = None,
    ) -> dict[str, Assignment]:
        """An address for each of several handles that hold none: as ``assign``, but at once.

        In one write, where the store has transactions of several objects, else in two.

        ``newcomers``: attributes by handle. Those that are not in the answer are to be tried with
        ``assign``: it knows what to do where the handle is there, does what takes longer (claims
        a block, borrows), and says what hinders it.
        """
        request = self._request(version, pools, use, None, namespace_labels)
        with self._locks.hold_all(newcomers):
            self._view.refresh()
            if not self._view.remembers:
                return {}
            wanted = [
                self._wanted(handle, attributes, use, self._view)
                for handle, attributes in newcomers.items()
            ]
            try:
                return self._assigner.assign_each(request, wanted)
            except IpamError:
                return {}
            finally:
                self._settle(newcomers)

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
            self._view.refresh()
            pool = self._pool_of(address, use)
            wanted = Wanted(handle, attributes, self._owner(use), self._now)
            try:
                return self._assign_specific(address, pool, wanted)
            finally:
                self._holdings.settle(handle)

    def release(self, handle: str) -> list[Net]:
        """Give back all addresses of a handle; returns them. Harmless when it has none."""
        with self._locks.hold(handle):
            self._view.refresh()
            released = self._holdings.give_back(handle)
            self._settle((handle,))
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
        self._view.refresh()
        by_block: dict[Net, list[Net]] = {}
        for address in dict.fromkeys(addresses):
            if stored := claims.block_holding(self._records, address):
                by_block.setdefault(stored.thing.net, []).append(address)
        released: list[Net] = []
        problem: ReleaseError | None = None
        for net, wanted in by_block.items():
            try:
                given_back, holders = self._holdings.give_back_some(net, wanted, handle, sequences)
            except ReleaseError as error:
                problem = error
                continue
            released += given_back
            for holder in holders:
                with self._locks.hold(holder):
                    self._holdings.recount(holder)
        self._note_released(released)
        if problem is not None:
            raise problem
        return released

    def collect(self, net: Net) -> None:
        """Free the addresses of a block whose cooldown is over.

        Assigns and releases do it by the way; a block that belongs to nobody, and in which
        nothing but such addresses was left, goes.
        """
        self._view.refresh()
        self._holdings.give_back_some(net, ())

    def addresses(self, handle: str) -> list[Net]:
        """The addresses a handle holds, of both families."""
        return self._holdings.held(handle)

    def claimed(self) -> set[Net]:
        """All blocks that anybody claims, perhaps as they were a moment ago."""
        self._view.refresh()
        return self._view.all_claimed()

    def _assign_specific(self, address: Net, pool: Pool, wanted: Wanted) -> Assignment:
        strict = self._view.configuration().strict_affinity
        only_for = wanted.owner.affinity if strict else None
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
            if self._holdings.take_address(
                address, block.net, wanted.handle, wanted.attributes, only_for=only_for
            ):
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

    def _block_of(self, address: Net, pool: Pool, wanted: Wanted) -> Stored[Block] | None:
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
            self._holdings.adopt(stored)
        return stored

    def _request(
        self,
        version: int,
        pools: Sequence[str],
        use: str,
        labels: Labels | None,
        namespace_labels: Labels | None,
    ) -> Request:
        return Request(
            node=self.node,
            version=version,
            use=use,
            pools=pools,
            node_labels=lambda: self._records.node_labels(self.node) if labels is None else labels,
            namespace_labels=namespace_labels,
        )

    def _wanted(self, handle: str, attributes: Mapping[str, str], use: str, view: View) -> Wanted:
        return Wanted(handle, attributes, self._owner(use), view, view.reservations())

    def _owner(self, use: str | None) -> Owner:
        return self._load_balancer if use == "LoadBalancer" else self._host

    def _cooldown(self) -> Cooldown:
        return Cooldown(self._view.configuration().ip_cooldown_seconds, datetime.now(UTC))

    def _settle(self, handles: Iterable[str]) -> None:
        """The end of what was done for them, which what hinders a count does not undo.

        Whoever uses the handle next counts anew.
        """
        for handle in handles:
            try:
                self._holdings.settle(handle)
            except (IpamError, StoreError, InvalidObjectError) as error:
                _log.warning("handle %s: may count too many, for now: %s", handle, error)

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


def _contended(what: str) -> ContentionError:
    return ContentionError(f"{what}: changed by others {ATTEMPTS} times while we tried; try again")
