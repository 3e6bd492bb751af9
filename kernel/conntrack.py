"""Connection tracking: the flows the kernel knows, and the end of some. See conntrack(8).

Speaks ctnetlink (linux/netfilter/nfnetlink_conntrack.h). A table may hold hundreds of thousands
of flows, and the kernel has no index by address: to read it takes time in proportion to all of
them. So flows come one at a time, only their ends are looked at before one is known to be wanted,
and the kernel can be asked to send those of one address alone.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from itertools import chain, islice
from operator import eq
from typing import NamedTuple

from api.net import BITS, V4, V6, Net
from kernel.netlink import (
    NETLINK_NETFILTER,
    Message,
    NetlinkSocket,
    attribute,
    attribute_u32,
    attributes,
    nested,
)

_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_NEW, _GET, _DELETE, _GET_STATS = (_SUBSYSTEM | n for n in (0, 1, 2, 5))
_FAMILIES = {V4: 2, V6: 10}

_ORIGINAL, _REPLY, _STATUS, _MARK, _ID, _MASTER, _ZONE, _FILTER = 1, 2, 3, 8, 12, 14, 18, 25
_ADDRESSES, _PROTOCOL = 1, 2  # of a tuple
_SOURCE = {V4: 1, V6: 3}
_DESTINATION = {V4: 2, V6: 4}
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_ICMP_ID = {V4: 4, V6: 7}
_ICMP_TYPE = {V4: 5, V6: 8}
_ICMP_CODE = {V4: 6, V6: 9}
_ENTRIES = 1  # of the statistics
_FILTERS = {_ORIGINAL: 1, _REPLY: 2}
# Of which tuple, which end, and the flag that has it compared (CTA_FILTER_F_CTA_IP_…).
_FILTERED_ENDS = (
    (_ORIGINAL, _SOURCE[V4], 1),
    (_ORIGINAL, _DESTINATION[V4], 2),
    (_REPLY, _SOURCE[V4], 1),
)
_STEP = 100
# The kernel goes through its table for every end that it is asked about. To be told of so many
# flows takes as long, where these are few addresses.
_WALK, _FEW = 2500, 4

_NESTED = 0x8000
# What a tuple begins with, as the kernel writes it: the heads (length, type) of the tuple, its
# addresses and the source among them, one inside the other.
_HEADS = struct.Struct("=HHHHHH")


# A tuple with ports: of each attribute the type (its length is passed over) and the value.
_PORTED = {
    version: struct.Struct(f"=2xH2xH{size}s2xH{size}s2xH2xHB3x2xH2s2x2xH2s2x")
    for version, size in ((V4, 4), (V6, 16))
}
_PORTED_KINDS = {
    version: (
        _NESTED | _ADDRESSES,
        _SOURCE[version],
        _DESTINATION[version],
        _NESTED | _PROTOCOL,
        _NUMBER,
        _SOURCE_PORT,
        _DESTINATION_PORT,
    )
    for version in (V4, V6)
}


class Status(IntFlag):
    """What the kernel knows of a flow (``IPS_…``); the ones that matter here."""

    EXPECTED = 1  # it belongs to another flow, its master, as FTP's data to its commands
    SEEN_REPLY = 2
    ASSURED = 4
    SOURCE_NAT = 16
    DESTINATION_NAT = 32


class Tuple(NamedTuple):
    """The packets of a flow in one direction, as they are when they reach the kernel.

    Addresses are a /32 or /128. What the protocol does not have is None.
    """

    src: Net
    dst: Net
    protocol: int
    src_port: int | None = None
    dst_port: int | None = None
    icmp_id: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow: the packets of who began it, and those that answer, which NAT may have made unlike.

    So ``reply.src`` and ``reply.src_port`` are where the packets really go, and ``reply.dst`` as
    which their source is seen there. ``master`` is whom an expected flow belongs to, as that
    began. ``key`` is how the kernel is told which flow is meant.
    """

    original: Tuple
    reply: Tuple
    status: int
    mark: int
    zone: int
    id: int
    master: Tuple | None
    key: bytes

    def __str__(self) -> str:
        return f"flow {_shown(self.original)}, answered {_shown(self.reply)}"


