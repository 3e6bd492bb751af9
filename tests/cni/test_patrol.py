"""What vanished without a DEL is taken back, on a node that lives; nothing else ever is."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.net import parse_net
from cni import findings
from cni.wiring import ContainerInterfaceExistsError, HostInterfaceExistsError, Wire, create_all
from datastore.connect import connect
from datastore.interface import Key
from kernel.links import Ends, Links, delete_link, link_set, veth
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from kernel.routes import PROTO_BGP, Hop, Route, route_add
from tests.cni.rig import Container, Felix, Rig, configuration, running
from tests.support.netns import eventually

QUARTERS = [parse_net(f"10.65.0.{number}/26") for number in (0, 64, 128, 192)]
OPEN = {"selector": "all()", "ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}]}
PATROL = {"MANX_PATROL_SECONDS": "0.1"}


@pytest.fixture
def node(c_client: Path) -> Iterator[Rig]:
    """A node whose daemon looks ten times a second."""
    with running(c_client, **PATROL) as rig:
        yield rig


def told(rig: Rig) -> list[str]:
    """What the daemon found, for people."""
    value = findings.read(rig.socket.parent) or {"findings": []}
    return [f"{finding['subject']}: {finding['message']}" for finding in value["findings"]]


def restart_machine(rig: Rig, *containers: Container, **variables: str) -> None:
    """All processes, namespaces and links are gone, and what is in /run is."""
    rig.kill()
    for container in containers:
        container.namespace.close()
    rig.namespace.close()
    shutil.rmtree(rig.socket.parent)
    rig.namespace = Namespace.create()
    rig.start(**variables)


def looks(rig: Rig, count: int = 3) -> None:
    """Wait until the daemon has looked so often, from now on."""
    path = rig.socket.parent / findings.FILE
    for _ in range(count):
        before = path.stat().st_ino if path.exists() else None
        eventually(lambda before=before: path.exists() and path.stat().st_ino != before)  # type: ignore[misc]


def test_a_machine_that_was_started_anew(node: Rig) -> None:
    """Nobody calls DEL: all containers went with it, and the next ones have other IDs."""
    pods = [node.container() for _ in range(3)]
    pods.append(node.container(pod=False))
    for pod in pods:
        node.add(pod)
    node.add(pods[0], ipam={"type": "manx-ipam"})  # again, which changes nothing
    outside = {"cni.projectcalico.org/ipAddrsNoIpam": json.dumps(["192.0.2.7"])}
    node.create("Pod", "outside", "red", metadata={"annotations": outside}, spec={})
    pods.append(node.container("outside"))
    node.add(pods[-1], feature_control={"ip_addrs_no_ipam": True})
    assert len(node.endpoints()) == 5
    restart_machine(node, *pods, **PATROL)
    eventually(lambda: not node.endpoints())
    eventually(lambda: not node.held())
    looks(node)
    node.assert_empty()
    assert told(node) == []
    fresh = node.container()
    node.add(fresh)
    looks(node)
    assert len(node.held()) == len(node.endpoints()) == 1
    node.delete(fresh)
    node.assert_empty()


def test_a_container_that_vanishes_beside_others(node: Rig) -> None:
    kept, vanished = node.container(), node.container()
    result = node.add(kept)
    node.add(vanished)
    vanished.namespace.close()
    eventually(lambda: len(node.endpoints()) == 1)
    eventually(lambda: len(node.held()) == 1)
    looks(node)
    assert "is gone; released 10.65.0." in node.log()
    assert node.call("CHECK", kept, configuration(prevResult=result)).ok() is None
    node.delete(kept)
    vanished.namespace = Namespace.create()
    node.delete(vanished)  # the runtime may still say so, much later
    node.assert_empty()


def test_what_others_made_is_left_alone(node: Rig) -> None:
    """An endpoint of a plugin before us, whose interface bears no mark; one of nobody we know."""
    pod = node.container()
    node.add(pod)
    with NetlinkSocket(netns_fd=node.namespace.fd) as netlink:
        (name,) = node.links()
        assert netlink.batch([link_set(Links(netlink).get(name).index, alias="")]) == []
    spec = {
        "orchestrator": "k8s",
        "node": "node-1",
        "pod": "x",
        "endpoint": "eth0",
        "containerID": "abc",
        "interfaceName": "cali00000000001",
        "ipNetworks": ["10.65.0.250/32"],
    }
    node.create("WorkloadEndpoint", "node--1-k8s-x-eth0", "red", spec=spec)
    looks(node)
    expected = "WorkloadEndpoint(red/node--1-k8s-x-eth0): has no interface cali00000000001"
    assert told(node) == [expected]
    assert f"kernel interface: {expected}" in node.log()
    assert len(node.endpoints()) == 2
    node.store.delete(Key("WorkloadEndpoint", "node--1-k8s-x-eth0", "red"))
    eventually(lambda: told(node) == [])
    assert "no longer so" in node.log()
    node.delete(pod)
    node.assert_empty()


def test_nothing_is_taken_while_the_datastore_is_moved(node: Rig) -> None:
    pod = node.container()
    node.add(pod)
    node.create("ClusterInformation", "default", spec={"datastoreReady": False})
    pod.namespace.close()
    eventually(lambda: "the datastore is locked" in node.log())
    assert len(node.endpoints()) == len(node.held()) == 1
    node.store.delete(Key("ClusterInformation", "default"))
    eventually(lambda: not node.endpoints())
    eventually(lambda: not node.held())


def test_adds_of_the_same_containers_meanwhile(node: Rig) -> None:
    """As podman starts containers again after a start of the machine: under the IDs they had."""
    pods = [node.container() for _ in range(20)]
    for pod in pods:
        node.add(pod)
    for turn in range(4):
        for pod in pods:
            pod.namespace.close()
            pod.namespace = Namespace.create()
        adding = []
        for pod in pods:
            if turn % 2:  # some are taken back before, in the midst of the others' ADDs
                eventually(lambda: len(node.endpoints()) < len(pods) or bool(node.links()))
            adding.append(node.begin("ADD", pod))
        results = [node.end(process).ok() for process in adding]
        looks(node)
        assert len(node.held()) == len(node.endpoints()) == len(node.links()) == len(pods)
        for pod, result in zip(pods, results, strict=True):
            assert node.call("CHECK", pod, configuration(prevResult=result)).ok() is None
    for pod in pods:
        node.delete(pod)
    node.assert_empty()


def test_a_leftover_that_goes_by_itself() -> None:
    """As a container's network namespace ends: between the kernel's "exists" and our look at it."""
    with (  # and no daemon that takes leftovers away
        Namespace.create() as container,
        Namespace.create() as machine,
        NetlinkSocket(netns_fd=machine.fd) as host,
    ):
        wire = Wire("cali1", "eth0", alias="", mac="02:00:00:00:00:01", addresses=(), mtu=1500)
        assert host.batch([veth("cali1", "x1")]) == []
        index = Links(host).get("cali1").index

        @contextlib.contextmanager
        def going() -> Iterator[None]:
            try:
                yield
            finally:
                assert host.batch([delete_link(index)]) == []

        [leftover] = create_all(host, [(container.fd, wire)], going())
        assert isinstance(leftover, HostInterfaceExistsError)
        assert leftover.link is None
        assert isinstance(create_all(host, [(container.fd, wire)])[0], Ends)
        assert host.batch([delete_link(Links(host).get("cali1").index)]) == []
        with NetlinkSocket(netns_fd=container.fd) as inside:
            assert inside.batch([veth("eth0", "x1")]) == []
        [taken] = create_all(host, [(container.fd, wire)])
        assert isinstance(taken, ContainerInterfaceExistsError)


def test_stray_interfaces_are_told_of(node: Rig) -> None:
    """Kernel against datastore, continuously: the interface of no endpoint, under our prefix."""
    node.kill()
    node.create("FelixConfiguration", "default", spec={"interfacePrefix": "tap"})
    node.start(**PATROL)
    with NetlinkSocket(netns_fd=node.namespace.fd) as netlink:
        assert netlink.batch([veth("tap1", "x1")]) == []
    eventually(lambda: told(node) == ["tap1: is of no endpoint of this node"])
    with NetlinkSocket(netns_fd=node.namespace.fd) as netlink:
        assert netlink.batch([delete_link(Links(netlink).get("tap1").index)]) == []
    eventually(lambda: told(node) == [])


def test_another_cluster_in_our_pool_is_told_of(node: Rig) -> None:
    """By what a peer announces: a range of the pool that is no block of ours."""
    ours = node.container()
    node.add(ours)
    with NetlinkSocket(netns_fd=node.namespace.fd) as netlink:
        assert netlink.batch([veth("up0", "up1")]) == []
        hop = Hop(Links(netlink).get("up0").index, parse_net("172.31.1.1").address, onlink=True)
        theirs = Route(parse_net("10.65.0.0/24"), (hop,), protocol=PROTO_BGP)
        assert netlink.batch([route_add(theirs)]) == []
        looks(node)
        assert told(node) == []  # it holds a block of ours: one who sums up what we announce
        (block,) = (entry.value["spec"]["cidr"] for entry in node.store.list("IPAMBlock").entries)
        other = next(net for net in QUARTERS if str(net) != block)
        assert netlink.batch([route_add(theirs.to(other))]) == []
    eventually(lambda: len(told(node)) == 1)
    assert f"IPPool(pods): the next hop 172.31.1.1 announces {other}, which" in told(node)[0]
    node.delete(ours)


Forgotten = tuple[tuple[Container, str], tuple[Container, str]]  # with their addresses


def address_of(result: Any) -> str:
    text: str = result["ips"][0]["address"]
    return text.partition("/")[0]


@pytest.fixture
def forgotten(node: Rig, tmp_path: Path) -> Forgotten:
    """An older copy of the datastore was put back, which knows nothing of the second of two."""
    node.create("GlobalNetworkPolicy", "open", spec=OPEN)
    older, newer = node.container(), node.container()
    first = address_of(node.add(older))
    with (
        contextlib.closing(sqlite3.connect(node.directory / "datastore.db")) as source,
        contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy,
    ):
        source.backup(copy)
    second = address_of(node.add(newer))
    node.kill()
    node.store.close()
    for left in node.directory.glob("datastore.db*"):
        left.unlink()
    shutil.copy(tmp_path / "copy.db", node.directory / "datastore.db")
    node.store = connect(node.url)
    node.start()
    return (older, first), (newer, second)


def test_what_the_datastore_has_forgotten_keeps_its_address(
    node: Rig, forgotten: Forgotten
) -> None:
    (older, _), (newer, address) = forgotten
    third = node.container()
    refused = node.call("ADD", third, configuration())
    assert refused.code != 0
    assert address in refused.output.decode() and newer.id in refused.output.decode()
    assert node.held().keys() == {f"k8s-pod-network.{older.id}"}
    other = address_of(node.add(third))
    assert address != other
    assert newer.pings(other) and third.pings(address)
    for container in (older, newer, third):
        node.delete(container)
    node.assert_empty()


def test_what_felix_has_cut_off_loses_its_address(node: Rig, forgotten: Forgotten) -> None:
    """No packet passes to or from it any more, so that another container may well have it."""
    (older, known), (newer, address) = forgotten
    felix = Felix(node)
    try:
        felix.start()
        eventually(lambda: newer.run("ping", "-c1", "-W1", known).returncode == 1)
        third = node.container()
        assert address_of(node.add(third, policy_setup_timeout_seconds=60)) == address
        assert older.pings(address) and third.pings(known)
        assert newer.run("ping", "-c1", "-W1", known).returncode == 1
        node.delete(newer)
        assert older.pings(address)
    finally:
        felix.kill()
