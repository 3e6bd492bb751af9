"""apply, create, replace, delete, validate: what is said, and what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from api.kinds import KINDS
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from manxctl.documents import read
from manxctl.main import main
from manxctl.writing import update
from tests.api.test_syntax import JSON_VALUES
from tests.manxctl.conftest import Run

POOL = """
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: pods}
spec: {cidr: 10.0.0.0/16}
"""
POLICY = """
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: web}
spec:
  selector: app == 'web'
  ingress: [{action: Allow, protocol: TCP, destination: {ports: [80]}}]
"""
PODS = Key("IPPool", "pods")


def test_apply_creates_changes_and_leaves(run: Run, store: SqliteDatastore) -> None:
    assert run("apply", "-f", "-", stdin=POOL).output == "IPPool pods created\n"
    first = store.get(PODS)
    assert run("apply", "-f", "-", stdin=POOL).output == "IPPool pods unchanged\n"
    assert store.get(PODS).revision == first.revision
    changed = POOL.replace("spec: {", "spec: {natOutgoing: true, ")
    assert run("apply", "-f", "-", stdin=changed).output == "IPPool pods configured\n"
    second = store.get(PODS)
    assert second.value["spec"]["natOutgoing"] is True
    for field in ("uid", "creationTimestamp"):
        assert second.value["metadata"][field] == first.value["metadata"][field]


def test_defaults_are_stored(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POOL)
    assert store.get(PODS).value["spec"]["blockSize"] == 26


def test_namespaces(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POLICY)
    run("apply", "-f", "-", "-n", "shop", stdin=POLICY)
    named = POLICY.replace("name: web", "name: web, namespace: bank")
    run("apply", "-f", "-", "-n", "shop", stdin=named)
    keys = [entry.key for entry in store.list("NetworkPolicy").entries]
    assert [key.namespace for key in keys] == ["bank", "default", "shop"]


def test_nothing_is_written_when_anything_is_wrong(
    run: Run, store: SqliteDatastore, tmp_path: Path
) -> None:
    file = tmp_path / "all.yaml"
    wrong = POLICY.replace("Allow", "Alow").replace("spec:", "spec:\n  sellector: x")
    wrong = wrong.replace("==", "=")
    file.write_text(f"{POOL}---{wrong}---{POLICY.replace('web', 'x').replace('==', '=')}")
    result = run("apply", "-f", file)
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.removeprefix("Error: ").splitlines()
    second = f"{file}, document 2: NetworkPolicy default/web: spec"
    assert lines[0].startswith(f"{second}.selector: \"app = 'web'\": a selector: ")
    assert lines[1:3] == [
        f"{second}.ingress[0].action: 'Alow': 'Allow', 'Deny', 'Log' or 'Pass'",
        f"{second}.sellector: 'x': no such field; did you mean selector?",
    ]
    assert lines[3].startswith(f"{file}, document 3: NetworkPolicy default/x: spec.selector: ")
    assert len(lines) == 4
    assert store.list("IPPool").entries == []


def test_immutable_fields_are_refused_before_anything_is_written(
    run: Run, store: SqliteDatastore
) -> None:
    run("apply", "-f", "-", stdin=POOL)
    result = run("apply", "-f", "-", stdin=f"{POLICY}---{POOL.replace('10.0.0.0', '10.1.0.0')}")
    assert result.exit_code == 1
    assert "IPPool pods: spec.cidr: '10.1.0.0/16': 10.0.0.0/16, as it is" in result.stderr
    assert store.list("NetworkPolicy").entries == []


def test_directories(run: Run, store: SqliteDatastore, tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    (folder / "more").mkdir(parents=True)
    (folder / "pool.yaml").write_text(POOL)
    (folder / "notes.txt").write_text("not a resource")
    (folder / "more" / "policy.json").write_text(json.dumps(yaml.safe_load(POLICY)))
    assert run("apply", "-f", folder).output == "IPPool pods created\n"
    result = run("apply", "-R", "-f", folder)
    assert result.output == "NetworkPolicy default/web created\nIPPool pods unchanged\n"
    assert run("validate", "-f", folder / "more").output == "1 resource, all valid\n"


@pytest.mark.parametrize("kind", ["List", "IPPoolList"])
def test_lists(run: Run, store: SqliteDatastore, kind: str) -> None:
    items = [yaml.safe_load(POOL.replace("pods", name)) for name in ("a", "b")]
    items[1]["spec"]["cidr"] = "10.1.0.0/16"
    if kind == "IPPoolList":
        for item in items:
            del item["kind"], item["apiVersion"]
    obj = {"apiVersion": "projectcalico.org/v3", "kind": kind, "items": items}
    result = run("apply", "-f", "-", stdin=json.dumps(obj))
    assert result.output == "IPPool a created\nIPPool b created\n"
    items[1]["spec"]["cidr"] = "x"
    result = run("validate", "-f", "-", stdin=json.dumps(obj))
    assert "standard input, document 1, item 2: IPPool b: spec.cidr: 'x'" in result.stderr


def test_what_get_prints_can_be_applied(run: Run) -> None:
    run("apply", "-f", "-", stdin=POOL + "---" + POLICY)
    for arguments in (["pools", "pods"], ["pools"], ["np", "-A"]):
        for output in ("yaml", "json"):
            text = run("get", *arguments, "-o", output).stdout
            assert run("apply", "-f", "-", stdin=text).stdout.endswith(" unchanged\n")


def test_an_old_resource_version_is_a_conflict(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POOL)
    text = run("get", "pools", "pods", "-o", "yaml").stdout.replace(
        "cidr", "disabled: true\n  cidr"
    )
    run("apply", "-f", "-", stdin=POOL.replace("spec: {", "spec: {natOutgoing: true, "))
    for verb in ("apply", "replace"):
        result = run(verb, "-f", "-", stdin=text)
        assert result.exit_code == 1
        assert "IPPool pods: metadata.resourceVersion: " in result.stderr
        assert "get the object and edit that" in result.stderr
    assert "disabled" not in store.get(PODS).value["spec"]
    result = run("delete", "-f", "-", stdin=text)
    assert result.exit_code == 1
    store.delete(PODS)
    assert "does not exist" in run("replace", "-f", "-", stdin=text).stderr


def test_what_was_got_from_another_cluster_can_be_applied(run: Run, store: SqliteDatastore) -> None:
    metadata = "name: pods, resourceVersion: '1056', uid: 9b0cb4d7-0a0f-4a5c-9f39-ff1e5c9ff1b4"
    result = run("apply", "-f", "-", stdin=POOL.replace("name: pods", metadata))
    assert result.output == "IPPool pods created\n"
    assert store.get(PODS).value["metadata"]["uid"] != "9b0cb4d7-0a0f-4a5c-9f39-ff1e5c9ff1b4"


def test_owners_and_finalizers_are_the_stored_objects(run: Run, store: SqliteDatastore) -> None:
    """Those in a file are of another cluster: Kubernetes deletes what has an owner it lacks."""
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "u-1"}
    theirs = {
        "ownerReferences": [owner],
        "finalizers": ["example.org/theirs"],
        "generation": 7,
        "deletionTimestamp": "2030-01-31T12:00:00Z",
    }
    value = yaml.safe_load(POOL)
    foreign = json.dumps(value | {"metadata": value["metadata"] | theirs})
    assert run("apply", "-f", "-", stdin=foreign).output == "IPPool pods created\n"
    assert set(store.get(PODS).value["metadata"]) == {"name", "uid", "creationTimestamp"}
    assert run("apply", "-f", "-", stdin=foreign).output == "IPPool pods unchanged\n"

    ours = {"ownerReferences": [owner | {"uid": "u-2"}], "finalizers": ["example.org/ours"]}
    entry = store.get(PODS)
    entry.value["metadata"] |= ours
    store.update(PODS, entry.value)
    for verb in ("apply", "replace"):
        changed = yaml.safe_load(foreign)
        changed["spec"]["natOutgoing"] = verb == "apply"
        assert "configured" in run(verb, "-f", "-", stdin=json.dumps(changed)).output
        metadata = store.get(PODS).value["metadata"]
        assert {field: metadata[field] for field in ours} == ours
        assert "generation" not in metadata
    exported = yaml.safe_load(run("get", "pools", "pods", "-o", "yaml", "--export").stdout)
    assert exported["metadata"] == {"name": "pods"}


def test_what_kubectl_wrote_is_unchanged(run: Run, store: SqliteDatastore) -> None:
    """Without the defaults, with kubectl's copy and the API server's label."""
    value = yaml.safe_load(POLICY)
    value["metadata"] |= {
        "namespace": "default",
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
        "labels": {"projectcalico.org/tier": "default"},
        "generation": 3,
    }
    key = Key("NetworkPolicy", "web", "default")
    store.create(key, value)
    assert run("apply", "-f", "-", stdin=POLICY).output == "NetworkPolicy default/web unchanged\n"
    changed = POLICY.replace("80", "81")
    assert "configured" in run("apply", "-f", "-", stdin=changed).output
    kept = store.get(key).value["metadata"]
    assert kept == value["metadata"]


def test_what_a_file_states_is_stored(run: Run, store: SqliteDatastore) -> None:
    """Also where it is our default: of what is absent another program may think otherwise."""
    value = yaml.safe_load(POLICY)
    value["metadata"]["namespace"] = "default"
    key = Key("NetworkPolicy", "web", "default")
    store.create(key, value)
    assert run("apply", "-f", "-", stdin=POLICY).stdout.endswith(" unchanged\n")
    stated = POLICY.replace("spec:", "spec:\n  Types: [Ingress]")
    assert run("apply", "-f", "-", stdin=stated).stdout.endswith(" configured\n")
    assert store.get(key).value["spec"]["types"] == ["Ingress"]  # Felix: absent is both directions
    assert run("apply", "-f", "-", stdin=stated).stdout.endswith(" unchanged\n")

    value |= {"apiVersion": "networking.k8s.io/v1"}
    value["spec"] = {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]}
    store.create(Key("KubernetesNetworkPolicy", "web", "default"), value)
    assert run("apply", "-f", "-", stdin=json.dumps(value)).stdout.endswith(" unchanged\n")
    value["spec"]["ingress"][0]["ports"][0]["protocol"] = "TCP"
    for outcome in ("configured", "unchanged"):
        assert run("apply", "-f", "-", stdin=json.dumps(value)).stdout.endswith(f" {outcome}\n")


def test_a_list_without_a_kind(run: Run, store: SqliteDatastore) -> None:
    """As calicoctl prints several objects that were asked for by name."""
    items = [yaml.safe_load(text) for text in (POOL, POLICY)]
    result = run("apply", "-f", "-", stdin=yaml.safe_dump(items))
    assert result.output == "IPPool pods created\nNetworkPolicy default/web created\n"
    items[1]["spec"]["order"] = "x"
    for text in (yaml.safe_dump(items), json.dumps(items)):
        result = run("validate", "-f", "-", stdin=text)
        assert "document 1, item 2: NetworkPolicy default/web: spec.order: 'x'" in result.stderr


CRDS = "crd.projectcalico.org/v1"


def crd(kind: str, name: str, spec: Any, own: Any = None, **metadata: Any) -> dict[str, Any]:
    """As Calico writes its CRDs: what is not its own of the metadata stands in an annotation."""
    metadata |= {"name": name, "generation": 2, "uid": "u-1"}
    if own is not None:
        text = json.dumps({"creationTimestamp": "2024-01-01T00:00:00Z"} | own)
        kept = {"projectcalico.org/metadata": text}
        metadata["annotations"] = kept | metadata.get("annotations", {})
    return {"apiVersion": CRDS, "kind": kind, "metadata": metadata, "spec": spec}


def test_calicos_own_crds(run: Run, store: SqliteDatastore) -> None:
    """As ``kubectl get -o yaml`` shows them in a cluster without Calico's API server."""
    spec = yaml.safe_load(POLICY)["spec"]
    owner = {"apiVersion": CRDS, "kind": "GlobalNetworkPolicy", "name": "deny", "uid": "u-3"}
    own = {"labels": {"role": "blocked"}, "annotations": {"owner": "us"}, "finalizers": ["a/b"]}
    ours = {"labels": {"projectcalico.org/x": "y", "role": "older"}, "annotations": {"z": "z"}}
    tier = {"projectcalico.org/tier": "security"}
    items = [
        crd("IPPool", "pods", {"cidr": "10.0.0.0/16"}, {}),
        crd("IPAMConfig", "default", {"strictAffinity": True}),
        crd(
            "GlobalNetworkSet",
            "blocked",
            {"nets": ["192.0.2.0/24"]},
            own | {"ownerReferences": [owner]},
            **ours,
        ),
        crd("NetworkPolicy", "default.web", spec, {"name": "web"}, namespace="shop"),
        crd("GlobalNetworkPolicy", "default.deny", {}, {}),  # Calico before 3.30
        crd("GlobalNetworkPolicy", "default.a", {"tier": "default"}, {"name": "default.a"}),
        crd("GlobalNetworkPolicy", "security.b", {"tier": "security"}, {}, labels=tier),
        crd("Tier", "security", {"order": 5}, {}),
    ]
    whole = {"apiVersion": "v1", "kind": "List", "items": items}
    result = run("apply", "-f", "-", stdin=yaml.safe_dump(whole))
    assert (result.exit_code, result.stderr) == (0, "")
    titles = [line.removesuffix(" created") for line in result.stdout.splitlines()]
    policies = ["deny", "default.a", "security.b"]
    assert titles == [
        *("IPPool pods", "IPAMConfiguration default", "GlobalNetworkSet blocked"),
        *("NetworkPolicy shop/web", *(f"GlobalNetworkPolicy {name}" for name in policies)),
        "Tier security",
    ]
    metadata = store.get(Key("GlobalNetworkSet", "blocked")).value["metadata"]
    assert set(metadata) == {"name", "uid", "creationTimestamp", "labels", "annotations"}
    assert metadata["uid"] != "u-1"
    assert metadata["labels"] == {"projectcalico.org/x": "y", "role": "blocked"}
    assert metadata["annotations"] == {"z": "z", "owner": "us"}
    assert store.get(PODS).value["apiVersion"] == "projectcalico.org/v3"
    assert "annotations" not in store.get(PODS).value["metadata"]
    assert store.get(Key("GlobalNetworkPolicy", "security.b")).value["metadata"]["labels"] == tier
    again = run("apply", "-f", "-", stdin=yaml.safe_dump(whole)).output.splitlines()
    assert again == [f"{title} unchanged" for title in titles]
    items[0]["spec"]["cidr"] = "x"
    result = run("validate", "-f", "-", stdin=yaml.safe_dump(whole))
    assert "item 1: IPPool pods: spec.cidr: 'x'" in result.stderr


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"labels":["a"]}', '{"name":5}', 7])
def test_no_crd_without_what_calico_keeps_in_its_annotation(run: Run, text: Any) -> None:
    """Without its labels a set would be another."""
    annotations = {"projectcalico.org/metadata": text}
    value = crd("GlobalNetworkSet", "blocked", {}, annotations=annotations)
    result = run("apply", "-f", "-", stdin=json.dumps(value))
    assert (result.exit_code, result.stdout) == (1, "")
    where = "GlobalNetworkSet blocked: metadata.annotations.projectcalico.org/metadata"
    assert f"{where}: {text!r}: JSON" in result.stderr


