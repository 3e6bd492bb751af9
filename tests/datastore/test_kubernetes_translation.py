"""Calico's view of Kubernetes' objects, held against what upstream makes of them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api import pods
from api.names import workload_endpoint_name
from api.net import parse_interface
from api.registry import parse, parse_as
from datastore.interface import JSON, Key
from datastore.kubernetes_translation import (
    account_profile_of,
    difference,
    endpoint_of,
    namespace_profile_of,
    node_annotations,
    node_of,
    pod_annotations,
    pod_of,
)
from tests.support import vectors

VECTORS = vectors.load("k8s_objects_conversion")


def without_empty(value: Any) -> Any:
    """As Go omits what is empty."""
    if isinstance(value, dict):
        inner = {name: without_empty(item) for name, item in value.items() if name != "uid"}
        return {name: item for name, item in inner.items() if item not in ("", 0, [], {}, None)}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", VECTORS["pods"], ids=lambda case: case["description"])
def test_pods(case: JSON) -> None:
    endpoint = endpoint_of(case["pod"])
    expected = case["expected"]
    if not expected["valid_workload"]:
        assert endpoint is None
        return
    assert endpoint is not None
    assert [without_empty(endpoint)] == without_empty(expected["workloadendpoints"])
    parse(endpoint)
    key = Key("WorkloadEndpoint", endpoint["metadata"]["name"], endpoint["metadata"]["namespace"])
    assert pod_of(key) == (case["pod"]["spec"]["nodeName"], case["pod"]["metadata"]["name"])


@pytest.mark.parametrize("case", VECTORS["namespaces"], ids=lambda c: c["expected"]["key"])
def test_namespaces(case: JSON) -> None:
    profile = namespace_profile_of(case["namespace"])
    assert without_empty(profile) == case["expected"]["value"]
    parse(profile)


@pytest.mark.parametrize("case", VECTORS["serviceaccounts"], ids=lambda c: c["expected"]["key"])
def test_service_accounts(case: JSON) -> None:
    profile = account_profile_of(case["serviceaccount"])
    assert without_empty(profile) == case["expected"]["value"]
    if len(case["serviceaccount"]["metadata"]["name"]) <= 63:  # a longer name is no label's value
        parse(profile)


@pytest.mark.parametrize("case", VECTORS["workloadendpoint_names"], ids=lambda c: str(c["ids"]))
def test_endpoint_names(case: JSON) -> None:
    ids, expected = case["ids"], case["expected"]
    found = pod_of(Key("WorkloadEndpoint", expected["name"], "default"))
    if ids["orchestrator"] == "k8s" and expected["name"]:
        assert found == (ids["node"], ids["pod"])
        name = workload_endpoint_name(ids["node"], "k8s", ids["pod"], ids["endpoint"])
        assert name == expected["name"]
    else:
        assert found is None


names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True)


@given(node=names, pod=names)
@settings(max_examples=200, deadline=None)
def test_any_pods_endpoint_name_is_taken_apart_again(node: str, pod: str) -> None:
    name = workload_endpoint_name(node, "k8s", pod, "eth0")
    assert pod_of(Key("WorkloadEndpoint", name, "default")) == (node, pod)


def test_what_the_plugin_writes_comes_back_before_the_kubelet_speaks() -> None:
    pod: JSON = {
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {"nodeName": "n"},
        "status": {"phase": "Pending"},
    }
    endpoint = endpoint_of(pod)
    assert endpoint is not None
    endpoint["spec"] |= {"ipNetworks": ["10.0.0.5/32", "fd00::5/128"], "containerID": "abc"}
    pod["metadata"]["annotations"] = pod_annotations(endpoint)
    assert endpoint_of(pod) == endpoint
    pod["metadata"]["annotations"][pods.POD_IP] = "nonsense"
    pod["metadata"]["annotations"][pods.POD_IPS] = ""
    assert "ipNetworks" not in (endpoint_of(pod) or {})["spec"]


def test_an_interface_that_is_called_otherwise() -> None:
    """A pod may say how its name begins, and nothing else of it."""
    pod: JSON = {"metadata": {"name": "p", "namespace": "default"}, "spec": {"nodeName": "n"}}
    endpoint = endpoint_of(pod)
    assert endpoint is not None
    usual = endpoint["spec"]["interfaceName"]
    assert pod_annotations(endpoint)[pods.INTERFACE_PREFIX] is None
    endpoint["spec"]["interfaceName"] = usual.replace("cali", "tap")
    annotations = pod_annotations(endpoint)
    pod["metadata"]["annotations"] = {k: v for k, v in annotations.items() if v}
    assert (endpoint_of(pod) or {})["spec"] == endpoint["spec"]
    for nonsense in ("", "much-too-long", "a/b", "t p"):
        pod["metadata"]["annotations"][pods.INTERFACE_PREFIX] = nonsense
        assert (endpoint_of(pod) or {})["spec"]["interfaceName"] == usual


def test_floating_addresses() -> None:
    annotations = {"cni.projectcalico.org/floatingIPs": '["1.2.3.4", "fd01::1", 5]'}
    pod: JSON = {
        "metadata": {"name": "p", "namespace": "default", "annotations": annotations},
        "spec": {"nodeName": "n"},
        "status": {"podIPs": [{"ip": "10.0.0.5"}, {"ip": "fd00::5"}]},
    }
    endpoint = endpoint_of(pod)
    assert endpoint is not None
    assert endpoint["spec"]["ipNATs"] == [
        {"internalIP": "10.0.0.5", "externalIP": "1.2.3.4"},
        {"internalIP": "fd00::5", "externalIP": "fd01::1"},
    ]
    parse(endpoint)


KUBERNETES_NODE: JSON = {
    "metadata": {
        "name": "node-1",
        "labels": {"zone": "a"},
        "annotations": {
            "projectcalico.org/IPv4Address": "10.1.0.1/24",
            "projectcalico.org/ASNumber": "64513",
            "projectcalico.org/IPv4VXLANTunnelAddr": "192.168.1.1",
            "projectcalico.org/WireguardPublicKey": "jlkVyQYooZYzI2wFfNhSZez5eWh44yfq1wKVjLvSXgY=",
            "projectcalico.org/labels": '{"zone":"b","rack":"7"}',
            "projectcalico.org/annotations": '{"note":"x"}',
            "other": "1",
        },
    },
    "spec": {"podCIDRs": ["10.2.0.0/24"]},
    "status": {
        "addresses": [
            {"type": "InternalIP", "address": "10.1.0.1"},
            {"type": "Hostname", "address": "node-1"},
        ]
    },
}


def test_nodes() -> None:
    node = node_of(KUBERNETES_NODE)
    assert node == {
        "apiVersion": "projectcalico.org/v3",
        "kind": "Node",
        "metadata": {
            "name": "node-1",
            "labels": {"zone": "a", "rack": "7"},
            "annotations": {"note": "x"},
        },
        "spec": {
            "bgp": {"ipv4Address": "10.1.0.1/24", "asNumber": 64513},
            "ipv4VXLANTunnelAddr": "192.168.1.1",
            "orchRefs": [{"nodeName": "node-1", "orchestrator": "k8s"}],
            "addresses": [
                {"address": "10.1.0.1/24", "type": "CalicoNodeIP"},
                {"address": "10.1.0.1", "type": "InternalIP"},
            ],
        },
        "status": {
            "wireguardPublicKey": "jlkVyQYooZYzI2wFfNhSZez5eWh44yfq1wKVjLvSXgY=",
            "podCIDRs": ["10.2.0.0/24"],
        },
    }
    parse(node)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1.10", 65546), ("0", 0), ("4294967295", 4294967295), ("65535.65535", 4294967295)],
)
def test_an_as_number_as_people_write_it(text: str, number: int) -> None:
    node = with_as_number(text)
    assert node_of(node)["spec"]["bgp"]["asNumber"] == number
    assert node_annotations(node_of(node), node)["projectcalico.org/ASNumber"] == str(number)
    assert node_annotations({"metadata": {"name": "n"}}, node)["projectcalico.org/ASNumber"] is None


@pytest.mark.parametrize("text", ["99999999999", "4294967296", "٦٤٥١٣", "1.70000", "AS64513", "-1"])
def test_what_is_no_as_number_is_reported_and_keeps_no_node_from_the_rest(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = with_as_number(text)
    for _ in range(2):
        parse_as("Node", node_of(node))
        assert node_of(node)["spec"]["bgp"] == {"ipv4Address": "10.1.0.1/24"}
    (told,) = [record.getMessage() for record in caplog.records]
    assert "metadata.annotations[projectcalico.org/ASNumber]: ignored: " in told
    assert repr(text) in told
    # nor is it taken away when the node's addresses are written
    assert "projectcalico.org/ASNumber" not in node_annotations(node_of(node), node)


def with_as_number(text: str) -> JSON:
    addresses = {"projectcalico.org/IPv4Address": "10.1.0.1/24"}
    annotations = addresses | {"projectcalico.org/ASNumber": text}
    return {"metadata": {"name": f"of-{text.encode().hex()}", "annotations": annotations}}


def test_a_nodes_label_of_kubernetes_is_not_changed_behind_its_back() -> None:
    node = node_of(KUBERNETES_NODE)
    node["metadata"]["labels"]["zone"] = "c"
    with pytest.raises(ValueError, match=r"zone=c: Kubernetes' Node has 'a'.*kubectl label"):
        node_annotations(node, KUBERNETES_NODE)


v4 = st.ip_addresses(v=4).map(str)
v6 = st.ip_addresses(v=6).map(str)
label_maps = st.dictionaries(names, names, max_size=2)


def subset(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[JSON]:
    return st.fixed_dictionaries({}, optional=fields)


nodes = st.builds(
    lambda labels, annotations, bgp, rest, wireguard: {
        "metadata": {"name": "n"}
        | ({"labels": labels} if labels else {})
        | ({"annotations": annotations} if annotations else {}),
        "spec": rest
        | ({"bgp": bgp} if bgp else {})
        | ({"wireguard": wireguard} if wireguard else {}),
    },
    label_maps,
    label_maps,
    subset(
        ipv4Address=v4,
        ipv6Address=v6,
        asNumber=st.integers(0, 2**32 - 1),
        ipv4IPIPTunnelAddr=v4,
        routeReflectorClusterID=v4,
    ),
    subset(
        ipv4VXLANTunnelAddr=v4,
        vxlanTunnelMACAddr=st.just("66:00:00:00:00:01"),
        ipv6VXLANTunnelAddr=v6,
        vxlanTunnelMACAddrV6=st.just("66:00:00:00:00:02"),
    ),
    subset(interfaceIPv4Address=v4, interfaceIPv6Address=v6),
)


@given(node=nodes, before=nodes)
@settings(max_examples=200, deadline=None)
def test_a_node_written_over_any_other_is_read_as_written(node: JSON, before: JSON) -> None:
    kubernetes_node: JSON = {"metadata": {"name": "n", "annotations": {"foreign": "1"}}}
    for value in (before, node):
        annotations = kubernetes_node["metadata"]["annotations"]
        for name, text in node_annotations(value, kubernetes_node).items():
            annotations.pop(name, None)
            if text is not None:
                annotations[name] = text
    read = node_of(kubernetes_node)
    for derived in ("orchRefs", "addresses"):
        read["spec"].pop(derived, None)
    assert read["metadata"] == node["metadata"]
    assert read["spec"] == node["spec"]
    assert kubernetes_node["metadata"]["annotations"]["foreign"] == "1"


json_values = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("abc", max_size=1), inner),
    max_leaves=8,
)
objects = st.dictionaries(st.text("abc", max_size=1), json_values, max_size=3)


def merged(old: Any, patch: Any) -> Any:
    """RFC 7386, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        result.pop(name, None)
        if value is not None:
            result[name] = merged(old.get(name) if isinstance(old, dict) else None, value)
    return result


