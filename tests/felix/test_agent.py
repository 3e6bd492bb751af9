"""The agent as a process: start, status, registration, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datastore.interface import Key
from felix.calculate import Calculator
from felix.dataplane import Dataplane
from felix.desired import Delta
from felix.iptables_dataplane import IptablesDataplane
from felix.registration import AddressError, node_address
from felix.snapshot import Snapshot
from kernel.netns import call_inside, inside
from tests.felix.world import (
    ROOT,
    V3,
    Listener,
    Node,
    cluster,
    is_dropped,
    policy,
    reaches,
)
from tests.support.netns import eventually, fresh_namespace, run


@pytest.fixture
def node() -> Iterator[Node]:
    with cluster("node1", iptables=True) as (made,):
        yield made


def spec_of(node: Node) -> dict[str, Any]:
    spec: dict[str, Any] = node.store.get(Key("Node", node.name)).value["spec"]
    return spec


def test_nothing_is_written_before_the_datastore_told_everything(
    node: Node, tmp_path: Path
) -> None:
    """A store that can't be read is waited for, and what is enforced stays as it is."""
    node.start()
    pod = node.pod("web", "10.0.0.1")
    node.put(policy("p", selector="all()", types=["Ingress"]))
    node.settle()
    node.kill()
    before = run(node.netns, "iptables", "-S").stdout
    hidden = tmp_path / "broken.db"
    hidden.write_bytes(b"this is no database" * 1000)
    right, node.url = node.url, f"sqlite://{hidden}"
    node.start(wait=False)
    eventually(lambda: _datastore(node) not in ("", "followed"))
    status = node.status()
    assert not status["ready"] and not status["in_sync"]
    assert run(node.netns, "iptables", "-S").stdout == before
    assert pod.interface in before
    node.kill()
    node.url = right
    node.start()
    assert run(node.netns, "iptables", "-S").stdout == before


def _datastore(node: Node) -> str:
    try:
        told: str = node.status()["datastore"]
    except OSError:
        return ""  # not up yet
    return told


def test_registration(node: Node) -> None:
    run(node.netns, "ip", "link", "add", "eth0", "type", "veth", "peer", "eth1")
    node.start()
    name = f"Node({node.name})"
    eventually(lambda: "MANX_NODE_IP" in node.errors().get(name, ""))
    run(node.netns, "ip", "address", "add", "192.0.2.7/24", "dev", "eth0")
    run(node.netns, "ip", "link", "set", "eth0", "up")
    eventually(lambda: name not in node.errors())
    assert spec_of(node) == {"bgp": {"ipv4Address": "192.0.2.7/24"}}
    node.kill()
    # an object that is there is kept
    run(node.netns, "ip", "address", "add", "192.0.2.8/24", "dev", "eth0")
    node.address = "192.0.2.8/24"
    node.start()
    node.settle()
    assert spec_of(node) == {"bgp": {"ipv4Address": "192.0.2.7/24"}}
    # one that somebody made without an address gets ours, and nothing else of it changes
    key = Key("Node", node.name)
    given = {"type": "InternalIP", "address": "192.0.2.7"}
    node.put(_node(node.name, bgp={"asNumber": 64513}, addresses=[given]))
    eventually(lambda: "ipv4Address" in spec_of(node)["bgp"])
    assert spec_of(node) == {
        "bgp": {"asNumber": 64513, "ipv4Address": "192.0.2.8/24"},
        "addresses": [given],
    }
    node.put(_node(node.name, bgp={"ipv6Address": "2001:db8::1/64"}))
    node.settle()
    assert spec_of(node) == {"bgp": {"ipv6Address": "2001:db8::1/64"}}
    node.delete(key)
    eventually(lambda: _is_there(node, key))
    assert spec_of(node) == {"bgp": {"ipv4Address": "192.0.2.8/24"}}


