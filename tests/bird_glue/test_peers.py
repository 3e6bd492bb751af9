"""Peers against the recorded behaviour of Calico's confd (``bgp_golden``), and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from api.bgp import BGPConfiguration, BGPPeer
from api.ippool import IPPool
from api.net import V4, V6, Net, format_address, parse_net
from api.node import Node
from api.registry import KINDS, parse_as
from bird_glue.peers import Peer, PeerType, desired_peers
from bird_glue.pools import pool_policy
from bird_glue.settings import Cluster, local_settings
from bird_glue.workloads import Workload
from tests.support import vectors

# The recording changes one object of the case it follows, and holds only that object.
BASES = {
    "explicit_peering/selectors/step2": "explicit_peering/selectors",
    "mesh/static-routes-exclude-node/step2": "mesh/static-routes",
}
NAMES = {PeerType.MESH: "Mesh", PeerType.GLOBAL: "Global", PeerType.NODE: "Node"}


CASES = {case["id"]: case for case in (vectors.find("bgp_golden") or {"cases": ()})["cases"]}


def documents(case_id: str) -> dict[tuple[str, str], dict[str, Any]]:
    found = documents(BASES[case_id]) if case_id in BASES else {}
    for document in yaml.safe_load_all(CASES[case_id]["input_yaml"]):
        if document:
            labels = document["metadata"].get("labels", {})
            document["metadata"]["labels"] = {
                key: str(value).lower() if isinstance(value, bool) else value
                for key, value in labels.items()
            }
            document["spec"] = document.get("spec") or {}
            found[document["kind"], document["metadata"]["name"]] = document
    return found


def cluster_of(case_id: str) -> tuple[Cluster, list[IPPool]]:
    nodes, peers, configurations, pools = {}, {}, {}, []
    for (kind, name), document in documents(case_id).items():
        if kind in KINDS:
            parsed = parse_as(kind, document)
            if isinstance(parsed, Node):
                nodes[name] = parsed
            elif isinstance(parsed, BGPPeer):
                peers[name] = parsed
            elif isinstance(parsed, BGPConfiguration):
                configurations[name] = parsed
            elif isinstance(parsed, IPPool):
                pools.append(parsed)
    return Cluster(nodes, peers, configurations), pools


def fact(peer: Peer, asn: int) -> dict[str, Any]:
    """A peer as the recording describes one, in the fields that concern peering."""
    text = format_address(*peer.address[:2])
    name = f"{NAMES[peer.type]}_{text.replace('.', '_').replace(':', '_')}"
    port = None if peer.type is PeerType.MESH else peer.port
    return {
        "name": f"{name}_port_{port}" if port else name,
        "ip": text,
        "port": peer.port,
        "asn": peer.remote_as,
        "local_as": peer.local_as,
        "passive": peer.passive,
        "password": peer.password and peer.password.key,  # none has one in the recording
        "source_address": format_address(*peer.source[:2]) if peer.source else None,
        "ttl_security": "on" if peer.ttl_security else "off",
        "next_hop_self": peer.next_hop_self,
        "next_hop_keep": peer.next_hop_keep,
        "rr_client": peer.cluster_id is not None,
        "rr_cluster_id": format_address(V4, peer.cluster_id) if peer.cluster_id else None,
        "internal_mesh_or_ibgp_export": peer.remote_as == (peer.local_as or asn),
    }


@pytest.mark.skipif(not CASES, reason=vectors.absent())
@pytest.mark.parametrize("case_id", CASES or ["-"])
def test_recorded_peers(case_id: str) -> None:
    case = CASES[case_id]
    cluster, _ = cluster_of(case_id)
    local = local_settings(cluster, case["node"], case["env"].get("CALICO_ROUTER_ID", ""))
    assert local is not None
    peers, problems = desired_peers(cluster, local)
    assert problems == []
    for version, family in ((V4, "v4"), (V6, "v6")):
        facts = case["facts"][family]
        found = {
            p["name"]: p for p in (fact(p, local.asn) for p in peers if p.address[0] == version)
        }
        expected = {p["name"]: p for p in facts["peers"]}
        assert found == {
            name: {key: peer[key] for key in found.get(name, peer)}
            for name, peer in expected.items()
        }
        assert facts["router_id"] == format_address(V4, local.router_id)
        if version in local.node.hosts:
            assert facts["local_as"] == local.asn


@pytest.mark.skipif(not CASES, reason=vectors.absent())
@pytest.mark.parametrize("case_id", CASES or ["-"])
def test_recorded_pools(case_id: str) -> None:
    """What is exported, and what the kernel gets; IPIP is felix's, whatever the field says."""
    case = CASES[case_id]
    cluster, pools = cluster_of(case_id)
    local = local_settings(cluster, case["node"], "1.1.1.1")
    assert local is not None
    policies = {p.spec.cidr: pool_policy(p.spec, local.program_unencapsulated) for p in pools}
    ipip = {p.spec.cidr for p in pools if p.spec.ipip_mode != "Never"}
    for family in ("v4", "v6"):
        facts = case["facts"][family]
        for cidr, action, _ in facts["export"]:
            assert policies[cidr].exported == (action == "accept"), cidr
        for cidr, action, _ in facts["kernel"]:
            assert policies[cidr].programmed == (action == "accept" and cidr not in ipip), cidr


