"""What ExaBGP and the relay tell, line by line, as compact events.

ExaBGP's JSON has its own ways, each handled here once: acknowledgements are bare lines
between the events; the flags of the graceful-restart capability are labelled the wrong way
round; an IPv6 prefix whose next hop has a global and a link-local address is told twice. Attributes
and prefixes of most UPDATEs are not its JSON at all but bytes, as hexadecimal text (see
``exabgp_main``). A line that is not understood becomes ``Malformed``; nothing that a peer sends
raises.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from api.net import BITS, V4, V6, Net, host_net
from bird_glue.attributes import Attributes as Attributes
from bird_glue.attributes import Json, parse_attributes, unpack_attributes
from bird_glue.attributes import Segment as Segment
from bird_glue.wire import PREFIX_BYTES

_FAMILIES = {"ipv4 unicast": V4, "ipv6 unicast": V6}
_ADDRESS_FAMILIES = {V4: socket.AF_INET, V6: socket.AF_INET6}
_MASKS = {
    version: [((1 << length) - 1) << bits - length for length in range(bits + 1)]
    for version, bits in BITS.items()
}
_LINK_LOCAL = 0xFE80 << 112
_LINK_LOCAL_MASK = 0xFFC0 << 112
_SHOWN = 200  # characters of a malformed line that are kept


class Announced(NamedTuple):
    """A prefix and the address (a /32 or /128) its traffic is to be sent to."""

    net: Net
    next_hop: Net


@dataclass(frozen=True, slots=True)
class Connected:
    """A TCP connection was tried. ExaBGP says this of a refused one too, then ``Down``."""

    peer: Net
    time: float


@dataclass(frozen=True, slots=True)
class Up:
    """The session is established."""

    peer: Net
    time: float


@dataclass(frozen=True, slots=True)
class Down:
    """The session or the attempt is over; ``reason`` is ExaBGP's text."""

    peer: Net
    time: float
    reason: str

    @property
    def notified(self) -> bool:
        """Whether a NOTIFICATION ended it: then routes don't outlive it (RFC 4724 4.2)."""
        return self.reason.startswith("notification ")

    @property
    def removed(self) -> bool:
        """Whether it ended because the peer is no longer configured here."""
        return "[removed]" in self.reason


@dataclass(frozen=True, slots=True)
class GracefulRestart:
    """The peer's capability (RFC 4724 3): seconds to wait for it, families it can keep."""

    seconds: int
    restarted: bool  # R: the peer has just restarted
    families: frozenset[int]  # IP versions whose stale routes may be kept
    forwarding: frozenset[int]  # F: of these the peer has kept its forwarding state


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer's OPEN message. ``asn`` is the four-byte one where the peer has it.

    ``extended_next_hop``: it takes IPv4 routes with IPv6 next hops (RFC 8950).
    """

    peer: Net
    asn: int
    hold_time: int
    router_id: int
    graceful_restart: GracefulRestart | None
    extended_next_hop: bool = False


@dataclass(frozen=True, slots=True)
class Notified:
    """A NOTIFICATION went out (``sent``) or came in. ``text`` is what it carried as text."""

    peer: Net
    time: float
    sent: bool
    code: int
    subcode: int
    text: str


@dataclass(frozen=True, slots=True)
class Updated:
    """An UPDATE. Withdrawals come before announcements (RFC 4271 3.1)."""

    peer: Net
    sent: bool
    withdrawn: tuple[Net, ...]
    announced: tuple[Announced, ...]
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class EndOfRib:
    """The peer has sent all its routes of an IP version (RFC 4724 2)."""

    peer: Net
    sent: bool
    version: int


@dataclass(frozen=True, slots=True)
class Answer:
    """ExaBGP's last word on a command."""

    done: bool


@dataclass(frozen=True, slots=True)
class Text:
    """A line of a command's output."""

    line: str


