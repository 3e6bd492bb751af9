"""One writer a block: what several threads want of a block is done in one swap of it.

The block is remembered with its revision and written without being read again: the swap fails
if another has written it since. While one thread waits for the store, the wishes of the others
gather; the next of them writes them all.

An assign counts its handle between ``offer`` and ``run``. What makes that safe is that the block
was read before: whoever released the handle in between has written the block. So an offer bears
the number of that reading (``epoch``), and is void when the block had to be read again. A handle
that is stored along with the block (``Take.begins``) needs none of this.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from api.net import Net
from datastore.interface import AlreadyExistsError, ConflictError, Key, NotFoundError
from ipam.block import NO_COOLDOWN, Block, BlockError, Cooldown, Released
from ipam.errors import ContentionError
from ipam.records import ATTEMPTS, Handle, Records, Stored, handle_key


@dataclass(frozen=True, slots=True)
class Offer:
    """What a block may have for us: so many addresses, as it was at the reading ``epoch``."""

    epoch: int
    count: int


@dataclass(slots=True)
class Wish(ABC):
    """Something to be done to a block. ``problem``: why it was not."""

    problem: BaseException | None = field(default=None, init=False)
    done: bool = field(default=False, init=False)

    @abstractmethod
    def fulfil(self, block: Block | None, cooldown: Cooldown) -> bool:
        """Do it to the block, if there is one; whether that must be written. On each try anew."""


@dataclass(slots=True)
class Take(Wish):
    """Addresses for a handle, or this very ``address``. ``void``: the offer did not hold.

    ``begins``: the handle is new, and is stored along with the block, one address counted
    (``begun``). It is ``refused`` if it is not new.
    """

    offer: Offer
    handle: str
    attributes: Mapping[str, str]
    only_for: str | None = None
    reserved: Sequence[Net] = ()
    address: Net | None = None
    taken: list[Net] = field(default_factory=list, init=False)
    void: bool = field(default=False, init=False)
    begins: bool = False
    begun: Stored[Handle] | None = field(default=None, init=False)
    refused: bool = field(default=False, init=False)

    def fulfil(self, block: Block | None, cooldown: Cooldown) -> bool:
        """Take them; none when the block is no longer ``only_for``'s, or has none."""
        self.taken = []
        if block is None:
            return False
        try:
            if self.address is not None:
                block.take_address(
                    self.address, self.handle, self.attributes, only_for=self.only_for
                )
                self.taken = [self.address]
            else:
                self.taken = block.take(
                    self.offer.count,
                    self.handle,
                    self.attributes,
                    only_for=self.only_for,
                    reserved=self.reserved,
                )
        except BlockError:
            return False
        return bool(self.taken)


@dataclass(slots=True)
class GiveBack(Wish):
    """All addresses of a handle."""

    handle: str
    released: list[Net] = field(default_factory=list, init=False)

    def fulfil(self, block: Block | None, cooldown: Cooldown) -> bool:
        """Release them. The block is written even if there are none.

        An assign for this handle that has counted it up, and was overtaken by us, must fail.
        """
        self.released = block.release_handle(self.handle, cooldown) if block else []
        return True


@dataclass(slots=True)
class GiveBackSome(Wish):
    """Some addresses: see ``Block.release``."""

    addresses: Sequence[Net]
    handle: str | None
    sequences: Mapping[Net, int]
    released: Released = field(default_factory=Released, init=False)

    def fulfil(self, block: Block | None, cooldown: Cooldown) -> bool:
        """Release them."""
        self.problem, self.released = None, Released()
        if block is None:
            return False
        try:
            self.released = block.release(
                self.addresses, handle=self.handle, sequences=self.sequences, cooldown=cooldown
            )
        except BlockError as error:
            self.problem = error
        return bool(self.released.addresses)


