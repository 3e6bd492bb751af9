"""How the addresses are used: pools, their blocks, and who holds an address."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from api.net import Net
from datastore.interface import Datastore
from ipam.pools import Pools
from ipam.records import Records
from ipam.view import View


@dataclass(frozen=True, slots=True)
class BlockUse:
    """A block: its CIDR, its affinity (``host:<node>``, None), its addresses in use and free.

    ``reserved``: those that are not in use, and that an IPReservation keeps from being given.
    """

    net: Net
    affinity: str | None
    used: int
    free: int
    reserved: int = 0


@dataclass(slots=True)
class PoolUse:
    """A pool and its blocks. Name "" and net None: the blocks that lie in no pool."""

    name: str
    net: Net | None
    blocks: list[BlockUse] = field(default_factory=list)
    reserved: int = 0  # not in use, and not to be given

    @property
    def total(self) -> int:
        """How many addresses there are."""
        if self.net is not None:
            return self.net.size
        return sum(block.net.size for block in self.blocks)

    @property
    def used(self) -> int:
        """How many are allocated."""
        return sum(block.used for block in self.blocks)

    @property
    def free(self) -> int:
        """How many may be given."""
        return self.total - self.used - self.reserved


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds an address, and in which block it lies."""

    block: Net
    handle: str | None
    attributes: Mapping[str, str]


def utilisation(store: Datastore) -> list[PoolUse]:
    """Every pool by name, disabled ones too; then, if there are any, the blocks in no pool."""
    uses = [PoolUse(pool.name, pool.net) for pool in Pools(store).all()]
    homeless = PoolUse("", None)
    records = Records(store)
    reserved = disjoint(View(store, records).reservations())
    for use in uses:
        use.reserved = sum(_shared(use.net, net) for net in reserved if use.net)
    for stored in records.blocks():
        block = stored.thing
        home = next((use for use in uses if use.net and use.net.contains(block.net)), homeless)
        unused = len(block.unallocated)
        free = block.free(reserved)
        home.blocks.append(
            BlockUse(block.net, block.affinity, block.net.size - unused, free, unused - free)
        )
        in_block = sum(_shared(block.net, net) for net in reserved)
        home.reserved += unused - free - (in_block if home.net else 0)
    for use in (*uses, homeless):
        use.blocks.sort(key=lambda block: block.net)
    return [*uses, homeless] if homeless.blocks else uses


def disjoint(nets: Iterable[Net]) -> list[Net]:
    """The nets without those that lie in another of them."""
    kept: list[Net] = []
    for net in sorted(set(nets), key=lambda net: net.length):
        if not any(other.contains(net) for other in kept):
            kept.append(net)
    return kept


def _shared(one: Net, other: Net) -> int:
    """How many addresses two nets share."""
    return min(one.size, other.size) if one.overlaps(other) else 0


def holder(store: Datastore, address: Net) -> Holder | None:
    """Who holds an address; None when it is free or lies in no block."""
    for stored in Records(store).blocks():
        if stored.thing.net.contains(address):
            attributes = stored.thing.holder(address)
            if attributes is not None:
                return Holder(
                    stored.thing.net,
                    attributes.get("handle_id"),
                    attributes.get("secondary") or {},
                )
    return None