@pytest.mark.parametrize("verb", ["apply", "create", "replace", "delete"])
def test_no_file_unlocks_a_datastore(run: Run, store: SqliteDatastore, verb: str) -> None:
    run("datastore", "migrate", "lock")
    unlocked = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "ClusterInformation",
        "metadata": {"name": "default"},
        "spec": {"datastoreReady": True},
    }
    result = run(verb, "-f", "-", stdin=json.dumps(unlocked))
    assert result.exit_code == 1
    assert "manxctl datastore migrate lock and unlock" in result.stderr
    patch = run("patch", "clusterinfo", "default", "-p", "spec: {datastoreReady: true}")
    assert patch.exit_code == 1
    stored = store.get(Key("ClusterInformation", "default")).value
    assert stored["spec"] == {"datastoreReady": False}


class Racing(SqliteDatastore):
    """A store in which another writer is faster: it changes the object before each update."""

    races = 3

    def update(self, key: Key, value: dict[str, Any], revision: str | None = None) -> Any:
        if self.races:
            self.races -= 1
            other = self.get(key)
            other.value["metadata"]["annotations"] = {"race": str(self.races)}
            super().update(key, other.value)
        return super().update(key, value, revision)


def test_a_write_that_met_another_is_done_again(run: Run, path: Path, tmp_path: Path) -> None:
    run("apply", "-f", "-", stdin=POOL)
    file = tmp_path / "pool.yaml"
    file.write_text(POOL.replace("spec: {", "spec: {natOutgoing: true, "))
    (document,) = read([str(file)], None, recursive=False)
    from api.registry import parse

    store = Racing(path)
    try:
        assert update(store, document, parse(document.value)) == "configured"
        assert store.races == 0
        assert store.get(PODS).value["spec"]["natOutgoing"] is True
        store.races = 1000
        changed = {**document.value, "spec": {**document.value["spec"], "disabled": True}}
        with pytest.raises(Exception, match="changed by others 20 times"):
            update(store, document, parse(changed))
    finally:
        store.close()


