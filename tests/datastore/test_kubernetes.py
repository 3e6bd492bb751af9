"""The Kubernetes store beyond the contract, on a real API server: views, refusals, outages."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.config import incluster_config

from api.kinds import ADMIN_POLICY, CALICO, KINDS
from api.net import parse_net
from datastore import kubernetes_watch
from datastore.connect import connect
from datastore.follower import Follower, InSync, Update
from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Datastore,
    Entry,
    Key,
    NotFoundError,
    RevisionGoneError,
    SelectingDatastore,
    StoreError,
    UnavailableError,
    Watch,
)
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import ApiServer, KubernetesSettings
from datastore.kubernetes_views import OPTIONAL, collection, sources
from felix import snapshot
from ipam.allocator import Allocator
from ipam.records import Records
from tests.contracts.backends import policy, policy_key
from tests.support.crds import install_crds
from tests.support.kube import ADMIN, NEXT_ADMIN, NOBODY, KubeApiserver, api_server
from tests.support.netns import eventually
from tests.support.relay import Relay

NODE = "k8s-store-node"
NAMESPACE = "k8s-store"


@pytest.fixture(scope="module")
def server(kube_apiserver: KubeApiserver) -> KubeApiserver:
    install_crds(kube_apiserver)
    make(kube_apiserver, "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    make(
        kube_apiserver,
        "/api/v1/nodes",
        {"metadata": {"name": NODE, "labels": {"zone": "a"}}, "spec": {"podCIDR": "10.9.0.0/24"}},
    )
    return kube_apiserver


@pytest.fixture
def store(server: KubeApiserver) -> Iterator[KubernetesDatastore]:
    with closing(client(server)) as store:
        yield store


def client(server: KubeApiserver, timeout: float = 10) -> KubernetesDatastore:
    return KubernetesDatastore(KubernetesSettings(str(server.kubeconfig), timeout=timeout))


def make(server: KubeApiserver, path: str, value: JSON) -> None:
    code, answer = server.request("POST", path, value)
    assert code in (201, 409), answer


def make_pod(server: KubeApiserver, name: str, **spec: Any) -> Key:
    """A pod on our node; returns its endpoint's key."""
    container = {"name": "c", "image": "x", "ports": [{"name": "http", "containerPort": 80}]}
    value = {
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"nodeName": NODE, "containers": [container]} | spec,
    }
    make(server, f"/api/v1/namespaces/{NAMESPACE}/pods", value)
    dashes = name.replace("-", "--")
    return Key("WorkloadEndpoint", f"{NODE.replace('-', '--')}-k8s-{dashes}-eth0", NAMESPACE)


def delete_pod(server: KubeApiserver, name: str) -> None:
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{name}"
    assert server.request("DELETE", path, {"gracePeriodSeconds": 0})[0] == 200


def delete_if_there(store: Datastore, *keys: Key) -> None:
    for key in keys:
        try:
            store.delete(key)
        except NotFoundError:
            continue


