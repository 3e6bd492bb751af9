"""Running connections when policy changes: what it forbids ends, all else goes on.

Proved with packets, in both IP versions, on all enforcers: to pods and from them, to the host and
through it, translated and not. ``Peer`` is a connection that both ends go on sending on.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from api.net import parse_net
from api.registry import key_parts
from datastore.interface import JSON, Key
from felix.conntrack import Connections, ends_forbidden
from felix.conntrack_lister import Lister, Listing
from felix.settings import FORBIDDEN_FLOWS
from kernel.conntrack import Conntrack
from kernel.conntrack import Flow as ConntrackFlow
from kernel.netns import Namespace, inside
from tests.felix.gateway import FAR, NEAR, NODE, POD, Gateway
from tests.felix.world import (
    V3,
    Node,
    Pod,
    cluster,
    felix_configuration,
    global_policy,
    policy,
)
from tests.support.netns import eventually, run

INGRESS, EGRESS = ["Ingress"], ["Egress"]
QUIET = 0.3  # s without a packet: none comes any more
ON_ITS_WAY = 2.0  # s, that a packet may wait in queues of a busy machine
PORT = 7000
SERVICE = {4: "10.96.0.1", 6: "fd96::1"}
FLOATING = {4: "10.99.0.1", 6: "fd99::1"}


class Watched(Gateway):
    """The gateway, whose connections are looked after as the agent does."""

    def __init__(self, backend: str, stack: ExitStack) -> None:
        super().__init__(backend, stack)
        self.woken = threading.Event()
        with inside(self.node.netns.fd):
            self.connections = Connections(self.brain.calculator, self.woken.set)
        stack.callback(self.connections.close)
        self.clock = 0.0
        self.settle()

    def enforce(self, *objects: JSON, readable: bool = True) -> None:
        for obj in objects:
            kind, namespace, name = key_parts(obj)
            self.put[Key(kind, name, namespace)] = None
            self.brain.snapshot.update(Key(kind, name, namespace), obj)
        brain = self.brain
        assert bool(brain.snapshot.problems) is not readable, brain.snapshot.problems
        with inside(self.node.netns.fd):
            delta = brain.calculator.calculate(brain.snapshot)
            self.connections.note(delta)
            brain.dataplane.want(delta)
            brain.apply()
            self.connections.forget()
        assert list(brain.dataplane.problems()) == []
        self.settle()

    def remove(self, *objects: JSON) -> None:
        """These are gone."""
        for obj in objects:
            kind, namespace, name = key_parts(obj)
            self.brain.snapshot.update(Key(kind, name, namespace), None)
        self.enforce()

    def settle(self) -> None:
        """Until all flows that a change concerned were looked at."""
        with inside(self.node.netns.fd):
            while self.connections.reviewing:
                self.clock += 1000.0
                self.review(self.clock)
        assert list(self.connections.problems()) == []

    def review(self, later: float = 1e6) -> None:
        """Look at flows, as soon as there are some to be looked at."""
        if self.connections.next_due() is None:
            assert self.woken.wait(60), "nobody lists flows"
        self.woken.clear()
        self.connections.forget()
        self.connections.review(time.monotonic() + later, in_force=True)

    def clean(self) -> None:
        for key in self.put:
            self.brain.snapshot.update(key, None)
        self.put.clear()
        self.enforce()

    def flows(self, address: str) -> int:
        """How many flows an address has."""
        with Conntrack(netns_fd=self.node.netns.fd) as conntrack:
            net = parse_net(address)
            return len(list(conntrack.flows(net.version, {net.packed()})))


class Peer:
    """A TCP connection, or an exchange of UDP, on which the client sends and the server answers.

    With ``pushes`` it is the server who goes on sending, and the client says nothing.
    """

    def __init__(
        self, client: Namespace, server: Namespace, address: str, *, kind: int, pushes: bool = False
    ) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.kind = kind
        port = next(_ports)
        with inside(server.fd):
            listener = socket.socket(family, kind)
        with inside(client.fd):
            self.client = socket.socket(family, kind)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(("", port if address not in SERVICE.values() else PORT))
        target = (address, 80 if address in SERVICE.values() else port)
        if kind == socket.SOCK_STREAM:
            listener.listen()
            self.client.settimeout(60)
            self.client.connect(target)
            self.server = listener.accept()[0]
            listener.close()
        else:
            self.server = listener
            self.client.connect(target)
            eventually(self._is_heard)  # an interface just plugged loses some
            _, back = self.server.recvfrom(10)
            self.server.connect(back)
            self.server.send(b"hello")
            assert self.client.recv(10) == b"hello"
        self._pushes = pushes
        for end in (self.client, self.server):
            end.setblocking(False)
        self.sent = self.received = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        eventually(lambda: self.received > 5)

    def _is_heard(self) -> bool:
        self.client.send(b"hello")
        return bool(select.select([self.server], [], [], 0.1)[0])

    def _run(self) -> None:
        sender, other = (self.server, self.client) if self._pushes else (self.client, self.server)
        while not self._ended.wait(0.005):
            with contextlib.suppress(OSError):
                sender.send(b"x")
                self.sent += 1
            with contextlib.suppress(OSError):
                if other.recv(10_000):
                    if self._pushes:
                        self.received += 1
                    else:
                        other.send(b"y")
            if not self._pushes:
                with contextlib.suppress(OSError):
                    self.received += bool(sender.recv(10_000))

    def lost(self) -> int:
        """How many packets of UDP found no answer. Ends the exchange."""
        assert not self._pushes
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(AssertionError):
            eventually(self._is_answered)
        return max(0, self.sent - self.received)

    def _is_answered(self) -> bool:
        with contextlib.suppress(OSError):
            while True:
                self.server.recv(100)
                self.server.send(b"y")
        with contextlib.suppress(OSError):
            while True:
                self.received += bool(self.client.recv(100))
        return self.received >= self.sent

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self.client.close()
        self.server.close()


_ports = iter(range(20000, 30000))
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def made(request: pytest.FixtureRequest) -> Iterator[Watched]:
    with ExitStack() as stack:
        yield Watched(request.param, stack)


@pytest.fixture
def world(made: Watched) -> Iterator[Watched]:
    yield made
    made.clean()


Connect = Callable[..., list[Peer]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connections of both kinds in both IP versions."""
    with ExitStack() as stack:

        def connect(
            client: Namespace,
            server: Namespace,
            addresses: dict[int, str],
            *,
            pushes: bool = False,
            kinds: tuple[str, ...] = ("tcp", "udp"),
        ) -> list[Peer]:
            peers = []
            for address in addresses.values():
                for kind in kinds:
                    peer = Peer(client, server, address, kind=KINDS[kind], pushes=pushes)
                    stack.callback(peer.close)
                    peers.append(peer)
            return peers

        yield connect


