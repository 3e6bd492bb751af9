"""Restarts and changes under traffic: nothing lost, nothing let through, nothing rewritten."""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from datastore.interface import Key
from kernel.netlink import NETLINK_NETFILTER, Message, NetlinkSocket, attributes
from kernel.netns import inside
from tests.felix.enforcers import ENFORCERS, Enforcer
from tests.felix.world import (
    V3,
    Flow,
    Listener,
    Node,
    Pod,
    cluster,
    felix_configuration,
    is_dropped,
    policy,
    put_namespace,
    reaches,
)
from tests.support.netns import eventually, run


class World:
    def __init__(self, node: Node, enforcer: Enforcer) -> None:
        self.node = node
        self.enforcer = enforcer
        self.web = node.pod("web", "10.0.0.1", labels={"app": "web"})
        self.client = node.pod("client", "10.0.0.2", labels={"app": "client", "a": "1"})
        self.guest = node.pod("guest", "10.0.0.3", namespace="other", profiles=["kns.other"])


@pytest.fixture(scope="module", params=ENFORCERS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    enforcer = ENFORCERS[request.param]
    with cluster("node1", addresses=("172.31.1.11/24",), iptables=enforcer.iptables) as (node,):
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
        made = World(node, enforcer)
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
        arrived = good.finish(0)
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


def test_lists_of_networks_are_ready_when_rules_refer_to_them(world: World) -> None:
    with flows(world):
        for number in range(40):
            nets = ["10.0.0.2/32", f"192.0.2.{number}/32", "198.51.100.0/24"]
            ingress = [{"action": "Allow", "source": {"nets": nets}}]
            world.node.put(policy("p", selector="app == 'web'", types=["Ingress"], ingress=ingress))
            world.node.settle()
    world.node.put(allow("a == '1'"))
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
    client.settimeout(60)
    client.connect((address, 80))
    return client


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_adopts_what_is_there(world: World, number: signal.Signals) -> None:
    before = _settled(world)
    with flows(world), silence(world.node):
        world.node.kill(number)
        world.node.start()
        world.node.settle()
        world.node.kill(number)
        world.node.start()
    assert _kernel(world) == before
    assert world.node.errors() == {}


def test_what_changed_meanwhile_is_put_right(world: World) -> None:
    node = world.node
    node.kill()
    node.put(allow("app == 'guest'"))
    gone = node.pod("gone", "10.0.0.9")
    node.delete(gone.key)
    world.enforcer.break_chains(node, world.web.interface)
    run(node.netns, "ip", "route", "add", "10.0.0.9", "dev", gone.interface, "proto", "80")
    run(node.netns, "ip", "route", "del", "10.0.0.1")
    run(node.netns, "sysctl", "-w", f"net.ipv4.conf.{world.web.interface}.rp_filter=0")
    node.start()
    with Listener(world.web.netns, 80):
        assert is_dropped(world.client.netns, "10.0.0.1", 80)
        node.put(allow("a == '1'"))
        node.settle()
        assert reaches(world.client.netns, "10.0.0.1", 80)
    routes = run(node.netns, "ip", "route").stdout
    assert "10.0.0.9" not in routes and "10.0.0.1 " in routes
    assert not any("stale" in name for name in world.enforcer.sets(node))
    rp_filter = run(node.netns, "sysctl", "-n", f"net.ipv4.conf.{world.web.interface}.rp_filter")
    assert rp_filter.stdout.strip() == "1"
    gone.netns.close()


def test_killed_at_any_moment_it_is_repaired_at_the_next_start(world: World) -> None:
    node = world.node
    before = _settled(world)
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
    assert _settled(world) == before


def test_pools_make_nat_rules_and_their_end_removes_them(world: World) -> None:
    node = world.node
    assert "masquerade" in world.enforcer.rules(node).lower()
    assert any("10.0.0.0" in line for line in world.enforcer.kernel(node))
    for pool in ("10-0-0-0-16", "10-1-0-0-16"):
        node.delete(Key("IPPool", pool))
    node.settle()
    assert "masquerade" not in world.enforcer.rules(node).lower()
    eventually(lambda: not any("ipam-pools" in name for name in world.enforcer.sets(node)))


def _settled(world: World) -> str:
    """Everything of ours, once sets that were in use until just now are gone.

    And once flows have been looked at: what of them is ended, or may go on, is written, too.
    """
    world.node.settle()
    eventually(lambda: not world.node.status()["flows"]["reviewing"])
    if world.enforcer.iptables:
        wanted: int = world.node.status()["sets"]
        eventually(lambda: len(world.enforcer.sets(world.node)) == wanted)
    return _kernel(world)


def _kernel(world: World) -> str:
    """Everything of ours, without counters."""
    routes = run(world.node.netns, "ip", "route").stdout.splitlines()
    return "\n".join([*world.enforcer.kernel(world.node), *routes])


def _is_gone(enforcer: Enforcer, node: Node) -> bool:
    return "cali" not in enforcer.rules(node) and not enforcer.sets(node)


def test_another_enforcer_takes_over_without_a_gap(world: World) -> None:
    """There and back: no packet is lost, none gets through, and nothing stays of the other."""
    node, other = world.node, ENFORCERS["nftables" if world.enforcer.iptables else "iptables"]
    before = _settled(world)
    with flows(world):
        for chosen in (other, world.enforcer):
            unused = world.enforcer if chosen is other else other
            mode = "Disabled" if chosen.iptables else "Enabled"
            node.put(felix_configuration(f"node.{node.name}", nftablesMode=mode))
            node.settle()
            eventually(partial(_is_gone, unused, node))
            assert "cali-tw-" in chosen.rules(node)
    assert node.errors() == {}
    assert _settled(world) == before