def events(watch: Watch, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        more = watch.next(timeout=30)
        assert more, f"no more than {found}"
        found += more
    return found


# --- views ---


def test_an_endpoint_from_pod_to_addresses_and_back(
    server: KubeApiserver, store: KubernetesDatastore
) -> None:
    revision = store.list("WorkloadEndpoint").revision
    with store.watch(["WorkloadEndpoint", "Pod"], revision) as watch:
        key = make_pod(server, "life")
        entry = store.get(key)
        assert entry.value["spec"]["node"] == NODE
        assert entry.value["metadata"]["labels"]["app"] == "life"
        assert "ipNetworks" not in entry.value["spec"]
        with pytest.raises(AlreadyExistsError):
            store.create(key, entry.value)
        entry.value["spec"] |= {"ipNetworks": ["10.9.0.5/32"], "containerID": "abc"}
        written = store.update(key, entry.value, entry.revision)
        assert written.value["spec"]["ipNetworks"] == ["10.9.0.5/32"]
        assert written == store.get(key)
        with pytest.raises(ConflictError):
            store.update(key, entry.value, entry.revision)
        released = store.delete(key, written.revision)
        assert released == written
        after = store.get(key).value["spec"]
        assert "ipNetworks" not in after
        assert after["containerID"] == "abc"
        delete_pod(server, "life")
        seen: list[Any] = []
        while sum(event.entry is None for event in seen) < 2:
            seen += events(watch, 1)
    told = [event for event in seen if event.key.kind == "WorkloadEndpoint"]
    addresses = [e.entry and e.entry.value["spec"].get("ipNetworks") for e in told]
    assert addresses[:2] == [None, ["10.9.0.5/32"]]
    assert not any(addresses[2:])
    assert {e.key for e in told} == {key}
    for verb in (store.get, store.delete):
        with pytest.raises(NotFoundError):
            verb(key)
    with pytest.raises(NotFoundError):
        store.update(key, entry.value)
    with pytest.raises(NotFoundError):
        store.create(key, entry.value)


def test_each_kind_is_told_what_came_after_its_own_listing(
    server: KubeApiserver, store: KubernetesDatastore
) -> None:
    """Also when two kinds are made of the same objects, which come in one stream."""
    pod = Key("Pod", "shared", NAMESPACE)
    positions = {"Pod": store.list("Pod").revision}
    key = make_pod(server, "shared")
    positions["WorkloadEndpoint"] = store.list("WorkloadEndpoint").revision
    with store.watch(positions, positions) as watch:
        relabelled = store.get(pod)
        relabelled.value["metadata"]["labels"] = {"app": "other"}
        store.update(pod, relabelled.value)
        told = events(watch, 3)
        assert not watch.next(timeout=0.1)
    assert [event.key for event in told] == [pod, pod, key]
    delete_pod(server, "shared")


def test_an_agent_needs_no_more_connections_than_kinds_of_objects(
    server: KubeApiserver, tmp_path: Path
) -> None:
    """HTTP/1.1 has one stream a connection. Requests have eight connections at most."""
    relay = Relay(server.url.removeprefix("https://"))
    with closing(through(server, relay, tmp_path / "relayed")) as store:
        positions = {kind: store.list(kind).revision for kind in snapshot.KINDS}
        assert relay.connections == 1
        with store.watch(snapshot.KINDS, positions) as watch:
            assert not watch.next(timeout=0)
            store.get(Key("Namespace", NAMESPACE))
            origins = {source.kind for kind in snapshot.KINDS for source in sources(kind)}
            assert relay.connections <= len(origins) + 8
            # Pods are endpoints, and namespaces and service accounts profiles, in one stream.
            assert len(origins) == len(snapshot.KINDS) - 2
    relay.close()


def test_what_is_no_pods_endpoint(server: KubeApiserver, store: KubernetesDatastore) -> None:
    key = make_pod(server, "host", hostNetwork=True)
    with pytest.raises(NotFoundError):
        store.get(key)
    unscheduled = make_pod(server, "unscheduled", nodeName="")
    assert not {key, unscheduled} & {e.key for e in store.list("WorkloadEndpoint").entries}
    with pytest.raises(NotFoundError):
        store.get(Key("WorkloadEndpoint", f"other-k8s-{'host'}-eth0", NAMESPACE))
    with pytest.raises(NotFoundError):
        store.get(Key("WorkloadEndpoint", "node-cni-x-eth0", NAMESPACE))


def test_a_node_keeps_what_calico_knows_in_annotations(
    server: KubeApiserver, store: KubernetesDatastore
) -> None:
    key = Key("Node", NODE)
    entry = store.get(key)
    assert entry.value["spec"]["orchRefs"] == [{"nodeName": NODE, "orchestrator": "k8s"}]
    assert entry.value["status"]["podCIDRs"] == ["10.9.0.0/24"]
    entry.value["spec"] |= {
        "bgp": {"ipv4Address": "10.1.0.1/24", "asNumber": 64513},
        "ipv4VXLANTunnelAddr": "10.9.0.1",
    }
    entry.value["metadata"]["labels"]["rack"] = "7"
    with store.watch(["Node"], store.list("Node").revision) as watch:
        written = store.update(key, entry.value, entry.revision)
        assert events(watch, 1)[0].entry == written
    assert written.value["spec"]["bgp"] == {"ipv4Address": "10.1.0.1/24", "asNumber": 64513}
    assert written.value["metadata"]["labels"]["rack"] == "7"
    _, raw = server.request("GET", f"/api/v1/nodes/{NODE}")
    annotations = raw["metadata"]["annotations"]
    assert annotations["projectcalico.org/IPv4Address"] == "10.1.0.1/24"
    assert annotations["projectcalico.org/IPv4VXLANTunnelAddr"] == "10.9.0.1"
    assert annotations["projectcalico.org/labels"] == '{"rack":"7"}'
    assert "rack" not in raw["metadata"]["labels"]
    assert "manx/rewritten" in annotations  # not shown by the store
    assert "annotations" not in store.get(Key("KubernetesNode", NODE)).value["metadata"] or (
        "manx/rewritten"
        not in store.get(Key("KubernetesNode", NODE)).value["metadata"]["annotations"]
    )
    del written.value["spec"]["ipv4VXLANTunnelAddr"]
    assert "ipv4VXLANTunnelAddr" not in store.update(key, written.value).value["spec"]
    written.value["metadata"]["labels"]["zone"] = "b"
    with pytest.raises(StoreError, match="zone=b: Kubernetes' Node has 'a'"):
        store.update(key, written.value)
    with pytest.raises(StoreError, match=r"KubernetesNode.*goes when that is deleted"):
        store.delete(key)
    with pytest.raises(NotFoundError):
        store.create(Key("Node", "no-such-node"), {"metadata": {"name": "no-such-node"}})


def test_profiles_are_namespaces_and_service_accounts(
    server: KubeApiserver, store: KubernetesDatastore
) -> None:
    accounts = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
    listing = store.list("Profile")
    with store.watch(["Profile"], listing.revision) as watch:
        account = {"metadata": {"name": "front.end", "labels": {"role": "web"}}}
        make(server, accounts, account)
        (first,) = events(watch, 1)
        make(server, "/api/v1/namespaces", {"metadata": {"name": "k8s-store-2"}})
        events(watch, 1)
        assert server.request("DELETE", f"{accounts}/front.end")[0] == 200
        (last,) = events(watch, 1)
    name = f"ksa.{NAMESPACE}.front.end"
    assert first.key == last.key == Key("Profile", name)
    assert first.entry is not None
    assert first.entry.value["spec"]["labelsToApply"]["pcsa.role"] == "web"
    assert last.entry is None
    with store.watch(["Profile"], first.revision) as watch:
        again = events(watch, 2)
    assert {(e.key.name, e.entry is None) for e in again} == {
        ("kns.k8s-store-2", False),
        (name, True),
    }
    listed = {e.key.name: e for e in store.list("Profile").entries}
    assert {"kns.default", f"kns.{NAMESPACE}"} <= listed.keys()
    assert store.get(Key("Profile", "kns.default")) == listed["kns.default"]
    for action in (store.create, store.update):
        with pytest.raises(StoreError, match="change those"):
            action(Key("Profile", "kns.default"), listed["kns.default"].value)
    for name in ("kns.", "ksa.a", "ksa.", "other"):
        with pytest.raises(NotFoundError):
            store.get(Key("Profile", name))


def test_pods_are_changed_without_losing_what_is_not_read(
    server: KubeApiserver, store: KubernetesDatastore
) -> None:
    make_pod(server, "slim")
    key = Key("Pod", "slim", NAMESPACE)
    entry = store.get(key)
    assert entry.value["spec"]["containers"] == [
        {"name": "c", "ports": [{"name": "http", "containerPort": 80, "protocol": "TCP"}]}
    ]
    entry.value["metadata"]["labels"] = {"app": "other"}
    entry.value["status"] = {"phase": "Running", "podIP": "10.9.0.6"}
    written = store.update(key, entry.value, entry.revision)
    assert written.value["metadata"]["labels"] == {"app": "other"}
    assert written.value["status"]["podIP"] == "10.9.0.6"
    _, raw = server.request("GET", f"/api/v1/namespaces/{NAMESPACE}/pods/slim")
    assert raw["spec"]["containers"][0]["image"] == "x"
    with pytest.raises(ConflictError):
        store.update(key, entry.value, entry.revision)
    same = store.update(key, written.value)
    assert same.revision != written.revision
    assert same.value == written.value


def test_ipam_works_on_custom_resources(store: KubernetesDatastore) -> None:
    pool = Key("IPPool", "k8s-store")
    store.create(
        pool,
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "IPPool",
            "metadata": {"name": pool.name},
            "spec": {"cidr": "10.99.0.0/24"},
        },
    )
    allocator = Allocator(store, NODE)
    taken = [allocator.assign(f"k8s-pod-network.{n}", {"pod": f"p{n}"}) for n in range(3)]
    assert len({one.address for one in taken}) == 3
    assert allocator.addresses("k8s-pod-network.1") == [taken[1].address]
    for number in range(3):
        assert allocator.release(f"k8s-pod-network.{number}") == [taken[number].address]
    store.delete(pool)
    for kind in ("IPAMBlock", "BlockAffinity", "IPAMHandle"):
        delete_if_there(store, *(entry.key for entry in store.list(kind).entries))


