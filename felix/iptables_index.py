"""An ``Index`` as ipsets: whether a packet has any of its tickets, in a few lookups.

Members of ``hash:net,port`` are a network, a protocol and a port; the kernel asks for each length
of network that is there. Tickets without ports are in a ``hash:net`` for each protocol.

ipsets change before and after chains, not together with them. So what is looked up there is
called after the list of policies that it stands for: where another list takes its place, the old
sets stay as they are until no chain refers to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from itertools import product
from typing import NamedTuple

from api.net import Net
from felix import names
from felix.chains import Index, Peer, Ticket
from felix.iptables_sets import IptablesSets
from kernel.ipset_members import PROTOCOLS
from kernel.ipsets import net_members


class Shape(NamedTuple):
    """Members with a port (then they have protocols, too), or none; ``protocol`` None: any.

    Not ``peer``: whoever the peer is, so that there is nothing to look up.
    """

    port: bool
    peer: bool
    protocol: int | None = None


class IptablesKeySets:
    """The sets of indexes, in one IP version."""

    def __init__(self, version: int, sets: IptablesSets) -> None:
        self._version = version
        self._sets = sets

    def come(self, name: str, shape: Shape, keys: Callable[[], frozenset[str]]) -> None:
        """See ``KeySets``."""
        if shape.peer:
            kind = "hash:net,port" if shape.port else "hash:net"
            self._sets.want_texts(self._version, _set_id(name, shape), kind, keys)

    def change(self, name: str, shape: Shape, came: Set[str], went: Set[str]) -> None:
        """See ``KeySets``."""
        if shape.peer:
            self._sets.change_texts(self._version, _set_id(name, shape), came, went)

    def go(self, name: str, shape: Shape) -> None:
        """See ``KeySets``."""
        if shape.peer:
            self._sets.unwant_texts(self._version, _set_id(name, shape))


def name_of(index: Index) -> str:
    """What an index is called here: its chain, and a hash of its list."""
    return f"{index.name}/{names.digest('/'.join(chain for chain, _ in index.entries), 27)}"


def chain_of(name: str) -> str:
    """The chain of an index by what it is called here."""
    return name.partition("/")[0]


def can_hold(index: Index) -> bool:
    """Whether ipset reads the ports of all protocols whose ports tickets speak of."""
    return all(
        ticket.protocol in PROTOCOLS
        for _, tickets in index.entries
        for ticket in tickets
        if ticket.ports
    )


def keys_of(ticket: Ticket, nets: Iterable[Net]) -> Iterator[tuple[Shape, str]]:
    """The keys of a ticket whose peer is in these networks."""
    if not ticket.ports:
        for net in nets:
            shape = Shape(False, net.length > 0, ticket.protocol)
            for member in net_members(net) if net.length else ("",):
                yield shape, member
        return
    protocol = PROTOCOLS[ticket.protocol or 0]
    for net, port in product(nets, ticket.ports):
        for member in net_members(net):
            yield Shape(True, True), f"{member},{protocol}:{port}"


def condition(version: int, name: str, shape: Shape, peer: Peer) -> str:
    """``-p tcp -m set --match-set … src``."""
    said = "" if shape.protocol is None else f"-p {shape.protocol}"
    if not shape.peer:
        return said
    where = "src" if peer is Peer.SOURCE else "dst"
    dimensions = f"{where},dst" if shape.port else where
    held = names.set_name(_set_id(name, shape), version)
    return f"{said} -m set --match-set {held} {dimensions}".strip()


def _set_id(name: str, shape: Shape) -> str:
    return f"x:{names.digest(f'{name}/{shape.port}/{shape.protocol}', 23)}"
