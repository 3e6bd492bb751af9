"""Nodes on one wire whose felix runs in this process, and pods on them: no agents to wait for.

What an agent does with an update, ``Fabric`` does at once: snapshot, calculation, kernel. All
nodes enforce with the same backend, and live through all that a test does to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from api.net import parse_net
from api.registry import key_parts
from datastore.interface import Key
from felix.addresses import host_addresses
from felix.backends import Backend, make, settle_others
from felix.calculate import Calculator
from felix.dataplane import Dataplane, Enforcer, Members
from felix.iptables_dataplane import IptablesDataplane
from felix.nftables_dataplane import NftablesDataplane
from felix.settings import Settings
from felix.snapshot import Snapshot
from kernel.neighbours import Neighbour, neighbour_replace
from kernel.netlink import NetlinkSocket
from kernel.netns import inside
from tests.felix.world import Node, Pod, cluster
from tests.support.netns import connect, eventually, run
from tests.support.probes import Probe, Prober, Station

MAKERS: dict[str, Callable[[Settings, Members], Enforcer]] = {
    "nftables": NftablesDataplane,
    "iptables": partial(IptablesDataplane, variant="nft"),
    "iptables-legacy": partial(IptablesDataplane, variant="legacy"),
}
# On the wire between the nodes, by node and IP version.
WIRE = tuple({4: f"172.31.0.{number}", 6: f"fd31::{number}"} for number in (1, 2))


class Brain:
    """What decides on a node, and does it."""

    def __init__(self, node: Node, backend: str, stack: ExitStack) -> None:
        self.node = node
        self.snapshot = Snapshot()
        self.calculator = Calculator(node.name)
        self._clock = 0.0
        with inside(node.netns.fd):
            enforcer = MAKERS[backend](self.calculator.settings, self.calculator.ruleset.members)
            self.dataplane = Dataplane(enforcer)
            stack.callback(self.dataplane.close)
            self.dataplane.want(self.calculator.calculate(self.snapshot))
            self.read()
            self.dataplane.apply(self._clock)

    def read(self) -> None:
        """See the interfaces that are there, and whether the kernel holds what was written."""
        with inside(self.node.netns.fd):
            self.calculator.set_host_addresses(host_addresses())
            self.dataplane.read()

    def enforce(self, *, readable: bool = True) -> None:
        """Bring the kernel to what the snapshot says, which can (or can't) be read as a whole."""
        assert bool(self.snapshot.problems) is not readable, self.snapshot.problems
        with inside(self.node.netns.fd):
            self.dataplane.want(self.calculator.calculate(self.snapshot))
            self.apply()
        assert list(self.dataplane.problems()) == []

    def switch(self, backend: Backend) -> None:
        """Another enforcer takes over, and what the others left goes."""
        settings = self.calculator.settings
        with inside(self.node.netns.fd):
            enforcer = make(backend, settings, self.calculator.ruleset.members)
            enforcer.want(self.calculator.ruleset.everything())
            self.dataplane.switch(enforcer)
            self.dataplane.read()
            self.apply()
            assert list(self.dataplane.problems()) == []
            assert settle_others(backend, settings) == []

    def settle(self) -> None:
        """Until nothing has to be tried again."""

        def settled() -> bool:
            with inside(self.node.netns.fd):
                self.apply()
            return self.dataplane.next_retry() is None

        eventually(settled)
        assert list(self.dataplane.problems()) == []

    def apply(self) -> int:
        """Do all that is due, and what failed before; the number of changes."""
        self._clock += 1000.0
        return self.dataplane.apply(self._clock)


class Fabric:
    """Two nodes, their pods, and what all of them know."""

    def __init__(self, backend: str, ports: Sequence[int], stack: ExitStack) -> None:
        self._stack = stack
        self._ports = ports
        self.nodes = stack.enter_context(cluster("node1", "node2"))
        _connect(*self.nodes)
        self.brains = [Brain(node, backend, stack) for node in self.nodes]
        self.pods: list[Pod] = []
        self.stations: list[Station] = []
        self._prober: Prober | None = None

    def pod(self, node: int, namespace: str, name: str, *addresses: str) -> Pod:
        """A pod, plugged and listening, of which the nodes know nothing yet."""
        pod = self.nodes[node].pod(name, addresses[0], namespace=namespace, endpoint=False)
        self._stack.callback(pod.netns.close)
        for address in addresses[1:]:
            pod.add_address(address)
        for address in addresses:
            version = parse_net(address).version
            for other in self.nodes:
                if other is not self.nodes[node]:
                    gateway = WIRE[node][version]
                    run(other.netns, "ip", "route", "replace", address, "via", gateway)
        by_version = {parse_net(address).version: address for address in addresses}
        self.pods.append(pod)
        self.stations.append(Station(pod.netns, by_version, self._ports, self._stack))
        return pod

    def start(self) -> None:
        """All pods are there."""
        for brain in self.brains:
            brain.read()
        self._prober = Prober(self.stations, self.pods[0].node.netns, self._stack)

    def put(self, obj: dict[str, Any]) -> Key:
        """An object as it is now."""
        kind, namespace, name = key_parts(obj)
        key = Key(kind, name, namespace)
        self.update({key: obj})
        return key

    def update(self, changes: Mapping[Key, dict[str, Any] | None]) -> None:
        """Objects as they are now; None: gone."""
        for brain in self.brains:
            for key, value in changes.items():
                brain.snapshot.update(key, value)

    def enforce(self) -> None:
        """Every node does what it was told."""
        for brain in self.brains:
            brain.enforce()

    def arrived(self, probes: Iterable[Probe], expected: Iterable[Probe]) -> set[Probe]:
        """Which of the probes arrive."""
        assert self._prober is not None
        return self._prober.round(probes, set(expected))


def _connect(one: Node, other: Node) -> None:
    """A wire on which nothing has to be resolved."""
    addresses = [
        f"{wire[version]}/{length}" for version, length in ((4, 24), (6, 64)) for wire in WIRE
    ]
    ends = connect(one.netns, "eth0", other.netns, "eth0", addresses)
    for node, own, far, wire in (
        (one, ends[0], ends[1], WIRE[1]),
        (other, ends[1], ends[0], WIRE[0]),
    ):
        with NetlinkSocket(netns_fd=node.netns.fd) as netlink:
            messages = [
                neighbour_replace(Neighbour(own.index, parse_net(address), far.mac, protocol=0))
                for address in wire.values()
            ]
            assert netlink.batch(messages) == []
