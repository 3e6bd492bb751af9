"""Verdicts, defaults and names recorded from upstream."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from api.bgpfilter import BGPFilterRuleV4, BGPFilterRuleV6, FilterOperation
from api.controllers import HostEndpointTemplate, NodeControllerConfig, ReconcilerConfig
from api.endpoint import IPNAT, WorkloadEndpointPort, WorkloadEndpointSpec
from api.errors import InvalidObjectError
from api.felix import ProtoPort
from api.fields import Protocol
from api.names import cidr_name, interface_name, workload_endpoint_name
from api.net import parse_net
from api.node import NodeSpec, NodeStatus
from api.registry import dump, parse
from policy.selector import parse as parse_selector
from tests.support import vectors

# case -> why the verdict differs
EXCEPTIONS = {
    "res-2006": "secretKeyRef without key: the validator passes it, but the CRD requires it",
    "res-2054": "namespace '1:2:3': the validator passes it, but no such namespace can exist",
    **dict.fromkeys(
        ("res-0180", "res-0182", "res-0814", "res-1822"),
        "an address without length in an IPReservation: refused by the CRD alone, of which the"
        " version is newer than the objects that clusters have, and Calico's page on it",
    ),
    "v3-0043": "8.8.8.8 without length: the validator passes it, but not the CRD (format: cidr)",
    "v3-0047": "the same with IPv6",
    "v3-0281": "a port with both name and numbers, which JSON cannot carry",
    "bgppeer_invalid": "made invalid on purpose",
}

PARTS: dict[str, Any] = {
    "internal.WorkloadEndpointSpec": WorkloadEndpointSpec,
    "internal.WorkloadEndpointPort": WorkloadEndpointPort,
    "internal.IPNAT": IPNAT,
    "internal.NodeSpec": NodeSpec,
    "internal.NodeStatus": NodeStatus,
    "numorstring.Protocol": Protocol,
    "v3.BGPFilterOperation": FilterOperation,
    "v3.BGPFilterRuleV4": BGPFilterRuleV4,
    "v3.BGPFilterRuleV6": BGPFilterRuleV6,
    "v3.NodeControllerConfig": NodeControllerConfig,
    "v3.PolicyControllerConfig": ReconcilerConfig,
    "v3.ProtoPort": ProtoPort,
    "v3.ServiceAccountControllerConfig": ReconcilerConfig,
    "v3.Template": HostEndpointTemplate,
}


def refusal(obj: dict[str, Any]) -> str | None:
    """Why an object is refused; None when it is not. Selectors count, as upstream."""
    try:
        parse(obj, selector=parse_selector)
    except InvalidObjectError as error:
        return str(error)
    return None


def test_recorded_verdicts() -> None:
    wrong = []
    for case in vectors.load("validation_resources")["cases"]:
        why = refusal(case["resource"])
        if (why is None) is not case["valid"] and case["id"] not in EXCEPTIONS:
            wrong.append((case["id"], case["error"], why, case["resource"]))
    assert not wrong


def test_recorded_whole_objects_and_parts() -> None:
    wrong = []
    for case in vectors.load("validation")["cases"]:
        why = None
        if case["type"] in PARTS:
            adapter = TypeAdapter(PARTS[case["type"]])
            try:
                adapter.validate_python(
                    case["object"], by_alias=True, by_name=False, context=parse_selector
                )
            except ValidationError as error:
                why = str(error)
        else:
            why = refusal(case["resource"])
        if (why is None) is not case["valid"] and case["id"] not in EXCEPTIONS:
            wrong.append((case["id"], case["description"], why, case["object"]))
    assert not wrong


def test_recorded_defaults() -> None:
    for case in vectors.load("validation")["defaults"]:
        if refusal(case["object"]) is not None:
            continue  # recorded for what the schema fills in, before other checks refuse it
        value: Any = dump(parse(case["object"]))
        for step in case["path"]:
            value = value[step]
        assert value == case["expected"], case


def test_documents_calicoctl_accepts() -> None:
    for row in vectors.load("validation")["cli_resources"]:
        if row["name"] not in EXCEPTIONS:
            assert refusal(row["object"]) is None, row["name"]


def test_documents_calicoctl_refuses() -> None:
    for row in vectors.load("validation")["cli_invalid"]:
        if row["name"] == "policy-NetworkPolicyNameRejected":
            continue  # a right object; the command line refuses it (tests/manxctl)
        assert any(refusal(document) for document in row["documents"]), row["name"]


def test_tricky_20_recorded_names() -> None:
    content = vectors.load("k8s_objects_conversion")
    for row in content["cidr_names"]:
        assert cidr_name(parse_net(row["cidr"])) == row["expected"]
    for row in content["workloadendpoint_names"]:
        ids = row["ids"]
        third = ids.get("pod") or ids.get("containerID") or ids.get("workload")
        if row["expected"].get("name") and third:
            name = workload_endpoint_name(ids["node"], ids["orchestrator"], third, ids["endpoint"])
            assert name == row["expected"]["name"]
    for row in content["pods"]:
        parse({"apiVersion": "v1", "kind": "Pod", **row["pod"]})
        meta = row["pod"]["metadata"]
        for endpoint in row["expected"].get("workloadendpoints") or []:
            spec = endpoint["spec"]
            assert interface_name("cali", meta["namespace"], meta["name"]) == spec["interfaceName"]
            assert refusal(endpoint) is None
    for row in content["namespaces"]:
        parse({"apiVersion": "v1", "kind": "Namespace", **row["namespace"]})
        assert refusal(row["expected"]["value"]) is None
    for row in content["serviceaccounts"]:
        parse({"apiVersion": "v1", "kind": "ServiceAccount", **row["serviceaccount"]})
        assert refusal(row["expected"]["value"]) is None
