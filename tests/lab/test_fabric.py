"""What a fabric file may say, and how it is told what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import InvalidObjectError
from lab.fabric import Fabric
from lab.fabricfile import FabricFileError, load, parse, read_documents
from lab.routers import setup
from lab.wiring import wiring
from tests.lab.fabrics import JSON, SMALL, small

HERE = Path(__file__).parent


def problems_of(document: object) -> dict[str, str]:
    """Field → what all problems with it expect."""
    with pytest.raises(InvalidObjectError) as caught:
        parse(document, HERE)
    assert caught.value.kind == "Fabric"
    found: dict[str, str] = {}
    for each in caught.value.problems:
        found[each.field] = f"{found.get(each.field, '')} {each.expected}"
    return found


def test_a_right_fabric_has_its_defaults() -> None:
    fabric = parse(small(), HERE)
    assert fabric.name == "small"
    assert str(fabric.spec.racks[0].gateway) == "172.31.1.1"
    assert fabric.spec.mtu == 1500
    assert fabric.spec.pods[1].key == "default/b"
    # the resources carry Calico's defaults
    assert fabric.spec.resources[0]["spec"]["blockSize"] == 26
    assert [str(each) for each in fabric.addresses_of("tor-2")] == [
        "172.31.2.1/24",
        "172.31.255.1/31",
        "198.51.100.1/24",
    ]


def test_it_survives_json() -> None:
    fabric = parse(small(), HERE)
    assert Fabric.model_validate(json.loads(fabric.model_dump_json())) == fabric


def change(path: str, value: Any) -> Callable[[JSON], None]:
    """Set what stands at a path such as ``racks.0.tor.name`` below spec."""

    def apply(document: JSON) -> None:
        at: Any = document["spec"]
        *steps, last = [int(step) if step.isdecimal() else step for step in path.split(".")]
        for step in steps:
            at = at[step]
        if isinstance(last, int) and last == len(at):
            at.append(value)
        else:
            at[last] = value

    return apply


SECOND_PEER = {
    "apiVersion": "projectcalico.org/v3",
    "kind": "BGPPeer",
    "metadata": {"name": "tor-1"},
    "spec": {"peerIP": "10.0.0.1", "asNumber": 1},
}
SECOND_POOL = {
    "apiVersion": "projectcalico.org/v3",
    "kind": "IPPool",
    "metadata": {"name": "more"},
    "spec": {"cidr": "10.65.4.0/24"},
}
NODE = {"apiVersion": "projectcalico.org/v3", "kind": "Node", "metadata": {"name": "n"}}
PORT_0 = [{"name": "http", "containerPort": 0}]

CONTRADICTIONS = [
    # what is changed, to what, the field that is blamed, a part of what it should be
    ("racks.0.nodes.1.name", "node-1a", "spec.racks[0].nodes[1].name", "name of its own"),
    ("hosts.0.name", "tor-1", "spec.hosts[0].name", "spec.racks[0].tor.name has this one"),
    ("racks.0.nodes.1.address", "172.31.1.11", "spec.racks[0].nodes[1].address", "node node-1a"),
    ("racks.0.nodes.1.address", "172.31.1.1", "spec.racks[0].nodes[1].address", "router tor-1"),
    ("racks.0.nodes.1.address", "172.31.2.9", "spec.racks[0].nodes[1].address", "172.31.1.1 to"),
    ("racks.0.nodes.1.address", "172.31.1.255", "spec.racks[0].nodes[1].address", "172.31.1.254"),
    ("racks.0.tor.address", "172.31.2.1", "spec.racks[0].tor.address", "rack-1, 172.31.1.0/24"),
    ("racks.0.subnet", "172.31.1.7/24", "spec.racks[0].subnet", "host bits: 172.31.1.0/24"),
    ("racks.0.subnet", "172.31.1.0/31", "spec.racks[0].subnet", "/30 or larger"),
    ("racks.0.subnet", "fd00::/64", "spec.racks[0].subnet", "an IPv4 subnet"),
    ("racks.0.subnet", 17, "spec.racks[0].subnet", "an IPv4 subnet"),
    ("racks.1.subnet", "172.31.0.0/16", "spec.racks[1].subnet", "overlaps 172.31.1.0/24 of rack"),
    ("racks.0.subnet", "224.0.0.0/24", "spec.racks[0].subnet", "multicast"),
    ("racks.0.tor.router", "cisco", "spec.racks[0].tor.router", "'bird' or 'frr'"),
    ("racks.0.tor.asNumber", 0, "spec.racks[0].tor.asNumber", "1 to 4294967294"),
    ("racks.0.tor.asNumber", 2**32 - 1, "spec.racks[0].tor.asNumber", "1 to 4294967294"),
    ("racks.0.tor.name", "lo", "spec.racks[0].tor.name", "another name"),
    ("racks.0.tor.name", "Tor_1", "spec.racks[0].tor.name", "DNS label"),
    ("racks.0.tor.nmae", "x", "spec.racks[0].tor.nmae", "did you mean name?"),
    ("racks", [], "spec.racks", "at least 1"),
    ("mtu", 500, "spec.mtu", "1280"),
    ("mtu", "big", "spec.mtu", "integer"),
    ("links.0.between", ["tor-1", "tor-1"], "spec.links[0].between", "two different routers"),
    ("links.0.between", ["tor-1", "tor-9"], "spec.links[0].between", "a router: tor-1, tor-2"),
    ("links.0.between", ["tor-1"], "spec.links[0].between", "2"),
    ("links.0.subnet", "172.31.1.8/31", "spec.links[0].subnet", "overlaps 172.31.1.0/24"),
    ("links.0.subnet", "172.31.255.0/32", "spec.links[0].subnet", "/31 or larger"),
    (
        "links.1",
        {"between": ["tor-2", "tor-1"], "subnet": "172.31.254.0/31"},
        "spec.links[1].between",
        "one link a pair: spec.links[0]",
    ),
    ("routers", [{"name": "spine", "asNumber": 65000}], "spec.routers[0].name", "spec.links"),
    ("hosts.0.router", "tor-9", "spec.hosts[0].router", "a router: tor-1, tor-2"),
    ("hosts.0.address", "198.51.100.10", "spec.hosts[0].address", "prefix length"),
    ("hosts.0.address", "198.51.100.0/24", "spec.hosts[0].address", "198.51.100.1 to"),
    ("hosts.0.address", "172.31.1.99/24", "spec.hosts[0].address", "overlaps"),
    ("hosts.0.gateway", "198.51.100.10", "spec.hosts[0].gateway", "another address"),
    ("hosts.0.gateway", "198.51.101.1", "spec.hosts[0].gateway", "another address"),
    ("pods.0.node", "node-9", "spec.pods[0].node", "node-1a, node-1b, node-2a"),
    ("pods.1.name", "a", "spec.pods[0].name", "one pod default/a only"),
    ("pods.0.labels", {"app": "no spaces"}, "spec.pods[0].labels.app", "label value"),
    ("pods.0.ports", PORT_0, "spec.pods[0].ports[0].containerPort", "1"),
    ("resources.0.spec.cidr", "172.31.0.0/20", "spec.resources[0].spec.cidr", "rack rack-1"),
    ("resources.0.spec.cidr", "198.51.100.0/25", "spec.resources[0].spec.cidr", "host outside"),
    ("resources.0.spec.cdir", "10.0.0.0/16", "spec.resources[0].spec.cdir", "did you mean cidr?"),
    ("resources.0.kind", "IPPol", "spec.resources[0].kind", "did you mean IPPool? (IPPol pods)"),
    ("resources.1.spec.asNumber", 65002, "spec.resources[1].spec.asNumber", "router tor-1"),
    ("resources.2", SECOND_PEER, "spec.resources[2].metadata.name", "spec.resources[1]"),
    ("resources.2", SECOND_POOL, "spec.resources[2].spec.cidr", "10.65.0.0/16 of IPPool pods"),
    ("resources.2", NODE, "spec.resources[2].kind", "the lab writes one"),
    ("resources.2", {"file": "nowhere.yaml"}, "spec.resources[2].file", "No such file"),
    ("cni.binDir", None, "spec.cni.binDir", "required"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "field", "expected"), CONTRADICTIONS)
def test_contradictions_are_named(path: str, value: Any, field: str, expected: str) -> None:
    document = small()
    change(path, value)(document)
    problems = problems_of(document)
    assert field in problems, problems
    assert expected in problems[field]


def test_all_problems_are_told_at_once() -> None:
    document = small()
    change("racks.0.nodes.1.address", "172.31.1.11")(document)
    change("hosts.0.router", "nowhere")(document)
    change("links.0.subnet", "172.31.1.8/31")(document)
    assert len(problems_of(document)) == 3


@pytest.mark.parametrize("document", [None, 7, [], "text", {}, {"kind": "Fabric"}])
def test_what_is_no_fabric_is_refused(document: object) -> None:
    with pytest.raises(InvalidObjectError):
        parse(document, HERE)


def test_resources_come_from_files_too(tmp_path: Path) -> None:
    pool = {**SMALL["spec"]["resources"][0], "metadata": {"name": "more"}}
    pool = {**pool, "spec": {"cidr": "10.66.0.0/16"}}
    policy = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "NetworkPolicy",
        "metadata": {"name": "closed"},
        "spec": {"selector": "all()"},
    }
    listed = {"apiVersion": "v1", "kind": "List", "items": [policy]}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump_all([pool, listed]))
    document = small()
    document["spec"]["resources"].append({"file": "more.yaml"})
    (tmp_path / "fabric.yaml").write_text(yaml.safe_dump(document))
    resources = load(tmp_path / "fabric.yaml").spec.resources
    assert [each["kind"] for each in resources[2:]] == ["IPPool", "NetworkPolicy"]
    assert resources[3]["metadata"]["namespace"] == "default"

    for cidr in ("10.65.4.0/24", "10.66.0.1/16"):  # contradicts another pool; is wrong in itself
        (tmp_path / "more.yaml").write_text(yaml.safe_dump({**pool, "spec": {"cidr": cidr}}))
        with pytest.raises(
            InvalidObjectError, match=r"spec.resources\[2\].file\(more.yaml\)\[0\].spec.cidr"
        ):
            load(tmp_path / "fabric.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "stands here twice"),
        ("1: 2\n", "expected text"),
        ("a: [", "not YAML"),
        ("a: &b {c: *b}\n", "an alias within itself"),
        ("- 1\n---\n- 2\n", "2 YAML documents"),
        ("", "0 YAML documents"),
        ("a: !!python/object:os.system {}\n", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_bad_yaml_is_told_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "fabric.yaml"
    path.write_text(text)
    with pytest.raises(FabricFileError, match=message):
        load(path)


def test_text_that_older_yaml_takes_for_numbers_or_dates_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_text("[80:90, on, no, 2026-01-01, 0x10, 010, 1.5, -3, true, null, ~, '']")
    assert read_documents(path) == [
        ["80:90", "on", "no", "2026-01-01", 16, "010", 1.5, -3, True, None, None, ""]
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FabricFileError, match="No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FabricFileError, match="UTF-8"):
        load(tmp_path / "binary.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(FabricFileError, match="larger than"):
        load(tmp_path / "large.yaml")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["tor-1", "172.31.1.11", "172.31.1.0/24", "0.0.0.0/0", "255.255.255.255/32"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        return found + [p for key in value for p in _paths(value[key], (*path, key))]
    if isinstance(value, list):
        return found + [p for i, inner in enumerate(value) for p in _paths(inner, (*path, i))]
    return found


@given(path=st.sampled_from(_paths(SMALL)), value=JSON_VALUES)
@settings(max_examples=300, deadline=None)
def test_a_damaged_fabric_is_refused_or_can_be_built(path: tuple[Any, ...], value: Any) -> None:
    """Whatever stands in whatever place: the answer is problems, or a fabric with a plan."""
    document: Any = small()
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    try:
        fabric = parse(document, HERE)
    except InvalidObjectError as error:
        assert error.problems
        assert str(error)
        return
    assert set(wiring(fabric)) >= {router.name for router in fabric.all_routers()}
    for router in fabric.all_routers():
        assert setup(fabric, router).programs
