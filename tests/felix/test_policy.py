"""Policy, proved with packets between pods of one node."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from datastore.interface import Key
from kernel.netns import inside
from tests.felix.enforcers import ENFORCERS, Enforcer
from tests.felix.world import (
    V3,
    Listener,
    Node,
    Pod,
    cluster,
    global_policy,
    is_dropped,
    policy,
    put_namespace,
    reaches,
)
from tests.support.netns import connect as connect_namespaces
from tests.support.netns import eventually, fresh_namespace, run

Put = Callable[..., None]


class World:
    """One node; pods ``web``, ``client`` in default and ``guest`` in the namespace other."""

    def __init__(self, node: Node, enforcer: Enforcer) -> None:
        self.node = node
        self.enforcer = enforcer
        self.web = node.pod("web", "10.0.0.1", labels={"app": "web"}, ports=_PORTS)
        self.client = node.pod("client", "10.0.0.2", labels={"app": "client"})
        self.guest = node.pod("guest", "10.0.0.3", namespace="other", profiles=["kns.other"])

    def allowed(self, source: Pod, port: int = 80) -> bool:
        return reaches(source.netns, self.web.address, port) == source.address

    def dropped(self, source: Pod, port: int = 80) -> bool:
        return is_dropped(source.netns, self.web.address, port)


_PORTS = [{"name": "http", "protocol": "TCP", "port": 80}]


@pytest.fixture(scope="module", params=ENFORCERS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    enforcer = ENFORCERS[request.param]
    with cluster("node1", addresses=("172.31.1.11/24",), iptables=enforcer.iptables) as (node,):
        put_namespace(node, "other", team="red")
        node.start()
        made = World(node, enforcer)
        with Listener(made.web.netns, 80), Listener(made.web.netns, 443):
            yield made


@pytest.fixture
def put(world: World) -> Iterator[Put]:
    """Write policies and wait until they are enforced; they are gone after the test."""
    keys: dict[Key, None] = {}

    def write(*objects: dict[str, Any]) -> None:
        for obj in objects:
            keys[world.node.put(obj)] = None
        world.node.settle()

    write()
    yield write
    for key in keys:
        world.node.delete(key)
    world.node.settle()
    assert world.allowed(world.client)


def test_pods_talk_without_policy_and_without_nat(world: World, put: Put) -> None:
    put()
    assert world.allowed(world.client)
    assert world.allowed(world.guest)
    assert run(world.client.netns, "ping", "-c1", "-W2", "10.0.0.1").returncode == 0


def test_labels_decide(world: World, put: Put) -> None:
    rule = {"action": "Allow", "protocol": "TCP", "source": {"selector": "app == 'client'"}}
    put(policy("p", selector="app == 'web'", types=["Ingress"], ingress=[rule]))
    assert world.allowed(world.client)
    assert world.dropped(world.guest)


def test_a_pods_labels_count_as_they_are_now(world: World, put: Put) -> None:
    rule = {"action": "Allow", "source": {"selector": "tier == 'gold'"}}
    put(policy("p", selector="app == 'web'", types=["Ingress"], ingress=[rule]))
    assert world.dropped(world.client)
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "client", "namespace": "default", "labels": {"tier": "gold"}},
        "spec": {"nodeName": "node1", "containers": []},
    }
    put(pod)
    assert world.allowed(world.client)
    pod["metadata"]["labels"] = {}
    put(pod)
    assert world.dropped(world.client)


def test_a_finished_pod_is_cut_off(world: World, put: Put) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "client", "namespace": "default"},
        "spec": {"nodeName": "node1", "containers": []},
        "status": {"phase": "Succeeded"},
    }
    put(pod)
    assert world.dropped(world.client)
    assert "10.0.0.2" not in run(world.node.netns, "ip", "route").stdout


def test_namespace_selector_and_kubernetes_policy(world: World, put: Put) -> None:
    peer = {"namespaceSelector": {"matchLabels": {"team": "red"}}}
    put(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "from-red", "namespace": "default"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "web"}},
                "ingress": [{"from": [peer], "ports": [{"port": "http"}]}],
            },
        }
    )
    assert world.allowed(world.guest)
    assert world.dropped(world.guest, 443)
    assert world.dropped(world.client)


def test_an_update_changes_the_verdict(world: World, put: Put) -> None:
    def only(port: int) -> dict[str, Any]:
        rule = {"action": "Allow", "protocol": "TCP", "destination": {"ports": [port]}}
        return policy("p", selector="app == 'web'", types=["Ingress"], ingress=[rule])

    put(only(80))
    assert world.allowed(world.client)
    assert world.dropped(world.client, 443)
    put(only(443))
    assert world.allowed(world.client, 443)
    assert world.dropped(world.client)


def test_order_deny_log_and_pass(world: World, put: Put) -> None:
    everything: dict[str, Any] = {"selector": "app == 'web'", "types": ["Ingress"]}
    put(
        {"apiVersion": V3, "kind": "Tier", "metadata": {"name": "first"}, "spec": {"order": 10}},
        global_policy(
            "first.log-and-pass",
            tier="first",
            order=1,
            ingress=[
                {"action": "Log"},
                {"action": "Deny", "source": {"namespaceSelector": "team == 'red'"}},
                {"action": "Pass"},
            ],
            **everything,
        ),
        policy("late", order=20, ingress=[{"action": "Deny"}], **everything),
        policy("early", order=10, ingress=[{"action": "Allow"}], **everything),
    )
    assert world.allowed(world.client)
    assert world.dropped(world.guest)


def test_egress(world: World, put: Put) -> None:
    rule = {
        "action": "Allow",
        "protocol": "TCP",
        "destination": {"nets": ["10.0.0.0/30", "192.0.2.0/24"], "ports": [443]},
    }
    put(policy("p", selector="app == 'client'", types=["Egress"], egress=[rule]))
    assert world.allowed(world.client, 443)
    assert world.dropped(world.client, 80)
    assert world.allowed(world.guest, 80)


def test_many_ports_and_nets(world: World, put: Put) -> None:
    ports: list[Any] = [*range(1000, 1030), "2000:2010", 443]
    nets = [f"192.0.2.{n}/32" for n in range(20)] + ["10.0.0.2/32"]
    rule = {
        "action": "Allow",
        "protocol": "TCP",
        "source": {"nets": nets},
        "destination": {"ports": ports},
    }
    put(policy("p", selector="app == 'web'", types=["Ingress"], ingress=[rule]))
    assert world.allowed(world.client, 443)
    assert world.dropped(world.client, 80)
    assert world.dropped(world.guest, 443)


def test_nets_and_exceptions_from_them(world: World, put: Put) -> None:
    source = {"nets": ["10.0.0.0/8", "192.0.2.0/24"], "notNets": ["10.0.0.3/32", "10.0.0.4/32"]}
    rule = {"action": "Allow", "source": source}
    put(policy("p", selector="app == 'web'", types=["Ingress"], ingress=[rule]))
    assert world.allowed(world.client)
    assert world.dropped(world.guest)


def test_a_malformed_policy_denies_what_it_selects(world: World, put: Put) -> None:
    broken = policy("p", selector="app == 'web'", types=["Ingress"], ingress=[{"action": "Maybe"}])
    put(broken)
    assert world.dropped(world.client)
    assert reaches(world.web.netns, world.client.address, 9, patience=0.1) is None
    complaint = world.node.errors()["NetworkPolicy(default/p)"]
    assert "spec.ingress[0].action" in complaint and "Maybe" in complaint
    broken["spec"]["ingress"] = [{"action": "Allow"}]
    put(broken)
    assert world.allowed(world.client)
    assert "NetworkPolicy(default/p)" not in world.node.errors()


def test_pod_to_its_own_host(world: World, put: Put) -> None:
    node = world.node
    run(node.netns, "ip", "address", "replace", "10.9.9.9/32", "dev", "lo")
    configuration = {
        "apiVersion": V3,
        "kind": "FelixConfiguration",
        "metadata": {"name": "default"},
        "spec": {},
    }
    with Listener(node.netns, 8080):
        put(configuration)
        assert is_dropped(world.client.netns, "10.9.9.9", 8080)
        # the other way round is always open: kubelet's probes come this way
        assert reaches(node.netns, world.web.address, 80)
        configuration["spec"] = {"defaultEndpointToHostAction": "Accept"}
        put(configuration)
        assert reaches(world.client.netns, "10.9.9.9", 8080) == world.client.address
        rule = {"action": "Allow", "destination": {"notNets": ["10.9.9.9/32"]}}
        put(policy("p", selector="app == 'client'", types=["Egress"], egress=[rule]))
        assert is_dropped(world.client.netns, "10.9.9.9", 8080)


def test_an_unknown_interface_drops(world: World) -> None:
    stranger = world.node.pod("stranger", "10.0.0.66", endpoint=False)
    run(world.node.netns, "ip", "route", "add", "10.0.0.66", "dev", stranger.interface)
    try:
        world.node.settle()
        assert world.dropped(stranger)
        with Listener(stranger.netns, 80):
            assert is_dropped(world.client.netns, stranger.address, 80)
            world.node.put(stranger.endpoint())
            world.node.settle()
            assert reaches(world.client.netns, stranger.address, 80) == world.client.address
    finally:
        stranger.remove()


def test_a_foreign_source_address_is_dropped(world: World) -> None:
    run(world.client.netns, "ip", "address", "add", "10.0.0.77/32", "dev", "eth0")
    run(world.node.netns, "ip", "route", "add", "10.0.0.77", "dev", world.guest.interface)
    own, everywhere = (
        f"net.ipv4.conf.{world.client.interface}.rp_filter",
        "net.ipv4.conf.all.rp_filter",
    )
    with Listener(world.web.netns, 5000) as listener:

        def arrived() -> tuple[bytes, str]:
            """Of a forged and then an honest packet, the first to arrive, and its source."""
            for source, text in (("10.0.0.77", b"forged"), ("10.0.0.2", b"honest")):
                with inside(world.client.netns.fd):
                    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                with sender:
                    sender.bind((source, 0))
                    sender.sendto(text, (world.web.address, 5000))
            data, (address, _) = listener.udp.recvfrom(100)
            return data, address

        assert arrived() == (b"honest", "10.0.0.2")
        # the rule stands alone where somebody weakened the kernel's own check
        run(world.node.netns, "sysctl", "-w", f"{everywhere}=0", f"{own}=0")
        assert arrived() == (b"honest", "10.0.0.2")
        world.node.kill()  # it would put right what comes now
        world.enforcer.allow_spoofing(world.node)
        assert arrived() == (b"forged", "10.0.0.77")
        assert listener.udp.recvfrom(100)[0] == b"honest"
    run(world.node.netns, "ip", "route", "del", "10.0.0.77", "dev", world.guest.interface)
    run(world.client.netns, "ip", "address", "del", "10.0.0.77/32", "dev", "eth0")
    world.node.start()
    assert "Spoofed source" in world.enforcer.rules(world.node)
    assert run(world.node.netns, "sysctl", "-n", own).stdout.strip() == "1"


def test_tricky_13_a_pod_cannot_speak_vxlan(world: World) -> None:
    with fresh_namespace() as outside, Listener(outside, 4789), Listener(outside, 4790):
        connect_namespaces(
            world.node.netns, "up0", outside, "eth0", ["192.0.2.1/24", "192.0.2.2/24"]
        )
        run(outside, "ip", "route", "add", "10.0.0.0/8", "via", "192.0.2.1")
        send = "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('192.0.2.2', {}))"
        before = world.enforcer.packets(world.node, "VXLAN from a workload")
        run(world.client.netns, "python3", "-c", send.format(4789))
        run(world.client.netns, "python3", "-c", send.format(4790))
        eventually(
            lambda: world.enforcer.packets(world.node, "VXLAN from a workload") == before + 1
        )


def test_strangers_rules_stay(world: World, put: Put) -> None:
    run(world.node.netns, "iptables", "-N", "STRANGER")
    run(world.node.netns, "iptables", "-I", "FORWARD", "-s", "203.0.113.1", "-j", "STRANGER")
    run(world.node.netns, "ip", "route", "add", "203.0.113.0/24", "dev", "lo")
    put(policy("p", selector="app == 'web'", types=["Ingress"], ingress=[{"action": "Allow"}]))
    rules = run(world.node.netns, "iptables", "-S").stdout
    assert "-A FORWARD -s 203.0.113.1/32 -j STRANGER" in rules
    assert "203.0.113.0/24" in run(world.node.netns, "ip", "route").stdout


def test_what_is_enforced_stays_while_the_datastore_is_locked(world: World) -> None:
    node = world.node
    info = {
        "apiVersion": V3,
        "kind": "ClusterInformation",
        "metadata": {"name": "default"},
        "spec": {"datastoreReady": False},
    }
    node.settle()  # what came before the lock counts
    lock = node.put(info)
    shut = node.put(policy("shut", selector="app == 'web'", types=["Ingress"]))
    node.settle()
    assert world.allowed(world.client)
    assert "migrate unlock" in node.errors()["ClusterInformation(default)"]
    node.put({**info, "spec": {"datastoreReady": True}})
    node.settle()
    assert world.dropped(world.client)
    node.delete(shut)
    node.delete(lock)
    node.settle()
    assert world.allowed(world.client)
