"""Sets and verdict maps of nftables: their declaration, their elements as bytes, and back.

A plain set is a hash: one element, one key. A set of ranges keeps ends in a tree: a range is
the element it begins with and one, marked as an end, behind its last address. Ranges of a set
must not overlap nor touch, so networks become ranges here (``ranges``), merged.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from api.net import BITS, Net
from kernel.netlink import (
    attribute,
    attribute_list,
    attribute_text,
    attributes,
    nested,
    text,
)
from kernel.nft_expressions import Verdict, number, value, verdict_data


class KeyType(NamedTuple):
    """What a set's keys are: nft(8)'s number of the type, which listings show, and its bytes."""

    code: int
    length: int


ADDRESS4 = KeyType(7, 4)
ADDRESS6 = KeyType(8, 16)
PROTOCOL = KeyType(12, 1)
PORT = KeyType(13, 2)
MARK = KeyType(19, 4)
INTERFACE = KeyType(41, 16)

_CONCATENATION_BITS = 6  # of a type's number, in the number of a concatenation

_FLAG_INTERVAL = 0x4
_FLAG_MAP = 0x8
_FLAG_TIMEOUT = 0x10
_FLAG_CONCATENATION = 0x80
_VERDICT_TYPE = 0xFFFFFF00
_INTERVAL_END = 1

_NAME = 2
_FLAGS = 3
_KEY_TYPE = 4
_KEY_LENGTH = 5
_DATA_TYPE = 6
_DESCRIPTION = 9
_ID = 10
_TIMEOUT = 11
_USERDATA = 13
_DESCRIPTION_SIZE = 1
_DESCRIPTION_FIELDS = 2

_ELEMENTS_SET = 2
_ELEMENTS = 3

_ELEMENT_KEY = 1
_ELEMENT_DATA = 2
_ELEMENT_FLAGS = 3
_ELEMENT_EXPRESSIONS = (7, 11)

# What nft(8) needs to show such keys: NFTNL_UDATA_SET_KEYBYTEORDER is BYTEORDER_HOST_ENDIAN.
_HOST_ORDERED = ((MARK,), (INTERFACE,))
_HOST_ORDER = struct.pack("=BBI", 0, 4, 1)

_BE32 = struct.Struct(">I")
_BULK_BYTES = 60_000  # an attribute holds at most 64 KiB


@dataclass(frozen=True, slots=True)
class NftSet:
    """A set, or (``verdicts``) a verdict map. ``key`` is more than one type in a concatenation.

    With ``ranges`` it holds ranges of one type. ``size`` 0: as many elements as one likes.
    Elements go after ``timeout`` seconds; 0: they stay.
    """

    name: str
    key: tuple[KeyType, ...]
    ranges: bool = False
    verdicts: bool = False
    size: int = 0
    timeout: int = 0

    @property
    def key_length(self) -> int:
        """Bytes of a key: each field of a concatenation is padded to four."""
        return (
            self.key[0].length
            if len(self.key) == 1
            else sum(-(-k.length // 4) * 4 for k in self.key)
        )

    def is_of_kind(self, other: NftSet) -> bool:
        """Whether it takes the same elements for the same time, so that one can be the other."""
        return replace(self, size=0) == replace(other, size=0)


class Target(NamedTuple):
    """What a verdict map says about a key."""

    verdict: Verdict
    chain: str = ""


class Range(NamedTuple):
    """Keys from ``first`` to ``last``, both included, as numbers of ``bits`` bits.

    32 for IPv4 addresses, 128 for IPv6 addresses, 16 for ports.
    """

    bits: int
    first: int
    last: int


def key(*fields: bytes) -> bytes:
    """A key of one field as it is; of several, each padded to four bytes."""
    if len(fields) == 1:
        return fields[0]
    return b"".join(field + bytes(-len(field) & 3) for field in fields)


def ranges(nets: Iterable[Net]) -> list[Range]:
    """Networks as ranges in order, those that overlap or touch merged."""
    return merge(
        Range(BITS[version], address, address + (1 << BITS[version] - length) - 1)
        for version, address, length in nets
    )


def merge(spans: Iterable[Range]) -> list[Range]:
    """Ranges in order, those that overlap or touch merged."""
    merged: list[Range] = []
    for span in sorted(spans):
        before = merged[-1] if merged else None
        if before and before.bits == span.bits and span.first <= before.last + 1:
            merged[-1] = Range(span.bits, before.first, max(before.last, span.last))
        else:
            merged.append(span)
    return merged


def declaration(wanted: NftSet, identity: int) -> bytes:
    """The attributes that make a set. ``identity`` is unique in its transaction."""
    flags = (
        (_FLAG_INTERVAL if wanted.ranges else 0)
        | (_FLAG_MAP if wanted.verdicts else 0)
        | (_FLAG_CONCATENATION if len(wanted.key) > 1 else 0)
        | (_FLAG_TIMEOUT if wanted.timeout else 0)
    )
    code = 0
    for kind in wanted.key:
        code = code << _CONCATENATION_BITS | kind.code
    parts = [
        attribute_text(_NAME, wanted.name),
        number(_FLAGS, flags),
        number(_KEY_TYPE, code),
        number(_KEY_LENGTH, wanted.key_length),
        number(_ID, identity),
    ]
    if wanted.timeout:
        parts.append(attribute(_TIMEOUT, (1000 * wanted.timeout).to_bytes(8, "big")))
    if wanted.verdicts:
        parts.append(number(_DATA_TYPE, _VERDICT_TYPE))
    if wanted.key in _HOST_ORDERED:
        parts.append(attribute(_USERDATA, _HOST_ORDER))
    description = []
    if wanted.size:
        description.append(number(_DESCRIPTION_SIZE, wanted.size))
    if len(wanted.key) > 1:
        fields = (nested(1, number(1, kind.length)) for kind in wanted.key)
        description.append(nested(_DESCRIPTION_FIELDS, *fields))
    if description:
        parts.append(nested(_DESCRIPTION, *description))
    return b"".join(parts)


def parse_declaration(found: Mapping[int, bytes]) -> NftSet:
    """A set as the kernel tells of it. Types that are not ours have the length only."""
    flags = _BE32.unpack(found.get(_FLAGS, bytes(4)))[0]
    code = _BE32.unpack(found[_KEY_TYPE])[0]
    length = _BE32.unpack(found[_KEY_LENGTH])[0]
    codes: list[int] = []
    while code:
        codes.append(code & (1 << _CONCATENATION_BITS) - 1)
        code >>= _CONCATENATION_BITS
    types = tuple(_TYPES.get(each, KeyType(each, length)) for each in reversed(codes))
    description = attributes(found.get(_DESCRIPTION, b""))
    size = _BE32.unpack(description.get(_DESCRIPTION_SIZE, bytes(4)))[0]
    return NftSet(
        text(found[_NAME]),
        types,
        ranges=bool(flags & _FLAG_INTERVAL),
        verdicts=bool(flags & _FLAG_MAP),
        size=size,
        timeout=int.from_bytes(found.get(_TIMEOUT, b""), "big") // 1000,
    )


_TYPES = {kind.code: kind for kind in (ADDRESS4, ADDRESS6, PROTOCOL, PORT, MARK, INTERFACE)}


def key_elements(keys: Iterable[bytes]) -> Iterator[bytes]:
    """Elements of a plain set."""
    for each in keys:
        yield nested(1, nested(_ELEMENT_KEY, value(each)))


def verdict_elements(targets: Mapping[bytes, Target]) -> Iterator[bytes]:
    """Elements of a verdict map."""
    for each, target in targets.items():
        yield nested(
            1,
            nested(_ELEMENT_KEY, value(each)),
            nested(_ELEMENT_DATA, verdict_data(*target)),
        )


def range_elements(wanted: Iterable[Range]) -> Iterator[bytes]:
    """Elements of a set of ranges. One that reaches the last key has no end."""
    for bits, first, last in wanted:
        size = bits // 8
        yield nested(1, nested(_ELEMENT_KEY, value(first.to_bytes(size, "big"))))
        if last + 1 < 1 << bits:
            yield nested(
                1,
                nested(_ELEMENT_KEY, value((last + 1).to_bytes(size, "big"))),
                number(_ELEMENT_FLAGS, _INTERVAL_END),
            )


def bulk(set_name: str, elements: Iterable[bytes]) -> Iterator[bytes]:
    """Message bodies that name the elements, so many that each fits into an attribute.

    Both elements of a range come into the same message: begins and ends are never parted.
    """
    head = attribute_text(_ELEMENTS_SET, set_name)
    part: list[bytes] = []
    size = 0
    for element in elements:
        if size > _BULK_BYTES and not _is_end(element):
            yield head + nested(_ELEMENTS, *part)
            part, size = [], 0
        part.append(element)
        size += len(element)
    if part:
        yield head + nested(_ELEMENTS, *part)


def _is_end(element: bytes) -> bool:
    return element[-4:] == _BE32.pack(_INTERVAL_END) and element[-8:-4] == _END_HEADER


_END_HEADER = number(_ELEMENT_FLAGS, _INTERVAL_END)[:4]


class ForeignElementError(ValueError):
    """A set holds what is made here never: an element for all other keys, or one with statements.

    (``*``, ``10.0.0.1 limit rate 1/second``.)
    """


def parse_elements(bodies: Iterable[bytes]) -> Iterator[tuple[bytes, bool, Target | None]]:
    """(key, whether it is an end, what a map says) of every element in a dump's bodies.

    Raises ForeignElementError.
    """
    for body in bodies:
        for _, element in attribute_list(attributes(body, 4).get(_ELEMENTS, b"")):
            found = attributes(element)
            if _ELEMENT_KEY not in found or not found.keys().isdisjoint(_ELEMENT_EXPRESSIONS):
                raise ForeignElementError(element.hex())
            raw = attributes(found[_ELEMENT_KEY])[1]
            end = found.get(_ELEMENT_FLAGS, bytes(4))[3] & _INTERVAL_END != 0
            data = found.get(_ELEMENT_DATA)
            yield raw, end, _parse_target(data) if data else None


def _parse_target(data: bytes) -> Target:
    found = attributes(attributes(data).get(2, b""))
    code = int.from_bytes(found[1], "big", signed=True)
    return Target(Verdict(code), text(found.get(2, b"")))


def parse_ranges(elements: Iterable[tuple[bytes, bool, Target | None]]) -> set[Range]:
    """The ranges whose begins and ends these are, in whatever order."""
    points = sorted((raw, not end) for raw, end, _ in elements)  # an end before a begin
    found: set[Range] = set()
    begin: bytes | None = None
    for raw, is_begin in chain(points, [(None, False)]):
        if begin is not None:
            bits = 8 * len(begin)
            last = int.from_bytes(raw, "big") - 1 if raw is not None else (1 << bits) - 1
            found.add(Range(bits, int.from_bytes(begin, "big"), last))
        begin = raw if is_begin else None
    return found
