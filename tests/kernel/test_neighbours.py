"""Permanent and proxy neighbour entries."""

from dataclasses import replace

import pytest

from api.net import Net, parse_net
from kernel.links import Link, parse_link, veth
from kernel.neighbours import Neighbour, NeighbourKey, Neighbours
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from reconcile.plan import diff
from tests.support.netns import connect, fresh_namespace, run

Table = dict[NeighbourKey, Neighbour]


@pytest.fixture
def link(netlink: NetlinkSocket) -> Link:
    return parse_link(netlink.request(veth("one", "two")))


def read(neighbours: Neighbours, ifindex: int = 0) -> Table:
    return neighbours.read(version=4, ifindex=ifindex) | neighbours.read(version=6, ifindex=ifindex)


def table(*entries: Neighbour) -> Table:
    return {entry.key: entry for entry in entries}


def host(text: str) -> Net:
    return parse_net(text)


def test_entries_are_written_read_changed_and_deleted(netlink: NetlinkSocket, link: Link) -> None:
    neighbours = Neighbours(netlink)
    first = table(
        Neighbour(link.index, host("169.254.1.1"), "ee:ee:ee:ee:ee:ee"),
        Neighbour(link.index, host("fe80::1"), "ee:ee:ee:ee:ee:ee"),
        Neighbour(link.index, host("10.0.0.9"), None),
        Neighbour(link.index, host("fd00::9"), None),
        Neighbour(link.peer_index, host("10.0.0.7"), "02:00:00:00:00:07"),
    )
    assert neighbours.apply(diff(first, {})) == {}
    assert read(neighbours) == first
    assert not diff(first, read(neighbours))
    mine = {key: entry for key, entry in first.items() if key.ifindex == link.index}
    assert read(neighbours, link.index) == mine
    second = {
        key: entry if entry.mac is None else replace(entry, mac="02:00:00:00:00:01")
        for key, entry in mine.items()
    }
    assert neighbours.apply(diff(second, first)) == {}
    assert read(neighbours) == second
    assert neighbours.apply(diff({}, first)) == {}
    assert read(neighbours) == {}
    assert neighbours.apply(diff({}, first)) == {}


def test_others_and_learned_entries_are_not_ours(namespace: Namespace) -> None:
    with fresh_namespace() as other, NetlinkSocket(netns_fd=namespace.fd) as socket:
        link, _ = connect(namespace, "one", other, "two", ("10.0.0.1/24", "10.0.0.2/24"))
        run(namespace, "ping", "-c1", "-W20", "10.0.0.2")
        theirs = "10.0.0.3 lladdr 02:00:00:00:00:03 dev one"
        run(namespace, "ip", "neighbour", "add", *theirs.split())
        neighbours = Neighbours(socket)
        assert read(neighbours) == {}
        strangers = neighbours.read(version=4, ifindex=link.index, protocol=None)
        assert [entry.net for entry in strangers.values()] == [host("10.0.0.3")]


def test_one_bad_entry_is_reported_and_the_others_stand(netlink: NetlinkSocket, link: Link) -> None:
    neighbours = Neighbours(netlink)
    bad = Neighbour(4242, host("10.0.0.1"), "02:00:00:00:00:01")
    entries = [
        Neighbour(link.index, Net(4, 0x0A010000 + n, 32), "02:00:00:00:00:01") for n in range(100)
    ]
    errors = neighbours.apply(diff(table(bad, *entries), {}))
    assert errors.keys() == {bad.key}
    assert "neighbour 10.0.0.1 dev #4242 lladdr 02:00:00:00:00:01: " in str(errors[bad.key])
    assert read(neighbours) == table(*entries)


def test_a_permanent_entry_needs_no_arp(namespace: Namespace) -> None:
    with fresh_namespace() as other, NetlinkSocket(netns_fd=namespace.fd) as near:
        one, two = connect(namespace, "one", other, "two", ("10.0.0.1/24", "10.0.0.2/24"))
        run(namespace, "ip", "link", "set", "one", "arp", "off")
        run(other, "ip", "link", "set", "two", "arp", "off")
        with NetlinkSocket(netns_fd=other.fd) as far:
            for socket, link, address, mac in (
                (near, one, "10.0.0.2", two.mac),
                (far, two, "10.0.0.1", one.mac),
            ):
                entry = Neighbour(link.index, host(address), mac)
                assert Neighbours(socket).apply(diff(table(entry), {})) == {}
        run(namespace, "ping", "-c1", "-W20", "10.0.0.2")