def all_live(peers: list[Peer]) -> bool:
    """Whether something more arrives on each."""
    before = [peer.received for peer in peers]
    with contextlib.suppress(AssertionError):
        eventually(lambda: all(p.received > n + 3 for p, n in zip(peers, before, strict=True)))
    return all(peer.received > number + 3 for peer, number in zip(peers, before, strict=True))


def all_silent(peers: list[Peer]) -> bool:
    """Whether nothing more arrives on any, once what was on its way is there."""
    deadline = time.monotonic() + ON_ITS_WAY
    while not nothing_arrives(peers):
        if time.monotonic() > deadline:
            return False
    return True


def nothing_arrives(peers: list[Peer]) -> bool:
    """Whether nothing does for as long as QUIET, and while each sends ten times, if it can."""
    before, sent = [peer.received for peer in peers], [peer.sent for peer in peers]
    began = time.monotonic()
    while [peer.received for peer in peers] == before:
        waited = time.monotonic() - began
        has_sent = all(p.sent >= n + 10 for p, n in zip(peers, sent, strict=True))
        if waited > 2 or (waited > QUIET and has_sent):
            return True
        time.sleep(0.01)
    return False


def deny(name: str, types: list[str], *nets: str, **spec: Any) -> JSON:
    """Nothing from these networks (ingress), or to them (egress); all else."""
    ingress = types == INGRESS
    side = "source" if ingress else "destination"
    rules = [*({"action": "Deny", side: {"nets": [net]}} for net in nets), {"action": "Allow"}]
    spec = {"selector": "all()", **spec}
    return global_policy(name, types=types, **{"ingress" if ingress else "egress": rules}, **spec)


