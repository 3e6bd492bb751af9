"""10,000 routes from one reflector to the kernel; and being the reflector of 200 clients."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from functools import partial

from bench._bgp_fabric import (
    LONGEST,
    PROTO_BIRD,
    ROUTERS,
    Bird,
    Cluster,
    KernelEye,
    Machine,
    block,
    fabric,
    node_configuration,
    peer_address,
    peers_configuration,
    wait_for_sessions,
)
from bird_glue.engine import BIRD, EXABGP
from kernel.routes import PROTO_BGP

ROUTES = 10_000
ROUNDS = 6
TURNS = 4  # of announcing and withdrawing in a round
SETTLE = 2.0
CLIENTS = 200
CLIENT_BLOCKS = 10
OWN = [block(1 << 17)]
_REFLECTOR_ROUNDS = 2


def many_routes() -> dict[str, float]:
    """Packed routes of one peer: from the word to it until the kernel has them, and no longer.

    A ratio is the median of those of the rounds, as the machine's speed changes from one to the
    next by more than the sides differ.
    """
    rounds: list[dict[str, float]] = []
    peer = peer_address(0)
    with fabric([peer], [ROUTERS[0]]) as (other, node):
        cluster = Cluster(other.directory)
        cluster.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False, asNumber=64512)
        cluster.put("BGPPeer", "reflector", peerIP=peer, asNumber=64512)
        cluster.node("n0", ROUTERS[0])
        cluster.block("n0", OWN[0])
        bird = other.bird(
            peers_configuration(
                [peer], ROUTERS[:1], lambda _: [], extra=lambda _: [block(n) for n in range(ROUTES)]
            )
        )
        configuration = node_configuration(ROUTERS[0], [peer], OWN)
        sides: dict[str, tuple[int, Callable[[], object]]] = {
            "plain_bird": (PROTO_BIRD, partial(node.bird, configuration)),
            "exabgp": (PROTO_BGP, partial(node.agent, "n0", cluster.url, EXABGP)),
            "bird_engine": (PROTO_BIRD, partial(node.agent, "n0", cluster.url, BIRD)),
        }
        for _ in range(ROUNDS):
            found: dict[str, float] = {}
            for name, (protocol, start) in sides.items():
                start()
                wait_for_sessions(bird, 1)
                time.sleep(SETTLE)
                for what, seconds in _turns(node, protocol, bird).items():
                    found[f"{name}_10k_{what}"] = statistics.median(seconds)
                node.end()
                time.sleep(SETTLE)
            rounds.append(found)
        cluster.close()

    def median(name: str, other: str = "") -> float:
        return statistics.median(each[name] / (each[other] if other else 1) for each in rounds)

    return {
        "exabgp_10k_s": median("exabgp_10k_enable"),
        "bird_engine_10k_s": median("bird_engine_10k_enable"),
        "plain_bird_10k_s": median("plain_bird_10k_enable"),
        "exabgp_10k_ratio_bird": median("exabgp_10k_enable", "plain_bird_10k_enable"),
        "bird_10k_ratio_bird": median("bird_engine_10k_enable", "plain_bird_10k_enable"),
        "exabgp_10k_withdraw_ratio_bird": median("exabgp_10k_disable", "plain_bird_10k_disable"),
        "bird_10k_withdraw_ratio_bird": median("bird_engine_10k_disable", "plain_bird_10k_disable"),
        "exabgp_10k_cpu_ms": 1000 * median("exabgp_10k_cpu"),
        "bird_engine_10k_cpu_ms": 1000 * median("bird_engine_10k_cpu"),
        "plain_bird_10k_cpu_ms": 1000 * median("plain_bird_10k_cpu"),
    }


def _turns(node: Machine, protocol: int, bird: Bird) -> dict[str, list[float]]:
    """Seconds until all routes came and went, and of CPU for both, of some turns."""
    found: dict[str, list[float]] = {"enable": [], "disable": [], "cpu": []}
    for _ in range(TURNS):
        before = node.computed()
        for verb in ("enable", "disable"):
            found[verb].append(_move(node, protocol, bird, verb))
        found["cpu"].append(node.computed() - before)
    return found


def reflector() -> dict[str, float]:
    """From the start of a reflector until each of 200 clients has the blocks of all others."""
    clients = [peer_address(number) for number in range(CLIENTS)]
    with fabric(clients, [ROUTERS[0]]) as (others, node):
        cluster = Cluster(others.directory)
        cluster.node("n0", ROUTERS[0], routeReflectorClusterID="1.0.0.1")
        for number, address in enumerate(clients):
            cluster.node(f"p{number}", address)
        cluster.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False, asNumber=64512)
        cluster.put("BGPPeer", "reflector", nodeSelector="all()", peerIP=ROUTERS[0], asNumber=64512)
        others_configuration = peers_configuration(clients, ROUTERS[:1], _client_blocks)
        configuration = node_configuration(ROUTERS[0], clients, [], reflects=True)
        sides: dict[str, Callable[[], object]] = {
            "bird": partial(node.bird, configuration),
            "manx": partial(node.agent, "n0", cluster.url, BIRD),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(_REFLECTOR_ROUNDS):
            for name, start in sides.items():
                bird = others.bird(others_configuration)
                _wait_for_routes(bird, CLIENTS * CLIENT_BLOCKS)
                times[name].append(_reflect(bird, start))
                node.end()
                others.end()  # it would keep for minutes what the reflector said
        cluster.close()
    return {
        "reflector_200_s": statistics.median(times["manx"]),
        "plain_bird_reflector_200_s": statistics.median(times["bird"]),
    }


def _move(node: Machine, protocol: int, bird: Bird, verb: str) -> float:
    """Seconds until all routes came (``enable``) or went (``disable``)."""
    with KernelEye(node.namespace, protocol) as eye:
        begun = time.monotonic()
        bird.ask(verb, "x0")
        return eye.until(ROUTES, added=verb == "enable") - begun


def _client_blocks(number: int) -> list[str]:
    return [block(number * CLIENT_BLOCKS + count) for count in range(CLIENT_BLOCKS)]


def _reflect(bird: Bird, start: Callable[[], object]) -> float:
    begun = time.monotonic()
    start()
    return _wait_for_routes(bird, CLIENTS * CLIENTS * CLIENT_BLOCKS) - begun


def _wait_for_routes(bird: Bird, number: int) -> float:
    """Until the tables of a BIRD have so many routes; when that was, to a tenth of a second.

    Looking takes a while: it has to count them all.
    """
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        found = re.search(
            r"^Total: (\d+) of", bird.ask("show", "route", "table", "all", "count"), re.MULTILINE
        )
        now = time.monotonic()
        if found and int(found[1]) == number:
            return now
        time.sleep(0.1)
    raise RuntimeError(f"{found and found[1]} routes after {LONGEST:g} s, expected {number}")
