"""The routes that are used: of all that peers told, the best, and where they lead.

What is selected depends on the paths held, the topology and the settings alone, not on the
order in which they came. Next hops are resolved in two steps, so that no route ever leans
on itself: first by the kernel alone; then, for those that are not on a connected subnet, also
by BGP routes that the first step resolved (a default route learned from a top-of-rack
router, say).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from api.net import Net
from bird_glue.adj_rib_in import AdjRibIn
from bird_glue.decision import (
    Guard,
    Path,
    Session,
    Vicinity,
    cost,
    path_refusal,
    prefix_refusal,
    tie_break,
)
from bird_glue.filters import Direction, RouteFacts, evaluate
from bird_glue.nexthops import PrefixTable, Resolution, Topology, never_a_hop
from kernel.routes import Hop

NO_NEXT_HOP = "its next hop is not reachable"

Resolved = dict[Net, Resolution | None]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is used of a prefix: the best path, all that share the traffic, where it goes."""

    best: Path
    paths: tuple[Path, ...]
    hops: tuple[Hop, ...]


Decided = tuple[Selection | None, dict[Net, str] | None]


class _Usable(NamedTuple):
    """A path that may be used, its cost, and what is used where it is the only one."""

    order: tuple[int, ...]
    path: Path
    alone: Selection


class _View(NamedTuple):
    """A path, whatever the prefix: why it is refused, if it is, and how it could be used.

    ``plain``: what is used of it where it is the only one, and nothing but the prefix itself could
    be against it.
    """

    why: str
    session: Session
    resolution: Resolution | None
    usable: _Usable | None
    plain: Selection | None


class _Looked:
    """What was found of paths, each of which many prefixes share. By identity, which holds
    within a flush.
    """

    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved
        self.at: dict[int, _View] = {}


