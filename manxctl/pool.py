"""Deleting an IPPool: its blocks go with it, its addresses in use stand against it."""

from __future__ import annotations

from datastore.interface import Datastore
from ipam.claims import release
from ipam.records import Records
from ipam.utilisation import BlockUse, utilisation


def blocks(store: Datastore, pool: str) -> list[BlockUse]:
    """The blocks that lie in a pool."""
    return next((use.blocks for use in utilisation(store) if use.name == pool), [])


def in_use(found: list[BlockUse]) -> str | None:
    """The complaint when addresses are in use."""
    used = sum(block.used for block in found)
    if not used:
        return None
    return (
        f"{used} of its addresses are in use and would no longer be announced: set"
        " spec.disabled to true and delete the pool when they are gone (manxctl ipam show),"
        " or --force"
    )


def give_back(store: Datastore, found: list[BlockUse]) -> None:
    """Release the nodes' claims on the blocks; a block with addresses in use stays until empty."""
    records = Records(store)
    for block in found:
        kind, _, node = (block.affinity or "").partition(":")
        if kind == "host":
            release(records, node, block.net)
