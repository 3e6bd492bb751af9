"""The oracle and the kernel agree: drawn policies, real packets between pods of one node.

One dataplane lives through all examples, so what one of them leaves behind would show in the
next.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.net import parse_net
from api.registry import dump
from datastore.interface import Key
from felix.calculate import Calculator
from felix.dataplane import Dataplane, Enforcer, Members
from felix.iptables_dataplane import IptablesDataplane
from felix.nftables_dataplane import NftablesDataplane
from felix.settings import Settings
from felix.snapshot import Snapshot
from kernel.netns import inside
from policy.evaluate import Flow, evaluate
from policy.model import Action, EndpointId, PolicyId
from tests.felix.world import Node, Pod, cluster
from tests.policy import strategies as drawn
from tests.support.netns import run

TCP, UDP, ICMP = socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_ICMP
PORTS = (80, 81, 8005)
PATIENCE = 5.0  # for what must arrive
BACKENDS: dict[str, Callable[[Settings, Members], Enforcer]] = {
    "iptables": partial(IptablesDataplane, variant="nft"),
    "nftables": NftablesDataplane,
}
POLICIES = tuple(id for id in drawn.POLICIES if id.name in "pg")


@dataclass
class Servers:
    """What a pod listens on, and what came."""

    pod: Pod
    tcp: dict[int, socket.socket] = field(default_factory=dict)
    udp: dict[int, socket.socket] = field(default_factory=dict)

    def open(self, stack: ExitStack) -> None:
        for port in (*PORTS, FENCE):
            with inside(self.pod.netns.fd):
                tcp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            for server in (tcp, udp):
                server.bind((self.pod.address, port))
                server.setblocking(False)
            tcp.listen(100)
            self.tcp[port], self.udp[port] = tcp, udp

    def drain(self) -> None:
        """Take the connections that were made, lest the queue be full one day."""
        for server in self.tcp.values():
            with contextlib.suppress(BlockingIOError):
                while True:
                    server.accept()[0].close()


FENCE = 9  # a port on which only the node itself sends


class World:
    """Three pods, and a dataplane in this process."""

    def __init__(self, node: Node, stack: ExitStack, backend: str) -> None:
        self.node = node
        self.snapshot = Snapshot()
        self.calculator = Calculator(node.name)
        for name in drawn.NAMESPACES:
            namespace = {"metadata": {"name": name, "labels": {"team": name}}}
            self.snapshot.update(Key("Namespace", name), namespace)
        delta = self.calculator.calculate(self.snapshot)
        with inside(node.netns.fd):
            enforcer = BACKENDS[backend]
            members = self.calculator.ruleset.members
            self.dataplane = Dataplane(enforcer(self.calculator.settings, members))
            stack.callback(self.dataplane.close)
            self.dataplane.want(delta)
            self.dataplane.read()
        self.clock = 0.0
        self.serial = itertools.count(1)
        self.pods = [
            node.pod(name, address, namespace=namespace, endpoint=False)
            for namespace, name, address in (
                ("red", "a", "10.0.0.1"),
                ("red", "b", "10.0.0.2"),
                ("blue", "a", "10.0.1.1"),
            )
        ]
        self.servers = [Servers(pod) for pod in self.pods]
        for servers in self.servers:
            servers.open(stack)

    def enforce(self) -> None:
        """Bring the kernel to what the snapshot says."""
        with inside(self.node.netns.fd):
            delta = self.calculator.calculate(self.snapshot)
            self.dataplane.want(delta)
            self.clock += 1000.0
            self.dataplane.apply(self.clock)
            self.dataplane.read()
            self.dataplane.apply(self.clock)

    def id(self, pod: Pod) -> EndpointId:
        return EndpointId("WorkloadEndpoint", pod.namespace, pod.key.name)

    def expected(self, probe: Probe) -> bool:
        flow = Flow(
            parse_net(probe.source.address),
            parse_net(probe.target.address),
            probe.protocol,
            40000 if probe.port else None,
            probe.port or None,
            None if probe.port else 8,
            None if probe.port else 0,
            self.id(probe.source),
            self.id(probe.target),
        )
        return evaluate(self.calculator.engine, flow).action is Action.ALLOW


@dataclass(frozen=True)
class Probe:
    source: Pod
    target: Pod
    protocol: int
    port: int  # 0: an echo request


def probes(world: World) -> Iterator[Probe]:
    for source, target in itertools.permutations(world.pods, 2):
        yield Probe(source, target, ICMP, 0)
        for protocol, port in itertools.product((TCP, UDP), PORTS):
            yield Probe(source, target, protocol, port)


class Round:
    """All probes at once, and which of them got through."""

    def __init__(self, world: World, stack: ExitStack) -> None:
        self.world = world
        self.arrived: set[Probe] = set()
        self.clients: dict[socket.socket, Probe] = {}
        self.serials: dict[int, Probe] = {}
        for probe in probes(world):
            self.send(probe, stack)
        for servers in world.servers:
            with inside(world.node.netns.fd):
                fence = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            fence.sendto(b"fence", (servers.pod.address, FENCE))

    def send(self, probe: Probe, stack: ExitStack) -> None:
        kind = {TCP: socket.SOCK_STREAM, UDP: socket.SOCK_DGRAM, ICMP: socket.SOCK_RAW}
        with inside(probe.source.netns.fd):
            client = stack.enter_context(
                socket.socket(
                    socket.AF_INET, kind[probe.protocol], ICMP if probe.protocol == ICMP else 0
                )
            )
        client.setblocking(False)
        serial = next(self.world.serial) & 0xFFFF
        self.serials[serial] = probe
        where = (probe.target.address, probe.port)
        if probe.protocol == TCP:
            self.clients[client] = probe
            client.connect_ex(where)
        elif probe.protocol == UDP:
            client.sendto(serial.to_bytes(2, "big"), where)
        else:
            self.clients[client] = probe
            client.sendto(_echo_request(serial), where)

    def collect(self, expected: set[Probe]) -> set[Probe]:
        """What got through, once all that should has, and the fences, or too long passed."""
        deadline = time.monotonic() + PATIENCE
        fences = {servers.udp[FENCE] for servers in self.world.servers}
        while (fences or not expected <= self.arrived) and time.monotonic() < deadline:
            self.look(fences)
        self.look(fences)
        for servers in self.world.servers:
            servers.drain()
        return self.arrived

    def look(self, fences: set[socket.socket]) -> None:
        udp = [own for servers in self.world.servers for own in servers.udp.values()]
        readers = [c for c, probe in self.clients.items() if probe.protocol == ICMP]
        writers = [c for c, probe in self.clients.items() if probe.protocol == TCP]
        readable, writable, _ = select.select([*udp, *readers], writers, [], 0.005)
        for ready in readable:
            data = ready.recv(2000)
            if data == b"fence":
                fences.discard(ready)
            elif ready in self.clients:
                # behind the IP header, an echo reply: to one of the requests of this pod
                if data[20] == 0:
                    self.arrived.add(self.serials[int.from_bytes(data[24:26], "big")])
            else:
                self.arrived.add(self.serials[int.from_bytes(data[:2], "big")])
        for ready in writable:
            probe = self.clients.pop(ready)
            assert ready.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            self.arrived.add(probe)


def _echo_request(serial: int) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, serial, 1)
    total = sum(struct.unpack("!4H", body))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBHHH", 8, 0, ~total & 0xFFFF, serial, 1)


@pytest.fixture(scope="module", params=BACKENDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with cluster("node1") as (node,), ExitStack() as stack:
        run(node.netns, "ip", "address", "add", "172.31.1.11/32", "dev", "lo")
        yield World(node, stack, request.param)


@st.composite
def changes(draw: st.DrawFn) -> dict[Any, Any]:
    """Labels of pods, and for some policies a new value or (None) their end."""
    pods = st.dictionaries(
        st.sampled_from(["app", "tier"]), st.sampled_from(["web", "db", "x"]), max_size=2
    )
    made: dict[Any, Any] = {number: draw(pods) for number in range(3)}
    for id in POLICIES:
        if draw(st.integers(0, 2)):
            made[id] = draw(st.none() | drawn.policies(id))
    for tier in ("first", "second"):
        made[tier] = draw(st.none() | drawn.tiers(tier))
    return made


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(changes())
def test_the_kernel_does_what_the_oracle_says(world: World, drawn_changes: dict[Any, Any]) -> None:
    for what, value in drawn_changes.items():
        if isinstance(what, int):
            pod = world.pods[what]
            ports = [{"name": "http", "protocol": "TCP", "port": 80}]
            endpoint = pod.endpoint(
                labels=value, profiles=[f"kns.{pod.namespace}"], ports=ports if what else []
            )
            world.snapshot.update(pod.key, endpoint)
        elif isinstance(what, PolicyId):
            key = Key(what.kind, what.name, what.namespace)
            world.snapshot.update(key, None if value is None else dump(value) | {"kind": what.kind})
        else:
            world.snapshot.update(Key("Tier", what), None if value is None else dump(value))
    assert not world.snapshot.problems
    world.enforce()
    assert list(world.dataplane.problems()) == []
    expected = {probe for probe in probes(world) if world.expected(probe)}
    with ExitStack() as stack:
        assert Round(world, stack).collect(expected) == expected