def test_what_a_node_claims_is_asked_for_alone(
    server: KubeApiserver, store: KubernetesDatastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every assignment asks: in a large cluster others have thousands."""
    kind = "BlockAffinity"
    names = ["k8s-store-own", "k8s-store-own-too", *(f"k8s-store-{n}" for n in range(60))]
    for number, name in enumerate(names):
        Records(store).create_affinity(name, parse_net(f"10.97.{number}.0/26"), "confirmed")
    asked: list[tuple[str, int]] = []

    def noted(self: ApiServer, method: str, path: str, **options: Any) -> Any:
        answer = request(self, method, path, **options)
        asked.append((f"{path}?{options['query']['fieldSelector']}", len(answer.body)))
        return answer

    request = ApiServer.request
    with monkeypatch.context() as patched:
        patched.setattr(ApiServer, "request", noted)
        found = store.list_by_field(kind, "spec.node", names[0])
    assert [entry.value["spec"]["cidr"] for entry in found.entries] == ["10.97.0.0/26"]
    path = "/apis/projectcalico.org/v3/blockaffinities?spec.node=k8s-store-own"
    assert [what for what, _ in asked] == [path]
    assert asked[0][1] < 2000
    assert isinstance(store, SelectingDatastore)
    assert [own.thing.net for own in Records(store).affinities(names[0])] == [
        parse_net("10.97.0.0/26")
    ]
    # a CRD without that field, as Calico's own: the same answer, at more cost
    one = store.list_by_field(kind, "spec.cidr", "10.97.1.0/26")
    assert [entry.value["spec"]["node"] for entry in one.entries] == [names[1]]
    assert one == store.list_by_field(kind, "spec.cidr", "10.97.1.0/26")
    delete_if_there(store, *(entry.key for entry in store.list(kind).entries))


# --- refusals ---


def test_what_the_server_refuses_is_told_by_field(store: KubernetesDatastore) -> None:
    peer: JSON = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "BGPPeer",
        "metadata": {"name": "k8s-store"},
        "spec": {"peerIP": "192.0.2.1", "asNumber": "many"},
    }
    with pytest.raises(StoreError) as caught:
        store.create(Key("BGPPeer", "k8s-store"), peer)
    assert caught.value.key == Key("BGPPeer", "k8s-store")
    assert "BGPPeer(k8s-store): spec.asNumber: " in str(caught.value)
    assert "an AS number from 0 to 4294967295" in str(caught.value)
    peer["spec"] = {"peerIP": "192.0.2.1", "asNumber": 64512, "peerPort": 1}
    with pytest.raises(StoreError, match=r'unknown field "spec\.peerPort"'):
        store.create(Key("BGPPeer", "k8s-store"), peer)
    assert type(caught.value) is StoreError


def test_a_namespace_that_is_not_there(store: KubernetesDatastore) -> None:
    key = Key("NetworkPolicy", "a", "nowhere")
    value: JSON = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "NetworkPolicy",
        "metadata": {"name": "a", "namespace": "nowhere"},
        "spec": {"selector": "all()"},
    }
    with pytest.raises(StoreError, match=r"metadata\.namespace: 'nowhere': .* create it first"):
        store.create(key, value)
    with pytest.raises(NotFoundError):
        store.get(key)


@contextmanager
def without(server: KubeApiserver, kind: str) -> Iterator[None]:
    """A server that doesn't have the CRD of the kind."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    (name,) = (
        crd["metadata"]["name"]
        for crd in server.request("GET", path)[1]["items"]
        if crd["spec"]["names"]["kind"] == kind
    )
    assert server.request("DELETE", f"{path}/{name}")[0] == 200
    try:
        eventually(lambda: server.request("GET", f"{path}/{name}")[0] == 404, seconds=30)
        yield
    finally:
        install_crds(server)