def nets(addresses: dict[int, str]) -> list[str]:
    return [str(parse_net(address)) for address in addresses.values()]


def test_what_a_new_policy_forbids_ends_and_what_it_allows_goes_on(
    world: Watched, connect: Connect
) -> None:
    ended = connect(world.near, world.pod.netns, POD)
    going_on = connect(world.far, world.pod.netns, POD)
    pushing = connect(world.far, world.pod.netns, POD, pushes=True)
    for order in range(5):
        world.enforce(deny("no-near", INGRESS, *nets(NEAR), order=order))
    assert all_silent(ended)
    assert all_live(going_on + pushing)
    assert [peer.lost() for peer in going_on if peer.kind == socket.SOCK_DGRAM] == [0, 0]


def test_a_server_that_goes_on_sending_ends_too(world: Watched, connect: Connect) -> None:
    pushing = connect(world.near, world.pod.netns, POD, pushes=True, kinds=("tcp",))
    policy = deny("no-near", INGRESS, *nets(NEAR))
    world.enforce(policy)
    assert all_silent(pushing)
    assert "calico-ended" in run(world.node.netns, "nft", "list", "tables").stdout
    world.enforce(deny("other", INGRESS, "192.0.2.0/24"))
    assert all_silent(pushing)
    world.remove(policy)
    assert "calico-ended" not in run(world.node.netns, "nft", "list", "tables").stdout
    assert all_live(pushing), "TCP sends again what was lost"


def test_an_egress_policy_ends_what_it_forbids(world: Watched, connect: Connect) -> None:
    ended = connect(world.pod.netns, world.near, NEAR)
    pushing = connect(world.pod.netns, world.near, NEAR, pushes=True, kinds=("tcp",))
    going_on = connect(world.pod.netns, world.far, FAR)
    world.enforce(deny("no-near", EGRESS, *nets(NEAR)))
    assert all_silent(ended + pushing)
    assert all_live(going_on)


def test_the_end_of_a_policy_that_allowed_ends_what_it_allowed(
    world: Watched, connect: Connect
) -> None:
    near, far = (
        [{"action": "Allow", "source": {"nets": [net]}} for net in nets(each)]
        for each in (NEAR, FAR)
    )
    first = global_policy("a", selector="all()", types=INGRESS, ingress=near, order=1)
    second = global_policy("b", selector="all()", types=INGRESS, ingress=far, order=2)
    world.enforce(first, second)
    ended = connect(world.near, world.pod.netns, POD)
    going_on = connect(world.far, world.pod.netns, POD)
    world.remove(first)
    assert all_silent(ended) and all_live(going_on)


def test_a_member_that_leaves_a_set_ends_what_it_was_allowed(
    world: Watched, connect: Connect
) -> None:
    def network_set(*members: str) -> JSON:
        return {
            "apiVersion": V3,
            "kind": "GlobalNetworkSet",
            "metadata": {"name": "friends", "labels": {"friend": "yes"}},
            "spec": {"nets": list(members)},
        }

    rule = {"action": "Allow", "source": {"selector": "friend == 'yes'"}}
    policy = global_policy("friends", selector="all()", types=INGRESS, ingress=[rule])
    world.enforce(network_set(*nets(NEAR), *nets(FAR), "10.1.0.0/16"), policy)
    ended = connect(world.near, world.pod.netns, POD)
    going_on = connect(world.far, world.pod.netns, POD)
    world.enforce(network_set("172.32.0.0/24", "fd32::/64"))
    assert all_silent(ended) and all_live(going_on)


