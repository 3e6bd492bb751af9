"""Dead peers are found within seconds; restarts and pauses of ours kill nobody."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.bird_glue.world import Node, World, world
from tests.support.netns import eventually

HOSTS = ("172.31.1.9", "172.31.1.10", "172.31.1.11")


# what the machine sends is kept and never goes out; its link stays up
RESTORE = ("qdisc", "del", "dev", "eth0", "root")
CUT = ("qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "8bit", "burst", "1", "limit", "1")


def mesh(made: World, count: int, engine: str = "") -> list[Node]:
    nodes = [made.node(f"n{n}") for n in range(1, count + 1)]
    made.switch("rack", *((node, f"{host}/24") for node, host in zip(nodes, HOSTS, strict=False)))
    for n, node in enumerate(nodes):
        made.store.node(node.name, f"{HOSTS[n]}/24")
        made.store.block(node.name, f"10.1.{n}.0/26")
    for node in nodes:
        node.engine = engine
        node.start()
    return nodes


def watched(node: Node, *addresses: str) -> bool:
    found = [node.peer(address) for address in addresses]
    return all(p is not None and p.state == "Established" and p.bfd[:2] == "up" for p in found)


def seen_dead(node: Node, address: str) -> float:
    """When failure detection, which runs before other processes, saw a peer dead."""
    text = (node.directory / "agent.log").read_text()
    found = re.findall(rf"{re.escape(address)}: BFD: .*; seen at (\S+)", text)
    return datetime.fromisoformat(found[-1]).timestamp()


@pytest.mark.parametrize("engine", ["exabgp", "bird"])
def test_routes_of_a_node_that_dies_are_gone(tmp_path: Path, engine: str) -> None:
    """It vanishes without a word: nothing is reset, no cable is seen to be unplugged.

    By the detector's own clock it is seen within 3 s of the cut; what follows takes as long as
    this machine is busy, but never the 90 s of a hold time.
    """
    with world(tmp_path) as made:
        one, two, three = mesh(made, 3, engine)
        eventually(lambda: watched(one, *HOSTS[1:]) and watched(two, HOSTS[0], HOSTS[2]))
        eventually(lambda: one.route_to("10.1.2.0/26") != "")
        three.run("tc", *CUT)
        cut = time.time()
        eventually(lambda: not one.route_to("10.1.2.0/26") and not two.route_to("10.1.2.0/26"))
        why = "BFD: nothing heard from the peer for 2.5 s"  # and then ExaBGP hangs up
        eventually(lambda: (peer := one.peer(HOSTS[2])) is not None and why in peer.info)
        peer = one.peer(HOSTS[2])
        assert peer
        assert peer.bfd == "down"
        assert watched(one, HOSTS[1])
        assert all(seen_dead(node, HOSTS[2]) - cut <= 3.0 for node in (one, two))
        three.run("tc", *RESTORE)
        eventually(lambda: watched(one, HOSTS[2]) and one.route_to("10.1.2.0/26") != "")