def test_a_kind_that_is_not_installed(store: KubernetesDatastore, server: KubeApiserver) -> None:
    kind = "CalicoNodeStatus"
    with without(server, kind):
        eventually(lambda: missing(store, kind), seconds=30)
        with pytest.raises(UnavailableError, match="kubectl apply -f manifests/crds"):
            store.get(Key(kind, "a"))
        with pytest.raises(UnavailableError, match="install the CRDs"):
            store.watch([kind], "1").next(timeout=30)


def test_an_optional_kind_that_is_installed_later(
    store: KubernetesDatastore, server: KubeApiserver
) -> None:
    kind = "BaselineAdminNetworkPolicy"
    assert kind in OPTIONAL
    heard: queue.SimpleQueue[Update | InSync] = queue.SimpleQueue()
    key = Key(kind, "default")
    subject: JSON = {"namespaces": {"matchLabels": {"k8s-store": "optional"}}}
    value = {"apiVersion": ADMIN_POLICY, "kind": kind, "metadata": {"name": key.name}}
    with without(server, kind):
        eventually(lambda: is_unserved(server, kind), seconds=30)
        assert store.list(kind).entries == []
        with pytest.raises(UnavailableError, match="kubectl apply -f manifests/crds"):
            store.create(key, value | {"spec": {"subject": subject}})
        follower = Follower(store, [kind, "Tier"], heard.put)
        follower.start()
        while heard.get(timeout=30) != InSync():
            pass
    try:
        store.create(key, value | {"spec": {"subject": subject}})
        found = heard.get(timeout=60)
        assert isinstance(found, Update)
        assert (found.key, found.value is not None) == (key, True)
        store.delete(key)
        assert heard.get(timeout=60) == Update(key, None)
        assert follower.problem is None
    finally:
        follower.stop()


