"""Interfaces: veth pairs, settings, VXLAN devices, the monitor."""

import errno
import queue
import select
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from api.net import Net, parse_net
from kernel import sysctl
from kernel.addresses import Address
from kernel.links import (
    AddressEvent,
    Link,
    LinkEvent,
    LinkEventsLost,
    LinkMonitor,
    Links,
    delete_group,
    delete_link,
    ensure_vxlan,
    link_set,
    link_up,
    parse_link,
    set_group,
    veth,
)
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside
from kernel.vxlan import Vxlan, parse_vxlan
from tests.support.netns import connect, eventually, fresh_namespace, run

Event = LinkEvent | LinkEventsLost | AddressEvent


@pytest.fixture
def other() -> Iterator[Namespace]:
    with fresh_namespace() as made:
        yield made


def test_a_veth_pair_is_born_in_two_namespaces(
    netlink: NetlinkSocket, namespace: Namespace, other: Namespace
) -> None:
    message = veth(
        "cali123",
        "eth0",
        peer_netns_fd=other.fd,
        mtu=1440,
        mac="ee:ee:ee:ee:ee:ee",
        peer_mac="02:00:00:00:00:07",
        queues=3,
        group=99,
    )
    made = parse_link(netlink.request(message))
    with NetlinkSocket(netns_fd=other.fd) as far:
        peer = Links(far).get("eth0")
    assert Links(netlink).read()["cali123"] == Link(
        index=made.index,
        name="cali123",
        kind="veth",
        mac="ee:ee:ee:ee:ee:ee",
        mtu=1440,
        up=True,
        running=False,
        group=99,
        peer_index=peer.index,
        peer_elsewhere=True,
    )
    assert (peer.mac, peer.mtu, peer.up) == ("02:00:00:00:00:07", 1440, False)
    assert (made.peer_index, peer.peer_index) == (peer.index, made.index)
    for where, name in ((namespace, "cali123"), (other, "eth0")):
        assert "numtxqueues 3" in run(where, "ip", "-d", "link", "show", name).stdout


def test_a_taken_name_and_a_gone_namespace_are_refused(
    netlink: NetlinkSocket, other: Namespace
) -> None:
    assert netlink.batch([veth("one", "two")]) == []
    with pytest.raises(FileExistsError):
        netlink.request(veth("one", "eth0", peer_netns_fd=other.fd))
    with pytest.raises(OSError, match="Bad file descriptor"):
        netlink.request(veth("three", "eth0", peer_netns_fd=9999))
    assert Links(netlink).read().keys() == {"lo", "one", "two"}


def test_links_are_changed_and_moved(netlink: NetlinkSocket, other: Namespace) -> None:
    made = parse_link(netlink.request(veth("one", "two", up=False)))
    changes = link_set(made.index, up=True, name="uno", mtu=1300, mac="02:00:00:00:00:01", group=5)
    assert netlink.batch([changes, link_up(made.peer_index)]) == []
    link = Links(netlink).get("uno")
    assert (link.up, link.running, link.mtu, link.mac, link.group) == (
        True,
        True,
        1300,
        "02:00:00:00:00:01",
        5,
    )
    assert netlink.batch([link_set(made.index, up=False)]) == []
    assert not Links(netlink).get("uno").up
    assert netlink.batch([link_set(made.peer_index, netns_fd=other.fd)]) == []
    with NetlinkSocket(netns_fd=other.fd) as far:
        assert "two" in Links(far).read()


def test_a_port_knows_its_bridge(netlink: NetlinkSocket, namespace: Namespace) -> None:
    run(namespace, "ip", "link", "add", "br0", "type", "bridge")
    made = parse_link(netlink.request(veth("one", "two")))
    bridge = Links(netlink).get("br0")
    assert bridge.kind == "bridge"
    assert netlink.batch([link_set(made.index, master_index=bridge.index)]) == []
    assert Links(netlink).get("one").master_index == bridge.index
    assert netlink.batch([link_set(made.index, master_index=0)]) == []
    assert Links(netlink).get("one").master_index == 0


def test_one_missing_link_is_an_error(netlink: NetlinkSocket) -> None:
    with pytest.raises(OSError, match="interface nothere: No such device") as caught:
        Links(netlink).get("nothere")
    assert caught.value.errno == errno.ENODEV


