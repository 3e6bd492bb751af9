"""Kubernetes NetworkPolicy end to end: conversion, engine and verdict against truth tables.

Two suites as recorded: cyclonus, and the tables of kube-network-policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from api.net import parse_net
from policy.evaluate import Flow, evaluate
from policy.model import Action, Endpoint, NamedPort
from tests.policy.world import PROTOCOLS, World, endpoint
from tests.support import vectors

PARTS = 8


class Cluster(World):
    """Follows the recorded states step by step, setting only what is different."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {"namespaces": {}, "pods": [], "policies": []}

    def become(self, state: dict[str, Any]) -> None:
        for name in self.state["namespaces"].keys() - state["namespaces"].keys():
            self.engine.set_profile(f"kns.{name}", None)
        for name, own in state["namespaces"].items():
            if self.state["namespaces"].get(name) != own:
                self.namespace(name, own)
        before, after = pods(self.state), pods(state)
        for id in before.keys() - after.keys():
            self.engine.set_endpoint(None, id)
        self.add(*(pod for id, pod in after.items() if before.get(id) != pod))
        before, after = policies(self.state), policies(state)
        for id in before.keys() - after.keys():
            self.engine.set_policy(id, None)
        for id, obj in after.items():
            if before.get(id) != obj:
                self.kubernetes_policy(obj)
        self.flush()
        self.state = state


def pods(state: dict[str, Any]) -> dict[Any, Any]:
    endpoints = [pod(obj) for obj in state["pods"]]
    return {endpoint.id: endpoint for endpoint in endpoints}


def pod(obj: dict[str, Any]) -> Endpoint:
    ports = tuple(NamedPort(p["name"], PROTOCOLS[p["protocol"]], p["port"]) for p in obj["ports"])
    return endpoint(
        obj["name"], *obj["ips"], namespace=obj["namespace"], own=obj["labels"], ports=ports
    )


def policies(state: dict[str, Any]) -> dict[Any, Any]:
    found = {}
    for obj in state["policies"]:
        namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
        found["KubernetesNetworkPolicy", namespace, name.lower()] = acceptable(obj)
    return found


def acceptable(obj: dict[str, Any]) -> dict[str, Any]:
    """Some recorded names and end ports are none that Kubernetes would accept."""
    rules = {
        direction: [
            {
                **rule,
                "ports": [
                    {**port, "endPort": min(port["endPort"], 65535)} if "endPort" in port else port
                    for port in rule.get("ports") or []
                ],
            }
            for rule in obj["spec"].get(direction) or []
        ]
        for direction in ("ingress", "egress")
    }
    metadata = {**obj["metadata"], "name": obj["metadata"]["name"].lower()}
    return {**obj, "metadata": metadata, "spec": {**obj["spec"], **rules}}


def mark(cluster: Cluster, flow: Flow) -> str:
    return "." if evaluate(cluster.engine, flow).action is Action.ALLOW else "X"


@pytest.mark.cyclonus
@pytest.mark.parametrize("part", range(PARTS))
def test_cyclonus(part: int) -> None:
    for case in vectors.load("netpol")["cyclonus"][part::PARTS]:
        cluster = Cluster()
        for step in case["steps"]:
            cluster.become(step["state"])
            ends = list(pods(step["state"]).values())
            for target, expected in step["expected"].items():
                protocol, port = target.split("/")
                tables = {half: list(table) for half, table in expected.items()}
                assert tables == truth(cluster, ends, PROTOCOLS[protocol], int(port)), (
                    case["id"],
                    target,
                )


def truth(cluster: Cluster, ends: list[Endpoint], protocol: int, port: int) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {"combined": [], "egress": [], "ingress": []}
    for source in ends:
        rows = dict.fromkeys(table, "")
        for destination in ends:
            if source is destination:
                rows = {half: row + "-" for half, row in rows.items()}
                continue
            for half, src, dst in (
                ("egress", source.id, None),
                ("ingress", None, destination.id),
                ("combined", source.id, destination.id),
            ):
                flow = Flow(
                    source.nets[0],
                    destination.nets[0],
                    protocol,
                    src_port=40000,
                    dst_port=port,
                    src_endpoint=src,
                    dst_endpoint=dst,
                )
                rows[half] += mark(cluster, flow)
        for half, row in rows.items():
            table[half].append(row)
    return table


