"""Routes to peers that only a gateway of their own leads to; see ``reachableBy``."""

from __future__ import annotations

from api.errors import Problem
from api.net import Net, format_address
from bird_glue.nexthops import Topology
from bird_glue.sessions import Sessions
from bird_glue.settings import ObjectProblem
from kernel.routes import Hop

GOODBYE_SECONDS = 5.0  # for a peer that goes to hear that our routes are withdrawn


class Ways:
    """``known`` is by peer. The way to one that goes is kept for it to hear of that."""

    def __init__(self) -> None:
        self.known: dict[Net, tuple[Hop, ...]] = {}
        # by peer: where it is, and until when that is kept, once it isn't wanted any more
        self._old: dict[Net, tuple[tuple[Hop, ...], float | None]] = {}

    def update(self, sessions: Sessions, topology: Topology, now: float) -> list[ObjectProblem]:
        """Work them out anew. Returns what is wrong with gateways."""
        problems = []
        found: dict[Net, tuple[Hop, ...]] = {}
        for peer, gateway in sessions.ways.items():
            resolution = topology.resolve(gateway)
            if resolution is not None and resolution.direct:
                found[peer] = resolution.hops
            else:
                text = format_address(*gateway[:2])
                problem = Problem("spec.reachableBy", text, "an address on a connected subnet")
                problems.append(ObjectProblem(*sessions.peers[peer].owner, problem))
        for peer, (hops, until) in tuple(self._old.items()):
            if peer in found or (until is not None and until <= now):
                del self._old[peer]
            else:
                found[peer] = hops
                self._old[peer] = (hops, until or now + GOODBYE_SECONDS)
        for peer in sessions.ways.keys() & found.keys():
            self._old[peer] = (found[peer], None)
        self.known = found
        return problems

    def ends(self) -> list[float]:
        """When ways to peers that are not wanted any more may go."""
        return [until for _, until in self._old.values() if until is not None]
