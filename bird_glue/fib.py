"""What of it goes to the kernel: learned routes and blackholes of own blocks, protocol 179.

``ip route show proto 179`` is ours; nothing else is ever touched. Learned routes have a
metric (1024 unless BGPConfiguration says otherwise), so that a connected, static or pod
route to the same prefix always wins over them.

Where BIRD is the engine it writes the learned routes, as protocol ``bird`` (12; it knows no
other), with the same metric. Those of us it is given by changing their protocol in place, so
it finds them as its own; and those that it leaves behind are taken back in the same way.

After a start, and until all peers have told their routes, what an earlier run left in the
kernel is kept (``holding``): none is deleted, and none replaced by one that merely knows fewer
of the same ways. So neither our restart nor ExaBGP's moves a packet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet

from api.net import V4, V6, Net
from bird_glue.nexthops import Topology
from bird_glue.pools import Pools
from bird_glue.rib import Selection
from kernel.netlink import NetlinkSocket
from kernel.routes import PROTO_BGP, PROTO_BIRD, Hop, Route, RouteKey, Routes
from reconcile.backoff import Backoff
from reconcile.plan import Plan

_log = logging.getLogger(__name__)

_RETRY_FIRST = 0.5
_RETRY_LONGEST = 30.0
_LEFT_SECONDS = 60.0  # for BIRD to write a route with another metric


def plan_routes(
    wanted: Mapping[RouteKey, Route],
    actual: Mapping[RouteKey, Route],
    keys: Iterable[RouteKey],
    *,
    holding: Callable[[Route], bool] | None = None,
    withdrawn: AbstractSet[RouteKey] = frozenset(),
) -> Plan[RouteKey, Route]:
    """The steps for ``keys``.

    ``holding``, when given, keeps what is there if it knows at least as many ways, all of
    which lead somewhere (which is what it is asked); and it deletes nothing. But what was
    ``withdrawn`` since, or a way of it, is not kept.
    """
    plan: Plan[RouteKey, Route] = Plan()
    for key in keys:
        new, old = wanted.get(key), actual.get(key)
        if new is not None and old is None:
            plan.create[key] = new
        elif new is not None and old is not None and new != old:
            fewer = new.kind == old.kind and set(new.hops) < set(old.hops)
            if not (holding and fewer and key not in withdrawn and holding(old)):
                plan.update[key] = new
        elif new is None and old is not None and (holding is None or key in withdrawn):
            plan.delete[key] = old
    return plan


def learned_route(net: Net, hops: tuple[Hop, ...], metric: int) -> Route:
    """``ip route add NET proto 179 metric METRIC nexthop …``."""
    return Route(net, hops, protocol=PROTO_BGP, metric=metric)


def blackhole(block: Net, metric: int) -> Route:
    """``ip route add blackhole BLOCK proto 179 metric METRIC``: no default route for free ones."""
    return Route(block, kind="blackhole", protocol=PROTO_BGP, metric=metric)


class Fib:
    """The kernel's routes of protocol 179, and what they should be."""

    def __init__(self, netlink: NetlinkSocket) -> None:
        self._routes = Routes(netlink)
        self._wanted: dict[Net, Route] = {}
        self._static: dict[Net, Route] = {}
        self._actual: dict[RouteKey, Route] = {}
        self._dirty: dict[RouteKey, None] = {}  # in the order in which they came
        self._withdrawn: set[RouteKey] = set()  # while earlier routes are held: ours that ended
        self._backoff: Backoff[RouteKey] = Backoff(_RETRY_FIRST, _RETRY_LONGEST)
        self._errors: dict[RouteKey, str] = {}
        self._metrics: Mapping[int, int] = {V4: 0, V6: 0}
        self._pools = Pools()
        self._topology = Topology()
        self._given = False  # BIRD writes what is learned
        self._adopting = False  # routes that BIRD has left are ours
        self._fresh = True  # neither has been said yet
        # of routes that BIRD wrote before it was told of another metric: IP version, metric
        self._former: set[tuple[int, int]] = set()
        self._left: dict[RouteKey, Route] = {}  # those
        self._left_until: float | None = None
        self.holding = True
        self.unread = True

    def give(self, former: Iterable[tuple[int, int]] = ()) -> None:
        """BIRD writes what is learned, from here on, and has what is there already.

        ``former``: IP version and metric of what it wrote for an earlier agent.
        """
        if not self._given:
            self._former.update(former)
            self.unread |= bool(self._former)
            self._given, self._adopting, self.holding = True, False, False
            self._fresh = False
            self._mark(self._wanted.values())
            self._wanted.clear()
            self._dirty |= dict.fromkeys(self._actual)

    def take_back(self) -> None:
        """BIRD has ended: what it left is ours, and held until peers have told their routes.

        ``unread``: the kernel has to be read for that.
        """
        if self._given or self._fresh:
            self._given, self._adopting, self.holding = False, True, True
            self._fresh = False
            self.unread = True

    def owns(self, route: Route) -> bool:
        """Whether a route of the kernel is one that BGP on this node has put there."""
        if route.protocol == PROTO_BIRD:
            return (self._given or self._adopting) and self._has_metric(route)
        return route.protocol == PROTO_BGP

    @property
    def bird_metrics(self) -> frozenset[int]:
        """The metrics of what BIRD writes for us; empty while it doesn't."""
        return frozenset(self._metrics.values() if self._given else ())

    def _has_metric(self, route: Route) -> bool:
        version, metric = route.net.version, route.metric
        return metric == self._metrics[version] or (version, metric) in self._former

    @property
    def errors(self) -> Mapping[RouteKey, str]:
        """What the kernel refused, and why."""
        return self._errors

    def installed(self, net: Net) -> bool:
        """Whether the kernel has the learned route to a prefix as it should be."""
        route = self._wanted.get(net)
        return route is not None and self._actual.get(route.key) == route

    def configure(
        self,
        *,
        pools: Pools,
        metrics: Mapping[int, int],
        blocks: Iterable[Net],
        ways: Mapping[Net, tuple[Hop, ...]],
        selected: Mapping[Net, Selection],
    ) -> None:
        """Settings changed. ``blocks``: those of this node; ``ways``: to peers that are reached
        by a gateway of their own. What is learned is worked out anew where it has to be.
        """
        self._mark(self._static.values())
        self._static = {
            block: blackhole(block, metrics[block.version]) for block in blocks if not block.is_host
        } | {net: learned_route(net, hops, metrics[net.version]) for net, hops in ways.items()}
        self._mark(self._static.values())
        if (pools, metrics) != (self._pools, self._metrics):
            if self._given and metrics != self._metrics:
                self._former.update(self._metrics.items())
                self.unread = True
            self._pools = pools
            self._metrics = metrics
            self._mark(self._wanted.values())
            self._wanted.clear()
        missing = selected.keys() - self._wanted.keys()
        self.learned({net: selected[net] for net in missing})

    def set_topology(self, topology: Topology) -> None:
        """How gateways are reached."""
        self._topology = topology

    def learned(self, changes: Mapping[Net, Selection | None]) -> None:
        """Prefixes whose selection changed."""
        ways: dict[tuple[int, tuple[Hop, ...]], Route] = {}  # many prefixes share one
        for net, selection in changes.items():
            old = self._wanted.pop(net, None)
            if old is not None:
                self._dirty[key := old.key] = None
                if self.holding:
                    self._withdrawn.add(key)
            if selection is not None and not self._given and self._pools.programs(net):
                way = ways.get((net.version, selection.hops))
                if way is None:
                    way = learned_route(net, selection.hops, self._metrics[net.version])
                    ways[net.version, selection.hops] = way
                route = self._wanted[net] = way.to(net)
                self._dirty[key := route.key] = None
                if self.holding and (old is None or set(old.hops) <= set(route.hops)):
                    self._withdrawn.discard(key)

    def release(self) -> None:
        """Stop holding on to what an earlier run left."""
        if self.holding:
            self.holding = False
            self._adopting = False
            self._dirty |= dict.fromkeys(self._actual)

    def read(self) -> None:
        """See what the kernel has. Raises OSError."""
        self._actual = {}
        for version in (V4, V6):
            self._actual |= self._routes.read(version=version, protocol=PROTO_BGP)
            if self._adopting:
                left = self._routes.read(version=version, protocol=PROTO_BIRD)
                self._actual |= {k: route for k, route in left.items() if self._has_metric(route)}
        self.unread = False
        if self._given:
            self._read_left()
        self._dirty |= dict.fromkeys(self._actual)
        self._mark(self._wanted.values())
        self._mark(self._static.values())

    def apply(self, now: float) -> None:
        """Bring the kernel to what it should be. What it refuses is tried again later."""
        if self._given and self._former:
            self._remove_left(now)
        keys = (self._dirty | dict.fromkeys(self._backoff.due(now))).keys()
        self._dirty = {}
        if not keys:
            return
        wanted = {key: route for key in keys if (route := self._should_be(key)) is not None}
        if self._given:
            wanted |= self._for_bird(keys - wanted.keys())
        holding = self._leads_somewhere if self.holding else None
        plan = plan_routes(wanted, self._actual, keys, holding=holding, withdrawn=self._withdrawn)
        if not self.holding:
            self._withdrawn.clear()
        failed = self._routes.apply(plan) if plan else {}
        for key in (self._errors.keys() & keys) - failed.keys():
            self._backoff.succeeded(key)
            del self._errors[key]
        self._remember(plan, failed)
        for key, error in failed.items():
            self._backoff.failed(key, now)
            if self._errors.get(key) != str(error):
                _log.warning("route not programmed: %s", error)
            self._errors[key] = str(error)

    def _read_left(self) -> None:
        """See which routes of BIRD have a metric that it is not to use any more."""
        self._former.difference_update(self._metrics.items())
        self._left = {}
        for version in {version for version, _ in self._former}:
            found = self._routes.read(version=version, protocol=PROTO_BIRD)
            left = {k: r for k, r in found.items() if (version, r.metric) in self._former}
            written = {r.net for r in found.values() if r.metric == self._metrics[version]}
            replaced = {k: r for k, r in left.items() if r.net in written}
            if replaced:
                self._routes.apply(Plan(delete=replaced))
            self._left |= {k: r for k, r in left.items() if k not in replaced}
        if not self._left:
            self._former.clear()
            self._left_until = None

    def _remove_left(self, now: float) -> None:
        """What BIRD has not written anew is to go as well, in time."""
        self._left_until = self._left_until or now + _LEFT_SECONDS
        if now >= self._left_until:
            self._routes.apply(Plan(delete=self._left))
        self.unread = True  # until there is nothing left

    def clear(self) -> None:
        """Remove all that is ours."""
        self._wanted.clear()
        self._static.clear()
        self._adopting = self._adopting or self._given
        self._given = self.holding = False
        self.read()
        self.apply(0.0)

    def _for_bird(self, keys: Iterable[RouteKey]) -> dict[RouteKey, Route]:
        """Routes that were learned before BIRD writes them, with its protocol."""
        found = {key: self._actual[key] for key in keys if key in self._actual}
        return {
            key: route._replace(protocol=PROTO_BIRD)
            for key, route in found.items()
            if route.kind == "unicast"
        }

    def _leads_somewhere(self, route: Route) -> bool:
        """Whether all gateways are on connected subnets with a carrier."""
        version = route.net.version
        gateways = [hop.next_hop(version) for hop in route.hops]
        found = [self._topology.resolve(gateway) for gateway in gateways if gateway is not None]
        return all(resolution is not None and resolution.direct for resolution in found)

    def next_retry(self) -> float | None:
        """When ``apply`` has something to try again."""
        return self._backoff.next_due()

    def _should_be(self, key: RouteKey) -> Route | None:
        """The route that has the key."""
        route = self._static.get(key.net)
        if route is None or route.metric != key.metric or route.table != key.table:
            route = self._wanted.get(key.net)
            if route is None or route.metric != key.metric or route.table != key.table:
                return None
        return route

    def _remember(self, plan: Plan[RouteKey, Route], failed: Mapping[RouteKey, OSError]) -> None:
        for done in (plan.create, plan.update):
            for key, route in done.items():
                if key in failed:
                    continue
                if route.protocol == PROTO_BIRD:
                    self._actual.pop(key, None)  # BIRD's from here on
                else:
                    self._actual[key] = route
        for key in plan.delete:
            if key not in failed:
                self._actual.pop(key, None)

    def _mark(self, routes: Iterable[Route]) -> None:
        self._dirty |= dict.fromkeys(route.key for route in routes)