def is_unserved(server: KubeApiserver, kind: str) -> bool:
    return server.request("GET", collection(kind))[0] == 404


def missing(store: KubernetesDatastore, kind: str) -> bool:
    try:
        store.list(kind)
    except UnavailableError as error:
        return "install the CRDs" in str(error)
    return False


def kubeconfig(server: KubeApiserver, path: Path, user: JSON) -> Path:
    document = json.loads(server.kubeconfig.read_text())
    document["users"][0]["user"] = user
    path.write_text(json.dumps(document))
    return path


def test_who_may_not(server: KubeApiserver, tmp_path: Path) -> None:
    nobody = kubeconfig(server, tmp_path / "nobody", {"token": NOBODY})
    stranger = kubeconfig(server, tmp_path / "stranger", {"token": "unknown"})
    with closing(connect(f"kubernetes://?kubeconfig={nobody}")) as store:
        with pytest.raises(UnavailableError, match=r"cannot list resource .* ClusterRole"):
            store.list("IPPool")
        with pytest.raises(UnavailableError), store.watch(["IPPool"], "1") as watch:
            watch.next(timeout=30)
    with closing(connect(f"kubernetes://?kubeconfig={stranger}")) as store:
        with pytest.raises(UnavailableError, match="does not know us"):
            store.get(policy_key("a"))
        with pytest.raises(UnavailableError), store.watch(["IPPool"], "1") as watch:
            watch.next(timeout=30)


PLUGIN = """#!/bin/sh
echo run >>"{folder}/runs"
[ -z "$KUBERNETES_EXEC_INFO" ] && exit 2
read -r token expiry <"{folder}/credentials" || exit 3
printf '{{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1",'
printf '"status":{{"token":"%s","expirationTimestamp":"%s"}}}}' "$token" "$expiry"
"""


