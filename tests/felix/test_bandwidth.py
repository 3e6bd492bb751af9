"""Limits of a pod's bandwidth, measured with packets; and nothing left of them afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from kernel.links import Links
from kernel.netlink import NetlinkSocket
from kernel.netns import inside
from tests.felix.world import Node, Pod, cluster
from tests.support.netns import eventually, run

RATE = 8_000_000  # bits a second
BURST = 128_000  # bits
LIMITED = {
    "ingressBandwidth": RATE,
    "ingressBurst": BURST,
    "egressBandwidth": RATE,
    "egressBurst": BURST,
}
SIZE = 1_000_000  # bytes: at that rate, a second


@pytest.fixture(scope="module")
def _pods() -> Iterator[tuple[Pod, Pod]]:
    with cluster("node1", addresses=("172.31.1.11/24",)) as (node,):
        node.start()
        pods = node.pod("client", "10.0.255.1"), node.pod("server", "10.0.255.2")
        node.settle()
        yield pods


@pytest.fixture
def client(_pods: tuple[Pod, Pod]) -> Pod:
    return _pods[0]


@pytest.fixture
def server(_pods: tuple[Pod, Pod]) -> Pod:
    return _pods[1]


@pytest.fixture
def node(client: Pod) -> Iterator[Node]:
    yield client.node
    eventually(lambda: shaped(client.node) == [])


def buckets(node: Node) -> dict[str, int]:
    """Bytes a second, by interface."""
    found = json.loads(run(node.netns, "tc", "-j", "qdisc", "show").stdout)
    return {each["dev"]: each["options"]["rate"] for each in found if each["kind"] == "tbf"}


def shaped(node: Node) -> list[str]:
    """All that limits: buckets, devices, places for filters."""
    found = json.loads(run(node.netns, "tc", "-j", "qdisc", "show").stdout)
    kinds = [each["kind"] for each in found if each["kind"] in ("tbf", "ingress")]
    with NetlinkSocket(netns_fd=node.netns.fd) as netlink:
        devices = [link.name for link in Links(netlink).read().values() if link.kind == "ifb"]
    return kinds + devices


def seconds(source: Pod, target: Pod) -> float:
    """How long SIZE bytes take over TCP."""
    with inside(target.netns.fd):
        listener = socket.create_server((target.address, 0))
    with inside(source.netns.fd):
        connection = socket.socket()

    def receive() -> None:
        with listener.accept()[0] as arriving:
            missing = SIZE
            while missing:
                missing -= len(arriving.recv(1 << 16))
            arriving.sendall(b".")

    thread = threading.Thread(target=receive)
    with listener, connection:
        connection.settimeout(60)
        thread.start()
        connection.connect(listener.getsockname())
        start = time.monotonic()
        connection.sendall(bytes(SIZE))
        assert connection.recv(1)
        took = time.monotonic() - start
        thread.join()
    return took


def is_limited(source: Pod, target: Pod) -> bool:
    """Twice the rate would be half a second; slow machines only take longer."""
    return seconds(source, target) > 0.5


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_each_direction_by_itself(node: Node, client: Pod, server: Pod, direction: str) -> None:
    """Set while the pod runs, raised, and lifted, as the annotations of a pod are changed."""
    eventually(lambda: not is_limited(client, server))
    limits = {name: value for name, value in LIMITED.items() if name.startswith(direction)}
    node.put(server.endpoint(qosControls=limits))
    node.settle()
    assert list(buckets(node).values()) == [RATE // 8]
    into, out_of = (client, server), (server, client)
    limited, other = (into, out_of) if direction == "ingress" else (out_of, into)
    assert is_limited(*limited)
    eventually(lambda: not is_limited(*other))
    node.put(server.endpoint(qosControls={**limits, f"{direction}Bandwidth": 100 * RATE}))
    node.settle()
    assert list(buckets(node).values()) == [100 * RATE // 8]
    eventually(lambda: not is_limited(*limited))
    node.put(server.endpoint())
    node.settle()
    eventually(lambda: not is_limited(*limited))


def test_a_pod_that_goes_takes_its_limits_along(node: Node) -> None:
    pod = node.pod("limited", "10.0.255.3", qosControls=LIMITED)
    node.settle()
    eventually(lambda: sorted(buckets(node).values()) == [RATE // 8] * 2)
    pod.unplug()
    eventually(lambda: shaped(node) == [])
    pod.plug()  # the same pod, another wire
    eventually(lambda: sorted(buckets(node).values()) == [RATE // 8] * 2)
    pod.remove()
    eventually(lambda: shaped(node) == [])


def test_a_restart_keeps_what_is_right(node: Node, client: Pod, server: Pod) -> None:
    """It touches none that is right, mends what is broken, and takes away what is not wanted."""
    gone = node.pod("gone", "10.0.255.4", qosControls=LIMITED)
    node.put(server.endpoint(qosControls=LIMITED))
    node.put(client.endpoint(qosControls=LIMITED))
    node.settle()
    eventually(lambda: run(node.netns, "tc", "qdisc", "show").stdout.count("tbf") == 6)
    node.kill(signal.SIGKILL)
    run(node.netns, "tc", "filter", "del", "dev", client.interface, "ingress")
    gone.remove()
    with NetlinkSocket(netns_fd=node.netns.fd) as netlink:
        index = Links(netlink).get(server.interface).index
    node.start()
    eventually(lambda: len(buckets(node)) == 4)
    with NetlinkSocket(netns_fd=node.netns.fd) as netlink:
        assert Links(netlink).get(server.interface).index == index
    assert is_limited(client, server)
    assert is_limited(server, client)
    for pod in (client, server):
        node.put(pod.endpoint())
    node.settle()


def test_limits_of_the_reference_plugin_give_way(node: Node, client: Pod, server: Pod) -> None:
    """Those of pods that were added while it was in the chain."""
    limits = {
        f"{way}{what}": 1000 * RATE for way in ("ingress", "egress") for what in ("Rate", "Burst")
    }
    netns = f"/proc/{os.getpid()}/fd/{server.netns.fd}"
    interfaces = [{"name": server.interface}, {"name": "eth0", "sandbox": netns}]
    configuration = {
        "cniVersion": "1.0.0",
        "name": "net",
        "type": "bandwidth",
        "runtimeConfig": {"bandwidth": limits},
        "prevResult": {"cniVersion": "1.0.0", "interfaces": interfaces, "ips": []},
    }
    environment = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0"}
    environment |= {"CNI_NETNS": netns, "CNI_PATH": "/usr/lib/cni"}
    with inside(node.netns.fd):
        subprocess.run(
            ["/usr/lib/cni/bandwidth"],
            input=json.dumps(configuration).encode(),
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    assert len(shaped(node)) == 4
    node.put(server.endpoint(qosControls=LIMITED))
    node.settle()
    assert list(buckets(node).values()) == [RATE // 8] * 2
    assert is_limited(client, server)
    assert is_limited(server, client)
    node.put(server.endpoint())
    node.settle()


def test_peak_rates_and_large_numbers(node: Node, server: Pod) -> None:
    """As far as the kernel takes them, and never so little that no packet fits."""
    controls = {
        "ingressBandwidth": 10**12,
        "ingressBurst": 4 << 30,
        "ingressPeakrate": 2 * 10**12,
        "ingressMinburst": 1000,
        "egressBandwidth": 1000,
        "egressBurst": 1000,
    }
    node.put(server.endpoint(qosControls=controls))
    node.settle()
    assert node.errors() == {}
    assert sorted(buckets(node).values()) == [125, 125 * 10**9]
    shown = run(node.netns, "tc", "qdisc", "show", "dev", server.interface).stdout
    assert "peakrate" in shown
    # one packet passes each way: the answer to a ping
    assert run(server.netns, "ping", "-c1", "-W20", "10.0.255.1").returncode == 0
    node.put(server.endpoint())
    node.settle()