def test_create_and_replace(run: Run) -> None:
    result = run("replace", "-f", "-", stdin=POOL)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "IPPool pods: does not exist" in result.stderr
    assert run("create", "-f", "-", stdin=POOL).output == "IPPool pods created\n"
    result = run("create", "-f", "-", stdin=POOL)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "IPPool pods: exists already" in result.stderr
    assert run("create", "--skip-exists", "-f", "-", stdin=POOL).output == "IPPool pods skipped\n"
    assert run("replace", "-f", "-", stdin=POOL).output == "IPPool pods unchanged\n"
    versioned = POOL.replace("name: pods", "name: other, resourceVersion: '1'")
    assert "expected to be absent" in run("create", "-f", "-", stdin=versioned).stderr


def test_replace_drops_what_the_document_does_not_have(run: Run, store: SqliteDatastore) -> None:
    run("create", "-f", "-", stdin=POOL.replace("name: pods", "name: pods, labels: {a: b}"))
    run("replace", "-f", "-", stdin=POOL)
    assert "labels" not in store.get(PODS).value["metadata"]


def test_a_broken_stored_object_can_be_mended(run: Run, store: SqliteDatastore) -> None:
    store.create(PODS, {"kind": "IPPool", "metadata": None, "spec": {"cidr": "nonsense"}})
    assert run("apply", "-f", "-", stdin=POOL).output == "IPPool pods configured\n"


