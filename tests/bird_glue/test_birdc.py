"""BIRD's control socket, and what its answers mean."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.net import parse_net
from bird_glue.bird_routes import LearnedWay, parse_learned, parse_routes, why_filtered
from bird_glue.bird_status import ProtocolStatus, error_in_words, parse_protocols
from bird_glue.birdc import Birdc, BirdError, Line, RefusedError
from bird_glue.config import Neighbor
from bird_glue.decision import Guard, Session
from bird_glue.filters import Filter, Rule
from bird_glue.messages import Attributes, Segment

WELCOME = b"0001 BIRD 2.0.12 ready.\n"
PROTOCOLS = """\
2002-Name       Proto      Table      State  Since         Info
1002-peer_b     BGP        ---        up     2026-11-21 06:44:40.866  Established   
1006-  BGP state:          Established
     Neighbor address: 10.0.0.2
   Channel ipv4
     State:          UP
     Routes:         2 imported, 1 filtered, 4 exported, 1 preferred
 
1002-peer_c     BGP        ---        start  2026-11-21 06:44:36.498  Passive  Received: Bad peer AS
1006-  BGP state:          Passive
     Last error:       Received: Bad peer AS
1002-direct1    Direct     ---        up     2026-11-21 06:44:36.498  
0000 
"""  # noqa: W291, W293
ROUTES = """\
1007-Table master4:
 10.6.1.0/24          unicast [peer_b 06:44:40.961 from 10.0.0.2] * (100) [AS2i]
 	via 10.0.0.2 on eth0
1008-	Type: BGP univ
1012-	BGP.origin: IGP
 	BGP.as_path: 2 3 {4 5} 6
 	BGP.next_hop: 10.0.0.2
 	BGP.local_pref: 100
 	BGP.community: (1,2) (3,4)
 	BGP.large_community: (1, 2, 3)
 	BGP.originator_id: 10.0.0.9
 	BGP.cluster_list: 10.0.0.7 10.0.0.8
1007-10.6.2.0/24          unreachable [peer_b 06:44:40.961 from 10.0.0.2] * (100) [AS64512i]
1012-	BGP.as_path: 64512
 	BGP.next_hop: 10.0.0.2
0000 
"""  # noqa: E101, W291
LEARNED = """\
1007-Table master4:
 10.6.1.0/24          unicast [peer_b 06:44:40.961] * (100) [AS2i]
 	via 10.0.0.2 on eth0
1012-	BGP.as_path: 2
 	BGP.next_hop: 10.0.0.2
1007-                     unicast [peer_c 06:44:40.961 from 10.0.0.3] (100) [AS2i]
 	via 10.0.0.3 on eth0
