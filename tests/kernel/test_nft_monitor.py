"""Changes of a table by others, as the kernel tells of them."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest

from kernel.netns import Namespace
from kernel.nft_monitor import TableChanged, TableMonitor, Watched
from kernel.nft_sets import ADDRESS4, NftSet
from kernel.nftables import Nftables
from tests.support.netns import eventually, run

Told = queue.SimpleQueue[TableChanged]
CALICO = Watched("calico")
FILTER = Watched("filter", ("FORWARD",))


@pytest.fixture
def told() -> Told:
    return queue.SimpleQueue()


@pytest.fixture
def own(namespace: Namespace) -> Iterator[Nftables]:
    with Nftables(4, "calico", netns_fd=namespace.fd) as table:
        yield table


@pytest.fixture
def monitor(namespace: Namespace, own: Nftables, told: Told) -> Iterator[None]:
    with TableMonitor((CALICO, FILTER), {own.port}, told.put, netns_fd=namespace.fd):
        yield


def change(own: Nftables, members: int = 0) -> None:
    """A change of our own."""
    transaction = own.transaction()
    transaction.create_table()
    transaction.create_chain("ours")
    transaction.create_set(NftSet("members", (ADDRESS4,)))
    transaction.add_keys("members", (number.to_bytes(4, "big") for number in range(1, members + 1)))
    own.commit(transaction)


STRANGERS = (
    "add chain ip calico theirs",
    "add rule ip calico ours accept",
    "flush chain ip calico ours",
    "add element ip calico members { 192.0.2.1 }",
    "delete element ip calico members { 192.0.2.1 }",
    "add table ip other; add chain ip other c; add rule ip calico ours drop",
    "add table ip6 calico",
    "flush ruleset",
)


@pytest.mark.usefixtures("monitor")
def test_a_strangers_changes_are_told(namespace: Namespace, own: Nftables, told: Told) -> None:
    change(own)
    for command in STRANGERS:
        assert told.empty(), command
        run(namespace, "nft", "-f", "-", stdin=command.replace("; ", "\n") + "\n")
        assert told.get(timeout=60) == TableChanged("calico")
        while not told.empty():
            told.get()


@pytest.mark.usefixtures("monitor")
def test_own_changes_and_those_of_other_tables_are_no_news(
    namespace: Namespace, own: Nftables, told: Told
) -> None:
    change(own, 5000)
    commands = (
        "add table ip calico2; add chain ip calico2 calico",
        "add table ip other; add chain ip other calico; add rule ip other calico counter",
        "add table inet calico; add chain inet calico c",
        "add set ip other calico { type ipv4_addr\\; }; add element ip other calico { 192.0.2.1 }",
    )
    for command in commands:
        lines = command.replace("\\;", "\0").replace("; ", "\n").replace("\0", ";")
        run(namespace, "nft", "-f", "-", stdin=lines + "\n")
    run(namespace, "nft", "add", "chain", "ip", "calico", "end")
    assert told.get(timeout=60) == TableChanged("calico")
    assert told.empty()


@pytest.mark.usefixtures("monitor")
def test_of_a_chain_only_what_concerns_it_is_told(namespace: Namespace, told: Told) -> None:
    run(namespace, "iptables-nft", "-N", "KUBE-FORWARD")
    run(namespace, "ip6tables-nft", "-A", "OUTPUT", "-j", "ACCEPT")
    assert told.empty()
    for command in ("-A FORWARD -j KUBE-FORWARD", "-P FORWARD DROP", "-F FORWARD"):
        run(namespace, "iptables-nft", "-A", "KUBE-FORWARD", "-j", "RETURN")
        assert told.empty()
        run(namespace, "iptables-nft", *command.split())
        assert told.get(timeout=60) == TableChanged("filter")
    while not told.empty():
        told.get()
    run(namespace, "nft", "delete", "table", "ip", "filter")
    assert told.get(timeout=60) == TableChanged("filter")


def test_what_could_not_be_told_may_have_been_news(namespace: Namespace, told: Told) -> None:
    monitor = TableMonitor((CALICO,), (), told.put, netns_fd=namespace.fd)
    with Nftables(4, "other", netns_fd=namespace.fd) as other:
        transaction = other.transaction()
        transaction.create_table()
        transaction.create_set(NftSet("members", (ADDRESS4,)))
        transaction.add_keys("members", (number.to_bytes(4, "big") for number in range(1, 200_000)))
        other.commit(transaction)
    with monitor:
        eventually(lambda: not told.empty())
