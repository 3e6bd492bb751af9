"""What is said of a session, in words."""

from __future__ import annotations

import pytest

from api.net import parse_net
from bird_glue.config import Neighbor
from bird_glue.messages import Connected, Down, Notified, Opened, SessionEvent, Up
from bird_glue.tracker import Tracked, Tracker

PEER, OWN = parse_net("10.0.0.1"), parse_net("10.0.0.5")
NEIGHBOR = Neighbor(PEER, OWN, 65001, 64512, OWN.address)
CONNECTED = Connected(PEER, 1)
OPENED = Opened(PEER, 65009, 90, 1, None)


def notified(code: int, subcode: int, *, sent: bool, text: str = "") -> Notified:
    return Notified(PEER, 2, sent, code, subcode, text)


def down(reason: str) -> Down:
    return Down(PEER, 9, reason)


def after(*events: SessionEvent, diagnosis: str = "", neighbor: Neighbor = NEIGHBOR) -> Tracked:
    tracker = Tracker(lambda peer: diagnosis)
    tracker.set_neighbors({PEER: neighbor}, 0)
    for event in events:
        tracker.note(event)
    return tracker.get(PEER)


CLOSED = down("closing connection")


@pytest.mark.parametrize(
    ("events", "info"),
    [
        ((), "calling 10.0.0.1 port 179: no answer yet"),
        (
            (CONNECTED, CLOSED),
            "connection to 10.0.0.1 port 179 refused, or closed at once: it doesn't speak BGP "
            "there, or doesn't know us as a peer",
        ),
        ((CONNECTED, OPENED, CLOSED), "the peer closed the connection after OPEN"),
        ((CONNECTED, OPENED, Up(PEER, 3), CLOSED), "connection lost"),
        (
            (CONNECTED, OPENED, notified(2, 2, sent=True), down("notification sent (2,2)")),
            "wrong AS number: the peer is AS 65009, AS 65001 is configured",
        ),
        (
            (CONNECTED, notified(2, 2, sent=False), down("notification received (2,2)")),
            "the peer refuses us: wrong AS number, we are AS 64512",
        ),
        (
            (Up(PEER, 3), notified(4, 0, sent=True), down("notification sent (4,0)")),
            "hold timer expired: nothing heard from the peer for 90 s or less",
        ),
        (
            (Up(PEER, 3), notified(6, 2, sent=False, text="upgrade"), down("notification rec…")),
            "the peer says: administrative shutdown (upgrade)",
        ),
        ((Up(PEER, 3), notified(77, 1, sent=True), down("x")), "sent: error 77/1"),
        ((Up(PEER, 3), down("stop, message [removed]")), "its settings changed"),
        ((down("connection to 10.0.0.1:179 failed"),), "connection to 10.0.0.1:179 failed"),
    ],
)
def test_last_error_in_words(events: tuple[SessionEvent, ...], info: str) -> None:
    found = after(*events)
    assert found.state == "Active"
    assert found.info == info


def test_what_the_kernel_knows_comes_first() -> None:
    assert after(diagnosis="no route to 10.0.0.1").info == "no route to 10.0.0.1"
    silent = "no answer from 10.0.0.1 on its link"
    assert after(CONNECTED, CLOSED, diagnosis=silent).info == silent


def test_the_last_word_stays_beside_what_comes_of_the_next_calls() -> None:
    """A router that refuses us in words often takes no call at all for a while."""
    said = CONNECTED, OPENED, notified(2, 2, sent=True), down("notification sent (2,2)")
    found = after(*said, CONNECTED, CLOSED, CONNECTED, CLOSED)
    assert found.info.startswith("connection to 10.0.0.1 port 179 refused, or closed at once")
    assert found.info.endswith(
        "; before that: wrong AS number: the peer is AS 65009, AS 65001 is configured"
    )
    changed = down("stop, message [removed]")
    assert "before that" not in after(*said, changed, CONNECTED, CLOSED).info
    assert "before that" not in after(*said, Up(PEER, 3), CLOSED, CONNECTED, CLOSED).info


def test_established_since_and_lost_since() -> None:
    found = after(CONNECTED, CLOSED, CONNECTED, OPENED, Up(PEER, 3))
    assert (found.state, found.since, found.info) == ("Established", 3, "")
    found = after(Up(PEER, 3), CLOSED, CONNECTED, CLOSED)
    assert (found.state, found.since) == ("Active", 9)


def test_collisions_are_no_errors() -> None:
    collision = down("closing outgoing connection as we have another incoming on with higher …")
    assert after(Up(PEER, 3), collision).state == "Established"
    refused = notified(6, 7, sent=False)
    assert "no answer yet" in after(CONNECTED, refused, down("notification received (6,7)")).info


def test_one_that_waits_says_so() -> None:
    waiting = Neighbor(PEER, OWN, 65001, 64512, OWN.address, passive=True)
    assert after(neighbor=waiting).info == "waiting for the peer to call"


def test_session_that_is_wanted_again_before_it_ended() -> None:
    tracker = Tracker(lambda peer: "")
    tracker.note(Up(PEER, 1))  # ExaBGP was found with it
    tracker.set_neighbors({PEER: NEIGHBOR}, 5)
    assert tracker.get(PEER).state == "Established"
    tracker.set_neighbors({}, 6)
    tracker.set_neighbors({PEER: NEIGHBOR}, 7)
    assert tracker.get(PEER).since == 1
    tracker.set_neighbors({}, 8)
    tracker.note(down("stop, message [removed]"))
    tracker.set_neighbors({PEER: NEIGHBOR}, 9)
    assert tracker.get(PEER).state == "Active"


def test_exabgp_itself_ends() -> None:
    tracker = Tracker(lambda peer: "")
    tracker.set_neighbors({PEER: NEIGHBOR}, 5)
    tracker.note(Up(PEER, 6))
    tracker.lost_all(7)
    assert tracker.get(PEER) == Tracked("Active", 7, "ExaBGP has ended and is being started again")
