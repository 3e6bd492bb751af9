"""The thread that lists flows: what it finds, and that it goes when it is told to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from felix.conntrack_lister import Lister, Listing
from kernel import nft_expressions as nft
from kernel.conntrack import Conntrack, Flow
from kernel.links import link_up
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside
from kernel.nftables import BaseChain, Nftables, NftRule

FLOWS = 1000


@pytest.fixture
def tracked(namespace: Namespace) -> Namespace:
    """With so many flows."""
    with NetlinkSocket(netns_fd=namespace.fd) as netlink:
        assert netlink.batch([link_up(1)]) == []
    with Nftables(4, "track", netns_fd=namespace.fd) as table:
        transaction = table.transaction()
        transaction.create_table()
        transaction.create_chain("output", BaseChain("filter", "output", 0))
        transaction.append_rules("output", [NftRule(nft.load_conntrack_state())])
        table.commit(transaction)
    with inside(namespace.fd):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        for port in range(1, 1 + FLOWS):
            sender.sendto(b"", ("127.0.0.3", port))
    return namespace


class Woken:
    """A lister, and whether it has told that there is something."""

    def __init__(self, namespace: Namespace) -> None:
        self._event = threading.Event()
        with inside(namespace.fd):
            self.lister = Lister(self._event.set)

    def found(self, listing: Listing) -> list[Flow]:
        """All that it finds."""
        flows: list[Flow] = []
        for some in self.lister.listed(listing):
            if some is None:
                assert self.lister.ready or self._event.wait(60), "nobody woke"
                self._event.clear()
            else:
                flows += some
        return flows


@pytest.fixture
def woken(tracked: Namespace) -> Iterator[Woken]:
    made = Woken(tracked)
    with closing(made.lister):
        yield made


def everything(conntrack: Conntrack) -> Iterator[list[Flow]]:
    return conntrack.steps(4)


def ports(flows: list[Flow]) -> list[int]:
    return sorted(flow.original.dst_port or 0 for flow in flows)


def test_it_finds_what_is_there_again_and_again(woken: Woken) -> None:
    for _ in range(2):
        assert ports(woken.found(everything)) == list(range(1, 1 + FLOWS))
    assert woken.lister.spent > 0


def test_what_fails_is_told(woken: Woken) -> None:
    def failing(conntrack: Conntrack) -> Iterator[list[Flow]]:
        yield next(everything(conntrack))
        raise OSError(5, "a listing that fails")

    with pytest.raises(OSError, match="a listing that fails"):
        woken.found(failing)


def test_it_is_ahead_by_a_few(woken: Woken) -> None:
    """While nobody takes what it finds it rests."""
    told, taken = 0, 0

    def counted(conntrack: Conntrack) -> Iterator[list[Flow]]:
        nonlocal told
        for flows in everything(conntrack):
            told += 1
            yield flows

    for some in woken.lister.listed(counted):
        taken += some is not None
        assert told <= taken + 3, "two that wait, and one that it would add"
    assert told == taken >= FLOWS // 100


@pytest.mark.parametrize("taken", [0, 1])
def test_it_ends_in_the_midst_of_a_listing(tracked: Namespace, taken: int) -> None:
    woken = Woken(tracked)
    found = woken.lister.listed(everything)
    while taken and next(found) is None:
        assert woken._event.wait(60)
    next(found)
    woken.lister.close()
    assert not woken.lister._thread.is_alive()
