"""An ``Index`` as sets of nftables: whether a packet has any of its tickets, in a few lookups.

Keys of one shape speak of the same things, and of peers' networks of the same length. A packet is
looked up in the set of each shape: hashes all, however many policies there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from itertools import product
from typing import NamedTuple

from api.net import BITS, Net
from felix.chains import Peer, Ticket
from felix.nftables_matches import DESTINATION_OFFSET, SOURCE_OFFSET, address_type
from felix.nftables_sets import NftablesSets
from kernel import nft_expressions as nft
from kernel.nft_expressions import Base, Meta
from kernel.nft_sets import PORT, PROTOCOL, NftSet, key


class Shape(NamedTuple):
    """Of what keys consist. ``length`` is that of the peer's network, 0: it is not in the key."""

    length: int
    protocol: bool
    port: bool


# Every packet has it: there is nothing to look up.
_ANYTHING = Shape(0, False, False)


class NftablesKeySets:
    """The sets of indexes, in one IP version. Indexes are called like their chains."""

    def __init__(self, version: int, sets: NftablesSets) -> None:
        self._version = version
        self._sets = sets

    def come(self, name: str, shape: Shape, keys: Callable[[], frozenset[bytes]]) -> None:
        """See ``KeySets``."""
        if shape != _ANYTHING:
            self._sets.want_keys(_declaration(self._version, name, shape), keys)

    def change(self, name: str, shape: Shape, came: Set[bytes], went: Set[bytes]) -> None:
        """See ``KeySets``."""
        if shape != _ANYTHING:
            self._sets.change_keys(_declaration(self._version, name, shape).name, came, went)

    def go(self, name: str, shape: Shape) -> None:
        """See ``KeySets``."""
        if shape != _ANYTHING:
            self._sets.unwant_keys(_declaration(self._version, name, shape).name)


def keys_of(ticket: Ticket, nets: Iterable[Net]) -> Iterator[tuple[Shape, bytes]]:
    """The keys of a ticket whose peer is in these networks."""
    protocol = (bytes((ticket.protocol,)),) if ticket.protocol is not None else ()
    ports: list[tuple[bytes, ...]] = [(port.to_bytes(2, "big"),) for port in ticket.ports] or [()]
    for net, port in product(nets, ports):
        shape = Shape(net.length, bool(protocol), bool(port))
        fields = (*((net.packed(),) if net.length else ()), *protocol, *port)
        yield shape, key(*fields) if fields else b""


def condition(version: int, name: str, shape: Shape, peer: Peer) -> bytes:
    """``ip saddr & 255.255.255.0 . meta l4proto . th dport @…``."""
    if shape == _ANYTHING:
        return b""
    register = nft.NARROW_REGISTER
    bits = BITS[version]
    parts = []
    if shape.length:
        offset = (SOURCE_OFFSET if peer is Peer.SOURCE else DESTINATION_OFFSET)[version]
        parts.append(nft.load_payload(Base.NETWORK, offset, bits // 8, register))
        if shape.length < bits:
            mask = ((1 << shape.length) - 1) << (bits - shape.length)
            parts.append(nft.mask(mask.to_bytes(bits // 8, "big"), register=register))
        register += bits // 32
    if shape.protocol:
        parts.append(nft.load_meta(Meta.L4PROTO, register))
        register += 1
    if shape.port:
        parts.append(nft.load_payload(Base.TRANSPORT, 2, 2, register))
    set_name = _declaration(version, name, shape).name
    return b"".join(parts) + nft.lookup(set_name, register=nft.NARROW_REGISTER)


def _declaration(version: int, name: str, shape: Shape) -> NftSet:
    fields = (
        *((address_type(version),) if shape.length else ()),
        *((PROTOCOL,) if shape.protocol else ()),
        *((PORT,) if shape.port else ()),
    )
    said = "".join(("p" if shape.protocol else "", "d" if shape.port else ""))
    return NftSet(f"{name}-{shape.length}{said}", fields)
