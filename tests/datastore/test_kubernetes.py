"""The Kubernetes store beyond the contract, on a real API server: views, and many objects."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from api.net import parse_net
from datastore.interface import (
    AlreadyExistsError,
    ConflictError,
    Key,
    NotFoundError,
    SelectingDatastore,
    StoreError,
)
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import ApiServer, KubernetesSettings
from datastore.kubernetes_views import sources
from felix import snapshot
from ipam.allocator import Allocator
from ipam.records import Records
from tests.datastore.kubernetes_world import (
    NAMESPACE,
    NODE,
    delete_if_there,
    delete_pod,
    events,
    make,
    make_pod,
    through,
)
from tests.support.front import Front
from tests.support.kube import KubeApiserver
from tests.support.relay import Relay


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


def test_a_list_of_thousands_comes_in_parts(server: KubeApiserver, tmp_path: Path) -> None:
    """Of 500, each asked for where the one before ended."""
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
    front = Front(server)
    settings = KubernetesSettings(str(front.kubeconfig(tmp_path / "fronted")))
    with closing(KubernetesDatastore(settings)) as store:
        found = store.list("ServiceAccount", "default", prefix="part-")
    front.close()
    assert [entry.key.name for entry in found.entries] == names
    assert [asked.query["limit"] for asked in front.asked] == ["500"] * 3
    assert [bool(asked.query.get("continue")) for asked in front.asked] == [False, True, True]
