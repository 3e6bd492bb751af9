"""What the node makes of objects in the datastore, right and wrong."""

from __future__ import annotations

from typing import Any

from api.errors import UNREADABLE
from api.net import parse_net
from bird_glue.filters import Rule
from bird_glue.resources import Resources
from bird_glue.settings import prefix_communities
from datastore.follower import Update
from datastore.interface import Key


def put(resources: Resources, kind: str, name: str, spec: Any) -> bool:
    value = {"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": {"name": name}}
    return resources.update(Update(Key(kind, name), {**value, "spec": spec}))


def affinity(resources: Resources, cidr: str, node: str = "n1", **spec: Any) -> bool:
    name = f"{node}-{cidr.replace('.', '-').replace('/', '-')}"
    spec = {"state": "confirmed", "node": node, "cidr": cidr, **spec}
    return put(resources, "BlockAffinity", name, spec)


def test_own_confirmed_blocks() -> None:
    resources = Resources("n1")
    affinity(resources, "10.0.1.0/26")
    affinity(resources, "10.0.0.0/26", state="")
    affinity(resources, "10.0.2.0/26", state="pending")
    affinity(resources, "10.0.3.0/26", state="pendingDeletion")
    affinity(resources, "10.0.4.0/26", type="virtual")
    affinity(resources, "10.0.5.0/26", deleted=True)
    assert not affinity(resources, "10.0.6.0/26", node="n2")
    assert resources.blocks() == (parse_net("10.0.0.0/26"), parse_net("10.0.1.0/26"))
    assert affinity(resources, "10.0.1.0/26", node="n1", state="pendingDeletion")
    assert resources.blocks() == (parse_net("10.0.0.0/26"),)


def lock(resources: Resources, ready: object) -> bool:
    return put(resources, "ClusterInformation", "default", {"datastoreReady": ready})


def test_what_changes_while_the_datastore_is_locked_waits() -> None:
    resources = Resources("n1")
    affinity(resources, "10.0.0.0/26")
    assert not lock(resources, True)
    assert lock(resources, False)
    assert not lock(resources, False)
    assert resources.locked
    assert not affinity(resources, "10.0.1.0/26")
    assert not resources.update(Update(Key("BlockAffinity", "n1-10-0-0-0-26"), None))
    assert resources.blocks() == (parse_net("10.0.0.0/26"),)
    assert lock(resources, True)
    assert resources.blocks() == (parse_net("10.0.1.0/26"),)
    assert affinity(resources, "10.0.2.0/26")
    for unlocked in (None, "false", 0):
        lock(resources, False)
        assert lock(resources, unlocked)
    lock(resources, False)
    assert resources.update(Update(Key("ClusterInformation", "default"), None))
    lock(resources, False)
    garbage = {"spec": ["datastoreReady"]}
    assert resources.update(Update(Key("ClusterInformation", "default"), garbage))
    assert not put(resources, "ClusterInformation", "other", {"datastoreReady": False})


def test_a_block_that_changes_hands_is_no_longer_ours() -> None:
    resources = Resources("n1")
    affinity(resources, "10.0.0.0/26")
    spec = {"state": "confirmed", "node": "n2", "cidr": "10.0.0.0/26"}
    assert put(resources, "BlockAffinity", "n1-10-0-0-0-26", spec)
    assert resources.blocks() == ()


def test_an_invalid_object_is_named_and_what_it_was_stands() -> None:
    resources = Resources("n1")
    put(resources, "BGPPeer", "tor", {"peerIP": "192.0.2.1", "asNumber": 65001})
    put(resources, "BGPPeer", "tor", {"peerIP": "192.0.2.300", "asNumber": 65001})
    assert resources.cluster().peers["tor"].spec.peer_ip == "192.0.2.1"
    (problem,) = resources.problems
    assert str(problem).startswith("BGPPeer tor: spec.peerIP: '192.0.2.300': ")
    resources.update(Update(Key("BGPPeer", "tor"), None))
    assert resources.problems == []
    assert resources.cluster().peers == {}


def test_a_field_of_a_newer_calico_costs_itself_alone() -> None:
    """Also where nothing is known from before: a pool must not be told to all because of it."""
    resources = Resources("n1")
    spec = {"cidr": "10.2.0.0/16", "disableBGPExport": True, "newer": {"x": 1}}
    put(resources, "IPPool", "b", spec)
    put(resources, "Node", "n1", {"BGP": {"ipv4Address": "192.0.2.1/24", "newer": True}})
    put(resources, "BGPConfiguration", "default", {"asNumber": 65000, "newer": 1})
    put(resources, "BGPFilter", "f", {"importV4": [{"action": "Accept", "newer": 1}]})
    assert not resources.pools(program_unencapsulated=True).exports_own(parse_net("10.2.0.0/26"))
    assert node_names(resources) == ["n1"] and resources.cluster().asn == 65000
    assert resources.filters() == {}, "the field could be a condition"
    assert sum("newer" in str(problem) for problem in resources.problems) == 4
    twice = {"bgp": {"ipv4Address": "192.0.2.1/24"}, "BGP": {"newer": 1}}
    put(resources, "Node", "n2", twice)
    assert node_names(resources) == ["n1"]
    put(resources, "Node", "n1", {UNREADABLE: "not JSON"})
    assert node_names(resources) == ["n1"], "what it was before stands"
    assert resources.cluster().nodes["n1"].spec.bgp is not None
    put(resources, "IPPool", "b", {**spec, "disableBGPExport": "no"})
    assert not resources.pools(program_unencapsulated=True).exports_own(parse_net("10.2.0.0/26"))


