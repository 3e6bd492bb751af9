"""Compact network addresses: what the loops use instead of ``ipaddress`` objects.

A ``Net`` is a named tuple of ints, so it hashes, compares and sorts at C speed and packs
straight into netlink bytes. Text goes in and out at the edges, through ``parse_net`` and
``str``.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import NamedTuple

V4 = 4
V6 = 6
BITS = {V4: 32, V6: 128}


class Net(NamedTuple):
    """A network: IP version (4 or 6), address as an int, prefix length in bits."""

    version: int
    address: int
    length: int

    def __str__(self) -> str:
        return f"{format_address(self.version, self.address)}/{self.length}"

    @property
    def is_host(self) -> bool:
        """True for a /32 or /128."""
        return self.length == BITS[self.version]

    @property
    def size(self) -> int:
        """How many addresses the network holds."""
        return 1 << (BITS[self.version] - self.length)

    def contains(self, other: Net) -> bool:
        """Whether ``other`` lies inside this network (or is it)."""
        if other.version != self.version or other.length < self.length:
            return False
        shift = BITS[self.version] - self.length
        return other.address >> shift == self.address >> shift

    def overlaps(self, other: Net) -> bool:
        """Whether the two share any address."""
        return self.contains(other) or other.contains(self)

    def packed(self) -> bytes:
        """The address in network byte order: 4 or 16 bytes."""
        return self.address.to_bytes(BITS[self.version] // 8, "big")


def parse_net(text: str, *, strict: bool = True) -> Net:
    """Parse ``10.0.0.0/26``, or a bare address as a /32 or /128.

    Raises ValueError on anything else (netmasks, zones) and, when ``strict``, on host bits.
    """
    plain = _plain(text)
    if plain is not None and not (strict and plain[0].address != plain[1].address):
        return plain[1]
    _refuse_masks_and_zones(text)
    network = ipaddress.ip_network(text, strict=strict)
    return Net(network.version, int(network.network_address), network.prefixlen)


def parse_interface(text: str) -> tuple[Net, Net]:
    """Parse ``10.0.0.5/26`` to (host address as a /32, its network as a /26).

    Raises ValueError on anything else.
    """
    plain = _plain(text)
    if plain is not None:
        return plain
    _refuse_masks_and_zones(text)
    interface = ipaddress.ip_interface(text)
    version, bits = interface.version, interface.max_prefixlen
    return (
        Net(version, int(interface.ip), bits),
        Net(version, int(interface.network.network_address), interface.network.prefixlen),
    )


_LENGTHS = {str(length): length for length in range(33)}


def _plain(text: str) -> tuple[Net, Net] | None:
    """As ``parse_interface``, of IPv4 as nearly everybody writes it; else None.

    ``ipaddress`` takes several times as long, and network sets may have ten thousand of them.
    """
    host, slash, length_text = text.partition("/")
    length = _LENGTHS.get(length_text) if slash else 32
    if length is None:
        return None
    try:
        address = int.from_bytes(socket.inet_pton(socket.AF_INET, host), "big")
    except (OSError, ValueError):
        return None
    shift = 32 - length
    return Net(V4, address, 32), Net(V4, address >> shift << shift, length)


def parse_as_number(text: str) -> int:
    """Parse an AS number: ``64512``, or dotted as in RFC 5396: ``1.10``. Raises ValueError."""
    number = -1
    if re.fullmatch(r"[0-9]{1,10}", text):
        number = int(text)
    elif re.fullmatch(r"[0-9]{1,5}\.[0-9]{1,5}", text):
        high, low = (int(part) for part in text.split("."))
        if high < 1 << 16 and low < 1 << 16:
            number = (high << 16) + low
    if not 0 <= number < 1 << 32:
        raise ValueError(f"{text!r} is no AS number from 0 to 4294967295, nor one such as 1.10")
    return number


def _refuse_masks_and_zones(text: str) -> None:
    # ipaddress would take 10.0.0.0/255.0.0.0 and fe80::1%eth0
    length = text.partition("/")[2]
    if "%" in text or "." in length or ":" in length:
        raise ValueError(f"{text!r} is not an address or a CIDR such as 10.0.0.0/26")


def host_net(version: int, address: int) -> Net:
    """The /32 or /128 of an address."""
    return Net(version, address, BITS[version])


def format_address(version: int, address: int) -> str:
    """Text of an address without its length."""
    if version == V4:
        return f"{address >> 24}.{address >> 16 & 255}.{address >> 8 & 255}.{address & 255}"
    return str(ipaddress.IPv6Address(address))
