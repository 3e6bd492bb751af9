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

from api.kinds import KINDS
from api.names import cidr_name
from api.net import Net, parse_net
from api.policy import TIER_LABEL
from datastore import migrate
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import EtcdSettings
from datastore.interface import JSON, ConflictError, Datastore, Key, UnavailableError
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from datastore.migrate import Outcome
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator
from tests.support.crds import install_admission, install_crds
from tests.support.etcd import Etcd
from tests.support.kube import KubeApiserver, api_server
from tests.support.netns import eventually

pytestmark = pytest.mark.timeout(300)  # a busy machine needs minutes

CLUSTER_GUID = "0123456789abcdef0123456789abcdef"
V3 = "projectcalico.org/v3"


def v3(kind: str, name: str, spec: JSON, namespace: str = "", **metadata: Any) -> tuple[Key, JSON]:
    names = {"name": name} | ({"namespace": namespace} if namespace else {}) | metadata
    value = {"apiVersion": V3, "kind": kind, "metadata": names, "spec": spec}
    return Key(kind, name, namespace), value


def with_status(object_: tuple[Key, JSON]) -> tuple[Key, JSON]:
    condition = {
        "type": "Allocatable",
        "status": "True",
        "reason": "Made",
        "message": "",
        "lastTransitionTime": "2030-01-31T12:00:00Z",
    }
    return object_[0], object_[1] | {"status": {"conditions": [condition]}}


SUBJECT: JSON = {"namespaces": {"matchLabels": {"moving": "yes"}}}


def policies_of_kubernetes() -> list[tuple[Key, JSON]]:
    """What people write also where Kubernetes keeps it."""

    def made(id_: str, name: str, spec: JSON, namespace: str = "") -> tuple[Key, JSON]:
        key, value = v3(id_, name, spec, namespace)
        kind = KINDS[id_]
        return key, value | {"apiVersion": kind.api_version, "kind": kind.kind}

    rule = {"name": "a", "action": "Deny", "from": [SUBJECT]}
    return [
        made("KubernetesNetworkPolicy", "none", {"podSelector": {}}, "moving"),
        made(
            "KubernetesNetworkPolicy",
            "ports",
            {"podSelector": {}, "egress": [{"ports": [{"port": 53}]}], "policyTypes": ["Egress"]},
            "moving",
        ),
        made(
            "ClusterNetworkPolicy",
            "moving",
            {
                "tier": "Admin",
                "priority": 7,
                "subject": SUBJECT,
                "ingress": [{"name": "a", "action": "Deny", "from": [SUBJECT]}],
            },
        ),
        made(
            "AdminNetworkPolicy", "moving", {"priority": 7, "subject": SUBJECT, "ingress": [rule]}
        ),
        made("BaselineAdminNetworkPolicy", "default", {"subject": SUBJECT, "ingress": [rule]}),
    ]


def secret(name: str, **fields: JSON) -> tuple[Key, JSON]:
    metadata = {"name": name, "namespace": "moving"}
    value = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque"}
    return Key("Secret", name, "moving"), value | fields


