"""A container that an earlier version attached: today's daemon knows it, and takes it away.

``released/datastore.sql`` is the file of version 0.1.0 with one container, IPv4 and IPv6, and stays
as it is; so does its wire below. A change that makes this fail would cost each node that is
upgraded its containers.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.interface import JSON
from tests.cni.rig import Container, Rig, configuration
from tests.support.netns import connect, eventually, run

RELEASED = Path(__file__).with_name("released") / "datastore.sql"
FOUR, SIX, MAC = "10.65.0.128", "fd00:65::2f50", "02:d0:b0:34:23:dc"
NODE_END, NODE_MAC = "cali7c22a555fae", "ee:ee:ee:ee:ee:ee"
GATEWAYS = "169.254.1.1", "fe80::ecee:eeff:feee:eeee"
DUAL: JSON = {"ipam": {"type": "manx-ipam", "assign_ipv6": True}}


def result(pod: Container) -> JSON:
    """What the runtime was told, and gives to CHECK."""
    return {
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": NODE_END, "mac": NODE_MAC, "mtu": 1500},
            {"name": "eth0", "mac": MAC, "mtu": 1500, "sandbox": pod.netns},
        ],
        "ips": [
            {"interface": 1, "address": f"{FOUR}/32", "gateway": GATEWAYS[0]},
            {"interface": 1, "address": f"{SIX}/128", "gateway": GATEWAYS[1]},
        ],
        "routes": [
            {"dst": f"{GATEWAYS[0]}/32", "scope": 253},
            {"dst": "0.0.0.0/0", "gw": GATEWAYS[0]},
            {"dst": f"{GATEWAYS[1]}/128", "scope": 253},
            {"dst": "::/0", "gw": GATEWAYS[1]},
        ],
        "dns": {},
    }


def wire(rig: Rig, pod: Container) -> None:
    """What ``ip`` showed of it on the node, and in the container."""
    connect(rig.namespace, NODE_END, pod.namespace, "eth0")
    alias = f"manx k8s-pod-network/{pod.id}/eth0"
    end = ("dev", NODE_END)
    run(rig.namespace, "ip", "link", "set", *end, "address", NODE_MAC, "alias", alias)
    run(pod.namespace, "ip", "link", "set", "dev", "eth0", "address", MAC)
    for address in (FOUR, SIX):
        run(rig.namespace, "ip", "route", "add", address, *end, "proto", "80", "scope", "link")
        neighbour = ("ip", "neigh", "add", address, "lladdr", MAC, *end)
        run(rig.namespace, *neighbour, "nud", "permanent")
    for name, value in (("rp_filter", "1"), ("forwarding", "1"), ("proxy_arp", "1")):
        run(rig.namespace, "sysctl", "-qw", f"net.ipv4.conf.{NODE_END}.{name}={value}")
    run(rig.namespace, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")  # by felix
    run(pod.namespace, "ip", "address", "add", f"{FOUR}/32", "dev", "eth0")
    run(pod.namespace, "ip", "address", "add", f"{SIX}/128", "dev", "eth0", "nodad")
    for gateway, everything in zip(GATEWAYS, ("0.0.0.0/0", "::/0"), strict=True):
        run(pod.namespace, "ip", "route", "add", gateway, "dev", "eth0", "scope", "link")
        run(pod.namespace, "ip", "route", "add", everything, "via", gateway, "dev", "eth0")
        neighbour = ("ip", "neigh", "add", gateway, "lladdr", NODE_MAC, "dev", "eth0")
        run(pod.namespace, *neighbour, "nud", "permanent")


@pytest.fixture
def rig(c_client: Path) -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="manx-cni-") as name:
        directory = Path(name)
        path = directory / "datastore.db"
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
            file.executescript(RELEASED.read_text())
        rig = Rig(directory, c_client)
        try:
            yield rig
        finally:
            rig.close()


def test_a_container_that_an_earlier_version_attached(rig: Rig) -> None:
    pod = rig.container()
    wire(rig, pod)
    index, held, endpoints = rig.link(pod), rig.held(), rig.endpoints()
    assert held == {f"k8s-pod-network.{pod.id}": 2}
    rig.start()  # it collects what is half-made
    assert (rig.link(pod), rig.held(), rig.endpoints()) == (index, held, endpoints)
    known = result(pod)
    assert rig.call("CHECK", pod, configuration(prevResult=known, **DUAL)).ok() is None
    assert rig.add(pod, **DUAL) == known
    assert rig.link(pod) == index

    others = [rig.container() for _ in range(8)]  # more than the rest of its blocks
    results = [rig.add(other, **DUAL) for other in others]
    given = [each["address"] for result in (known, *results) for each in result["ips"]]
    assert len(set(given)) == 2 * 9
    for address in (FOUR, SIX):  # the kernel's worker may not have made its local route yet
        eventually(lambda address=address: others[0].pings(address))  # type: ignore[misc]
    rig.delete(pod)
    assert NODE_END not in rig.links()
    for other in others:
        rig.delete(other)
    rig.assert_empty()