def test_a_plugin_tells_who_we_are(
    server: KubeApiserver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a kubeconfig from a cloud: asked again when its token expires or is refused."""
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    soon = (datetime.now(UTC) + timedelta(seconds=5)).isoformat()
    credentials, runs = tmp_path / "credentials", tmp_path / "runs"
    script = tmp_path / "plugin"
    script.write_text(PLUGIN.format(folder=tmp_path))
    script.chmod(0o755)
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin"}
    config = kubeconfig(server, tmp_path / "config", {"exec": plugin})

    def asked() -> int:
        return len(runs.read_text().splitlines())

    with closing(connect(f"kubernetes://?kubeconfig={config}")) as store:
        with pytest.raises(UnavailableError, match=r"no credentials .*exec plugin"):
            store.list("Namespace")
        assert "process returned 3" in caplog.text
        credentials.write_text(f"expired {later}\n")
        with pytest.raises(UnavailableError, match="does not know us"):
            store.list("Namespace")
        credentials.write_text(f"{ADMIN} {later}\n")
        assert store.list("Namespace").entries
        before = asked()
        with store.watch(["Namespace"], store.list("Namespace").revision) as watch:
            assert not watch.next(timeout=0)
        assert asked() == before
    with closing(connect(f"kubernetes://?kubeconfig={config}")) as store:
        credentials.write_text(f"{ADMIN} {soon}\n")
        assert store.list("Namespace").entries
        before = asked()
        credentials.write_text(f"{NEXT_ADMIN} {later}\n")
        assert store.list("Namespace").entries
        assert asked() == before + 1


def test_the_rights_in_the_manual_are_enough(server: KubeApiserver, tmp_path: Path) -> None:
    """For a service account with these and no others: what the programs read and write."""
    text = (Path(__file__).parents[2] / "docs" / "datastore.md").read_text()
    (role,) = (
        role
        for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        if (role := yaml.safe_load(block))["kind"] == "ClusterRole"
    )
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    make(server, f"{rbac}/clusterroles", role)
    account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
    make(server, account, {"metadata": {"name": "manx"}})
    subject = {"kind": "ServiceAccount", "name": "manx", "namespace": NAMESPACE}
    reference = {"kind": "ClusterRole", "name": "manx", "apiGroup": "rbac.authorization.k8s.io"}
    binding = {"metadata": {"name": "manx"}, "subjects": [subject], "roleRef": reference}
    make(server, f"{rbac}/clusterrolebindings", binding)
    code, answer = server.request("POST", f"{account}/manx/token", {"spec": {}})
    assert code == 201, answer
    config = kubeconfig(server, tmp_path / "account", {"token": answer["status"]["token"]})
    key, pool = make_pod(server, "rights"), Key("IPPool", "k8s-store-rights")
    kinds = {*snapshot.KINDS, "Service", "EndpointSlice", "ServiceAccount", "Profile"}
    kinds |= {kind.id for kind in KINDS.values() if kind.api_version == CALICO}
    with closing(connect(f"kubernetes://?kubeconfig={config}")) as store:
        patiently(lambda: store.list("Lease"))  # until the server has seen the binding
        positions = {kind: store.list(kind).revision for kind in kinds}
        with store.watch(kinds, positions) as watch:
            endpoint = store.get(key)
            endpoint.value["spec"] |= {"ipNetworks": ["10.9.0.77/32"]}
            store.update(key, endpoint.value, endpoint.revision)
            assert key in {event.key for event in events(watch, 2)}
        node = store.get(Key("Node", NODE))
        node.value["spec"]["bgp"] = {"ipv4Address": "10.1.0.1/24"}
        store.update(node.key, node.value, node.revision)
        value = {"apiVersion": CALICO, "kind": "IPPool", "metadata": {"name": pool.name}}
        store.create(pool, value | {"spec": {"cidr": "10.94.0.0/24"}})
        allocator = Allocator(store, NODE)
        allocator.assign("rights", {"pod": "rights"})
        assert allocator.release("rights")
        store.delete(pool)
        lease = Key("Lease", "manx-test", NAMESPACE)
        value = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        made = store.create(lease, value | {"metadata": {"name": lease.name}, "spec": {}})
        store.update(lease, made.value, made.revision)
        with pytest.raises(UnavailableError, match="ClusterRole"):
            store.delete(Key("Pod", "rights", NAMESPACE))
        for kind in ("IPAMBlock", "BlockAffinity", "IPAMHandle"):
            delete_if_there(store, *(entry.key for entry in store.list(kind).entries))
    delete_pod(server, "rights")


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("{}")
    for path in (tmp_path / "absent", empty):
        store = connect("kubernetes://", {"KUBECONFIG": str(path)})
        with closing(store), pytest.raises(UnavailableError, match=f"{path}: .*set KUBECONFIG"):
            store.get(policy_key("a"))


class Impatient(incluster_config.InClusterConfigLoader):
    """Reads the token file again each time, instead of once a minute."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self._token_refresh_period = timedelta(0)


@pytest.fixture
def token(server: KubeApiserver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The token file of a pod that these tests are in."""
    token = tmp_path / "token"
    host, _, port = server.url.removeprefix("https://").rpartition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(server.ca))
    return token


def test_in_a_pod_the_service_account_is_used(token: Path) -> None:
    """And its token file is read again when the server does not know the old one any more."""
    token.write_text("expired")
    with closing(connect("kubernetes://", {})) as store:
        with pytest.raises(UnavailableError, match="does not know us"):
            store.list("Namespace")
        token.write_text(ADMIN)
        assert store.list("Namespace").entries


def test_a_token_file_that_goes_is_an_outage(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incluster_config, "InClusterConfigLoader", Impatient)
    token.write_text(ADMIN)
    with closing(connect("kubernetes://", {})) as store:
        revision = store.list("Namespace").revision
        token.unlink()
        with pytest.raises(UnavailableError, match=r"credentials can't be read: .*token"):
            store.list("Namespace")
        with pytest.raises(UnavailableError, match="credentials can't be read"):
            store.watch(["Namespace"], revision)
        token.write_text(ADMIN)
        assert store.list("Namespace").entries


# --- size ---


def test_a_list_of_thousands_comes_in_parts(
    server: KubeApiserver, store: KubernetesDatastore
) -> None:
    path = "/api/v1/namespaces/default/serviceaccounts"
    names = [f"part-{number:04}" for number in range(1200)]

    def make_all(part: list[str]) -> None:
        for name in part:
            make(server, path, {"metadata": {"name": name}})

    threads = [threading.Thread(target=make_all, args=(names[first::4],)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = store.list("ServiceAccount", "default", prefix="part-")
    assert [entry.key.name for entry in found.entries] == names


# --- outages ---


def number(entry: Entry | None) -> int | None:
    return None if entry is None else entry.value["spec"]["order"]


def through(server: KubeApiserver, relay: Relay, path: Path) -> KubernetesDatastore:
    path.write_text(server.kubeconfig.read_text().replace(server.url, f"https://{relay.endpoint}"))
    return KubernetesDatastore(KubernetesSettings(str(path), timeout=1))


def test_a_watch_cut_in_a_burst_goes_on_where_it_was(
    server: KubeApiserver, store: KubernetesDatastore, tmp_path: Path
) -> None:
    name = "k8s-store-burst"
    delete_if_there(store, policy_key(name))
    relay = Relay(server.url.removeprefix("https://"))
    with closing(through(server, relay, tmp_path / "relayed")) as distant:
        revision = store.create(policy_key(name), policy(name, 0)).revision
        with distant.watch(["GlobalNetworkPolicy", "BGPPeer"], revision) as watch:
            writing = threading.Thread(
                target=lambda: [
                    store.update(policy_key(name), policy(name, n)) for n in range(1, 301)
                ]
            )
            writing.start()
            told: list[int | None] = []
            while 300 not in told:
                before = len(told)
                told += [number(event.entry) for event in watch.next(timeout=30)]
                if before // 50 != len(told) // 50:
                    relay.sever()
            writing.join(30)
            assert not watch.next(timeout=0)
        assert told == list(range(1, 301))
    relay.close()


class Listing(KubernetesDatastore):
    """Notes which kinds are listed."""

    def __init__(self, server: KubeApiserver, relay: Relay, path: Path) -> None:
        super().__init__(through(server, relay, path).settings)
        self.listed: list[str] = []

    def list(self, kind: str, *args: Any, **options: Any) -> Any:
        self.listed.append(kind)
        return super().list(kind, *args, **options)


def test_nobody_waits_for_connections_that_were_replaced(
    server: KubeApiserver, tmp_path: Path
) -> None:
    """More ask at a time than there are connections, and these are cut again and again."""
    relay = Relay(server.url.removeprefix("https://"))
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    through(server, relay, tmp_path / "relayed").close()
    settings = KubernetesSettings(str(tmp_path / "relayed"), timeout=20)
    with closing(KubernetesDatastore(settings)) as distant:

        def ask() -> None:
            for _ in range(5):
                distant.get(Key("Namespace", "default"))
                done.put(1)

        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for count in range(120):
            done.get(timeout=60)
            if count % 20 == 10:
                relay.sever()
        for thread in threads:
            thread.join(30)
    relay.close()


@pytest.mark.parametrize(
    "seconds", [0, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(200)])]
)
def test_an_outage_is_caught_up_with_exactly(
    server: KubeApiserver,
    store: KubernetesDatastore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
) -> None:
    """And without listing anything again, which would cost every node's whole state."""
    if not seconds:
        monkeypatch.setattr(kubernetes_watch, "_OUTAGE_SECONDS", 0.1)
    keys = [policy_key(f"k8s-store-{name}") for name in ("deleted", "changed", "same", "new")]
    deleted, changed, same, new = keys
    delete_if_there(store, *keys)
    for key in keys[:3]:
        store.create(key, policy(key.name, 1))
    relay = Relay(server.url.removeprefix("https://"))
    with closing(Listing(server, relay, tmp_path / "relayed")) as distant:
        heard: queue.SimpleQueue[Update | InSync] = queue.SimpleQueue()
        follower = Follower(distant, ["GlobalNetworkPolicy", "Namespace"], heard.put)
        follower.start()
        while heard.get(timeout=30) != InSync():
            pass
        with relay.cut():
            store.delete(deleted)
            store.update(changed, policy(changed.name, 2))
            began = time.monotonic()
            eventually(lambda: "no answer" in (follower.problem or ""), 30)
            eventually(lambda: time.monotonic() >= began + seconds, seconds + 1)
            assert not follower.in_sync
            assert heard.empty()
            store.create(new, policy(new.name, 3))
        told = [heard.get(timeout=60) for _ in range(3)]
        assert {brief(update) for update in told} == {(deleted, None), (changed, 2), (new, 3)}
        store.update(same, policy(same.name, 4))
        assert brief(heard.get(timeout=30)) == (same, 4)
        assert heard.empty()
        eventually(lambda: follower.in_sync)
        assert distant.listed == ["GlobalNetworkPolicy", "Namespace"]
        follower.stop()
    relay.close()


def brief(update: Update | InSync) -> tuple[Key, int | None]:
    assert isinstance(update, Update)
    return update.key, None if update.value is None else update.value["spec"]["order"]


def test_a_revision_of_the_future_is_not_waited_for(
    server: KubeApiserver, store: KubernetesDatastore
) -> None:
    """As after the cluster's data were restored from a backup."""
    reached = store.list("Namespace").revision
    make(server, "/api/v1/namespaces", {"metadata": {"name": "k8s-store-since"}})
    positions = {"Namespace": reached, "GlobalNetworkPolicy": "9999999999"}
    with (
        pytest.raises(RevisionGoneError, match="restored from a backup") as caught,
        store.watch(positions, positions) as watch,
    ):
        watch.next(timeout=30)
    # what the other stream had brought by then was told to nobody
    assert caught.value.resume == {"Namespace": reached}
    for revision in ("", "x", "1,2,3"):
        with pytest.raises(RevisionGoneError):
            store.watch(["GlobalNetworkPolicy"], revision)


def test_a_server_that_is_down_restarts_and_rotates_its_tokens(tmp_path: Path) -> None:
    """One server of its own, because every step takes one away."""
    heard: queue.SimpleQueue[Update | InSync] = queue.SimpleQueue()
    token = tmp_path / "token"
    token.write_text(ADMIN)
    with api_server() as server:
        install_crds(server)
        config = kubeconfig(server, tmp_path / "config", {"tokenFile": str(token)})
        server.kill()
        store = KubernetesDatastore(KubernetesSettings(str(config), timeout=1))
        # down at the start
        complaint = f"{server.url}: no answer .*refused"
        with pytest.raises(UnavailableError, match=complaint):
            store.get(policy_key("a"))
        with pytest.raises(UnavailableError, match=complaint):
            store.create(policy_key("a"), policy("a"))
        follower = Follower(store, ["GlobalNetworkPolicy", "Namespace"], heard.put)
        follower.start()
        eventually(lambda: "no answer" in (follower.problem or ""))
        assert heard.empty()
        server.start()
        while heard.get(timeout=60) != InSync():
            pass
        # a restart mid-way: the memory of events is gone with the old process
        store.create(policy_key("a"), policy("a", 1))
        assert brief(heard.get(timeout=30)) == (policy_key("a"), 1)
        server.kill()
        without = server.directory / "tokens.csv"
        tokens = without.read_text().splitlines()
        without.write_text("\n".join(line for line in tokens if not line.startswith(ADMIN)))
        server.token = NEXT_ADMIN
        server.start()
        # the old token is no longer good: the file is read again
        token.write_text(NEXT_ADMIN)
        patiently(lambda: store.update(policy_key("a"), policy("a", 2)))
        assert brief(heard.get(timeout=60)) == (policy_key("a"), 2)
        store.update(policy_key("a"), policy("a", 3))
        assert brief(heard.get(timeout=60)) == (policy_key("a"), 3)
        assert heard.empty()
        follower.stop()
        store.close()


def patiently(action: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            return action()
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_server_that_hangs_is_an_outage_with_an_end(tmp_path: Path) -> None:
    with api_server() as server, closing(client(server, timeout=1)) as store:
        assert store.list("Namespace").entries
        server.daemon.pause()
        with pytest.raises(UnavailableError, match="no answer"):
            store.list("Namespace")
        with pytest.raises(UnavailableError, match="not known: read again"):
            store.create(Key("Namespace", "late"), {"metadata": {"name": "late"}})
        server.daemon.resume()
        assert patiently(lambda: store.list("Namespace")).entries
