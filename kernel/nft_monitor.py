"""Who else changes tables of nftables: told the moment it happens (``nft monitor``).

The kernel tells of every change of every table, and kube-proxy makes many. So a datagram is looked
into only if the table's name is in it, which costs next to nothing to see.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from kernel.netlink import NETLINK_NETFILTER, MessagesLostError, NetlinkSocket, attribute_text

_GROUP = 1 << 7 - 1  # NFNLGRP_NFTABLES
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_TABLE = 1  # every message of a table begins with its name, as this attribute
_RULE_CHAIN, _CHAIN_NAME = 2, 3
_HEAD = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_FAMILIES = (2, 10)
_BODY = _HEAD.size + 4  # struct nfgenmsg


@dataclass(frozen=True, slots=True)
class TableChanged:
    """Somebody else changed the table, or may have."""

    table: str


@dataclass(frozen=True, slots=True)
class Watched:
    """The tables ``table`` of IPv4 and IPv6; with ``chains`` only these chains and their rules."""

    table: str
    chains: tuple[str, ...] = ()


class TableMonitor:
    """A thread that tells ``sink`` when others change what is watched.

    ``own`` are the ports of the sockets whose changes are no news (``NetlinkSocket.port``). It
    hears from the moment it is made. ``stop`` may come from any thread.
    """

    def __init__(
        self,
        watched: Collection[Watched],
        own: Collection[int],
        sink: Callable[[TableChanged], None],
        *,
        netns_fd: int | None = None,
    ) -> None:
        self._watched = [_Marks.of(each) for each in watched]
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
                news = list(self._news(self._socket.receive_raw()))
            except MessagesLostError:
                news = [each.table for each in self._watched]
            for table in news:
                self._sink(TableChanged(table))

    def _news(self, data: bytes) -> Iterator[str]:
        """The tables of whose change by others a datagram, which is of one transaction, tells."""
        for each in self._watched:
            if (
                each.may_be_in(data)
                and _HEAD.unpack_from(data)[4] not in self._own
                and each.is_in(data)
            ):
                yield each.table


@dataclass(frozen=True, slots=True)
class _Marks:
    """The bytes by which messages about a table, and chains in it, are known."""

    table: str
    named: bytes
    chains: tuple[bytes, ...]

    @classmethod
    def of(cls, watched: Watched) -> _Marks:
        chains = (
            attribute_text(kind, chain)
            for kind in (_RULE_CHAIN, _CHAIN_NAME)
            for chain in watched.chains
        )
        return cls(watched.table, attribute_text(_TABLE, watched.table), tuple(chains))

    def may_be_in(self, data: bytes) -> bool:
        """Whether a datagram is worth looking into."""
        return self.named in data and (
            not self.chains or any(chain in data for chain in self.chains)
        )

    def is_in(self, data: bytes) -> bool:
        """Whether any message of a datagram is about it."""
        offset = 0
        while offset + _BODY <= len(data):
            length, kind, _, _, _ = _HEAD.unpack_from(data, offset)
            if (
                kind >> 8 == _SUBSYSTEM
                and data[offset + _HEAD.size] in _FAMILIES
                and data.startswith(self.named, offset + _BODY)
                and (
                    not self.chains
                    or any(data.find(each, offset, offset + length) >= 0 for each in self.chains)
                )
            ):
                return True
            offset += (length + 3) & ~3
        return False