def kube_network_policies(section: str) -> Iterator[dict[str, Any]]:
    cases = vectors.load("netpol")["knp"][section]
    # Disputed: a peer with nothing in it, which the API refuses; `ingress: []`, which allows
    # nothing (test_tricky_15 says why).
    return (case for case in cases if "disputed" not in case)


def test_kube_network_policies_packets() -> None:
    for case in kube_network_policies("packet"):
        cluster, probe = Cluster(), case["probe"]
        cluster.become(case["state"])
        by_address = {e.nets[0]: e.id for e in pods(case["state"]).values()}
        src, dst = parse_net(probe["src_ip"]), parse_net(probe["dst_ip"])
        flow = Flow(
            src,
            dst,
            PROTOCOLS[probe["protocol"]],
            probe["src_port"],
            probe["dst_port"],
            src_endpoint=by_address.get(src),
            dst_endpoint=by_address.get(dst),
        )
        assert mark(cluster, flow) == (".X"[not case["expected"]]), case["id"]


def one_policy(namespaces: dict[str, Any], ends: list[Any], **spec: Any) -> Cluster:
    """A policy ``p`` in the namespace of the last pod, for all its pods."""
    cluster = Cluster()
    metadata = {"name": "p", "namespace": ends[-1]["namespace"]}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": {"podSelector": {}, **spec},
    }
    cluster.become({"namespaces": namespaces, "pods": ends, "policies": [policy]})
    return cluster


def an_end(name: str, address: str, namespace: str = "ns1") -> dict[str, Any]:
    return {"name": name, "namespace": namespace, "ips": [address], "labels": {}, "ports": []}


def test_kube_network_policies_ip_blocks() -> None:
    for case in kube_network_policies("ipblocks"):
        target = an_end("target", "10.9.9.9")
        cidr, exceptions = case["ipBlock"]["cidr"], case["ipBlock"].get("except", [])
        # Exceptions outside, which exclude nothing, are what Kubernetes refuses.
        inside = [text for text in exceptions if parse_net(cidr).contains(parse_net(text))]
        ingress = [{"from": [{"ipBlock": {"cidr": cidr, "except": inside}}]}]
        cluster = one_policy({"ns1": {}}, [target], policyTypes=["Ingress"], ingress=ingress)
        flow = Flow(parse_net(case["ip"]), parse_net("10.9.9.9"), 6, 40000, 80)
        flow = replace(flow, dst_endpoint=pod(target).id)
        assert mark(cluster, flow) == ".X"[not case["expected"]], case["id"]


def test_kube_network_policies_ports() -> None:
    for case in kube_network_policies("ports"):
        target = {**an_end("target", "10.9.9.9"), **(case["pod"] or {})}
        address = target["ips"][0]
        ingress = [{"ports": case["ports"]}]
        cluster = one_policy(
            {target["namespace"]: {}}, [target], policyTypes=["Ingress"], ingress=ingress
        )
        protocol = PROTOCOLS[case["protocol"] or "TCP"]
        flow = Flow(parse_net("10.1.1.1"), parse_net(address), protocol, 40000, case["port"])
        flow = replace(flow, dst_endpoint=pod(target).id)
        assert mark(cluster, flow) == ".X"[not case["expected"]], case["id"]


def test_kube_network_policies_selectors() -> None:
    for case in kube_network_policies("selectors"):
        peer = {
            field: case[field]
            for field in ("podSelector", "namespaceSelector")
            if case[field] is not None
        }
        source = {**case["pod"], "ips": ["10.1.1.1"]}
        target = an_end("target", "10.9.9.9", case["policy_namespace"])
        namespaces = {
            case["policy_namespace"]: {},
            source["namespace"]: case["namespace_labels"],
        }
        ingress = [{"from": [peer]}]
        ends = [source, target]
        cluster = one_policy(namespaces, ends, policyTypes=["Ingress"], ingress=ingress)
        flow = Flow(parse_net("10.1.1.1"), parse_net("10.9.9.9"), 6, 40000, 80)
        flow = replace(flow, dst_endpoint=pod(target).id)
        assert mark(cluster, flow) == ".X"[not case["expected"]], case["id"]