@given(old=objects, new=objects)
@settings(max_examples=300, deadline=None)
def test_the_patch_makes_the_new_of_the_old(old: JSON, new: JSON) -> None:
    assert orjson.dumps(merged(old, difference(old, new)), option=orjson.OPT_SORT_KEYS) == (
        orjson.dumps(new, option=orjson.OPT_SORT_KEYS)
    )


@given(annotation=st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_annotations_anybody_wrote_break_nothing(annotation: str) -> None:
    keys = [
        "cni.projectcalico.org/allowedSourcePrefixes",
        "cni.projectcalico.org/floatingIPs",
        pods.POD_IPS,
    ]
    pod: JSON = {
        "metadata": {"name": "p", "namespace": "d", "annotations": dict.fromkeys(keys, annotation)},
        "spec": {"nodeName": "n"},
    }
    assert endpoint_of(pod)
    of_nodes = dict.fromkeys(KUBERNETES_NODE["metadata"]["annotations"], annotation)
    assert node_of({"metadata": {"name": "n", "annotations": of_nodes}})


@given(
    text=st.one_of(
        st.from_regex(r"[0-9.]{5,12}(/[0-9]{1,2})?", fullmatch=True),
        st.ip_addresses().map(str),
        st.text(max_size=12),
    )
)
@settings(max_examples=300, deadline=None)
def test_an_address_is_that_of_the_slow_parser(text: str) -> None:
    try:
        wanted = [str(parse_interface(text)[0])]
    except ValueError:
        wanted = []
    pod: JSON = {
        "metadata": {"name": "p", "namespace": "d"},
        "spec": {"nodeName": "n"},
        "status": {"podIPs": [{"ip": text}]},
    }
    endpoint = endpoint_of(pod)
    assert endpoint is not None
    assert endpoint["spec"].get("ipNetworks", []) == (wanted if text else [])