def test_status_survives_an_apply(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POOL)
    entry = store.get(PODS)
    condition = {
        "type": "Allocatable",
        "status": "True",
        "reason": "Ready",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    store.update(PODS, entry.value | {"status": {"conditions": [condition]}})
    run("apply", "-f", "-", stdin=POOL.replace("spec: {", "spec: {natOutgoing: true, "))
    assert store.get(PODS).value["status"] == {"conditions": [condition]}


def test_delete_by_name_and_by_file(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POOL + "---" + POLICY)
    result = run("delete", "-f", "-", stdin=POOL + "---" + POLICY)
    assert result.output == "IPPool pods deleted\nNetworkPolicy default/web deleted\n"
    result = run("delete", "pool", "pods")
    assert (result.exit_code, result.stderr) == (1, "Error: IPPool pods: does not exist\n")
    result = run("delete", "pool", "pods", "--skip-not-exists")
    assert (result.exit_code, result.stdout) == (0, "IPPool pods does not exist\n")
    run("apply", "-n", "shop", "-f", "-", stdin=POLICY)
    assert run("delete", "np", "web").exit_code == 1
    assert run("delete", "np", "web", "-n", "shop").exit_code == 0


def test_a_tier_is_deleted_after_the_policies_in_it(run: Run) -> None:
    tier = "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: security}\n"
    policy = POLICY.replace("name: web", "name: security.web").replace(
        "spec:", "spec:\n  tier: security"
    )
    for verb in ("apply", "delete"):
        result = run(verb, "-f", "-", stdin=f"{tier}---{policy}")
        assert (result.exit_code, result.stderr) == (0, "")


def test_delete_goes_on_after_an_error(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POOL)
    result = run("delete", "pools", "absent", "pods")
    assert (result.exit_code, result.stdout) == (1, "IPPool pods deleted\n")
    assert store.list("IPPool").entries == []


def test_tiers_that_stay(run: Run) -> None:
    tier = "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: security}\n"
    run("apply", "-f", "-", stdin=tier)
    run("apply", "-f", "-", stdin=POLICY.replace("spec:", "spec:\n  tier: security"))
    result = run("delete", "tier", "security")
    assert result.stderr == "Error: Tier security: still has policies: web\n"
    assert "built-in" in run("delete", "tier", "default").stderr
    run("delete", "np", "web")
    assert run("delete", "tier", "security").exit_code == 0


def test_what_ipam_keeps_is_not_written_by_hand(run: Run) -> None:
    affinity = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "BlockAffinity",
        "metadata": {"name": "n-10-0-0-0-26"},
        "spec": {"state": "confirmed", "node": "n", "cidr": "10.0.0.0/26"},
    }
    result = run("apply", "-f", "-", stdin=json.dumps(affinity))
    assert "BlockAffinity n-10-0-0-0-26: kind: 'BlockAffinity': not written" in result.stderr
    assert run("delete", "affinity", "x").exit_code == 1


