"""Forwarding database of a VXLAN device: behind which tunnel end a MAC address is.

See bridge(8). All entries with a remote on a device of ours are ours.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import NamedTuple

from api.net import V4, V6, Net, format_address, host_net
from kernel.neighbours import NUD_PERMANENT, RTM_DELNEIGH, RTM_GETNEIGH, RTM_NEWNEIGH
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
from kernel.table import apply_plan
from reconcile.plan import Plan

_AF_BRIDGE = 7
_NTF_SELF = 0x02
_NDA_DST = 1
_NDA_LLADDR = 2
_NDA_IFINDEX = 8

_NDMSG = struct.Struct("=BxxxiHBB")  # family, ifindex, state, flags, type


class FdbKey(NamedTuple):
    """What makes an entry unique."""

    ifindex: int
    mac: str


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """Frames to ``mac`` go to the tunnel end ``remote`` (a /32 or /128)."""

    ifindex: int
    mac: str
    remote: Net

    @property
    def key(self) -> FdbKey:
        """Its place in the table."""
        return FdbKey(self.ifindex, self.mac)

    def __str__(self) -> str:
        remote = format_address(self.remote.version, self.remote.address)
        return f"fdb {self.mac} dev #{self.ifindex} dst {remote}"


class Fdb:
    """The forwarding databases of the namespace that ``socket`` speaks to."""

    def __init__(self, socket: NetlinkSocket) -> None:
        self._socket = socket

    def read(self, ifindex: int) -> dict[FdbKey, FdbEntry]:
        """The entries of one device that have a remote (``bridge fdb show dev DEVICE``)."""
        body = _NDMSG.pack(_AF_BRIDGE, 0, 0, 0, 0) + attribute_u32(_NDA_IFINDEX, ifindex)
        found = map(_parse, self._socket.dump(Message(RTM_GETNEIGH, 0, body)))
        return {entry.key: entry for entry in found if entry and entry.ifindex == ifindex}

    def apply(self, plan: Plan[FdbKey, FdbEntry]) -> dict[FdbKey, OSError]:
        """Do the whole plan in one batch; returns the errors of the steps that failed.

        An entry to delete that is gone is no error.
        """
        return apply_plan(
            self._socket,
            plan,
            create=fdb_replace,
            update=fdb_replace,
            delete=fdb_delete,
            gone=errno.ENOENT,
        )


def fdb_replace(entry: FdbEntry) -> Message:
    """``bridge fdb replace MAC dev DEVICE dst REMOTE self permanent``."""
    remote = attribute(_NDA_DST, entry.remote.packed())
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, _body(entry) + remote)


def fdb_delete(entry: FdbEntry) -> Message:
    """``bridge fdb del MAC dev DEVICE self``: whichever remote it has."""
    return Message(RTM_DELNEIGH, 0, _body(entry))


def _body(entry: FdbEntry) -> bytes:
    body = _NDMSG.pack(_AF_BRIDGE, entry.ifindex, NUD_PERMANENT, _NTF_SELF, 0)
    return body + attribute(_NDA_LLADDR, mac_bytes(entry.mac))


def _parse(body: bytes) -> FdbEntry | None:
    """The entry of a message; None if it has no remote."""
    _, ifindex, _, _, _ = _NDMSG.unpack_from(body)
    found = attributes(body, _NDMSG.size)
    if _NDA_DST not in found or _NDA_LLADDR not in found:
        return None
    remote = found[_NDA_DST]
    version = V4 if len(remote) == 4 else V6
    return FdbEntry(
        ifindex, found[_NDA_LLADDR].hex(":"), host_net(version, int.from_bytes(remote, "big"))
    )
