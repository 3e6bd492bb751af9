"""The lease and the collection where the datastore is a real Kubernetes API server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from controllers.housekeeping import Housekeeping
from controllers.lease import Lease
from datastore.interface import Key
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from ipam.audit import Fault, audit
from ipam.reading import read
from tests.controllers.world import Clock, assign, attachment
from tests.ipam.world import add_pool, affinities, allocated, blocks, handles
from tests.support.crds import install_crds
from tests.support.kube import KubeApiserver

NODES = ("gc-node", "gc-other")
GRACE = 900


@pytest.fixture
def server(kube_apiserver: KubeApiserver) -> Iterator[KubeApiserver]:
    install_crds(kube_apiserver)
    ask(kube_apiserver, "POST", "/api/v1/namespaces", {"metadata": {"name": "shop"}})
    for node in NODES:
        ask(kube_apiserver, "POST", "/api/v1/nodes", {"metadata": {"name": node}})
    yield kube_apiserver
    for node in NODES:
        ask(kube_apiserver, "DELETE", f"/api/v1/nodes/{node}")


@pytest.fixture
def store(server: KubeApiserver) -> Iterator[KubernetesDatastore]:
    with closing(KubernetesDatastore(KubernetesSettings(str(server.kubeconfig)))) as store:
        add_pool(store, "gc", "10.77.0.0/24", 28)
        yield store
        for kind in ("IPPool", "IPAMBlock", "BlockAffinity", "IPAMHandle", "Lease"):
            for entry in store.list(kind).entries:
                store.delete(entry.key)


def ask(server: KubeApiserver, method: str, path: str, value: Any = None) -> None:
    code, answer = server.request(method, path, value)
    assert code in (200, 201, 404, 409), answer


def pod(server: KubeApiserver, name: str) -> None:
    container = {"name": "c", "image": "x"}
    spec = {"nodeName": NODES[0], "containers": [container]}
    ask(server, "POST", "/api/v1/namespaces/shop/pods", {"metadata": {"name": name}, "spec": spec})


def test_the_lease(store: KubernetesDatastore) -> None:
    clock = Clock()
    one, other = Lease(store, "one"), Lease(store, "other", clock=clock)
    assert one.attempt()
    assert one.attempt()
    assert not other.attempt()
    clock.now += 15
    assert other.attempt()
    assert not one.attempt()
    other.release()
    assert one.attempt()
    one.release()


def test_collection(server: KubeApiserver, store: KubernetesDatastore) -> None:
    clock = Clock()
    housekeeping = Housekeeping(store, clock=clock)

    def wait(seconds: float) -> list[str]:
        clock.now += seconds
        return [str(address) for address in housekeeping.round().collected.addresses]

    pod(server, "web")
    (address,) = assign(store, NODES[0], "web", "c1")
    (leaked,) = assign(store, NODES[0], "gone", "c2")
    assert wait(0) == []
    assert wait(GRACE) == [str(leaked)]  # the other one's pod may still be told its address
    entry = store.get(attachment("web", "c1").endpoint_key(NODES[0]))
    networks = {"ipNetworks": [str(address)], "containerID": "c1"}
    store.update(entry.key, entry.value | {"spec": entry.value["spec"] | networks})
    assert wait(GRACE) == []
    found = housekeeping.round().findings
    # of our own: the server is shared, and others' pods may have addresses outside all pools
    assert [finding for finding in found if finding.subject.startswith("10.77.")] == []
    assert list(allocated(store)) == [address]

    ask(server, "DELETE", "/api/v1/namespaces/shop/pods/web", {"gracePeriodSeconds": 0})
    assert wait(0) == []
    assert wait(GRACE) == [str(address)]
    assert handles(store) == {}
    assert [claim.node for claim in affinities(store)] == [NODES[0]]

    ask(server, "DELETE", f"/api/v1/nodes/{NODES[0]}")
    wait(0)
    wait(GRACE)
    assert affinities(store) == []
    assert blocks(store) == {}
    assert store.get(Key("Node", NODES[1]))


def test_a_pool_over_the_addresses_of_services(store: KubernetesDatastore) -> None:
    """The API server says where it takes them from, also where it has given none of them."""
    add_pool(store, "over", "10.96.252.0/24", 28)
    found = [str(finding) for finding in audit(read(store)) if finding.fault is Fault.SERVICE_RANGE]
    assert found == [
        "IPPool(over): 10.96.252.0/24 shares addresses with 10.96.0.0/16, ServiceCIDR kubernetes"
    ]
