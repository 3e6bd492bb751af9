"""What Calico's own client library writes into etcd, we read, and the other way round."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from api.kinds import CALICO
from api.net import parse_net
from api.registry import dump, parse
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import EtcdSettings
from datastore.interface import JSON, Key
from ipam.allocator import Allocator
from tests.support.calico import BUILD_S, CalicoClient, calico_client
from tests.support.etcd import Etcd

pytestmark = pytest.mark.timeout(BUILD_S)

NODE = "node-1"
ENDPOINT = "node--1-k8s-web-eth0"


@pytest.fixture(scope="module")
def client(etcd: Etcd) -> Iterator[CalicoClient]:
    with calico_client(etcd.urls[0]) as client:
        yield client


@pytest.fixture
def store(etcd: Etcd) -> Iterator[EtcdDatastore]:
    everything = {"key": _base64(b"/calico/"), "range_end": _base64(b"/calico0")}
    etcd.members[0].call("/v3/kv/deleterange", everything)
    with closing(EtcdDatastore(EtcdSettings(tuple(etcd.endpoints)))) as store:
        yield store


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def v3(kind: str, name: str, spec: JSON, namespace: str = "", **metadata: Any) -> tuple[Key, JSON]:
    names = {"name": name} | ({"namespace": namespace} if namespace else {}) | metadata
    return Key(kind, name, namespace), {
        "apiVersion": CALICO,
        "kind": kind,
        "metadata": names,
        "spec": spec,
    }


RULE: JSON = {
    "action": "Allow",
    "protocol": "TCP",
    "source": {"selector": "role == 'web'", "notNets": ["10.9.0.0/16"]},
    "destination": {"ports": [80, "8000:8080", "http"]},
}
OBJECTS = [
    v3("IPPool", "pods", {"cidr": "10.70.0.0/16", "blockSize": 28, "vxlanMode": "CrossSubnet"}),
    v3("IPPool", "pods-6", {"cidr": "fd00:70::/48", "natOutgoing": True}),
    v3("IPReservation", "kept", {"reservedCIDRs": ["10.70.0.0/30"]}),
    v3("GlobalNetworkSet", "outside", {"nets": ["192.0.2.0/24"]}, labels={"role": "outside"}),
    v3("NetworkSet", "outside", {"nets": ["198.51.100.0/24"]}, "apps"),
    v3("GlobalNetworkPolicy", "default.web", {"selector": "all()", "ingress": [RULE], "order": 7}),
    v3("NetworkPolicy", "default.web", {"selector": "all()", "egress": [RULE]}, "apps"),
    v3("BGPConfiguration", "default", {"asNumber": "1.10", "nodeToNodeMeshEnabled": False}),
    v3("BGPPeer", "tor", {"peerIP": "192.0.2.1", "asNumber": 64512, "nodeSelector": "all()"}),
    v3(
        "BGPFilter",
        "ours",
        {"exportV4": [{"action": "Accept", "cidr": "10.70.0.0/16", "matchOperator": "In"}]},
    ),
    v3("FelixConfiguration", "default", {"logSeverityScreen": "Warning", "wireguardEnabled": True}),
    v3("HostEndpoint", "eth0", {"node": NODE, "interfaceName": "eth0", "profiles": ["kns.apps"]}),
    v3("Profile", "kns.apps", {"labelsToApply": {"pcns.team": "a"}, "egress": [RULE]}),
    v3("Node", NODE, {"bgp": {"ipv4Address": "10.1.0.1/24"}}, labels={"rack": "7"}),
    v3(
        "WorkloadEndpoint",
        ENDPOINT,
        {
            "orchestrator": "k8s",
            "node": NODE,
            "pod": "web",
            "endpoint": "eth0",
            "containerID": "abc",
            "ipNetworks": ["10.70.0.5/32"],
            "profiles": ["kns.apps"],
            "interfaceName": "cali0123456789a",
            "ports": [{"name": "http", "protocol": "TCP", "port": 80}],
        },
        "apps",
    ),
    v3("ClusterInformation", "default", {"clusterGUID": "f" * 32, "datastoreReady": True}),
]


# That version of the client, with which Calico has no tiers yet, puts it before policies' names.
PREFIX = "default."


def meaning(kind: str, value: JSON) -> JSON:
    """The spec, defaults filled in; the client leaves out of lists what they are of."""
    spec: JSON = dump(parse(value | {"apiVersion": CALICO, "kind": kind}))["spec"]
    return spec


def theirs(value: JSON) -> JSON:
    """An object as one gives it to the client."""
    metadata = value["metadata"] | {"name": value["metadata"]["name"].removeprefix(PREFIX)}
    return value | {"metadata": metadata}


def listed(client: CalicoClient, key: Key) -> JSON:
    """The object as the client tells it."""
    found: list[JSON] = client.ask("list", kind=key.kind)["items"]
    names = (key.name.removeprefix(PREFIX), key.namespace)
    of_name = [
        item
        for item in found
        if (item["metadata"]["name"], item["metadata"].get("namespace") or "") == names
    ]
    assert len(of_name) == 1, found
    return of_name[0]


@pytest.mark.parametrize(("key", "value"), OBJECTS, ids=lambda part: str(part)[:30])
def test_what_calico_writes_we_read(
    client: CalicoClient, store: EtcdDatastore, key: Key, value: JSON
) -> None:
    with store.watch([key.kind], store.list(key.kind).revision) as watch:
        client.ask("create", kind=key.kind, object=theirs(value))
        (event,) = watch.next(timeout=30)
    (entry,) = store.list(key.kind).entries
    assert entry.key == key
    assert entry == store.get(key) == event.entry
    # the client writes defaults of its own, too
    assert meaning(key.kind, entry.value).items() >= meaning(key.kind, value).items()
    given: JSON = value["metadata"].get("labels") or {}
    assert (entry.value["metadata"].get("labels") or {}).items() >= given.items()
    # what we write again as it was, it reads as before
    before = listed(client, key)
    store.update(key, entry.value, entry.revision)
    after = listed(client, key)
    assert after["metadata"].pop("resourceVersion") != before["metadata"].pop("resourceVersion")
    assert after == before


@pytest.mark.parametrize(("key", "value"), OBJECTS, ids=lambda part: str(part)[:30])
def test_what_we_write_calico_reads(
    client: CalicoClient, store: EtcdDatastore, key: Key, value: JSON
) -> None:
    store.create(key, value)
    assert meaning(key.kind, listed(client, key)) == meaning(key.kind, value)
    with pytest.raises(RuntimeError, match="already exists"):
        client.ask("create", kind=key.kind, object=theirs(value))


def test_addresses_are_taken_and_given_back_by_both(
    client: CalicoClient, store: EtcdDatastore
) -> None:
    """Blocks, the claims on them and handles, each written by the one and then by the other."""
    store.create(*v3("IPPool", "pods", {"cidr": "10.70.0.0/24", "blockSize": 28}))
    store.create(*v3("Node", NODE, {"bgp": {"ipv4Address": "10.1.0.1/24"}}))
    allocator = Allocator(store, NODE)
    ours: dict[str, str] = {}
    calicos: dict[str, str] = {}
    for number in range(4):
        handle = f"k8s-pod-network.ours-{number}"
        taken = allocator.assign(handle, {"node": NODE, "pod": f"ours-{number}"})
        ours[handle] = str(taken.address).removesuffix("/32")
        handle = f"k8s-pod-network.Theirs-{number}"
        attributes = {"node": NODE, "pod": f"theirs-{number}"}
        (told,) = client.ask("assign", handle=handle, node=NODE, attributes=attributes)
        calicos[handle] = told.partition("/")[0]
    assert len({*ours.values(), *calicos.values()}) == 8
    (block,) = store.list("IPAMBlock").entries
    assert block.value["spec"]["affinity"] == f"host:{NODE}"
    assert len(store.list("BlockAffinity").entries) == 1
    assert len(store.list("IPAMHandle").entries) == 8
    for number, (handle, address) in enumerate(ours.items()):
        assert client.ask("addresses", handle=handle) == [address]
        told = client.ask("attributes", address=address)
        assert told["handle"] == handle
        assert told["attributes"] == {"node": NODE, "pod": f"ours-{number}"}
    for handle, address in calicos.items():
        assert allocator.addresses(handle) == [parse_net(f"{address}/32")]
    # each gives back what the other took
    for handle, address in calicos.items():
        assert allocator.release(handle) == [parse_net(f"{address}/32")]
        with pytest.raises(RuntimeError, match="does not exist"):
            client.ask("addresses", handle=handle)
    for handle in ours:
        client.ask("release", handle=handle)
        assert allocator.addresses(handle) == []
    assert store.list("IPAMHandle").entries == []
    again = client.ask("assign", handle="k8s-pod-network.again", node=NODE)
    assert len(again) == 1
    assert allocator.addresses("k8s-pod-network.again") == [parse_net(again[0].split("/")[0])]
