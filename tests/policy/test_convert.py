"""Kubernetes objects against the recorded conversions."""

from __future__ import annotations

from typing import Any

import pytest

from api import pods
from api.errors import InvalidObjectError
from api.kubernetes import KubernetesNetworkPolicy, Namespace, Pod
from api.registry import dump, parse_as
from policy import convert
from policy.compile import compile_policy
from policy.engine import Profile
from policy.model import PolicyId
from tests.support import vectors


def kubernetes_policy(obj: dict[str, Any]) -> KubernetesNetworkPolicy:
    """Some recorded names are none that Kubernetes would accept."""
    metadata = {**obj["metadata"], "name": obj["metadata"]["name"].lower()}
    policy = parse_as("KubernetesNetworkPolicy", {**obj, "metadata": metadata})
    assert isinstance(policy, KubernetesNetworkPolicy)
    return policy


def pod(obj: dict[str, Any]) -> Pod:
    parsed = parse_as("Pod", obj)
    assert isinstance(parsed, Pod)
    return parsed


def spec(**fields: object) -> dict[str, Any]:
    obj = {"metadata": {"name": "p", "namespace": "ns"}, "spec": {"podSelector": {}, **fields}}
    return dump(convert.network_policy(kubernetes_policy(obj)))["spec"]  # type: ignore[no-any-return]


def test_recorded_network_policies() -> None:
    for case in vectors.load("k8s_netpol_conversion")["cases"]:
        if case["error"]:
            # Calico drops the rule; here the API refuses the object.
            with pytest.raises(InvalidObjectError):
                kubernetes_policy(case["k8s"])
            continue
        converted = convert.network_policy(kubernetes_policy(case["k8s"]))
        assert dump(converted)["spec"] == case["calico"]["spec"], case["id"]


def test_recorded_namespaces() -> None:
    for case in vectors.load("k8s_objects_conversion")["namespaces"]:
        namespace = parse_as("Namespace", case["namespace"])
        assert isinstance(namespace, Namespace)
        assert_profile(*convert.namespace_profile(namespace), case["expected"]["value"])


def test_recorded_service_accounts() -> None:
    for case in vectors.load("k8s_objects_conversion")["serviceaccounts"]:
        metadata = case["serviceaccount"]["metadata"]
        name, profile = convert.service_account_profile(
            metadata["namespace"], metadata["name"], metadata.get("labels", {})
        )
        assert_profile(name, profile, case["expected"]["value"])


def assert_profile(name: str, profile: Profile, expected: dict[str, Any]) -> None:
    assert name == expected["metadata"]["name"]
    assert dict(profile.labels) == expected["spec"]["labelsToApply"]
    for direction in ("ingress", "egress"):
        rules = [{"action": rule.action} for rule in getattr(profile, direction)]
        assert rules == expected["spec"].get(direction, [])


def test_tricky_19_20_recorded_pods() -> None:
    for case in vectors.load("k8s_objects_conversion")["pods"]:
        parsed = pod(case["pod"])
        assert convert.pod_finished(parsed) is case["expected"]["finished"], case["description"]
        for endpoint in case["expected"].get("workloadendpoints", ()):
            expected = endpoint["spec"]
            assert convert.pod_labels(parsed) == endpoint["metadata"]["labels"]
            assert list(convert.pod_profiles(parsed)) == expected["profiles"]
            assert list(map(str, convert.pod_nets(parsed))) == expected.get("ipNetworks", [])
            ports = [
                {
                    "name": port.name or "",
                    "protocol": port.protocol,
                    "port": port.port,
                    "hostPort": port.host_port,
                    "hostIP": port.host_ip or "",
                }
                for port in convert.pod_ports(parsed)
            ]
            assert ports == expected.get("ports", []), case["description"]


def test_tricky_7_absent_policy_types_follow_the_api_server() -> None:
    assert spec()["types"] == ["Ingress"]
    assert spec(ingress=[{}])["types"] == ["Ingress"]
    assert spec(egress=[{}])["types"] == ["Ingress", "Egress"]
    assert spec(egress=[{}], policyTypes=["Egress"])["types"] == ["Egress"]


def test_tricky_16_ports() -> None:
    assert spec(ingress=[{"ports": [{}]}])["ingress"] == [{"action": "Allow", "protocol": "TCP"}]
    assert spec(ingress=[{}])["ingress"] == [{"action": "Allow"}]
    ports: list[dict[str, Any]] = [{"port": port} for port in (82, 80, "web", 81)]
    assert spec(ingress=[{"ports": [*ports, {"port": 80, "protocol": "UDP"}]}])["ingress"] == [
        {"action": "Allow", "protocol": "TCP", "destination": {"ports": ["web", "80:82"]}},
        {"action": "Allow", "protocol": "UDP", "destination": {"ports": [80]}},
    ]


@pytest.mark.parametrize(
    ("annotations", "deleted", "finished"),
    [
        ({}, True, False),
        ({pods.POD_IP: "10.0.0.5"}, True, False),
        ({pods.POD_IP: ""}, True, True),
        ({pods.POD_IP: ""}, False, False),
    ],
)
def test_tricky_19_a_pod_being_deleted_counts_until_its_addresses_are_released(
    annotations: dict[str, str], deleted: bool, finished: bool
) -> None:
    metadata = {"name": "p", "namespace": "ns", "annotations": annotations}
    if deleted:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    parsed = pod({"metadata": metadata, "status": {"phase": "Running", "podIP": "10.0.0.5"}})
    assert convert.pod_finished(parsed) is finished
    assert len(convert.pod_nets(parsed)) == (0 if finished else 1)


def test_annotated_addresses() -> None:
    metadata = {"name": "p", "namespace": "ns"}
    annotations = {pods.POD_IPS: "10.0.0.5/32,fd00::5/128", pods.POD_IP: "10.0.0.5/32"}
    parsed = pod({"metadata": {**metadata, "annotations": annotations}})
    assert list(map(str, convert.pod_nets(parsed))) == ["10.0.0.5/32", "fd00::5/128"]
    broken = pod({"metadata": metadata, "status": {"podIP": "10.0.0"}})
    with pytest.raises(ValueError, match=r"10\.0\.0"):
        convert.pod_nets(broken)


def test_rules_know_which_of_the_authors_they_were_made_from() -> None:
    ports = [{"port": 80}, {"port": 53, "protocol": "UDP"}]
    fields = {"ingress": [{"ports": ports}, {"from": [{"podSelector": {}}]}], "podSelector": {}}
    obj = {"metadata": {"name": "p", "namespace": "ns"}, "spec": fields}
    converted = convert.network_policy(kubernetes_policy(obj))
    assert [rule.position for rule in converted.spec.ingress] == [0, 0, 1]
    id = PolicyId("KubernetesNetworkPolicy", "ns", "p")
    ingress = compile_policy(id, converted).rules.policy.ingress or ()
    assert [rule.index for rule in ingress] == [0, 0, 1]
