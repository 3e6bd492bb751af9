"""Patches, alone and through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from manxctl.patching import PatchError, json_patch, merge, strategic
from tests.api.test_syntax import JSON_VALUES
from tests.manxctl.conftest import Run
from tests.manxctl.test_files import PODS, POLICY, POOL

# RFC 7386, appendix A: target, patch, result
MERGES: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]

# After RFC 6902, appendix A: document, operations, result (a text: the complaint)
OPERATIONS: list[tuple[Any, Any, Any]] = [
    ({"foo": "bar"}, [{"op": "add", "path": "/baz", "value": "qux"}], {"baz": "qux", "foo": "bar"}),
    (
        {"foo": ["bar", "baz"]},
        [{"op": "add", "path": "/foo/1", "value": "qux"}],
        {"foo": ["bar", "qux", "baz"]},
    ),
    ({"baz": "qux", "foo": "bar"}, [{"op": "remove", "path": "/baz"}], {"foo": "bar"}),
    (
        {"foo": ["bar", "qux", "baz"]},
        [{"op": "remove", "path": "/foo/1"}],
        {"foo": ["bar", "baz"]},
    ),
    ({"baz": "qux"}, [{"op": "replace", "path": "/baz", "value": "boo"}], {"baz": "boo"}),
    ({"l": [1, 2, 3]}, [{"op": "replace", "path": "/l/1", "value": 9}], {"l": [1, 9, 3]}),
    (
        {"foo": {"bar": "baz", "waldo": "fred"}, "qux": {"corge": "grault"}},
        [{"op": "move", "from": "/foo/waldo", "path": "/qux/thud"}],
        {"foo": {"bar": "baz"}, "qux": {"corge": "grault", "thud": "fred"}},
    ),
    (
        {"foo": ["all", "grass", "cows", "eat"]},
        [{"op": "move", "from": "/foo/1", "path": "/foo/3"}],
        {"foo": ["all", "cows", "eat", "grass"]},
    ),
    ({"a": {"b": 1}}, [{"op": "copy", "from": "/a", "path": "/c"}], {"a": {"b": 1}, "c": {"b": 1}}),
    ({"baz": "qux"}, [{"op": "test", "path": "/baz", "value": "qux"}], {"baz": "qux"}),
    ({"baz": "qux"}, [{"op": "test", "path": "/baz", "value": "bar"}], "the test does not hold"),
    ({"a": 1}, [{"op": "test", "path": "/a", "value": True}], "the test does not hold"),
    ({"foo": "bar"}, [{"op": "add", "path": "/baz/bat", "value": 1}], "/baz: does not exist"),
    ({"foo": "bar"}, [{"op": "remove", "path": "/x"}], "operation 0: /x: does not exist"),
    ({"foo": ["bar"]}, [{"op": "add", "path": "/foo/-", "value": ["a"]}], {"foo": ["bar", ["a"]]}),
    ({"foo": ["bar"]}, [{"op": "add", "path": "/foo/2", "value": 1}], "a place in a list of 1"),
    ({"foo": ["bar"]}, [{"op": "add", "path": "/foo/01", "value": 1}], "a place in a list"),
    ({"foo": ["bar"]}, [{"op": "remove", "path": "/foo/1"}], "does not exist"),
    ({"/": 9, "~1": 10}, [{"op": "test", "path": "/~01", "value": 10}], {"/": 9, "~1": 10}),
    ({"a/b": 1}, [{"op": "remove", "path": "/a~1b"}], {}),
    ({"a": 1}, [{"op": "add", "path": "", "value": {"b": 2}}], {"b": 2}),
    ({"a": 1}, [{"op": "replace", "path": "", "value": {"b": 2}}], {"b": 2}),
    ({"a": 1}, [{"op": "remove", "path": ""}], "whole object"),
    ({"a": {}}, [{"op": "move", "from": "/a", "path": "/a/b"}], "into itself"),
    ({"a": 1}, [{"op": "spam", "path": "/a"}], "op: 'spam': expected add"),
    ({"a": 1}, [{"op": "add", "path": "/b"}], "value is missing"),
    ({"a": 1}, [{"op": "add", "path": "b", "value": 1}], "JSON pointer"),
    ({"a": 1}, {"op": "add"}, "list of operations"),
    ({"a": 1}, ["x"], "operation 0"),
]


@pytest.mark.parametrize(("target", "patch", "result"), MERGES)
def test_merge(target: Any, patch: Any, result: Any) -> None:
    before = json.dumps(target)
    assert merge(target, patch) == result
    assert json.dumps(target) == before


@pytest.mark.parametrize(("document", "operations", "result"), OPERATIONS)
def test_json_patch(document: Any, operations: Any, result: Any) -> None:
    before = json.dumps(document)
    if isinstance(result, str):
        with pytest.raises(PatchError) as caught:
            json_patch(document, operations)
        assert result in str(caught.value)
    else:
        assert json_patch(document, operations) == result
    assert json.dumps(document) == before


@pytest.mark.parametrize(
    ("patch", "result"),
    [
        ({"a": {"b": 2}}, {"a": {"b": 2, "c": 1}, "l": [1, 2]}),
        ({"a": {"$patch": "replace", "d": 3}}, {"a": {"d": 3}, "l": [1, 2]}),
        ({"a": {"$patch": "delete"}}, {"a": {}, "l": [1, 2]}),
        ({"a": {"$retainKeys": ["b"], "b": 5}}, {"a": {"b": 5}, "l": [1, 2]}),
        ({"a": None, "l": [{"x": 1}]}, {"l": [{"x": 1}]}),
        ({"l": [{"$patch": "delete", "x": 1}]}, "no merge key"),
        ({"$setElementOrder/l": [1]}, "only lists with merge keys"),
        ({"a": {"$patch": "burn"}}, "expected replace, delete"),
        ({"a": {"$retainKeys": "b"}}, "a list of names"),
        ({"metadata": {"finalizers": ["x"]}}, "use -t merge"),
    ],
)
def test_strategic(patch: Any, result: Any) -> None:
    target = {"a": {"b": 1, "c": 1}, "l": [1, 2]}
    if isinstance(result, str):
        with pytest.raises(PatchError) as caught:
            strategic(target, patch)
        assert result in str(caught.value)
    else:
        assert strategic(target, patch) == result


@given(JSON_VALUES, JSON_VALUES)
def test_whatever_a_patch_is_it_is_applied_or_refused(target: Any, patch: Any) -> None:
    merged = merge(target, patch)
    assert merge(merged, patch) == merged
    for apply in (strategic, json_patch):
        try:
            json.dumps(apply(target, patch))
        except PatchError as error:
            assert str(error)


@given(
    JSON_VALUES,
    st.lists(
        st.fixed_dictionaries(
            {
                "op": st.sampled_from(["add", "remove", "replace", "move", "copy", "test"]),
                "path": st.text("/~01-ab", max_size=6),
                "from": st.text("/~01-ab", max_size=6),
                "value": JSON_VALUES,
            }
        ),
        max_size=4,
    ),
)
def test_json_patches_are_applied_whole_or_not_at_all(target: Any, patch: Any) -> None:
    before = json.dumps(target)
    try:
        json_patch(target, patch)
    except PatchError as error:
        assert str(error)
    assert json.dumps(target) == before


def test_patch_command(run: Run, store: SqliteDatastore, tmp_path: Path) -> None:
    run("apply", "-f", "-", stdin=POOL)
    patched = run("patch", "ippool", "pods", "-p", '{"spec": {"natOutgoing": true}}')
    assert (patched.exit_code, patched.output) == (0, "IPPool pods patched\n")
    assert store.get(PODS).value["spec"]["natOutgoing"] is True
    again = run("patch", "ippool", "pods", "-p", "spec: {natOutgoing: true}")
    assert again.output == "IPPool pods unchanged\n"
    file = tmp_path / "patch.json"
    file.write_text('[{"op": "add", "path": "/spec/disabled", "value": true}]')
    assert run("patch", "pool", "pods", "-t", "json", "--patch-file", file).exit_code == 0
    assert store.get(PODS).value["spec"]["disabled"] is True
    before = store.get(PODS)
    for arguments, complaint in (
        (["-p", "spec: {cidr: 10.1.0.0/16}"], "spec.cidr"),
        (["-p", "spec: {natOutgoin: true}"], "natOutgoing"),
        (["-p", "metadata: {name: other}"], "can't be changed"),
        (["-p", "metadata: {resourceVersion: '1x'}"], "metadata.resourceVersion: '1x'"),
        (["-p", "[1]"], "a mapping"),
        (["-p", "{"], "patch"),
        ([], "either -p or --patch-file"),
        (["-t", "json", "-p", '[{"op": "remove", "path": "/x"}]'], "/x: does not exist"),
        (["-t", "merge", "-p", "kind: BGPPeer"], "can't be changed"),
        (["-t", "json", "-p", '[{"op": "replace", "path": "", "value": 1}]'], "no object"),
    ):
        refused = run("patch", "ippool", "pods", *arguments)
        assert refused.exit_code in (1, 2)
        assert complaint in refused.output
    assert store.get(PODS) == before
    dry = run("patch", "ippool", "pods", "--dry-run", "-p", "spec: {disabled: false}")
    assert "disabled: false" in dry.output
    assert store.get(PODS) == before
    assert run("patch", "ippool", "none", "-p", "{}").exit_code == 1


def test_patch_in_a_namespace_and_of_what_an_agent_wrote(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-n", "shop", "-f", "-", stdin=POLICY)
    patch = '{"spec": {"selector": "app == \'other\'"}}'
    assert run("patch", "np", "web", "-n", "shop", "-t", "merge", "-p", patch).exit_code == 0
    web = store.get(Key("NetworkPolicy", "web", "shop")).value
    assert web["spec"]["selector"] == "app == 'other'"
    assert web["spec"]["ingress"]
    node = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "Node",
        "metadata": {"name": "n1", "uid": "u"},
        "spec": {"ipv4VXLANTunnelAddr": "10.0.0.1"},
    }
    store.create(Key("Node", "n1"), node)
    assert run("patch", "node", "n1", "-p", "spec: {ipv4VXLANTunnelAddr: null}").exit_code == 0
    stored = store.get(Key("Node", "n1")).value
    assert "ipv4VXLANTunnelAddr" not in stored.get("spec", {})
    assert stored["metadata"]["uid"] == "u"


def test_what_is_longer_than_may_be_written_now(run: Run, store: SqliteDatastore) -> None:
    """Calico before 3.34 had no limits: what is stored can be changed without being shortened."""
    nets = [f"10.0.{number}.0/24" for number in range(256)]
    value: dict[str, Any] = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "GlobalNetworkPolicy",
        "metadata": {"name": "big"},
        "spec": {"ingress": [{"action": "Allow", "source": {"nets": nets}}], "types": ["Ingress"]},
    }
    key = Key("GlobalNetworkPolicy", "big")
    store.create(key, value)
    longer = json.dumps({"spec": {"ingress": [{"action": "Deny", "source": {"nets": nets * 2}}]}})
    refused = "spec.ingress[0].source.nets: "
    assert refused in run("patch", "gnp", "big", "-p", longer).stderr
    value["spec"]["ingress"][0]["source"]["nets"] = nets * 2
    assert refused in run("apply", "-f", "-", stdin=json.dumps(value)).stderr

    entry = store.update(key, value)
    assert run("label", "gnp", "big", "a=b").exit_code == 0
    assert run("patch", "gnp", "big", "-p", "spec: {order: 5}").exit_code == 0
    patched = store.get(key).value
    assert patched["metadata"]["labels"] == {"a": "b"}
    assert patched["spec"] == entry.value["spec"] | {"tier": "default", "order": 5}
    for patch, complaint in (
        ("spec: {order: x}", "spec.order: 'x'"),
        ("spec: {selector: a =}", "spec.selector: 'a ='"),
    ):
        assert complaint in run("patch", "gnp", "big", "-p", patch).stderr
    assert run("patch", "gnp", "big", "-p", json.dumps({"spec": {"ingress": []}})).exit_code == 0
    assert refused in run("patch", "gnp", "big", "-p", longer).stderr
