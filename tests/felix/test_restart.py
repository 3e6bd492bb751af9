"""Restarts and changes under traffic: nothing lost, nothing let through, nothing rewritten."""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from datastore.interface import Key
from kernel.netlink import NETLINK_NETFILTER, Message, NetlinkSocket, attributes
from kernel.netns import inside
from tests.felix.world import (
    V3,
    Flow,
    Listener,
    Node,
    Pod,
    cluster,
    is_dropped,
    policy,
    put_namespace,
    reaches,
)
from tests.support.netns import eventually, run


class World:
    def __init__(self, node: Node) -> None:
        self.node = node
        self.web = node.pod("web", "10.0.0.1", labels={"app": "web"})
        self.client = node.pod("client", "10.0.0.2", labels={"app": "client", "a": "1"})
        self.guest = node.pod("guest", "10.0.0.3", namespace="other", profiles=["kns.other"])


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with cluster("node1", addresses=("172.31.1.11/24",)) as (node,):
        put_namespace(node, "other")
        for pool, masquerade in (("10.0.0.0/16", True), ("10.1.0.0/16", False)):
            node.put(
                {
                    "apiVersion": V3,
                    "kind": "IPPool",
                    "metadata": {"name": pool.replace(".", "-").replace("/", "-")},
                    "spec": {"cidr": pool, "natOutgoing": masquerade},
                }
            )
        node.put(allow("a == '1'"))
        node.start()
        made = World(node)
        node.settle()
        yield made


def allow(selector: str, **more: Any) -> dict[str, Any]:
    """Web is reached by what the selector picks."""
    rule = {"action": "Allow", "source": {"selector": selector}, **more}
    return policy("p", selector="app == 'web'", types=["Ingress"], ingress=[rule])


@contextmanager
def flows(world: World) -> Iterator[None]:
    """Packets of a pod that may talk to web, all of which arrive, and of one that may not."""
    address = world.web.address
    with (
        Flow(world.client.netns, world.web.netns, address, 5001) as good,
        Flow(world.guest.netns, world.web.netns, address, 5002) as bad,
    ):
        eventually(lambda: good.sent > 100 and bad.sent > 100)
        yield
        sent = good.sent
        eventually(lambda: good.sent > sent + 100)
        arrived = good.finish()
        assert arrived == set(range(good.sent)), f"{good.sent - len(arrived)} of {good.sent} lost"
        assert bad.finish() == set()


@contextmanager
def silence(node: Node) -> Iterator[None]:
    """Nothing is written to nf_tables, routes, addresses or links meanwhile."""
    with (
        NetlinkSocket(NETLINK_NETFILTER, netns_fd=node.netns.fd) as tables,
        NetlinkSocket(groups=_ROUTES_AND_LINKS, netns_fd=node.netns.fd) as monitor,
    ):
        before = _generation(tables)
        yield
        assert _generation(tables) == before
        ready, _, _ = select.select([monitor.fileno()], [], [], 0)
        assert not ready, monitor.receive()


# RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE (linux/rtnetlink.h); in IPv6 the kernel
# itself is busy with link-local addresses
_ROUTES_AND_LINKS = 0x1 | 0x10 | 0x40
_GET_GENERATION = (10 << 8) | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN


def _generation(tables: NetlinkSocket) -> int:
    """How many transactions nf_tables has seen."""
    answer = tables.request(Message(_GET_GENERATION, 0, bytes(4)))
    return int.from_bytes(attributes(answer, 4)[1], "big")


def test_changes_that_keep_allowing_lose_nothing(world: World) -> None:
    forms = [
        allow("a == '1'"),
        allow("app == 'client'"),
        allow("app in { 'client', 'x' }", destination={"notPorts": [1]}, protocol="UDP"),
        allow("a == '1'", protocol="UDP", destination={"ports": list(range(5001, 5050))}),
        policy(
            "p",
            order=7,
            selector="app == 'web'",
            types=["Ingress", "Egress"],
            ingress=[{"action": "Allow", "source": {"nets": ["10.0.0.2/32", "192.0.2.0/24"]}}],
        ),
    ]
    no_tcp = {"action": "Deny", "protocol": "TCP"}
    second = policy("q", selector="all()", types=["Ingress"], ingress=[no_tcp], order=1)
    with flows(world):
        for _ in range(3):
            for form in forms:
                world.node.put(form)
                world.node.settle()
            key = world.node.put(second)
            world.node.settle()
            world.node.delete(key)
    world.node.put(forms[0])
    world.node.settle()


def test_a_label_change_that_keeps_allowing_loses_nothing(world: World) -> None:
    world.node.put(
        policy(
            "p",
            selector="app == 'web'",
            types=["Ingress"],
            ingress=[
                {"action": "Allow", "source": {"selector": "a == '1'"}},
                {"action": "Allow", "source": {"selector": "a == '2'"}},
            ],
        )
    )
    world.node.settle()
    with flows(world):
        for turn in range(10):
            labels = {"app": "client", "a": "12"[turn % 2]}
            world.node.put(world.client.endpoint(labels=labels))
            world.node.settle()
    world.node.put(world.client.endpoint(labels={"app": "client", "a": "1"}))
    world.node.put(allow("a == '1'"))
    world.node.settle()


