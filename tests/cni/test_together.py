"""Requests that wait at the same moment: done together, and each has a fate of its own."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.links import link_up, veth
from kernel.netlink import NetlinkSocket
from tests.cni.rig import Container, Rig, configuration, running


@pytest.fixture
def node(c_client: Path) -> Iterator[Rig]:
    with running(c_client) as rig:
        yield rig
        rig.collect_all()
        rig.assert_empty()


def addresses(results: list[dict[str, list[dict[str, str]]]]) -> set[str]:
    return {result["ips"][0]["address"] for result in results}


def test_each_has_its_own_fate(node: Rig) -> None:
    """New ones, old and new sandboxes, the same twice, a name that is taken, who says nothing."""
    pods = [node.container() for _ in range(5)]
    before, after = node.container("web"), node.container("web")
    leaving, taken, nowhere = (node.container() for _ in range(3))
    for pod in (before, leaving):
        node.add(pod)
    with NetlinkSocket(netns_fd=taken.namespace.fd) as netlink:
        assert netlink.batch([veth("eth0", "x1")]) == []
    assert node.daemon is not None
    node.daemon.send_signal(signal.SIGSTOP)  # so that all of them wait
    silent = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for connection in silent:
        connection.connect(str(node.socket))
    silent[1].sendall(b"MNX1")
    silent[2].sendall(b"MNX1" + bytes([0, 0, 0, 9, 0, 0, 0, 9]))
    good = [node.begin("ADD", pod) for pod in pods[:2]]
    refused = [node.begin("ADD", taken), node.begin("ADD", nowhere, CNI_NETNS="/proc/self/ns/net")]
    good += [node.begin("ADD", pod) for pod in (after, pods[2], pods[2])]
    gone = node.begin("DEL", leaving)
    good += [node.begin("ADD", pod) for pod in pods[3:]]
    node.daemon.send_signal(signal.SIGCONT)
    results = [node.end(process).ok() for process in good]
    assert [node.end(process).error for process in refused] == [4, 4]
    assert node.end(gone).ok() is None
    for connection in silent:
        connection.close()
    assert len(addresses(results)) == len(results) - 1  # twice the same container
    for pod, result in zip([*pods[:2], after, pods[2], pods[2], *pods[3:]], results, strict=True):
        assert node.call("CHECK", pod, configuration(prevResult=result)).ok() is None
        assert pod.links() == {"eth0"}
    assert before.links() == leaving.links() == nowhere.links() == set()
    assert len(node.links()) == len(node.endpoints()) == len(pods) + 1
    held = {f"k8s-pod-network.{pod.id}" for pod in (*pods, before, after)}
    assert node.held() == dict.fromkeys(held, 1)
    for pod in (before, *pods, after):
        node.delete(pod)


def test_more_than_a_block_has(node: Rig) -> None:
    """The last of a block's addresses, and the first of another's, in both families."""
    node.create("IPPool", "four", spec={"cidr": "10.66.0.0/24", "blockSize": 30})
    node.create("IPPool", "six", spec={"cidr": "fd00:66::/64", "blockSize": 126})
    ipam = {
        "type": "manx-ipam",
        "assign_ipv6": True,
        "ipv4_pools": ["four"],
        "ipv6_pools": ["six"],
    }
    pods = [node.container() for _ in range(10)]
    assert node.daemon is not None
    node.daemon.send_signal(signal.SIGSTOP)
    adds = [node.begin("ADD", pod, configuration(ipam=ipam)) for pod in pods]
    node.daemon.send_signal(signal.SIGCONT)
    results = [node.end(process).ok() for process in adds]
    given = {ip["address"] for result in results for ip in result["ips"]}
    assert len(given) == 20
    assert node.held() == {f"k8s-pod-network.{pod.id}": 2 for pod in pods}
    counts = [e.value["spec"]["block"] for e in node.store.list("IPAMHandle").entries]
    assert [sum(count.values()) for count in counts] == [2] * 10
    assert all_reach(node, pods, results)
    for pod in pods:
        node.delete(pod)


def all_reach(
    node: Rig, pods: list[Container], results: list[dict[str, list[dict[str, str]]]]
) -> bool:
    """Whether each pod answers the next one, which routes both have."""
    with NetlinkSocket(netns_fd=node.namespace.fd) as netlink:
        assert netlink.batch([link_up(1)]) == []
    texts = [result["ips"][0]["address"].split("/")[0] for result in results]
    return all(pod.pings(text) for pod, text in zip(pods, texts[1:] + texts[:1], strict=True))