def _node(name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": V3, "kind": "Node", "metadata": {"name": name}, "spec": spec}


def _is_there(node: Node, key: Key) -> bool:
    return key in {entry.key for entry in node.store.list(key.kind).entries}


def test_a_pool_without_room_for_tunnels_is_named(node: Node) -> None:
    node.address = "192.0.2.7/24"
    node.put(
        {
            "apiVersion": V3,
            "kind": "IPPool",
            "metadata": {"name": "pods"},
            "spec": {"cidr": "10.0.0.0/16", "vxlanMode": "Always", "allowedUses": ["Workload"]},
        }
    )
    node.start()
    eventually(lambda: "allowedUses" in node.errors().get("Node(node1)", ""))
    assert "vxlan" not in run(node.netns, "ip", "link").stdout


def test_which_address_a_node_has() -> None:
    with fresh_namespace() as namespace:
        for number in (0, 1):
            run(
                namespace, "ip", "link", "add", f"eth{number}", "type", "veth", "peer", f"p{number}"
            )
            run(namespace, "ip", "link", "set", f"eth{number}", "up")
            run(namespace, "ip", "link", "set", f"p{number}", "up")
            run(namespace, "ip", "address", "add", f"192.0.{number}.1/24", "dev", f"eth{number}")

        def address(configured: str | None = None, *known: str) -> str:
            return call_inside(namespace.fd, lambda: node_address(configured, ("cali",), known))

        assert address() == "192.0.0.1/24"
        assert address(None, "203.0.113.1", "192.0.1.1") == "192.0.1.1/24"
        run(namespace, "ip", "route", "add", "default", "via", "192.0.1.254")
        assert address() == "192.0.1.1/24"
        assert address(None, "192.0.0.1") == "192.0.0.1/24"
        assert address("192.0.0.1") == "192.0.0.1/24"
        assert address("203.0.113.1") == "203.0.113.1/32"
        assert address("203.0.113.1/28") == "203.0.113.1/28"
        for wrong in ("here", "192.0.0.1/33", "2001:db8::1"):
            with pytest.raises(AddressError, match=wrong):
                address(wrong)


def test_status_and_a_second_agent(node: Node) -> None:
    node.start()
    status = json.loads(json.dumps(node.status()))
    assert status["node"] == "node1" and status["ready"] and status["in_sync"]
    environment = {
        "PYTHONPATH": str(ROOT),
        "MANX_NODENAME": "node1",
        "MANX_DATASTORE": node.url,
        "MANX_RUN_DIR": str(node.run_dir),
    }
    with inside(node.netns.fd):
        second = subprocess.run(
            [sys.executable, "-m", "felix"],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert second.returncode == 1
    assert "another agent of this node is running" in second.stderr
    assert node.status()["pid"] == status["pid"]


def test_malformed_objects_are_reported_and_the_rest_goes_on(node: Node) -> None:
    node.start()
    web = node.pod("web", "10.0.0.1")
    client = node.pod("client", "10.0.0.2")
    wrong: dict[str, object] = {
        "WorkloadEndpoint": {"metadata": {"name": "x"}, "spec": {"interfaceName": "a b\n-A"}},
        "Pod": {"metadata": 5},
        "IPPool": {"metadata": {"name": "x"}, "spec": {"cidr": "10.0.0.1/24"}},
        "Node": {"metadata": {"name": "x"}, "spec": {"bgp": {"ipv4Address": "nowhere"}}},
        "BlockAffinity": {"metadata": {"name": "x"}, "spec": {}},
        "Namespace": {},
        "FelixConfiguration": {"metadata": {"name": "default"}, "spec": {"vxlanPort": 0}},
        "Tier": {"metadata": {"name": "x"}, "spec": {"order": "first"}},
        "NetworkPolicy": {"metadata": {"name": "x", "namespace": "elsewhere"}, "spec": []},
        "KubernetesNetworkPolicy": {"metadata": {"name": "x"}, "spec": {"podSelector": 3}},
    }
    for kind, value in wrong.items():
        name = "default" if kind == "FelixConfiguration" else "x"
        assert isinstance(value, dict)
        namespace = "elsewhere" if kind in ("NetworkPolicy", "KubernetesNetworkPolicy") else ""
        node.put_raw(Key(kind, name, namespace), value)
    node.put_raw(Key("Tier", "y"), {"spec": [[[]]]})
    node.settle()
    complaints = " ".join(node.errors())
    for kind in wrong:
        assert kind in complaints, kind
    assert "expected 1 to 65535" in node.errors()["FelixConfiguration(default)"]
    with Listener(web.netns, 80):
        assert reaches(client.netns, web.address, 80) == client.address


def test_the_legacy_backend(node: Node) -> None:
    configuration = {
        "apiVersion": V3,
        "kind": "FelixConfiguration",
        "metadata": {"name": "default"},
        "spec": {"iptablesBackend": "Legacy"},
    }
    node.put(configuration)
    rule = {"action": "Allow", "source": {"selector": "app == 'a'"}}
    node.put(policy("p", selector="app == 'web'", types=["Ingress"], ingress=[rule]))
    node.start()
    web = node.pod("web", "10.0.0.1", labels={"app": "web"})
    one, other = node.pod("a", "10.0.0.2", labels={"app": "a"}), node.pod("b", "10.0.0.3")
    node.settle()
    with Listener(web.netns, 80):
        assert reaches(one.netns, web.address, 80) == one.address
        assert is_dropped(other.netns, web.address, 80)
        before = run(node.netns, "iptables-legacy-save").stdout.splitlines()[1:-1]
        # a table that is not wanted is not made by asking for it
        assert "*nat" not in before and "*filter" in before
        node.kill()
        node.start()
        assert is_dropped(other.netns, web.address, 80)
    assert "cali" not in run(node.netns, "iptables-nft-save").stdout
    assert node.errors().keys() == {"Node(node1)"}  # it was given no address


def test_hooks_can_be_appended(node: Node) -> None:
    configuration = {
        "apiVersion": V3,
        "kind": "FelixConfiguration",
        "metadata": {"name": "default"},
        "spec": {"chainInsertMode": "Append"},
    }
    run(node.netns, "iptables", "-A", "FORWARD", "-s", "192.0.2.1", "-j", "ACCEPT")
    node.start()

    def forward() -> list[str]:
        lines = run(node.netns, "iptables", "-S", "FORWARD").stdout.splitlines()
        return ["cali" if "cali-FORWARD" in line else line for line in lines[1:]]

    assert forward() == ["cali", "-A FORWARD -s 192.0.2.1/32 -j ACCEPT"]
    node.put(configuration)
    node.settle()
    assert forward() == ["-A FORWARD -s 192.0.2.1/32 -j ACCEPT", "cali"]


def test_a_chain_that_iptables_refuses_drops_and_the_others_stand() -> None:
    """The set that a policy refers to is missing: the policy drops, nothing else is held up."""
    snapshot, calculator = Snapshot(), Calculator("node1")
    for key, value in _two_policies():
        snapshot.update(key, value)

    def work() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        delta = calculator.calculate(snapshot)
        broken = {key: change for key, change in delta.sets.items() if "s:" in key.id}
        assert broken
        for key in broken:
            del delta.sets[key]
        dataplane = Dataplane(
            IptablesDataplane(calculator.settings, calculator.ruleset.members, "nft")
        )
        try:
            dataplane.want(delta)
            dataplane.read()
            dataplane.apply(0.0)
            complaints = list(dataplane.problems())
            dataplane.want(Delta(sets=broken))
            dataplane.apply(1000.0)
            return complaints, list(dataplane.problems())
        finally:
            dataplane.close()

    with fresh_namespace() as namespace:
        before, after = call_inside(namespace.fd, work)
        assert len(before) == 1 and "doesn't exist" in before[0][1]
        assert after == []
        rules = run(namespace, "iptables", "-S").stdout
        assert rules.count("NetworkPolicy(default/") == 4
        assert "--match-set cali40s:" in rules


def _two_policies() -> Iterator[tuple[Key, dict[str, object]]]:
    endpoint: dict[str, object] = {
        "apiVersion": V3,
        "kind": "WorkloadEndpoint",
        "metadata": {"name": "w", "namespace": "default"},
        "spec": {"node": "node1", "interfaceName": "cali1", "ipNetworks": ["10.0.0.1/32"]},
    }
    yield Key("WorkloadEndpoint", "w", "default"), endpoint
    for name, source in (("plain", {"nets": ["10.0.0.0/8"]}), ("by-set", {"selector": "has(a)"})):
        rule = {"action": "Allow", "source": source}
        made = policy(name, selector="all()", types=["Ingress"], ingress=[rule])
        yield Key("NetworkPolicy", name, "default"), made
