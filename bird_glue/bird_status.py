"""What BIRD says of its sessions: ``show protocols all``, read into numbers and words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from bird_glue.birdc import Line
from bird_glue.config import Neighbor
from bird_glue.words import notification, refused, same_router_id

_TABLE = 1002  # NAME PROTO TABLE STATE SINCE INFO
_DETAIL = 1006
_ROUTES = re.compile(r"(\d+) imported, (?:(\d+) filtered, )?(\d+) exported, (\d+) preferred")
_SINCE = re.compile(r"(\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2}(?:\.\d+)?)")
# BIRD's words for what a NOTIFICATION says; others it gives as numbers
_NOTIFICATIONS = {
    "Invalid message header": (1, 0),
    "Connection not synchronized": (1, 1),
    "Bad message length": (1, 2),
    "Bad message type": (1, 3),
    "Invalid OPEN message": (2, 0),
    "Unsupported version number": (2, 1),
    "Bad peer AS": (2, 2),
    "Bad BGP identifier": (2, 3),
    "Unsupported optional parameter": (2, 4),
    "Unacceptable hold time": (2, 6),
    "Required capability missing": (2, 7),
    "No supported AFI/SAFI": (2, 8),
    "Invalid UPDATE message": (3, 0),
    "Malformed attribute list": (3, 1),
    "Unrecognized well-known attribute": (3, 2),
    "Missing mandatory attribute": (3, 3),
    "Invalid attribute flags": (3, 4),
    "Invalid attribute length": (3, 5),
    "Invalid ORIGIN attribute": (3, 6),
    "Invalid NEXT_HOP attribute": (3, 8),
    "Optional attribute error": (3, 9),
    "Invalid network field": (3, 10),
    "Malformed AS_PATH": (3, 11),
    "Hold timer expired": (4, 0),
    "Finite state machine error": (5, 0),
    "Unexpected message in OpenSent state": (5, 1),
    "Unexpected message in OpenConfirm state": (5, 2),
    "Unexpected message in Established state": (5, 3),
    "Cease": (6, 0),
    "Maximum number of prefixes reached": (6, 1),
    "Administrative shutdown": (6, 2),
    "Peer de-configured": (6, 3),
    "Administrative reset": (6, 4),
    "Connection rejected": (6, 5),
    "Other configuration change": (6, 6),
    "Connection collision resolution": (6, 7),
    "Out of Resources": (6, 8),
}
_NUMBERS = re.compile(r"(\d+)\.(\d+)$")
_WRONG_AS = (2, 2)
_BAD_ROUTER_ID = (2, 3)
_ESTABLISHED = "Established"
_STATES = {"Down": "Idle", "Close": "Idle", "Passive": "Active"}  # ours for BIRD's
_RECEIVED, _OURS, _SOCKET = "Received: ", "BGP Error: ", "Socket: "
_REFUSED = "Socket: Connection refused"
_SHAKE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class ProtocolStatus:
    """One BGP session as BIRD sees it. ``state`` as in RFC 4271 8, ``since`` in seconds of the
    epoch, ``error`` the last one. ``filtered`` routes were received and are kept for the case
    that a filter changes; of the ``imported`` the ``preferred`` are the best of their prefix.
    ``said``: the last error that either end put in words, since it was established last.
    """

    name: str
    state: str
    since: float
    error: str = ""
    imported: int = 0
    filtered: int = 0
    exported: int = 0
    preferred: int = 0
    said: str = ""

    def after(self, before: ProtocolStatus) -> ProtocolStatus:
        """The same, where it is known what was seen before."""
        since, said = self.since, ""
        # BIRD works out a time of day from two clocks, anew whenever it is asked
        if self.state == before.state and abs(since - before.since) < _SHAKE_SECONDS:
            since = before.since
        if self.state != _ESTABLISHED:
            said = self.error if self.error.startswith((_RECEIVED, _OURS)) else before.said
        return replace(self, since=since, said=said)


def parse_protocols(lines: Iterable[Line]) -> list[ProtocolStatus]:
    """The answer to ``show protocols all``, of BGP protocols. BIRD must run with TZ=UTC."""
    return [
        _protocol(head, details)
        for head, details in _blocks(lines)
        if len(head.split()) > 1 and head.split()[1] == "BGP"
    ]


def _blocks(lines: Iterable[Line]) -> Iterator[tuple[str, list[str]]]:
    """Each line of the table with the details under it."""
    head, details = "", list[str]()
    for line in lines:
        if line.code == _TABLE:
            if head:
                yield head, details
            head, details = line.text, []
        elif line.code == _DETAIL:
            details.append(line.text.strip())
    if head:
        yield head, details


def _protocol(head: str, details: list[str]) -> ProtocolStatus:
    fields: dict[str, str] = {}
    for line in details:
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name, value.strip())
    state = fields.get("BGP state", "Down")
    since = _SINCE.search(head)
    counts = [0, 0, 0, 0]
    for line in details:  # of each channel
        if line.startswith("Routes:") and (routes := _ROUTES.search(line)):
            numbers = [int(number or 0) for number in routes.groups()]
            counts = [sum(pair) for pair in zip(counts, numbers, strict=True)]
    return ProtocolStatus(
        name=head.split()[0],
        state=_STATES.get(state, state),
        since=datetime.fromisoformat(since[1]).replace(tzinfo=UTC).timestamp() if since else 0.0,
        error=fields.get("Last error", ""),
        imported=counts[0],
        filtered=counts[1],
        exported=counts[2],
        preferred=counts[3],
    )


def error_in_words(error: str, neighbor: Neighbor) -> str:
    """What ended a session or an attempt, in the words that are used for either engine.

    Of other connections that can't be made it says nothing: why is found out otherwise.
    """
    if error == _REFUSED:
        return refused(neighbor.address, neighbor.port)
    if error.startswith(_SOCKET):
        return ""
    for prefix, who in ((_RECEIVED, "the peer says"), (_OURS, "sent")):
        if not error.startswith(prefix):
            continue
        text = error.removeprefix(prefix)
        numbers = _NUMBERS.match(text)
        code = (int(numbers[1]), int(numbers[2])) if numbers else _NOTIFICATIONS.get(text)
        if code == _WRONG_AS and prefix == _OURS:
            return f"wrong AS number: the peer is not AS {neighbor.remote_as}, as is configured"
        if code == _WRONG_AS:
            return f"the peer refuses us: wrong AS number, we are AS {neighbor.local_as}"
        if code == _BAD_ROUTER_ID and neighbor.remote_as == neighbor.local_as:
            return same_router_id(neighbor.router_id)
        return f"{who}: {notification(*code) if code else text}"
    return error
