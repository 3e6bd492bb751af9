"""Addresses of interfaces."""

import pytest

from api.net import parse_interface, parse_net
from kernel.addresses import SCOPE_LINK, Address, Addresses, address_add, address_delete
from kernel.links import Links, parse_link, veth
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from tests.support.netns import run


@pytest.mark.parametrize("text", ["10.1.2.3/24", "10.1.2.3/32", "fd00::3/64", "fd00::3/128"])
def test_an_address_comes_back_as_it_went(netlink: NetlinkSocket, text: str) -> None:
    index = parse_link(netlink.request(veth("one", "two"))).index
    host, network = parse_interface(text)
    address = Address(index, host, network.length)
    assert str(address) == text
    assert address.network == network
    for _ in range(2):  # a second time changes nothing
        assert netlink.batch([address_add(address)]) == []
    table = Addresses(netlink).read(version=host.version, ifindex=index)
    assert table[address.key] == address
    assert netlink.batch([address_delete(address)]) == []
    assert address.key not in Addresses(netlink).read(version=host.version, ifindex=index)


def test_an_address_may_be_there_once_for_each_peer(netlink: NetlinkSocket) -> None:
    index = parse_link(netlink.request(veth("one", "two"))).index
    host = parse_net("10.1.2.3")
    peers = (None, parse_net("10.1.2.4"), parse_net("10.1.2.5"))
    made = {Address(index, host, 32, peer=peer) for peer in peers}
    assert netlink.batch([address_add(each) for each in made]) == []
    assert set(Addresses(netlink).read(version=4, ifindex=index).values()) == made
    for each in made:
        assert netlink.batch([address_delete(each)]) == []
    assert Addresses(netlink).read(version=4, ifindex=index) == {}


def test_reading_can_be_limited_to_an_interface(netlink: NetlinkSocket) -> None:
    made = parse_link(netlink.request(veth("one", "two")))
    lo = Links(netlink).get("lo").index
    assert netlink.batch([address_add(Address(made.index, parse_net("10.0.0.1"), 24))]) == []
    addresses = Addresses(netlink)
    assert {key.ifindex for key in addresses.read(version=4)} == {lo, made.index}
    assert {key.ifindex for key in addresses.read(version=4, ifindex=made.index)} == {made.index}


def test_an_ipv6_address_is_usable_at_once(netlink: NetlinkSocket, namespace: Namespace) -> None:
    index = parse_link(netlink.request(veth("one", "two"))).index
    assert netlink.batch([address_add(Address(index, parse_net("fd00::1"), 64))]) == []
    shown = run(namespace, "ip", "-6", "address", "show", "dev", "one").stdout
    assert "fd00::1/64" in shown
    assert "tentative" not in shown.split("fd00::1/64")[1].splitlines()[0]


def test_a_scope_is_kept(netlink: NetlinkSocket) -> None:
    index = parse_link(netlink.request(veth("one", "two"))).index
    address = Address(index, parse_net("169.254.1.1"), 32, SCOPE_LINK)
    assert netlink.batch([address_add(address)]) == []
    assert Addresses(netlink).read(version=4)[address.key].scope == SCOPE_LINK