1012-	BGP.next_hop: 10.0.0.4 fe80::1
1007-10.6.2.0/24          unreachable [peer_b 06:44:40.961 from 10.0.0.2] * (100) [AS64512i]
1012-	BGP.next_hop: 10.0.0.2
0000 
"""  # noqa: E101, W291
NEIGHBOR = Neighbor(parse_net("10.0.0.2"), parse_net("10.0.0.1"), 65001, 64512, 1)


class Server:
    """Says the welcome, then to each line it hears the next answer; then it hangs up."""

    def __init__(self, path: Path, *answers: bytes) -> None:
        self.heard: list[bytes] = []
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as reader:
            connection.sendall(WELCOME)
            for answer in self._answers:
                self.heard.append(reader.readline())
                for byte in (answer[:7], answer[7:]):  # not in one piece
                    connection.sendall(byte)

    def end(self) -> None:
        self._thread.join()
        self._listener.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "b"


def lines(text: str, path: Path) -> list[Line]:
    """The answer as the client reads it."""
    server = Server(path, text.encode())
    with Birdc(path) as birdc:
        found = birdc.ask("show")
    server.end()
    assert server.heard == [b"show\n"]
    return found


def test_sessions_in_numbers_and_words(path: Path) -> None:
    up, passive = parse_protocols(lines(PROTOCOLS, path))
    assert (up.name, up.state, up.since) == ("peer_b", "Established", 1795243480.866)
    assert (up.imported, up.filtered, up.exported, up.preferred) == (2, 1, 4, 1)
    assert (passive.state, passive.error) == ("Active", "Received: Bad peer AS")


def test_what_was_seen_before_counts() -> None:
    """A time that shakes is the same; the last word stays until the session is established."""
    said, refused = "Received: Bad peer AS", "Socket: Connection refused"
    wrong = ProtocolStatus("p", "Active", 10.001, said)
    seen = wrong.after(ProtocolStatus("p", "Active", 10.0, "")).after(wrong)
    assert (seen.since, seen.said) == (10.001, said)
    assert wrong.after(ProtocolStatus("p", "Active", 10.0, "")).since == 10.0
    assert wrong.after(ProtocolStatus("p", "Connect", 10.0, "")).since == 10.001
    assert wrong.after(ProtocolStatus("p", "Active", 9.0, "")).since == 10.001
    seen = ProtocolStatus("p", "Connect", 11, refused).after(seen)
    assert (seen.error, seen.said) == (refused, said)
    seen = ProtocolStatus("p", "Established", 12, refused).after(seen)
    assert seen.said == ProtocolStatus("p", "Connect", 13, refused).after(seen).said == ""


def test_all_paths_that_lead_somewhere(path: Path) -> None:
    net = parse_net("10.6.1.0/24")
    assert parse_learned(lines(LEARNED, path)) == [
        LearnedWay(net, "peer_b", True, parse_net("10.0.0.2")),
        LearnedWay(net, "peer_c", False, parse_net("10.0.0.4")),
    ]


def test_routes_and_why_they_were_refused(path: Path) -> None:
    one, other = parse_routes(lines(ROUTES, path))
    assert (one.net, one.interface, one.next_hop) == (
        parse_net("10.6.1.0/24"),
        "eth0",
        parse_net("10.0.0.2"),
    )
    assert one.attributes == Attributes(
        origin=0,
        as_path=(
            Segment("as-sequence", (2, 3)),
            Segment("as-set", (4, 5)),
            Segment("as-sequence", (6,)),
        ),
        local_preference=100,
        communities=("1:2", "3:4"),
        large_communities=("1:2:3",),
        originator=0x0A000009,
        clusters=(0x0A000007, 0x0A000008),
    )
    on_eth0 = Filter("f", import_v4=(Rule(accept=False, interface="eth*"),))
    session = Session(True, frozenset((64512,)), filters=(on_eth0,))
    peer = NEIGHBOR.address
    assert why_filtered(other, peer, session, Guard()) == "our own AS is in its AS path"
    assert why_filtered(one, peer, session, Guard()) == "rejected by BGPFilter f: importV4[0]"
    plain = Session(True, frozenset((64512,)))
    assert why_filtered(one, peer, plain, Guard()) == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("", ""),
        ("Socket: Connection closed", ""),
        (
            "Socket: Connection refused",
            "connection to 10.0.0.2 port 179 refused, or closed at once: "
            "it doesn't speak BGP there, or doesn't know us as a peer",
        ),
        ("Received: Administrative shutdown", "the peer says: administrative shutdown"),
        ("Received: 6.10", "the peer says: BFD down"),
        ("Received: Bad peer AS", "the peer refuses us: wrong AS number, we are AS 64512"),
        ("BGP Error: Bad peer AS", "wrong AS number: the peer is not AS 65001, as is configured"),
        ("BGP Error: Hold timer expired", "sent: hold timer expired"),
        ("Error: Kernel MD5 auth failed", "Error: Kernel MD5 auth failed"),
    ],
)
def test_errors_in_words(error: str, words: str) -> None:
    assert error_in_words(error, NEIGHBOR) == words


def test_it_says_no_and_goes_on(path: Path) -> None:
    server = Server(path, b"8002 bird.conf:3:1 syntax error\n", b"0003 Reconfigured\n")
    with Birdc(path) as birdc:
        with pytest.raises(RefusedError, match=r"configure: bird\.conf:3:1 syntax error"):
            birdc.ask("configure")
        assert birdc.ask("configure") == [Line(3, "Reconfigured")]
        with pytest.raises(BirdError):
            birdc.ask("configure")  # it has hung up
    server.end()


def test_nobody_or_something_else_answers(path: Path) -> None:
    with pytest.raises(BirdError, match="No such file"):
        Birdc(path)
    server = Server(path, b"HTTP/1.1 400 Bad Request\n")
    with Birdc(path) as birdc, pytest.raises(BirdError, match="not an answer of BIRD: 'HTTP"):
        birdc.ask("show")
    server.end()


@given(st.lists(st.tuples(st.sampled_from((1002, 1006, 1007, 1012)), st.text())))
def test_texts_of_all_kinds_are_read(drawn: list[tuple[int, str]]) -> None:
    found = [Line(code, text) for code, text in drawn]
    parse_protocols(found)
    for route in parse_routes(found):
        assert route.net