def test_converted_policies_are_not_written(run: Run) -> None:
    result = run("create", "-f", "-", stdin=POLICY.replace("name: web", "name: knp.default.web"))
    assert "metadata.name: 'knp.default.web': not beginning with knp.default." in result.stderr


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        ("", "no resource in -"),
        ("a: [", "standard input: line 2, column 1: "),
        ("just text", "standard input, document 1: object: 'just text': a mapping with a kind"),
        ("kind: Pol\n", "kind: 'Pol': a kind Manx knows"),
        ("kind: ippool\n", "kind: 'ippool': a kind Manx knows; did you mean IPPool?"),
        ("metadata: {name: a}\n", "object a: kind: a kind Manx knows\n"),
        (POOL + "---" + POOL, "document 2: IPPool pods: stands in standard input, document 1, too"),
        (POOL.replace("{name: pods}", "{}"), "metadata.name: '': required"),
        (POOL.replace("metadata", "Metadata"), "metadata, name: expected in lower case"),
        (POOL.replace("name:", "Name:"), "metadata, name: expected in lower case"),
    ],
)
def test_refused_input(run: Run, stdin: str, message: str) -> None:
    for verb in ("apply", "create", "replace", "validate"):
        result = run(verb, "-f", "-", stdin=stdin)
        assert result.exit_code == 1
        assert message in result.stderr


OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        "apiVersion": st.sampled_from(["projectcalico.org/v3", "v1", ""]) | JSON_VALUES,
        "kind": st.sampled_from([*(kind.kind for kind in KINDS.values()), "List"]) | JSON_VALUES,
        "metadata": st.just({"name": "x"}) | JSON_VALUES,
        "spec": JSON_VALUES,
        "items": JSON_VALUES,
    },
)


@given(OBJECTS | JSON_VALUES)
def test_arbitrary_objects(obj: object) -> None:
    result = CliRunner().invoke(main, ["validate", "-f", "-"], input=json.dumps(obj))
    assert result.exit_code in (0, 1)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout or result.stderr.startswith("Error: ")


def test_unreadable_files(run: Run, tmp_path: Path) -> None:
    result = run("apply", "-f", tmp_path / "absent.yaml")
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {tmp_path}/absent.yaml: No such file or directory\n",
    )
    (tmp_path / "latin.yaml").write_bytes("a: ä".encode("latin-1"))
    assert "byte 3: expected UTF-8" in run("apply", "-f", tmp_path / "latin.yaml").stderr


def test_all_files_are_looked_at_whatever_the_first_is(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "1.yaml").write_bytes(b"\xff")
    (folder / "2.yaml").write_text("a: b: c\n")
    (folder / "3.yaml").write_text(POOL.replace("10.0.0.0/16", "10.0.0.1/16"))
    for verb in ("validate", "apply"):
        result = run(verb, "-f", tmp_path / "absent.yaml", "-f", folder)
        said = result.stderr.removeprefix("Error: ").splitlines()
        assert [line.partition(": ")[0].partition(",")[0] for line in said] == [
            f"{tmp_path}/absent.yaml",
            *(f"{folder}/{name}.yaml" for name in (1, 2, 3)),
        ]
        assert said[-1].endswith("a CIDR such as 10.0.0.0/24 without bits beyond its prefix length")


