"""From wanted peers to sessions, and what is in the way; the file ExaBGP gets of them."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from api.net import Net, format_address, parse_net
from bird_glue.channel import FromRelay
from bird_glue.config import Listen, Neighbor, environment, listening, render
from bird_glue.configfile import ConfigurationFile
from bird_glue.engine import Intent
from bird_glue.filters import Filter, Rule
from bird_glue.peers import Peer, PeerType
from bird_glue.secrets import SecretKey, SecretRead
from bird_glue.sessions import Sessions, listen, plan_sessions
from bird_glue.settings import ClusterNode, Local
from bird_glue.speaker import Speaker
from kernel.netns import inside
from tests.support.netns import eventually, fresh_namespace

OWN, TOR, NODE = (parse_net(t) for t in ("10.0.0.5", "10.0.0.1", "10.0.0.6"))
OWN6, TOR6 = parse_net("2001:db8::5"), parse_net("2001:db8::1")
LOCAL = Local(
    ClusterNode("n1", {}, {4: OWN, 6: OWN6}, {}, 64512, None), OWN.address, None, False, {}, True
)
HOSTS = frozenset({OWN, OWN6})
BASE = Peer(TOR, PeerType.GLOBAL, 65001, ("BGPPeer", "tor"), source=OWN)
MESH = Peer(NODE, PeerType.MESH, 64512, ("Node", "n2"), source=OWN, is_node=True)


def plan(*peers: Peer, hosts: frozenset[Net] = HOSTS, source: Net | None = None) -> Sessions:
    return plan_sessions(peers, LOCAL, hosts, lambda address: source)


def problems(sessions: Sessions) -> list[tuple[str, str, str]]:
    return [(p.kind, p.name, p.problem.field) for p in sessions.problems]


def test_defaults() -> None:
    neighbor = plan(BASE).neighbors[TOR]
    assert neighbor == Neighbor(TOR, OWN, 65001, 64512, OWN.address)
    assert neighbor.external
    assert (neighbor.port, neighbor.hold_seconds, neighbor.restart_seconds) == (179, 90, 120)
    assert listen(LOCAL, HOSTS) == Listen(("0.0.0.0", "::"), 179)
    at_node = replace(LOCAL, bind_node_address=True, port=1790)
    assert listen(at_node, HOSTS) == Listen(("10.0.0.5", "2001:db8::5"), 1790)


def test_settings_of_a_peer() -> None:
    peer = replace(
        BASE, port=1790, keepalive_seconds=5, restart_seconds=9999, local_as=65099, ttl_security=2
    )
    neighbor = plan(peer).neighbors[TOR]
    assert (neighbor.port, neighbor.hold_seconds, neighbor.restart_seconds) == (1790, 15, 4095)
    assert (neighbor.local_as, neighbor.ttl_security) == (65099, 2)


def test_between_two_nodes_one_calls_and_one_waits_whoever_asked_for_it() -> None:
    by_selector = replace(MESH, type=PeerType.NODE, owner=("BGPPeer", "p"))
    assert plan(by_selector).neighbors[NODE].passive
    assert (
        not plan(replace(by_selector, address=parse_net("10.0.0.4"))).neighbors.popitem()[1].passive
    )
    assert not plan(BASE).neighbors[TOR].passive


def test_one_session_with_an_address_and_a_bgppeer_before_the_mesh() -> None:
    explicit = replace(MESH, type=PeerType.NODE, owner=("BGPPeer", "p"), port=1790)
    found = plan(MESH, explicit)
    assert found.neighbors[NODE].port == 1790
    assert found.problems == []
    other_port = replace(BASE, port=1790, owner=("BGPPeer", "tor2"))
    found = plan(BASE, other_port)
    assert list(found.neighbors) == [TOR]
    assert problems(found) == [("BGPPeer", "tor2", "spec.peerIP")]


def test_without_its_password_there_is_no_session() -> None:
    key = SecretKey("bgp", "tor")
    secrets = {"bgp": SecretRead("bgp", {"tor": b"hidden"})}
    locked, mesh = replace(BASE, password=key), replace(MESH, password=key)
    found = plan_sessions([locked], LOCAL, HOSTS, lambda address: None, {}, secrets)
    assert found.neighbors[TOR].password == b"hidden"
    found = plan(locked, MESH)
    assert list(found.neighbors) == [NODE]
    assert problems(found) == [("BGPPeer", "tor", "spec.password")]
    found = plan(mesh, replace(mesh, address=parse_net("10.0.0.7")), BASE)
    assert list(found.neighbors) == [TOR]
    assert problems(found) == [("BGPConfiguration", "default", "spec.nodeMeshPassword")]
    nameless = plan(replace(BASE, password=SecretKey("", "")))
    assert "secretKeyRef" in str(nameless.problems[0])


def test_ipv4_routes_over_ipv6() -> None:
    peer = replace(BASE, address=TOR6, source=OWN6, extended_next_hop=True)
    neighbor = plan(peer).neighbors[TOR6]
    assert neighbor.versions == (6, 4)
    text, _ = render([neighbor], Path("/s"))
    assert "family { ipv6 unicast; ipv4 unicast; }\nnexthop { ipv4 unicast ipv6; }" in text


def test_reachable_by() -> None:
    gateway = parse_net("10.0.0.254")
    asked: list[Net] = []

    def source_of(address: Net) -> Net:
        asked.append(address)
        return OWN

    peer = replace(BASE, reachable_by=gateway, source=None)
    found = plan_sessions([peer], LOCAL, HOSTS, source_of)
    assert found.ways == {TOR: gateway}
    assert found.neighbors[TOR].reachable_by == gateway
    assert asked == [gateway]  # to the peer itself there may be no route yet


def test_the_source_address_must_be_here() -> None:
    found = plan(BASE, MESH, hosts=frozenset())
    assert not found.neighbors
    assert problems(found) == [("Node", "n1", "spec.bgp.ipv4Address")]
    anywhere = replace(BASE, source=None)
    assert plan(anywhere, source=OWN).neighbors[TOR].local == OWN
    found = plan(anywhere)
    assert problems(found) == [("BGPPeer", "tor", "spec.peerIP")]


ALL = [
    Neighbor(TOR, OWN, 65001, 64512, OWN.address, port=1790, ttl_security=1),
    Neighbor(NODE, OWN, 4200000000, 64512, OWN.address, passive=True, restart_seconds=4095),
    Neighbor(TOR6, OWN6, 64512, 64512, OWN.address, hold_seconds=3),
]


def test_exabgp_accepts_what_is_rendered(tmp_path: Path) -> None:
    text, mark = render(ALL, tmp_path / "s")
    assert text.count(mark) == text.count("description") > 0
    path = tmp_path / "exabgp.conf"
    path.write_text(text)
    result = subprocess.run(
        [sys.executable, "-m", "exabgp", "validate", "-n", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for neighbor in ALL:
        assert f"neighbor  {format_address(*neighbor.address[:2])}" in result.stderr + result.stdout


def test_mark_tells_files_apart() -> None:
    marks = {render(ALL[:count], Path("/s"))[1] for count in range(len(ALL) + 1)}
    assert len(marks) == len(ALL) + 1


def test_environment_can_be_read_back() -> None:
    wanted = Listen(("0.0.0.0", "::"), 1790)
    assert listening(environment(wanted, Path("/l"))) == wanted
    assert listening({}) is None


def test_an_earlier_exabgp_is_understood_and_a_later_one_replaced() -> None:
    """Agents that know routes only in ExaBGP's own JSON look for this name, and for no other."""
    wanted = Listen(("0.0.0.0",), 1179)
    variables = environment(wanted, Path("/l"))
    assert "exabgp_tcp_bind" not in variables
    earlier = {"exabgp_tcp_bind": "0.0.0.0", "exabgp_tcp_port": "1179"}
    assert listening(earlier) == wanted


