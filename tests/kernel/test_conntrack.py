"""Flows as the kernel tracks them, held against conntrack(8)."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.net import V4, V6, format_address, parse_net
from kernel.conntrack import Conntrack, Flow, Status, Tuple, parse_flow
from kernel.netlink import NETLINK_NETFILTER, Message, NetlinkSocket
from kernel.netns import Namespace, inside
from tests.support.netns import run

# Tracks everything; 192.0.2.1 port 80 is really 127.0.0.9 port 8080, and what goes to 127.0.0.8
# comes from 127.0.0.7. What port 99 is for has another zone.
RULES = """
table inet test {
    chain zones {
        type filter hook output priority -300;
        udp dport 99 ct zone set 7
    }
    chain output {
        type nat hook output priority -100;
        ip daddr 192.0.2.1 tcp dport 80 dnat ip to 127.0.0.9:8080
    }
    chain source {
        type nat hook postrouting priority 100;
        ip daddr 127.0.0.8 snat ip to 127.0.0.7
    }
    chain filter {
        type filter hook output priority 0;
        udp dport 53 ct mark set 0x2a
        ct state established accept
    }
}
"""


@pytest.fixture
def tracked(namespace: Namespace) -> Namespace:
    run(namespace, "nft", "-f", "-", stdin=RULES)
    run(namespace, "ip", "route", "add", "192.0.2.0/24", "dev", "lo")
    return namespace


@pytest.fixture
def conntrack(tracked: Namespace) -> Iterator[Conntrack]:
    with Conntrack(netns_fd=tracked.fd) as opened:
        yield opened


def send(netns: Namespace, source: str, target: str, port: int) -> None:
    """One UDP packet."""
    with inside(netns.fd):
        client = socket.socket(
            socket.AF_INET6 if ":" in source else socket.AF_INET, socket.SOCK_DGRAM
        )
    with client:
        client.bind((source, 0))
        client.sendto(b"x", (target, port))


def listed(netns: Namespace, version: int) -> list[str]:
    """What conntrack(8) says: both tuples, mark and zone."""
    family = "ipv4" if version == V4 else "ipv6"
    lines = run(netns, "conntrack", "-L", "-f", family, "-o", "id").stdout.splitlines()
    return sorted(" ".join(re.findall(r"\b(?:src|dst|[sd]port|zone|id)=\S+", x)) for x in lines)


def shown(flow: Flow) -> str:
    """The same of a flow."""
    words = []
    for each in (flow.original, flow.reply):
        for name, end in (("src", each.src), ("dst", each.dst)):
            words.append(f"{name}={format_address(end.version, end.address)}")
        if each.src_port is not None:
            words += [f"sport={each.src_port}", f"dport={each.dst_port}"]
        if each.icmp_id is not None:
            words.append(f"id={each.icmp_id}")
    zone = [f"zone={flow.zone}"] if flow.zone else []
    return " ".join([*words, *zone, f"id={flow.id}"])


def host(text: str) -> bytes:
    return parse_net(text).packed()


def test_flows_are_what_conntrack_lists(tracked: Namespace, conntrack: Conntrack) -> None:
    send(tracked, "127.0.0.2", "127.0.0.3", 53)
    send(tracked, "127.0.0.2", "127.0.0.8", 54)
    send(tracked, "127.0.0.2", "127.0.0.3", 99)
    send(tracked, "::1", "::1", 53)
    run(tracked, "ping", "-c1", "-W20", "127.0.0.4")
    run(tracked, "ping", "-c1", "-W20", "::1")
    with inside(tracked.fd):
        server, client = socket.create_server(("127.0.0.9", 8080)), socket.socket()
    with server, client:
        client.bind(("127.0.0.5", 0))
        client.connect(("192.0.2.1", 80))
        found = {version: list(conntrack.flows(version)) for version in (V4, V6)}
        for version, flows in found.items():
            assert sorted(map(shown, flows)) == listed(tracked, version)
            assert len(flows) == {V4: 5, V6: 2}[version]
        assert {flow.mark for flow in found[V4] if flow.original.dst_port == 53} == {0x2A}
        (translated,) = conntrack.flows_of(parse_net("127.0.0.5"))
        port = client.getsockname()[1]
        assert translated.original == Tuple(
            parse_net("127.0.0.5"), parse_net("192.0.2.1"), 6, port, 80
        )
        assert translated.reply == Tuple(
            parse_net("127.0.0.9"), parse_net("127.0.0.5"), 6, 8080, port
        )
        status = Status(translated.status)
        assert Status.SEEN_REPLY | Status.ASSURED | Status.DESTINATION_NAT in status
        assert Status.SOURCE_NAT not in status
        assert str(translated) == (
            f"flow 127.0.0.5/32 to 192.0.2.1/32 protocol 6 ports {port}, 80,"
            f" answered 127.0.0.9/32 to 127.0.0.5/32 protocol 6 ports 8080, {port}"
        )
        assert conntrack.find(translated.original) == replace(translated, status=int(status))
        assert conntrack.flows_of(parse_net("127.0.0.9")) == [translated]
        assert conntrack.flows_of(parse_net("192.0.2.1")) == []
        for end in ("192.0.2.1", "127.0.0.5", "127.0.0.9"):
            assert conntrack.flows_of(parse_net(end), meant=True) == [translated]
    (ping,) = [flow for flow in found[V4] if flow.original.protocol == 1]
    assert (ping.original.icmp_type, ping.original.icmp_code) == (8, 0)
    assert conntrack.find(ping.original) is not None


def test_flows_are_chosen_by_any_of_their_ends(tracked: Namespace, conntrack: Conntrack) -> None:
    send(tracked, "127.0.0.2", "127.0.0.3", 1)
    send(tracked, "127.0.0.4", "127.0.0.8", 2)
    send(tracked, "::1", "::1", 3)

    def ports(*ends: str) -> list[int]:
        chosen = {host(end) for end in ends}
        versions = {parse_net(end).version for end in ends}
        flows = (flow for version in versions for flow in conntrack.flows(version, chosen))
        return sorted(flow.original.dst_port or 0 for flow in flows)

    assert ports("127.0.0.2") == ports("127.0.0.3") == [1]
    # began there, goes there, and as whom it is seen there
    assert ports("127.0.0.4") == ports("127.0.0.8") == ports("127.0.0.7") == [2]
    assert ports("127.0.0.2", "127.0.0.8", "::1") == [1, 2, 3]
    assert ports("127.0.0.1") == []
    assert [f.original.dst_port for f in conntrack.flows_of(parse_net("::1"))] == [3]
    assert conntrack.flows_of(parse_net("127.0.0.1")) == []


@pytest.mark.parametrize("walk", [0, 1000])
def test_flows_of_some_addresses_however_they_are_asked_for(
    tracked: Namespace, conntrack: Conntrack, monkeypatch: pytest.MonkeyPatch, walk: int
) -> None:
    monkeypatch.setattr("kernel.conntrack._WALK", walk)
    assert conntrack.count() == 0
    for port in range(1, 300):
        send(tracked, "127.0.0.2", "127.0.0.3", port)
    send(tracked, "127.0.0.4", "127.0.0.8", 1000)
    send(tracked, "127.0.0.6", "127.0.0.6", 1001)
    send(tracked, "::1", "::1", 1002)
    assert conntrack.count() == 302

    def ports(*addresses: str, meant: bool = False) -> set[int]:
        nets = [parse_net(address) for address in addresses]
        version = nets[0].version if nets else V4
        steps = list(conntrack.steps_of(version, nets, meant=meant))
        assert all(len(flows) <= 100 for flows in steps)
        return {flow.original.dst_port or 0 for flows in steps for flow in flows}

    assert ports("127.0.0.2", "127.0.0.6") == {*range(1, 300), 1001}
    assert ports("127.0.0.3") == set(range(1, 300))
    assert ports("127.0.0.8", "127.0.0.9", meant=True) == {1000}
    assert ports("::1") == {1002}
    assert ports("127.0.0.1") == ports("::2") == ports() == set()


def test_deleted_are_these_flows_and_no_others(tracked: Namespace, conntrack: Conntrack) -> None:
    send(tracked, "127.0.0.2", "127.0.0.3", 1)
    send(tracked, "127.0.0.2", "127.0.0.8", 2)
    send(tracked, "127.0.0.2", "127.0.0.3", 99)
    send(tracked, "::1", "::1", 4)
    run(tracked, "ping", "-c1", "-W20", "127.0.0.4")
    flows = {f.original.dst_port: f for v in (V4, V6) for f in conntrack.flows(v)}
    assert conntrack.delete([flows[1], flows[99]]) == 2
    assert sorted(f.original.dst_port or 0 for f in conntrack.flows(V4)) == [0, 2]
    assert conntrack.delete([flows[1], flows[2], flows[4], flows[None]]) == 3
    assert [*conntrack.flows(V4), *conntrack.flows(V6)] == []
    assert conntrack.delete([]) == 0
    assert conntrack.find(flows[1].original) is None


def test_a_flow_is_deleted_only_by_its_id(tracked: Namespace, conntrack: Conntrack) -> None:
    send(tracked, "127.0.0.2", "127.0.0.3", 1)
    (flow,) = conntrack.flows(V4)
    other = flow.id.to_bytes(4, "big")
    assert other in flow.key
    like = replace(flow, key=flow.key.replace(other, (flow.id ^ 1).to_bytes(4, "big")))
    assert conntrack.delete([like]) == 0
    assert conntrack.delete([flow]) == 1


def test_more_flows_than_fit_into_one_answer(tracked: Namespace, conntrack: Conntrack) -> None:
    with inside(tracked.fd):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        for port in range(1, 2001):
            client.sendto(b"x", ("127.0.0.3", port))
    flows = [flow for flow in conntrack.flows(V4) if flow.original.dst == parse_net("127.0.0.3")]
    assert {flow.original.dst_port for flow in flows} == set(range(1, 2001))
    assert conntrack.delete(flows) == 2000
    assert list(conntrack.flows(V4, {host("127.0.0.3")})) == []


def test_the_kernel_refuses_what_is_no_flow(tracked: Namespace, conntrack: Conntrack) -> None:
    send(tracked, "127.0.0.2", "127.0.0.3", 1)
    (flow,) = conntrack.flows(V4)
    broken = replace(flow, key=flow.key[:12] + b"\xff" * 4 + flow.key[16:])
    with pytest.raises(OSError, match=r"flow 127.0.0.2/32 to 127.0.0.3/32 protocol 17"):
        conntrack.delete([broken])
    assert list(conntrack.flows(V4)) == [flow]


def test_a_flow_of_another_order_is_found_all_the_same(
    tracked: Namespace, conntrack: Conntrack, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(tracked, "127.0.0.2", "127.0.0.3", 1)
    original = NetlinkSocket.stream

    def reordered(self: NetlinkSocket, message: Message) -> Iterator[bytes]:
        for body in original(self, message):
            yield body[:4] + body[56:108] + body[4:56] + body[108:]

    (flow,) = conntrack.flows(V4)
    monkeypatch.setattr(NetlinkSocket, "stream", reordered)
    assert list(conntrack.flows(V4, {host("127.0.0.3")})) == [flow]
    assert list(conntrack.flows(V4, {host("127.0.0.4")})) == []


@given(st.data())
def test_garbage_is_refused(data: st.DataObject) -> None:
    body = bytes((2, 0, 0, 0)) + data.draw(st.binary(max_size=120))
    try:
        parse_flow(body)
    except (ValueError, KeyError, IndexError):
        return


def test_it_is_read_where_it_was_opened(tracked: Namespace, conntrack: Conntrack) -> None:
    send(tracked, "127.0.0.2", "127.0.0.3", 1)
    with Namespace.create() as other, Conntrack(netns_fd=other.fd) as elsewhere:
        assert list(elsewhere.flows(V4)) == []
    assert len(list(conntrack.flows(V4))) == 1
    with NetlinkSocket(NETLINK_NETFILTER, netns_fd=tracked.fd) as plain:
        assert len(plain.dump(Message(0x101, 0, bytes((2, 0, 0, 0))))) == 1
