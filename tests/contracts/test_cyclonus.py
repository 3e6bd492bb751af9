"""Every step of the cyclonus suite as packets: nine pods on two nodes, on each enforcer.

What ``tests/policy/test_netpol.py`` holds the oracle to, the kernel is held to here: TCP
handshakes, UDP packets, and the first packets of SCTP associations, between all pairs of pods
on all probed ports. One cluster lives through all cases, so what a case leaves behind would
show in the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from api.net import parse_net
from datastore.interface import Key
from tests.felix.fabric import MAKERS, Fabric
from tests.felix.world import Pod
from tests.policy.test_netpol import acceptable
from tests.support import vectors
from tests.support.probes import SCTP, TCP, UDP, Probe

pytestmark = pytest.mark.timeout(300)  # a busy machine needs minutes

PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
PORTS = (80, 81)


class Cluster:
    """The pods of all cases, and what the nodes were told of them."""

    def __init__(self, backend: str, cases: list[dict[str, Any]], stack: ExitStack) -> None:
        self.fabric = Fabric(backend, PORTS, stack)
        self.told: dict[Key, dict[str, Any]] = {}
        self.pods: dict[tuple[str, str, str], int] = {}
        states = (step["state"] for case in cases for step in case["steps"])
        for obj in itertools.chain.from_iterable(state["pods"] for state in states):
            end = obj["namespace"], obj["name"], obj["ips"][0]
            if end not in self.pods:
                self.pods[end] = len(self.pods)
                # Two have the same address, one after the other: on the same node.
                self.fabric.pod(parse_net(end[2]).address % 2, *end)
        self.fabric.start()

    def become(self, state: dict[str, Any]) -> None:
        """Tell the nodes what is different."""
        now = dict(self.objects(state))
        changes: dict[Key, dict[str, Any] | None] = {
            key: obj for key, obj in now.items() if self.told.get(key) != obj
        }
        changes |= dict.fromkeys(self.told.keys() - now.keys())
        self.fabric.update(changes)
        self.fabric.enforce()
        self.told = now

    def objects(self, state: dict[str, Any]) -> Iterator[tuple[Key, dict[str, Any]]]:
        for name, labels in state["namespaces"].items():
            yield Key("Namespace", name), {"metadata": {"name": name, "labels": labels}}
        for obj in state["pods"]:
            pod = self.pod(obj)
            yield pod.key, pod.endpoint(labels=obj["labels"], ports=obj["ports"])
        for obj in state["policies"]:
            policy = acceptable(obj)
            name, namespace = policy["metadata"]["name"], policy["metadata"]["namespace"]
            yield Key("KubernetesNetworkPolicy", name, namespace), policy

    def number(self, obj: dict[str, Any]) -> int:
        return self.pods[obj["namespace"], obj["name"], obj["ips"][0]]

    def pod(self, obj: dict[str, Any]) -> Pod:
        return self.fabric.pods[self.number(obj)]

    def verdicts(self, step: dict[str, Any]) -> dict[Probe, bool]:
        """What the suite says of each packet."""
        numbers = [self.number(obj) for obj in step["state"]["pods"]]
        verdicts = {}
        for target, expected in step["expected"].items():
            protocol, port = target.split("/")
            for source, row in zip(numbers, expected["combined"], strict=True):
                for destination, mark in zip(numbers, row, strict=True):
                    if mark != "-":
                        probe = Probe(source, destination, PROTOCOLS[protocol], int(port))
                        verdicts[probe] = mark == "."
        return verdicts


@pytest.mark.slow
@pytest.mark.cyclonus
@pytest.mark.parametrize("backend", MAKERS)
def test_cyclonus(backend: str) -> None:
    cases = vectors.load("netpol")["cyclonus"]
    with ExitStack() as stack:
        cluster = Cluster(backend, cases, stack)
        for case in cases:
            for step in case["steps"]:
                cluster.become(step["state"])
                verdicts = cluster.verdicts(step)
                allowed = {probe for probe, passes in verdicts.items() if passes}
                assert cluster.fabric.arrived(verdicts, allowed) == allowed, case["id"]
