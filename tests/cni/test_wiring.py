"""Wires that are made together: what hinders one is its own affair."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

from api.net import Net, parse_net
from cni.wiring import Wire, configure_all, create_all, finish_all
from kernel.links import Ends, Links
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from kernel.routes import Routes
from tests.support.netns import run

Made = tuple[int, Wire, Ends]


def wire(number: int, *addresses: str) -> Wire:
    """Of a container whose addresses are from IPAM."""
    return Wire(
        f"cali{number}",
        "eth0",
        f"02:00:00:00:00:0{number}",
        f"manx net/{number}/eth0",
        tuple(map(parse_net, addresses)),
        1500,
        exclusive=True,
    )


@pytest.fixture
def containers() -> Iterator[list[Namespace]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Namespace.create()) for _ in range(4)]


def make(host: NetlinkSocket, containers: Sequence[Namespace], *wires: Wire) -> list[Made]:
    pairs = [(container.fd, each) for container, each in zip(containers, wires, strict=False)]
    made = []
    for (netns_fd, each), ends in zip(pairs, create_all(host, pairs), strict=True):
        assert isinstance(ends, Ends)
        made.append((netns_fd, each, ends))
    return made


def leads_to(host: NetlinkSocket, address: Net) -> str:
    """The alias of the interface that packets to an address leave by."""
    route = Routes(host).lookup(address)
    return Links(host).get(route.hops[0].ifindex).alias if route else "nowhere"


def test_an_address_to_which_there_is_a_route(
    namespace: Namespace, netlink: NetlinkSocket, containers: list[Namespace]
) -> None:
    """A route of nobody's container, even one that drops all, is taken over; no other is."""
    run(namespace, "ip", "route", "add", "blackhole", "10.9.9.1/32")
    run(namespace, "ip", "-6", "route", "add", "prohibit", "fd00::1/128")
    assert configure_all(netlink, make(netlink, containers, wire(1, "10.9.9.2"))) == [None]
    wanted = [wire(2, "10.9.9.1", "fd00::1"), wire(3, "10.9.9.2"), wire(4, "10.9.9.3")]
    first, second, third = configure_all(netlink, make(netlink, containers[1:], *wanted))
    assert first is None and third is None
    assert second is not None and second.errno == errno.EADDRINUSE
    assert "cali1" in str(second)
    for address, number in (("10.9.9.1", 2), ("fd00::1", 2), ("10.9.9.2", 1), ("10.9.9.3", 4)):
        assert leads_to(netlink, parse_net(address)) == f"manx net/{number}/eth0"


def test_a_carrier_that_comes_late(netlink: NetlinkSocket, containers: list[Namespace]) -> None:
    """Who has one, and who never will, is told of before it is waited for."""
    made = make(netlink, containers, wire(1, "10.9.9.1"), wire(2, "10.9.9.2"), wire(3, "10.9.9.3"))
    assert configure_all(netlink, made) == [None] * 3
    run(containers[0], "ip", "link", "set", "eth0", "down")
    run(containers[2], "ip", "link", "del", "eth0")
    told = []

    def wait() -> None:
        run(containers[0], "ip", "link", "set", "eth0", "up")
        told.append("waits")

    for place, problem in finish_all(netlink, made, wait):
        told.append(f"{place} {problem.errno if problem else 'ready'}")
    assert [*dict.fromkeys(told)] == [f"2 {errno.ENODEV}", "1 ready", "waits", "0 ready"]
