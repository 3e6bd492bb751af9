"""A real ExaBGP that hands over as it came what is plain, and tells the rest in its own words."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from api.net import Net, parse_net
from tests.bird_glue.rawpeer import UPDATE, RawPeer, attribute, encoded, message, number, update
from tests.bird_glue.world import Node, world
from tests.support.netns import connect, eventually

OWN, ROUTER, ASN = "172.31.1.11", "172.31.1.1", 65001
END_OF_RIB = message(UPDATE, b"\0\0\0\0")
UNKNOWN = attribute(35, bytes(4), 0xC0)  # optional and transitive: nothing for us (RFC 9234)


@dataclass
class Rack:
    node: Node
    router: RawPeer

    def tell(self, *texts: str, more: bytes = b"", gone: tuple[str, ...] = ()) -> None:
        nets = [parse_net(text) for text in texts]
        withdrawn = [parse_net(text) for text in gone]
        self.router.send(update(nets, withdrawn, next_hop=ROUTER, path=(ASN,), more=more))

    def routes(self) -> set[str]:
        lines = self.node.routes("proto 179")
        return {line.split()[0] for line in lines if "blackhole" not in line}

    def remembered(self) -> list[dict[str, Any]]:
        """The UPDATEs that the relay tells whoever comes next."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            client.connect(str(self.node.run_dir / "exabgp.sock"))
            with client.makefile("rb") as reader:
                lines = iter(lambda: reader.readline().strip(), b'{"relay":"live"}')
                told = [json.loads(line) for line in lines]
        found = [line["neighbor"]["message"] for line in told if line.get("type") == "update"]
        return [said["update"] for said in found if "update" in said]


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    with world(tmp_path) as made:
        node, outside = made.node("n1"), made.host("out")
        node.engine = "exabgp"
        connect(node.namespace, "eth0", outside.namespace, "eth0", [f"{OWN}/24", f"{ROUTER}/24"])
        made.store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        made.store.put("BGPPeer", "router", peerIP=ROUTER, asNumber=ASN)
        made.store.node("n1", f"{OWN}/24")
        node.start()
        eventually(lambda: node.peer(ROUTER) is not None, 20)
        eventually(lambda: ":179 " in node.run("ss", "-tln"))
        with RawPeer(outside.namespace, ROUTER, OWN, ASN) as router:
            assert router.established.wait(10)
            yield Rack(node, router)


def test_a_route_is_the_same_whichever_way_it_is_told(rack: Rack) -> None:
    plain = {"10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/17", "10.4.0.0/16"}
    rack.tell(*plain)
    rack.router.send(END_OF_RIB)
    eventually(lambda: rack.routes() == plain)
    # one of them again, and another, in UPDATEs that ExaBGP has to understand
    rack.tell("10.1.0.0/24", "10.5.0.0/16", more=UNKNOWN + number(4, 7))
    rack.tell(gone=("10.2.0.0/24",))
    padded = bytes((17,)) + encoded([Net(4, parse_net("10.3.127.0").address, 24)])[1:]
    body = len(padded).to_bytes(2, "big") + padded + b"\0\0"
    rack.router.send(message(UPDATE, body))
    wanted = {"10.1.0.0/24", "10.4.0.0/16", "10.5.0.0/16"}
    eventually(lambda: rack.routes() == wanted)
    # while nobody listens the relay remembers, whichever way it was told
    rack.node.agent.end()
    rack.tell("10.6.0.0/16")
    rack.tell(gone=("10.4.0.0/16", "10.5.0.0/16"))

    def known() -> set[bool]:
        return {isinstance(said["attribute"], str) for said in rack.remembered()}

    eventually(lambda: len(rack.remembered()) == 2)
    assert known() == {True, False}
    rack.node.start()
    eventually(lambda: rack.routes() == {"10.1.0.0/24", "10.6.0.0/16"}, 20)
    assert not rack.router.ended.is_set()


def test_thousands_of_them_arrive_whole(rack: Rack) -> None:
    first = parse_net("10.128.0.0").address
    nets = [Net(4, first + (count << 6), 26) for count in range(5000)]
    rack.router.tell(*nets)
    rack.router.send(END_OF_RIB)
    wanted = set(map(str, nets))
    eventually(lambda: rack.routes() == wanted, 20)
    rack.router.tell(withdrawn=nets[1:])
    eventually(lambda: rack.routes() == {str(nets[0])}, 20)
