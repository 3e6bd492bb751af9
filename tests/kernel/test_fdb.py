"""Forwarding entries of a VXLAN device, and a packet that follows them."""

from dataclasses import replace

import pytest

from api.net import parse_net
from kernel.addresses import Address, address_add
from kernel.fdb import Fdb, FdbEntry, FdbKey
from kernel.links import Link, ensure_vxlan
from kernel.neighbours import Neighbour, Neighbours
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from kernel.vxlan import Vxlan
from reconcile.plan import diff
from tests.support.netns import connect, fresh_namespace, run


def table(*entries: FdbEntry) -> dict[FdbKey, FdbEntry]:
    return {entry.key: entry for entry in entries}


def make_tunnel(socket: NetlinkSocket, local: str, mac: str) -> Link:
    mtu = 1450 if "." in local else 1430
    return ensure_vxlan(socket, Vxlan("vxlan.calico", 4096, 4789, parse_net(local), mac, mtu))


@pytest.mark.parametrize(("local", "base"), [("10.0.0.1", "10.1.0.0"), ("fd00::1", "fd01::")])
def test_entries_are_written_read_changed_and_deleted(
    netlink: NetlinkSocket, local: str, base: str
) -> None:
    link = make_tunnel(netlink, local, "66:00:00:00:00:01")
    start = parse_net(base)
    first = table(
        *(
            FdbEntry(
                link.index,
                f"66:00:00:00:{n >> 8:02x}:{n & 255:02x}",
                start._replace(address=start.address + n),
            )
            for n in range(2, 600)
        )
    )
    fdb = Fdb(netlink)
    assert fdb.read(link.index) == {}
    assert fdb.apply(diff(first, {})) == {}
    assert fdb.read(link.index) == first
    second = {
        key: replace(entry, remote=start._replace(address=start.address + 9999))
        for key, entry in list(first.items())[10:]
    }
    assert fdb.apply(diff(second, first)) == {}
    assert fdb.read(link.index) == second
    assert fdb.apply(diff({}, first)) == {}
    assert fdb.read(link.index) == {}
    assert fdb.apply(diff({}, first)) == {}


def test_one_bad_entry_is_reported_and_the_others_stand(netlink: NetlinkSocket) -> None:
    link = make_tunnel(netlink, "10.0.0.1", "66:00:00:00:00:01")
    good = FdbEntry(link.index, "66:00:00:00:00:02", parse_net("10.0.0.2"))
    bad = FdbEntry(link.index, "66:00:00:00:00:03", parse_net("fd00::2"))
    fdb = Fdb(netlink)
    errors = fdb.apply(diff(table(bad, good), {}))
    assert errors.keys() == {bad.key}
    assert f"fdb 66:00:00:00:00:03 dev #{link.index} dst fd00::2: " in str(errors[bad.key])
    assert fdb.read(link.index) == table(good)


def test_a_ping_goes_through_the_tunnel(namespace: Namespace) -> None:
    with fresh_namespace() as other:
        connect(namespace, "up", other, "up", ("10.0.0.1/24", "10.0.0.2/24"))
        ends = [
            (namespace, "10.0.0.1", "66:00:00:00:00:01", "192.168.9.1"),
            (other, "10.0.0.2", "66:00:00:00:00:02", "192.168.9.2"),
        ]
        for (own, local, mac, inner), (_, remote, far_mac, far_inner) in zip(
            ends, reversed(ends), strict=True
        ):
            with NetlinkSocket(netns_fd=own.fd) as socket:
                link = make_tunnel(socket, local, mac)
                address = Address(link.index, parse_net(inner), 24)
                assert socket.batch([address_add(address)]) == []
                entry = FdbEntry(link.index, far_mac, parse_net(remote))
                neighbour = Neighbour(link.index, parse_net(far_inner), far_mac)
                assert Fdb(socket).apply(diff(table(entry), {})) == {}
                neighbours = {neighbour.key: neighbour}
                assert Neighbours(socket).apply(diff(neighbours, {})) == {}
        run(namespace, "ping", "-c1", "-W20", "192.168.9.2")
