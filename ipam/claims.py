"""Which node owns a block: Calico's protocol of affinity and block, safe at every crash.

Claim: affinity ``pending`` → create the block → affinity ``confirmed``.
Release: affinity ``pendingDeletion`` → delete the block, or take our name off it when it is
in use → delete the affinity.

Whoever finds a half-done step does it again from the beginning, and gives every object a new
revision on the way, so that the one who left it half-done, should he wake up, fails.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from os.path import commonprefix

from api.net import BITS, Net, format_address
from datastore.interface import AlreadyExistsError, ConflictError, NotFoundError
from ipam.block import Block
from ipam.errors import ContentionError
from ipam.records import (
    ATTEMPTS,
    CONFIRMED,
    HOST,
    PENDING,
    PENDING_DELETION,
    Affinity,
    Records,
    Stored,
    owner,
)

_GROUP = 8  # bits of the addresses whose text begins alike: 10.0.0.x, fd00::12xx
_LARGEST = 12  # bits of the largest block there may be: /20, /116


def claim(records: Records, node: str, net: Net, *, type_: str = HOST) -> Stored[Block] | None:
    """Make a block the node's own, or finish an earlier attempt to.

    None when it can't be: it is another's, or blocks of another size lie there. Then the node
    has no affinity to it (any more). ``type_``: ``virtual`` for an owner that is no node.
    """
    affine = owner(node, type_)
    for _ in range(ATTEMPTS):
        try:
            affinity = _pending(records, node, net, type_)
            block = records.block(net)
            if block is None and not any(overlapping(records, net)):
                now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                block = records.create_block(Block.new(net, affine, time.time_ns(), now))
            elif block is not None and block.thing.affinity == affine:
                block = records.write_block(block)
            else:
                records.delete_affinity(affinity)
                return None
            if block.thing.empty and any(overlapping(records, net)):
                # Of another who had another block size in mind, and was as quick as we.
                records.delete_block(block)
                records.delete_affinity(affinity)
                return None
            records.write_affinity(affinity, CONFIRMED)
            return block
        except (AlreadyExistsError, ConflictError, NotFoundError):
            continue
    raise _contended(net)


def release(
    records: Records, node: str, net: Net, *, only_empty: bool = False, type_: str = HOST
) -> bool:
    """Give a block of the node up; addresses in use stay allocated, in a block without owner.

    False when ``only_empty`` and an address is in use: then the block stays the node's.
    ``type_``: ``virtual`` for an owner that is no node.
    """
    affine = owner(node, type_)
    for _ in range(ATTEMPTS):
        try:
            affinity = records.affinity(node, net)
            if only_empty and _in_use(records.block(net), affine):
                if affinity is None or affinity.thing.state != CONFIRMED:
                    claim(records, node, net, type_=type_)
                return False
            if affinity is not None:
                affinity = records.write_affinity(affinity, PENDING_DELETION)
            block = records.block(net)
            if only_empty and _in_use(block, affine):
                continue  # since we looked
            if block is not None and block.thing.affinity == affine:
                _disown(records, block)
            if affinity is not None:
                records.delete_affinity(affinity)
            return True
        except (ConflictError, NotFoundError):
            continue
    raise _contended(net)


def overlapping(records: Records, net: Net) -> Iterator[Stored[Block]]:
    """Blocks of another size that share addresses with ``net``.

    There are some when a pool was deleted while in use, and made again with another block size.
    Reads at most some twenty blocks nearby, however many there are.
    """
    group = BITS[net.version] - _GROUP
    for length in range(BITS[net.version] - _LARGEST, min(group, net.length)):
        shift = BITS[net.version] - length
        larger = records.block(Net(net.version, net.address >> shift << shift, length))
        if larger is not None:
            yield larger
    size = 1 << _GROUP
    for base in range(net.address // size * size, net.address + net.size, size):
        first, last = (format_address(net.version, base + i) for i in (0, size - 1))
        begin = commonprefix([first, last])  # noqa: RUF071 - of characters, as names have it
        begin = begin.replace(".", "-").replace(":", "-")
        for stored in records.blocks(begin):
            if stored.thing.net != net and net.overlaps(stored.thing.net):
                yield stored


def block_holding(records: Records, address: Net) -> Stored[Block] | None:
    """The block an address lies in, whatever its size; found without looking at any pool."""
    stored = records.block(address)  # a block of one address
    if stored is not None:
        return stored
    near = overlapping(records, address)
    return next((stored for stored in near if stored.thing.net.contains(address)), None)


def _pending(records: Records, node: str, net: Net, type_: str) -> Stored[Affinity]:
    """The node's affinity, pending, at a revision that only we know."""
    affinity = records.affinity(node, net)
    if affinity is None:
        return records.create_affinity(node, net, PENDING, type_)
    return records.write_affinity(affinity, PENDING)


def _in_use(block: Stored[Block] | None, affine: str) -> bool:
    return block is not None and block.thing.affinity == affine and not block.thing.empty


def _disown(records: Records, block: Stored[Block]) -> None:
    if block.thing.empty:
        records.delete_block(block)
    else:
        block.thing.affinity = block.thing.claimed = None
        records.write_block(block)


def _contended(net: Net) -> ContentionError:
    return ContentionError(
        f"block {net}: changed by others {ATTEMPTS} times while we tried to claim or release it;"
        " try again"
    )
