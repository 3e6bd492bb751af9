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

_HEADER_SIZE, _TYPE_OFFSET, _PORT_OFFSET = 16, 4, 12  # of struct nlmsghdr
_NOBODY = 0xFFFFFFFF  # 0 is the kernel
# linux/filter.h, linux/bpf_common.h
_BPF_LOAD_HALF, _BPF_LOAD_BYTE, _BPF_LOAD_WORD, _BPF_LOAD_WORD_AT_X = 0x28, 0x30, 0x20, 0x40
_BPF_LOAD, _BPF_LOAD_X, _BPF_TO_X, _BPF_JUMP_IF_EQUAL = 0x00, 0x01, 0x07, 0x15
_BPF_KEEP, _BPF_DROP = (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)
_SKF_AD_NLATTR = 0xFFFFF000 + 12  # finds the attribute X of a message, from A on


@dataclass(frozen=True, slots=True)
class KernelChanged:
    """Something changed that may matter to next hops or to our routes: read it again."""


class KernelWatch:
    """A thread that tells ``sink`` of changes, once until ``rearm`` is called.

    Interfaces of pods are left out, routes to pods inside of ``blocks``, and what BIRD writes
    with one of ``bird_metrics``. ``stop`` may come from any thread, once.

    Of the routes that BGP itself writes, of which there may be thousands at once, the kernel
    doesn't even wake the thread.
    """

    def __init__(self, sink: Callable[[KernelChanged], object], own_port: int = 0) -> None:
        """``own_port``: of the netlink socket whose changes are known here anyhow."""
        self._sink = sink
        self._own_port = own_port
        self.blocks: tuple[Net, ...] = ()
        self._bird_metrics: frozenset[int] = frozenset()
        self._socket = NetlinkSocket(groups=_GROUPS)
        self._socket.set_filter(_written_by_bgp(own_port, self._bird_metrics))
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kernel-watch", daemon=True)

    @property
    def bird_metrics(self) -> frozenset[int]:
        """The metrics of BIRD's routes that are our business; empty while it doesn't run."""
        return self._bird_metrics

    @bird_metrics.setter
    def bird_metrics(self, metrics: frozenset[int]) -> None:
        if metrics != self._bird_metrics:
            self._bird_metrics = metrics
            self._socket.set_filter(_written_by_bgp(self._own_port, metrics))

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
        return any(_matters(message, self.blocks) for message in messages)


def _written_by_bgp(own_port: int, bird_metrics: frozenset[int]) -> list[tuple[int, int, int, int]]:
    """A BPF program that drops what this program did, new routes of BGP, and all of BIRD with
    one of the metrics. That somebody else deletes a route of BGP is heard of.
    """
    own = [
        (_BPF_LOAD_WORD, 0, 0, _PORT_OFFSET),
        (_BPF_JUMP_IF_EQUAL, 0, 1, _loaded(own_port or _NOBODY, 4)),
        _BPF_DROP,
    ]
    drop = [(_BPF_JUMP_IF_EQUAL, 0, 1, _loaded(m, 4)) for m in sorted(bird_metrics)]
    of_bird = [
        (_BPF_LOAD, 0, 0, _HEADER_SIZE + _RTMSG_SIZE),
        (_BPF_LOAD_X, 0, 0, _RTA_PRIORITY),
        (_BPF_LOAD_WORD, 0, 0, _SKF_AD_NLATTR),  # where the attribute is
        (_BPF_JUMP_IF_EQUAL, 0, 1, 0),
        _BPF_KEEP,
        (_BPF_TO_X, 0, 0, 0),
        (_BPF_LOAD_WORD_AT_X, 0, 0, 4),
        *(step for test in drop for step in (test, _BPF_DROP)),
        _BPF_KEEP,
    ]
    new = [
        (_BPF_JUMP_IF_EQUAL, 0, 3, _loaded(RTM_NEWROUTE, 2)),
        (_BPF_LOAD_BYTE, 0, 0, _HEADER_SIZE + _PROTOCOL_OFFSET),
        (_BPF_JUMP_IF_EQUAL, 0, 4, PROTO_BGP),
        _BPF_DROP,
    ]
    gone = [
        (_BPF_JUMP_IF_EQUAL, 1, 0, _loaded(RTM_DELROUTE, 2)),
        _BPF_KEEP,
        (_BPF_LOAD_BYTE, 0, 0, _HEADER_SIZE + _PROTOCOL_OFFSET),
    ]
    bird = [(_BPF_JUMP_IF_EQUAL, 1, 0, PROTO_BIRD), _BPF_KEEP]
    return [*own, (_BPF_LOAD_HALF, 0, 0, _TYPE_OFFSET), *new, *gone, *bird, *of_bird]


def _loaded(number: int, size: int) -> int:
    """What a number in host order is where BPF loads it, in network order."""
    return int.from_bytes(number.to_bytes(size, sys.byteorder), "big")


def _matters(message: Message, blocks: tuple[Net, ...]) -> bool:
    if message.type in (RTM_NEWROUTE, RTM_DELROUTE):
        return message.body[_PROTOCOL_OFFSET] != PROTO_FELIX or _is_told(message.body, blocks)
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