class BlockWriter:
    """The writer of one block, for all threads of an allocator.

    ``cooldown`` tells how long addresses rest, and the time; it may raise StoreError.
    """

    def __init__(self, records: Records, net: Net, cooldown: Callable[[], Cooldown]) -> None:
        self.net = net
        self._records = records
        self._cooldown = cooldown
        self._turn = threading.Lock()  # held by the thread that talks to the store
        self._stored: Stored[Block] | None = None
        self._revision: str | None = None  # as last seen
        self._epoch = 0
        self._readings = 0
        self._lock = threading.Lock()  # for what follows; held for moments only
        self._waiting: list[Wish] = []
        self._known: tuple[int, str | None, int] | None = None  # epoch, affinity, free
        self._offered = 0

    @property
    def affinity(self) -> str | None:
        """Whose the block is, as last seen."""
        with self._lock:
            return self._known and self._known[1]

    def adopt(self, stored: Stored[Block]) -> None:
        """The block as it was just written by others than ``run``."""
        with self._turn, self._lock:
            self._stored, self._revision = stored, stored.entry.revision
            self._epoch += 1
            self._note()

    def offer(
        self, count: int, *, only_for: str | None = None, reserved: Sequence[Net] = ()
    ) -> Offer | None:
        """Up to ``count`` addresses that may be taken; None when the block has none for us.

        Followed by ``run`` of a Take, or by ``decline``. ``only_for``: the affinity the block
        must have.
        """
        near = [net for net in reserved if net.overlaps(self.net)]
        with self._lock:
            if self._known and not near:
                epoch, affinity, free = self._known
                if free and (only_for is None or affinity == only_for):
                    return self._offer(epoch, free, count)
        readings = self._readings
        with self._turn:
            # Nothing to be had, as far as we know: look, unless another did while we waited.
            if self._readings == readings:
                self._read()
            if self._stored is None:
                return None
            block = self._stored.thing
            block.collect(self._cooldown())
            if only_for is not None and block.affinity != only_for:
                return None
            with self._lock:
                return self._offer(self._epoch, block.free(near), count)

    def offer_address(self) -> Offer | None:
        """An offer of one address that must be named; None when there is no such block."""
        with self._turn:
            if self._stored is None:
                self._read()
            if self._stored is None:
                return None
            with self._lock:
                self._offered += 1
            return Offer(self._epoch, 1)

    def decline(self, offer: Offer) -> None:
        """It is not taken after all."""
        with self._lock:
            self._offered -= offer.count

    def run(self, wish: Wish) -> None:
        """Do it, with what others wait for. Raises what hinders it; StoreError: outcome unknown."""
        self.run_all([wish])
        if wish.problem is not None:
            raise wish.problem

    def run_all(self, own: Sequence[Wish]) -> None:
        """``run`` several; what hindered each is its ``problem``."""
        with self._lock:
            self._waiting += own
        with self._turn:
            if not all(wish.done for wish in own):
                with self._lock:
                    wishes, self._waiting = self._waiting, []
                try:
                    self._write(wishes)
                except BaseException as error:
                    self._stored = None
                    for wish_ in wishes:
                        wish_.problem = wish_.problem or error
                    if not isinstance(error, Exception):
                        raise
                finally:
                    self._finish(wishes)

    def _write(self, wishes: Sequence[Wish]) -> None:
        fresh = False
        for _ in range(ATTEMPTS):
            if self._stored is None:
                fresh = True
                self._read()
            stored = self._stored
            now = [wish for wish in wishes if not self._is_void(wish)]
            if stored is None:
                for wish in now:
                    wish.fulfil(None, NO_COOLDOWN)
                return
            cooldown, collected = NO_COOLDOWN, False
            if stored.thing.resting or not all(isinstance(wish, Take) for wish in now):
                cooldown = self._cooldown()
                collected = stored.thing.collect(cooldown)
            deserted = stored.thing.affinity is None and stored.thing.empty
            changed = [wish.fulfil(stored.thing, cooldown) for wish in now]
            try:
                if any(changed) or collected or deserted:
                    # A swap that succeeds also proves right what was found without one.
                    self._swap(stored, [wish for wish in now if _begins(wish)])
                    return
                if fresh or not now:
                    return
            except (ConflictError, NotFoundError):
                pass
            except AlreadyExistsError as error:
                _refuse(now, error.key)
            self._stored = None
        raise ContentionError(
            f"block {self.net}: changed by others {ATTEMPTS} times while we tried; try again"
        )

    def _is_void(self, wish: Wish) -> bool:
        if isinstance(wish, Take):
            # What is stored along with the block needs no promise that the block was not written.
            stale = wish.offer.epoch != self._epoch and not wish.begins
            wish.void = stale or wish.refused
            return wish.void
        return False

    def _swap(self, stored: Stored[Block], beginners: Sequence[Wish]) -> None:
        if stored.thing.affinity is None and stored.thing.empty:
            self._records.delete_block(stored)
            self._stored = None
        elif beginners:
            takes = [wish for wish in beginners if isinstance(wish, Take)]
            handles = [Handle(take.handle, {self.net: len(take.taken)}) for take in takes]
            self._stored, begun = self._records.write_block_and_begin(stored, handles)
            self._revision = self._stored.entry.revision
            for take, handle in zip(takes, begun, strict=True):
                take.begun = handle
        else:
            self._stored = self._records.write_block(stored)
            self._revision = self._stored.entry.revision

    def _read(self) -> None:
        """The block as it is. Another revision than ours begins a new epoch."""
        self._stored = None
        self._readings += 1
        stored = self._records.block(self.net)
        revision = None if stored is None else stored.entry.revision
        if revision is None or revision != self._revision:
            self._epoch += 1
        self._stored, self._revision = stored, revision
        with self._lock:
            self._note()

    def _finish(self, wishes: Sequence[Wish]) -> None:
        with self._lock:
            self._note()
            for wish in wishes:
                wish.done = True
                if isinstance(wish, Take):
                    self._offered -= wish.offer.count

    def _note(self) -> None:
        if self._stored is None:
            self._known = None
        else:
            block = self._stored.thing
            self._known = (self._epoch, block.affinity, len(block.unallocated))

    def _offer(self, epoch: int, free: int, count: int) -> Offer | None:
        count = min(count, free - self._offered)
        if count <= 0:
            return None
        self._offered += count
        return Offer(epoch, count)


def _begins(wish: Wish) -> bool:
    return isinstance(wish, Take) and wish.begins and bool(wish.taken)


def _refuse(wishes: Sequence[Wish], there: Key | None) -> None:
    """A handle was there: its wish does not begin so, nor does any if it is not known whose."""
    takes = [wish for wish in wishes if isinstance(wish, Take) and wish.begins]
    for take in [take for take in takes if handle_key(take.handle) == there] or takes:
        take.refused, take.taken = True, []
