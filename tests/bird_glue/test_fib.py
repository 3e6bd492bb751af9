"""Routes of protocol 179 in a real kernel, and what becomes of those of an earlier run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from api.net import V4, V6, Net, parse_net
from bird_glue.decision import Path
from bird_glue.fib import Fib, learned_route, plan_routes
from bird_glue.messages import Attributes
from bird_glue.nexthops import Topology
from bird_glue.pools import PoolPolicy, Pools
from bird_glue.rib import Selection
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from kernel.routes import Hop, Route
from tests.support.netns import connect, fresh_namespace, run

A, B = parse_net("10.0.0.1"), parse_net("10.0.0.2")
NET, OTHER, BLOCK = (parse_net(t) for t in ("10.50.0.0/24", "10.51.0.0/24", "10.1.0.0/26"))
SUBNET = parse_net("10.0.0.0/24")
METRICS = {V4: 1024, V6: 1024}
POOLS = Pools((PoolPolicy(parse_net("10.51.0.0/16"), exported=True, programmed=False),))


class Kernel:
    """A namespace with an interface in 10.0.0.0/24, and a Fib on it."""

    def __init__(self, namespace: Namespace, netlink: NetlinkSocket, ifindex: int) -> None:
        self.namespace = namespace
        self.netlink = netlink
        self.ifindex = ifindex

    def fib(self, *blocks: Net) -> Fib:
        fib = Fib(self.netlink)
        fib.read()
        fib.set_topology(Topology([Route(SUBNET, (Hop(self.ifindex),), protocol=2)]))
        fib.configure(pools=POOLS, metrics=METRICS, blocks=blocks, ways={}, selected={})
        return fib

    def via(self, *gateways: Net) -> Selection:
        path = Path(gateways[0], gateways[0], Attributes())
        hops = tuple(Hop(self.ifindex, gateway.address) for gateway in gateways)
        return Selection(path, (path,), hops)

    def routes(self, protocol: str = "179") -> list[str]:
        output = run(self.namespace, "ip", "-o", "route", "show", "proto", protocol).stdout
        return sorted(" ".join(line.replace("\\", " ").split()) for line in output.splitlines())

    def ip(self, *words: str) -> None:
        run(self.namespace, "ip", *words)


@pytest.fixture
def kernel(namespace: Namespace, netlink: NetlinkSocket) -> Iterator[Kernel]:
    with fresh_namespace() as other:
        addresses = ["10.0.0.100/24", "10.0.0.1/24"]
        near, _ = connect(namespace, "eth0", other, "eth0", addresses)
        yield Kernel(namespace, netlink, near.index)


VIA_A = "10.50.0.0/24 via 10.0.0.1 dev eth0 metric 1024"
VIA_BOTH = (
    "10.50.0.0/24 metric 1024 nexthop via 10.0.0.1 dev eth0 weight 1 "
    "nexthop via 10.0.0.2 dev eth0 weight 1"
)


def test_learned_routes_and_blackholes_come_and_go(kernel: Kernel) -> None:
    fib = kernel.fib(BLOCK, parse_net("10.1.0.77/32"))
    fib.release()
    fib.learned({NET: kernel.via(A, B), OTHER: kernel.via(A)})
    fib.apply(0)
    assert kernel.routes() == [VIA_BOTH, "blackhole 10.1.0.0/26 metric 1024"]
    assert fib.installed(NET)
    assert not fib.installed(OTHER)  # its pool is felix's
    fib.learned({NET: kernel.via(A)})
    fib.apply(0)
    assert VIA_A in kernel.routes()
    fib.learned({NET: None})
    fib.configure(pools=POOLS, metrics=METRICS, blocks=(), ways={}, selected={})
    fib.apply(0)
    assert kernel.routes() == []


def test_routes_of_an_earlier_run_stay_until_they_are_let_go(kernel: Kernel) -> None:
    kernel.ip("route", "add", "proto", "179", *VIA_BOTH.split())
    kernel.ip("route", "add", "10.60.0.0/24", "via", "10.0.0.1", "metric", "1024", "proto", "179")
    gone = "10.60.0.0/24 via 10.0.0.1 dev eth0 metric 1024"
    fib = kernel.fib()
    fib.apply(0)
    assert kernel.routes() == [VIA_BOTH, gone]
    fib.learned({NET: kernel.via(A)})  # the other router has not been heard yet
    fib.apply(0)
    assert kernel.routes() == [VIA_BOTH, gone]
    fib.release()
    fib.apply(0)
    assert kernel.routes() == [VIA_A]


def test_ways_of_an_earlier_run_that_lead_nowhere_are_not_kept(kernel: Kernel) -> None:
    kernel.ip("route", "add", "proto", "179", *VIA_BOTH.split())
    fib = kernel.fib()
    fib.set_topology(Topology())  # no interface has a carrier
    fib.learned({NET: kernel.via(A)})
    fib.apply(0)
    assert kernel.routes() == [VIA_A]


def test_what_others_have_is_left_alone(kernel: Kernel) -> None:
    """The same prefix with another metric may stand beside ours; the same key is theirs."""
    kernel.ip("route", "add", "10.50.0.0/24", "via", "10.0.0.9", "metric", "1024")
    kernel.ip("route", "add", "10.52.0.0/24", "via", "10.0.0.9")
    fib = kernel.fib()
    fib.release()
    other = parse_net("10.52.0.0/24")
    fib.learned({NET: kernel.via(A), other: kernel.via(A)})
    fib.apply(0)
    assert kernel.routes() == ["10.52.0.0/24 via 10.0.0.1 dev eth0 metric 1024"]
    (error,) = fib.errors.values()
    assert "10.50.0.0/24 via 10.0.0.1" in error
    assert "File exists" in error
    kernel.ip("route", "del", "10.50.0.0/24", "via", "10.0.0.9")
    due = fib.next_retry()
    assert due is not None
    fib.apply(due)
    assert VIA_A in kernel.routes()
    assert not fib.errors


def test_what_the_kernel_lost_is_put_back(kernel: Kernel) -> None:
    fib = kernel.fib()
    fib.release()
    fib.learned({NET: kernel.via(A)})
    fib.apply(0)
    kernel.ip("link", "set", "eth0", "down")  # takes its routes along without telling
    assert kernel.routes() == []
    kernel.ip("link", "set", "eth0", "up")
    fib.read()
    fib.apply(0)
    assert kernel.routes() == [VIA_A]
    fib.clear()
    assert kernel.routes() == []


def test_plan_of_an_early_moment_deletes_nothing_and_narrows_nothing() -> None:
    def route(*gateways: int) -> Route:
        return learned_route(NET, tuple(Hop(1, gateway) for gateway in gateways), 1024)

    key = route(1).key
    for new, old, changed in (
        (route(1), route(1, 2), False),
        (route(1, 3), route(1, 2), True),
        (route(1, 2), route(1), True),
        (None, route(1), False),
    ):
        wanted = {} if new is None else {key: new}
        plan = plan_routes(wanted, {key: old}, [key], holding=lambda route: True)
        assert bool(plan) == changed
        assert plan_routes(wanted, {key: old}, [key])


def test_a_way_that_ends_ends_also_while_earlier_routes_are_held(kernel: Kernel) -> None:
    """Both ways were told since the start, so one that is withdrawn is not an earlier run's."""
    fib = kernel.fib()
    fib.learned({NET: kernel.via(A, B)})
    fib.apply(0)
    assert len(kernel.routes()) == 1
    assert "nexthop" in kernel.routes()[0]
    fib.learned({NET: kernel.via(A)})
    fib.apply(0)
    assert fib.holding
    assert kernel.routes() == [VIA_A]


