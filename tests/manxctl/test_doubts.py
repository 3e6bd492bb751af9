"""What is allowed and hardly meant is done, with a warning that names the object."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from tests.manxctl.conftest import Run
from tests.manxctl.test_get import put

V3 = "projectcalico.org/v3"


def document(kind: str, name: str, spec: Any) -> str:
    value = {"apiVersion": V3, "kind": kind, "metadata": {"name": name}, "spec": spec}
    return f"---\n{yaml.safe_dump(value)}"


def node(name: str, address: str, **more: str) -> str:
    return document("Node", name, {"bgp": {"ipv4Address": address, **more}})


def test_a_policy_in_a_tier_that_is_not_there(run: Run) -> None:
    policy = document("GlobalNetworkPolicy", "security.all", {"tier": "security"})
    result = run("apply", "-f", "-", stdin=policy)
    assert result.exit_code == 0
    assert result.stdout == "GlobalNetworkPolicy security.all created\n"
    assert result.stderr == (
        "Warning: standard input, document 1: GlobalNetworkPolicy security.all: spec.tier:"
        " 'security': there is no such tier; until there is, the policy stands before all"
        " others, and what it doesn't allow is denied\n"
    )
    with_tier = policy + document("Tier", "security", {"order": 5})
    assert run("apply", "-f", "-", stdin=with_tier).stderr == ""
    assert run("apply", "-f", "-", stdin=policy).stderr == ""
    for tier in ("default", "kube-admin"):
        built_in = document("GlobalNetworkPolicy", f"{tier}.all", {"tier": tier})
        assert run("create", "-f", "-", stdin=built_in).stderr == ""


def test_a_policy_that_is_there_under_its_name_of_older_calico(
    run: Run, store: SqliteDatastore
) -> None:
    """In the tier ``default`` alone, and of Kubernetes' policies none."""
    for name in ("web", "default.db", "plain"):
        put(store, "GlobalNetworkPolicy", name, {})
    put(store, "GlobalNetworkPolicy", "default.other", {"tier": "kube-admin"})
    told = {}
    for name in ("default.web", "db", "plain", "other"):
        policy = document("GlobalNetworkPolicy", name, {"order": 1})
        result = run("apply", "-f", "-", stdin=policy)
        assert result.exit_code == 0
        told[name] = result.stderr
    assert told["plain"] == told["other"] == ""
    assert told["default.web"].startswith(
        "Warning: standard input, document 1: GlobalNetworkPolicy default.web: metadata.name:"
        " 'default.web': there is 'web', too"
    )
    assert "'db': there is 'default.db', too" in told["db"]
    put(store, "NetworkPolicy", "default.api", {}, "shop")
    api = yaml.safe_load(document("NetworkPolicy", "api", {"policyTypes": ["Ingress"]}))
    api["metadata"]["namespace"] = "shop"
    kubernetes = api | {"apiVersion": "networking.k8s.io/v1"}
    kubernetes["spec"] = kubernetes["spec"] | {"podSelector": {}}
    assert run("apply", "-f", "-", stdin=yaml.safe_dump(kubernetes)).stderr == ""
    calico = api | {"spec": {"types": ["Ingress"]}}
    assert "'default.api', too" in run("apply", "-f", "-", stdin=yaml.safe_dump(calico)).stderr
    assert "'db', too" in run("patch", "gnp", "default.db", "-p", "spec: {order: 7}").stderr


def test_a_session_of_a_node_that_is_not_there(run: Run) -> None:
    peer = document("BGPPeer", "tor", {"node": "n1", "peerIP": "192.0.2.1", "asNumber": 65001})
    result = run("create", "-f", "-", stdin=peer)
    assert result.exit_code == 0
    assert "BGPPeer tor: spec.node: 'n1': there is no such node" in result.stderr
    assert "none yet" in result.stderr
    run("apply", "-f", "-", stdin=node("n1", "10.0.0.1/24"))
    assert run("replace", "-f", "-", stdin=peer).stderr == ""
    other = run("patch", "bgppeer", "tor", "-p", "spec: {node: n2}")
    assert other.exit_code == 0
    assert "expected one of n1" in other.stderr


