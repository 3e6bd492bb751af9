"""What became of each session, in words for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from api.net import Net, format_address
from bird_glue.config import Neighbor
from bird_glue.messages import Connected, Down, Notified, Opened, SessionEvent, Up
from bird_glue.words import notification, refused, same_router_id

ESTABLISHED = "Established"
_COLLISION = "closing outgoing connection as we have another incoming"
_LOST = "connection lost"
_CHANGED = "its settings changed"  # exabgp_main says it in these words, too
_UNSAID = ("", _LOST, _CHANGED)  # why a session ended, not why there is none since
_CEASE = 6
_CEASE_COLLISION = 7
_HOLD_TIMER = (4, 0)
_WRONG_AS = (2, 2)
_BAD_ROUTER_ID = (2, 3)


@dataclass(slots=True)
class Tracked:
    """A session: its state as in RFC 4271 8, since when (seconds of the epoch), last error."""

    state: str = "Active"
    since: float = 0.0
    info: str = ""
    opened: Opened | None = None
    notified: Notified | None = None
    failure: str = ""  # why we end it ourselves, until it has ended
    ended: str = ""  # the last word that was exchanged about why it ended, or isn't made


class Tracker:
    """``diagnose`` is asked why a connection could not be made; empty if it doesn't know."""

    def __init__(self, diagnose: Callable[[Net], str]) -> None:
        self._diagnose = diagnose
        self._neighbors: Mapping[Net, Neighbor] = {}
        self._sessions: dict[Net, Tracked] = {}

    def set_neighbors(self, neighbors: Mapping[Net, Neighbor], now: float) -> None:
        """Whose sessions are wanted. ``now``: seconds of the epoch.

        What is known of a session stays until ExaBGP says that it ended, for the case that it
        is wanted again before.
        """
        for address in neighbors:
            self._sessions.setdefault(address, Tracked(since=now))
        self._neighbors = neighbors

    def get(self, peer: Net) -> Tracked:
        """What is known of a peer's session."""
        found = self._sessions[peer]
        if found.state == ESTABLISHED or found.info not in _UNSAID:
            return found
        neighbor = self._neighbors[peer]
        info = "waiting for the peer to call"
        if not neighbor.passive:
            info = f"calling {format_address(*peer[:2])} port {neighbor.port}: no answer yet"
        why = self._diagnose(peer)
        return Tracked(found.state, found.since, why or found.info or info)

    def note(self, event: SessionEvent) -> None:
        """Something happened."""
        session = self._sessions.setdefault(event.peer, Tracked())
        match event:
            case Connected():
                if session.state != ESTABLISHED:
                    session.opened = session.notified = None
            case Opened():
                session.opened = event
            case Notified():
                session.notified = event
            case Up(time=time):
                session.state, session.since, session.info = ESTABLISHED, time, ""
                session.notified, session.failure, session.ended = None, "", ""
            case Down() if event.peer not in self._neighbors:
                del self._sessions[event.peer]
            case Down():
                self._down(session, event)

    def failed(self, peer: Net, info: str) -> None:
        """The session is being ended from here: the peer is dead, or told too much."""
        if session := self._sessions.get(peer):
            session.failure = info

    def lost_all(self, now: float) -> None:
        """ExaBGP has ended. ``now``: seconds of the epoch."""
        wanted = self._neighbors
        self._sessions = {a: found for a, found in self._sessions.items() if a in wanted}
        for session in self._sessions.values():
            if session.state == ESTABLISHED:
                session.state, session.since = "Active", now
                session.info = "ExaBGP has ended and is being started again"

    def _down(self, session: Tracked, event: Down) -> None:
        if event.reason.startswith(_COLLISION):
            return
        info = self._why(session, event)
        if session.state == ESTABLISHED:
            session.state, session.since = "Active", event.time
            session.ended = info if info not in _UNSAID else ""
        elif info == _CHANGED:
            session.ended = ""
        elif session.notified is not None or session.failure:
            session.ended = info or session.ended
        elif info and session.ended:
            info = f"{info}; before that: {session.ended}"
        session.info = info or session.info
        session.opened, session.failure = None, ""

    def _why(self, session: Tracked, event: Down) -> str:
        if session.failure:
            return session.failure
        if event.removed or event.reason == _CHANGED:
            return _CHANGED
        if session.notified is not None:
            return self._notification(session, session.notified)
        if session.state == ESTABLISHED:
            return _LOST
        if session.opened is not None:
            return "the peer closed the connection after OPEN"
        if event.reason != "closing connection":
            return event.reason
        port = self._neighbors[event.peer].port
        return self._diagnose(event.peer) or refused(event.peer, port)

    def _notification(self, session: Tracked, notified: Notified) -> str:
        neighbor = self._neighbors[notified.peer]
        code = notified.code, notified.subcode
        if code == (_CEASE, _CEASE_COLLISION):
            return ""
        if code == _WRONG_AS and notified.sent and session.opened:
            return (
                f"wrong AS number: the peer is AS {session.opened.asn}, "
                f"AS {neighbor.remote_as} is configured"
            )
        if code == _WRONG_AS and not notified.sent:
            return f"the peer refuses us: wrong AS number, we are AS {neighbor.local_as}"
        opened = session.opened
        if code == _BAD_ROUTER_ID and (not opened or opened.router_id == neighbor.router_id):
            return same_router_id(neighbor.router_id)
        words = notification(*code)
        if code == _HOLD_TIMER and notified.sent:
            return f"{words}: nothing heard from the peer for {neighbor.hold_seconds} s or less"
        detail = f" ({notified.text})" if notified.text and notified.text.isascii() else ""
        return f"{'sent' if notified.sent else 'the peer says'}: {words}{detail}"
