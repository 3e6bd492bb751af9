"""What the tests of the Kubernetes store share: a server, pods on it, and patience."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from datastore.interface import (
    JSON,
    Datastore,
    Key,
    NotFoundError,
    UnavailableError,
    Watch,
)
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from tests.support.crds import install_crds
from tests.support.kube import KubeApiserver
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


def kubeconfig(server: KubeApiserver, path: Path, user: JSON) -> Path:
    document = json.loads(server.kubeconfig.read_text())
    document["users"][0]["user"] = user
    path.write_text(json.dumps(document))
    return path


def patiently(action: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            return action()
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def through(server: KubeApiserver, relay: Relay, path: Path) -> KubernetesDatastore:
    path.write_text(server.kubeconfig.read_text().replace(server.url, f"https://{relay.endpoint}"))
    return KubernetesDatastore(KubernetesSettings(str(path), timeout=5))
