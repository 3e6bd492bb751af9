"""All data moved between stores of every sort: nothing lost, nothing overwritten, resumable."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from api.net import parse_net
from datastore import migrate
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import EtcdSettings
from datastore.interface import JSON, ConflictError, Datastore, Key, UnavailableError
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from datastore.migrate import Outcome
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator
from tests.support.crds import install_crds
from tests.support.etcd import Etcd
from tests.support.kube import KubeApiserver
from tests.support.netns import eventually

CLUSTER_GUID = "0123456789abcdef0123456789abcdef"
V3 = "projectcalico.org/v3"


def v3(kind: str, name: str, spec: JSON, namespace: str = "", **metadata: Any) -> tuple[Key, JSON]:
    names = {"name": name} | ({"namespace": namespace} if namespace else {}) | metadata
    value = {"apiVersion": V3, "kind": kind, "metadata": names, "spec": spec}
    return Key(kind, name, namespace), value


def fill(store: Datastore) -> None:
    """Objects of many sorts, also those that IPAM keeps."""
    objects = [
        v3("IPPool", "pods", {"cidr": "10.70.0.0/16"}, labels={"a": "b"}, uid="u-1"),
        v3("Tier", "security", {"order": 5}),
        v3("GlobalNetworkPolicy", "security.all", {"tier": "security", "selector": "all()"}),
        v3("NetworkPolicy", "web", {"selector": "app == 'web'"}, "moving"),
        v3("BGPConfiguration", "default", {"asNumber": 64513}),
        v3("FelixConfiguration", "default", {"logSeverityScreen": "Warning"}),
        v3("ClusterInformation", "default", {"clusterGUID": CLUSTER_GUID, "datastoreReady": True}),
        v3("IPAMConfiguration", "default", {"strictAffinity": True, "autoAllocateBlocks": True}),
    ]
    for key, value in objects:
        store.create(key, value)
    allocator = Allocator(store, "moving-node")
    for number in range(3):
        allocator.assign(f"k8s-pod-network.{number}", {"pod": f"p{number}"})


def contents(store: Datastore) -> dict[Key, JSON]:
    """All objects that a store's users make."""
    kinds = [kind for kind in migrate._in_order() if kind not in store.given]
    return {entry.key: entry.value for kind in kinds for entry in store.list(kind).entries}


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[SqliteDatastore]:
    with closing(SqliteDatastore(tmp_path / "datastore.db")) as store:
        yield store


@pytest.fixture
def etcd_store(etcd: Etcd) -> Iterator[EtcdDatastore]:
    with closing(EtcdDatastore(EtcdSettings(tuple(etcd.endpoints)))) as store:
        clear(store)
        yield store
        clear(store)


@pytest.fixture
def kubernetes(kube_apiserver: KubeApiserver) -> Iterator[KubernetesDatastore]:
    install_crds(kube_apiserver)
    namespace = {"metadata": {"name": "moving"}}
    kube_apiserver.request("POST", "/api/v1/namespaces", namespace)
    settings = KubernetesSettings(str(kube_apiserver.kubeconfig))
    with closing(KubernetesDatastore(settings)) as store:
        clear(store)
        yield store
        clear(store)


def clear(store: Datastore) -> None:
    for key in contents(store):
        store.delete(key)