def test_bird_is_given_what_was_learned_and_it_is_taken_back(kernel: Kernel) -> None:
    """In place, so that at no moment a route is missing; a BIRD of somebody else keeps its own."""
    foreign = ("10.52.0.0/24", "via", "10.0.0.1", "proto", "bird", "metric", "32")
    kernel.ip("route", "add", *foreign)
    fib = kernel.fib(BLOCK)
    fib.release()
    fib.learned({NET: kernel.via(A)})
    fib.apply(0)

    fib.give()
    fib.apply(0)
    assert kernel.routes() == ["blackhole 10.1.0.0/26 metric 1024"]
    theirs = kernel.routes("bird")
    assert theirs == [VIA_A, "10.52.0.0/24 via 10.0.0.1 dev eth0 metric 32"]
    fib.learned({NET: None})  # the RIB is empty now; what BIRD has is not ours to delete
    fib.apply(0)
    assert kernel.routes("bird") == theirs

    fib.take_back()
    assert fib.unread
    fib.read()
    fib.apply(0)
    assert kernel.routes("bird") == theirs  # held, until peers have told theirs
    fib.learned({NET: kernel.via(A)})
    fib.apply(0)
    fib.release()
    fib.apply(0)
    assert kernel.routes() == [VIA_A, "blackhole 10.1.0.0/26 metric 1024"]
    assert kernel.routes("bird") == theirs[1:]

    fib.take_back()  # said again with each change of settings: there is nothing more to take
    assert not fib.holding


def test_what_bird_left_and_nobody_tells_any_more_goes(kernel: Kernel) -> None:
    kernel.ip("route", "add", str(NET), "via", "10.0.0.1", "proto", "bird", "metric", "1024")
    fib = kernel.fib()
    fib.take_back()
    fib.read()
    fib.apply(0)
    assert kernel.routes("bird") == [VIA_A]
    fib.release()
    fib.apply(0)
    assert kernel.routes("bird") == []


def test_what_bird_wrote_with_another_metric_goes_once_it_is_written_anew(kernel: Kernel) -> None:
    """Of an agent before us, say, that used another one; others' routes stay."""
    for net, metric in ((NET, "512"), (OTHER, "512"), (NET, "32")):
        words = (str(net), "via", "10.0.0.1", "proto", "bird", "metric", metric)
        kernel.ip("route", "add", *words)
    fib = kernel.fib()
    fib.give([(V4, 512), (V6, 1024)])
    fib.read()
    fib.apply(0)
    unread = fib.unread
    assert unread
    assert len(kernel.routes("bird")) == 3
    kernel.ip("route", "add", str(NET), "via", "10.0.0.1", "proto", "bird", "metric", "1024")
    fib.read()
    fib.apply(1)
    old = "10.51.0.0/24 via 10.0.0.1 dev eth0 metric 512"
    theirs = "10.50.0.0/24 via 10.0.0.1 dev eth0 metric 32"
    assert kernel.routes("bird") == [VIA_A, theirs, old]
    fib.read()
    fib.apply(100)  # it was not written anew
    fib.read()
    fib.apply(100)
    assert not fib.unread
    assert kernel.routes("bird") == [VIA_A, theirs]