def test_a_field_of_a_newer_calico_costs_the_range_that_it_may_be_a_condition_of() -> None:
    """Without it the range would be told by every node."""
    resources = Resources("n1")
    whole = [{"cidr": cidr} for cidr in ("203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24")]
    put(resources, "BGPConfiguration", "default", {"serviceLoadBalancerIPs": whole})
    assert len(resources.announced_services("n1")) == 3
    newer = {"nodeSelector": "rack == 'edge'", "newer": 1}
    ranges = [whole[0] | newer, whole[1], whole[2] | newer]
    told = [{"cidr": "10.0.0.0/8", "communities": ["1:2"]} | newer]
    told.append({"cidr": "10.1.0.0/16", "communities": ["1:3"]})
    spec = {"serviceLoadBalancerIPs": ranges, "prefixAdvertisements": told}
    put(resources, "BGPConfiguration", "default", spec)
    assert resources.announced_services("n1") == {parse_net("198.51.100.0/24")}
    assert prefix_communities(resources.cluster(), "n1") == ((parse_net("10.1.0.0/16"), ("1:3",)),)
    where = "BGPConfiguration default: spec.serviceLoadBalancerIPs[2].nodeSelector: "
    assert any(str(problem).startswith(where) for problem in resources.problems)


def node_names(resources: Resources) -> list[str]:
    return list(resources.cluster().nodes)


def test_no_sessions_before_the_clusters_settings_are_known() -> None:
    """Absent means Calico's defaults, but an AS number is never guessed."""
    resources = Resources("n1")
    found = [resources.usable]
    for asn in ("many", 65000, "many"):
        put(resources, "BGPConfiguration", "default", {"asNumber": asn})
        found.append(resources.usable)
    assert found == [True, False, True, True]
    assert resources.cluster().asn == 65000


def test_pools() -> None:
    resources = Resources("n1")
    put(resources, "IPPool", "a", {"cidr": "10.1.0.0/16", "disabled": True})
    put(resources, "IPPool", "b", {"cidr": "10.2.0.0/16", "disableBGPExport": True})
    put(resources, "IPPool", "c", {"cidr": "10.3.0.0/16", "vxlanMode": "CrossSubnet"})
    pools = resources.pools(program_unencapsulated=True)
    inside = [parse_net(f"10.{n}.0.0/26") for n in (1, 2, 3, 4)]
    assert [pools.exports_own(net) for net in inside] == [True, False, True, True]
    assert [pools.exports_learned(net) for net in inside] == [True, False, True, False]
    assert [pools.programs(net) for net in inside] == [True, True, False, True]
    left_to_felix = resources.pools(program_unencapsulated=False)
    assert [left_to_felix.programs(net) for net in inside] == [False, False, False, True]


def test_ranges_that_kubernetes_gave_the_node() -> None:
    """With host-local they take the place of blocks."""

    def kubernetes_node(name: str, *cidrs: str) -> Update:
        spec = {"podCIDRs": list(cidrs)}
        return Update(Key("KubernetesNode", name), {"metadata": {"name": name}, "spec": spec})

    resources = Resources("n1", pod_cidrs=True)
    assert not resources.update(kubernetes_node("n2", "10.9.2.0/24"))
    assert resources.update(kubernetes_node("n1", "10.9.1.0/24", "fd00:1::/64"))
    expected = (parse_net("10.9.1.0/24"), parse_net("fd00:1::/64"))
    assert resources.blocks() == expected
    resources.update(kubernetes_node("n1", "10.9.1.0/33"))
    assert resources.blocks() == expected
    assert str(resources.problems[0]).startswith(
        "KubernetesNode n1: spec.podCIDRs: ['10.9.1.0/33']"
    )
    plain = Resources("n1")
    plain.update(kubernetes_node("n1", "10.9.1.0/24"))
    assert plain.blocks() == ()


def test_filters_and_what_else_is_to_be_followed() -> None:
    resources = Resources("n1")
    put(resources, "BGPFilter", "f", {"importV4": [{"action": "Reject"}]})
    put(resources, "BGPFilter", "f", {"importV4": [{"action": "Perhaps"}]})
    assert resources.filters()["f"].import_v4 == (Rule(accept=False),)  # what it was stands
    assert str(resources.problems[0]).startswith("BGPFilter f: spec.importV4[0].action: 'Perhaps'")
    assert resources.needs == frozenset()
    ranges = {"serviceClusterIPs": [{"cidr": "10.96.0.0/16"}]}
    put(resources, "BGPConfiguration", "default", ranges)
    assert resources.needs == {"services"}
    pools = resources.pools(program_unencapsulated=True)
    assert not pools.programs(parse_net("10.96.0.5"))
    put(resources, "BGPConfiguration", "default", {})
    put(resources, "BGPPeer", "p", {"localWorkloadSelector": "all()", "asNumber": 1})
    assert resources.needs == {"workloads"}


def test_nodes_that_services_are_not_to_be_announced_by() -> None:
    resources = Resources("n1")
    ranges = {"serviceExternalIPs": [{"cidr": "203.0.113.0/24"}]}
    put(resources, "BGPConfiguration", "default", ranges)
    assert resources.announced_services("n1") == {parse_net("203.0.113.0/24")}
    labels = {"node.kubernetes.io/exclude-from-external-load-balancers": "true"}
    value = {"kind": "Node", "metadata": {"name": "n1", "labels": labels}, "spec": {}}
    resources.update(Update(Key("Node", "n1"), value))
    assert resources.announced_services("n1") == frozenset()
