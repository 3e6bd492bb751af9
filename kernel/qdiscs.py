"""Token buckets on interfaces, and the redirection of what arrives on one. See tc-tbf(8), tc(8).

Ours are recognised by numbers: the bucket is the root qdisc with handle ``4d58:`` ("MX"), the
filter has that preference among those of what arrives.

    tc qdisc replace dev DEV root handle 4d58: tbf rate RATE burst BURST limit LIMIT
    tc qdisc add dev DEV ingress
    tc filter replace dev DEV ingress pref 19800 protocol all u32 match u32 0 0
        action mirred egress redirect dev IFB
"""

from __future__ import annotations

import socket as sockets
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    attribute,
    attribute_text,
    attributes,
    nested,
    text,
)

RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46

OURS = 0x4D58
_HANDLE = OURS << 16
_ROOT = 0xFFFFFFFF
_INGRESS = 0xFFFF0000  # the handle of the qdisc of what arrives, and
_INGRESS_PARENT = 0xFFFFFFF1
_ARRIVING = 0xFFFFFFF2  # the parent of its filters; of "ingress" and of "clsact"

_TCMSG = struct.Struct("=BxxxiIII")  # family, interface, handle, parent, info
_RATE = struct.Struct("=BBHhHI")  # cell, link layer, overhead, align, mpu, bytes a second
_TBF = struct.Struct("=III")  # limit in bytes, buffer and mtu in ticks; after two rates
_U32 = struct.Struct("=BBBxHHHHI IIii")  # one key that matches everything
_MIRRED = struct.Struct("=IIiiiiI")
_U64 = struct.Struct("=Q")

_TCA_KIND = 1
_TCA_OPTIONS = 2
_TCA_TBF_PARMS = 1
_TCA_TBF_RATE64 = 4
_TCA_TBF_PRATE64 = 5
_TCA_U32_SEL = 5
_TCA_U32_ACT = 7
_TCA_ACT_KIND = 1
_TCA_ACT_OPTIONS = 2
_TCA_MIRRED_PARMS = 2