def test_settings_are_written_without_proc(netlink: NetlinkSocket, namespace: Namespace) -> None:
    made = parse_link(netlink.request(veth("one", "two")))
    wanted = {"rp_filter": 1, "proxy_arp": 1, "forwarding": 1, "route_localnet": 1, "arp_ignore": 2}
    assert netlink.batch([link_set(made.index, inet_conf=wanted)]) == []
    with inside(namespace.fd):
        conf = ("net", "ipv4", "conf", "one")
        assert {name: int(sysctl.read((*conf, name))) for name in wanted} == wanted
    with pytest.raises(ValueError, match="no such setting: rpfilter"):
        link_set(made.index, inet_conf={"rpfilter": 1})


def test_deletes_take_both_ends(netlink: NetlinkSocket) -> None:
    made = parse_link(netlink.request(veth("one", "two")))
    assert netlink.batch([delete_link(made.index)]) == []
    assert netlink.batch([veth("one", "two"), delete_link("two")]) == []
    assert Links(netlink).read().keys() == {"lo"}


def test_a_group_is_deleted_in_one_go_and_nothing_else(netlink: NetlinkSocket) -> None:
    made = [parse_link(netlink.request(veth(f"a{n}", f"b{n}"))) for n in range(6)]
    assert netlink.batch([set_group(each.index, 77) for each in made[:4]]) == []
    assert netlink.batch([delete_group(77)]) == []
    assert Links(netlink).read().keys() == {"lo", "a4", "b4", "a5", "b5"}
    (failure,) = netlink.batch([delete_group(77)])
    assert failure.errno == errno.ENODEV
    with pytest.raises(ValueError, match="device group 0"):
        delete_group(0)


def host(address: str) -> Net:
    return parse_net(address)


@pytest.fixture
def uplink(namespace: Namespace, other: Namespace) -> Link:
    addresses = ("10.0.0.1/24", "10.0.0.2/24", "fd00::1/64", "fd00::2/64")
    return connect(namespace, "up0", other, "up0", addresses)[0]


def tunnel(uplink: Link) -> Vxlan:
    mac = "66:00:00:00:00:01"
    return Vxlan("vxlan.calico", 4096, 4789, host("10.0.0.1"), mac, 1450, uplink.index)


def test_a_vxlan_device_is_made_and_then_left_alone(
    netlink: NetlinkSocket, namespace: Namespace, uplink: Link
) -> None:
    wanted = tunnel(uplink)
    made = ensure_vxlan(netlink, wanted)
    assert (made.kind, made.mac, made.mtu, made.up) == ("vxlan", wanted.mac, 1450, True)
    assert parse_vxlan(made.data) == wanted.settings
    with NetlinkSocket(groups=1, netns_fd=namespace.fd) as heard:
        assert ensure_vxlan(netlink, wanted) == made
        assert select.select([heard], [], [], 0)[0] == []


def test_a_vxlan_device_is_changed_where_it_can_be(netlink: NetlinkSocket, uplink: Link) -> None:
    wanted = tunnel(uplink)
    made = ensure_vxlan(netlink, wanted)
    for changed in (
        replace(wanted, mac="66:00:00:00:00:02"),
        replace(wanted, mtu=1400),
        replace(wanted, local=host("10.0.0.9")),
    ):
        link = ensure_vxlan(netlink, changed)
        assert link.index == made.index
        assert (link.mac, link.mtu, link.up) == (changed.mac, changed.mtu, True)
        assert parse_vxlan(link.data) == changed.settings
    assert netlink.batch([link_set(made.index, up=False)]) == []
    assert ensure_vxlan(netlink, wanted).up


def test_a_vxlan_device_is_made_anew_where_it_must_be(netlink: NetlinkSocket, uplink: Link) -> None:
    wanted = tunnel(uplink)
    last = ensure_vxlan(netlink, wanted)
    for changed in (
        replace(wanted, vni=5),
        replace(wanted, port=8472),
        replace(wanted, parent_index=0),
        replace(wanted, local=host("fd00::1"), mtu=1430),
    ):
        link = ensure_vxlan(netlink, changed)
        assert link.index != last.index
        assert parse_vxlan(link.data) == changed.settings
        assert (link.mac, link.mtu, link.up) == (changed.mac, changed.mtu, True)
        last = link


def test_a_vxlan_device_that_learns_is_put_right(
    netlink: NetlinkSocket, namespace: Namespace, uplink: Link
) -> None:
    device = "vxlan.calico type vxlan id 4096 dstport 4789 local 10.0.0.1 dev up0"
    run(namespace, "ip", "link", "add", *device.split())
    before = Links(netlink).get("vxlan.calico")
    assert parse_vxlan(before.data).learning
    link = ensure_vxlan(netlink, tunnel(uplink))
    assert (link.index, parse_vxlan(link.data).learning) == (before.index, False)


