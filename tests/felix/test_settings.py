from __future__ import annotations

from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.felix import FelixConfiguration, FelixConfigurationSpec
from api.policy import GlobalNetworkPolicySpec
from api.registry import parse_as
from datastore.interface import JSON, Key
from felix.closed import closed_policy
from felix.settings import (
    FORBIDDEN_FLOWS,
    Configuration,
    EndpointToHost,
    Failsafe,
    Manner,
    NftablesMode,
    SettingsError,
    read_configuration,
    settings,
)
from felix.snapshot import Snapshot
from policy.compile import compile_policy
from policy.engine import UNPLACED
from policy.model import Action, PolicyId

OTHERS = tuple(1 << bit for bit in range(18, 32))


def spec(**fields: Any) -> Any:
    parsed = parse_as("FelixConfiguration", {"metadata": {"name": "default"}, "spec": fields})
    assert isinstance(parsed, FelixConfiguration)
    return parsed.spec


def test_defaults_are_calicos() -> None:
    own = settings()
    assert own.interface_prefixes == ("cali",)
    assert own.iptables == own.nftables == Manner(0x10000, 0x20000, others=OTHERS)
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


DEFAULT = Key("FelixConfiguration", "default")


def read(fields: Any, **more: Any) -> tuple[Configuration, str]:
    configuration, problems = read_configuration(DEFAULT, {"spec": fields, **more})
    return configuration, "; ".join(problems)


def test_one_bad_field_costs_only_itself() -> None:
    good = {"interfacePrefix": "eni", "failsafeInboundHostPorts": [], "nftablesMode": "Disabled"}
    several: list[JSON] = [
        {"futureField": 1},
        {"vxlanPort": 0},
        {"nftablesMarkMask": 1},
        {"logPrefix": []},
    ]
    for bad in several:
        configuration, problems = read({**bad, **good})
        ((field, _),) = bad.items()
        own = settings([configuration.spec])
        assert field in problems and problems.count("spec.") == 1
        assert own.interface_prefixes == ("eni",) and not configuration.unsure
        assert own.failsafe_in == () and own.failsafe_out != ()
        assert own.nftables_mode is NftablesMode.DISABLED
        assert (own.vxlan_port, own.nftables, own.log_prefix) == (
            4789,
            Manner(0x10000, 0x20000, others=OTHERS),
            "calico-packet",
        )


def test_what_is_beside_the_settings_costs_nothing() -> None:
    fields = {"interfacePrefix": "eni"}
    for more in ({"status": {"ready": True}}, {"metadata": {"labels": 5}}):
        configuration, problems = read(fields, **more)
        assert configuration.spec.interface_prefix == "eni" and not configuration.unsure
        assert problems


@pytest.mark.parametrize("choice", ["end", "keep", "no", 5])
def test_what_becomes_of_forbidden_flows_is_chosen_by_an_annotation(choice: Any) -> None:
    metadata = {"annotations": {FORBIDDEN_FLOWS: choice}}
    for fields in ({}, {"futureField": 1}):
        configuration, problems = read(fields, metadata=metadata)
        assert configuration.forbidden_flows == (choice if choice in ("end", "keep") else "")
        assert ("end or keep" in problems) is (choice not in ("end", "keep"))


def test_of_ports_that_stay_reachable_those_count_that_can_be_read() -> None:
    ports = [{"protocol": "TCP", "port": 22}, {"protocol": "TCP", "port": "ssh"}, 7]
    configuration, problems = read(
        {"failsafeInboundHostPorts": ports, "FailsafeOutboundHostPorts": "tcp:22"}
    )
    own = settings([configuration.spec])
    assert own.failsafe_in == (Failsafe(6, 22),) and own.failsafe_out == ()
    assert "failsafeInboundHostPorts[1].port" in problems and "tcp:22" in problems


@pytest.mark.parametrize(
    ("text", "known"),
    [("eni,", "eni"), ("much-too-long-a-prefix,tap,eni", "tap,eni"), (5, None), ("", None)],
)
def test_what_can_not_be_read_of_a_prefix_is_owned_up_to(text: Any, known: str | None) -> None:
    configuration, problems = read({"interfacePrefix": text})
    assert configuration.spec.interface_prefix == known
    assert configuration.unsure is bool(problems) is (text != "")


def test_a_configuration_that_is_none_at_all() -> None:
    configuration, problems = read([1, 2])
    assert configuration.unsure and problems


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    [field.alias or name for name, field in FelixConfigurationSpec.model_fields.items()]
)


@hypothesis.settings(max_examples=100, deadline=None)
@given(st.dictionaries(_FIELDS | _FIELDS.map(str.lower) | st.text(max_size=5), _JUNK), _JUNK)
def test_whatever_is_stored_settings_can_be_had(fields: dict[str, Any], more: Any) -> None:
    for value in ({"spec": fields}, {"spec": more}, {"metadata": more, "spec": fields}, more):
        configuration, _ = read_configuration(DEFAULT, value)
        assert settings([configuration.spec])


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
        (NETWORK_POLICY, {"ingress": [], "Ingress": [], "types": ["Ingress"]}, "ns", 1, 0),
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
    policy, _ = closed_policy(key, obj)
    compiled = compile_policy(PolicyId(key.kind, key.namespace, key.name), policy)
    assert selector in compiled.selector.canonical
    for rules, denies in (
        (compiled.rules.policy.ingress, ingress),
        (compiled.rules.policy.egress, egress),
    ):
        assert (rules is not None) == bool(denies)
        assert [rule.action for rule in rules or ()] == [Action.DENY] * denies


def test_what_an_unreadable_policy_says_counts_however_it_is_spelt() -> None:
    for key in (NETWORK_POLICY, KUBERNETES):
        policy, _ = closed_policy(key, {"Spec": {"Ingress": [{}], "EGRESS": 7, "new": 1}})
        assert policy.spec.types == ["Ingress", "Egress"]
        assert [rule.action for rule in (*policy.spec.ingress, *policy.spec.egress)] == ["Deny"] * 2


def test_tier_and_order_of_an_unreadable_policy_are_kept() -> None:
    value = {"spec": {"tier": "t", "order": 7, "ingress": BAD_RULE}}
    policy, _ = closed_policy(GLOBAL, value)
    assert isinstance(policy.spec, GlobalNetworkPolicySpec)
    assert (policy.spec.tier, policy.spec.order) == ("t", 7)


@pytest.mark.parametrize("order", ["first", True, 10**400, float("nan"), []])
def test_an_unreadable_policy_of_unknown_place_is_the_first(order: Any) -> None:
    for key, name in ((NETWORK_POLICY, "order"), (Key("ClusterNetworkPolicy", "c"), "priority")):
        policy, _ = closed_policy(key, {"spec": {name: order}})
        assert policy.spec.order == UNPLACED
    policy, _ = closed_policy(NETWORK_POLICY, {"spec": {"tier": 5}})
    assert policy.spec.tier == "", "which is none"


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
    assert not snapshot.workloads[key].interface and "ipNetworks" in snapshot.problems[key]
    snapshot.update(key, None)
    assert snapshot.problems == {}