class Conntrack:
    """The flows in one network namespace.

    That of the calling thread, unless ``netns_fd`` names another. For one thread at a time.
    """

    def __init__(self, *, netns_fd: int | None = None) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER, netns_fd=netns_fd)

    def __enter__(self) -> Conntrack:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def count(self) -> int:
        """How many flows there are, of both IP versions (``conntrack -C``). Raises OSError."""
        found = attributes(self._socket.request(Message(_GET_STATS, 0, _preamble(V4))), 4)
        return _number(found, _ENTRIES)

    def flows(self, version: int, ends: Container[bytes] | None = None) -> Iterator[Flow]:
        """All flows of an IP version (``conntrack -L -f ipv4``). Raises OSError.

        With ``ends`` those that have one of these addresses (packed) at either end, translated or
        not. To be read to the end. A flow that comes or goes meanwhile is or isn't among them.
        """
        return chain.from_iterable(self.steps(version, ends))

    def steps(self, version: int, ends: Container[bytes] | None = None) -> Iterator[list[Flow]]:
        """As ``flows``, but what is among every so many of the kernel's, to be busy with others
        in between.
        """
        bodies = self._socket.stream(Message(_GET, 0, _preamble(version)))
        while some := list(islice(bodies, _STEP)):
            yield [
                parse_flow(body)
                for body in some
                if ends is None or any(map(ends.__contains__, _ends(body, version)))
            ]

    def flows_of(self, address: Net, *, meant: bool = False) -> list[Flow]:
        """The flows that an address began, or that are really with it.

        ``conntrack -L -s ADDRESS`` and ``-r ADDRESS``; with ``meant`` also ``-d ADDRESS``: those
        that were for it, wherever they went. Raises OSError.

        The kernel chooses them in IPv4; asked the same in IPv6 it sends all the others.
        """
        some = chain.from_iterable(self._chosen(address, meant))
        return list({flow.key: flow for flow in some}.values())

    def steps_of(
        self, version: int, addresses: Collection[Net], *, meant: bool = False
    ) -> Iterator[list[Flow]]:
        """As ``flows_of``, of any of these addresses, but in steps as ``steps``.

        Asked in the cheapest way: some may come twice, and some that aren't ``meant``, too.
        """
        if not addresses:
            return
        walks = len(addresses) * (3 if meant else 2)
        if version == V4 and len(addresses) <= _FEW and self.count() > walks * _WALK:
            yield from chain.from_iterable(self._chosen(address, meant) for address in addresses)
        else:
            yield from self.steps(version, {address.packed() for address in addresses})

    def _chosen(self, address: Net, meant: bool) -> Iterator[list[Flow]]:
        """Chosen by the kernel; one that moves in its table meanwhile may come twice."""
        version, packed = address.version, address.packed()
        wanted = (packed, packed if meant else None, packed)
        if version == V4:
            answers = [
                self._filtered(kind, end, flag, packed)
                for kind, end, flag in (_FILTERED_ENDS if meant else _FILTERED_ENDS[::2])
            ]
        else:
            answers = [self._socket.stream(Message(_GET, 0, _preamble(version)))]
        for number, answer in enumerate(answers):
            while some := list(islice(answer, _STEP)):
                found = ((body, _ends(body, version)) for body in some)
                # Told of before. And a kernel before 5.8 sends everything.
                yield [
                    parse_flow(body)
                    for body, ends in found
                    if packed not in ends[:number] and any(map(eq, ends, wanted))
                ]

    def _filtered(self, kind: int, end: int, flag: int, address: bytes) -> Iterator[bytes]:
        """Those of IPv4 of which one of the tuples has this address at one end."""
        body = _preamble(V4)
        body += nested(kind, nested(_ADDRESSES, attribute(end, address)))
        body += nested(_FILTER, attribute_u32(_FILTERS[kind], flag))
        return self._socket.stream(Message(_GET, 0, body))

    def find(self, original: Tuple) -> Flow | None:
        """The flow that began so, in the default zone. Raises OSError."""
        key = _preamble(original.src.version) + _encode(original)
        try:
            return parse_flow(self._socket.request(Message(_GET, 0, key)))
        except FileNotFoundError:
            return None

    def delete(self, flows: Iterable[Flow]) -> int:
        """Forget these flows (``conntrack -D``); returns how many were still there.

        The next packet of one begins a flow anew. Raises OSError.
        """
        doomed = list(flows)
        failures = self._socket.batch([Message(_DELETE, 0, flow.key) for flow in doomed])
        for failure in failures:
            if failure.errno != errno.ENOENT:
                raise failure.error(doomed[failure.index])
        return len(doomed) - len(failures)