def test_another_kind_of_device_with_the_name_is_left_alone(
    netlink: NetlinkSocket, uplink: Link
) -> None:
    assert netlink.batch([veth("vxlan.calico", "peer")]) == []
    with pytest.raises(FileExistsError, match=r"vxlan\.calico: is a veth device"):
        ensure_vxlan(netlink, tunnel(uplink))
    assert Links(netlink).get("vxlan.calico").kind == "veth"


def test_the_kernels_reason_against_a_vxlan_device_is_told(
    netlink: NetlinkSocket, uplink: Link
) -> None:
    with pytest.raises(OSError, match=r"vxlan\.calico .* mtu 9000 .*: Invalid argument"):
        ensure_vxlan(netlink, replace(tunnel(uplink), mtu=9000))
    ensure_vxlan(netlink, tunnel(uplink))
    with pytest.raises(FileExistsError, match="VXLAN device with the specified VNI"):
        ensure_vxlan(netlink, replace(tunnel(uplink), name="vxlan.second"))


def drain(events: "queue.SimpleQueue[Event]") -> list[Event]:
    found = []
    while not events.empty():
        found.append(events.get())
    return found


def test_the_monitor_tells_what_happens_to_links(
    netlink: NetlinkSocket, namespace: Namespace
) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with LinkMonitor(events.put, netns_fd=namespace.fd):
        made = parse_link(netlink.request(veth("one", "two")))
        run(namespace, "ip", "link", "add", "br0", "type", "bridge")
        bridge = Links(netlink).get("br0")
        # a port that leaves a bridge is not a deleted interface
        moves = [link_set(made.index, master_index=index) for index in (bridge.index, 0)]
        assert netlink.batch([*moves, link_set(made.index, up=False)]) == []
        seen: list[Event] = []
        down = LinkEvent("one", made.index, up=False, deleted=False)

        def told(event: Event) -> bool:
            seen.extend(drain(events))
            return event in seen

        eventually(lambda: told(down))
        assert LinkEvent("one", made.index, up=True, deleted=False) in seen
        assert not any(isinstance(event, LinkEvent) and event.deleted for event in seen)
        assert netlink.batch([delete_link("one")]) == []
        eventually(lambda: told(LinkEvent("one", made.index, up=False, deleted=True)))
        eventually(lambda: told(LinkEvent("two", made.peer_index, up=False, deleted=True)))


def test_the_monitor_tells_only_of_deletions_where_asked(
    netlink: NetlinkSocket, namespace: Namespace
) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with LinkMonitor(events.put, only_deletions=True, netns_fd=namespace.fd):
        made = parse_link(netlink.request(veth("one", "two")))
        assert netlink.batch([link_set(made.index, up=True), delete_link("one")]) == []
        first = events.get(timeout=60)
        assert first == LinkEvent("one", made.index, up=False, deleted=True)


def test_the_monitor_tells_of_addresses_where_asked(
    netlink: NetlinkSocket, namespace: Namespace
) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with LinkMonitor(events.put, addresses=True, netns_fd=namespace.fd):
        for verb in ("add", "del"):
            run(namespace, "ip", "address", verb, "192.0.2.1/24", "dev", "lo")
            told = AddressEvent(Address(1, parse_net("192.0.2.1"), 24), deleted=verb == "del")
            eventually(lambda told=told: told in drain(events))  # type: ignore[misc]


def test_the_monitor_says_when_it_has_lost_events(
    netlink: NetlinkSocket, namespace: Namespace
) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    monitor = LinkMonitor(events.put, netns_fd=namespace.fd)
    made = parse_link(netlink.request(veth("one", "two")))
    flood = [link_set(made.index, mtu=1400 + number % 2) for number in range(8000)]
    assert netlink.batch(flood) == []
    monitor.start()
    try:
        eventually(lambda: LinkEventsLost() in drain(events))
        # and it goes on telling
        assert netlink.batch([delete_link("one")]) == []
        gone = LinkEvent("one", made.index, up=False, deleted=True)
        eventually(lambda: gone in drain(events))
    finally:
        monitor.stop()


def test_the_monitor_stops_from_any_thread_and_before_it_started(namespace: Namespace) -> None:
    LinkMonitor(lambda _: None, netns_fd=namespace.fd).stop()
    monitor = LinkMonitor(lambda _: None, netns_fd=namespace.fd)
    monitor.start()
    stopper = threading.Thread(target=monitor.stop)
    stopper.start()
    stopper.join(60)
    assert not stopper.is_alive()