_ETHERNET = 1  # TC_LINKLAYER_ETHERNET: the kernel needs no table of the times that sizes take
_TERMINAL = 1  # TC_U32_TERMINAL
_STOLEN = 4  # TC_ACT_STOLEN
_EGRESS_REDIRECT = 1  # TCA_EGRESS_REDIR
_ETH_P_ALL = sockets.htons(3)
_TICK_NS = 64  # linux/pkt_sched.h PSCHED_SHIFT
_LARGEST = (1 << 32) - 1
_LATENCY = 40  # what the rate carries in the 40th part of a second may wait, beyond the burst


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket as the kernel has it: bytes a second, bytes, and times in ticks of 64 ns.

    ``peak`` 0: what is saved up goes at once. See ``bucket``.
    """

    rate: int
    limit: int
    buffer: int
    peak: int = 0
    peak_buffer: int = 0


def bucket(rate: int, burst: int, peak: int = 0, least: int = 0) -> Bucket:
    """The bucket of so many bytes a second that lets ``burst`` bytes through at once.

    ``peak``: in which case no faster than so many bytes a second, ``least`` bytes at once. Both
    numbers of bytes must be as large as a packet; they count for as much as the kernel can
    count, which is the traffic of 274 seconds.
    """
    return Bucket(
        rate,
        min(_LARGEST, burst + rate // _LATENCY),
        _ticks(burst, rate),
        peak,
        _ticks(least, peak) if peak else 0,
    )


def _ticks(size: int, rate: int) -> int:
    """How long ``size`` bytes take, rounded up, as far as the kernel counts."""
    return min(_LARGEST, -(-size * 1_000_000_000 // (rate * _TICK_NS)))


def _parse_bucket(options: Mapping[int, bytes]) -> Bucket:
    parameters = options[_TCA_TBF_PARMS]
    rate, peak = (_RATE.unpack_from(parameters, at)[-1] for at in (0, _RATE.size))
    limit, buffer, peak_buffer = _TBF.unpack_from(parameters, 2 * _RATE.size)
    if _TCA_TBF_RATE64 in options:
        rate = _U64.unpack(options[_TCA_TBF_RATE64])[0]
    if _TCA_TBF_PRATE64 in options:
        peak = _U64.unpack(options[_TCA_TBF_PRATE64])[0]
    return Bucket(rate, limit, buffer, peak, peak_buffer)


def bucket_replace(index: int, wanted: Bucket) -> Message:
    """The interface sends no faster than the bucket permits."""
    parameters = b"".join(
        (
            _RATE.pack(0, _ETHERNET, 0, 0, 0, min(wanted.rate, _LARGEST)),
            _RATE.pack(0, _ETHERNET if wanted.peak else 0, 0, 0, 0, min(wanted.peak, _LARGEST)),
            _TBF.pack(wanted.limit, wanted.buffer, wanted.peak_buffer),
        )
    )
    options = attribute(_TCA_TBF_PARMS, parameters)
    for kind, rate in ((_TCA_TBF_RATE64, wanted.rate), (_TCA_TBF_PRATE64, wanted.peak)):
        if rate > _LARGEST:
            options += attribute(kind, _U64.pack(rate))
    body = _TCMSG.pack(0, index, _HANDLE, _ROOT, 0)
    body += attribute_text(_TCA_KIND, "tbf") + nested(_TCA_OPTIONS, options)
    return Message(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body)


def bucket_delete(index: int) -> Message:
    """Take our bucket away; ENOENT or EINVAL where there is none."""
    return Message(RTM_DELQDISC, 0, _TCMSG.pack(0, index, _HANDLE, _ROOT, 0))


def arriving_add(index: int) -> Message:
    """Where filters of what arrives can be; EEXIST where that is there."""
    body = _TCMSG.pack(0, index, _INGRESS, _INGRESS_PARENT, 0) + attribute_text(
        _TCA_KIND, "ingress"
    )
    return Message(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, body)


def arriving_delete(index: int) -> Message:
    """Take that away, with all filters."""
    return Message(RTM_DELQDISC, 0, _TCMSG.pack(0, index, _INGRESS, _INGRESS_PARENT, 0))


def redirect_add(index: int, target: int) -> Message:
    """What arrives on an interface goes out of another; for an IFB: through its bucket."""
    redirect = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _EGRESS_REDIRECT, target)
    action = attribute_text(_TCA_ACT_KIND, "mirred") + nested(
        _TCA_ACT_OPTIONS, attribute(_TCA_MIRRED_PARMS, redirect)
    )
    selector = _U32.pack(_TERMINAL, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    options = attribute(_TCA_U32_SEL, selector) + nested(_TCA_U32_ACT, nested(1, action))
    body = _TCMSG.pack(0, index, 0, _ARRIVING, OURS << 16 | _ETH_P_ALL)
    body += attribute_text(_TCA_KIND, "u32") + nested(_TCA_OPTIONS, options)
    return Message(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, body)


def redirect_delete(index: int, preference: int = OURS) -> Message:
    """Take a redirection of all protocols away; ENOENT or EINVAL where there is none."""
    info = preference << 16 | _ETH_P_ALL
    return Message(RTM_DELTFILTER, 0, _TCMSG.pack(0, index, 0, _ARRIVING, info))


class Qdiscs:
    """What there is of these in the namespace that ``socket`` speaks to."""

    def __init__(self, socket: NetlinkSocket) -> None:
        self._socket = socket

    def buckets(self) -> dict[int, Bucket]:
        """Our buckets, by interface (``tc qdisc show``)."""
        found = {}
        for body in self._socket.dump(Message(RTM_GETQDISC, 0, _TCMSG.pack(0, 0, 0, 0, 0))):
            _, index, handle, _, _ = _TCMSG.unpack_from(body)
            known = attributes(body, _TCMSG.size)
            if handle == _HANDLE and text(known.get(_TCA_KIND, b"")) == "tbf":
                found[index] = _parse_bucket(attributes(known[_TCA_OPTIONS]))
        return found

    def redirect(self, index: int) -> int:
        """Where what arrives on an interface is redirected to by us; 0: nowhere."""
        return self.redirects(index).get(OURS, 0)

    def redirects(self, index: int) -> dict[int, int]:
        """The same of everybody, by preference, as far as a u32 filter does it."""
        found: dict[int, int] = {}
        for info, known in self._filters(index):
            options = attributes(known.get(_TCA_OPTIONS, b""))
            action = attributes(attributes(options.get(_TCA_U32_ACT, b"")).get(1, b""))
            if text(action.get(_TCA_ACT_KIND, b"")) == "mirred":
                parameters = attributes(action.get(_TCA_ACT_OPTIONS, b""))[_TCA_MIRRED_PARMS]
                found[info >> 16] = _MIRRED.unpack_from(parameters)[-1]
        return found

    def filtered(self, index: int) -> bool:
        """Whether there are any filters of what arrives on an interface."""
        return bool(self._filters(index))

    def _filters(self, index: int) -> list[tuple[int, dict[int, bytes]]]:
        body = _TCMSG.pack(0, index, 0, _ARRIVING, 0)
        found = self._socket.dump(Message(RTM_GETTFILTER, 0, body))
        return [(_TCMSG.unpack_from(body)[4], attributes(body, _TCMSG.size)) for body in found]
