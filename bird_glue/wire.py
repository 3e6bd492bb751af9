"""UPDATE messages as they come over the wire (RFC 4271 4.3), and which of them are plain.

Nearly all are: each path attribute is one we know, there once, with its flags and a length that
fits; each prefix is whole. Nothing can be wrong with the form of such a message, so there is
nothing to decide about it, and ExaBGP hands it over as it came (see ``exabgp_main``). About
whatever is not plain ExaBGP decides: what RFC 7606 has treated as a withdrawal, left out, or
answered, and AS numbers of two octets (RFC 6793).

Only bytes here, and nothing imported: this runs inside of ExaBGP, too.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

V4, V6 = 4, 6
BITS = {V4: 32, V6: 128}
ORIGIN, AS_PATH, NEXT_HOP, MED, LOCAL_PREF, ATOMIC_AGGREGATE, AGGREGATOR, COMMUNITY = range(1, 9)
ORIGINATOR_ID, CLUSTER_LIST = 9, 10  # RFC 4456
MP_REACH_NLRI, MP_UNREACH_NLRI = 14, 15  # RFC 4760
EXTENDED_COMMUNITY, LARGE_COMMUNITY = 16, 32  # RFC 4360, RFC 8092
AS_SET, AS_SEQUENCE = 1, 2
ASN_BYTES = 4  # RFC 6793
ADDRESS_BYTES = {V4: 4, V6: 16}
# bytes of a prefix by its length in bits, and the bits of the last one that aren't its own
PREFIX_BYTES = [(length + 7) // 8 for length in range(129)]
_PADDING = [(1 << -length % 8) - 1 for length in range(129)]

_OPTIONAL, _TRANSITIVE, _PARTIAL, _EXTENDED_LENGTH = 0x80, 0x40, 0x20, 0x10
_BOTH = _OPTIONAL | _TRANSITIVE
# flags, bytes of the value, whether it may be a multiple of these. Of those that hold parts of
# their own one byte is as much as can be said.
_KNOWN = {
    ORIGIN: (_TRANSITIVE, 1, False),
    AS_PATH: (_TRANSITIVE, 1, True),
    NEXT_HOP: (_TRANSITIVE, 4, False),
    MED: (_OPTIONAL, 4, False),
    LOCAL_PREF: (_TRANSITIVE, 4, False),
    ATOMIC_AGGREGATE: (_TRANSITIVE, 0, False),
    AGGREGATOR: (_BOTH, 8, False),
    COMMUNITY: (_BOTH, 4, True),
    ORIGINATOR_ID: (_OPTIONAL, 4, False),
    CLUSTER_LIST: (_OPTIONAL, 4, True),
    MP_REACH_NLRI: (_OPTIONAL, 1, True),
    MP_UNREACH_NLRI: (_OPTIONAL, 1, True),
    EXTENDED_COMMUNITY: (_BOTH, 8, True),
    LARGE_COMMUNITY: (_BOTH, 12, True),
}
# what a route doesn't keep of an UPDATE: the others make what its routes have in common
_APART = frozenset((NEXT_HOP, MP_REACH_NLRI, MP_UNREACH_NLRI, ATOMIC_AGGREGATE, AGGREGATOR))
_VERSIONS = {b"\0\1\1": V4, b"\0\2\1": V6}  # AFI and SAFI: unicast
_GREATEST_ORIGIN = 2


class NotPlainError(ValueError):
    """Somebody else has to make sense of it."""


class Plain:
    """A plain UPDATE, taken apart. Prefixes are as they came, one after the other.

    ``attributes``: the path attributes that routes keep. ``version`` and ``next_hop`` (an
    address) are those of what is ``announced``; ``withdrawn`` is by IP version.
    """

    __slots__ = ("announced", "attributes", "next_hop", "version", "withdrawn")

    def __init__(self) -> None:
        self.attributes = b""
        self.withdrawn: dict[int, bytes] = {}
        self.version = V4
        self.next_hop = b""
        self.announced = b""


def plain(body: bytes, families: Collection[tuple[int, int]], *, extended: bool) -> Plain:
    """The UPDATE whose bytes behind the header these are. Raises NotPlainError.

    ``families``: AFI and SAFI of what else than IPv4 unicast may be in it. ``extended``: IPv4
    routes may have IPv6 next hops (RFC 8950). AS numbers have four octets, prefixes no path
    identifiers (RFC 7911).
    """
    gone, rest = _counted(body)
    attributes, announced = _counted(rest)
    found = Plain()
    if gone:
        found.withdrawn[V4] = _whole(gone, V4)
    values: dict[int, bytes] = {}
    kept = []
    for code, value, whole in split(attributes):
        if code in values:
            raise NotPlainError(f"attribute {code} twice")
        values[code] = value
        if code not in _APART:
            kept.append(whole)
    found.attributes = b"".join(kept)
    if MP_UNREACH_NLRI in values:
        version, nets = _family(values[MP_UNREACH_NLRI], families)
        found.withdrawn[version] = found.withdrawn.get(version, b"") + _whole(nets, version)
    if MP_REACH_NLRI in values:
        if announced:
            raise NotPlainError("two fields of announcements")
        found.version, reached = _family(values[MP_REACH_NLRI], families)
        if found.version == V4 and not extended:
            raise NotPlainError("an IPv4 route in MP_REACH_NLRI")
        found.next_hop, announced = _next_hop(reached)
    elif announced:
        found.next_hop = values.get(NEXT_HOP, b"")
    found.announced = _whole(announced, found.version)
    told = bool(announced)
    if told != bool(found.next_hop) or (not told and not any(found.withdrawn.values())):
        raise NotPlainError("no next hop, no prefix, or neither")
    if told and not (ORIGIN in values and AS_PATH in values):
        raise NotPlainError("a mandatory attribute is missing")
    return found


def split(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Path attributes: type code, value, and the whole. Raises NotPlainError."""
    start, end = 0, len(data)
    while start < end:
        flags = data[start]
        body = start + (4 if flags & _EXTENDED_LENGTH else 3)
        if body > end:
            raise NotPlainError("an attribute without a length")
        code = data[start + 1]
        length = int.from_bytes(data[start + 2 : body], "big")
        stop = body + length
        value = data[body:stop]
        if stop > end or not _fits(code, flags, value):
            raise NotPlainError(f"attribute {code}, flags {flags:#x}, of {length} bytes")
        yield code, value, data[start:stop]
        start = stop


