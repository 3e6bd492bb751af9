"""Calico's keys and JSON in etcd, in both directions."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.kinds import CALICO, KINDS
from api.names import cidr_name
from api.net import BITS, V4, V6, Net
from api.registry import parse
from datastore.etcd_keys import Range, affinity_at, candidates, key_of, path_of, ranges
from datastore.etcd_values import decode, encode
from datastore.interface import JSON, Key
from tests.support import protobuf, vectors

NODE = Key("Node", "node-1")
BLOCK = Key("IPAMBlock", "10-0-0-0-26")


def spec(key: Key, spec: JSON, **metadata: Any) -> JSON:
    names = {"name": key.name} | ({"namespace": key.namespace} if key.namespace else {})
    return {
        "apiVersion": KINDS[key.kind].api_version,
        "kind": KINDS[key.kind].kind,
        "metadata": names | metadata,
        "spec": spec,
    }


def affinity(node: str, cidr: str, **more: Any) -> JSON:
    name = f"{node}-{cidr.replace('.', '-').replace(':', '-').replace('/', '-')}"
    fields = {"state": "confirmed", "node": node, "type": "host", "cidr": cidr, "deleted": False}
    return spec(Key("BlockAffinity", name), fields | more)


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        (NODE, {}, "/calico/resources/v3/projectcalico.org/nodes/node-1"),
        (
            Key("NetworkPolicy", "default.web", "shop"),
            {},
            "/calico/resources/v3/projectcalico.org/networkpolicies/shop/default.web",
        ),
        (
            Key("WorkloadEndpoint", "node--1-k8s-p-eth0", "default"),
            {},
            "/calico/resources/v3/projectcalico.org/workloadendpoints/default/node--1-k8s-p-eth0",
        ),
        (Key("Pod", "p", "default"), {}, "/calico/manx/kubernetes/pods/default/p"),
        (Key("Namespace", "default"), {}, "/calico/manx/kubernetes/namespaces/default"),
        (
            BLOCK,
            {"cidr": "10.0.0.0/26"},
            "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26",
        ),
        (
            Key("IPAMBlock", "fd80-24e2-f998-72d6---122"),
            {"cidr": "fd80:24e2:f998:72d6::/122"},
            "/calico/ipam/v2/assignment/ipv6/block/fd80:24e2:f998:72d6::-122",
        ),
        (
            Key("BlockAffinity", "node-1-10-0-0-0-26"),
            {"node": "node-1", "cidr": "10.0.0.0/26", "type": "host"},
            "/calico/ipam/v2/host/node-1/ipv4/block/10.0.0.0-26",
        ),
        (
            Key("BlockAffinity", "load-balancer-10-0-0-0-26"),
            {"node": "load-balancer", "cidr": "10.0.0.0/26", "type": "virtual"},
            "/calico/ipam/v2/virtual/load-balancer/ipv4/block/10.0.0.0-26",
        ),
        (
            Key("IPAMHandle", "mynet.0a"),
            {"handleID": "MyNet.0A"},
            "/calico/ipam/v2/handle/MyNet.0A",
        ),
        (Key("IPAMConfiguration", "default"), {}, "/calico/ipam/v2/config"),
    ],
)
def test_paths_are_calicos(key: Key, value: JSON, path: str) -> None:
    assert path_of(key, {"spec": value}) == path
    assert key_of(key.kind, path) == key
    assert path in candidates(key) or key.kind == "IPAMHandle"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Node", "/calico/resources/v3/projectcalico.org/nodes/a/b"),
        ("NetworkPolicy", "/calico/resources/v3/projectcalico.org/networkpolicies/a"),
        ("IPAMBlock", "/calico/ipam/v2/assignment/ipv4/block/10.0.0.1-26"),
        ("IPAMBlock", "/calico/ipam/v2/assignment/ipv4/block/x"),
        ("BlockAffinity", "/calico/ipam/v2/host/a/ipv4/block/10.0.0.0"),
        ("IPAMHandle", "/calico/ipam/v2/handle/a/b"),
        ("IPAMConfiguration", "/calico/ipam/v2/configuration"),
    ],
)
def test_what_is_no_object_has_no_key(kind: str, path: str) -> None:
    assert key_of(kind, path) is None


def test_a_name_that_contradicts_the_content_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected '10-0-0-64-26', from spec\.cidr"):
        path_of(BLOCK, {"spec": {"cidr": "10.0.0.64/26"}})
    with pytest.raises(ValueError, match="expected 'default'"):
        path_of(Key("IPAMConfiguration", "other"), {})
    assert candidates(Key("IPAMConfiguration", "other")) == ()
    assert candidates(Key("IPAMBlock", "nonsense")) == ()


nodes = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?(\.[a-z0-9]{1,3})?", fullmatch=True)


@st.composite
def nets(draw: st.DrawFn) -> Net:
    version = draw(st.sampled_from((V4, V6)))
    length = draw(st.integers(20, 32) if version == V4 else st.integers(116, 128))
    shift = BITS[version] - length
    return Net(version, draw(st.integers(0, 2 ** BITS[version] - 1)) >> shift << shift, length)


def inside(path: str, wanted: tuple[Range, ...]) -> bool:
    return any(range_.begin <= path.encode() < range_.end for range_ in wanted)


@given(net=nets(), data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_block_is_found_by_name_path_and_prefix(net: Net, data: st.DataObject) -> None:
    name = cidr_name(net)
    path = path_of(Key("IPAMBlock", name), {"spec": {"cidr": str(net)}})
    assert candidates(Key("IPAMBlock", name)) == (path,)
    assert key_of("IPAMBlock", path) == Key("IPAMBlock", name)
    assert inside(path, ranges("IPAMBlock"))
    assert inside(path, ranges("IPAMBlock", prefix=name[: data.draw(st.integers(0, len(name)))]))


@given(node=nodes, net=nets(), type_=st.sampled_from(("host", "virtual")), data=st.data())
@settings(max_examples=300, deadline=None)
def test_an_affinity_is_found_by_name_path_and_prefix(
    node: str, net: Net, type_: str, data: st.DataObject
) -> None:
    key = Key("BlockAffinity", f"{node}-{cidr_name(net)}")
    path = path_of(key, affinity(node, str(net), type=type_))
    assert path in candidates(key)
    assert key_of("BlockAffinity", path) == key
    assert affinity_at(path) == (type_, node, str(net))
    assert inside(path, ranges("BlockAffinity"))
    prefix = key.name[: data.draw(st.integers(0, len(key.name)))]
    assert inside(path, ranges("BlockAffinity", prefix=prefix))


@given(kind=st.sampled_from(sorted(KINDS)), name=nodes, namespace=nodes, data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_resource_is_found_in_its_kinds_ranges_and_in_no_others(
    kind: str, name: str, namespace: str, data: st.DataObject
) -> None:
    if kind in ("IPAMBlock", "BlockAffinity", "IPAMHandle", "IPAMConfiguration"):
        return
    namespace = namespace if KINDS[kind].namespaced else ""
    path = path_of(Key(kind, name, namespace), {})
    prefix = name[: data.draw(st.integers(0, len(name)))]
    assert inside(path, ranges(kind))
    assert inside(path, ranges(kind, namespace or None, prefix))
    assert [other for other in KINDS if inside(path, ranges(other))] == [kind]
    assert key_of(kind, path) == Key(kind, name, namespace)


# --- values ---


def test_blocks_as_upstream_wrote_them_come_back_unchanged() -> None:
    blocks = [
        step["block"]
        for trace in vectors.load("ipam_block_traces")["traces"]
        for step in trace["steps"]
    ]
    assert blocks
    for block in blocks:
        name = block["cidr"].replace(".", "-").replace(":", "-").replace("/", "-")
        key = Key("IPAMBlock", name)
        value = decode(key, path_of(key, {"spec": block}), orjson.dumps(block))
        parse(value)
        lists = {field: block[field] or [] for field in ("attributes", "unallocated")}
        assert orjson.loads(encode(key, value)) == block | lists


def test_a_blocks_fields_are_spelt_as_in_etcd() -> None:
    value = spec(
        BLOCK,
        {
            "cidr": "10.0.0.0/26",
            "affinityClaimTime": "2026-01-01T00:00:00Z",
            "strictAffinity": False,
            "allocations": [None] * 64,
        },
    )
    record = orjson.loads(encode(BLOCK, value))
    assert record == {
        "cidr": "10.0.0.0/26",
        "affinity": None,
        "affinity_claim_time": "2026-01-01T00:00:00Z",
        "allocations": [None] * 64,
    }
    back = decode(BLOCK, path_of(BLOCK, value), orjson.dumps(record))
    assert back["spec"].items() >= value["spec"].items()
    assert "affinity" not in back["spec"]


def test_the_oldest_spelling_of_an_affinity_is_understood() -> None:
    record = {"cidr": "10.0.0.0/26", "hostAffinity": "node-1", "affinity": None}
    value = decode(BLOCK, "", orjson.dumps(record))
    assert value["spec"]["affinity"] == "host:node-1"


def test_configuration_defaults_differ_and_mean_the_same() -> None:
    key = Key("IPAMConfiguration", "default")
    assert decode(key, "", b"{}")["spec"] == {"strictAffinity": False, "autoAllocateBlocks": False}
    assert orjson.loads(encode(key, spec(key, {"maxBlocksPerHost": 3}))) == {
        "auto_allocate_blocks": True,
        "maxBlocksPerHost": 3,
    }


def test_handle_and_affinity_say_in_the_path_what_their_objects_say_inside() -> None:
    handle = spec(Key("IPAMHandle", "net.a"), {"handleID": "Net.A", "block": {"10.0.0.0/26": 1}})
    key = Key("IPAMHandle", "net.a")
    assert orjson.loads(encode(key, handle)) == {"block": {"10.0.0.0/26": 1}}
    assert decode(key, path_of(key, handle), encode(key, handle)) == handle
    claim = affinity("node-1", "10.0.0.0/26")
    key = Key("BlockAffinity", claim["metadata"]["name"])
    assert orjson.loads(encode(key, claim)) == {"state": "confirmed", "deleted": False}
    assert decode(key, path_of(key, claim), encode(key, claim)) == claim


texts = st.text("abcXYZ-./", max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
unknown = st.dictionaries(
    st.sampled_from(("future", "hostname2", "alternate")), json_values, max_size=2
)
more_metadata = st.dictionaries(
    st.sampled_from(("uid", "creationTimestamp", "ownerReferences")), json_values, max_size=2
)


@st.composite
def stored(draw: st.DrawFn) -> tuple[Key, JSON]:
    """An IPAM object as our programs, or those of a newer version, write it."""
    net, node = draw(nets()), draw(nodes)
    flag = draw(st.booleans())
    match draw(st.sampled_from(("IPAMBlock", "BlockAffinity", "IPAMHandle", "IPAMConfiguration"))):
        case "IPAMBlock":
            key = Key("IPAMBlock", cidr_name(net))
            fields: JSON = {
                "cidr": str(net),
                "affinityClaimTime": draw(texts),
                "allocations": [None],
                "unallocated": [0],
                "attributes": [{"handle_id": draw(texts), "secondary": {"pod": draw(texts)}}],
                "sequenceNumber": draw(st.integers(0, 2**63)),
                "sequenceNumberForAllocation": {"1": 2},
                "deleted": flag,
                "strictAffinity": draw(st.booleans()),
            } | ({"affinity": f"host:{node}"} if flag else {})
        case "BlockAffinity":
            key = Key("BlockAffinity", f"{node}-{cidr_name(net)}")
            fields = {"node": node, "cidr": str(net), "type": "host", "state": "pending"}
        case "IPAMHandle":
            key = Key("IPAMHandle", node.lower())
            fields = {"handleID": node.upper(), "block": {str(net): 1}, "deleted": flag}
        case _:
            key = Key("IPAMConfiguration", "default")
            fields = {"strictAffinity": flag, "autoAllocateBlocks": draw(st.booleans())}
    return key, spec(key, fields | draw(unknown), **draw(more_metadata))


@given(stored())
@settings(max_examples=300, deadline=None)
def test_nothing_of_an_ipam_object_is_lost_in_etcd(case: tuple[Key, JSON]) -> None:
    key, value = case
    assert decode(key, path_of(key, value), encode(key, value)) == value


@given(value=st.dictionaries(texts, json_values, max_size=4))
@settings(max_examples=100, deadline=None)
def test_nothing_of_a_resource_is_lost_in_etcd(value: JSON) -> None:
    assert decode(NODE, "", encode(NODE, value)) == value


def test_the_revision_is_not_stored_with_the_object() -> None:
    value = spec(NODE, {}, resourceVersion="7", uid="u")
    assert orjson.loads(encode(NODE, value))["metadata"] == {"name": "node-1", "uid": "u"}
    assert value["metadata"]["resourceVersion"] == "7"  # the caller's own stays as it was


@given(kind=st.sampled_from(sorted(KINDS)), data=st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_object_or_said_not_to_be(kind: str, data: bytes) -> None:
    key = Key(kind, "10-0-0-0-26", "default" if KINDS[kind].namespaced else "")
    value = decode(key, "/calico/ipam/v2/host/a/ipv4/block/10.0.0.0-26", data)
    assert isinstance(value, dict)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b'"x"', b"1"])
def test_what_is_no_json_object_is_an_object_that_no_model_takes(data: bytes) -> None:
    for kind in ("IPPool", "IPAMBlock", "NetworkPolicy"):
        key = Key(kind, "10-0-0-0-26", "a" if KINDS[kind].namespaced else "")
        value = decode(key, "/where", data)
        assert value["metadata"]["name"] == key.name
        with pytest.raises(ValueError, match=r"unreadable: '/where: "):
            parse(value)


def test_generated_classes_are_those_of_the_proto_file(tmp_path: Path) -> None:
    protobuf.generate(tmp_path)
    for name in protobuf.GENERATED:
        assert filecmp.cmp(tmp_path / name, protobuf.REPOSITORY / name, shallow=False), (
            f"{name} is stale: python -m tests.support.protobuf"
        )


def test_all_v3_kinds_lie_where_calico_looks() -> None:
    for kind in KINDS.values():
        if kind.api_version == CALICO and "ipam" not in kind.module:
            (range_,) = ranges(kind.id)
            assert range_.begin.startswith(b"/calico/resources/v3/projectcalico.org/")