def check_move(source: Datastore, target: Datastore, given: Collection[str] = ()) -> None:
    """Export, dry run, interrupted import, import, again; then the data are in use.

    ``given``: kinds whose objects the source has by itself.
    """
    fill(source)
    migrate.lock(source)
    assert migrate.is_locked(source)
    objects = migrate.read(migrate.export(source))
    planned = migrate.import_all(target, objects, dry_run=True)
    assert contents(target) == {}
    assert not {r.outcome for r in planned} & {Outcome.CONFLICT, Outcome.REFUSED}
    migrate.import_all(target, objects[: len(objects) // 2])  # cut off half-way
    results = migrate.import_all(target, objects)
    assert not {r.outcome for r in results} & {Outcome.CONFLICT, Outcome.REFUSED}, results
    assert Outcome.PRESENT in {r.outcome for r in results}
    assert Outcome.CREATED in {r.outcome for r in results}
    assert migrate.is_locked(target)
    again = migrate.import_all(target, objects)
    assert {r.outcome for r in again} <= {Outcome.PRESENT, Outcome.LEFT_OUT}
    before, after = contents(source), contents(target)
    assert before.keys() == {key for key in after if key.kind not in given}
    for key, value in before.items():
        assert not migrate.differences(value, after[key]), key
    migrate.unlock(target)
    assert not migrate.is_locked(target)
    assert target.get(migrate.CLUSTER).value["spec"] == {
        "clusterGUID": CLUSTER_GUID,
        "datastoreReady": True,
    }
    allocator = Allocator(target, "moving-node")
    assert (
        allocator.addresses("k8s-pod-network.1") == [parse_net("10.70.0.1/32")]
        or len(allocator.addresses("k8s-pod-network.1")) == 1
    )
    assert allocator.release("k8s-pod-network.1")


def test_from_sqlite_to_etcd(sqlite: SqliteDatastore, etcd_store: EtcdDatastore) -> None:
    check_move(sqlite, etcd_store)


def test_from_etcd_to_sqlite(sqlite: SqliteDatastore, etcd_store: EtcdDatastore) -> None:
    check_move(etcd_store, sqlite)


def test_from_sqlite_to_kubernetes(
    sqlite: SqliteDatastore, kubernetes: KubernetesDatastore
) -> None:
    check_move(sqlite, kubernetes)


def test_from_etcd_to_kubernetes(
    etcd_store: EtcdDatastore, kubernetes: KubernetesDatastore
) -> None:
    check_move(etcd_store, kubernetes)


def test_from_kubernetes_to_sqlite(
    kubernetes: KubernetesDatastore, sqlite: SqliteDatastore
) -> None:
    check_move(kubernetes, sqlite, {"Namespace", "ServiceAccount", "Profile", "Service"})


def test_from_kubernetes_to_etcd(
    kubernetes: KubernetesDatastore, etcd_store: EtcdDatastore
) -> None:
    fill(kubernetes)
    migrate.lock(kubernetes)
    results = migrate.import_all(etcd_store, migrate.read(migrate.export(kubernetes)))
    assert {r.outcome for r in results} <= {Outcome.CREATED, Outcome.UPDATED}, results
    moved = contents(etcd_store)
    for key, value in contents(kubernetes).items():
        assert not migrate.differences(value, moved[key]), key
    assert Key("Profile", "kns.moving") in moved
    assert Key("Namespace", "moving") in moved


def test_nodes_and_endpoints_become_annotations(
    sqlite: SqliteDatastore, kubernetes: KubernetesDatastore, kube_apiserver: KubeApiserver
) -> None:
    def make(path: str, value: JSON) -> None:
        assert kube_apiserver.request("POST", path, value)[0] in (201, 409)

    make("/api/v1/nodes", {"metadata": {"name": "moved", "labels": {"zone": "a"}}})
    container = {"name": "c", "image": "x"}
    make(
        "/api/v1/namespaces/moving/pods",
        {"metadata": {"name": "web"}, "spec": {"nodeName": "moved", "containers": [container]}},
    )
    node = v3("Node", "moved", {"bgp": {"ipv4Address": "10.1.0.1/24"}}, labels={"rack": "7"})
    gone = v3("Node", "gone", {"bgp": {"ipv4Address": "10.1.0.2/24"}})
    endpoint = v3(
        "WorkloadEndpoint",
        "moved-k8s-web-eth0",
        {"ipNetworks": ["10.70.0.9/32"], "interfaceName": "cali1", "node": "moved"},
        "moving",
    )
    for key, value in (node, gone, endpoint):
        sqlite.create(key, value)
    migrate.lock(sqlite)
    objects = migrate.read(migrate.export(sqlite))
    outcomes = {r.key: r.outcome for r in migrate.import_all(kubernetes, objects)}
    assert outcomes[node[0]] == outcomes[endpoint[0]] == Outcome.UPDATED
    assert outcomes[gone[0]] == Outcome.LEFT_OUT
    moved = kubernetes.get(node[0]).value
    assert moved["spec"]["bgp"] == {"ipv4Address": "10.1.0.1/24"}
    assert moved["metadata"]["labels"] == {"zone": "a", "rack": "7"}
    assert kubernetes.get(endpoint[0]).value["spec"]["ipNetworks"] == ["10.70.0.9/32"]
    again = {r.key: r.outcome for r in migrate.import_all(kubernetes, objects)}
    assert again[node[0]] == again[endpoint[0]] == Outcome.PRESENT
    node[1]["spec"]["bgp"]["ipv4Address"] = "10.1.0.3/24"
    (conflict,) = migrate.import_all(kubernetes, [node[1]])
    assert conflict.outcome == Outcome.CONFLICT
    assert conflict.reason == "differs in spec.bgp.ipv4Address"
    kube_apiserver.request("DELETE", "/api/v1/nodes/moved")
    kube_apiserver.request(
        "DELETE", "/api/v1/namespaces/moving/pods/web", {"gracePeriodSeconds": 0}
    )


def test_what_is_there_is_never_overwritten(
    sqlite: SqliteDatastore, etcd_store: EtcdDatastore
) -> None:
    fill(sqlite)
    migrate.lock(sqlite)
    objects = migrate.read(migrate.export(sqlite))
    pool = etcd_store.create(*v3("IPPool", "pods", {"cidr": "10.71.0.0/16"}))
    etcd_store.create(*v3("ClusterInformation", "default", {"clusterGUID": "f" * 32}))
    for dry_run in (True, False):
        results = migrate.import_all(etcd_store, objects, dry_run=dry_run)
        conflicts = {r.key: r.reason for r in results if r.outcome == Outcome.CONFLICT}
        assert conflicts == {
            pool.key: "differs in metadata, spec",
            migrate.CLUSTER: "differs in spec.clusterGUID",
        }
    assert etcd_store.get(pool.key) == pool


def test_an_object_the_store_refuses_does_not_keep_the_others(etcd_store: EtcdDatastore) -> None:
    _, good = v3("IPPool", "good", {"cidr": "10.71.0.0/16"})
    _, bad = v3("IPAMBlock", "10-0-0-0-26", {"cidr": "nonsense"})
    results = migrate.import_all(etcd_store, [{"kind": "What"}, bad, good])
    assert [r.outcome for r in results] == [Outcome.REFUSED, Outcome.REFUSED, Outcome.CREATED]
    assert "a kind Manx knows" in results[0].reason
    assert "IPAMBlock(10-0-0-0-26)" in results[1].reason


def test_an_outage_ends_an_import_which_can_go_on(sqlite: SqliteDatastore, tmp_path: Path) -> None:
    fill(sqlite)
    migrate.lock(sqlite)
    objects = migrate.read(migrate.export(sqlite))
    target = SqliteDatastore(tmp_path / "target.db")

    def close_after_three(result: migrate.Result) -> None:
        told.append(result)
        if len(told) == 3:
            target.close()

    told: list[migrate.Result] = []
    with pytest.raises(UnavailableError):
        migrate.import_all(target, objects, tell=close_after_three)
    target = SqliteDatastore(tmp_path / "target.db")
    with closing(target):
        migrate.import_all(target, objects)
        assert contents(target).keys() == contents(sqlite).keys()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: lines[:-1], "ends before its end"),
        (lambda lines: [*lines[:1], *lines[2:]], "objects, expected"),
        (lambda lines: lines[1:], "expected the header"),
        (lambda lines: [*lines, b"{}\n"], "nothing after the end"),
        (lambda lines: [lines[0], b"{\n"], "line 2"),
        (lambda lines: [], "ends before its end"),
        (lambda lines: [b"kind: IPPool\n"], "line 1"),
        (lambda lines: [lines[0], b"[]\n", *lines[1:]], "line 2: expected an object"),
    ],
)
def test_half_an_export_is_not_taken_for_a_whole_one(
    sqlite: SqliteDatastore, change: Callable[[list[bytes]], list[bytes]], complaint: str
) -> None:
    fill(sqlite)
    lines = list(migrate.export(sqlite))
    assert len(migrate.read(lines)) == len(lines) - 2
    with pytest.raises(migrate.FormatError, match=complaint):
        migrate.read(change(lines))


