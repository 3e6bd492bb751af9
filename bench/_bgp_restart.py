"""Packets lost while parts of a node's BGP are killed or renewed, and how long a dead node hurts.

A pod on a node, a host beyond a top-of-rack router (BIRD, eBGP): echo and answer take the
announced block one way and the learned route the other, 200 times a second.
"""

from __future__ import annotations

import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench._bgp_fabric import (
    LONGEST,
    PROTO_BIRD,
    ROUTERS,
    Cluster,
    KernelEye,
    Machine,
    block,
    fabric,
)
from bird_glue.engine import BIRD, EXABGP
from bird_glue.process import Bird as BirdDaemon
from bird_glue.process import Daemon, ExaBgp
from kernel.routes import PROTO_BGP
from tests.bird_glue.world import BIRD_COMMON, BIRD_SESSION, Ping, World, world
from tests.support.netns import eventually

BLOCK, POD, OUTSIDE = "10.1.0.0/26", "10.1.0.5", "192.0.2.9"
TOR, NODE = "172.31.1.1", "172.31.1.11"
DEATHS = 3
DAEMONS: dict[str, type[Daemon]] = {EXABGP: ExaBgp, BIRD: BirdDaemon}
PROTOCOLS = {EXABGP: PROTO_BGP, BIRD: PROTO_BIRD}
_SETTLE = 5.0


def restarts() -> dict[str, float]:
    """Lost packets, by what was killed and in sum, on both engines."""
    lost: dict[str, float] = {}
    for engine in (EXABGP, BIRD):
        with tempfile.TemporaryDirectory(prefix="manx-bgp-") as name, world(Path(name)) as made:
            rack = _Rack(made, engine)
            for what, act in rack.accidents().items():
                lost[f"restart_lost_{engine}_{what}"] = rack.lost_while(act)
    return {"restart_lost_packets": sum(lost.values()), **lost}


class _Rack:
    """A node with a pod, its router, and a host beyond."""

    def __init__(self, made: World, engine: str) -> None:
        self._daemon = DAEMONS[engine]
        node, tor, outside = made.rack(NODE, TOR, OUTSIDE)
        self._node, self._tor, self._outside = node, tor, outside
        made.pod(node, "pod", POD)
        made.store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False, asNumber=64512)
        made.store.put("IPPool", "plain", cidr="10.1.0.0/16")
        made.store.put("BGPPeer", "tor", peerIP=TOR, asNumber=65001)
        made.store.node("n1", f"{NODE}/24")
        made.store.block("n1", BLOCK)
        session = BIRD_SESSION.format(
            name="n1", local=TOR, asn=65001, peer=NODE, peer_asn=64512, export="all"
        )
        tor.start(BIRD_COMMON.format(router_id=TOR) + session)
        self._start: Callable[[], None] = lambda: node.start(MANX_BGP_ENGINE=engine)
        self._start()
        self._settle()

    def accidents(self) -> dict[str, Callable[[], None]]:
        """What may happen to it."""
        return {
            "engine": self._kill_engine,
            "agent": lambda: self._renew_agent(signal.SIGKILL),
            "both": self._kill_both,
            "upgrade": lambda: self._renew_agent(signal.SIGTERM),
        }

    def lost_while(self, act: Callable[[], None]) -> int:
        """Packets that were lost from before it happens until long after all is well again."""
        with Ping(self._outside, POD) as ping:
            act()
            self._settle()
            time.sleep(_SETTLE)
        return ping.lost

    def _kill_engine(self) -> None:
        session = self._tor.session("n1")
        self._end_engine()
        eventually(lambda: self._tor.session("n1") != session)

    def _renew_agent(self, number: int) -> None:
        self._node.agent.end(number)
        self._start()

    def _kill_both(self) -> None:
        self._node.agent.end()
        self._end_engine()
        self._start()

    def _end_engine(self) -> None:
        found = self._daemon.find(self._node.run_dir)
        if found is None:
            raise RuntimeError(f"{self._daemon.name} does not run")
        found.signal(signal.SIGKILL)
        found.close()

    def _settle(self) -> None:
        eventually(lambda: self._node.established(TOR), LONGEST)
        eventually(lambda: BLOCK in self._tor.blocks(), LONGEST)
        told = "restart active"  # while it waits to hear all our routes again
        eventually(lambda: told not in self._tor.birdc("show", "protocols", "all", "n1"), LONGEST)


def dead_node() -> dict[str, float]:
    """From the moment a node of the mesh falls silent until the other's kernel forgets it."""
    seconds: dict[str, list[float]] = {EXABGP: [], BIRD: []}
    with fabric(*([router] for router in ROUTERS), []) as (one, other, keeper):
        cluster = Cluster(keeper.directory)
        for number, address in enumerate(ROUTERS):
            cluster.node(f"n{number}", address)
            cluster.block(f"n{number}", block(number))
        for _ in range(DEATHS):
            for engine, found in seconds.items():
                found.append(_die(one, other, cluster.url, engine))
        cluster.close()
    return {f"dead_node_{engine}_s": max(found) for engine, found in seconds.items()} | {
        "dead_node_s": max(max(found) for found in seconds.values()),
        "dead_node_p50_s": statistics.median([s for found in seconds.values() for s in found]),
    }


def _die(one: Machine, other: Machine, url: str, engine: str) -> float:
    protocol = PROTOCOLS[engine]
    try:
        with KernelEye(one.namespace, protocol) as eye:
            for number, machine in enumerate((one, other)):
                machine.agent(f"n{number}", url, engine)
            eye.until(1)
            time.sleep(_SETTLE)  # until BFD is up
            begun = time.monotonic()
            other.unplug()
            return eye.until(1, added=False) - begun
    finally:
        one.end()
        other.end()
        other.plug()
