"""nftables expressions as netlink bytes: what a rule's conditions and statements are made of.

A rule is expressions in a row. One that loads puts a value into a register; one that compares
ends the rule where it does not hold. Values of a field stand as on the wire (network byte
order), a mark and an interface index as the machine has them. See nft(8) for what they mean,
and linux/netfilter/nf_tables.h for the numbers.

The bytes are those with which the kernel tells of a rule, so that one that is as it should be is
known by them alone (``alike``).
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum
from functools import lru_cache

from kernel.netlink import attribute, attribute_list, attribute_text

VERDICT_REGISTER = 0
# The registers of 16 bytes; each is four of the 4-byte registers, whose numbers begin at 8.
REGISTER = 1
NARROW_REGISTER = 8

_IFNAME_BYTES = 16

_EXPRESSION_NAME = 1
_EXPRESSION_DATA = 2
_LIST_ELEMENT = 1
_DATA_VALUE = 1
_DATA_VERDICT = 2
_VERDICT_CODE = 1
_VERDICT_CHAIN = 2
_LOOKUP_INVERTED = 1
_MASK_AND_TOGGLE = 0  # NFT_BITWISE_MASK_XOR
_OF_PACKETS = 0  # NFT_LIMIT_PKTS

_GIVEN_ADDRESS = 1 << 0  # NF_NAT_RANGE_MAP_IPS
_GIVEN_PORTS = 1 << 1  # NF_NAT_RANGE_PROTO_SPECIFIED
_RANDOM_PORTS = 1 << 4  # NF_NAT_RANGE_PROTO_RANDOM_FULLY
_PORT_UNREACHABLE = {4: 3, 6: 4}  # codes of ICMP type 3 and ICMPv6 type 1

# The same few expressions make up most rules.
_remembered = lru_cache(maxsize=1024)

_BE32 = struct.Struct(">I")
_BE64 = struct.Struct(">Q")


class Verdict(IntEnum):
    """What becomes of a packet (``enum nft_verdicts`` and netfilter's own)."""

    DROP = 0
    ACCEPT = 1
    CONTINUE = -1
    JUMP = -3
    GOTO = -4
    RETURN = -5


class Meta(IntEnum):
    """What a packet has beside its bytes (``enum nft_meta_keys``)."""

    MARK = 3
    IIF = 4
    OIF = 5
    IIFNAME = 6
    OIFNAME = 7
    NFPROTO = 15
    L4PROTO = 16


class Base(IntEnum):
    """From where a payload offset counts (``enum nft_payload_bases``)."""

    NETWORK = 1
    TRANSPORT = 2


class Compare(IntEnum):
    """How a register is compared with a value (``enum nft_cmp_ops``)."""

    EQUAL = 0
    NOT_EQUAL = 1


class ConntrackState(IntEnum):
    """Bits of ``ct state`` (``enum ip_conntrack_info`` by way of nft(8))."""

    INVALID = 1
    ESTABLISHED = 2
    RELATED = 4
    NEW = 8
    UNTRACKED = 64


class FibResult(IntEnum):
    """What the routing table is asked for (``enum nft_fib_result``)."""

    OIF = 1
    OIFNAME = 2
    ADDRTYPE = 3


class FibFlag(IntEnum):
    """With what it is asked (``enum nft_fib_flags``)."""

    SADDR = 1
    DADDR = 2
    MARK = 4
    IIF = 8
    OIF = 16
    PRESENT = 32


def number(kind: int, value: int) -> bytes:
    """An attribute that holds an unsigned 32-bit number, as nf_tables wants it: big-endian."""
    return attribute(kind, _BE32.pack(value & 0xFFFFFFFF))


def host_order(value: int) -> bytes:
    """A mark or the like as a register holds it: 32 bits in the machine's byte order."""
    return value.to_bytes(4, sys.byteorder)


def interface_name(name: str) -> bytes:
    """An interface's name as a register holds it. A trailing ``*`` leaves the rest open."""
    if name.endswith("*"):
        return name[:-1].encode()
    return name.encode().ljust(_IFNAME_BYTES, b"\0")


def value(data: bytes) -> bytes:
    """The content of an attribute that holds data: a value."""
    return attribute(_DATA_VALUE, data)


def verdict_data(verdict: Verdict, chain: str = "") -> bytes:
    """The content of an attribute that holds data: a verdict, with the chain to walk."""
    named = attribute_text(_VERDICT_CHAIN, chain) if chain else b""
    return _group(_DATA_VERDICT, number(_VERDICT_CODE, verdict), named)


def _group(kind: int, *parts: bytes) -> bytes:
    """Attributes in another, without the flag that says so: nf_tables leaves it out."""
    return attribute(kind, b"".join(parts))


def _register(kind: int, number_of: int) -> bytes:
    """A register, by its wide number where it has one."""
    narrow = number_of - NARROW_REGISTER
    return number(kind, REGISTER + narrow // 4 if narrow >= 0 and narrow % 4 == 0 else number_of)


def _expression(name: str, *data: bytes) -> bytes:
    return _group(
        _LIST_ELEMENT, attribute_text(_EXPRESSION_NAME, name), _group(_EXPRESSION_DATA, *data)
    )


@_remembered
def load_meta(key: Meta, register: int = REGISTER) -> bytes:
    """``meta mark`` and the like."""
    return _expression("meta", number(2, key), _register(1, register))


def store_mark(register: int = REGISTER) -> bytes:
    """``meta mark set`` what the register holds."""
    return _expression("meta", number(2, Meta.MARK), _register(3, register))


@_remembered
def load_payload(base: Base, offset: int, length: int, register: int = REGISTER) -> bytes:
    """Bytes of a packet's network or transport header."""
    return _expression(
        "payload", _register(1, register), number(2, base), number(3, offset), number(4, length)
    )


def load_conntrack_state(register: int = REGISTER) -> bytes:
    """``ct state``: one bit of ``ConntrackState``, in host order."""
    return _expression("ct", _register(1, register), number(2, 0))


def load_conntrack_status(register: int = REGISTER) -> bytes:
    """``ct status``: the bits of ``enum ip_conntrack_status``, in host order."""
    return _expression("ct", _register(1, register), number(2, 2))


def load_fib(result: FibResult, flags: int, register: int = REGISTER) -> bytes:
    """``fib saddr . mark . iif oif``: what the routing table says (``FibFlag`` together)."""
    return _expression("fib", _register(1, register), number(2, result), number(3, flags))


@_remembered
def compare(data: bytes, how: Compare = Compare.EQUAL, register: int = REGISTER) -> bytes:
    """Go on if the register's first bytes are (or are not) ``data``."""
    return _expression("cmp", _register(1, register), number(2, how), _group(3, value(data)))


def within(first: bytes, last: bytes, *, inverted: bool = False, register: int = REGISTER) -> bytes:
    """Go on if the register is between the two, both included; ``inverted``: if it is not."""
    return _expression(
        "range",
        _register(1, register),
        number(2, Compare.NOT_EQUAL if inverted else Compare.EQUAL),
        _group(3, value(first)),
        _group(4, value(last)),
    )


@_remembered
def mask(bits: bytes, toggle: bytes | None = None, register: int = REGISTER) -> bytes:
    """Register = (register & ``bits``) ^ ``toggle``."""
    return _expression(
        "bitwise",
        _register(1, register),
        _register(2, register),
        number(3, len(bits)),
        number(6, _MASK_AND_TOGGLE),
        _group(4, value(bits)),
        _group(5, value(toggle or bytes(len(bits)))),
    )


@_remembered
def lookup(set_name: str, *, inverted: bool = False, register: int = REGISTER) -> bytes:
    """Go on if the set holds (``inverted``: does not hold) what the register holds."""
    flags = number(5, _LOOKUP_INVERTED if inverted else 0)
    return _expression("lookup", attribute_text(1, set_name), _register(2, register), flags)


def lookup_verdict(map_name: str, register: int = REGISTER) -> bytes:
    """Do what the verdict map says about what the register holds; go on if it says nothing."""
    return _expression(
        "lookup",
        attribute_text(1, map_name),
        _register(2, register),
        number(3, VERDICT_REGISTER),
        number(5, 0),
    )


def set_register(data: bytes, register: int = REGISTER) -> bytes:
    """Register = ``data``."""
    return _expression("immediate", _register(1, register), _group(2, value(data)))


@_remembered
def verdict(code: Verdict, chain: str = "") -> bytes:
    """``accept``, ``drop``, ``return``, ``jump CHAIN``, ``goto CHAIN``."""
    return _expression(
        "immediate", number(1, VERDICT_REGISTER), _group(2, verdict_data(code, chain))
    )


def counter() -> bytes:
    """Count packets and bytes that come this far."""
    return _expression("counter", attribute(1, _BE64.pack(0)), attribute(2, _BE64.pack(0)))


def limit(per_second: int, burst: int) -> bytes:
    """Go on for at most so many packets a second."""
    return _expression(
        "limit",
        attribute(1, _BE64.pack(per_second)),
        attribute(2, _BE64.pack(1)),
        number(3, burst),
        number(4, _OF_PACKETS),
        number(5, 0),
    )


def log(prefix: str) -> bytes:
    """Write a line to the kernel log (syslog level notice) and go on."""
    return _expression("log", attribute_text(2, prefix[:127]), number(5, 5))


def notrack() -> bytes:
    """Keep the packet out of connection tracking."""
    return _group(_LIST_ELEMENT, attribute_text(_EXPRESSION_NAME, "notrack"))


def reject(version: int) -> bytes:
    """Drop the packet and tell its sender: port unreachable (ICMP, or ICMPv6 for version 6)."""
    code = _PORT_UNREACHABLE[version]
    return _expression("reject", number(1, 0), attribute(2, bytes((code,))))


def masquerade(*, ports: tuple[int, int] | None = None, random: bool = False) -> bytes:
    """Replace the source by the address of the outgoing interface (chain type nat).

    ``ports`` (first, last) bound the source ports. They go through registers 1 and 2.
    """
    flags = _RANDOM_PORTS if random else 0
    if ports is None:
        return _expression("masq", *((number(1, flags),) if flags else ()))
    return _ports(ports) + _expression(
        "masq", number(1, flags | _GIVEN_PORTS), number(2, REGISTER), number(3, REGISTER + 1)
    )


def source_nat(
    family: int, address: bytes, *, ports: tuple[int, int] | None = None, random: bool = False
) -> bytes:
    """Replace the source address (chain type nat). ``family``: 2 (IPv4) or 10 (IPv6)."""
    return _nat(0, family, address, ports, random)


def destination_nat(family: int, address: bytes, *, ports: tuple[int, int] | None = None) -> bytes:
    """Replace the destination address (chain type nat)."""
    return _nat(1, family, address, ports, random=False)


def _nat(
    kind: int, family: int, address: bytes, ports: tuple[int, int] | None, random: bool
) -> bytes:
    target = REGISTER + 2
    parts = set_register(address, target)
    fields = [number(1, kind), number(2, family), number(3, target), number(4, target)]
    if ports is not None:
        parts += _ports(ports)
        fields += [number(5, REGISTER), number(6, REGISTER + 1)]
    flags = _GIVEN_ADDRESS | (_GIVEN_PORTS if ports else 0) | (_RANDOM_PORTS if random else 0)
    fields.append(number(7, flags))
    return parts + _expression("nat", *fields)


def _ports(ports: tuple[int, int]) -> bytes:
    first, last = (struct.pack(">H", port) for port in ports)
    return set_register(first, REGISTER) + set_register(last, REGISTER + 1)


_COUNTER = counter()
_COUNTED = 2 * (4 + 8)  # bytes: two attributes of a number each
_COUNTER_HEAD = _COUNTER[:-_COUNTED]


def uncounted(told: bytes) -> bytes:
    """The expressions of a rule as the kernel tells of them, with nothing counted yet."""
    at = told.find(_COUNTER_HEAD)
    return told if at < 0 else told[:at] + _COUNTER + told[at + len(_COUNTER) :]


def alike(sent: bytes, told: bytes) -> bool:
    """Whether the kernel, telling ``told`` (``uncounted``), has the expressions that were sent.

    Kernels differ in what they say without need; what one side leaves out is zero.
    """
    return sent == told or _parsed(sent) == _parsed(told)


def _parsed(expressions: bytes) -> list[tuple[bytes, dict[int, bytes]]]:
    """Name and fields of each expression: those that aren't zero, and not what was counted."""
    found = []
    for _, element in attribute_list(expressions):
        parts = dict(attribute_list(element))
        name = parts.get(_EXPRESSION_NAME, b"")
        counts = name == b"counter\0"
        fields = {} if counts else dict(attribute_list(parts.get(_EXPRESSION_DATA, b"")))
        found.append((name, {kind: data for kind, data in fields.items() if any(data)}))
    return found
