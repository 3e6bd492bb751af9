"""Handles that hold nothing: what is left of an assign that died between its two writes."""

from __future__ import annotations

from collections.abc import Mapping

from api.net import Net
from datastore.interface import ConflictError, Datastore, NotFoundError
from ipam.block import Block
from ipam.records import Handle, Records, Stored, owner


def delete_orphans(store: Datastore, node: str) -> list[str]:
    """Delete the handles without addresses that name only blocks of this node; their ids.

    Blocks that are gone count as the node's. Harmless to every assign that is under way.
    """
    records = Records(store)
    blocks = {stored.thing.net: stored.thing for stored in records.blocks()}
    return [
        stored.thing.id
        for stored in records.handles()
        if _unused(stored.thing, blocks, node) and _delete(records, stored.thing.id, node)
    ]


def delete_orphan(store: Datastore, id_: str) -> bool:
    """Delete a handle without addresses, whosever blocks it names; whether it was one.

    Harmless to every assign that is under way.
    """
    return _delete(Records(store), id_, None)


def _unused(handle: Handle, blocks: Mapping[Net, Block], node: str | None) -> bool:
    named = [blocks[net] for net in handle.counts if net in blocks]
    if node is not None and any(block.affinity != owner(node) for block in named):
        return False
    return not any(block.held_by(handle.id) for block in named)


def _delete(records: Records, id_: str, node: str | None) -> bool:
    """Delete the handle if it still holds nothing.

    Its blocks are written although nothing in them changes: an assign that has counted the
    handle up, and has read a block before us, then fails to write that and begins again.
    """
    handle = records.handle(id_)
    if handle is None:
        return False
    found = [records.block(net) for net in handle.thing.counts]
    blocks: list[Stored[Block]] = [block for block in found if block is not None]
    if not _unused(handle.thing, {block.thing.net: block.thing for block in blocks}, node):
        return False
    try:
        for block in blocks:
            records.write_block(block)
        records.delete_handle(handle)
    except (ConflictError, NotFoundError):
        return False  # it is in use after all
    return True
