"""A node in a mesh of 200: from start to kernel, then what it costs; how fast a route spreads."""

from __future__ import annotations

import os
import select
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench._bgp_fabric import (
    ANSWER_SECONDS,
    FIRST_TABLE,
    PROTO_BIRD,
    ROUTERS,
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
from bird_glue.detector import find as find_bfd
from bird_glue.process import ExaBgp
from kernel.routes import PROTO_BGP, parse_route

PEERS = 200
BLOCKS = 5  # of each
ROUNDS = 3
PAUSE = 3.0  # for peers to see that a node is gone
SETTLE = 15.0
STEADY = 30.0
SAMPLES = 50  # of each kind of announcement

_TICKS = os.sysconf("SC_CLK_TCK")


def mesh() -> dict[str, float]:
    """Start to kernel beside BIRD, in turn; then CPU and memory of all our processes."""
    peers = [peer_address(number) for number in range(PEERS)]
    own = _blocks(PEERS)
    ours: list[float] = []
    birds: list[float] = []
    with fabric(peers, [ROUTERS[0]]) as (others, node):
        cluster = _cluster(others, peers, ROUTERS[:1])
        others.bird(peers_configuration(peers, ROUTERS[:1], _blocks))
        configuration = node_configuration(ROUTERS[0], peers, own)
        time.sleep(PAUSE)
        figures: dict[str, float] = {}
        for turn in range(ROUNDS):
            birds.append(_learn(node, PROTO_BIRD, lambda: node.bird(configuration)))
            if turn == ROUNDS - 1:
                figures["bird_mesh200_cpu_pct"] = _steady([node.processes[-1].pid])
            _renew(node)
            ours.append(_learn(node, PROTO_BGP, lambda: node.agent("n0", cluster.url)))
            if turn == ROUNDS - 1:
                stack = _stack(node)
                figures["mesh200_cpu_pct"] = _steady(stack.values())
                figures |= _memory(stack)
            _renew(node)
        cluster.close()
    wall, bird = statistics.median(ours), statistics.median(birds)
    return {
        "mesh200_s": wall,
        "bird_mesh200_s": bird,
        "mesh200_ratio_bird": wall / bird,
        **figures,
    }


def propagation() -> dict[str, float]:
    """From the write to the datastore, or the word to BIRD, until all others' kernels have it.

    Two of our nodes and 199 BIRDs, each with a kernel table of its own. Each of ours peers
    with all; BIRDs with ours, so what a BIRD tells must reach two kernels, and what a node
    of ours tells 200.
    """
    peers = [peer_address(number) for number in range(PEERS - 1)]
    with fabric(peers, [ROUTERS[0]], [ROUTERS[1]]) as (others, *nodes):
        cluster = _cluster(others, peers, ROUTERS)
        fresh = PEERS * BLOCKS + 100  # blocks that nobody has yet
        bird = others.bird(
            peers_configuration(
                peers, ROUTERS, lambda number: [], kernel=True, extra=lambda n: [block(fresh + n)]
            )
        )
        eyes = [KernelEye(others.namespace, PROTO_BIRD)]
        eyes += [KernelEye(node.namespace, PROTO_BGP) for node in nodes]
        for number, node in enumerate(nodes):
            node.agent(f"n{number}", cluster.url)
        wait_for_sessions(bird, 2 * len(peers))
        time.sleep(SETTLE)
        delays: dict[str, list[float]] = {"node": [], "bird": []}
        tables = {(0, FIRST_TABLE + number) for number in range(len(peers))}
        for sample in range(SAMPLES):
            teller, hearer = sample % 2, 2 - sample % 2
            net = block(fresh + PEERS + sample)
            delays["node"].append(
                _spread(
                    eyes,
                    net,
                    tables | {(hearer, 254)},
                    lambda net=net, teller=teller: cluster.block(f"n{teller}", net),  # type: ignore[misc]
                )
            )
            delays["bird"].append(
                _spread(
                    eyes,
                    block(fresh + sample),
                    {(1, 254), (2, 254)},
                    lambda sample=sample: bird.ask("enable", f"x{sample}"),  # type: ignore[misc]
                )
            )
        for eye in eyes:
            eye.close()
        cluster.close()
    both = delays["node"] + delays["bird"]
    return {
        "propagation_p50_s": statistics.median(both),
        "propagation_p99_s": _p99(both),
        "propagation_from_node_p99_s": _p99(delays["node"]),
        "propagation_from_bird_p99_s": _p99(delays["bird"]),
    }


def _blocks(number: int) -> list[str]:
    """Those of a peer, or of the node itself."""
    return [block(number * BLOCKS + count) for count in range(BLOCKS)]


def _cluster(machine: Machine, peers: Sequence[str], routers: Sequence[str]) -> Cluster:
    """The mesh as objects; the routers are ours: n0, n1, and n0 has blocks."""
    cluster = Cluster(machine.directory)
    for number, address in enumerate(peers):
        cluster.node(f"p{number}", address)
    for number, address in enumerate(routers):
        cluster.node(f"n{number}", address)
    for net in _blocks(PEERS):
        cluster.block("n0", net)
    return cluster


def _learn(node: Machine, protocol: int, start: Callable[[], object]) -> float:
    """Seconds from the start until the blocks of all peers are in the kernel."""
    with KernelEye(node.namespace, protocol) as eye:
        begun = time.monotonic()
        start()
        return eye.until(PEERS * BLOCKS) - begun


def _renew(node: Machine) -> None:
    node.end()
    time.sleep(PAUSE)


def _stack(node: Machine) -> dict[str, int]:
    """Our processes on a node, by name."""
    engine = node.daemon(ExaBgp)
    bfd = find_bfd(node.run_dir)
    if engine is None or not bfd:
        raise RuntimeError(
            f"{node.run_dir}: ExaBGP is process {engine}, BFD {bfd}; both should run"
        )
    children = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
    relay = dict(zip(("relay",), map(int, children), strict=True))
    return {"agent": node.processes[-1].pid, "exabgp": engine, "bfd": bfd, **relay}


def _steady(processes: Iterable[int]) -> float:
    """Percent of a core that they take together once all is told."""
    pids = list(processes)
    time.sleep(SETTLE)
    before, start = sum(map(_cpu, pids)), time.monotonic()
    time.sleep(STEADY)
    return 100 * (sum(map(_cpu, pids)) - before) / (time.monotonic() - start)


def _cpu(process: int) -> float:
    """Seconds it has computed (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _memory(stack: dict[str, int]) -> dict[str, float]:
    """Megabytes: resident, where what several share counts each time; and proportional."""
    figures: dict[str, float] = {"stack_rss_mb": 0.0, "stack_pss_mb": 0.0}
    for name, process in stack.items():
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        fields = {words[0]: int(words[1]) / 1024 for words in map(str.split, lines)}
        figures["stack_rss_mb"] += fields["Rss:"]
        figures["stack_pss_mb"] += fields["Pss:"]
        figures[f"{name}_rss_mb"] = fields["Rss:"]
    return figures


def _spread(
    eyes: Sequence[KernelEye],
    net: str,
    wanted: set[tuple[int, int]],
    announce: Callable[[], object],
) -> float:
    """Seconds until the prefix is in all (eye, table)s."""
    missing = set(wanted)
    poll = select.poll()
    for eye in eyes:
        poll.register(eye, select.POLLIN)
    numbers = {eye.fileno(): number for number, eye in enumerate(eyes)}
    begun = time.monotonic()
    announce()
    deadline = begun + ANSWER_SECONDS
    while missing and time.monotonic() < deadline:
        for fd, _ in poll.poll(1000):
            change = eyes[numbers[fd]].next(0)
            route = parse_route(change[1]) if change and change[0] else None
            if route is not None and str(route.net) == net:
                missing.discard((numbers[fd], route.table))
    if missing:
        raise RuntimeError(f"{net} did not reach {len(missing)} kernels, {min(missing)} for one")
    return time.monotonic() - begun


def _p99(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[98]
