from __future__ import annotations

from typing import Any

import pytest

from api.felix import FelixConfiguration
from api.policy import GlobalNetworkPolicySpec
from api.registry import parse_as
from datastore.interface import JSON, Key
from felix.closed import closed_policy
from felix.settings import EndpointToHost, Manner, SettingsError, settings
from felix.snapshot import Snapshot
from policy.compile import compile_policy
from policy.model import Action, PolicyId


def spec(**fields: Any) -> Any:
    parsed = parse_as("FelixConfiguration", {"metadata": {"name": "default"}, "spec": fields})
    assert isinstance(parsed, FelixConfiguration)
    return parsed.spec


def test_defaults_are_calicos() -> None:
    own = settings()
    assert own.interface_prefixes == ("cali",)
    assert own.iptables == own.nftables == Manner(0x10000, 0x20000)
    assert own.endpoint_to_host is EndpointToHost.DROP
    assert (own.vxlan_port, own.vxlan_vni, own.vxlan_enabled) == (4789, 4096, None)
    assert own.iptables_backend == "auto" and not own.append_hooks
    assert (own.refresh_nftables, own.refresh_iptables, own.refresh_network) == (90, 90, 90)


def test_the_node_overrides_the_cluster() -> None:
    own = settings(
        [
            spec(logPrefix="node", iptablesRefreshInterval="5s", routeRefreshInterval="0s"),
            spec(logPrefix="cluster", interfacePrefix="cali, tap", ipsetsRefreshInterval="0s"),
        ]
    )
    assert own.log_prefix == "node" and own.interface_prefixes == ("cali", "tap")
    assert (own.refresh_nftables, own.refresh_iptables, own.refresh_network) == (180, 5, 0)
    assert own.is_workload("tap1") and own.is_workload("cali1") and not own.is_workload("eth0")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"interfacePrefix": "cali,"}, "interfacePrefix.*beginnings of interface names"),
        ({"interfacePrefix": "much-too-long-a-prefix"}, "interfacePrefix"),
        ({"iptablesMarkMask": 0x80}, "iptablesMarkMask.*at least two bits"),
        ({"nftablesMarkMask": 0}, "nftablesMarkMask.*at least two bits"),
        ({"vxlanPort": 70000}, "vxlanPort.*1 to 65535"),
        ({"vxlanVNI": 1 << 24}, "vxlanVNI"),
    ],
)
def test_what_can_not_be_used_is_named(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        settings([spec(**fields)])


NETWORK_POLICY = Key("NetworkPolicy", "p", "ns")
GLOBAL = Key("GlobalNetworkPolicy", "g")
KUBERNETES = Key("KubernetesNetworkPolicy", "k", "ns")
BAD_RULE = [{"action": "Maybe"}]


@pytest.mark.parametrize(
    ("key", "value", "selector", "ingress", "egress"),
    [
        (NETWORK_POLICY, {"ingress": BAD_RULE}, 'projectcalico.org/namespace == "ns"', 1, 0),
        (NETWORK_POLICY, {"ingress": BAD_RULE, "selector": "has(a)"}, "has(a)", 1, 0),
        (NETWORK_POLICY, {"egress": BAD_RULE, "types": ["Egress"]}, "ns", 0, 1),
        (NETWORK_POLICY, {"egress": BAD_RULE, "types": ["egress"]}, "ns", 1, 1),
        (NETWORK_POLICY, {"Selector": "has(b)", "surprise": 1}, "has(b)", 1, 0),
        (NETWORK_POLICY, "nothing at all", "ns", 1, 0),
        (GLOBAL, {"selector": "((", "ingress": BAD_RULE}, "all()", 1, 0),
        (GLOBAL, {"namespaceSelector": "team == 'x'", "order": "first"}, "pcns.team", 1, 0),
        (KUBERNETES, {"podSelector": {"matchLabels": {"a": "b"}}, "new": 1}, 'a == "b"', 1, 0),
        (KUBERNETES, {"podSelector": {"matchLabels": 5}, "egress": [{}]}, "k8s", 1, 1),
    ],
)
def test_an_unreadable_policy_denies_where_it_would_apply(
    key: Key, value: Any, selector: str, ingress: int, egress: int
) -> None:
    obj: JSON = {"metadata": {"name": key.name, "namespace": key.namespace}, "spec": value}
    compiled = compile_policy(PolicyId(key.kind, key.namespace, key.name), closed_policy(key, obj))
    assert selector in compiled.selector.canonical
    for rules, denies in (
        (compiled.rules.policy.ingress, ingress),
        (compiled.rules.policy.egress, egress),
    ):
        assert (rules is not None) == bool(denies)
        assert [rule.action for rule in rules or ()] == [Action.DENY] * denies


def test_tier_and_order_of_an_unreadable_policy_are_kept() -> None:
    value = {"spec": {"tier": "t", "order": 7, "ingress": BAD_RULE}}
    policy = closed_policy(GLOBAL, value)
    assert isinstance(policy.spec, GlobalNetworkPolicySpec)
    assert (policy.spec.tier, policy.spec.order) == ("t", 7)


def test_an_endpoint_may_be_written_in_any_case_and_can_not_choose_its_namespace() -> None:
    snapshot = Snapshot()
    key = Key("WorkloadEndpoint", "n-k8s-p-eth0", "ns")
    labels = {"a": "b", "projectcalico.org/namespace": "other"}
    fields = {"Node": "n", "interfacename": "cali1", "IPNetworks": ["10.0.0.1/32"]}
    metadata = {"name": key.name, "namespace": "ns", "labels": labels}
    value: JSON = {"metadata": metadata, "spec": fields}
    snapshot.update(key, value)
    assert snapshot.problems == {}
    workload = snapshot.workloads[key]
    assert (workload.node, workload.interface, len(workload.nets)) == ("n", "cali1", 1)
    assert dict(workload.labels) == {"a": "b", "projectcalico.org/namespace": "ns"}
    snapshot.dirty.clear()
    snapshot.update(key, value)
    assert not snapshot.dirty
    value["spec"]["ipNetworks"] = ["10.0.0.0/24"]
    snapshot.update(key, value)
    assert key not in snapshot.workloads and "ipNetworks" in snapshot.problems[key]
    snapshot.update(key, None)
    assert snapshot.problems == {}
