"""CalicoNodeStatus: written by the node it names, as often and as much as it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from api.registry import parse_as
from bird_glue.nodestatus import MOST_ROUTES, report
from datastore.connect import connect as connect_store
from datastore.interface import Key
from tests.bird_glue.world import BIRD_COMMON, BIRD_SESSION, world
from tests.support.netns import connect, eventually

STATUS = {
    "pid": 7,
    "started": 1.0,
    "configured": 2.0,
    "in_sync": True,
    "engine": "exabgp",
    "router_id": "172.31.1.11",
    "peers": [
        {"address": "10.0.0.1", "type": "global", "state": "Established", "since": 0.0},
        {"address": "10.0.0.2", "type": "node-to-node mesh", "state": "Active", "since": 1.0},
        {"address": "fd00::1", "type": "node specific", "state": "Established", "since": 2.0},
    ],
}


def valid(status: dict[str, Any]) -> dict[str, Any]:
    """The status, once the model of the kind has taken it."""
    spec = {"node": "n1", "classes": ["BGP"], "updatePeriodSeconds": 10}
    value = {"apiVersion": "projectcalico.org/v3", "kind": "CalicoNodeStatus"}
    metadata = {"name": "n1"}
    parse_as("CalicoNodeStatus", value | {"metadata": metadata, "spec": spec, "status": status})
    return status


def test_classes_decide_what_is_told() -> None:
    assert valid(report([], STATUS, {})).keys() == {"lastUpdated"}
    bgp = valid(report(["BGP"], STATUS, {}))["bgp"]
    assert (bgp["numberEstablishedV4"], bgp["numberNotEstablishedV4"]) == (1, 1)
    assert (bgp["numberEstablishedV6"], bgp["numberNotEstablishedV6"]) == (1, 0)
    assert [peer["type"] for peer in bgp["peersV4"]] == ["GlobalPeer", "NodeMesh"]
    assert bgp["peersV6"] == [
        {
            "peerIP": "fd00::1",
            "type": "NodePeer",
            "state": "Established",
            "since": "1970-01-01T00:00:02Z",
        }
    ]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "Ready"),
        ({"pid": None}, "NotReady"),
        ({"pid": None, "peers": []}, "Ready"),
        ({"in_sync": False}, "NotReady"),
    ],
)
def test_when_the_daemon_is_ready(changes: dict[str, Any], state: str) -> None:
    agent = valid(report(["Agent"], STATUS | changes, {}))["agent"]
    runs = (STATUS | changes)["pid"] is not None
    assert ("lastBootTime" in agent["birdV4"]) == runs
    assert agent["birdV4"]["state"] == agent["birdV6"]["state"] == state


def test_routes_by_version_and_no_more_than_a_store_takes() -> None:
    route = {"type": "FIB", "gateway": "10.0.0.1"}
    many = [route | {"destination": f"10.{n >> 8}.{n & 255}.0/24"} for n in range(MOST_ROUTES + 9)]
    told = [*many, route | {"destination": "2001:db8::/64"}]
    routes = valid(report(["Routes"], STATUS, {"routes": told}))["routes"]
    assert len(routes["routesV4"]) == MOST_ROUTES
    assert [route["destination"] for route in routes["routesV6"]] == ["2001:db8::/64"]


@pytest.mark.parametrize("engine", ["exabgp", "bird"])
def test_written_for_this_node_and_kept_up_to_date(tmp_path: Path, engine: str) -> None:
    with world(tmp_path) as made:
        node, tor = made.node("n1"), made.bird("tor")
        connect(node.namespace, "eth0", tor.namespace, "n1", ["172.31.1.11/24", "172.31.1.1/24"])
        store = made.store
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        store.put("BGPPeer", "tor", peerIP="172.31.1.1", asNumber=65001)
        store.node("n1", "172.31.1.11/24")
        store.block("n1", "10.1.0.0/26")
        every = {"classes": ["Agent", "BGP", "Routes"], "updatePeriodSeconds": 1}
        store.put("CalicoNodeStatus", "ours", node="n1", **every)
        store.put("CalicoNodeStatus", "others", node="n2", **every)
        store.put("CalicoNodeStatus", "never", node="n1", classes=["BGP"], updatePeriodSeconds=0)
        session = BIRD_SESSION.format(
            name="n1", local="172.31.1.1", asn=65001, peer="172.31.1.11", peer_asn=64512,
            export="all",
        )  # fmt: skip
        statics = "protocol static { ipv4; route 10.50.0.0/16 blackhole; }"
        tor.start(BIRD_COMMON.format(router_id="172.31.1.1") + statics + session)
        node.start(MANX_BGP_ENGINE=engine)
        reader = connect_store(store.url)
        expected = {("FIB", "10.1.0.0/26"), ("FIB", "10.50.0.0/16")}
        if engine == "exabgp":  # which knows what is refused, too
            expected.add(("RIB", "172.31.1.0/24"))
        try:

            def status(name: str) -> dict[str, Any]:
                found = reader.get(Key("CalicoNodeStatus", name)).value.get("status", {})
                assert isinstance(found, dict)
                return found

            def complete() -> bool:
                found = status("ours")
                routes = found.get("routes", {}).get("routesV4", [])
                return (
                    found.get("bgp", {}).get("numberEstablishedV4") == 1
                    and found["agent"]["birdV4"]["state"] == "Ready"
                    and {(r["type"], r["destination"]) for r in routes} == expected
                )

            eventually(complete)
            valid(status("ours"))
            tor.daemon.end()
            eventually(lambda: status("ours")["bgp"]["numberEstablishedV4"] == 0)
            assert status("others") == status("never") == {}
        finally:
            reader.close()
