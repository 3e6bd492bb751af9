"""Path attributes of a route, from ExaBGP's JSON or from the bytes of an UPDATE."""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bird_glue import wire

Json = dict[str, Any]

_ORIGINS = {"igp": 0, "egp": 1, "incomplete": 2}
_LONG = 512  # digits
_KINDS = {wire.AS_SET: "as-set", wire.AS_SEQUENCE: "as-sequence"}


class Segment(NamedTuple):
    """A piece of an AS path (RFC 4271 4.3): ``kind`` is as-sequence, as-set or as-confed-…."""

    kind: str
    asns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attributes:
    """Path attributes of a route. Router and cluster ids are IPv4 addresses as ints.

    ``communities`` holds each as ExaBGP's command line takes it: ``65001:7``. ExaBGP sorts them
    by their bytes, and so do we.
    """

    origin: int = 2  # 0 IGP, 1 EGP, 2 INCOMPLETE
    as_path: tuple[Segment, ...] = ()
    med: int | None = None
    local_preference: int | None = None
    communities: tuple[str, ...] = ()
    large_communities: tuple[str, ...] = ()
    extended_communities: tuple[str, ...] = ()
    originator: int | None = None
    clusters: tuple[int, ...] = ()

    @property
    def path_length(self) -> int:
        """Length of the AS path: a set counts as one, a confederation as nothing."""
        length = 0
        for segment in self.as_path:
            if segment.kind == "as-sequence":
                length += len(segment.asns)
            elif segment.kind == "as-set":
                length += 1
        return length


def parse_attributes(attribute: Json) -> Attributes:
    """Attributes as ExaBGP tells them in JSON.

    Raises ValueError, KeyError, TypeError, AttributeError, OSError where it wouldn't.
    """
    as_path = attribute.get("as-path", {})
    originator = attribute.get("originator-id")
    return Attributes(
        origin=_ORIGINS[attribute.get("origin", "incomplete")],
        as_path=tuple(
            Segment(segment["element"], tuple(map(int, segment["value"])))
            for _, segment in sorted(as_path.items(), key=lambda item: int(item[0]))
        ),
        med=_number(attribute.get("med")),
        local_preference=_number(attribute.get("local-preference")),
        communities=_communities(attribute.get("community", ())),
        large_communities=_communities(attribute.get("large-community", ())),
        extended_communities=tuple(
            f"0x{int(entry['value']):016x}" for entry in attribute.get("extended-community", ())
        ),
        originator=None if originator is None else _identifier(originator),
        clusters=tuple(_identifier(text) for text in attribute.get("cluster-list", ())),
    )


def unpack_attributes(text: str) -> Attributes:
    """The attributes whose bytes these hexadecimal digits are. Raises ValueError.

    Of ``wire.plain``: known ones, each once, with AS numbers of four octets (RFC 6793).
    """
    return _unpack(text) if len(text) > _LONG else _unpack_again(text)


@functools.lru_cache(maxsize=1024)
def _unpack_again(text: str) -> Attributes:
    """Most come again and again; not so those that a peer might fill our memory with."""
    return _unpack(text)


def _unpack(text: str) -> Attributes:
    found = {code: value for code, value, _ in wire.split(bytes.fromhex(text))}
    origin, med, preference, originator = (
        None if code not in found else int.from_bytes(found[code], "big")
        for code in (wire.ORIGIN, wire.MED, wire.LOCAL_PREF, wire.ORIGINATOR_ID)
    )
    return Attributes(
        origin=_ORIGINS["incomplete"] if origin is None else origin,
        as_path=tuple(
            Segment(_KINDS[kind], asns)
            for kind, asns in wire.segments(found.get(wire.AS_PATH, b""))
        ),
        med=med,
        local_preference=preference,
        communities=_communities(sorted(_rows(found, wire.COMMUNITY, 2, 2))),
        large_communities=_communities(sorted(set(_rows(found, wire.LARGE_COMMUNITY, 4, 3)))),
        extended_communities=tuple(
            f"0x{value:016x}" for (value,) in sorted(_rows(found, wire.EXTENDED_COMMUNITY, 8, 1))
        ),
        originator=originator,
        clusters=tuple(cluster for (cluster,) in _rows(found, wire.CLUSTER_LIST, 4, 1)),
    )


def _rows(
    found: Mapping[int, bytes], code: int, size: int, columns: int
) -> Iterator[tuple[int, ...]]:
    """The numbers of ``size`` bytes in an attribute, so many together."""
    numbers = iter(wire.numbers(found.get(code, b""), size))
    return zip(*[numbers] * columns, strict=True)


def _number(value: object) -> int | None:
    return None if value is None else int(str(value))


def _identifier(text: str) -> int:
    return int.from_bytes(socket.inet_pton(socket.AF_INET, text), "big")


def _communities(entries: Iterable[Iterable[Any]]) -> tuple[str, ...]:
    return tuple(":".join(str(int(part)) for part in entry) for entry in entries)
