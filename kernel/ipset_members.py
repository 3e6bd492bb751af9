"""Members of an ipset: their text, as ``ipset save`` prints it, and their netlink bytes.

See ipset(8), linux/netfilter/ipset/ip_set.h.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator

from api.net import V4, V6, format_address
from kernel.netlink import NLA_F_NET_BYTEORDER, attribute, attribute_list, attributes, nested

PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp", 136: "udplite"}
_PROTOCOL_NUMBERS = {name: number for number, name in PROTOCOLS.items()}

_DATA = 7
_IP = 1
_CIDR = 3
_PORT = 4
_PROTO = 7
_CADT_FLAGS = 8
_IPADDR = {V4: 1, V6: 2}
_NOMATCH = 1 << 2


def _address(version: int, address: str) -> bytes:
    family = socket.AF_INET if version == V4 else socket.AF_INET6
    packed = socket.inet_pton(family, address)
    return nested(_IP, attribute(_IPADDR[version] | NLA_F_NET_BYTEORDER, packed))


# A plain IPv4 address, as most members are, takes a short way.
_HOST4 = re.compile(r"[0-9.]+")
_HOST4_ENTRY = nested(_DATA, _address(V4, "0.0.0.0"))[:-4]
_HOST4_HEAD = nested(_IP, attribute(_IPADDR[V4], bytes(4)))[:-4]
_HOST4_TAILS = (b"", attribute(_CIDR, b"\x20"))


def encode_member(member: str) -> bytes:
    """A member as an entry of a bulk message. Raises ValueError."""
    try:
        if _HOST4.fullmatch(member):
            return _HOST4_ENTRY + socket.inet_pton(socket.AF_INET, member)
        plain, _, option = member.partition(" ")
        where, comma, service = plain.partition(",")
        address, slash, length = where.partition("/")
        version = V6 if ":" in address else V4
        data = _address(version, address)
        if slash:
            data += attribute(_CIDR, bytes((int(length),)))
        if comma:
            protocol, _, port = service.partition(":")
            data += attribute(_PORT | NLA_F_NET_BYTEORDER, struct.pack(">H", int(port)))
            number = _PROTOCOL_NUMBERS[protocol] if protocol.isalpha() else int(protocol)
            data += attribute(_PROTO, bytes((number,)))
        if option:
            if option != "nomatch":
                raise ValueError(option)
            data += attribute(_CADT_FLAGS | NLA_F_NET_BYTEORDER, struct.pack(">I", _NOMATCH))
    except (ValueError, OSError, KeyError, struct.error) as error:
        raise ValueError(
            f"ipset member {member!r}: text such as 10.0.0.5, 10.0.0.0/26 or 10.0.0.5,tcp:80 "
            "is needed"
        ) from error
    return nested(_DATA, data)


def parse_members(data: bytes) -> Iterator[str]:
    """The members in the entries of a dump."""
    for _, entry in attribute_list(data):
        if entry.startswith(_HOST4_HEAD) and entry[12:] in _HOST4_TAILS:
            yield socket.inet_ntop(socket.AF_INET, entry[8:12])
            continue
        found = attributes(entry)
        packed = found[_IP][4:]
        member = _address_text(packed)
        length = found[_CIDR][0] if _CIDR in found else 8 * len(packed)
        if length != 8 * len(packed):
            member += f"/{length}"
        if _PORT in found:
            number = found[_PROTO][0]
            port = int.from_bytes(found[_PORT], "big")
            member += f",{PROTOCOLS.get(number, number)}:{port}"
        if _CADT_FLAGS in found and int.from_bytes(found[_CADT_FLAGS], "big") & _NOMATCH:
            member += " nomatch"
        yield member


def _address_text(packed: bytes) -> str:
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    address = socket.inet_ntop(socket.AF_INET6, packed)
    # "::1.2.3.4" is not how api.net writes it
    return format_address(V6, int.from_bytes(packed, "big")) if "." in address else address
