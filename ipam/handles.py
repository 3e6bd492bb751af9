"""Handles count the addresses of each holder, so that they are found again without a search.

A handle is counted up before the block is written and down after, so at any moment, and after
any crash, it names every block in which its holder has an address, and perhaps one more.
"""

from __future__ import annotations

from api.net import Net
from datastore.interface import AlreadyExistsError, ConflictError, NotFoundError
from ipam.errors import ContentionError, IpamError
from ipam.records import ATTEMPTS, Handle, Records


def increment(records: Records, id_: str, net: Net) -> None:
    """Count one more address in block ``net``."""
    for _ in range(ATTEMPTS):
        stored = records.handle(id_)
        try:
            if stored is None:
                records.create_handle(Handle(id_, {net: 1}))
            elif stored.thing.id != id_:
                raise IpamError(
                    f"handle {id_}: differs only in case from {stored.thing.id}, which is in use;"
                    " release that first"
                )
            else:
                counts = stored.thing.counts
                counts = {**counts, net: counts.get(net, 0) + 1}
                records.write_handle(stored, Handle(id_, counts))
        except (AlreadyExistsError, ConflictError, NotFoundError):
            continue
        return
    raise _contended(id_)


def decrement(records: Records, id_: str, net: Net) -> None:
    """Count one address less in block ``net``; delete the handle when that was its last."""
    for _ in range(ATTEMPTS):
        stored = records.handle(id_)
        if stored is None or net not in stored.thing.counts:
            return
        counts = dict(stored.thing.counts)
        counts[net] -= 1
        if counts[net] <= 0:
            del counts[net]
        try:
            if counts:
                records.write_handle(stored, Handle(stored.thing.id, counts))
            else:
                records.delete_handle(stored)
        except (ConflictError, NotFoundError):
            continue
        return
    raise _contended(id_)


def _contended(id_: str) -> ContentionError:
    return ContentionError(
        f"handle {id_}: changed by others {ATTEMPTS} times while we tried to count an address;"
        " try again, and look for two runtimes that use the same container ID"
    )
