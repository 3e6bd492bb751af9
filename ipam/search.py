"""Which blocks to try when those of an owner are full. Reads few, however many there are.

The blocks of a pool that nobody claims are found from the claims, one by one in an order of the
owner's own. Among those of others a few are looked at, by chance. Only when none of them serves
are all of the pool read at once; that a large pool had nothing is then remembered for a while.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta

from api.net import Net
from ipam.block import Block, Cooldown
from ipam.pools import Pool
from ipam.records import HOST, Records, Stored
from ipam.view import View

_PROBES = 16  # blocks to read one by one before more is read at once
_LARGE = 256  # blocks of a pool whose exhaustion is remembered
_SEARCHED = 1 << 20  # blocks to think of, none of which can be had: IPv6 pools have more
_REMEMBERED = 5.0  # seconds
_RECLAIM_AFTER = timedelta(minutes=1)  # an empty block of another node is taken over


class Search:
    """The search of one owner, ``affinity``. May raise StoreError."""

    def __init__(self, records: Records, node: str, affinity: str) -> None:
        self._records = records
        self._node = node
        self._affinity = affinity
        self._random = random.Random()
        self._places: dict[Net, int] = {}  # where in a pool the last search ended
        self._swept: dict[Net, tuple[int, float]] = {}  # pools without a free block
        # Of large pools only, with the time:
        self._barren: dict[Net, float] = {}  # pools in which nothing was found
        self._taken: dict[Net, float] = {}  # blocks that could not be claimed
        self._claimed: tuple[set[Net], float] = set(), float("-inf")

    def free(self, view: View, pool: Pool, reserved: Sequence[Net]) -> Iterator[Net]:
        """Blocks of the pool to claim, the owner's own half-claimed ones among them."""
        claimed: Collection[Net] | None = view.claimed()
        given_up, swept_at = self._swept.get(pool.net, (-1, None))
        if claimed is not None and given_up == view.given_up and _recent(swept_at):
            return
        if _all_reserved(pool.net, reserved):
            return
        given_up = view.given_up
        probes = 0
        begin = self._places.get(pool.net, 0)
        nets = itertools.islice(pool.blocks(self._node, begin), _SEARCHED)
        for place, net in enumerate(nets, begin):
            self._places[pool.net] = place % pool.block_count
            if claimed is not None and net in claimed:
                continue
            if _recent(self._taken.get(net)) or _all_reserved(net, reserved):
                continue
            stored = self._records.block(net)
            if stored is None or stored.thing.affinity == self._affinity:
                yield net
            if pool.block_count > _LARGE:
                self._take_note(net)
            probes += 1
            if claimed is None and probes == _PROBES:
                claimed = self._read_claimed(pool)
        self._swept[pool.net] = given_up, time.monotonic()

    def of_others(self, pool: Pool) -> Iterator[Sequence[Stored[Block]]]:
        """Blocks of others: first a few, by chance, then all, unless that was ``fruitless``."""
        nets = pool.blocks(self._node, self._random.randrange(pool.block_count))
        few = (self._records.block(net) for net in itertools.islice(nets, _PROBES))
        yield [stored for stored in few if stored and self._is_of_another(stored.thing)]
        if _recent(self._barren.get(pool.net)):
            return
        rest = self._records.blocks_within(pool.net)
        yield [stored for stored in rest if self._is_of_another(stored.thing)]

    def fruitless(self, pool: Pool) -> None:
        """No block of others was of use: all of a large pool are not read again for a while."""
        if pool.block_count > _LARGE and not _recent(self._barren.get(pool.net)):
            self._barren[pool.net] = time.monotonic()

    def fruitful(self) -> None:
        """Addresses were given back: what was barren need not be so any more."""
        self._barren.clear()

    def _is_of_another(self, block: Block) -> bool:
        return block.affinity != self._affinity

    def _take_note(self, net: Net) -> None:
        if len(self._taken) > _LARGE:
            self._taken = {other: at for other, at in self._taken.items() if _recent(at)}
        self._taken[net] = time.monotonic()

    def _read_claimed(self, pool: Pool) -> set[Net]:
        claimed, at = self._claimed
        if pool.block_count <= _LARGE or not _recent(at):
            claimed = self._records.claimed()
            self._claimed = claimed, time.monotonic()
        return claimed


def _recent(at: float | None) -> bool:
    return at is not None and time.monotonic() < at + _REMEMBERED


def deserted(block: Block, cooldown: Cooldown) -> str | None:
    """The node whose empty block it has been for so long that another may have it."""
    if block.affinity is None or not block.affinity.startswith(f"{HOST}:") or not block.empty:
        return None
    owned_for = block.owned_for(cooldown.now)
    if owned_for is not None and owned_for < _RECLAIM_AFTER:
        return None
    return block.affinity.removeprefix(f"{HOST}:")


def _all_reserved(net: Net, reserved: Sequence[Net]) -> bool:
    """Whether no address of a block may be given out."""
    near = [other for other in reserved if other.overlaps(net)]
    if any(other.contains(net) for other in near):
        return True
    inner = [other for other in near if not any(o != other and o.contains(other) for o in near)]
    return sum(other.size for other in set(inner)) == net.size
