"""BGP: our engines beside plain BIRD 2 that does the same work, in turn, in one run."""

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