def test_lock_and_unlock_keep_the_rest(sqlite: SqliteDatastore) -> None:
    assert not migrate.is_locked(sqlite)
    migrate.unlock(sqlite)
    sqlite.delete(migrate.CLUSTER)
    sqlite.create(*v3("ClusterInformation", "default", {"clusterGUID": CLUSTER_GUID}))
    migrate.lock(sqlite)
    locked = sqlite.get(migrate.CLUSTER)
    migrate.lock(sqlite)
    assert sqlite.get(migrate.CLUSTER) == locked
    migrate.unlock(sqlite)
    assert sqlite.get(migrate.CLUSTER).value["spec"] == {
        "clusterGUID": CLUSTER_GUID,
        "datastoreReady": True,
    }


def test_what_is_written_during_an_export_spoils_it(sqlite: SqliteDatastore) -> None:
    fill(sqlite)
    lines = []
    with pytest.raises(ConflictError, match=r"Tier\(security\): changed during the export"):
        for line in migrate.export(sqlite):
            lines.append(line)
            if b'"kind":"Tier"' in line:
                tier = sqlite.get(Key("Tier", "security"))
                sqlite.update(tier.key, tier.value)
    with pytest.raises(migrate.FormatError, match="ends before its end"):
        migrate.read(lines)


def test_a_dry_run_finds_that_a_namespace_is_missing(kubernetes: KubernetesDatastore) -> None:
    _, policy = v3("NetworkPolicy", "web", {"selector": "all()"}, "nowhere")
    for dry_run in (True, False):
        (result,) = migrate.import_all(kubernetes, [policy], dry_run=dry_run)
        assert result.outcome == Outcome.REFUSED
        assert "nowhere" in result.reason


