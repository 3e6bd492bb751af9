"""Batches, dumps and attributes, against the kernel."""

import errno
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import Net
from kernel.links import RTM_GETLINK, RTM_NEWLINK, delete_link, link_set, parse_link, veth
from kernel.netlink import (
    Message,
    NetlinkSocket,
    attribute,
    attribute_list,
    attribute_text,
    attribute_u32,
    attributes,
    mac_bytes,
    nested,
    text,
    u32,
)
from kernel.netns import Namespace
from kernel.routes import Hop, Route, Routes, route_add, route_delete
from reconcile.plan import diff
from tests.support.netns import run

ATTRIBUTES = st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=12)
LOOPBACK = 1


@given(ATTRIBUTES)
@settings(max_examples=200, deadline=None)
def test_attributes_come_back_as_they_went(pairs: list[tuple[int, bytes]]) -> None:
    data = b"".join(attribute(kind, value) for kind, value in pairs)
    assert len(data) % 4 == 0
    assert attribute_list(data) == pairs
    assert attributes(b"head" + data, 4) == dict(pairs)
    assert attribute_list(nested(5, data)) == [(5, data)]


@given(
    st.integers(0, 0xFFFFFFFF),
    # any bytes but NUL, as the kernel allows them in a name
    st.binary(max_size=20).map(
        lambda raw: raw.replace(b"\0", b"").decode(errors="surrogateescape")
    ),
)
@settings(max_examples=100, deadline=None)
def test_numbers_and_text_come_back(number: int, word: str) -> None:
    found = attributes(attribute_u32(1, number) + attribute_text(2, word))
    assert (u32(found[1]), text(found[2])) == (number, word)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_malformed_attributes_are_an_error_or_inside_the_data(data: bytes) -> None:
    try:
        found = attribute_list(data)
    except ValueError:
        return
    assert sum(4 + len(value) for _, value in found) <= len(data)


@pytest.mark.parametrize("mac", ["", "02:00:00:00:00", "02:00:00:00:00:zz", "02:00:00:00:00:01:02"])
def test_what_is_no_mac_address_is_refused(mac: str) -> None:
    with pytest.raises(ValueError, match=r"MAC|hex"):
        mac_bytes(mac)


def host_route(number: int) -> Route:
    return Route(Net(4, 0x0A000000 + number, 32), (Hop(LOOPBACK),))


def test_a_failure_names_its_message_and_the_others_are_done(netlink: NetlinkSocket) -> None:
    # several windows, with failures at the edges of them
    messages = [route_add(host_route(number)) for number in range(2500)]
    bad = {0, 7, 998, 999, 1000, 1001, 1999, 2499}
    for number in bad:
        messages[number] = route_add(Route(host_route(number).net, (Hop(4242),)))
    failures = netlink.batch(messages)
    assert {failure.index for failure in failures} == bad
    assert {failure.errno for failure in failures} == {errno.ENODEV}
    assert len(Routes(netlink).read(version=4, protocol=80)) == 2500 - len(bad)


def test_all_of_a_batch_may_fail(netlink: NetlinkSocket) -> None:
    failures = netlink.batch([route_delete(host_route(number)) for number in range(3000)])
    assert [failure.index for failure in failures] == list(range(3000))
    assert {failure.errno for failure in failures} == {errno.ESRCH}
    assert netlink.batch([route_add(host_route(1))]) == []


def test_a_failure_carries_the_kernels_words(netlink: NetlinkSocket) -> None:
    route = Route(Net(4, 0x0A000000, 24), (Hop(LOOPBACK, gateway=0x0B000001),))
    (failure,) = netlink.batch([route_add(route)])
    assert failure.message == "Network is unreachable: Nexthop has invalid gateway"
    error = failure.error(route)
    assert (error.errno, str(route) in str(error)) == (errno.ENETUNREACH, True)


def test_an_empty_batch_is_nothing(netlink: NetlinkSocket) -> None:
    assert netlink.transact([]) == ([], [])


def test_a_refused_dump_raises(netlink: NetlinkSocket) -> None:
    # strict checking: an interface index has no place in a request for all links
    header = bytes(4) + b"\x07" + bytes(11)
    with pytest.raises(OSError, match=r"Invalid argument: .*index"):
        netlink.dump(Message(RTM_GETLINK, 0, header))


def test_request_raises_what_the_kernel_refuses(netlink: NetlinkSocket) -> None:
    with pytest.raises(OSError, match="No such device"):
        netlink.request(delete_link("nothere"))
    with pytest.raises(OSError, match="no answer"):
        netlink.request(link_set(LOOPBACK, up=True))


def test_an_echo_belongs_to_its_message(netlink: NetlinkSocket) -> None:
    pairs = [veth(f"a{number}", f"b{number}") for number in range(5)]
    pairs.insert(2, delete_link("nothere"))
    failures, replies = netlink.transact(pairs)
    assert [failure.index for failure in failures] == [2]
    made = {each.index: parse_link(each.body).name for each in replies if each.type == RTM_NEWLINK}
    assert made == {0: "a0", 1: "a1", 3: "a2", 4: "a3", 5: "a4"}


def test_a_dump_is_whole_while_others_write(namespace: Namespace, netlink: NetlinkSocket) -> None:
    fixed = {route.key: route for route in map(host_route, range(3000))}
    routes = Routes(netlink)
    assert routes.apply(diff(fixed, {})) == {}
    done = threading.Event()

    def disturb() -> None:
        with NetlinkSocket(netns_fd=namespace.fd) as other:
            moving = [host_route(5000 + number) for number in range(50)]
            while not done.is_set():
                other.batch([route_add(route) for route in moving])
                other.batch([route_delete(route) for route in moving])

    writer = threading.Thread(target=disturb)
    writer.start()
    try:
        for _ in range(10):
            assert fixed.items() <= routes.read(version=4, protocol=80).items()
    finally:
        done.set()
        writer.join()


def test_a_socket_keeps_its_namespace(namespace: Namespace) -> None:
    with NetlinkSocket(netns_fd=namespace.fd) as socket:
        assert socket.batch([veth("mine", "peer")]) == []
    assert "mine@peer" in run(namespace, "ip", "-br", "link").stdout
