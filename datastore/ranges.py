"""Pools and blocks that a store has of its own, across which an import must bring no others.

Of two pools of one range with blocks of different sizes, addresses would be given twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from api.net import BITS, Net, parse_net
from datastore.interface import JSON, Datastore, Key, part

_LARGEST = 12  # bits of the largest block there may be: /20, /116


class Ranges:
    """Those of a store, without those that are in ``coming`` with the same range: no others."""

    def __init__(self, store: Datastore, coming: Mapping[Key, JSON]) -> None:
        """Raises StoreError."""
        self._pools: dict[Net, Key] = {}
        self._blocks: dict[Net, Key] = {}
        self._divided: dict[Net, Key] = {}  # networks that hold a block, and which
        for kind in ("IPPool", "IPAMBlock"):
            for entry in store.list(kind).entries:
                net = _net(entry.value)
                if net is None or net == _net(coming.get(entry.key, {})):
                    continue
                if kind == "IPPool":
                    self._pools[net] = entry.key
                else:
                    self._blocks[net] = entry.key
                    self._divided |= dict.fromkeys(_holding(net), entry.key)

    def obstacle(self, key: Key, value: JSON) -> Key | None:
        """What an object, that is not there yet, would share addresses with."""
        net = _net(value) if key.kind in ("IPPool", "IPAMBlock") else None
        if net is None:
            return None
        if key.kind == "IPPool":
            return next((other for pool, other in self._pools.items() if pool.overlaps(net)), None)
        holding = (self._blocks.get(each) for each in _holding(net))
        return next(filter(None, holding), None) or self._divided.get(net)


def _net(value: JSON) -> Net | None:
    """The range of a pool or block; None where it says none."""
    try:
        return parse_net(str(part(value, "spec").get("cidr")), strict=False)
    except ValueError:
        return None


def _holding(net: Net) -> Iterator[Net]:
    """The networks that hold a block, from the size of the largest to its own."""
    bits = BITS[net.version]
    for length in range(bits - _LARGEST, net.length + 1):
        yield Net(net.version, net.address >> (bits - length) << (bits - length), length)