def test_connections_to_a_service_are_known_by_where_they_really_go(
    world: Watched, connect: Connect
) -> None:
    """As kube-proxy translates."""
    rules = "".join(
        f"""
        table {family} services {{
            chain prerouting {{
                type nat hook prerouting priority -100;
                {family} daddr {SERVICE[version]} meta l4proto {{ tcp, udp }} dnat to {target}
            }}
        }}
        """
        for version, family, target in (
            (4, "ip", f"{POD[4]}:{PORT}"),
            (6, "ip6", f"[{POD[6]}]:{PORT}"),
        )
    )
    run(world.node.netns, "nft", "-f", "-", stdin=rules)
    try:
        ended = connect(world.near, world.pod.netns, SERVICE)
        going_on = connect(world.far, world.pod.netns, POD)
        to_port = {"action": "Deny", "protocol": "TCP", "destination": {"ports": [PORT]}}
        udp = {**to_port, "protocol": "UDP"}
        rest = {"action": "Allow"}
        world.enforce(
            global_policy("p", selector="all()", types=INGRESS, ingress=[to_port, udp, rest])
        )
        assert all_silent(ended) and all_live(going_on)
    finally:
        for family in ("ip", "ip6"):
            run(world.node.netns, "nft", "delete", "table", family, "services")


def test_connections_out_of_a_pool_are_known_by_whom_they_come_from(
    world: Watched, connect: Connect
) -> None:
    pools = [
        {
            "apiVersion": V3,
            "kind": "IPPool",
            "metadata": {"name": name},
            "spec": {"cidr": cidr, "natOutgoing": True},
        }
        for name, cidr in (("four", "10.0.0.0/16"), ("six", "fd10::/64"))
    ]
    world.enforce(*pools)
    ended = connect(world.pod.netns, world.near, NEAR)
    going_on = connect(world.pod.netns, world.far, FAR)
    for peer in (*ended, *going_on):
        assert peer.server.getpeername()[0] not in POD.values()
    world.enforce(deny("no-near", EGRESS, *nets(NEAR)))
    assert all_silent(ended) and all_live(going_on)


def test_connections_to_a_floating_address(world: Watched, connect: Connect) -> None:
    nats = [{"internalIP": POD[v], "externalIP": FLOATING[v]} for v in (4, 6)]
    endpoint = world.pod.endpoint(ipNetworks=nets(POD), ipNATs=nats)
    world.brain.snapshot.update(world.pod.key, endpoint)
    world.enforce(felix_configuration("default", floatingIPs="Enabled"))
    ended = connect(world.near, world.pod.netns, FLOATING)
    going_on = connect(world.far, world.pod.netns, FLOATING)
    world.enforce(deny("no-near", INGRESS, *nets(NEAR)))
    assert all_silent(ended) and all_live(going_on)
    world.brain.snapshot.update(world.pod.key, world.pod.endpoint(ipNetworks=nets(POD)))
    world.enforce()
    assert all_silent(going_on)
    assert world.flows(FLOATING[4]) == world.flows(FLOATING[6]) == 0


def host(interface: str, **spec: Any) -> JSON:
    return {
        "apiVersion": V3,
        "kind": "HostEndpoint",
        "metadata": {"name": f"node1-{interface}", "labels": {"host": interface}},
        "spec": {"node": "node1", "interfaceName": interface, **spec},
    }


def test_connections_of_the_host(world: Watched, connect: Connect) -> None:
    profiles = ["projectcalico-default-allow"]
    world.enforce(host("eth0", profiles=profiles), host("eth1", profiles=profiles))
    to_host = connect(world.near, world.node.netns, NODE)
    pushing = connect(world.near, world.node.netns, NODE, pushes=True, kinds=("tcp",))
    from_host = connect(world.node.netns, world.far, FAR)
    going_on = connect(world.node.netns, world.near, NEAR)
    to_pod = connect(world.node.netns, world.pod.netns, POD)
    through = connect(world.near, world.far, FAR)
    world.enforce(
        deny("in", INGRESS, *nets(NEAR), selector="host == 'eth0'"),
        deny("out", EGRESS, *nets(FAR), selector="host == 'eth1'"),
    )
    assert all_silent(to_host + pushing + from_host)
    assert all_live(going_on + to_pod + through)


