"""Node-to-node mesh inside a rack, VXLAN between racks whose routers know no pods."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab.client import Lab
from lab.fabric import Pod
from lab.flow import Flow
from lab.probe import Pair, Probe
from tests.scenarios.fabrics import apply, calico, fabric, pods, rack, settle, until, up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

POOL = "10.70.0.0/16"
ALL = ["p-1a", "p-1b", "p-2a"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two racks, no BGP with the routers: the mesh carries routes, the overlay packets."""
    document = fabric(
        [rack(1, 65001, "ab"), rack(2, 65002, "a")],
        [calico("IPPool", "pods", cidr=POOL, vxlanMode="CrossSubnet")],
        links=[{"between": ["tor-1", "tor-2"], "subnet": "172.31.255.0/31"}],
        hosts=[{"name": "outside", "router": "tor-1", "address": "198.51.100.10/24"}],
        pods=pods(["node-1a", "node-1b", "node-2a"]),
    )
    with up(document) as running:
        yield running


def everything(pair: Pair) -> bool:
    return True


def test_all_pods_reach_each_other_unchanged(lab: Lab) -> None:
    with Probe.of(lab, ALL) as probe:
        for (source, _), reach in settle(probe, everything).items():
            assert reach.seen == probe.stations[source].address


def test_only_between_racks_packets_are_encapsulated(lab: Lab) -> None:
    """What the racks' routers carry between each other is VXLAN, and no pod's address."""
    routes = lab.run("node-1a", "ip", "-j", "route").stdout
    ways = {
        route["dst"]: route["dev"]
        for route in json.loads(routes)
        if route["dst"].startswith("10.70.") and "gateway" in route
    }
    assert sorted(ways.values()) == ["eth0", "vxlan.calico"]
    assert "10.70." not in lab.run("tor-1", "ip", "route").stdout


def test_mesh_sessions_are_up_and_told(lab: Lab) -> None:
    def status() -> str:
        return lab.run("node-1b", "manxctl", "node", "status").stdout

    until(lambda: status().count("Established") == 2, "two sessions Established")
    assert "node-to-node mesh" in status()


def test_without_the_mesh_its_routes_go(lab: Lab) -> None:
    """Routes inside a rack come by BGP: withdrawn, they leave the kernel; the overlay stays."""

    def learned() -> str:
        return lab.run(
            "node-1a", "ip", "route", "show", "proto", "179", "via", "172.31.1.12"
        ).stdout

    plain = calico("IPPool", "plain", cidr="10.71.0.0/16")
    here = calico("IPPool", "pods", cidr=POOL, vxlanMode="CrossSubnet", nodeSelector="!all()")
    apply(lab, "node-1a", plain, here)
    for node in ("node-1a", "node-1b"):
        lab.add_pod(Pod(name=f"plain-{node[-1]}", node=node))
    with Probe.of(lab, ["plain-a", "plain-b"]) as probe:
        settle(probe, everything)
        assert "10.71." in learned()
        apply(lab, "node-1a", calico("BGPConfiguration", "default", nodeToNodeMeshEnabled=False))
        until(lambda: "10.71." not in learned(), "the learned routes are removed")
        settle(probe, lambda pair: False)
        with Probe.of(lab, ALL, port=7778) as overlay:
            settle(overlay, lambda pair: True)
        apply(lab, "node-1a", calico("BGPConfiguration", "default", nodeToNodeMeshEnabled=True))
        settle(probe, everything)


def test_every_program_of_a_node_dies_under_traffic_and_nothing_is_lost(lab: Lab) -> None:
    with Probe.of(lab, ALL) as probe:
        settle(probe, everything)
        stations = probe.stations
        with (
            Flow(stations["p-1a"], stations["p-1b"]) as plain,
            Flow(stations["p-1a"], stations["p-2a"]) as encapsulated,
        ):
            until(lambda: plain.report.received > 100, "packets flow")
            before = {pid for pid, _ in lab.processes("node-1a")}
            assert len(before) >= 4
            lab.run("node-1a", "sh", "-c", "kill -9 " + " ".join(map(str, before)))
            until(lambda: _ready(lab, "node-1a"), "all programs are ready again")
            assert before.isdisjoint({pid for pid, _ in lab.processes("node-1a")})
            sent = plain.report.sent
            until(lambda: plain.report.sent > sent + 300, "packets flow on")
        for flow in (plain, encapsulated):
            assert flow.report.lost == 0
            assert flow.report.tcp_intact
        settle(probe, everything)


def _ready(lab: Lab, node: str) -> bool:
    (member,) = (each for each in lab.status()["members"] if each["name"] == node)
    return all(program["ready"] and program["restarts"] for program in member["programs"])
