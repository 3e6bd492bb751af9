"""Every kind: all its fields go in and come out again; what is wrong is told where it stands."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from api.errors import InvalidObjectError
from api.felix import FelixConfiguration
from api.kinds import KINDS, kind_of
from api.metadata import ObjectMeta
from api.registry import dump, parse, validate
from api.services import EndpointSlice, Service
from api.staged import StagedGlobalNetworkPolicy, StagedNetworkPolicy
from policy.selector import parse as parse_selector
from tests.api.examples import CALICO_EXAMPLES, EXAMPLES, RULE, fields_used, v3


def problems(obj: object) -> dict[str, str]:
    with pytest.raises(InvalidObjectError) as caught:
        parse(obj)
    return {problem.field: problem.expected for problem in caught.value.problems}


def without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in (False, 0, "", [])}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example["kind"]))
def test_everything_comes_out_again(example: dict[str, Any]) -> None:
    parsed = parse(example, selector=parse_selector)
    assert without_empty(dump(parsed)) == without_empty(example)
    assert dump(parse(dump(parsed))) == dump(parsed)


def test_the_examples_have_every_field_of_every_kind() -> None:
    assert {kind_of(example).id for example in EXAMPLES} == KINDS.keys() - {"FelixConfiguration"}
    used: dict[type[BaseModel], set[str]] = {}
    for example in EXAMPLES:
        for model, name in fields_used(parse(example)):
            used.setdefault(model, set()).add(name)
    forgotten = {
        model.__name__: missing
        for model, names in used.items()
        if not issubclass(model, ObjectMeta) and (missing := set(model.model_fields) - names)
    }
    assert forgotten == {}
    assert FelixConfiguration not in used  # has tests of its own


def test_a_misspelt_field_of_any_kind_is_told() -> None:
    for example in CALICO_EXAMPLES:
        found = problems(example | {"spec": example["spec"] | {"unheardOf": 1}})
        assert found["spec.unheardOf"].startswith("no such field")
    assert problems(v3("HostEndpoint", {"node": "a", "interfaceNam": "eth0"})) == {
        "spec.interfaceNam": "no such field; did you mean interfaceName?"
    }


@pytest.mark.parametrize(
    ("kind", "spec", "field", "expected"),
    [
        ("BGPFilter", {"importV4": [{}]}, "spec.importV4[0].action", "required"),
        (
            "BGPFilter",
            {"importV4": [{"action": "Accept", "cidr": "fd00::/8", "matchOperator": "In"}]},
            "spec.importV4[0].cidr",
            "an IPv4 CIDR",
        ),
        (
            "BGPFilter",
            {"exportV6": [{"action": "Accept", "cidr": "fd00::/8"}]},
            "spec.exportV6[0].matchOperator",
            "required, because cidr is set",
        ),
        (
            "BGPFilter",
            {"exportV6": [{"action": "Accept", "prefixLength": {"min": 1}}]},
            "spec.exportV6[0].prefixLength",
            "absent, because cidr is",
        ),
        (
            "BGPFilter",
            {"exportV4": [{"action": "Reject", "operations": [{"setPriority": {"value": 1}}]}]},
            "spec.exportV4[0].operations",
            "absent, unless action is Accept",
        ),
        (
            "BGPFilter",
            {"exportV4": [{"action": "Accept", "operations": [{}]}]},
            "spec.exportV4[0].operations[0]",
            "exactly one of addCommunity, prependASPath, setPriority",
        ),
        (
            "BGPFilter",
            {"importV4": [{"action": "Accept", "communities": {"values": ["01:2"]}}]},
            "spec.importV4[0].communities.values[0]",
            "a community whose numbers have no leading zeros",
        ),
        ("HostEndpoint", {"node": "a"}, "spec.interfaceName", "required, unless expectedIPs is"),
        ("HostEndpoint", {"interfaceName": "*"}, "spec.node", "required"),
        (
            "HostEndpoint",
            {"node": "a", "interfaceName": "*", "ports": [{"name": "x", "protocol": 1, "port": 5}]},
            "spec.ports[0].protocol",
            "TCP, UDP or SCTP, which have ports",
        ),
        (
            "IPReservation",
            {"reservedCIDRs": ["10.0.0.300"]},
            "spec.reservedCIDRs[0]",
            "an IP address or CIDR",
        ),
        ("GlobalNetworkSet", {"nets": ["10.0.0.0/33"]}, "spec.nets[0]", "an IP address or CIDR"),
        ("CalicoNodeStatus", {"node": "a", "classes": []}, "spec.updatePeriodSeconds", "required"),
        (
            "CalicoNodeStatus",
            {"node": "a", "classes": ["BGP", "BGP"], "updatePeriodSeconds": 0},
            "spec.classes",
            "each class once",
        ),
        (
            "KubeControllersConfiguration",
            {"controllers": {"node": {"hostEndpoint": {"templates": [{"labels": {"a b": ""}}]}}}},
            "spec.controllers.node.hostEndpoint.templates[0].labels.a b",
            "a label key",
        ),
        ("Profile", {"labelsToApply": {"a": "b c"}}, "spec.labelsToApply.a", "a label value"),
        (
            "StagedGlobalNetworkPolicy",
            {"stagedAction": "Delete", "ingress": [RULE]},
            "spec.ingress",
            "absent, because stagedAction is Delete",
        ),
        (
            "StagedGlobalNetworkPolicy",
            {"preDNAT": True},
            "spec.applyOnForward",
            "true, because preDNAT is",
        ),
        ("StagedNetworkPolicy", {"stagedAction": "delete"}, "spec.stagedAction", "'Set', 'Delete'"),
        (
            "StagedKubernetesNetworkPolicy",
            {"egress": [{"to": [{}]}]},
            "spec.egress[0].to[0]",
            "podSelector, namespaceSelector or ipBlock",
        ),
        (
            "StagedKubernetesNetworkPolicy",
            {"egress": [{"ports": [{"port": "http port"}]}]},
            "spec.egress[0].ports[0].port",
            "a port from 1 to 65535, or a port's name",
        ),
        (
            "StagedKubernetesNetworkPolicy",
            {"policyTypes": ["Ingress", "Ingress"]},
            "spec.policyTypes",
            "each value once",
        ),
    ],
)
def test_what_is_wrong(kind: str, spec: dict[str, Any], field: str, expected: str) -> None:
    assert problems(v3(kind, spec))[field].startswith(expected)


def test_a_network_set_has_no_namespace_label() -> None:
    label = "projectcalico.org/namespace"
    for kind in ("NetworkSet", "GlobalNetworkSet"):
        obj = v3(kind, {}) | {"metadata": {"name": "x", "labels": {label: "shop"}}}
        assert problems(obj) == {
            f"metadata.labels.{label}": "absent: the agent sets this label itself"
        }


def test_drafts_of_a_deletion() -> None:
    draft = validate(StagedNetworkPolicy, v3("StagedNetworkPolicy", {"stagedAction": "Delete"}))
    assert draft.spec.types == []
    # Calico's admission policy fills this in, whatever the draft is for
    filled = {"stagedAction": "Delete", "types": ["Ingress"]}
    parse(v3("StagedNetworkPolicy", filled))
    assert "spec.types" in problems(
        v3("StagedNetworkPolicy", filled | {"types": ["Ingress", "Egress"]})
    )
    normal = validate(StagedGlobalNetworkPolicy, v3("StagedGlobalNetworkPolicy", {}))
    assert (normal.spec.staged_action, normal.spec.types) == ("Set", ["Ingress"])


def test_a_staged_policy_is_no_policy() -> None:
    staged = KINDS["StagedNetworkPolicy"].model
    assert not issubclass(staged, KINDS["NetworkPolicy"].model)


def test_empty_text_is_absent_only_where_text_belongs() -> None:
    pool = {"cidr": "10.0.0.0/16", "vxlanMode": "", "nodeSelector": ""}
    assert dump(parse(v3("IPPool", pool)))["spec"]["vxlanMode"] == "Never"
    assert "spec.allowedUses" in problems(v3("IPPool", pool | {"allowedUses": ""}))
    assert "spec" in problems(v3("IPReservation", {}) | {"spec": ""})


def test_times_and_conditions() -> None:
    status = {"lastUpdated": "yesterday"}
    spec = {"node": "a", "classes": ["BGP"], "updatePeriodSeconds": 0}
    assert "status.lastUpdated" in problems(v3("CalicoNodeStatus", spec, status=status))
    condition = {
        "type": "Ready",
        "status": "True",
        "reason": "no reason",
        "message": "",
        "lastTransitionTime": "2030-02-30T12:00:00Z",
    }
    found = problems(v3("Tier", {}, status={"conditions": [condition]}))
    assert set(found) == {
        "status.conditions[0].reason",
        "status.conditions[0].lastTransitionTime",
    }


def test_cluster_network_policy_is_as_strict_as_the_api_server() -> None:
    example = next(e for e in EXAMPLES if e["kind"] == "ClusterNetworkPolicy")
    spec = example["spec"]
    (rule, named) = spec["egress"]
    both = rule | {"protocols": named["protocols"]}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"priority": None}, "spec.priority"),
        ({"priority": 1001}, "spec.priority"),
        ({"tier": "Default"}, "spec.tier"),
        ({"subject": {}}, "spec.subject"),
        ({"subject": spec["subject"] | {"namespaces": {}}}, "spec.subject"),
        ({"egress": [rule | {"to": []}]}, "spec.egress[0].to"),
        ({"egress": [rule | {"to": [{}]}]}, "spec.egress[0].to[0]"),
        ({"egress": [rule | {"protocols": []}]}, "spec.egress[0].protocols"),
        ({"egress": [both]}, "spec.egress[0].protocols[0].destinationNamedPort"),
        ({"egress": [named] * 26}, "spec.egress"),
        ({"egress": [named | {"unheardOf": 1}]}, "spec.egress[0].unheardOf"),
        (
            {"egress": [rule | {"to": [{"networks": ["::/0", "::/0"]}]}]},
            "spec.egress[0].to[0].networks",
        ),
        (
            {"egress": [rule | {"to": [{"domainNames": ["*"]}]}]},
            "spec.egress[0].to[0].domainNames[0]",
        ),
    ]
    for change, field in changes:
        assert field in problems(example | {"spec": spec | change}), change


def test_services_and_their_endpoints() -> None:
    def example(kind: str) -> dict[str, Any]:
        return next(e for e in EXAMPLES if e["kind"] == kind)

    service = validate(Service, example("Service") | {"unheardOf": 1})
    assert service.spec.ports[0].target_port == "http"
    assert service.status.load_balancer.ingress[0].ip == "192.0.2.8"
    obj = example("EndpointSlice")
    obj |= {"metadata": obj["metadata"] | {"labels": {"kubernetes.io/service-name": "web"}}}
    endpoints = validate(EndpointSlice, obj)
    assert (endpoints.service, endpoints.endpoints[0].addresses) == ("web", ["10.0.0.5"])
