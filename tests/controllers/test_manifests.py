"""manifests/controllers in a real API server, and the program with the rights of those alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.net import parse_net
from controllers.lease import LEASE
from datastore.connect import connect
from datastore.interface import Datastore, Key, NotFoundError, StoreError
from ipam.records import PENDING, Records
from tests.controllers.test_agent import Controllers
from tests.controllers.world import assign, put
from tests.ipam.world import add_pool, affinities, allocated, blocks, handles
from tests.support.crds import install_crds
from tests.support.kube import KubeApiserver

DIRECTORY = Path(__file__).parents[2] / "manifests" / "controllers"
NODE = "rights-node"
PATHS = {
    "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/rolebindings",
    "Deployment": "/apis/apps/v1/namespaces/kube-system/deployments",
}
KINDS = ("IPPool", "IPAMBlock", "BlockAffinity", "IPAMHandle", "KubeControllersConfiguration")


@pytest.fixture
def server(kube_apiserver: KubeApiserver) -> Iterator[KubeApiserver]:
    """With the manifests applied as ``kubectl apply -f`` does, unknown fields refused."""
    install_crds(kube_apiserver)
    ask(kube_apiserver, "POST", "/api/v1/namespaces", {"metadata": {"name": "kube-system"}})
    made = []
    for file in ("rbac.yaml", "deployment.yaml"):
        for document in yaml.safe_load_all((DIRECTORY / file).read_text()):
            path = PATHS[document["kind"]]
            ask(kube_apiserver, "POST", f"{path}?fieldValidation=Strict", document)
            made.append(f"{path}/{document['metadata']['name']}")
    ask(kube_apiserver, "POST", "/api/v1/nodes", {"metadata": {"name": NODE}})
    yield kube_apiserver
    for path in (*made, f"/api/v1/nodes/{NODE}"):
        ask(kube_apiserver, "DELETE", path)


@pytest.fixture
def admin(server: KubeApiserver) -> Iterator[Datastore]:
    with closing(connect(f"kubernetes://?kubeconfig={server.kubeconfig}")) as store:
        yield store
        for kind in KINDS:
            for entry in store.list(kind).entries:
                store.delete(entry.key)
        for key in (LEASE, Key("HostEndpoint", f"{NODE}-auto-hep")):
            try:
                store.delete(key)
            except NotFoundError:
                continue


@pytest.fixture
def account(server: KubeApiserver, tmp_path: Path) -> str:
    """The URL of the store, as the service account has it."""
    path = f"{PATHS['ServiceAccount']}/manx-controllers/token"
    token = ask(server, "POST", path, {"spec": {}})["status"]["token"]
    config = json.loads(server.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    return f"kubernetes://?kubeconfig={tmp_path}/kubeconfig"


def ask(server: KubeApiserver, method: str, path: str, value: Any = None) -> Any:
    code, answer = server.request(method, path, value)
    assert code in (200, 201, 409), answer
    return answer


def test_its_rights_are_enough(admin: Datastore, account: str, tmp_path: Path) -> None:
    """It takes the lease, gives back what leaked, mends what is half-made, makes host endpoints."""
    add_pool(admin, "rights", "10.78.0.0/24", 28)
    node = {
        "reconcilerPeriod": "1s",
        "leakGracePeriod": "1s",
        "hostEndpoint": {"autoCreate": "Enabled"},
    }
    put(admin, "KubeControllersConfiguration", "default", {"controllers": {"node": node}})
    assign(admin, NODE, "gone", "c1")
    assign(admin, "rights-gone", "lost", "c2")  # of a node that is gone
    records = Records(admin)
    records.create_affinity(NODE, parse_net("10.78.0.240/28"), PENDING)
    put(admin, "IPAMHandle", "orphan", {"handleID": "orphan", "block": {}, "deleted": False})
    put(admin, "IPAMHandle", "half", {"handleID": "half", "block": {}, "deleted": True})
    controllers = Controllers(tmp_path, account)
    try:
        controllers.start("m1")
        status = controllers.until(
            "m1",
            lambda status: (
                bool(status["leading"])
                and not allocated(admin)
                and not handles(admin)
                and {claim.node for claim in affinities(admin)} == {NODE}
                and len(blocks(admin)) == 1
            ),
        )
        assert status["errors"] == []
        assert status["last_round"]["problems"] == []
        assert admin.get(Key("HostEndpoint", f"{NODE}-auto-hep"))
        log = (tmp_path / "m1.log").read_text()
        assert "forbidden" not in log
        assert "WARNING" not in log
    finally:
        controllers.stop()
    assert admin.get(LEASE).value["spec"].get("holderIdentity", "") == ""


def test_its_rights_are_not_more(admin: Datastore, account: str) -> None:
    add_pool(admin, "rights", "10.78.0.0/24", 28)
    with closing(connect(account)) as store:
        for refused in (
            lambda: store.list("Secret"),
            lambda: store.delete(Key("IPPool", "rights")),
            lambda: store.list("Lease"),
            lambda: put(store, "GlobalNetworkPolicy", "x", {}),
        ):
            with pytest.raises(StoreError, match="cannot"):
                refused()
