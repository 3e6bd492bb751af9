"""What our netlink code writes and reads, seen by a witness with other eyes: pyroute2."""

from collections.abc import Callable
from typing import Any

import pytest
from pyroute2 import IPRoute

from api.net import parse_interface, parse_net
from kernel.addresses import Address, address_add
from kernel.links import Links, link_up, parse_link, veth
from kernel.neighbours import Neighbour, neighbour_replace
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, call_inside
from kernel.routes import PROTO_BGP, PROTO_FELIX, Hop, Route, Routes, route_add

MTU = 1400
MAC = "02:00:00:00:00:01"


def witnessed(namespace: Namespace, look: Callable[[Any], Any]) -> Any:
    """What ``look`` sees through pyroute2's eyes inside the namespace."""

    def run() -> Any:
        with IPRoute() as witness:
            return look(witness)

    return call_inside(namespace.fd, run)


@pytest.fixture
def index(netlink: NetlinkSocket) -> int:
    pair = parse_link(netlink.request(veth("veth0", "veth1", mtu=MTU, mac=MAC)))
    host, network = parse_interface("10.0.0.1/24")
    messages = [link_up(pair.index), link_up(pair.peer_index)]
    messages.append(address_add(Address(pair.index, host, network.length)))
    assert netlink.batch(messages) == []
    return pair.index


def test_links_and_addresses(namespace: Namespace, netlink: NetlinkSocket, index: int) -> None:
    def look(witness: Any) -> Any:
        return list(witness.get_links(index)), list(witness.get_addr(index=index, family=2))

    [link], [address] = witnessed(namespace, look)
    assert (link.get("ifname"), link.get("mtu"), link.get("address")) == ("veth0", MTU, MAC)
    assert link.get("linkinfo").get("kind") == "veth"
    assert (address.get("address"), address["prefixlen"]) == ("10.0.0.1", 24)
    ours = Links(netlink).read()
    assert {name: link.index for name, link in ours.items()} == witnessed(
        namespace,
        lambda witness: {each.get("ifname"): each["index"] for each in witness.get_links()},
    )


def test_routes(namespace: Namespace, netlink: NetlinkSocket, index: int) -> None:
    gateway = parse_net("10.0.0.2").address
    other = parse_net("10.0.0.3").address
    written = [
        Route(parse_net("10.65.0.5/32"), (Hop(index),)),
        Route(parse_net("10.66.0.0/26"), (Hop(index, gateway),), protocol=PROTO_BGP, metric=1024),
        Route(parse_net("10.67.0.0/26"), (Hop(index, gateway), Hop(index, other, weight=3))),
        Route(parse_net("10.68.0.0/26"), kind="blackhole", protocol=PROTO_BGP, metric=1024),
    ]
    assert netlink.batch([route_add(route) for route in written]) == []
    seen = {
        f"{route.get('dst')}/{route['dst_len']}": route
        for route in witnessed(
            namespace, lambda witness: list(witness.get_routes(family=2, table=254))
        )
    }
    pod = seen["10.65.0.5/32"]
    assert (pod["proto"], pod["scope"], pod.get("oif")) == (PROTO_FELIX, 253, index)
    learned = seen["10.66.0.0/26"]
    assert (learned["proto"], learned.get("gateway")) == (PROTO_BGP, "10.0.0.2")
    assert learned.get("priority") == 1024
    hops = seen["10.67.0.0/26"].get("multipath")
    assert [(hop.get("gateway"), hop["hops"] + 1) for hop in hops] == [
        ("10.0.0.2", 1),
        ("10.0.0.3", 3),
    ]
    assert seen["10.68.0.0/26"]["type"] == 6  # RTN_BLACKHOLE


def test_routes_of_the_witness_are_read(
    namespace: Namespace, netlink: NetlinkSocket, index: int
) -> None:
    witnessed(
        namespace,
        lambda witness: witness.route(
            "add", dst="10.69.0.0/26", gateway="10.0.0.9", oif=index, proto=PROTO_BGP, priority=7
        ),
    )
    [route] = Routes(netlink).read(version=4, protocol=PROTO_BGP).values()
    gateway = parse_net("10.0.0.9").address
    assert route == Route(
        parse_net("10.69.0.0/26"), (Hop(index, gateway),), protocol=PROTO_BGP, metric=7
    )


def test_neighbours(namespace: Namespace, netlink: NetlinkSocket, index: int) -> None:
    entry = Neighbour(index, parse_net("169.254.1.1"), "ee:ee:ee:ee:ee:ee")
    assert netlink.batch([neighbour_replace(entry)]) == []
    [seen] = witnessed(
        namespace,
        lambda witness: [
            each
            for each in witness.get_neighbours(family=2, ifindex=index)
            if each.get("dst") == "169.254.1.1"
        ],
    )
    assert (seen.get("lladdr"), seen["state"]) == ("ee:ee:ee:ee:ee:ee", 0x80)  # NUD_PERMANENT
