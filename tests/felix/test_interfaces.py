"""Pods' interfaces and routes: in any order, again and again, in both IP versions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datastore.interface import Key
from tests.felix.world import (
    Listener,
    Node,
    Pod,
    cluster,
    global_policy,
    is_dropped,
    policy,
    reaches,
)
from tests.support.netns import eventually, run


@pytest.fixture(scope="module")
def client() -> Iterator[Pod]:
    """A pod on a node of its own."""
    with cluster("node1", addresses=("172.31.1.11/24",), iptables=True) as (made,):
        made.start()
        yield made.pod("client", "10.0.255.1")


@pytest.fixture
def node(client: Pod) -> Node:
    return client.node


def routes(node: Node) -> str:
    return run(node.netns, "ip", "route").stdout


def test_the_object_before_the_interface(node: Node, client: Pod) -> None:
    pod = Pod(node, "default", "early", "10.0.0.1")
    node.put(pod.endpoint())
    node.settle()
    mine = node.status()["endpoints"][f"default/{pod.key.name}"]
    assert mine == {"interface": pod.interface, "state": "waits for its interface"}
    assert "10.0.0.1" not in routes(node)
    pod.plug()
    with Listener(pod.netns, 80):
        eventually(lambda: reaches(client.netns, pod.address, 80) is not None)
    node.settle()
    assert node.status()["endpoints"][f"default/{pod.key.name}"]["state"] == "enforced"
    pod.remove()


def test_the_interface_before_the_object(node: Node, client: Pod) -> None:
    pod = node.pod("late", "10.0.0.2", endpoint=False)
    node.settle()
    assert "10.0.0.2" not in routes(node)
    node.put(pod.endpoint())
    with Listener(pod.netns, 80):
        eventually(lambda: reaches(client.netns, pod.address, 80) is not None)
    pod.remove()


def test_the_route_that_the_cni_plugin_made_is_adopted(node: Node) -> None:
    pod = node.pod("wired", "10.0.0.3", endpoint=False)
    run(node.netns, "ip", "route", "add", "10.0.0.3", "dev", pod.interface, "proto", "80")
    node.put(pod.endpoint())
    node.settle()
    assert node.errors() == {}
    assert routes(node).count("10.0.0.3") == 1
    pod.remove()
    node.settle()
    assert "10.0.0.3" not in routes(node)


def test_a_strangers_route_is_not_overwritten(node: Node) -> None:
    run(node.netns, "ip", "route", "add", "10.0.0.4", "dev", "lo")
    pod = node.pod("taken", "10.0.0.4")
    node.settle()
    assert "File exists" in node.errors()["network"]
    assert "10.0.0.4 dev lo" in routes(node)
    run(node.netns, "ip", "route", "del", "10.0.0.4", "dev", "lo")
    eventually(lambda: f"10.0.0.4 dev {pod.interface} proto 80" in routes(node))
    eventually(lambda: node.errors() == {})
    pod.remove()


def test_an_interface_that_goes_down_and_up(node: Node) -> None:
    pod = node.pod("flap", "10.0.0.5")
    node.settle()
    for _ in range(3):
        run(node.netns, "ip", "link", "set", pod.interface, "down")
        run(node.netns, "ip", "link", "set", pod.interface, "up")
        eventually(lambda: f"10.0.0.5 dev {pod.interface} proto 80" in routes(node))
    # faster than the agent can look
    with node.paused():
        run(node.netns, "ip", "link", "set", pod.interface, "down")
        run(node.netns, "ip", "link", "set", pod.interface, "up")
        assert "10.0.0.5" not in routes(node)
    eventually(lambda: f"10.0.0.5 dev {pod.interface} proto 80" in routes(node))
    pod.remove()


def test_an_interface_that_is_made_anew(node: Node, client: Pod) -> None:
    pod = node.pod("again", "10.0.0.6")
    node.settle()
    for _ in range(3):
        pod.unplug()
        pod.plug()
        run(node.netns, "sysctl", "-w", f"net.ipv4.conf.{pod.interface}.rp_filter=0")
        with Listener(pod.netns, 80):
            eventually(lambda: reaches(client.netns, pod.address, 80) is not None)
    node.settle()
    filtered = run(node.netns, "sysctl", "-n", f"net.ipv4.conf.{pod.interface}.rp_filter")
    assert filtered.stdout.strip() in ("0", "1")
    pod.remove()


def test_an_interface_that_is_renamed(node: Node, client: Pod) -> None:
    """Under another name no chain judges what goes there, so nothing does."""
    pod = node.pod("renamed", "10.0.0.16")
    node.put(policy("closed", selector="all()", types=["Ingress"]))
    node.settle()
    with Listener(pod.netns, 80):
        assert is_dropped(client.netns, pod.address, 80)
        run(node.netns, "ip", "link", "set", pod.interface, "name", "stray0")
        eventually(lambda: pod.address not in routes(node))
        assert is_dropped(client.netns, pod.address, 80)
        run(node.netns, "ip", "link", "set", "stray0", "name", pod.interface)
        eventually(lambda: pod.address in routes(node))
        assert is_dropped(client.netns, pod.address, 80)
        node.delete(Key("NetworkPolicy", "closed", "default"))
        eventually(lambda: reaches(client.netns, pod.address, 80) is not None)
    pod.remove()


def test_an_address_that_moves_to_another_pod(node: Node, client: Pod) -> None:
    first = node.pod("first", "10.0.0.7")
    node.settle()
    second = node.pod("second", "10.0.0.7")
    node.settle()
    assert "delete one of them" in node.errors()[f"WorkloadEndpoint(default/{second.key.name})"]
    assert f"10.0.0.7 dev {first.interface}" in routes(node)
    first.remove()
    with Listener(second.netns, 80):
        eventually(lambda: reaches(client.netns, "10.0.0.7", 80) is not None)
    second.remove()


def test_what_is_gone_leaves_nothing(node: Node) -> None:
    node.settle()
    before = run(node.netns, "iptables", "-S").stdout
    pods = [node.pod(f"many-{n}", f"10.0.1.{n}") for n in range(1, 30)]
    node.settle()
    for pod in pods:
        eventually(lambda pod=pod: f"{pod.address} dev {pod.interface}" in routes(node))  # type: ignore[misc]
    assert "cali-from-wl-dispatch-" in run(node.netns, "iptables", "-S").stdout
    with Listener(pods[17].netns, 80):
        assert reaches(pods[3].netns, pods[17].address, 80)
    for pod in pods:
        pod.remove()
    node.settle()
    assert run(node.netns, "iptables", "-S").stdout == before
    assert "10.0.1." not in routes(node)


def test_ipv6_is_policed_like_ipv4(node: Node) -> None:
    """Forwarding between IPv6 pods, its policy, and no way around it."""
    one = node.pod("six-one", "2001:db8::1", labels={"six": "one"})
    two = node.pod("six-two", "2001:db8::2")
    node.settle()
    with Listener(one.netns, 80, version=6), Listener(one.netns, 81, version=6):
        assert reaches(two.netns, one.address, 80) == two.address
        allow = {"action": "Allow", "protocol": "TCP", "destination": {"ports": [81]}}
        key = node.put(policy("six", selector="six == 'one'", ingress=[allow]))
        node.settle()
        assert is_dropped(two.netns, one.address, 80)
        assert reaches(two.netns, one.address, 81) == two.address
        node.delete(key)
        node.settle()
        # a source of its own choice goes nowhere
        run(two.netns, "ip", "address", "add", "2001:db8::77/128", "dev", "eth0", "nodad")
        run(node.netns, "ip", "route", "add", "2001:db8::77", "dev", "lo")
        ping = ("ping", "-c1", "-W1", "-I", "2001:db8::77", one.address)
        assert run(two.netns, *ping, check=False).returncode != 0
        saved = run(node.netns, "ip6tables-save", "-c", "-t", "raw").stdout
        assert any("Spoofed" in line and "[0:" not in line for line in saved.splitlines())
    one.remove()
    two.remove()
    node.settle()
    assert "cali-fw-" not in run(node.netns, "ip6tables", "-S").stdout


def test_an_ipv4_pod_speaks_no_ipv6(node: Node) -> None:
    one = node.pod("four", "10.0.0.8")
    two = node.pod("six", "2001:db8::3")
    run(one.netns, "ip", "-6", "address", "add", "2001:db8::4/128", "dev", "eth0", "nodad")
    run(one.netns, "ip", "-6", "route", "add", "default", "via", "fe80::1", "dev", "eth0")
    run(node.netns, "ip", "-6", "route", "add", "2001:db8::4", "dev", one.interface)
    node.settle()
    with Listener(one.netns, 80, version=6):
        assert is_dropped(two.netns, "2001:db8::4", 80)
    one.remove()
    two.remove()


def test_global_policy_on_everything(node: Node, client: Pod) -> None:
    key = node.put(global_policy("closed", types=["Ingress", "Egress"]))
    node.settle()
    pod = node.pod("inside", "10.0.0.10")
    node.settle()
    with Listener(pod.netns, 80):
        assert is_dropped(client.netns, pod.address, 80)
    node.delete(key)
    node.settle()
    pod.remove()