def test_connections_through_the_host(world: Watched, connect: Connect) -> None:
    world.enforce(host("eth0"), host("eth1"))
    ended = connect(world.near, world.far, FAR)
    going_on = connect(world.far, world.near, NEAR)
    to_pod = connect(world.far, world.pod.netns, POD)
    forward = {"selector": "host == 'eth0'", "applyOnForward": True}
    world.enforce(deny("forward", INGRESS, *nets(NEAR), **forward))
    assert all_silent(ended) and all_live(going_on + to_pod)


def test_failsafe_ports_are_not_cut_off(world: Watched, connect: Connect) -> None:
    world.enforce(host("eth0", profiles=["projectcalico-default-allow"]))
    peers = connect(world.near, world.node.netns, NODE, kinds=("tcp",))
    pushing = connect(world.near, world.node.netns, NODE, kinds=("tcp",), pushes=True)
    ports = [peer.server.getsockname()[1] for peer in (*peers, *pushing)]
    failsafes = [{"protocol": "TCP", "port": port} for port in ports]
    world.enforce(felix_configuration("default", failsafeInboundHostPorts=failsafes))
    world.enforce(host("eth0"))
    assert all_live(peers + pushing)


def test_from_a_pod_to_its_host(world: Watched, connect: Connect) -> None:
    world.enforce(felix_configuration("default", defaultEndpointToHostAction="Accept"))
    by_policy = connect(world.pod.netns, world.node.netns, {4: NODE[4]})
    pushing = connect(world.pod.netns, world.node.netns, {6: NODE[6]}, pushes=True, kinds=("tcp",))
    world.enforce(deny("no-host", EGRESS, f"{NODE[4]}/32"))
    assert all_silent(by_policy) and all_live(pushing)
    world.enforce(felix_configuration("default", defaultEndpointToHostAction="Drop"))
    assert all_silent(pushing)


def test_flows_of_an_address_that_is_gone_go_too(world: Watched, connect: Connect) -> None:
    gone = world.node.pod("gone", "10.0.0.9", endpoint=False)
    with contextlib.closing(gone.netns):
        world.brain.snapshot.update(gone.key, gone.endpoint())
        world.brain.read()
        world.enforce()
        connect(world.near, gone.netns, {4: gone.address})
        connect(world.node.netns, gone.netns, {4: gone.address})
        connect(gone.netns, world.far, {4: FAR[4]})
        others = connect(world.near, world.pod.netns, POD)
        assert world.flows(gone.address) == 6
        gone.unplug()
        world.brain.snapshot.update(gone.key, None)
        world.brain.read()
        world.enforce()
        assert world.flows(gone.address) == 0
        assert all_live(others)


def test_flows_of_an_address_that_moves_go_too(world: Watched, connect: Connect) -> None:
    one = world.node.pod("one", "10.0.0.9", endpoint=False)
    two = world.node.pod("two", "10.0.0.10", endpoint=False)
    with contextlib.closing(one.netns), contextlib.closing(two.netns):
        world.brain.snapshot.update(one.key, one.endpoint())
        world.brain.read()
        world.enforce()
        (peer,) = connect(world.near, one.netns, {4: one.address}, kinds=("udp",))
        peer.close()
        assert world.flows(one.address) == 1
        world.brain.snapshot.update(two.key, two.endpoint(ipNetworks=["10.0.0.9/32"]))
        world.brain.snapshot.update(one.key, None)
        run(world.node.netns, "ip", "link", "set", one.interface, "down")
        world.brain.read()
        world.enforce()
        assert world.flows(one.address) == 0
        world.brain.snapshot.update(two.key, None)


