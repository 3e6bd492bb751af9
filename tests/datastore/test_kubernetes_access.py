"""What the API server refuses to the store, to whom, and kinds that are not installed."""

from __future__ import annotations

import queue
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.config import incluster_config

from api.kinds import ADMIN_POLICY, CALICO, KINDS
from datastore.connect import connect
from datastore.follower import Follower, InSync, Update
from datastore.interface import (
    JSON,
    Key,
    NotFoundError,
    StoreError,
    UnavailableError,
)
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_views import OPTIONAL, collection
from felix import snapshot
from ipam.allocator import Allocator
from tests.contracts.backends import policy_key
from tests.datastore.kubernetes_world import (
    NAMESPACE,
    NODE,
    delete_if_there,
    delete_pod,
    events,
    kubeconfig,
    make,
    make_pod,
    patiently,
)
from tests.support.crds import install_crds
from tests.support.kube import ADMIN, NEXT_ADMIN, NOBODY, KubeApiserver
from tests.support.netns import eventually


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
    documents = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    roles = {document["kind"]: document for document in documents}
    role, secrets = roles["ClusterRole"], roles["Role"]
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    make(server, f"{rbac}/clusterroles", role)
    account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
    make(server, account, {"metadata": {"name": "manx"}})
    subject = {"kind": "ServiceAccount", "name": "manx", "namespace": NAMESPACE}
    reference = {"kind": "ClusterRole", "name": "manx", "apiGroup": "rbac.authorization.k8s.io"}
    binding = {"metadata": {"name": "manx"}, "subjects": [subject], "roleRef": reference}
    make(server, f"{rbac}/clusterrolebindings", binding)
    secrets["metadata"]["namespace"] = NAMESPACE
    make(server, f"{rbac}/namespaces/{NAMESPACE}/roles", secrets)
    reference |= {"kind": "Role", "name": secrets["metadata"]["name"]}
    make(server, f"{rbac}/namespaces/{NAMESPACE}/rolebindings", binding | {"roleRef": reference})
    (name,) = secrets["rules"][0]["resourceNames"]
    for made in (name, "other"):
        secret = {"metadata": {"name": made}, "data": {"tor": "aGlkZGVu"}}
        make(server, f"/api/v1/namespaces/{NAMESPACE}/secrets", secret)
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
        assert store.get(Key("Secret", name, NAMESPACE)).value["data"] == {"tor": "aGlkZGVu"}
        with pytest.raises(UnavailableError):
            store.get(Key("Secret", "other", NAMESPACE))
        with pytest.raises(UnavailableError):
            store.list("Secret")
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