def test_pools_that_overlap(run: Run, store: SqliteDatastore) -> None:
    inner = POOL.replace("pods", "inner").replace("10.0.0.0/16", "10.0.3.0/24")
    refused = (
        "IPPool inner: spec.cidr: '10.0.3.0/24': "
        "a range of its own: it overlaps 10.0.0.0/16 of IPPool pods\n"
    )
    for verb in ("validate", "apply", "create"):
        result = run(verb, "-f", "-", stdin=f"{POOL}---{inner}")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"Error: standard input, document 2: {refused}"
    run("apply", "-f", "-", stdin=POOL)
    result = run("apply", "-f", "-", stdin=inner)
    assert (result.exit_code, result.stderr) == (1, f"Error: standard input, document 1: {refused}")
    assert [entry.key for entry in store.list("IPPool").entries] == [PODS]


def test_stored_pools_that_overlap_can_be_disabled(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POOL)
    inner = {"cidr": "10.0.3.0/24"}
    store.create(
        Key("IPPool", "inner"),
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "IPPool",
            "metadata": {"name": "inner"},
            "spec": inner,
        },
    )
    both = run("get", "pools", "-o", "yaml").stdout
    changed = both.replace("cidr: 10.0.3.0/24", "cidr: 10.0.3.0/24\n    disabled: true")
    assert run("apply", "-f", "-", stdin=changed).exit_code == 0
    assert store.get(Key("IPPool", "inner")).value["spec"]["disabled"] is True


NODE = """
apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: n1}
spec: {bgp: {ipv4Address: 192.0.2.1/24}}
"""


def test_an_agents_fields_of_a_node_stay(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=NODE)
    entry = store.get(Key("Node", "n1"))
    entry.value["spec"]["ipv4VXLANTunnelAddr"] = "10.65.0.1"
    store.update(entry.key, entry.value)
    assert run("apply", "-f", "-", stdin=NODE).output == "Node n1 unchanged\n"
    assert store.get(entry.key).value["spec"]["ipv4VXLANTunnelAddr"] == "10.65.0.1"
