"""Who else changes a table of nftables: told the moment it happens (``nft monitor``).

The kernel tells of every change of every table, and kube-proxy makes many. So a datagram is looked
into only if the table's name is in it, which costs next to nothing to see.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kernel.netlink import NETLINK_NETFILTER, MessagesLostError, NetlinkSocket, attribute_text

_GROUP = 1 << 7 - 1  # NFNLGRP_NFTABLES
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_TABLE = 1  # every message of a table begins with its name, as this attribute
_HEAD = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_FAMILIES = (2, 10)
_BODY = _HEAD.size + 4  # struct nfgenmsg


@dataclass(frozen=True, slots=True)
class TableChanged:
    """Somebody else changed the table, or may have."""


class TableMonitor:
    """A thread that tells ``sink`` when others change the tables ``name`` of IPv4 and IPv6.

    ``own`` are the ports of the sockets whose changes are no news (``NetlinkSocket.port``). It
    hears from the moment it is made. ``stop`` may come from any thread.
    """

    def __init__(
        self,
        name: str,
        own: Collection[int],
        sink: Callable[[TableChanged], None],
        *,
        netns_fd: int | None = None,
    ) -> None:
        self._named = attribute_text(_TABLE, name)
        self._own = own
        self._sink = sink
        self._socket = NetlinkSocket(NETLINK_NETFILTER, groups=_GROUP, netns_fd=netns_fd)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="table-monitor", daemon=True)

    def start(self) -> None:
        """Start telling."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait until it has ended. Call it once."""
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()
        os.close(self._wake)

    def __enter__(self) -> TableMonitor:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake in ready:
                return
            try:
                news = self._is_news(self._socket.receive_raw())
            except MessagesLostError:
                news = True
            if news:
                self._sink(TableChanged())

    def _is_news(self, data: bytes) -> bool:
        """Whether a datagram, which is of one transaction, tells of a change by others."""
        if self._named not in data or _HEAD.unpack_from(data)[4] in self._own:
            return False
        offset = 0
        while offset + _BODY <= len(data):
            length, kind, _, _, _ = _HEAD.unpack_from(data, offset)
            if (
                kind >> 8 == _SUBSYSTEM
                and data[offset + _HEAD.size] in _FAMILIES
                and data.startswith(self._named, offset + _BODY)
            ):
                return True
            offset += (length + 3) & ~3
        return False
