"""An engine that an earlier version started, and what it left: taken over as it is, under traffic.

``released`` has what version 0.1.0 wrote for the node of these tests, and stays as it is. A change
that makes one of them fail would end the sessions of each node that is upgraded.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from api.net import parse_net
from bird_glue.config import RELAY
from bird_glue.messages import (
    Announced,
    EndOfRib,
    Hello,
    Live,
    Opened,
    Up,
    Updated,
    parse,
)
from bird_glue.process import Bird as BirdProcess
from bird_glue.process import ExaBgp
from kernel.netns import inside
from tests.bird_glue.test_engines import (
    BLOCK,
    NODE,
    OUTSIDE,
    POD,
    TOR,
    Rack,
    set_engine,
    tor_configuration,
)
from tests.bird_glue.world import Ping, world
from tests.support.netns import eventually

RELEASED = Path(__file__).with_name("released")
VARIABLES = {
    "exabgp_daemon_user": "root",
    "exabgp_daemon_drop": "false",
    "exabgp.tcp.bind": "0.0.0.0",
    "exabgp_tcp_port": "179",
    "exabgp_reactor_speed": "15",
    "exabgp_api_cli": "false",
    "exabgp_api_respawn": "false",
    "exabgp_api_terminate": "true",
    "exabgp_log_level": "INFO",
}
ANNOUNCE = f"neighbor {TOR} announce attributes next-hop self origin igp nlri {BLOCK}\n"
EOR = f"neighbor {TOR} announce eor ipv4 unicast\n"


@dataclass
class Node:
    """A node whose engine runs, without an agent."""

    rack: Rack

    @property
    def run_dir(self) -> Path:
        return self.rack.node.run_dir

    def write(self, name: str, **values: str) -> Path:
        text = (RELEASED / name).read_text()
        for word, value in {"RUN_DIR": str(self.run_dir), **values}.items():
            text = text.replace(f"@{word}@", value)
        path = self.run_dir / name
        path.write_text(text)
        return path

    def start_exabgp(self) -> None:
        relay = str(RELAY.with_name("relay.py"))  # another program than today's
        path = self.write("exabgp.conf", PYTHON=sys.executable, RELAY=relay)
        with inside(self.rack.node.namespace.fd):
            ExaBgp.start(self.run_dir, path, VARIABLES).close()
        eventually((self.run_dir / "exabgp.sock").exists)
        eventually(lambda: "Established" in self.rack.tor.birdc("show", "protocols", "n1"))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(self.run_dir / "exabgp.sock"))
            client.sendall((ANNOUNCE + EOR).encode())
            with client.makefile("rb") as answers:
                eventually(lambda: answers.readline() == b"done\n")
        route = ("ip", "route", "add", "proto", "179", "metric", "1024")
        self.rack.node.run(*route, "192.0.2.0/24", "via", TOR)
        self.rack.node.run(*route, "blackhole", BLOCK)

    def start_bird(self) -> None:
        path = self.write("bird.conf")
        self.rack.node.run(
            "ip", "route", "add", "blackhole", BLOCK, "proto", "179", "metric", "1024"
        )
        with inside(self.rack.node.namespace.fd):
            BirdProcess.start(self.run_dir, path, self.run_dir / "bird.ctl", recover=False).close()

    def relays(self) -> set[int]:
        """The process ids of what ExaBGP runs."""
        path = Path(f"/proc/{self.rack.daemon()}/task/{self.rack.daemon()}/children")
        return set(map(int, path.read_text().split()))


@pytest.fixture(params=["exabgp", "bird"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
    with world(tmp_path) as made:
        node, tor, outside = made.rack(NODE, TOR, OUTSIDE)
        pod = made.pod(node, "pod", POD)
        set_engine(made, request.param)
        made.secret("bgp", tor="secret-1")
        reject = {"action": "Reject", "matchOperator": "In"}
        made.store.put(
            "BGPFilter",
            "rack",
            importV4=[{**reject, "cidr": "10.66.0.0/16"}],
            exportV4=[{**reject, "cidr": "10.1.9.0/24"}],
        )
        made.store.put("IPPool", "plain", cidr="10.1.0.0/16")
        made.store.put("IPPool", "overlay", cidr="10.2.0.0/16", vxlanMode="Always")
        made.store.put(
            "BGPPeer",
            "tor",
            peerIP=TOR,
            asNumber=65001,
            filters=["rack"],
            password={"secretKeyRef": {"name": "bgp", "key": "tor"}},
            ttlSecurity=1,
        )
        made.store.node("n1", f"{NODE}/24")
        made.store.block("n1", BLOCK)
        tor.start(secured(tor_configuration()))
        node.run_dir.mkdir()
        found = Node(Rack(request.param, node, tor, pod, outside, made))
        {"exabgp": found.start_exabgp, "bird": found.start_bird}[request.param]()
        eventually(lambda: tor.blocks() == {BLOCK})
        eventually(lambda: found.rack.learned() != [])
        yield found


def secured(configuration: str) -> str:
    """With what the recorded configurations want of the router."""
    return configuration.replace(
        "hold time 30;", 'hold time 30; password "secret-1"; ttl security on;'
    )


def test_the_engine_of_an_earlier_version_goes_on(node: Node) -> None:
    """It is found, understood and told the configuration of today; no session ends by that."""
    rack, store = node.rack, node.rack.world.store
    started, session, relays = rack.daemon(), rack.tor.session("n1"), node.relays()
    with Ping(rack.outside, POD) as ping, Ping(rack.pod, OUTSIDE) as back:
        rack.node.start()
        rack.settle()
        store.put("BGPPeer", "another", peerIP="172.31.1.77", asNumber=65002)
        store.block("n1", "10.1.1.0/26")
        name = {"exabgp": "exabgp.conf", "bird": "bird.conf"}[rack.engine]
        eventually(lambda: "172.31.1.77" in (node.run_dir / name).read_text())
        eventually(lambda: rack.tor.blocks() == {BLOCK, "10.1.1.0/26"})
        eventually(lambda: rack.node.peer("172.31.1.77") is not None)
        rack.tor.configure(secured(tor_configuration("10.50.0.0/16", "10.66.0.0/24")))
        learned = [
            f"{net} via {TOR} dev eth0 metric 1024" for net in ("10.50.0.0/16", "192.0.2.0/24")
        ]
        eventually(lambda: rack.learned() == learned)
        rack.node.agent.end(signal.SIGTERM)
        rack.node.start()
        eventually(lambda: rack.node.established(TOR))
    assert (ping.lost, back.lost) == (0, 0)
    assert (rack.daemon(), rack.tor.session("n1"), node.relays()) == (started, session, relays)


def test_what_the_relay_of_an_earlier_version_says() -> None:
    lines = (RELEASED / "relay.jsonl").read_bytes().splitlines()
    hello, opened, up, updated, end, live = map(parse, lines)
    peer, block = parse_net(TOR), parse_net(BLOCK)
    assert isinstance(hello, Hello)
    assert dict(hello.announced) == {peer: {block}}
    assert isinstance(opened, Opened)
    assert (opened.peer, opened.asn, opened.hold_time) == (peer, 65001, 30)
    assert opened.graceful_restart is not None
    assert opened.graceful_restart.seconds == 120
    assert isinstance(up, Up)
    assert isinstance(updated, Updated)
    nets = ("192.0.2.0/24", "172.31.1.0/24")
    assert updated.announced == tuple(Announced(parse_net(net), peer) for net in nets)
    assert updated.attributes.as_path[0].asns == (65001,)
    assert end == EndOfRib(peer, sent=False, version=4)
    assert live == Live()
