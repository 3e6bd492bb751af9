"""Deleting interfaces: who waits for one hears that it is gone when it is, and no later."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from api.net import parse_net
from cni import wiring
from cni.reaper import DELETERS, Reaper
from cni.wiring import Sockets
from kernel.addresses import Address, Addresses, address_add
from kernel.links import Links, link_up, parse_ends, veth
from kernel.netlink import Failure, Message, NetlinkSocket
from kernel.netns import Namespace, inside
from kernel.routes import PROTO_FELIX, SCOPE_LINK, Hop, Route, Routes, route_add

MANY = 3 * DELETERS


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace.create() as namespace, inside(namespace.fd):
        yield namespace


@pytest.fixture
def netlink(namespace: Namespace) -> Iterator[NetlinkSocket]:
    with NetlinkSocket() as netlink:
        yield netlink


class Withheld:
    """Sockets on which the kernel's answer to deletions is not heard before ``let_go``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._answered = threading.Event()
        self.conversations = 0
        answered, noted = self._answered, self

        class Socket(NetlinkSocket):
            def batch(self, messages: Sequence[Message]) -> list[Failure]:
                noted.conversations += 1
                failures = super().batch(messages)
                assert answered.wait(20)
                return failures

        monkeypatch.setattr(wiring, "NetlinkSocket", Socket)

    def let_go(self) -> None:
        self._answered.set()


@pytest.fixture
def withheld(monkeypatch: pytest.MonkeyPatch) -> Withheld:
    return Withheld(monkeypatch)


@pytest.fixture
def sockets(namespace: Namespace) -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.close()


@pytest.fixture
def running(sockets: Sockets) -> Iterator[Reaper]:
    reaper = Reaper(sockets)
    reaper.start()
    yield reaper
    reaper.stop()


def make(netlink: NetlinkSocket, number: int) -> int:
    return parse_ends(netlink.request(veth(f"one{number}", f"two{number}"))).index


def remove_side_by_side(running: Reaper, indexes: Sequence[int]) -> list[threading.Thread]:
    threads = [threading.Thread(target=running.remove, args=(index,)) for index in indexes]
    for thread in threads:
        thread.start()
    return threads


def test_one_is_gone_before_the_kernel_has_freed_it(
    withheld: Withheld, running: Reaper, netlink: NetlinkSocket
) -> None:
    """And the next may be deleted meanwhile, and one of the same name made."""
    for _ in range(DELETERS):
        running.remove(make(netlink, 0))
        assert Links(netlink).read().keys() == {"lo"}
    assert withheld.conversations == DELETERS
    withheld.let_go()


def test_the_far_end_is_gone_with_it(
    withheld: Withheld, running: Reaper, netlink: NetlinkSocket
) -> None:
    far = parse_net("10.65.0.5")
    with Namespace.create() as container, NetlinkSocket(netns_fd=container.fd) as inner:
        ends = parse_ends(netlink.request(veth("one", "eth0", peer_netns_fd=container.fd)))
        route = Route(far, (Hop(ends.index),), protocol=PROTO_FELIX, scope=SCOPE_LINK)
        up = [link_up(ends.index), route_add(route)]
        address = Address(ends.peer_index, far, 32)
        assert netlink.batch(up) == []
        assert inner.batch([link_up(ends.peer_index), address_add(address)]) == []
        running.remove(ends.index)
        assert Links(inner).read().keys() == {"lo"}
        assert Addresses(inner).read(version=4) == {}
        assert Routes(netlink).read(version=4) == {}
    withheld.let_go()


def test_many_are_deleted_together_when_the_kernel_is_behind(
    withheld: Withheld, running: Reaper, netlink: NetlinkSocket
) -> None:
    for number in range(DELETERS):
        running.remove(make(netlink, number))
    threads = remove_side_by_side(running, [make(netlink, number) for number in range(MANY)])
    withheld.let_go()
    for thread in threads:
        thread.join(20)
    assert Links(netlink).read().keys() == {"lo"}
    assert withheld.conversations < DELETERS + MANY


def test_news_that_is_lost_is_made_good_by_the_answer(
    monkeypatch: pytest.MonkeyPatch, sockets: Sockets, netlink: NetlinkSocket
) -> None:
    monkeypatch.setattr(Reaper, "_hear", lambda self, event: None)
    deaf = Reaper(sockets)
    deaf.start()
    for thread in remove_side_by_side(deaf, [make(netlink, number) for number in range(MANY)]):
        thread.join(20)
        assert not thread.is_alive()
    assert Links(netlink).read().keys() == {"lo"}
    deaf.stop()


def test_what_has_gone_is_no_error_and_what_cannot_go_is(
    running: Reaper, netlink: NetlinkSocket
) -> None:
    index = make(netlink, 0)
    running.remove(index)
    running.remove(index)
    with pytest.raises(OSError, match="deleting interface #1: Operation not supported"):
        running.remove(Links(netlink).get("lo").index)


def test_two_who_want_the_same_gone(running: Reaper, netlink: NetlinkSocket) -> None:
    for thread in remove_side_by_side(running, [make(netlink, 0)] * 8):
        thread.join(20)
        assert not thread.is_alive()
    assert Links(netlink).read().keys() == {"lo"}
