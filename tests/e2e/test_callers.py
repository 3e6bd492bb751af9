"""Real container runtimes call the plugin, and their containers talk across nodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_network

import pytest

from lab.client import Lab
from tests.e2e.conftest import NODES, POOL
from tests.e2e.runtimes import (
    CallError,
    CniTool,
    Containerd,
    Cri,
    Ctr,
    Host,
    Podman,
    Runtime,
    container_name,
    cri_messages,
    fetched,
)
from tests.scenarios.fabrics import apply, calico, until

# what they call is built, once, with a Go toolchain
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KINDS = ["ctr", "cri", "podman", "cnitool"]


@pytest.fixture(scope="module")
def daemons(hosts: list[Host]) -> Iterator[list[Containerd]]:
    """containerd on both nodes."""
    running = [Containerd(host) for host in hosts]
    yield running
    for containerd in running:
        containerd.stop()


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest,
    hosts: list[Host],
    daemons: list[Containerd],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[list[Runtime]]:
    """The same runtime on both nodes."""
    if request.param == "ctr":
        yield [Ctr(host, each) for host, each in zip(hosts, daemons, strict=True)]
    elif request.param == "podman":
        yield [Podman(host) for host in hosts]
    elif request.param == "cnitool":
        yield [CniTool(host) for host in hosts]
    else:
        with cri_messages(tmp_path_factory.mktemp("cri")) as messages:
            clients = [Cri(host, each, messages) for host, each in zip(hosts, daemons, strict=True)]
            yield list(clients)
            for client in clients:
                client.close()


OF_CONTAINERS = """
import os
from datastore.connect import connect
store = connect(os.environ["MANX_DATASTORE"])
for kind in ("WorkloadEndpoint", "IPAMHandle"):
    for entry in store.list(kind).entries:
        print(entry.key)
"""


def remains(lab: Lab) -> list[str]:
    """What there is of containers, on both nodes and in the datastore."""
    links = [
        line.split()[1]
        for node in NODES
        for line in lab.run(node, "ip", "-o", "link").stdout.splitlines()
        if " cali" in line
    ]
    done = lab.run(NODES[0], sys.executable, "-c", OF_CONTAINERS)
    assert done.returncode == 0, done.stderr
    return links + done.stdout.splitlines()


def restart_cni(lab: Lab, node: str) -> None:
    """Kill the CNI daemon; the lab starts it anew."""

    def daemons() -> set[int]:
        found = lab.processes(node)
        return {pid for pid, argv in found if argv[1:] == ["-m", "cni", "daemon"]}

    (before,) = daemons()
    lab.run(node, "kill", "-9", str(before))
    until(lambda: daemons() - {before}, "the CNI daemon is back")


def test_containers_talk_across_nodes(lab: Lab, pair: list[Runtime]) -> None:
    names = [container_name(), container_name()]
    for runtime, each in zip(pair, names, strict=True):
        runtime.start(each)
    addresses = [runtime.address(each) for runtime, each in zip(pair, names, strict=True)]
    assert addresses[0] != addresses[1]
    until(lambda: pair[0].pings(names[0], addresses[1]), "the first reaches the second")
    assert pair[1].pings(names[1], addresses[0])
    for runtime, each in zip(pair, names, strict=True):
        runtime.stop(each)
    assert remains(lab) == []


def test_the_daemon_restarts_between_add_and_del(lab: Lab, pair: list[Runtime]) -> None:
    names = [container_name(), container_name()]
    for runtime, each in zip(pair, names, strict=True):
        runtime.start(each)
    address = pair[1].address(names[1])
    for node in NODES:
        restart_cni(lab, node)
    until(lambda: pair[0].pings(names[0], address), "the containers talk as before")
    for runtime, each in zip(pair, names, strict=True):
        runtime.stop(each)
    assert remains(lab) == []


def test_a_container_whose_add_fails_leaves_nothing(lab: Lab, pair: list[Runtime]) -> None:
    apply(lab, NODES[0], calico("IPPool", "pods", cidr=POOL, disabled=True))
    try:
        with pytest.raises(CallError, match="IPPool"):
            pair[0].start(container_name())
        assert remains(lab) == []
    finally:
        apply(lab, NODES[0], calico("IPPool", "pods", cidr=POOL))


@pytest.mark.parametrize("version", ["", "0.2.0"])
def test_a_configuration_of_long_ago(lab: Lab, hosts: list[Host], version: str) -> None:
    """libcni understands what it gets, in the words of before 0.3.0."""
    plugin = {"type": "manx", "policy_setup_timeout_seconds": 10}
    conflist = {"name": "old", "plugins": [plugin]} | ({"cniVersion": version} if version else {})
    hosts[0].write("/run/old/10-old.conflist", json.dumps(conflist))
    runtime, name = CniTool(hosts[0], "/run/old/10-old.conflist"), container_name()
    runtime.start(name)
    address = runtime.address(name)
    until(lambda: lab.run("node-1a", "ping", "-c1", "-W1", address).returncode == 0, "it answers")
    runtime.stop(name)
    assert remains(lab) == []


@pytest.mark.parametrize("pair", ["podman"], indirect=True)
def test_the_address_that_was_asked_for(lab: Lab, pair: list[Runtime]) -> None:
    """``podman run --ip``: this one, or none at all."""
    runtime, other = pair
    assert isinstance(runtime, Podman)
    assert isinstance(other, Podman)
    name, address = container_name(), str(ip_network(POOL)[77])
    runtime.start(name, address)
    assert runtime.address(name) == address
    with pytest.raises(CallError, match=address):
        other.start(container_name(), address)
    runtime.stop(name)
    assert remains(lab) == []


@pytest.mark.parametrize("pair", ["cri"], indirect=True)
def test_a_host_port_of_a_pod(lab: Lab, pair: list[Runtime]) -> None:
    """portmap, chained by ``manx-cni install``, is told by the CRI which port it is."""
    runtime, pod = pair[0], container_name()
    assert isinstance(runtime, Cri)
    runtime.start(pod, ports={8081: 80})
    runtime.execute(pod, "/bin/httpd", "-p", "80", "-h", "/etc")
    port = partial(fetched, lab, "outside", "172.31.1.11:8081", "/passwd")
    until(port, "the port of the node is reached from outside")
    runtime.stop(pod)
    assert remains(lab) == []
    assert port() == 0