def fill(store: Datastore) -> None:
    """Objects of many sorts, also those that IPAM keeps."""
    applied = {"kubectl.kubernetes.io/last-applied-configuration": "{}"}
    objects = [
        with_status(v3("IPPool", "pods", {"cidr": "10.70.0.0/16"}, labels={"a": "b"}, uid="u-1")),
        v3("GlobalNetworkPolicy", "plain", {"selector": "all()"}, annotations=applied),
        *policies_of_kubernetes(),
        secret("bgp", data={"tor": "aGlkZGVu"}, stringData={"spine": "hidden, too"}),
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
    """All objects that a store's users make; of Kubernetes' own kinds, in our namespace."""
    return {
        entry.key: entry.value
        for kind in migrate._in_order()
        if migrate.is_written(store, kind)
        for entry in store.list(kind, "moving" if kind in store.given else None).entries
    }


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


@pytest.fixture
def kubernetes_with_admission() -> Iterator[KubernetesDatastore]:
    with api_server() as server:
        install_crds(server)
        install_admission(server)
        server.request("POST", "/api/v1/namespaces", {"metadata": {"name": "moving"}})
        settings = KubernetesSettings(str(server.kubeconfig))
        with closing(KubernetesDatastore(settings)) as store:
            yield store


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
    assert {r.outcome for r in again} <= {Outcome.PRESENT, Outcome.LEFT_OUT}, again
    before, after = contents(source), contents(target)
    if "Secret" in source.given:  # those of a whole cluster are not written down
        before.pop(Key("Secret", "bgp", "moving"))
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
    given = {"Namespace", "ServiceAccount", "Profile", "Service", "ServiceCIDR"}
    check_move(kubernetes, sqlite, given)


def test_from_kubernetes_to_etcd(
    kubernetes: KubernetesDatastore, etcd_store: EtcdDatastore
) -> None:
    fill(kubernetes)
    migrate.lock(kubernetes)
    results = migrate.import_all(etcd_store, migrate.read(migrate.export(kubernetes)))
    assert {r.outcome for r in results} <= {Outcome.CREATED, Outcome.UPDATED}, results
    moved = contents(etcd_store)
    for key, value in contents(kubernetes).items():
        assert key.kind == "Secret" or not migrate.differences(value, moved[key]), key
    assert Key("Profile", "kns.moving") in moved
    assert Key("Namespace", "moving") in moved


def test_what_people_wrote_is_a_conflict_where_kubernetes_has_another(
    kubernetes: KubernetesDatastore,
) -> None:
    written = [*policies_of_kubernetes(), secret("bgp", data={"tor": "aGlkZGVu"})]
    for key, value in written:
        kubernetes.create(key, value)
    values = [value for _, value in written]
    results = migrate.import_all(kubernetes, values)
    assert {r.outcome for r in results} == {Outcome.PRESENT}, results
    for value in values[:-1]:
        value["spec"]["podSelector" if "podSelector" in value["spec"] else "subject"] = {
            "matchLabels": {"another": "one"}
        }
    values[-1]["data"] = {"tor": "YW5vdGhlcg=="}
    before = contents(kubernetes)
    for dry_run in (True, False):
        results = migrate.import_all(kubernetes, values, dry_run=dry_run)
        assert {r.outcome for r in results} == {Outcome.CONFLICT}, results
        assert [r.reason for r in results] == [
            *("differs in spec" for _ in values[:-1]),
            "differs in data",
        ]
    assert contents(kubernetes) == before


def test_what_kubernetes_makes_itself_is_told_to_differ(kubernetes: KubernetesDatastore) -> None:
    names = {"name": "moving", "labels": {"moving": "yes"}}
    same = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "moving"}}
    present, other, absent = migrate.import_all(
        kubernetes,
        [same, same | {"metadata": names}, same | {"metadata": {"name": "nowhere"}}],
    )
    assert present.outcome == Outcome.PRESENT
    assert other.outcome == absent.outcome == Outcome.LEFT_OUT
    assert other.reason == "Kubernetes' own stays; it differs in metadata"
    assert absent.reason == "Kubernetes has no such object"


def test_owners_and_finalizers_stay_behind(
    sqlite: SqliteDatastore, kubernetes: KubernetesDatastore
) -> None:
    """Kubernetes would delete what belongs to an object that it does not have."""
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "u-1"}
    theirs = {"ownerReferences": [owner], "finalizers": ["example.org/x"]}
    key, value = v3("NetworkPolicy", "web", {"selector": "all()"}, "moving", **theirs)
    sqlite.create(key, value)
    migrate.lock(sqlite)
    objects = migrate.read(migrate.export(sqlite))
    assert Outcome.CREATED in {r.outcome for r in migrate.import_all(kubernetes, objects)}
    assert not theirs.keys() & kubernetes.get(key).value["metadata"].keys()
    again = migrate.import_all(kubernetes, objects)
    assert {r.outcome for r in again} == {Outcome.PRESENT}, again


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_status_that_an_interrupted_import_did_not_come_to_is_brought(
    kubernetes: KubernetesDatastore, dry_run: bool
) -> None:
    """It is written by itself, after the object, and the program may have ended in between."""
    key, value = with_status(v3("IPPool", "pods", {"cidr": "10.70.0.0/16"}))
    kubernetes.create(key, {name: part for name, part in value.items() if name != "status"})
    (result,) = migrate.import_all(kubernetes, [value], dry_run=dry_run)
    assert result.outcome == Outcome.UPDATED
    assert ("status" in kubernetes.get(key).value) == (not dry_run)
    if not dry_run:
        (result,) = migrate.import_all(kubernetes, [value])
        assert result.outcome == Outcome.PRESENT
        value["status"]["conditions"][0]["status"] = "False"
        (result,) = migrate.import_all(kubernetes, [value])
        assert (result.outcome, result.reason) == (Outcome.CONFLICT, "differs in status")


