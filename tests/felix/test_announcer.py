"""The CNI plugin is told which endpoints are enforced: when they are, and of which container."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from datastore.interface import Key
from felix.announcer import SOCKET, Announcer, Subscription
from felix.desired import Local
from kernel.netns import inside
from policy.model import EndpointId
from tests.felix.world import DROPPED, PATIENCE, V3, Listener, Node, Pod, cluster, policy, reaches
from tests.support.netns import eventually, run

WEB = EndpointId("WorkloadEndpoint", "red", "web")


class Subscriber:
    """A connection to the agent, and what it has told so far."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")

    def next(self) -> dict[str, Any]:
        line: dict[str, Any] = json.loads(self._lines.readline())
        return line

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextmanager
def subscribed(node: Node) -> Iterator[Subscriber]:
    subscriber = Subscriber(node.run_dir / SOCKET)
    try:
        yield subscriber
    finally:
        subscriber.close()


@pytest.fixture
def node() -> Iterator[Node]:
    with cluster("node-1") as (node,):
        node.start()
        yield node


def test_told_when_packets_pass(node: Node) -> None:
    with subscribed(node) as told:
        assert told.next() == {"all": True, "endpoints": {}}
        client = node.pod("client", "10.65.0.1", containerID="c1")
        name = f"default/{client.key.name}"
        assert told.next() == {"all": False, "endpoints": {name: "c1"}}
        server = node.pod("server", "10.65.0.2", containerID="s1")
        told.next()
        with Listener(server.netns, 80):
            assert reaches(client.netns, "10.65.0.2", 80) == "10.65.0.1"
        # the same pod again, in another container
        node.store.update(client.key, client.endpoint(containerID="c2"))
        assert told.next() == {"all": False, "endpoints": {name: "c2"}}
        with subscribed(node) as late:
            everything = late.next()
            assert everything["all"]
            assert everything["endpoints"][name] == "c2"
            client.remove()
            assert late.next() == told.next() == {"all": False, "endpoints": {name: None}}


def test_not_told_before_the_interface_is_there(node: Node) -> None:
    with subscribed(node) as told:
        told.next()
        late = node.pod("late", "10.65.0.1", containerID="l1")
        told.next()
        late.unplug()
        # the kernel tells of it, not the datastore: nothing that is written comes after
        name = f"default/{late.key.name}"
        eventually(lambda: node.status()["endpoints"][name]["state"] != "enforced")
        node.store.update(late.key, late.endpoint(containerID="l2"))
        other = node.pod("other", "10.65.0.2", containerID="o1")
        assert told.next()["endpoints"] == {f"default/{other.key.name}": "o1"}


def test_a_restarted_agent_tells_all_anew(node: Node) -> None:
    pod = node.pod("web", "10.65.0.1", containerID="w1")
    node.settle()
    node.kill()
    node.start()
    with subscribed(node) as told:
        assert told.next() == {"all": True, "endpoints": {f"default/{pod.key.name}": "w1"}}


def arrives(pod: Pod, source: str, server: Pod, *, patience: float = PATIENCE) -> bool:
    """Whether a packet that ``pod`` sends as ``source`` gets to the server."""
    with Listener(server.netns, 80) as listener:
        listener.udp.settimeout(patience)
        with inside(pod.netns.fd):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            sender.bind((source, 0))
            sender.sendto(b"x", (server.address, 80))
        try:
            return bool(listener.udp.recvfrom(10)[1][0] == source)
        except TimeoutError:
            return False


def test_sources_that_an_endpoint_may_use(node: Node) -> None:
    server = node.pod("server", "10.65.0.2")
    client = node.pod("client", "10.65.0.1", allowSpoofedSourcePrefixes=["10.77.0.0/24"])
    for address in ("10.77.0.5", "10.78.0.5"):
        run(client.netns, "ip", "address", "add", address, "dev", "lo")
    # the way back to both leads elsewhere
    run(node.netns, "ip", "route", "add", "10.76.0.0/14", "dev", server.interface)
    node.settle()
    assert arrives(client, "10.65.0.1", server)
    assert not arrives(client, "10.77.0.5", server, patience=DROPPED)
    assert "workloadSourceSpoofing" in node.errors()[f"WorkloadEndpoint(default/{client.key.name})"]
    configuration = Key("FelixConfiguration", "default")
    spec = {"workloadSourceSpoofing": "Any"}
    node.put_raw(
        configuration,
        {"apiVersion": V3, "kind": "FelixConfiguration", "metadata": {"name": "default"},
         "spec": spec},
    )  # fmt: skip
    node.settle()
    assert not any("client" in what for what in node.errors())
    assert arrives(client, "10.77.0.5", server)
    assert not arrives(client, "10.78.0.5", server, patience=DROPPED)
    node.put(policy("none", ingress=[{"action": "Deny"}], selector="all()"))
    node.settle()
    assert not arrives(client, "10.77.0.5", server, patience=DROPPED)
    node.delete(configuration)
    client.remove()


def test_a_subscriber_that_does_not_read_is_let_go() -> None:
    announcer = Announcer()
    ours, theirs = socket.socketpair()
    with theirs:
        announcer.subscribe(Subscription(ours))
        for number in range(10_000):
            announcer.want({WEB: Local("cali1", f"{number}" * 100)})
            announcer.tell(lambda id, interface: True)
            if ours.fileno() < 0:
                break
        assert ours.fileno() < 0
    announcer.close()


def test_what_failed_is_told_when_it_stands() -> None:
    announcer = Announcer()
    ours, theirs = socket.socketpair()
    with theirs, theirs.makefile("rb") as lines:
        announcer.subscribe(Subscription(ours))
        announcer.want({WEB: Local("cali1", "c1")})
        announcer.tell(lambda id, interface: False)
        assert json.loads(lines.readline()) == {"all": True, "endpoints": {}}
        announcer.tell(lambda id, interface: (id, interface) == (WEB, "cali1"))
        assert json.loads(lines.readline()) == {"all": False, "endpoints": {"red/web": "c1"}}
        announcer.close()