def test_a_session_exabgp_refuses_takes_no_other_down(tmp_path: Path) -> None:
    """Nothing that is rendered is refused, so this one is made wrong behind the types' back."""
    wrong = replace(ALL[1], hold_seconds=1)
    file = ConfigurationFile(tmp_path, tmp_path / "s")
    file.want({neighbor.address: neighbor for neighbor in (ALL[0], wrong)})
    file.write(check=True)
    assert list(file.rejected) == [NODE]
    assert "hold" in file.rejected[NODE]
    text = file.path.read_text()
    assert "neighbor 10.0.0.1 " in text
    assert "neighbor 10.0.0.6 " not in text


def test_an_exabgp_that_refuses_its_file_is_started_without_what_is_wrong(tmp_path: Path) -> None:
    wrong = replace(ALL[1], hold_seconds=1)
    sink: queue.SimpleQueue[FromRelay] = queue.SimpleQueue()
    with fresh_namespace() as namespace, inside(namespace.fd):
        speaker = Speaker(tmp_path, sink.put)
        neighbors = {neighbor.address: neighbor for neighbor in (ALL[0], wrong)}
        speaker.configure(Intent(Listen(("127.0.0.1",)), neighbors))

        def running() -> bool:
            speaker.step(time.monotonic())
            with contextlib.suppress(queue.Empty):
                speaker.handle(sink.get_nowait(), time.monotonic())
            return bool(speaker.rejected) and speaker.pid is not None and not speaker.problem

        try:
            eventually(running, 20)
        finally:
            speaker.stop()
    assert list(speaker.rejected) == [NODE]


def test_a_filter_that_is_missing_lets_nothing_pass() -> None:
    known = Filter("a", import_v4=(Rule(accept=True),))
    peer = replace(BASE, filters=("a", "b"))
    found = plan_sessions([peer], LOCAL, HOSTS, lambda address: None, {"a": known})
    assert found.filters == {TOR: (known, Filter("b", missing=True))}
    assert problems(found) == [("BGPPeer", "tor", "spec.filters")]