@pytest.mark.parametrize("spelt", ["2001:db8::1/64", "2001:0DB8:0::0001/64"])
def test_two_nodes_with_one_address(run: Run, store: SqliteDatastore, spelt: str) -> None:
    first = node("n1", "10.0.0.1/24", ipv6Address="2001:db8::1/64")
    assert run("apply", "-f", "-", stdin=first).stderr == ""
    assert run("apply", "-f", "-", stdin=first).stderr == ""
    second = run("apply", "-f", "-", stdin=node("n2", "10.0.0.2/16", ipv6Address=spelt))
    assert second.exit_code == 0
    assert "Node n2: spec.bgp.ipv6Address: '2001:db8::1': node n1 has this address" in second.stderr
    assert "ipv4" not in second.stderr
    both = node("n3", "10.0.0.3/24") + node("n4", "10.0.0.3/16")
    assert (
        "Node n4: spec.bgp.ipv4Address: '10.0.0.3': node n3"
        in run("create", "-f", "-", stdin=both).stderr
    )
    # an address that moves is no doubt, nor are broken objects
    store.create(Key("Node", "broken"), {"spec": {"bgp": {"ipv4Address": 5}}})
    put(store, "Node", "worse", ["x"])
    moved = node("n1", "10.0.0.9/24") + node("n2", "10.0.0.1/24")
    assert run("apply", "-f", "-", stdin=moved).stderr == ""


def test_a_pool_over_the_addresses_of_nodes_or_services(run: Run) -> None:
    services = document(
        "BGPConfiguration", "default", {"serviceClusterIPs": [{"cidr": "10.96.0.0/12"}]}
    )
    assert run("apply", "-f", "-", stdin=services).stderr == ""
    pool = document("IPPool", "wide", {"cidr": "10.0.0.0/8"})
    result = run("apply", "-f", "-", stdin=node("n1", "10.1.0.1/24") + pool)
    assert result.exit_code == 0
    assert (
        "IPPool wide: spec.cidr: '10.0.0.0/8': it shares addresses with 10.1.0.0/24, the network"
        " of node n1; packets to those would go to pods" in result.stderr
    )
    assert "10.96.0.0/12, serviceClusterIPs of BGPConfiguration default" in result.stderr
    # the other way round: the pool is there, and a node or a range of services comes
    again = run("apply", "-f", "-", stdin=node("n2", "10.2.0.1/24"))
    assert (
        "Node n2: spec: 10.2.0.0/24, the network of node n2, shares addresses with IPPool wide"
        " (10.0.0.0/8); packets to those would go to pods" in again.stderr
    )
    assert again.stderr.count("Warning") == 1
    again = run("apply", "-f", "-", stdin=services)
    assert "BGPConfiguration default: spec: 10.96.0.0/12, serviceClusterIPs" in again.stderr
    apart = document("IPPool", "apart", {"cidr": "192.168.0.0/16"})
    assert run("create", "-f", "-", stdin=apart).stderr == ""


def test_a_datastore_that_is_being_moved(run: Run) -> None:
    pool = document("IPPool", "pods", {"cidr": "10.0.0.0/16"})
    assert run("create", "-f", "-", stdin=pool).stderr == ""
    run("datastore", "migrate", "lock")
    for command in (
        ("apply", "-f", "-"),
        ("replace", "-f", "-"),
        ("label", "pool", "pods", "a=b"),
        ("patch", "pool", "pods", "-p", "spec: {disabled: true}"),
        ("delete", "pool", "pods"),
        ("create", "-f", "-"),
    ):
        result = run(*command, stdin=pool)
        assert result.exit_code == 0
        assert "Warning: the datastore is locked, because it is being moved" in result.stderr
    run("datastore", "migrate", "unlock")
    assert run("apply", "-f", "-", stdin=pool).stderr == ""
