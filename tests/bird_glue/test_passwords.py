"""Two routers, each session with a password of its own out of a Secret, and rotation."""

from __future__ import annotations

import base64
import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from api.net import parse_net
from bird_glue.config import Neighbor
from bird_glue.drops import Drops
from bird_glue.status import leave
from tests.bird_glue.world import BIRD_COMMON, BIRD_SESSION, Bird, Node, World, world
from tests.support.netns import connect, eventually

BLOCK = "10.1.0.0/26"
TORS = {"tor1": ("172.31.1.1", "172.31.1.11"), "tor2": ("172.31.2.1", "172.31.2.11")}


def configuration(name: str, password: str) -> str:
    local, peer = TORS[name]
    session = BIRD_SESSION.format(
        name="n1", local=local, asn=65001, peer=peer, peer_asn=64512, export="all"
    ).replace("graceful", f'password "{password}"; graceful', 1)
    return BIRD_COMMON.format(router_id=local) + session


@dataclass
class Racks:
    node: Node
    tors: dict[str, Bird]
    world: World

    def problems(self) -> str:
        status = self.node.status()
        return "\n".join(status.problems) if status else ""


@pytest.fixture(params=["exabgp", "bird"])
def racks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Racks]:
    with world(tmp_path_factory.mktemp("passwords")) as made:
        node, store = made.node("n1"), made.store
        node.engine = request.param
        tors = {}
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        store.node("n1", "172.31.1.11/24")
        store.block("n1", BLOCK)
        for name, (address, own) in TORS.items():
            tors[name] = tor = made.bird(name)
            connect(node.namespace, name, tor.namespace, "n1", [f"{own}/24", f"{address}/24"])
            reference = {"secretKeyRef": {"name": "bgp", "key": name}}
            store.put(
                "BGPPeer",
                name,
                peerIP=address,
                asNumber=65001,
                password=reference,
                sourceAddress="None",
            )
            tor.start(configuration(name, f"first-{name}"))
        yield Racks(node, tors, made)


def test_rotated_one_at_a_time(racks: Racks) -> None:
    node, (address, _) = racks.node, TORS["tor1"]
    node.start()
    eventually(lambda: "BGPPeer tor1: spec.password: 'bgp/tor1': Secret bgp" in racks.problems())
    assert "which does not exist" in racks.problems()
    assert node.peer(address) is None  # no session rather than one without

    racks.world.secret("bgp", tor1="first-tor1", tor2="first-tor2\n")
    eventually(lambda: node.established(*(address for address, _ in TORS.values())))
    eventually(lambda: all(tor.blocks() == {BLOCK} for tor in racks.tors.values()))

    before, session = (racks.tors[name].session("n1") for name in ("tor1", "tor2"))
    racks.tors["tor1"].configure(configuration("tor1", "it's \\ {new};"))
    racks.world.secret("bgp", tor1="it's \\ {new};", tor2="first-tor2")
    eventually(lambda: racks.tors["tor1"].session("n1") != before)
    eventually(lambda: node.established(address) and racks.tors["tor1"].blocks() == {BLOCK})
    assert racks.tors["tor2"].session("n1") == session

    # an agent that starts knows the password before it touches the sessions, even if it can't
    # read the Secret
    path = racks.world.store.url.removeprefix("sqlite://")
    with contextlib.closing(sqlite3.connect(path)) as store, store:
        store.execute("UPDATE objects SET value = '{' WHERE kind = 'Secret'")
    session1 = racks.tors["tor1"].session("n1")
    node.agent.end()
    node.start()
    eventually(lambda: node.established(*(address for address, _ in TORS.values())))
    log = node.directory / "agent.log"
    eventually(lambda: "Secret bgp not read, what was used stands" in log.read_text())
    assert node.established(*(address for address, _ in TORS.values()))
    assert racks.tors["tor1"].session("n1") == session1
    assert racks.tors["tor2"].session("n1") == session

    text = node.logs() + str(node.status())
    assert "first-tor2" not in text
    assert base64.b64encode(b"first-tor2").decode() not in (
        (node.run_dir / f"{node.engine}.log").read_text()
        + (node.directory / "agent.log").read_text()
    )
    assert (node.run_dir / f"{node.engine}.conf").stat().st_mode & 0o777 == 0o600

    # a node that has left has none of them, nor what was being written when somebody killed it
    for name in ("bird.check", "bgp.passwords.new"):
        (node.run_dir / name).write_text("first-tor2")
    leave(node.run_dir)
    assert node.agent.wait() == 0
    spelt = {b"first-tor2", base64.b64encode(b"first-tor2")}
    files = [path for path in node.run_dir.iterdir() if path.is_file()]
    assert [path for path in files for word in spelt if word in path.read_bytes()] == []


def test_a_wrong_password_makes_no_session_and_is_named(racks: Racks) -> None:
    """Wrong, missing there, missing here; and TTL security at one end. As the kernel counts."""
    node, store, tor = racks.node, racks.world.store, racks.tors["tor1"]
    address = TORS["tor1"][0]

    def info() -> str:
        return peer.info if (peer := node.peer(address)) else ""

    racks.world.secret("bgp", tor1="wrong", tor2="first-tor2")
    node.start()
    eventually(lambda: node.established(TORS["tor2"][0]))
    another = "packets signed with another TCP-MD5 password come to this node and are dropped"
    eventually(lambda: info() == f"no answer from {address}; {another}")
    peer = node.peer(address)
    assert peer
    assert peer.state != "Established"

    plain = {"peerIP": address, "asNumber": 65001, "sourceAddress": "None"}
    store.put("BGPPeer", "tor1", **plain)
    eventually(lambda: "packets with a TCP-MD5 signature come to this node" in info())

    tor.configure(configuration("tor1", "x").replace('password "x";', ""))
    eventually(lambda: node.established(address))
    store.put("BGPPeer", "tor1", **plain, ttlSecurity=1)
    eventually(lambda: "packets with a lower TTL than ttlSecurity allows" in info())


def test_a_signature_that_is_missing_is_named_when_it_rose_lately(tmp_path: Path) -> None:
    path = tmp_path / "netstat"

    def counted(failures: int, missing: int) -> None:
        names = "TcpExt: SyncookiesSent TCPMD5NotFound TCPMD5Failure"
        path.write_text(f"{names}\nTcpExt: 1 {missing} {failures}\nIpExt: A\nIpExt: 1\n")

    local, peer = (parse_net(text) for text in TORS["tor1"])
    secret = Neighbor(peer, local, 65001, 64512, 1, password=b"x")
    counted(5, 7)
    drops = Drops(path)
    drops.look(1)
    assert drops.why(secret, 1) == ""  # of a time before us
    counted(5, 8)
    drops.look(100)
    assert "without a TCP-MD5 signature" in drops.why(secret, 101)
    assert drops.why(replace(secret, password=b""), 101) == ""
    assert drops.why(secret, 300) == ""
    path.unlink()
    drops.look(301)  # a kernel that doesn't count
    assert Drops(path).why(secret, 301) == ""