def segments(value: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The segments of an AS_PATH: kind, AS numbers. Raises NotPlainError."""
    start, end = 0, len(value)
    while start < end:
        kind, *counts = value[start : start + 2]
        if kind not in (AS_SET, AS_SEQUENCE) or not any(counts):
            raise NotPlainError(f"a segment of kind {kind}")
        start += 2
        stop = start + ASN_BYTES * counts[0]
        if stop > end:
            raise NotPlainError("a segment without an end")
        yield kind, tuple(numbers(value[start:stop], ASN_BYTES))
        start = stop


def numbers(value: bytes, size: int) -> list[int]:
    """The numbers of so many bytes each that a value consists of."""
    return [
        int.from_bytes(value[start : start + size], "big") for start in range(0, len(value), size)
    ]


def _fits(code: int, flags: int, value: bytes) -> bool:
    """Whether an attribute may look like this."""
    if code not in _KNOWN:
        return False
    known, size, many = _KNOWN[code]
    flags &= ~_EXTENDED_LENGTH
    if flags != known and (known != _BOTH or flags != known | _PARTIAL):
        return False
    if code == AS_PATH:
        for _ in segments(value):
            pass
        return True  # it may be empty
    if code == ORIGIN and value > bytes((_GREATEST_ORIGIN,)):
        return False
    return len(value) == size or (many and len(value) > size and len(value) % size == 0)


def _counted(data: bytes) -> tuple[bytes, bytes]:
    """A field that has its length in front of it, and what is behind it."""
    length = int.from_bytes(data[:2], "big")
    if len(data) < 2 + length:
        raise NotPlainError(f"a field of {length} bytes")
    return data[2 : 2 + length], data[2 + length :]


def _family(value: bytes, families: Collection[tuple[int, int]]) -> tuple[int, bytes]:
    """IP version of a multiprotocol attribute, and what follows."""
    version = _VERSIONS.get(value[:3])
    if version is None or (value[1], value[2]) not in families:
        raise NotPlainError(f"routes of another family: {value[:3].hex()}")
    return version, value[3:]


def _next_hop(value: bytes) -> tuple[bytes, bytes]:
    """The next hop of MP_REACH_NLRI, and the prefixes. Of two the global one (RFC 2545 3)."""
    length = value[0] if value else 0
    hop, nets = value[1 : 1 + length], value[2 + length :]  # one byte between them is reserved
    size = ADDRESS_BYTES[V6]
    if length not in (size, 2 * size) or not nets:
        raise NotPlainError(f"a next hop of {length} bytes, or nothing to go there")
    on_link = hop[0] == 0xFE and hop[1] & 0xC0 == 0x80
    return hop[size:] if on_link and length > size else hop[:size], nets


def _whole(nets: bytes, version: int) -> bytes:
    """The same prefixes, all of which are whole, with no bits behind their length."""
    bits, end, place = BITS[version], len(nets), 0
    while place < end:
        length = nets[place]
        if length > bits:
            raise NotPlainError(f"a prefix of {length} bits")
        place += 1 + PREFIX_BYTES[length]
        if place > end or nets[place - 1] & _PADDING[length]:
            raise NotPlainError("a prefix that is not whole, or has more bits than it should")
    return nets