def parse_flow(body: bytes) -> Flow:
    """The flow that a message is about. Raises ValueError, KeyError on what is none."""
    found = attributes(body, 4)
    version = V4 if body[0] == _FAMILIES[V4] else V6
    key = [body[:1] + b"\0\0\0", attribute(_ORIGINAL | _NESTED, found[_ORIGINAL])]
    # The kernel compares the id, which nearly always tells a flow from one that began anew.
    key += [attribute(kind, found[kind]) for kind in (_ID, _ZONE) if kind in found]
    return Flow(
        original=_parse_tuple(found[_ORIGINAL], version),
        reply=_parse_tuple(found[_REPLY], version),
        status=_number(found, _STATUS),
        mark=_number(found, _MARK),
        zone=_number(found, _ZONE),
        id=_number(found, _ID),
        master=_parse_tuple(found[_MASTER], version) if _MASTER in found else None,
        key=b"".join(key),
    )


def _parse_tuple(data: bytes, version: int) -> Tuple:
    return _parse_ported(data, version) or _parse_any(data, version)


def _parse_ported(data: bytes, version: int) -> Tuple | None:
    """Of a protocol with ports, in the order the kernel has always had; else None. For speed."""
    layout = _PORTED[version]
    if len(data) != layout.size:
        return None
    a, b, src, c, dst, d, e, protocol, f, src_port, g, dst_port = layout.unpack(data)
    if (a, b, c, d, e, f, g) != _PORTED_KINDS[version]:
        return None
    bits = BITS[version]
    return Tuple(
        Net(version, int.from_bytes(src, "big"), bits),
        Net(version, int.from_bytes(dst, "big"), bits),
        protocol,
        int.from_bytes(src_port, "big"),
        int.from_bytes(dst_port, "big"),
    )


def _parse_any(data: bytes, version: int) -> Tuple:
    parts = attributes(data)
    addresses, protocol = attributes(parts[_ADDRESSES]), attributes(parts[_PROTOCOL])

    def address(kind: int) -> Net:
        raw = addresses[kind]
        if len(raw) * 8 != BITS[version]:
            raise ValueError(f"conntrack: address of {len(raw)} bytes in IPv{version}")
        return Net(version, int.from_bytes(raw, "big"), BITS[version])

    def number(kind: int) -> int | None:
        return int.from_bytes(protocol[kind], "big") if kind in protocol else None

    return Tuple(
        address(_SOURCE[version]),
        address(_DESTINATION[version]),
        protocol[_NUMBER][0],
        number(_SOURCE_PORT),
        number(_DESTINATION_PORT),
        number(_ICMP_ID[version]),
        number(_ICMP_TYPE[version]),
        number(_ICMP_CODE[version]),
    )


def _encode(own: Tuple) -> bytes:
    """As a flow's original tuple."""
    version = own.src.version
    protocol = [attribute(_NUMBER, bytes((own.protocol,)))]
    for kind, size, value in (
        (_SOURCE_PORT, 2, own.src_port),
        (_DESTINATION_PORT, 2, own.dst_port),
        (_ICMP_ID[version], 2, own.icmp_id),
        (_ICMP_TYPE[version], 1, own.icmp_type),
        (_ICMP_CODE[version], 1, own.icmp_code),
    ):
        if value is not None:
            protocol.append(attribute(kind, value.to_bytes(size, "big")))
    addresses = (
        attribute(_SOURCE[version], own.src.packed()),
        attribute(_DESTINATION[version], own.dst.packed()),
    )
    return nested(_ORIGINAL, nested(_ADDRESSES, *addresses), nested(_PROTOCOL, *protocol))


def _ends(body: bytes, version: int) -> Sequence[bytes]:
    """Where a flow began, for whom, who answers, and whom; cheaper than to parse it."""
    size = BITS[version] // 8
    expected = [_NESTED | _ADDRESSES, 4 + size, _SOURCE[version]]
    found: list[bytes] = []
    offset = 4
    for kind in (_ORIGINAL, _REPLY):
        length, outer, _, *inner = _HEADS.unpack_from(body, offset)
        if outer != _NESTED | kind or inner != expected:
            # Not in the order that the kernel has always had.
            flow = parse_flow(body)
            both = (flow.original, flow.reply)
            return [end.packed() for each in both for end in (each.src, each.dst)]
        first, second = offset + 12, offset + 16 + size
        found += (body[first : first + size], body[second : second + size])
        offset += (length + 3) & ~3
    return found


def _preamble(version: int) -> bytes:
    """struct nfgenmsg: family, version, resource id."""
    return bytes((_FAMILIES[version], 0, 0, 0))


def _number(found: Mapping[int, bytes], kind: int) -> int:
    return int.from_bytes(found.get(kind, b""), "big")


def _shown(own: Tuple) -> str:
    ports = "" if own.src_port is None else f" ports {own.src_port}, {own.dst_port}"
    return f"{own.src} to {own.dst} protocol {own.protocol}{ports}"