class Rib:
    """Selects from an Adj-RIB-In. ``flush`` returns what changed since the last one."""

    def __init__(self, routes: AdjRibIn) -> None:
        self._in = routes
        self._dirty: dict[Net, None] = {}  # in the order in which they came
        self._guard = Guard()
        self._vicinity = Vicinity(self._guard)
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
        if guard != old:
            self._vicinity = Vicinity(guard)
        if replace(old, blocks=guard.blocks) != guard:
            self._dirty |= dict.fromkeys(self._in.routes)
        elif changed := set(old.blocks) ^ set(guard.blocks):
            near = [net for net in self._in.routes if any(block.contains(net) for block in changed)]
            self._dirty |= dict.fromkeys(near)

    def set_topology(self, topology: Topology) -> None:
        """How next hops are reached. Every path is looked at again."""
        self._topology = topology
        self._by_kernel.clear()
        self._by_both.clear()
        self._dirty |= dict.fromkeys(self._in.routes)

    def flush(self) -> dict[Net, Selection | None]:
        """Decide anew about all prefixes that need it; None: no longer used."""
        self._dirty |= self._in.changed
        self._in.changed.clear()
        self._resolve_new_next_hops()
        looked = _Looked(self._by_kernel)
        found = {net: self._select(net, looked) for net in self._dirty}
        if self._update_support(found):
            self._resolve_again()
        if self._leans():
            looked = _Looked(self._by_both)
            found.clear()
        if len(found) < len(self._dirty):
            others = [net for net in self._dirty if net not in found]
            found.update((net, self._select(net, looked)) for net in others)
        changes: dict[Net, Selection | None] = {}
        selected = self._selected
        for net, (selection, refused) in found.items():
            if refused:
                self._refused[net] = refused
            elif self._refused:
                self._refused.pop(net, None)
            if selection != selected.get(net):
                changes[net] = selection
                if selection is None:
                    del selected[net]
                else:
                    selected[net] = selection
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

    def _update_support(self, found: Mapping[Net, Decided]) -> bool:
        """Keep the BGP routes that the kernel alone resolves; whether any changed."""
        changed = False
        for net, (selection, _) in found.items():
            hops = selection.hops if selection else None
            if hops != self._support.get(net):
                changed = True
                if hops is None:
                    self._support.pop(net)
                else:
                    self._support[net] = hops
        return changed

    def _leans(self) -> bool:
        """Whether any next hop is not where the kernel alone says."""
        return any(self._by_both[host] is not plain for host, plain in self._by_kernel.items())

    def _resolve_again(self) -> None:
        """The next hops that lean on BGP routes, now that some of those changed."""
        moved = False
        for host in self._by_both:
            resolution = self._lean(host)
            if resolution != self._by_both[host]:
                self._by_both[host] = resolution
                moved = True
        if moved:
            self._dirty |= dict.fromkeys(self._in.routes)

    def _lean(self, host: Net) -> Resolution | None:
        """As the kernel resolves it, or by a BGP route that is more specific than that."""
        plain = self._by_kernel[host]
        if (plain and plain.direct) or host in self._topology.hosts or never_a_hop(host):
            return plain
        found = self._support.match(host)
        if found is None or (plain and plain.via.length >= found[0].length):
            return plain
        return Resolution(found[1], False, found[0])

    def _select(self, net: Net, looked: _Looked) -> Decided:
        """The decision about one prefix, and why paths were refused, by peer."""
        paths = self._in.routes.get(net)
        if paths is None:
            return None, None
        near = self._vicinity.has(net)
        if len(paths) == 1 and not near:  # as it is with nearly all
            (path,) = paths.values()
            view = looked.at.get(id(path)) or self._look(path, looked)
            if view is not None and view.plain and net != path.next_hop:
                return view.plain, None
        usable: list[_Usable] = []
        refused: dict[Net, str] = {}
        for path in paths.values():
            view = looked.at.get(id(path)) or self._look(path, looked)
            if view is None:
                continue
            why = view.why
            if not why and (near or net == path.next_hop):
                why = prefix_refusal(net, path.next_hop, self._guard)
            usable_path = view.usable
            if not why and view.session.filters:
                usable_path, why = self._filtered(net, path, view)
            if not why and usable_path is None:
                why = NO_NEXT_HOP
            if why or usable_path is None:
                refused[path.peer] = why
            else:
                usable.append(usable_path)
        if not usable:
            return None, refused
        if len(usable) == 1:
            return usable[0].alone, refused
        return self._best(usable), refused

    def _best(self, usable: list[_Usable]) -> Selection:
        least = min(one.order for one in usable)
        equal = sorted(
            (one for one in usable if one.order == least),
            key=lambda one: tie_break(one.path, self._in.peers[one.path.peer].router_id),
        )
        hops = {hop for one in equal for hop in one.alone.hops}
        return Selection(equal[0].path, tuple(one.path for one in equal), _sorted(hops))

    def _look(self, path: Path, looked: _Looked) -> _View | None:
        """What holds of a path whatever the prefix; None if its peer is not wanted."""
        session = self._in.peers[path.peer].session
        if session is None:
            return None
        resolution = looked.resolved[path.next_hop]
        why = path_refusal(path, session, self._guard)
        usable = None if resolution is None else _usable(path, session, resolution)
        plain = usable.alone if usable and not why and not session.filters else None
        view = looked.at[id(path)] = _View(why, session, resolution, usable, plain)
        return view

    def _filtered(self, net: Net, path: Path, view: _View) -> tuple[_Usable | None, str]:
        """The path as the peer's BGPFilters leave it, and why they refuse it, if they do."""
        session, resolution = view.session, view.resolution
        interface = self._topology.interface(resolution.hops) if resolution else None
        facts = RouteFacts(net, path.attributes, session.external, True, interface)
        decision = evaluate(session.filters, Direction.IMPORT, facts)
        if decision.accept is False:
            return None, f"rejected by {decision.why}"
        if resolution is None:
            return None, ""
        return _usable(path._replace(attributes=decision.attributes), session, resolution), ""


def _usable(path: Path, session: Session, resolution: Resolution) -> _Usable:
    order = cost(path, external=session.external, direct=resolution.direct)
    return _Usable(order, path, Selection(path, (path,), _sorted(resolution.hops)))


def _sorted(hops: Iterable[Hop]) -> tuple[Hop, ...]:
    return tuple(sorted(set(hops), key=lambda hop: (hop.ifindex, hop.gateway or 0)))
