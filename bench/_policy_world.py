"""A node with felix on it, two pods, and so many policies, of which the last lets them talk.

Policies are as people write them: they allow, from or to what a selector or a network says, on a
port or on any. Besides the two pods the cluster has a thousand on other nodes, which the
selectors find.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from api.net import parse_net
from datastore.interface import Key
from kernel import sysctl
from kernel.links import link_up
from kernel.netlink import NetlinkSocket
from kernel.netns import inside
from kernel.routes import Hop, Route, route_add
from tests.felix.world import Node, Pod, cluster, global_policy

PORT = 9000
CLIENT, SERVER = "10.0.0.2", "10.0.0.3"

_APPS = 500
_ELSEWHERE = 1000  # endpoints
_LAST = 1_000_000  # order of the policy that allows


@dataclass(frozen=True, slots=True)
class World:
    """``policies`` are in the cluster, ``selecting`` of them select both pods."""

    policies: int
    selecting: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where packets go from one pod to another."""

    client: Pod
    server: Pod
    node: Node


@contextlib.contextmanager
def filled(world: World, *, iptables: bool = False) -> Iterator[Node]:
    """A node whose store holds the world; nothing runs on it."""
    with cluster("bench", addresses=("198.51.100.1/24",), iptables=iptables) as (node,):
        for number in range(_ELSEWHERE if world.policies else 0):
            node.put(elsewhere(number))
        for number in range(world.policies):
            node.put(policy(world, number))
        yield node


@contextlib.contextmanager
def place(world: World, *, iptables: bool = False, felix: bool = True) -> Iterator[Place]:
    """The world, enforced."""
    with filled(world, iptables=iptables) as node:
        pods = [node.pod(name, address, labels={"app": "app-0"}) for name, address in _PODS]
        try:
            if felix:
                node.start()
            else:
                _route(node, pods)
            yield Place(pods[0], pods[1], node)
        finally:
            for pod in pods:
                pod.netns.close()


_PODS = (("client", CLIENT), ("server", SERVER))


def _route(node: Node, pods: Sequence[Pod]) -> None:
    """What felix does besides policy."""
    with inside(node.netns.fd), NetlinkSocket() as netlink:
        sysctl.write(("net", "ipv4", "ip_forward"), 1)
        routes = [route_add(Route(parse_net(pod.address), (Hop(pod.index),))) for pod in pods]
        if failures := netlink.batch([*(link_up(pod.index) for pod in pods), *routes]):
            raise OSError(failures[0].errno, failures[0].message)


def policy(world: World, number: int, *, allow: bool = True) -> dict[str, Any]:
    """The policy of a number. Those up to ``selecting`` select the pods, of these the last allows.

    Not ``allow``: that one does not either.
    """
    last = number == world.selecting - 1
    everybody = world.selecting == world.policies
    app = "all()" if everybody else f"app == 'app-{number // world.selecting}'"
    peer = f"app == 'app-{1 + number % (_APPS - 1)}'"
    own: dict[str, Any]
    ports: dict[str, Any] = {"ports": [10_000 + number % 20_000]}
    match "last" if last else number % 4:
        case "last":
            own, ports = {"selector": "app == 'app-0'"}, {"ports": [PORT if allow else PORT + 1]}
        case 0:
            own = {"selector": peer}
        case 1:
            own, ports = {"selector": peer}, {}
        case 2:
            own = {"nets": [f"192.0.{2 + number // 64 % 64}.{number * 4 % 256}/30"]}
        case _:
            own = {}
    return global_policy(
        f"policy-{number:05}",
        order=_LAST if last else number,
        selector=app,
        types=["Ingress", "Egress"],
        ingress=[_rule(protocol, own, ports) for protocol in ("TCP", "UDP")],
        egress=[_rule(protocol, {}, own | ports) for protocol in ("TCP", "UDP")],
    )


def policy_key(number: int) -> Key:
    """Where the policy of a number is in the store."""
    return Key("GlobalNetworkPolicy", f"policy-{number:05}")


def _rule(protocol: str, source: dict[str, Any], destination: dict[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {"action": "Allow", "protocol": protocol}
    if source:
        rule["source"] = source
    if destination:
        rule["destination"] = destination
    return rule


def elsewhere(number: int) -> dict[str, Any]:
    """The endpoint of a pod on another node."""
    labels = {"app": f"app-{number % _APPS}"}
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": "WorkloadEndpoint",
        "metadata": {
            "name": f"elsewhere-k8s-pod{number}-eth0",
            "namespace": "default",
            "labels": {**labels, "projectcalico.org/namespace": "default"},
        },
        "spec": {
            "orchestrator": "k8s",
            "node": "elsewhere",
            "pod": f"pod{number}",
            "endpoint": "eth0",
            "interfaceName": f"cali{number:011x}",
            "ipNetworks": [f"10.1.{number // 250}.{1 + number % 250}/32"],
        },
    }
