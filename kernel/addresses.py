"""Addresses of interfaces: read, add, delete. See ip-address(8)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from api.net import BITS, V4, V6, Net, format_address, host_net
from kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    attribute,
    attribute_u32,
    attributes,
)

RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22

SCOPE_GLOBAL = 0
SCOPE_LINK = 253
SCOPE_HOST = 254

_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFA_FLAGS = 8
_IFA_F_NODAD = 0x2

_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_FAMILY = {V4: 2, V6: 10}
_VERSION = {2: V4, 10: V6}


class AddressKey(NamedTuple):
    """What makes an address unique."""

    ifindex: int
    host: Net
    length: int
    peer: Net | None = None


@dataclass(frozen=True, slots=True)
class Address:
    """``host`` (a /32 or /128) on an interface, whose subnet has ``length`` bits.

    ``peer`` is the other end of a point-to-point link, if it is another; of IPv4 alone, where an
    address may be there once for each.
    """

    ifindex: int
    host: Net
    length: int
    scope: int = SCOPE_GLOBAL
    peer: Net | None = None

    @property
    def key(self) -> AddressKey:
        """Its place in the table."""
        return AddressKey(self.ifindex, self.host, self.length, self.peer)

    @property
    def network(self) -> Net:
        """The subnet the address is in."""
        shift = BITS[self.host.version] - self.length
        return Net(self.host.version, self.host.address >> shift << shift, self.length)

    def __str__(self) -> str:
        return f"{format_address(self.host.version, self.host.address)}/{self.length}"


class Addresses:
    """The addresses of the namespace that ``socket`` speaks to."""

    def __init__(self, socket: NetlinkSocket) -> None:
        self._socket = socket

    def read(self, *, version: int, ifindex: int = 0) -> dict[AddressKey, Address]:
        """All addresses, or those of one interface (``ip -4 address show``)."""
        body = _IFADDR.pack(_FAMILY[version], 0, 0, 0, ifindex)
        found = map(parse_address, self._socket.dump(Message(RTM_GETADDR, 0, body)))
        return {address.key: address for address in found}


def parse_address(body: bytes) -> Address:
    """The address that an RTM_NEWADDR or RTM_DELADDR message is about."""
    family, length, _, scope, ifindex = _IFADDR.unpack_from(body)
    found = attributes(body, _IFADDR.size)
    # on point-to-point links IFA_ADDRESS is the other end
    far = found.get(_IFA_ADDRESS, b"")
    host = _host(family, found.get(_IFA_LOCAL, far))
    peer = _host(family, far) if far and host.version == V4 else host
    return Address(ifindex, host, length, scope, None if peer == host else peer)


def _host(family: int, packed: bytes) -> Net:
    return host_net(_VERSION[family], int.from_bytes(packed, "big"))


def address_add(address: Address) -> Message:
    """``ip address replace``; IPv6 without duplicate address detection (``nodad``)."""
    body = _body(address)
    if address.host.version == V6:
        body += attribute_u32(_IFA_FLAGS, _IFA_F_NODAD)
    return Message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def address_delete(address: Address) -> Message:
    """``ip address del``."""
    return Message(RTM_DELADDR, 0, _body(address))


def _body(address: Address) -> bytes:
    header = _IFADDR.pack(
        _FAMILY[address.host.version], address.length, 0, address.scope, address.ifindex
    )
    far = address.peer or address.host
    local = attribute(_IFA_LOCAL, address.host.packed())
    return header + local + attribute(_IFA_ADDRESS, far.packed())