# -- killed in the middle --------------------------------------------------------------------


def check_killed_import(source: Datastore, target: Datastore, url: str, directory: Path) -> None:
    """``import`` in a process of its own, killed half-way; run again, it finishes."""
    fill(source)
    for number in range(600):
        source.create(*v3("GlobalNetworkSet", f"set-{number}", {"nets": ["192.0.2.0/24"]}))
    migrate.lock(source)
    file = directory / "everything"
    file.write_bytes(b"".join(migrate.export(source)))
    command = [
        *(sys.executable, "-m", "manxctl", "datastore", "migrate", "import"),
        *("--datastore", url, "-f", str(file)),
    ]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: len(target.list("GlobalNetworkSet").entries) > 20, 30)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    half = contents(target)
    assert len(half) < len(contents(source))
    assert migrate.is_locked(target)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "still locked" in done.stdout
    before, after = contents(source), contents(target)
    assert before.keys() == after.keys()
    assert not [key for key, value in before.items() if migrate.differences(value, after[key])]
    del half[migrate.CLUSTER]  # the lock, to which the cluster's identity is added at its turn
    assert {key: after[key] for key in half} == half  # what was there was not written again
    assert migrate.is_locked(target)


def test_killed_on_the_way_to_sqlite(sqlite: SqliteDatastore, tmp_path: Path) -> None:
    with closing(SqliteDatastore(tmp_path / "target.db")) as target:
        check_killed_import(sqlite, target, f"sqlite://{tmp_path}/target.db", tmp_path)


def test_killed_on_the_way_to_etcd(
    sqlite: SqliteDatastore, etcd: Etcd, etcd_store: EtcdDatastore, tmp_path: Path
) -> None:
    check_killed_import(sqlite, etcd_store, f"etcd://{etcd.endpoints[0]}", tmp_path)


def test_killed_on_the_way_to_kubernetes(
    sqlite: SqliteDatastore,
    kubernetes: KubernetesDatastore,
    kube_apiserver: KubeApiserver,
    tmp_path: Path,
) -> None:
    url = f"kubernetes://?kubeconfig={kube_apiserver.kubeconfig}"
    check_killed_import(sqlite, kubernetes, url, tmp_path)
