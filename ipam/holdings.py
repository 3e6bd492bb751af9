"""Who holds which addresses: handle and block changed together, in the order that is safe."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

from api.net import Net
from datastore.interface import StoreError
from ipam.block import Block, Cooldown
from ipam.errors import ContentionError
from ipam.handles import Handles
from ipam.records import ATTEMPTS, Records, Stored
from ipam.writer import BlockWriter, GiveBack, GiveBackSome, Offer, Take

_WRITERS = 64  # blocks that are remembered
_DOUBTFUL = 1024


class Holdings:
    """Takes addresses for handles and gives them back.

    What concerns one handle must not happen in two threads at once. ``cooldown`` tells how long
    addresses rest, and the time; it may raise StoreError, as all methods may.
    """

    def __init__(self, records: Records, cooldown: Callable[[], Cooldown]) -> None:
        self._records = records
        self._cooldown = cooldown
        self._handles = Handles(records)
        self._writers: OrderedDict[Net, BlockWriter] = OrderedDict()
        # Handles that may yet be stored, along with these blocks: nobody knows what became of that.
        self._doubtful: OrderedDict[str, Net] = OrderedDict()
        self._lock = threading.Lock()

    def take(
        self,
        net: Net,
        count: int,
        handle: str,
        attributes: Mapping[str, str],
        *,
        only_for: str | None = None,
        reserved: Sequence[Net] = (),
    ) -> list[Net]:
        """Up to ``count`` addresses of a block, as ``Block.take``.

        None when it is full, gone, or no longer ``only_for``'s. Raises ContentionError.
        """
        writer = self._writer(net)
        return self._count_and_take(
            writer,
            handle,
            lambda: writer.offer(count, only_for=only_for, reserved=reserved),
            lambda offer: Take(offer, handle, attributes, only_for, reserved),
        )

    def take_each(
        self,
        net: Net,
        newcomers: Mapping[str, Mapping[str, str]],
        *,
        only_for: str | None = None,
        reserved: Sequence[Net] = (),
    ) -> dict[str, Net | None]:
        """An address of a block for each handle that is new.

        In one write, where the store can; else, and for those that are not new, in one for all
        handles and then one for the block. ``newcomers``: attributes by handle. None: it has one
        already, or something went wrong. Those for which the block has none are not in the answer.
        """
        writer = self._writer(net)
        offers = self._offers(writer, newcomers, only_for, reserved)
        if self._records.can_begin:
            takes = [
                Take(offer, handle, newcomers[handle], only_for, reserved, begins=True)
                for handle, offer in offers.items()
            ]
            writer.run_all(takes)
            for take in takes:
                if take.begun is not None:
                    self._handles.note(take.begun)
                elif isinstance(take.problem, StoreError):
                    self._note_doubtful(take.handle, net)
            taken = {
                take.handle: take.taken[0] if take.begun else None
                for take in takes
                if not take.refused
            }
            refused = [take.handle for take in takes if take.refused]
            offers = self._offers(writer, refused, only_for, reserved)
            return taken | self._begin_and_take(writer, offers, newcomers, only_for, reserved)
        return self._begin_and_take(writer, offers, newcomers, only_for, reserved)

    def _begin_and_take(
        self,
        writer: BlockWriter,
        offers: Mapping[str, Offer],
        newcomers: Mapping[str, Mapping[str, str]],
        only_for: str | None,
        reserved: Sequence[Net],
    ) -> dict[str, Net | None]:
        """Handles first; who is not new gets nothing."""
        if not offers:
            return {}
        begun = self._handles.begin(list(offers), writer.net)
        takes: dict[str, Take] = {}
        for handle, offer in offers.items():
            if handle in begun:
                takes[handle] = Take(offer, handle, newcomers[handle], only_for, reserved)
            else:
                writer.decline(offer)
        writer.run_all(list(takes.values()))
        taken: dict[str, Net | None] = dict.fromkeys(offers)
        for handle, take in takes.items():
            if take.problem is not None:
                self._handles.doubt(handle)
            elif take.taken and not take.void:
                taken[handle] = take.taken[0]
            else:
                self._count_back(handle, writer.net, 1)
        return taken

    def _offers(
        self,
        writer: BlockWriter,
        handles: Iterable[str],
        only_for: str | None,
        reserved: Sequence[Net],
    ) -> dict[str, Offer]:
        """One each, as long as there are any."""
        offers: dict[str, Offer] = {}
        try:
            for handle in handles:
                offer = writer.offer(1, only_for=only_for, reserved=reserved)
                if offer is None:
                    break
                offers[handle] = offer
        except BaseException:
            for offer in offers.values():
                writer.decline(offer)
            raise
        return offers

    def take_address(
        self,
        address: Net,
        net: Net,
        handle: str,
        attributes: Mapping[str, str],
        *,
        only_for: str | None = None,
    ) -> bool:
        """This address of a block; False when it can't be had. Raises ContentionError."""
        writer = self._writer(net)
        taken = self._count_and_take(
            writer,
            handle,
            writer.offer_address,
            lambda offer: Take(offer, handle, attributes, only_for, address=address),
        )
        return bool(taken)

    def give_back(self, handle: str) -> list[Net]:
        """All that a handle holds. Raises ContentionError."""
        net = self._doubtful.get(handle)
        released = [] if net is None else self._forestall(handle, net)
        for attempt in range(ATTEMPTS):
            stored = self._handles.get(handle, fresh=attempt > 0)
            if stored is None:
                return released
            for net in stored.thing.counts:
                wish = GiveBack(handle)
                self._writer(net).run(wish)
                released += wish.released
            if self._handles.delete(stored):
                return released
        raise ContentionError(
            f"handle {handle}: changed by others {ATTEMPTS} times while we tried to release it;"
            " try again"
        )

    def _note_doubtful(self, handle: str, net: Net) -> None:
        with self._lock:
            self._doubtful[handle] = net
            if len(self._doubtful) > _DOUBTFUL:
                self._doubtful.popitem(last=False)

    def _forestall(self, handle: str, net: Net) -> list[Net]:
        """Whatever becomes of the write that was to begin it: from now on it can't be done."""
        wish = GiveBack(handle)
        self._writer(net).run(wish)  # it writes the block in any case
        with self._lock:
            self._doubtful.pop(handle, None)
        return wish.released

    def give_back_some(
        self,
        net: Net,
        addresses: Iterable[Net],
        handle: str | None = None,
        sequences: Mapping[Net, int] | None = None,
    ) -> tuple[list[Net], list[str]]:
        """Some addresses of a block, as ``Block.release``, and whose they were.

        Their handles are to be recounted. Raises ReleaseError, ContentionError.
        """
        wish = GiveBackSome(tuple(addresses), handle, sequences or {})
        self._writer(net).run(wish)
        return wish.released.addresses, list(wish.released.by_handle)

    def held(self, handle: str) -> list[Net]:
        """The addresses a handle holds."""
        stored = self._handles.get(handle)
        if stored is None:
            return []
        blocks = [self._records.block(net) for net in stored.thing.counts]
        return [address for block in blocks if block for address in block.thing.held_by(handle)]

    def recount(self, handle: str) -> None:
        """Let the handle count what it has. Raises ContentionError."""
        self._handles.recount(handle)

    def settle(self, handle: str) -> None:
        """The end of what was done for a handle: count anew, if others have interfered."""
        self._handles.settle(handle)

    def affinity(self, net: Net) -> str | None:
        """Whose a block is, as last seen."""
        return self._writer(net).affinity

    def adopt(self, stored: Stored[Block]) -> None:
        """A block as it was just claimed."""
        self._writer(stored.thing.net).adopt(stored)

    def _writer(self, net: Net) -> BlockWriter:
        with self._lock:
            writer = self._writers.get(net)
            if writer is None:
                writer = self._writers[net] = BlockWriter(self._records, net, self._cooldown)
            self._writers.move_to_end(net)
            if len(self._writers) > _WRITERS:
                self._writers.popitem(last=False)
            return writer

    def _count_and_take(
        self,
        writer: BlockWriter,
        handle: str,
        offered: Callable[[], Offer | None],
        wish: Callable[[Offer], Take],
    ) -> list[Net]:
        """Count the handle up, take the addresses; what was not taken is counted back.

        When the store fails the outcome is unknown, so the handle stays counted.
        """
        counted = 0
        for _ in range(ATTEMPTS):
            offer = offered()
            if offer is None:
                self._count_back(handle, writer.net, counted)
                return []
            try:
                counted = self._count(handle, writer.net, counted, offer.count)
            except BaseException:
                writer.decline(offer)
                raise
            take = wish(offer)
            try:
                writer.run(take)
            except ContentionError:
                self._count_back(handle, writer.net, counted)
                raise
            if not take.void:
                self._count_back(handle, writer.net, counted - len(take.taken))
                return take.taken
        self._count_back(handle, writer.net, counted)
        raise ContentionError(
            f"block {writer.net}: changed by others {ATTEMPTS} times while we tried; try again"
        )

    def _count(self, handle: str, net: Net, counted: int, number: int) -> int:
        """Have ``number`` counted, at a revision of the handle that nobody else knows."""
        if counted == number:
            self._handles.renew(handle, net, number)
        else:
            self._count_back(handle, net, counted)
            self._handles.count(handle, net, number)
        return number

    def _count_back(self, handle: str, net: Net, number: int) -> None:
        if number:
            self._handles.uncount(handle, net, number)
