"""Addresses that an assign which died has taken, taken over by the one that is repeated.

They may count as leaked at this moment. What is renewed is another allocation than before, so
whoever wanted to collect that one finds it gone.
"""

from __future__ import annotations

from api.net import Net
from datastore.interface import ConflictError, Datastore, NotFoundError
from ipam.errors import ContentionError
from ipam.records import ATTEMPTS, Records


def renew(store: Datastore, handle: str) -> list[Net]:
    """The addresses a handle holds, each allocated anew. Raises StoreError, ContentionError."""
    records = Records(store)
    stored = records.handle(handle)
    if stored is None or stored.thing.id != handle:
        return []
    return [address for net in stored.thing.counts for address in _renew(records, net, handle)]


def _renew(records: Records, net: Net, handle: str) -> list[Net]:
    for _ in range(ATTEMPTS):
        stored = records.block(net)
        held = stored.thing.held_by(handle) if stored else []
        if stored is None or not held:
            return []
        block = stored.thing
        for address in held:
            block.sequences[block.ordinal(address)] = block.sequence
        try:
            records.write_block(stored)
        except (ConflictError, NotFoundError):
            continue
        return held
    raise ContentionError(f"block {net}: changed by others {ATTEMPTS} times while we tried")