def node(name: str, address: str, **bgp: Any) -> Node:
    labels = bgp.pop("labels", {})
    value = {
        "metadata": {"name": name, "labels": labels},
        "spec": {"bgp": {"ipv4Address": address, **bgp}},
    }
    parsed = parse_as("Node", value)
    assert isinstance(parsed, Node)
    return parsed


def peer(name: str, **spec: Any) -> BGPPeer:
    parsed = parse_as("BGPPeer", {"metadata": {"name": name}, "spec": spec})
    assert isinstance(parsed, BGPPeer)
    return parsed


def make_cluster(*objects: Node | BGPPeer | BGPConfiguration) -> Cluster:
    return Cluster(
        {o.name: o for o in objects if isinstance(o, Node)},
        {o.name: o for o in objects if isinstance(o, BGPPeer)},
        {o.name: o for o in objects if isinstance(o, BGPConfiguration)},
    )


def peers_of(cluster: Cluster, name: str) -> dict[Net, Peer]:
    local = local_settings(cluster, name)
    assert local is not None
    return {p.address: p for p in desired_peers(cluster, local)[0]}


def host(text: str) -> Net:
    return parse_net(text)


def test_of_two_mesh_nodes_the_textually_greater_waits() -> None:
    cluster = make_cluster(node("a", "10.0.0.9/24"), node("b", "10.0.0.10/24"))
    assert not peers_of(cluster, "a")[host("10.0.0.10")].passive
    assert peers_of(cluster, "b")[host("10.0.0.9")].passive


def test_mesh_of_nodes_with_as_numbers_of_their_own() -> None:
    cluster = make_cluster(node("a", "10.0.0.1/24", asNumber=65001), node("b", "10.0.0.2/24"))
    assert peers_of(cluster, "a")[host("10.0.0.2")].remote_as == 64512
    assert peers_of(cluster, "b")[host("10.0.0.1")].remote_as == 65001


def test_a_reflector_leaves_the_mesh_and_has_clients() -> None:
    cluster = make_cluster(
        node("rr", "10.0.0.1/24", routeReflectorClusterID="1.0.0.1", labels={"rr": "yes"}),
        node("rr2", "10.0.0.2/24", routeReflectorClusterID="1.0.0.1", labels={"rr": "yes"}),
        node("a", "10.0.0.3/24"),
        peer("reflectors", nodeSelector="all()", peerSelector="has(rr)"),
    )
    found = peers_of(cluster, "rr")
    assert {p.type for p in found.values()} == {PeerType.NODE}
    assert found[host("10.0.0.3")].cluster_id == 0x01000001
    assert found[host("10.0.0.2")].cluster_id is None  # the same cluster: no client
    assert set(peers_of(cluster, "a")) == {host("10.0.0.1"), host("10.0.0.2")}


