"""Which changes of the kernel wake the agent: a real kernel, routes of every kind."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from api.net import Net, parse_net
from bird_glue.watch import KernelChanged, KernelWatch
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside
from kernel.routes import (
    PROTO_BGP,
    PROTO_BIRD,
    PROTO_FELIX,
    Hop,
    Route,
    route_add,
    route_delete,
)
from tests.support.netns import eventually

PROTO_STATIC = 4
LOOPBACK = 1
MARKER = parse_net("198.51.100.0/24")
NET, NET6 = parse_net("10.1.0.0/26"), parse_net("2001:db8:1::/64")
HOST, OTHER = parse_net("10.1.0.5"), parse_net("10.2.0.5")
METRICS = frozenset({1024, 512})


class Watched:
    """A namespace, and how often the watch told of a change there."""

    def __init__(self, namespace: Namespace, netlink: NetlinkSocket) -> None:
        self._netlink = netlink
        self.told = 0
        with inside(namespace.fd):
            self.watch = KernelWatch(self._note)

    def _note(self, changed: KernelChanged) -> None:
        self.watch.rearm()  # so that each change is told of
        self.told += 1

    def change(self, route: Route, *, gone: bool) -> bool:
        """Whether a change is told of. A marker says that all before it has been heard."""
        if gone:
            assert self._netlink.batch([route_add(route)]) == []
        self._mark()
        self._rest()
        before = self.told
        assert self._netlink.batch([(route_delete if gone else route_add)(route)]) == []
        self._mark()
        self._rest()
        return self.told - before > 2  # of the marker

    def _rest(self) -> None:
        """Until it says no more: the last word may come after that for the marker."""
        told = -1
        while told != self.told or select.select([self.watch._socket], [], [], 0)[0]:
            told = self.told
            time.sleep(0.1)

    def _mark(self) -> None:
        before = self.told
        marker = route(MARKER, PROTO_STATIC, 7)
        assert self._netlink.batch([route_add(marker)]) == []
        eventually(lambda: self.told > before)
        seen = self.told
        assert self._netlink.batch([route_delete(marker)]) == []
        eventually(lambda: self.told > seen)


def route(net: Net, protocol: int, metric: int) -> Route:
    return Route(net, (Hop(LOOPBACK),), protocol=protocol, metric=metric)


@contextmanager
def watched(namespace: Namespace, netlink: NetlinkSocket) -> Iterator[Watched]:
    made = Watched(namespace, netlink)
    made.watch.start()
    try:
        yield made
    finally:
        made.watch.stop()


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize(
    ("net", "protocol", "metric", "heard"),
    [
        (NET, PROTO_STATIC, 1024, (True, True)),
        (NET, PROTO_BGP, 1024, (False, True)),  # new, gone
        (NET6, PROTO_BGP, 512, (False, True)),
        (NET, PROTO_BIRD, 1024, (False, False)),
        (NET6, PROTO_BIRD, 512, (False, False)),
        (NET, PROTO_BIRD, 600, (True, True)),  # another BIRD's
        (HOST, PROTO_FELIX, 0, (False, False)),
        (OTHER, PROTO_FELIX, 0, (True, True)),
    ],
)
def test_what_is_heard(
    namespace: Namespace,
    netlink: NetlinkSocket,
    net: Net,
    protocol: int,
    metric: int,
    heard: tuple[bool, bool],
    gone: bool,
) -> None:
    with watched(namespace, netlink) as made:
        made.watch.blocks = (NET,)
        made.watch.bird_metrics = METRICS
        assert made.change(route(net, protocol, metric), gone=gone) == heard[gone]


def test_all_of_bird_is_heard_while_it_does_not_run(
    namespace: Namespace, netlink: NetlinkSocket
) -> None:
    with watched(namespace, netlink) as made:
        assert made.change(route(NET, PROTO_BIRD, 1024), gone=False)
        made.watch.bird_metrics = METRICS
        made.watch.bird_metrics = frozenset()
        assert made.change(route(NET6, PROTO_BIRD, 1024), gone=False)


def test_what_this_program_does_is_not_heard(namespace: Namespace, netlink: NetlinkSocket) -> None:
    """It knows; reading thousands of routes again because it deleted some would be for nothing."""
    with watched(namespace, netlink) as made, NetlinkSocket(netns_fd=namespace.fd) as own:
        told: list[KernelChanged] = []
        with inside(namespace.fd):
            deaf = KernelWatch(told.append, own.port)
        deaf.start()
        try:
            assert own.batch([route_add(route(NET, PROTO_BGP, 1024))]) == []
            assert made.change(route(HOST, PROTO_STATIC, 1024), gone=False)
            eventually(lambda: told != [])
            deaf.rearm()
            told.clear()
            before = made.told
            assert own.batch([route_delete(route(NET, PROTO_BGP, 1024))]) == []
            eventually(lambda: made.told > before)
        finally:
            deaf.stop()
        assert told == []