def test_into_kubernetes_with_its_admission_policies(
    sqlite: SqliteDatastore, kubernetes_with_admission: KubernetesDatastore
) -> None:
    """Which add to what is written: run again, an import finds the same there all the same."""
    check_move(sqlite, kubernetes_with_admission)
    key = Key("GlobalNetworkPolicy", "plain")
    policy = kubernetes_with_admission.get(key).value
    assert policy["metadata"]["labels"] == {TIER_LABEL: "default"}
    _, other = v3("GlobalNetworkPolicy", "plain", {"selector": "all()"}, labels={"a": "b"})
    (result,) = migrate.import_all(kubernetes_with_admission, [other])
    assert (result.outcome, result.reason) == (Outcome.CONFLICT, "differs in metadata")


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
            pool.key: "differs in metadata, spec, status",
            migrate.CLUSTER: "differs in spec.clusterGUID",
        }
    assert etcd_store.get(pool.key) == pool


def test_no_pool_and_no_block_comes_across_others(sqlite: SqliteDatastore, tmp_path: Path) -> None:
    """Blocks of two sizes in one range would have the same addresses given twice."""
    sqlite.create(*v3("IPPool", "ours", {"cidr": "10.70.0.0/16", "blockSize": 28}))
    sqlite.create(*v3("IPPool", "elsewhere", {"cidr": "10.72.0.0/24"}))
    sqlite.create(*v3("IPPool", "default-ipv4-ippool", {"cidr": "10.73.0.0/16"}))
    sqlite.create(*v3("IPPool", "extra", {"cidr": "10.74.0.0/20", "blockSize": 29}))
    allocator = Allocator(sqlite, "n1")
    block = allocator.assign("k8s-pod-network.a", {"pod": "a"}, pools=["ours"]).block
    allocator.assign("k8s-pod-network.b", {"pod": "b"}, pools=["elsewhere"])
    migrate.lock(sqlite)
    objects = migrate.read(migrate.export(sqlite))
    with closing(SqliteDatastore(tmp_path / "target.db")) as target:
        target.create(*v3("IPPool", "theirs", {"cidr": "10.70.0.0/17", "blockSize": 26}))
        target.create(*v3("IPPool", "default-ipv4-ippool", {"cidr": "10.74.0.0/16"}))
        here = Allocator(target, "n2").assign_specific(
            Net(block.version, block.address, 32), "k8s-pod-network.c", {"pod": "c"}
        )
        for dry_run in (True, False, False):
            results = migrate.import_all(target, objects, dry_run=dry_run)
            conflicts = {str(r.key): r.reason for r in results if r.outcome == Outcome.CONFLICT}
            assert conflicts == {
                "IPPool(ours)": "shares addresses with IPPool(theirs), which is there",
                "IPPool(default-ipv4-ippool)": "differs in spec",
                "IPPool(extra)": (
                    "shares addresses with IPPool(default-ipv4-ippool), which is there"
                ),
                f"IPAMBlock({cidr_name(block)})": (
                    f"shares addresses with IPAMBlock({cidr_name(here.block)}), which is there"
                ),
            }
        assert target.get(Key("IPPool", "elsewhere"))
        assert len(target.list("IPAMBlock").entries) == 2


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