def test_reverse_peering_can_be_turned_off() -> None:
    nodes = (node("a", "10.0.0.1/24"), node("b", "10.0.0.2/24", labels={"b": "yes"}))
    mesh_off = BGPConfiguration.model_validate(
        {"metadata": {"name": "default"}, "spec": {"nodeToNodeMeshEnabled": False}}
    )
    for reverse, expected in (("Auto", {host("10.0.0.1")}), ("Manual", set())):
        one = peer("p", node="a", peerSelector="has(b)", reversePeering=reverse)
        assert set(peers_of(make_cluster(*nodes, mesh_off, one), "b")) == expected


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"peerIP": "192.0.2.1"}, "spec.asNumber"),
        ({"asNumber": 65001}, "spec.peerIP"),
        ({"localWorkloadSelector": "all(", "asNumber": 65001}, "spec.localWorkloadSelector"),
        ({"peerSelector": "role = 'tor'"}, "spec.peerSelector"),
        ({"nodeSelector": "has(", "peerIP": "192.0.2.1", "asNumber": 1}, "spec.nodeSelector"),
    ],
)
def test_what_is_wrong_with_a_peer_is_named_and_the_others_stay(
    spec: dict[str, Any], field: str
) -> None:
    good = peer("good", peerIP="192.0.2.9", asNumber=65009)
    cluster = make_cluster(node("a", "10.0.0.1/24"), peer("bad", **spec), good)
    local = local_settings(cluster, "a")
    assert local is not None
    peers, problems = desired_peers(cluster, local)
    assert [p.address for p in peers] == [host("192.0.2.9")]
    assert [(p.kind, p.name, p.problem.field) for p in problems] == [("BGPPeer", "bad", field)]


def test_workloads_of_this_node_that_a_peer_selects() -> None:
    configuration = BGPConfiguration.model_validate(
        {"metadata": {"name": "default"}, "spec": {"localWorkloadPeeringIPV4": "169.254.0.179"}}
    )
    wanted = peer(
        "vms", localWorkloadSelector="app == 'vm'", asNumber=65001, filters=["f"], node="a"
    )
    workloads = [
        Workload({"app": "vm"}, {4: host("10.1.0.5"), 6: host("fd00::5")}, "cali1"),
        Workload({"app": "web"}, {4: host("10.1.0.6")}, "cali2"),
    ]
    cluster = make_cluster(
        node("a", "10.0.0.1/24"), node("b", "10.0.0.2/24"), wanted, configuration
    )
    for name, expected in (("a", 1), ("b", 0)):
        local = local_settings(cluster, name)
        assert local
        peers, problems = desired_peers(cluster, local, workloads)
        found = [peer for peer in peers if peer.type is PeerType.WORKLOAD]
        assert (problems, len(found)) == ([], expected)  # no IPv6 on this node
    local = local_settings(cluster, "a")
    assert local
    (made,) = [p for p in desired_peers(cluster, local, workloads)[0] if p.owner[1] == "vms"]
    assert (made.address, made.source) == (host("10.1.0.5"), host("169.254.0.179"))
    assert (made.remote_as, made.passive, made.interface) == (65001, True, "cali1")
    assert made.filters == ("f",)


def test_peers_do_not_depend_on_the_order_of_objects() -> None:
    objects: list[Node | BGPPeer] = [
        node("a", "10.0.0.1/24"),
        node("b", "10.0.0.2/24", labels={"tor": "1"}),
        peer("x", peerIP="10.0.0.2", asNumber=64512, keepaliveTime="10s"),
        peer("y", node="a", peerSelector="has(tor)"),
        peer("z", peerIP="10.0.0.2", asNumber=64512),
    ]
    results = []
    for order in (objects, objects[::-1]):
        cluster = make_cluster(*order)
        local = local_settings(cluster, "a")
        assert local is not None
        results.append(desired_peers(cluster, local))
    assert results[0] == results[1]
    # the mesh's and the first global BGPPeer's; "y" wants what "x" already has
    assert [p.owner for p in results[0][0]] == [("BGPPeer", "x"), ("Node", "b")]
