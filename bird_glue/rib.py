"""The routes that are used: of all that peers told, the best, and where they lead.

What is selected depends on the paths held, the topology and the settings alone, not on the
order in which they came. Next hops are resolved in two steps, so that no route ever leans
on itself: first by the kernel alone; then, for those that are not on a connected subnet, also
by BGP routes that the first step resolved (a default route learned from a top-of-rack
router, say).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from api.net import Net
from bird_glue.adj_rib_in import AdjRibIn
from bird_glue.decision import Guard, Path, Session, cost, refusal, tie_break
from bird_glue.filters import Direction, RouteFacts, evaluate
from bird_glue.nexthops import PrefixTable, Resolution, Topology
from kernel.routes import Hop

NO_NEXT_HOP = "its next hop is not reachable"

Resolved = dict[Net, Resolution | None]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is used of a prefix: the best path, all that share the traffic, where it goes."""

    best: Path
    paths: tuple[Path, ...]
    hops: tuple[Hop, ...]


class Rib:
    """Selects from an Adj-RIB-In. ``flush`` returns what changed since the last one."""

    def __init__(self, routes: AdjRibIn) -> None:
        self._in = routes
        self._dirty: set[Net] = set()
        self._guard = Guard()
        self._topology = Topology()
        self._selected: dict[Net, Selection] = {}
        self._refused: dict[Net, dict[Net, str]] = {}
        self._by_kernel: Resolved = {}  # next hop -> what the kernel's routes say
        self._by_both: Resolved = {}  # next hop -> what those and BGP's say
        self._support: PrefixTable[tuple[Hop, ...]] = PrefixTable()  # BGP routes to lean on

    @property
    def selected(self) -> Mapping[Net, Selection]:
        """All that is used, as of the last flush."""
        return self._selected

    def refusals(self, peer: Net) -> dict[Net, str]:
        """The peer's prefixes that are not used, and why, as of the last flush."""
        return {net: why[peer] for net, why in self._refused.items() if peer in why}

    def set_guard(self, guard: Guard) -> None:
        """What may never be accepted. Every path that this may be about is looked at again."""
        old, self._guard = self._guard, guard
        if replace(old, blocks=guard.blocks) != guard:
            self._dirty.update(self._in.routes)
        elif changed := set(old.blocks) ^ set(guard.blocks):
            self._dirty.update(
                net for net in self._in.routes if any(block.contains(net) for block in changed)
            )

    def set_topology(self, topology: Topology) -> None:
        """How next hops are reached. Every path is looked at again."""
        self._topology = topology
        self._by_kernel.clear()
        self._by_both.clear()
        self._dirty.update(self._in.routes)

    def flush(self) -> dict[Net, Selection | None]:
        """Decide anew about all prefixes that need it; None: no longer used."""
        self._dirty |= self._in.changed
        self._in.changed.clear()
        self._resolve_new_next_hops()
        if self._update_support():
            self._resolve_again()
        changes: dict[Net, Selection | None] = {}
        for net in self._dirty:
            selection = self._select(net, self._by_both, note=True)
            if selection != self._selected.get(net):
                changes[net] = selection
                if selection is None:
                    del self._selected[net]
                else:
                    self._selected[net] = selection
        self._dirty.clear()
        return changes

    def _resolve_new_next_hops(self) -> None:
        known = self._in.next_hops
        for host in [host for host in self._by_kernel if host not in known]:
            del self._by_kernel[host], self._by_both[host]
        for host in known:
            if host not in self._by_kernel:
                self._by_kernel[host] = self._topology.resolve(host)
                self._by_both[host] = self._lean(host)

    def _update_support(self) -> bool:
        """Keep the BGP routes that the kernel alone resolves; whether any changed."""
        changed = False
        for net in self._dirty:
            selection = self._select(net, self._by_kernel)
            hops = selection.hops if selection else None
            if hops != self._support.get(net):
                changed = True
                if hops is None:
                    self._support.pop(net)
                else:
                    self._support[net] = hops
        return changed

    def _resolve_again(self) -> None:
        """The next hops that lean on BGP routes, now that some of those changed."""
        moved = False
        for host in self._by_both:
            resolution = self._lean(host)
            if resolution != self._by_both[host]:
                self._by_both[host] = resolution
                moved = True
        if moved:
            self._dirty.update(self._in.routes)

    def _lean(self, host: Net) -> Resolution | None:
        """As the kernel resolves it, or by a BGP route that is more specific than that."""
        plain = self._by_kernel[host]
        if (plain and plain.direct) or host in self._topology.hosts:
            return plain
        found = self._support.match(host)
        if found is None or (plain and plain.via.length >= found[0].length):
            return plain
        return Resolution(found[1], False, found[0])

    def _select(self, net: Net, resolved: Resolved, *, note: bool = False) -> Selection | None:
        """The decision about one prefix. ``note`` keeps why paths were refused."""
        usable: list[tuple[tuple[int, ...], Path, tuple[Hop, ...]]] = []
        refused: dict[Net, str] = {}
        for path in self._in.routes.get(net, {}).values():
            session = self._in.peers[path.peer].session
            if session is None:
                continue
            resolution = resolved[path.next_hop]
            why = refusal(net, path, session, self._guard)
            if not why and session.filters:
                path, why = self._filtered(net, path, session, resolution)
            if not why and resolution is None:
                why = NO_NEXT_HOP
            if why or resolution is None:
                refused[path.peer] = why
                continue
            order = cost(path, external=session.external, direct=resolution.direct)
            usable.append((order, path, resolution.hops))
        if note:
            self._note(net, refused)
        if not usable:
            return None
        least = min(order for order, _, _ in usable)
        equal = sorted(
            ((path, hops) for order, path, hops in usable if order == least),
            key=lambda found: tie_break(found[0], self._in.peers[found[0].peer].router_id),
        )
        hops = sorted(
            {hop for _, hops in equal for hop in hops},
            key=lambda hop: (hop.ifindex, hop.gateway or 0),
        )
        return Selection(equal[0][0], tuple(path for path, _ in equal), tuple(hops))

    def _filtered(
        self, net: Net, path: Path, session: Session, resolution: Resolution | None
    ) -> tuple[Path, str]:
        """The path as the peer's BGPFilters leave it, and why they refuse it, if they do."""
        interface = self._topology.interface(resolution.hops) if resolution else None
        facts = RouteFacts(net, path.attributes, session.external, True, interface)
        decision = evaluate(session.filters, Direction.IMPORT, facts)
        if decision.accept is False:
            return path, f"rejected by {decision.why}"
        return path._replace(attributes=decision.attributes), ""

    def _note(self, net: Net, refused: dict[Net, str]) -> None:
        if refused:
            self._refused[net] = refused
        else:
            self._refused.pop(net, None)
