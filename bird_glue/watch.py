"""Tells when the kernel's routes, addresses or interfaces changed, and reads them."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from api.net import BITS, V4, V6, Net, format_address, host_net
from bird_glue.nexthops import Topology
from bird_glue.settings import DEFAULT_PRIORITY
from kernel.addresses import RTM_DELADDR, RTM_NEWADDR, Addresses
from kernel.links import RTM_DELLINK, RTM_NEWLINK, Links, parse_link
from kernel.netlink import Message, NetlinkSocket, attributes
from kernel.routes import (
    PROTO_BGP,
    PROTO_BIRD,
    PROTO_FELIX,
    RTM_DELROUTE,
    RTM_NEWROUTE,
    Route,
    Routes,
)

# RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_RTMSG_SIZE = 12  # of struct rtmsg, with rtm_dst_len and rtm_protocol at these offsets:
_LENGTH_OFFSET = 1
_PROTOCOL_OFFSET = 5
_RTA_DST = 1
_RTA_PRIORITY = 6
_AF_BRIDGE = 7
_POD_PREFIX = "cali"
_RTM_GETNEIGH = 30
_NDMSG = struct.Struct("=BxxxiHBB")  # family, ifindex, state, flags, type
_NDA_DST = 1
_NUD_FAILED = 0x20
_FAMILY = {V4: socket.AF_INET, V6: socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class KernelChanged:
    """Something changed that may matter to next hops or to our routes: read it again."""


class KernelWatch:
    """A thread that tells ``sink`` of changes, once until ``rearm`` is called.

    Interfaces of pods are left out, routes to pods inside of ``blocks``, and what BIRD writes
    with one of ``bird_metrics``. ``stop`` may come from any thread, once.
    """

    def __init__(self, sink: Callable[[KernelChanged], object]) -> None:
        self._sink = sink
        self.blocks: tuple[Net, ...] = ()
        self.bird_metrics: frozenset[int] = frozenset()
        self._socket = NetlinkSocket(groups=_GROUPS)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kernel-watch", daemon=True)

    def start(self) -> None:
        """Start telling."""
        self._thread.start()

    def rearm(self) -> None:
        """What was told of is about to be read: tell of what comes from here on."""
        self._told.clear()

    def stop(self) -> None:
        """End the thread, and wait until it has ended."""
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()
        os.close(self._wake)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while self._wake not in {fd for fd, _ in poll.poll()}:
            if self._matters() and not self._told.is_set():
                self._told.set()
                self._sink(KernelChanged())

    def _matters(self) -> bool:
        try:
            messages = self._socket.receive()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return True
        blocks, metrics = self.blocks, self.bird_metrics
        return any(_matters(message, blocks, metrics) for message in messages)


def _matters(message: Message, blocks: tuple[Net, ...], bird_metrics: frozenset[int]) -> bool:
    if message.type in (RTM_NEWROUTE, RTM_DELROUTE):
        protocol = message.body[_PROTOCOL_OFFSET]
        if protocol == PROTO_BGP:
            return message.type == RTM_DELROUTE  # by us, or by someone who should not
        if protocol == PROTO_BIRD:
            metric = attributes(message.body, _RTMSG_SIZE).get(_RTA_PRIORITY, bytes(4))
            return int.from_bytes(metric, sys.byteorder) not in bird_metrics
        return protocol != PROTO_FELIX or _is_told(message.body, blocks)
    if message.type in (RTM_NEWLINK, RTM_DELLINK):
        return message.body[0] != _AF_BRIDGE and not parse_link(message.body).name.startswith(
            _POD_PREFIX
        )
    return message.type in (RTM_NEWADDR, RTM_DELADDR)


def _is_told(route: bytes, blocks: tuple[Net, ...]) -> bool:
    """Whether a route of felix is to an address outside of the blocks, or has a metric."""
    version = V4 if route[0] == socket.AF_INET else V6
    destination = attributes(route, _RTMSG_SIZE).get(_RTA_DST, b"")
    if route[_LENGTH_OFFSET] != BITS[version] or not destination:
        return False
    metric = attributes(route, _RTMSG_SIZE).get(_RTA_PRIORITY, bytes(4))
    if int.from_bytes(metric, sys.byteorder) not in (0, DEFAULT_PRIORITY):
        return True
    host = host_net(version, int.from_bytes(destination, "big"))
    return not any(block.contains(host) for block in blocks)


class KernelReader:
    """What the kernel says of the network around this machine."""

    def __init__(self, netlink: NetlinkSocket) -> None:
        self._netlink = netlink

    def topology(self, owns: Callable[[Route], bool]) -> Topology:
        """Routes, addresses and interfaces with a carrier. Raises OSError.

        ``owns``: whether BGP on this node has put a route there, which is then left out.
        """
        links = Links(self._netlink).read().values()
        routes = Routes(self._netlink)
        addresses = Addresses(self._netlink)
        return Topology(
            [r for v in (V4, V6) for r in routes.read(version=v).values() if not owns(r)],
            [address.host for v in (V4, V6) for address in addresses.read(version=v).values()],
            frozenset(link.index for link in links if link.running),
            {link.index: link.name for link in links},
        )

    def silent(self, host: Net) -> bool:
        """Whether the address was asked for on its link and nobody answered (ARP, NDP)."""
        body = _NDMSG.pack(_FAMILY[host.version], 0, 0, 0, 0)
        for answer in self._netlink.dump(Message(_RTM_GETNEIGH, 0, body)):
            _, _, state, _, _ = _NDMSG.unpack_from(answer)
            if state & _NUD_FAILED:
                destination = attributes(answer, _NDMSG.size).get(_NDA_DST, b"")
                if host_net(host.version, int.from_bytes(destination, "big")) == host:
                    return True
        return False


def source_of(host: Net) -> Net | None:
    """The address this machine would speak from (``ip route get``); None without a route."""
    with socket.socket(_FAMILY[host.version], socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((format_address(*host[:2]), 9))  # sends nothing
        except OSError:
            return None
        text = probe.getsockname()[0]
    return host_net(host.version, int.from_bytes(socket.inet_pton(_FAMILY[host.version], text)))
