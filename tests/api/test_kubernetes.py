"""The Kubernetes kinds: what is ignored, what is refused, as the API server would."""

from __future__ import annotations

from typing import Any

import pytest

from api.errors import InvalidObjectError
from api.kubernetes import KubernetesNetworkPolicy, Pod
from api.registry import dump, parse, validate


def policy(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": spec,
    }


def refused(obj: dict[str, Any]) -> set[str]:
    with pytest.raises(InvalidObjectError) as caught:
        parse(obj)
    return {problem.field for problem in caught.value.problems}


def test_what_is_not_read_of_a_pod_is_ignored() -> None:
    pod = validate(
        Pod,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "web",
                "namespace": "shop",
                "creationTimestamp": None,
                "managedFields": [{"manager": "kubectl"}],
                "unheardOf": 1,
            },
            "spec": {
                "nodeName": "n1",
                "tolerations": [{"operator": "Exists"}],
                "containers": [
                    {
                        "name": "c",
                        "image": "web:1",
                        "ports": [{"name": "http", "containerPort": 80, "hostIP": "10.1.1.1"}],
                    }
                ],
            },
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]},
        },
    )
    assert pod.spec.node_name == "n1"
    assert pod.spec.containers[0].ports[0].container_port == 80
    assert pod.spec.containers[0].ports[0].protocol == "TCP"
    assert pod.status.pod_ips[0].ip == "10.0.0.1"


def test_a_network_policy_with_all_it_can_have() -> None:
    obj = policy(
        podSelector={"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["b"]}]},
        policyTypes=["Ingress", "Egress"],
        ingress=[
            {
                "from": [
                    {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
                    {"namespaceSelector": {}, "podSelector": {"matchLabels": {"k": ""}}},
                ],
                "ports": [{"port": "http"}, {"protocol": "UDP", "port": 53, "endPort": 60}, {}],
            }
        ],
        egress=[{}],
    )
    parsed = validate(KubernetesNetworkPolicy, obj)
    assert parsed.spec.ingress[0].from_[0].ip_block is not None
    assert parsed.spec.ingress[0].from_[0].ip_block.except_ == ["10.1.0.0/16"]
    assert parsed.spec.ingress[0].from_[1].namespace_selector is not None
    assert parsed.spec.ingress[0].ports[1].end_port == 60
    assert len(parsed.spec.egress) == 1
    assert dump(parse(dump(parsed))) == dump(parsed)


def test_selectors_that_select_all_survive_dumping() -> None:
    peers: list[dict[str, Any]] = [{"podSelector": {}}, {"namespaceSelector": {}}]
    obj = policy(podSelector={}, ingress=[{"from": peers}, {}])
    dumped = dump(parse(obj))["spec"]
    assert dumped["ingress"] == [{"from": peers}, {}]


def test_tricky_15_no_rules_and_one_empty_rule() -> None:
    specs: list[dict[str, Any]] = [{"ingress": []}, {"ingress": None}, {}]
    for spec in specs:
        assert validate(KubernetesNetworkPolicy, policy(**spec)).spec.ingress == []
    assert len(validate(KubernetesNetworkPolicy, policy(ingress=[{}])).spec.ingress) == 1


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"engress": []}, "spec.engress"),
        ({"ingress": [{"from": [{}]}]}, "spec.ingress[0].from[0]"),
        (
            {"ingress": [{"from": [{"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
            "spec.ingress[0].from[0].ipBlock",
        ),
        (
            {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/8"]}}]}]},
            "spec.egress[0].to[0].ipBlock.except[0]",
        ),
        ({"ingress": [{"ports": [{"port": 0}]}]}, "spec.ingress[0].ports[0].port"),
        ({"ingress": [{"ports": [{"endPort": 1}]}]}, "spec.ingress[0].ports[0].endPort"),
        ({"ingress": [{"ports": [{"port": 2, "endPort": 1}]}]}, "spec.ingress[0].ports[0].endPort"),
        (
            {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}},
            "spec.podSelector.matchExpressions[0].values",
        ),
        (
            {"podSelector": {"matchExpressions": [{"key": "a", "operator": "in"}]}},
            "spec.podSelector.matchExpressions[0].operator",
        ),
        ({"podSelector": {"matchLabels": {"a": "b c"}}}, "spec.podSelector.matchLabels.a"),
    ],
)
def test_refused(spec: dict[str, Any], field: str) -> None:
    assert refused(policy(**spec)) == {field}