@dataclass(frozen=True, slots=True)
class Hello:
    """First word of the relay: whose child it is, and what ExaBGP was told before.

    ``unanswered``: commands of an earlier client whose answers are yet to come.
    ``announced``: per peer the prefixes that were announced and not withdrawn.
    """

    pid: int
    unanswered: int
    announced: Mapping[Net, frozenset[Net]]


@dataclass(frozen=True, slots=True)
class Live:
    """The relay has told all that is; from here on it tells what happens."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """A line that could not be understood, and why."""

    line: str
    why: str


SessionEvent = Connected | Up | Down | Opened | Notified | Updated | EndOfRib
Event = SessionEvent | Answer | Text | Hello | Live | Malformed


def parse(line: bytes) -> Event | None:
    """The event of one line without its newline; None for what nobody needs."""
    if not line.startswith(b"{"):
        return _bare(line)
    try:
        document = orjson.loads(line)
        if "relay" in document:
            return _from_relay(document)
        kind = document["type"]
        parser = _PARSERS.get(kind)
        if parser is None or "neighbor" not in document:
            return None
        neighbor = document["neighbor"]
        peer = parse_host(neighbor["address"]["peer"])
        return parser(peer, float(document["time"]), neighbor)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        shown = line[:_SHOWN].decode("utf-8", "replace")
        return Malformed(shown, f"{type(error).__name__}: {error}")


def _bare(line: bytes) -> Event | None:
    if line in (b"done", b"error"):
        return Answer(line == b"done")
    text = line.decode("utf-8", "replace").strip()
    return Text(text) if text else None


def _from_relay(document: Json) -> Event:
    if document["relay"] == "live":
        return Live()
    announced = {
        parse_host(peer): frozenset(parse_prefix(net) for net in nets)
        for peer, nets in document["announced"].items()
    }
    return Hello(int(document["pid"]), int(document["unanswered"]), announced)


@functools.lru_cache(maxsize=4096)
def parse_host(text: str) -> Net:
    """An address as a /32 or /128. Raises ValueError or OSError."""
    return parse_prefix(text)


def parse_prefix(text: str) -> Net:
    """``10.0.0.0/26`` or an address; bits behind the length are cut off, as RFC 4271 says.

    Raises ValueError or OSError.
    """
    address, slash, length = text.partition("/")
    version = V6 if ":" in address else V4
    value = int.from_bytes(socket.inet_pton(_ADDRESS_FAMILIES[version], address), "big")
    if not slash:
        return host_net(version, value)
    bits = int(length)
    if not 0 <= bits <= BITS[version]:
        raise ValueError(f"prefix {text!r}: length outside of 0 to {BITS[version]}")
    shift = BITS[version] - bits
    return Net(version, value >> shift << shift, bits)


def _state(peer: Net, time: float, neighbor: Json) -> Event | None:
    match neighbor["state"]:
        case "up":
            return Up(peer, time)
        case "connected":
            return Connected(peer, time)
        case "down":
            return Down(peer, time, str(neighbor.get("reason", "")))
    return None


def _open(peer: Net, time: float, neighbor: Json) -> Event | None:
    if neighbor["direction"] != "receive":
        return None
    message = neighbor["open"]
    capabilities = message["capabilities"]
    four_byte = capabilities.get("65", {}).get("asn4")
    return Opened(
        peer,
        int(message["asn"] if four_byte is None else four_byte),
        int(message["hold_time"]),
        parse_prefix(message["router_id"]).address,
        _graceful_restart(capabilities.get("64")),
        "ipv4/unicast/ipv6" in capabilities.get("5", {}).get("conversion", ()),
    )


def _graceful_restart(capability: Json | None) -> GracefulRestart | None:
    if capability is None:
        return None
    families = {}
    for name, flags in capability["address-family-flags"].items():
        version = _FAMILIES.get(name.replace("/", " "))
        if version is not None:
            families[version] = flags
    return GracefulRestart(
        int(capability["time"]),
        "forwarding" in capability["restart-flags"],
        frozenset(families),
        frozenset(version for version, flags in families.items() if "restart" in flags),
    )


def _notification(peer: Net, time: float, neighbor: Json) -> Event | None:
    notification = neighbor["notification"]
    return Notified(
        peer,
        time,
        neighbor["direction"] == "send",
        int(notification["code"]),
        int(notification["subcode"]),
        "".join(c for c in str(notification["message"]) if c.isprintable()).strip(),
    )


def _update(peer: Net, time: float, neighbor: Json) -> Event | None:
    sent = neighbor["direction"] == "send"
    message = neighbor["message"]
    if "eor" in message:
        eor = message["eor"]
        version = _FAMILIES.get(f"{eor['afi']} {eor['safi']}")
        return None if version is None else EndOfRib(peer, sent, version)
    update = message["update"]
    attribute = update.get("attribute", {})
    withdrawn: list[Net] = []
    for family, entries in update.get("withdraw", {}).items():
        if family in _FAMILIES:
            withdrawn += _nets(entries, family)
    announced: dict[Net, Announced] = {}
    for family, by_next_hop in update.get("announce", {}).items():
        if family in _FAMILIES:
            for text, entries in by_next_hop.items():
                next_hop = parse_host(text)
                nets = _nets(entries, family)
                if announced:  # of two next hops the global one counts
                    nets = [n for n in nets if n not in announced or _on_link(announced[n])]
                announced |= {net: Announced(net, next_hop) for net in nets}
    return Updated(
        peer,
        sent,
        tuple(withdrawn),
        tuple(announced.values()),
        unpack_attributes(attribute) if isinstance(attribute, str) else parse_attributes(attribute),
    )


def is_link_local(host: Net) -> bool:
    """Whether an address is in fe80::/10."""
    return host.version == V6 and host.address & _LINK_LOCAL_MASK == _LINK_LOCAL


def _on_link(known: Announced) -> bool:
    return is_link_local(known.next_hop)


def _nets(entries: str | list[Json | str], family: str) -> list[Net]:
    """The prefixes of a family, told as bytes or in ExaBGP's own JSON."""
    if isinstance(entries, str):
        return unpack_prefixes(entries, _FAMILIES[family])
    return _prefixes(entries, family)


