"""An AS number per server, two spines, both kinds of router: as networks are built today."""

from __future__ import annotations

from functools import partial

import pytest

from lab.client import Lab
from lab.flow import arrivals
from lab.probe import Pair, Probe
from tests.scenarios.fabrics import PATIENCE, calico, fabric, pods, rack, settle, until, up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def everything(pair: Pair) -> bool:
    return True


def _next_hops(lab: Lab, router: str, at_least: int) -> bool:
    return lab.run(router, "ip", "route").stdout.count("nexthop") >= at_least


def test_a_clos_fabric_with_an_as_per_server() -> None:
    racks = [rack(1, 65001, "ab"), rack(2, 65002, "ab", router="frr")]
    number = 4200000001
    for each in racks:
        for node in each["nodes"]:
            node["asNumber"] = number
            number += 1
    tors = [
        calico(
            "BGPPeer",
            f"tor-{n}",
            nodeSelector=f"lab.manx.dev/rack == 'rack-{n}'",
            peerIP=f"172.31.{n}.1",
            asNumber=65000 + n,
        )
        for n in (1, 2)
    ]
    spines = ["spine-a", "spine-b"]
    document = fabric(
        racks,
        [
            calico("IPPool", "pods", cidr="10.80.0.0/16"),
            calico("BGPConfiguration", "default", nodeToNodeMeshEnabled=False),
            *tors,
        ],
        routers=[
            {"name": "spine-a", "asNumber": 65100, "router": "bird"},
            {"name": "spine-b", "asNumber": 65100, "router": "frr"},
        ],
        links=[
            {"between": [f"tor-{t}", spine], "subnet": f"172.31.255.{4 * s + 2 * t}/31"}
            for t in (1, 2)
            for s, spine in enumerate(spines)
        ],
        hosts=[{"name": "outside", "router": "spine-a", "address": "198.51.100.10/24"}],
        pods=pods(["node-1a", "node-1b", "node-2a", "node-2b"]),
    )
    with up(document) as lab:
        names = ["p-1a", "p-1b", "p-2a", "p-2b", "outside"]
        with Probe.of(lab, names) as probe:
            for (source, _), reach in settle(probe, everything).items():
                assert reach.seen == probe.stations[source].address
            # both spines are used: the other rack's blocks have two next hops each
            for tor in ("tor-1", "tor-2"):
                until(partial(_next_hops, lab, tor, 4), f"{tor} has routes with two next hops")
            # a spine goes: its sessions end, the other carries everything
            for link in ("tor-1", "tor-2"):
                lab.run("spine-b", "ip", "link", "set", link, "down")
            settle(probe, everything)
            for tor in ("tor-1", "tor-2"):
                assert not _next_hops(lab, tor, 1)
            for link in ("tor-1", "tor-2"):
                lab.run("spine-b", "ip", "link", "set", link, "up")
            settle(probe, everything)
            one, other = probe.stations["p-1a"], probe.stations["p-2a"]
            assert arrivals(one, other, sender=one.address, timeout=PATIENCE) == 5
            assert arrivals(one, other, sender=probe.stations["p-1b"].address) == 0
