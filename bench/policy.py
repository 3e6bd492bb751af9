"""What policies cost: packets, changes, starting, and asking the engine.

Sections: ``nftables`` and ``iptables`` are packets between two pods of a node with no policies,
10, and 5,000 in the cluster, of which 20 select both pods; in the worst case (``_worst``) all
5,000 do. Everywhere the last policy is the one that allows. ``bare`` is the same pods on a node
without felix. ``change``: one policy of 1,000 is changed. ``start``: the agent begins with 250 pods
and 1,000 policies. ``evaluate``: verdicts of ``policy.evaluator``.

Ratios are of CPU time (``crr``: a connection opened, used and closed; ``established``: a byte each
way, or 64 KiB one way, whichever is dearer), or of delay (``first_packet``), round by round in
turn, medians.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench import _evaluate, _policy_change
from bench._policy_packets import Path as Way
from bench._policy_packets import in_turn, opened
from bench._policy_world import World, filled, place
from kernel.netns import inside

SECTIONS = ("nftables", "iptables", "change", "start", "evaluate")

_WORLDS = {
    "none": World(0, 0),
    "10": World(10, 10),
    "5000": World(5000, 20),
    "worst": World(5000, 5000),
}
_ROUNDS = {"nft": 20, "iptables": 8}
_START = World(1000, 20)
_START_PODS = 250


def run(sections: Sequence[str] = SECTIONS) -> dict[str, float]:
    """Measure the sections."""
    figures: dict[str, float] = {}
    for section in sections:
        figures |= _MEASUREMENTS[section]()
    return figures


def _packets(enforcer: str) -> dict[str, float]:
    with ExitStack() as stack:
        places = {
            name: stack.enter_context(place(world, iptables=enforcer == "iptables"))
            for name, world in _WORLDS.items()
        }
        places["bare"] = stack.enter_context(place(World(0, 0), felix=False))
        paths = stack.enter_context(opened(places))
        stack.enter_context(_on_one_cpu())
        connections, exchanges, streams, firsts = (
            in_turn(paths, measure, _ROUNDS[enforcer])
            for measure in (Way.connections, Way.exchanges, Way.stream, Way.first)
        )
    prefix = "" if enforcer == "nft" else f"{enforcer}_"
    return {
        f"{enforcer}_none_crr_us": 1e6 * statistics.median(connections["none"]),
        f"{enforcer}_10_crr_ratio": _ratio(connections, "10", "none"),
        f"{enforcer}_5000_crr_ratio": _ratio(connections, "5000", "none"),
        f"{enforcer}_5000_worst_crr_ratio": _ratio(connections, "worst", "none"),
        f"{enforcer}_none_to_bare_crr_ratio": _ratio(connections, "none", "bare"),
        f"{prefix}established_ratio": max(
            _ratio(measured, name, "none")
            for measured in (exchanges, streams)
            for name in ("5000", "worst")
        ),
        f"{prefix}first_packet_10_us": 1e6 * statistics.median(firsts["10"]),
        f"{prefix}first_packet_ratio_5000_to_10": _ratio(firsts, "5000", "10"),
        f"{prefix}first_packet_ratio_5000_worst_to_10": _ratio(firsts, "worst", "10"),
    }


def _ratio(measured: dict[str, list[float]], one: str, other: str) -> float:
    pairs = zip(measured[one], measured[other], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def _change() -> dict[str, float]:
    return _policy_change.visible() | _policy_change.cost()


def _start() -> dict[str, float]:
    """From the agent's start until all is enforced, and its memory then."""
    with filled(_START) as node, ExitStack() as stack:
        for number in range(_START_PODS):
            pod = node.pod(
                f"pod-{number}", f"10.2.0.{number + 1}", labels={"app": f"app-{number % 50}"}
            )
            stack.callback(pod.netns.close)
        with inside(node.netns.fd):
            begun = time.perf_counter()
            node.start()
            seconds = time.perf_counter() - begun
        assert node.agent is not None
        status = node.status()
        if status["errors"]:
            raise RuntimeError(f"felix: {status['errors'][0]}")
        pages = int(Path(f"/proc/{node.agent.pid}/statm").read_text().split()[1])
        return {
            "start_250_pods_1000_policies_s": seconds,
            "start_apply_ms": status["last_apply"]["milliseconds"],
            "felix_rss_mb": pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20),
        }


_MEASUREMENTS: Mapping[str, Callable[[], dict[str, float]]] = {
    "nftables": lambda: _packets("nft"),
    "iptables": lambda: _packets("iptables"),
    "change": _change,
    "start": _start,
    "evaluate": _evaluate.measure,
}


@contextlib.contextmanager
def _on_one_cpu() -> Iterator[None]:
    """This thread stays where it is, so that no packet waits for another CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