def test_an_established_connection_survives_a_policy_that_allows_it(world: World) -> None:
    with Listener(world.web.netns, 80) as listener:
        connection = _connect(world.client, world.web.address)
        with connection:
            peer, _ = listener.tcp.accept()
            with peer:
                world.node.put(allow("a == '1'", protocol="TCP"))
                world.node.settle()
                connection.sendall(b"still there")
                assert peer.recv(100) == b"still there"
    world.node.put(allow("a == '1'"))
    world.node.settle()


def _connect(pod: Pod, address: str) -> socket.socket:
    with inside(pod.netns.fd):
        client = socket.socket()
    client.settimeout(5)
    client.connect((address, 80))
    return client


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_adopts_what_is_there(world: World, number: signal.Signals) -> None:
    before = _settled(world.node)
    with flows(world), silence(world.node):
        world.node.kill(number)
        world.node.start()
        world.node.settle()
        world.node.kill(number)
        world.node.start()
    assert _kernel(world.node) == before
    assert world.node.errors() == {}


def test_what_changed_meanwhile_is_put_right(world: World) -> None:
    node = world.node
    node.kill()
    node.put(allow("app == 'guest'"))
    gone = node.pod("gone", "10.0.0.9")
    node.delete(gone.key)
    run(node.netns, "iptables", "-D", "FORWARD", "1")
    run(node.netns, "iptables", "-F", f"cali-tw-{world.web.interface}")
    run(node.netns, "ip", "route", "add", "10.0.0.9", "dev", gone.interface, "proto", "80")
    run(node.netns, "ip", "route", "del", "10.0.0.1")
    run(node.netns, "ipset", "create", "cali40stale", "hash:ip")
    run(node.netns, "sysctl", "-w", f"net.ipv4.conf.{world.web.interface}.rp_filter=0")
    node.start()
    with Listener(world.web.netns, 80):
        assert is_dropped(world.client.netns, "10.0.0.1", 80)
        node.put(allow("a == '1'"))
        node.settle()
        assert reaches(world.client.netns, "10.0.0.1", 80)
    routes = run(node.netns, "ip", "route").stdout
    assert "10.0.0.9" not in routes and "10.0.0.1 " in routes
    assert "cali40stale" not in run(node.netns, "ipset", "list", "-n").stdout
    rp_filter = run(node.netns, "sysctl", "-n", f"net.ipv4.conf.{world.web.interface}.rp_filter")
    assert rp_filter.stdout.strip() == "1"
    gone.netns.close()


def test_killed_at_any_moment_it_is_repaired_at_the_next_start(world: World) -> None:
    node = world.node
    before = _settled(node)
    for turn in range(4):
        node.kill()
        node.start(wait=False)
        for number in range(10):
            node.put(allow(f"b == '{turn}{number}'"))
            node.put(policy(f"extra-{number}", selector="all()", types=["Egress"]))
    node.kill()
    for number in range(10):
        node.delete(Key("NetworkPolicy", f"extra-{number}", "default"))
    node.put(allow("a == '1'"))
    node.start()
    assert _settled(node) == before


def test_pools_make_nat_rules_and_their_end_removes_them(world: World) -> None:
    node = world.node
    assert "MASQUERADE" in run(node.netns, "iptables", "-t", "nat", "-S").stdout
    sets = run(node.netns, "ipset", "list", "cali40masq-ipam-pools").stdout
    assert "10.0.0.0/16" in sets
    for pool in ("10-0-0-0-16", "10-1-0-0-16"):
        node.delete(Key("IPPool", pool))
    node.settle()
    assert "cali" not in run(node.netns, "iptables", "-t", "nat", "-S").stdout
    eventually(lambda: "ipam-pools" not in run(node.netns, "ipset", "list", "-n").stdout)


def _settled(node: Node) -> str:
    """Everything of ours, once sets that were in use until just now are gone."""
    node.settle()

    def only_wanted() -> bool:
        names = run(node.netns, "ipset", "list", "-n").stdout.splitlines()
        wanted: int = node.status()["sets"]
        return len(names) == wanted

    eventually(only_wanted)
    return _kernel(node)


def _kernel(node: Node) -> str:
    """Everything of ours, without counters."""
    parts = [
        run(node.netns, "iptables-save").stdout,
        run(node.netns, "ip6tables-save").stdout,
        run(node.netns, "ip", "route").stdout,
        *sorted(run(node.netns, "ipset", "save", "-sorted").stdout.splitlines()),
    ]
    return "\n".join(
        line for part in parts for line in part.splitlines() if not line.startswith("#")
    )
