"""Permanent neighbour entries: which MAC address an IP address has. See ip-neighbour(8).

Ours are recognised by protocol number, as routes are.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import NamedTuple

from api.net import V4, V6, Net, format_address, host_net
from kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    attribute,
    attribute_u32,
    attributes,
    mac_bytes,
)
from kernel.routes import PROTO_FELIX
from kernel.table import apply_plan
from reconcile.plan import Plan

RTM_NEWNEIGH = 28
RTM_DELNEIGH = 29
RTM_GETNEIGH = 30

NUD_PERMANENT = 0x80
NTF_PROXY = 0x08

_NDA_DST = 1
_NDA_LLADDR = 2
_NDA_IFINDEX = 8
_NDA_PROTOCOL = 12

_NDMSG = struct.Struct("=BxxxiHBB")  # family, ifindex, state, flags, type
_FAMILY = {V4: 2, V6: 10}
_VERSION = {2: V4, 10: V6}


class NeighbourKey(NamedTuple):
    """What makes an entry unique."""

    ifindex: int
    net: Net


@dataclass(frozen=True, slots=True)
class Neighbour:
    """``net`` (a /32 or /128) is at ``mac`` on an interface.

    Without ``mac`` it is a proxy entry: this machine answers for the address
    (``ip neighbour add proxy``).
    """

    ifindex: int
    net: Net
    mac: str | None
    protocol: int = PROTO_FELIX

    @property
    def key(self) -> NeighbourKey:
        """Its place in the table."""
        return NeighbourKey(self.ifindex, self.net)

    def __str__(self) -> str:
        address = format_address(self.net.version, self.net.address)
        way = "proxy" if self.mac is None else f"lladdr {self.mac}"
        return f"neighbour {address} dev #{self.ifindex} {way}"


class Neighbours:
    """The neighbour table of the namespace that ``socket`` speaks to."""

    def __init__(self, socket: NetlinkSocket) -> None:
        self._socket = socket

    def read(
        self, *, version: int, ifindex: int = 0, protocol: int | None = PROTO_FELIX
    ) -> dict[NeighbourKey, Neighbour]:
        """Permanent and proxy entries, of one interface and protocol if given.

        ``ip neighbour show nud permanent`` and ``ip neighbour show proxy``.
        """
        entries: dict[NeighbourKey, Neighbour] = {}
        for flags in (0, NTF_PROXY):
            body = _NDMSG.pack(_FAMILY[version], 0, 0, flags, 0)
            # the kernel cannot filter proxy entries by interface
            if ifindex and not flags:
                body += attribute_u32(_NDA_IFINDEX, ifindex)
            for answer in self._socket.dump(Message(RTM_GETNEIGH, 0, body)):
                entry = parse_neighbour(answer)
                if entry is None or (ifindex and entry.ifindex != ifindex):
                    continue
                if protocol is None or entry.protocol == protocol:
                    entries[entry.key] = entry
        return entries

    def apply(self, plan: Plan[NeighbourKey, Neighbour]) -> dict[NeighbourKey, OSError]:
        """Do the whole plan in one batch; returns the errors of the steps that failed.

        An entry to delete that is gone is no error.
        """
        return apply_plan(
            self._socket,
            plan,
            create=neighbour_replace,
            update=neighbour_replace,
            delete=neighbour_delete,
            gone=errno.ENOENT,
        )


def neighbour_replace(entry: Neighbour) -> Message:
    """``ip neighbour replace … nud permanent``, or ``ip neighbour replace proxy …``."""
    body = _body(entry) + attribute(_NDA_PROTOCOL, bytes((entry.protocol,)))
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)


def neighbour_delete(entry: Neighbour) -> Message:
    """``ip neighbour del``."""
    return Message(RTM_DELNEIGH, 0, _body(entry))


def _body(entry: Neighbour) -> bytes:
    flags, state = (NTF_PROXY, 0) if entry.mac is None else (0, NUD_PERMANENT)
    body = _NDMSG.pack(_FAMILY[entry.net.version], entry.ifindex, state, flags, 0)
    body += attribute(_NDA_DST, entry.net.packed())
    if entry.mac is not None:
        body += attribute(_NDA_LLADDR, mac_bytes(entry.mac))
    return body


def parse_neighbour(body: bytes) -> Neighbour | None:
    """The entry of an RTM_NEWNEIGH message; None if it is neither permanent nor proxy."""
    family, ifindex, state, flags, _ = _NDMSG.unpack_from(body)
    proxy = bool(flags & NTF_PROXY)
    if family not in _VERSION or not (proxy or state & NUD_PERMANENT):
        return None
    found = attributes(body, _NDMSG.size)
    return Neighbour(
        ifindex=ifindex,
        net=host_net(_VERSION[family], int.from_bytes(found[_NDA_DST], "big")),
        mac=None if proxy else found.get(_NDA_LLADDR, b"").hex(":"),
        protocol=found[_NDA_PROTOCOL][0] if _NDA_PROTOCOL in found else 0,
    )