def test_an_address_is_had_again_while_the_kernel_lists_its_flows(
    world: Watched, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for that, but who gets an address inherits nothing, and loses nothing."""
    may_go_on = threading.Event()
    steps_of = Conntrack.steps_of

    def slow(conntrack: Conntrack, *what: Any, **how: Any) -> Iterator[list[ConntrackFlow]]:
        for flows in steps_of(conntrack, *what, **how):
            if threading.current_thread() is not threading.main_thread():
                assert may_go_on.wait(60)
            yield flows

    one = world.node.pod("one", "10.0.0.9", endpoint=False)
    two = world.node.pod("two", "10.0.0.9", endpoint=False)
    with contextlib.closing(one.netns), contextlib.closing(two.netns):
        world.brain.snapshot.update(one.key, one.endpoint())
        world.brain.read()
        world.enforce()
        (peer,) = connect(world.near, one.netns, {4: one.address}, kinds=("udp",))
        peer.close()
        monkeypatch.setattr(Conntrack, "steps_of", slow)
        world.settle = lambda: None  # type: ignore[method-assign]
        try:
            one.unplug()
            world.brain.snapshot.update(one.key, None)
            world.brain.read()
            world.enforce()
            assert world.flows(one.address) == 1
            world.brain.snapshot.update(two.key, two.endpoint())
            world.brain.read()
            world.enforce()
            assert world.flows(one.address) == 0
            peers = connect(world.near, two.netns, {4: two.address})
        finally:
            del world.settle
            may_go_on.set()
        world.settle()
        assert world.connections.next_due() is None
        assert world.flows(one.address) == 2 and all_live(peers)
        two.unplug()
        world.brain.snapshot.update(two.key, None)
        world.brain.read()
        world.enforce()
        assert world.flows(one.address) == 0


def test_what_nobody_has_any_more_is_found_at_the_start(world: Watched) -> None:
    """Flows of an address of our blocks that went while no agent was there."""
    block = {
        "apiVersion": V3,
        "kind": "BlockAffinity",
        "metadata": {"name": "node1-10-0-0-0-26"},
        "spec": {"node": "node1", "cidr": "10.0.0.0/26", "state": "confirmed"},
    }
    world.enforce(block)
    run(world.node.netns, "ip", "route", "add", "10.0.0.0/26", "dev", "eth1")
    for address in ("10.0.0.50", "10.0.1.50"):
        with inside(world.near.fd):
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            client.sendto(b"x", (address, 9))
    run(world.node.netns, "ip", "route", "add", "10.0.1.0/26", "dev", "eth1")
    with inside(world.near.fd):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.sendto(b"x", ("10.0.1.50", 9))
    eventually(lambda: world.flows("10.0.0.50") == 1 and world.flows("10.0.1.50") == 1)
    own = world.connections
    with inside(world.node.netns.fd):
        world.connections = Connections(world.brain.calculator, world.woken.set)
    try:
        world.settle()
    finally:
        world.connections.close()
        world.connections = own
    assert world.flows("10.0.0.50") == 0
    assert world.flows("10.0.1.50") == 1, "no block of ours"
    for net in ("10.0.0.0/26", "10.0.1.0/26"):
        run(world.node.netns, "ip", "route", "del", net)


@pytest.mark.parametrize("what", ["to list flows", "to end some", "to end all"])
def test_what_fails_is_told_and_tried_again(
    world: Watched, connect: Connect, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("felix.conntrack._PATIENCE", 0.0)
    if what == "to end all":
        listed = Lister.listed

        def patient(lister: Lister, listing: Listing) -> Iterator[list[ConntrackFlow]]:
            return (flows for flows in listed(lister, listing) if flows is not None)

        monkeypatch.setattr(Lister, "listed", patient)
        monkeypatch.setattr("felix.conntrack._SLICE", 60.0)
    peers = connect(world.near, world.pod.netns, POD)
    world.settle = lambda: None  # type: ignore[method-assign]
    try:
        world.enforce(deny("no-near", INGRESS, *nets(NEAR)))
    finally:
        del world.settle
    own = world.connections
    broken = own._lister._conntrack if what == "to list flows" else own._conntrack
    with inside(world.node.netns.fd):
        os.close(broken._socket._socket.detach())
        while not (problems := list(own.problems())):
            assert own.reviewing, "nothing failed"
            world.review()
    assert problems == [("connection tracking", "[Errno 9] Bad file descriptor")]
    world.settle()
    assert all_silent(peers)


def test_what_is_allowed_again_in_the_midst_of_a_review_goes_on(
    world: Watched, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged is by policy as it is when a flow is ended."""
    peers = connect(world.near, world.pod.netns, POD)
    monkeypatch.setattr("felix.conntrack._SLICE", 0.0)  # one flow a time
    forbidding = deny("no-near", INGRESS, *nets(NEAR))
    world.settle = lambda: None  # type: ignore[method-assign]
    try:
        world.enforce(forbidding)
        with inside(world.node.netns.fd):
            world.review()
        assert world.connections.reviewing
        ended = world.connections.ended
        world.remove(forbidding)
    finally:
        del world.settle
    world.settle()
    assert world.connections.ended == ended
    assert all_live(peers)


@pytest.mark.parametrize("is_forbidden", [False, True])
def test_policy_changes_while_the_kernel_lists_flows(
    world: Watched, connect: Connect, monkeypatch: pytest.MonkeyPatch, *, is_forbidden: bool
) -> None:
    """Nobody waits for it; and policy as it is in the end is what counts."""
    peers = connect(world.near, world.pod.netns, POD)
    may_go_on = threading.Event()
    steps_of = Conntrack.steps_of

    def slow(conntrack: Conntrack, *what: Any, **how: Any) -> Iterator[list[ConntrackFlow]]:
        for flows in steps_of(conntrack, *what, **how):
            assert may_go_on.wait(60)
            yield flows

    forbidding = deny("no-near", INGRESS, *nets(NEAR))
    if not is_forbidden:
        world.enforce(deny("other", INGRESS, *nets(FAR)))
    ended = world.connections.ended
    monkeypatch.setattr(Conntrack, "steps_of", slow)
    world.settle = lambda: None  # type: ignore[method-assign]
    try:
        world.enforce(deny("other", INGRESS, *nets(FAR)) if is_forbidden else forbidding)
        with inside(world.node.netns.fd):
            world.connections.review(time.monotonic() + 1e6, in_force=True)
        assert world.connections.reviewing
        assert world.connections.next_due() is None, "there is nothing to do before it is told"
        if is_forbidden:
            world.enforce(forbidding)
        else:
            world.remove(forbidding)
    finally:
        del world.settle
        may_go_on.set()
    world.settle()
    if is_forbidden:
        assert all_silent(peers)
    else:
        assert world.connections.ended == ended and all_live(peers)


@pytest.fixture(scope="module")
def agents() -> Iterator[tuple[Node, Pod, Pod]]:
    """A node with the real agent, a web pod and a client."""
    with cluster("node1", addresses=("172.31.1.11/24",)) as (node,):
        web = node.pod("web", "10.0.0.1", labels={"app": "web"})
        client = node.pod("client", "10.0.0.2", labels={"app": "client"})
        node.start()
        node.settle()
        yield node, web, client


def settle(node: Node) -> None:
    """Until what was written is enforced, and connections are ended."""
    node.settle()
    eventually(lambda: not node.status()["flows"]["reviewing"])


def only(app: str) -> JSON:
    """Web is reached by these."""
    rule = {"action": "Allow", "source": {"selector": f"app == '{app}'"}}
    return policy("p", selector="app == 'web'", types=INGRESS, ingress=[rule])


def test_the_agent_ends_what_a_changed_label_forbids(
    agents: tuple[Node, Pod, Pod], connect: Connect
) -> None:
    node, web, client = agents
    node.put(only("client"))
    settle(node)
    peers = connect(client.netns, web.netns, {4: web.address})
    node.put(client.endpoint(labels={"app": "other"}))
    settle(node)
    assert all_silent(peers)
    node.put(client.endpoint(labels={"app": "client"}))
    settle(node)
    assert all_live(peers)


def test_an_agent_that_starts_ends_what_was_forbidden_meanwhile(
    agents: tuple[Node, Pod, Pod], connect: Connect
) -> None:
    node, web, client = agents
    node.put(only("client"))
    settle(node)
    peers = connect(client.netns, web.netns, {4: web.address})
    node.kill()
    node.put(only("other"))
    assert all_live(peers)
    node.start()
    settle(node)
    assert node.status()["flows"]["ended"] >= 2
    assert all_silent(peers)


def test_whether_they_are_left_to_is_chosen_in_the_cluster(
    agents: tuple[Node, Pod, Pod], connect: Connect
) -> None:
    node, web, client = agents
    node.put(only("client"))
    settle(node)
    peers = connect(client.netns, web.netns, {4: web.address})
    pushes = connect(client.netns, web.netns, {4: web.address}, pushes=True)
    settings = felix_configuration(f"node.{node.name}")
    try:
        for choice, has_ended in (("keep", False), ("end", True), ("keep", False)):
            settings["metadata"]["annotations"] = {FORBIDDEN_FLOWS: choice}
            node.put(settings)
            node.put(only("other"))
            settle(node)
            if has_ended:
                assert all_silent([*peers, *pushes])
                assert "calico-ended" in run(node.netns, "nft", "list", "tables").stdout
            else:
                assert "calico-ended" not in run(node.netns, "nft", "list", "tables").stdout
                assert all_live(pushes)
    finally:
        node.delete(Key("FelixConfiguration", f"node.{node.name}"))


def test_what_was_ended_stays_so_when_a_stranger_flushes_all_rules(
    agents: tuple[Node, Pod, Pod], connect: Connect
) -> None:
    node, web, client = agents
    node.put(only("client"))
    settle(node)
    pushes = connect(client.netns, web.netns, {4: web.address}, pushes=True)
    node.put(only("other"))
    settle(node)
    assert all_silent(pushes)
    run(node.netns, "nft", "flush", "ruleset")
    eventually(lambda: "calico-ended" in run(node.netns, "nft", "list", "tables").stdout)
    settle(node)
    assert all_silent(pushes)


def test_what_was_ended_stays_so_when_a_stranger_takes_its_table_alone(
    agents: tuple[Node, Pod, Pod], connect: Connect
) -> None:
    node, web, client = agents
    node.put(felix_configuration("default", nftablesRefreshInterval="1s"))
    node.put(only("client"))
    settle(node)
    pushes = connect(client.netns, web.netns, {4: web.address}, pushes=True, kinds=("tcp",))
    node.put(only("other"))
    settle(node)
    assert all_silent(pushes)
    run(node.netns, "nft", "delete", "table", "ip", "calico-ended")
    eventually(lambda: "calico-ended" in run(node.netns, "nft", "list", "tables").stdout)
    assert all_silent(pushes)
    node.delete(Key("FelixConfiguration", "default"))


def test_connections_may_be_left_to_end_by_themselves(
    agents: tuple[Node, Pod, Pod], connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, web, client = agents
    node.kill()
    node.put(only("client"))
    node.start(MANX_FORBIDDEN_FLOWS="keep")
    settle(node)
    peers = connect(client.netns, web.netns, {4: web.address})
    node.put(only("other"))
    settle(node)
    assert all_live(peers)
    node.kill()
    node.start(wait=False, MANX_FORBIDDEN_FLOWS="yes")
    assert node.agent is not None and node.agent.wait(60) == 1
    assert "MANX_FORBIDDEN_FLOWS: 'yes': expected end or keep" in node.log.read_text()
    node.agent = None


def test_what_is_chosen_must_be_a_choice() -> None:
    assert ends_forbidden({}) and ends_forbidden({"MANX_FORBIDDEN_FLOWS": "end"})
    assert not ends_forbidden({"MANX_FORBIDDEN_FLOWS": "keep"})
    with pytest.raises(ValueError, match="'no': expected end or keep"):
        ends_forbidden({"MANX_FORBIDDEN_FLOWS": "no"})
