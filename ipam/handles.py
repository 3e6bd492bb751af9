"""Handles count the addresses of each holder, so that they are found again without a search.

A handle is counted up before the block is written and down after, so at any moment, and after
any crash, it names every block in which its holder has an address, and perhaps one more. One that
is new may be stored together with its block (``note``).

Whoever releases a handle writes its blocks before he deletes it. So an assign whose block was
changed by another after it counted must count again (``renew``) before it tries once more.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from api.net import Net
from datastore.interface import AlreadyExistsError, ConflictError, NotFoundError, StoreError
from ipam.errors import ContentionError, IpamError
from ipam.records import ATTEMPTS, Handle, Records, Stored

_REMEMBERED = 512


class Handles:
    """The handles of a store. What concerns one handle must not happen in two threads at once.

    The latest are remembered with their revisions; what another has changed since is found out
    by the swap, and read again.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._known: OrderedDict[str, Stored[Handle]] = OrderedDict()
        self._lock = threading.Lock()  # for what is remembered
        self._unsure: set[str] = set()

    def get(self, id_: str, *, fresh: bool = True) -> Stored[Handle] | None:
        """The handle, None when there is none of exactly that id. ``fresh``: not from memory."""
        stored = None if fresh else self._known.get(id_)
        if stored is None:
            stored = self._records.handle(id_)
            if stored is not None and stored.thing.id != id_:
                return None
            self._remember(id_, stored)
        return stored

    def count(self, id_: str, net: Net, number: int) -> None:
        """Count more addresses in block ``net``."""
        stored = self._known.get(id_)
        for _ in range(ATTEMPTS):
            try:
                if stored is None:
                    written = self._records.create_handle(Handle(id_, {net: number}))
                else:
                    counts = stored.thing.counts
                    counts = {**counts, net: counts.get(net, 0) + number}
                    written = self._records.write_handle(stored, Handle(id_, counts))
            except (AlreadyExistsError, ConflictError, NotFoundError):
                stored = self._records.handle(id_)
                if stored is not None and stored.thing.id != id_:
                    raise IpamError(
                        f"handle {id_}: differs only in case from {stored.thing.id}, which is in"
                        " use; release that first"
                    ) from None
                continue
            self._remember(id_, written)
            return
        raise _contended(id_)

    def begin(self, ids: Sequence[str], net: Net) -> set[str]:
        """Count one address in block ``net`` for each that is new; returns which those are.

        Where the store failed it may be counted all the same, so ``settle`` is to count anew.
        """
        begun = set()
        outcomes = self._records.create_handles([Handle(id_, {net: 1}) for id_ in ids])
        for id_, outcome in zip(ids, outcomes, strict=True):
            if not isinstance(outcome, StoreError):
                self._remember(id_, outcome)
                begun.add(id_)
            elif not isinstance(outcome, AlreadyExistsError):
                self.doubt(id_)
        return begun

    def note(self, stored: Stored[Handle]) -> None:
        """One that was begun elsewhere."""
        self._remember(stored.thing.id, stored)

    def doubt(self, id_: str) -> None:
        """What it counts may be wrong: ``settle`` is to count anew."""
        self._unsure.add(id_)

    def renew(self, id_: str, net: Net, number: int) -> None:
        """Make sure that what was counted still is, at a revision that only we know."""
        stored = self._known.get(id_)
        try:
            if stored is None:
                raise NotFoundError(id_)
            self._remember(id_, self._records.write_handle(stored, stored.thing))
        except (ConflictError, NotFoundError):
            self._forget(id_)
            self.count(id_, net, number)  # perhaps for the second time
            self._unsure.add(id_)

    def uncount(self, id_: str, net: Net, number: int) -> None:
        """Count back what ``count`` counted."""
        stored = self._known.get(id_)
        try:
            if stored is None:
                raise NotFoundError(id_)
            counts = dict(stored.thing.counts)
            counts[net] -= number
            if not counts[net]:
                del counts[net]
            self._write(stored, counts)
        except (ConflictError, NotFoundError):
            self._unsure.add(id_)

    def delete(self, stored: Stored[Handle]) -> bool:
        """Delete the handle; False when it was changed since it was read."""
        self._forget(stored.thing.id)
        try:
            self._records.delete_handle(stored)
        except (ConflictError, NotFoundError):
            return False
        return True

    def settle(self, id_: str) -> None:
        """Count anew, if another's doings have made us unsure."""
        if id_ in self._unsure:
            self.recount(id_)
            self._unsure.discard(id_)

    def recount(self, id_: str) -> None:
        """Let the handle count what its holder has, neither more nor less.

        The blocks are written although nothing in them changes: an assign that has counted and
        not yet taken its address then fails to write its block, and counts again.
        """
        for _ in range(ATTEMPTS):
            stored = self.get(id_)
            if stored is None:
                return
            counts: dict[Net, int] = {}
            try:
                for net in stored.thing.counts:
                    block = self._records.block(net)
                    if block is not None:
                        self._records.write_block(block)
                        if held := len(block.thing.held_by(id_)):
                            counts[net] = held
                if counts != stored.thing.counts:
                    self._write(stored, counts)
            except (ConflictError, NotFoundError):
                continue
            return
        raise _contended(id_)

    def _write(self, stored: Stored[Handle], counts: dict[Net, int]) -> None:
        id_ = stored.thing.id
        if counts:
            self._remember(id_, self._records.write_handle(stored, Handle(id_, counts)))
        else:
            self._forget(id_)
            self._records.delete_handle(stored)

    def _remember(self, id_: str, stored: Stored[Handle] | None) -> None:
        if stored is None:
            self._forget(id_)
            return
        with self._lock:
            self._known[id_] = stored
            self._known.move_to_end(id_)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)

    def _forget(self, id_: str) -> None:
        with self._lock:
            self._known.pop(id_, None)


def _contended(id_: str) -> ContentionError:
    return ContentionError(
        f"handle {id_}: changed by others {ATTEMPTS} times while we tried to count an address;"
        " try again, and look for two runtimes that use the same container ID"
    )
