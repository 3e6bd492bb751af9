"""A node between two networks, with three pods: where every kind of policy meets packets.

Packets go between pods, from and to the node itself, and through it, from one network to the
other and to the pods; those for a port of the node are sent on to a pod by destination NAT.
felix runs in this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from api.net import parse_net
from datastore.interface import JSON, Key
from kernel.neighbours import Neighbour, neighbour_replace
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from tests.felix.fabric import Brain
from tests.felix.oracle import ENDS, TRANSLATED, VERSIONS, Oracle
from tests.felix.world import Node, Pod, cluster
from tests.policy.objects import ADDRESSES, OUTSIDE, PODS, PORTS
from tests.support.netns import connect, fresh_namespace, run
from tests.support.probes import Prober, Station


class Crossroads:
    """The node, what is around it, and what it was told. ``ends`` are as the oracle counts."""

    def __init__(self, backend: str, stack: ExitStack) -> None:
        (self.node,) = stack.enter_context(cluster("node1"))
        outside = {name: stack.enter_context(fresh_namespace()) for name in OUTSIDE}
        for name, netns in outside.items():
            _attach(self.node, name, netns)
        self.brain = Brain(self.node, backend, stack)
        self.told: dict[Key, JSON] = {}
        self.pods = [self._pod(*pod, stack) for pod in PODS]
        self.brain.read()
        _translate(self.node)
        self.ends = [*(pod.netns for pod in self.pods), self.node.netns, *outside.values()]

    def _pod(self, namespace: str, name: str, stack: ExitStack) -> Pod:
        addresses = ADDRESSES[namespace, name]
        pod = self.node.pod(name, addresses[4], namespace=namespace, endpoint=False)
        stack.callback(pod.netns.close)
        pod.add_address(addresses[6])
        return pod

    def become(self, world: Mapping[Key, JSON]) -> None:
        """These are all the objects there are."""
        now = dict(self.objects(world))
        changes: dict[Key, JSON | None] = {
            key: obj for key, obj in now.items() if self.told.get(key) != obj
        }
        changes |= dict.fromkeys(self.told.keys() - now.keys())
        for key, obj in changes.items():
            self.brain.snapshot.update(key, obj)
        self.told = now
        self.brain.enforce()

    def objects(self, world: Mapping[Key, JSON]) -> Iterator[tuple[Key, JSON]]:
        """With endpoints in full."""
        for key, obj in world.items():
            if key.kind != "WorkloadEndpoint":
                yield key, obj
                continue
            pod = self.pods[PODS.index((key.namespace, key.name))]
            yield pod.key, _endpoint(pod, obj["spec"])

    @property
    def oracle(self) -> Oracle:
        """What is to happen to packets now."""
        return Oracle(self.brain.calculator.engine, self.told)

    def prober(self, stack: ExitStack) -> Prober:
        """Sends probes between the ends."""
        stations = [
            Station(netns, addresses, PORTS, stack)
            for netns, addresses in zip(self.ends, ENDS, strict=True)
        ]
        return Prober(stations, self.node.netns, stack)


def _endpoint(pod: Pod, drawn: dict[str, Any]) -> JSON:
    """A pod's endpoint as the CNI plugin writes it."""
    profiles = [f"kns.{pod.namespace}"]
    spec: dict[str, Any] = {"ports": drawn["ports"], "profiles": profiles}
    if drawn["account"]:
        spec["serviceAccountName"] = drawn["account"]
        profiles.append(f"ksa.{pod.namespace}.{drawn['account']}")
    networks = [str(parse_net(text)) for text in ADDRESSES[pod.namespace, pod.name].values()]
    return pod.endpoint(labels=drawn["labels"], ipNetworks=networks, **spec)


def _attach(node: Node, name: str, netns: Namespace) -> None:
    """A network behind an interface of the node, on which nothing has to be resolved."""
    here, there = OUTSIDE[name]
    addresses = [
        f"{end[version]}/{length}"
        for version, length in ((4, 24), (6, 64))
        for end in (here, there)
    ]
    near, far = connect(node.netns, name, netns, "eth0", addresses)
    for own, link, other, to in ((node.netns, near, far, there), (netns, far, near, here)):
        with NetlinkSocket(netns_fd=own.fd) as netlink:
            messages = [
                neighbour_replace(Neighbour(link.index, parse_net(text), other.mac, protocol=0))
                for text in to.values()
            ]
            assert netlink.batch(messages) == []
    for version in VERSIONS:
        run(netns, "ip", f"-{version}", "route", "add", "default", "via", here[version])


def _translate(node: Node) -> None:
    """What kube-proxy does for a service, in a table of its own."""
    for version, family in ((4, "ip"), (6, "ip6")):
        own, target = OUTSIDE["eth0"][0][version], ADDRESSES[PODS[0]][version]
        to = f"{target}:80" if version == 4 else f"[{target}]:80"
        rules = "\n".join(
            f"{family} daddr {own} {protocol} dport {TRANSLATED} dnat to {to}"
            for protocol in ("tcp", "udp")
        )
        chain = f"chain c {{\ntype nat hook prerouting priority dstnat;\n{rules}\n}}"
        run(node.netns, "nft", "-f", "-", stdin=f"table {family} service {{\n{chain}\n}}")
