"""BGP on a node: both engines beside plain BIRD 2, which does the same work in turn, in one run.

Plain BIRD is set as fast as it can be (``connect delay time 0``, of which it makes 1 s), with
BFD and graceful restart as ours. One BIRD with many addresses plays the other nodes.

- ``mesh``: ``mesh200_ratio_bird``, from start (of a process that has no files yet) until 5 blocks
  of each of 200 peers are in the kernel; ``mesh200_cpu_pct``, percent of a core for agent,
  ExaBGP, relay and BFD after that; ``stack_rss_mb``, sum of their resident memory, with what they
  share (Python itself) counted four times; ``stack_pss_mb`` counts it once.
- ``propagation``: ``propagation_p99_s``, from a block in the datastore of one of two nodes, or a
  static route of one of 199 BIRDs, until it is in the kernels of all its peers.
- ``routes``: ``exabgp_10k_ratio_bird``, ``bird_10k_ratio_bird``: 10,000 routes of one session, from
  the word to the peer until they are in the kernel; the median of the rounds' ratios.
  ``exabgp_10k_cpu_ms``, ``bird_engine_10k_cpu_ms``: what agent, engine and relay compute to have
  them announced and withdrawn, which others on the machine hardly change.
- ``reflector``: ``reflector_200_s``: the BIRD engine with 200 clients, 10 blocks each, from start
  until each client has all.
- ``restarts``: ``restart_lost_packets``, sum over both engines and all accidents.
- ``dead_node``: ``dead_node_s``, the worst of some deaths without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench import _bgp_mesh, _bgp_reflector, _bgp_restart

_MEASUREMENTS: Mapping[str, Callable[[], dict[str, float]]] = {
    "mesh": _bgp_mesh.mesh,
    "propagation": _bgp_mesh.propagation,
    "routes": _bgp_reflector.many_routes,
    "reflector": _bgp_reflector.reflector,
    "restarts": _bgp_restart.restarts,
    "dead_node": _bgp_restart.dead_node,
}
SECTIONS = tuple(_MEASUREMENTS)


def run(sections: Sequence[str] = SECTIONS) -> dict[str, float]:
    """Measure the sections."""
    figures: dict[str, float] = {}
    for section in sections:
        figures |= _MEASUREMENTS[section]()
    return figures