def unpack_prefixes(text: str, version: int) -> list[Net]:
    """The prefixes whose bytes (RFC 4271 4.3) these hexadecimal digits are. Raises ValueError."""
    data, bits = bytes.fromhex(text), BITS[version]
    found, new, number = [], tuple.__new__, int.from_bytes
    start, end = 0, len(data)
    while start < end:
        length = data[start]
        size = PREFIX_BYTES[length] if length <= bits else end
        start, stop = start + 1, start + 1 + size
        if stop > end:
            raise ValueError(f"prefixes {text!r}: the one at byte {start - 1} is not whole")
        address = number(data[start:stop], "big") << bits - 8 * size
        found.append(new(Net, (version, address, length)))
        start = stop
    return found


def _prefixes(entries: list[Json | str], family: str) -> list[Net]:
    """The prefixes of a family: ``parse_prefix`` for thousands at once."""
    version = _FAMILIES[family]
    address_family, bits = _ADDRESS_FAMILIES[version], BITS[version]
    masks, found = _MASKS[version], []
    for entry in entries:
        text = entry if isinstance(entry, str) else entry["nlri"]
        address, slash, length = text.partition("/")
        size = int(length) if slash else bits
        if not 0 <= size <= bits:
            raise ValueError(f"prefix {text!r}: length outside of 0 to {bits}")
        value = int.from_bytes(socket.inet_pton(address_family, address), "big")
        found.append(Net(version, value & masks[size], size))
    return found


_PARSERS: Mapping[str, Callable[[Net, float, Json], Event | None]] = {
    "state": _state,
    "open": _open,
    "notification": _notification,
    "update": _update,
}
