"""What calicoctl exports is read: the file is as its sources say it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.net import parse_net
from datastore import migrate
from datastore.interface import Key
from datastore.migrate import FormatError, Outcome
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator

RESOURCES = """\
apiVersion: projectcalico.org/v3
items:
- apiVersion: projectcalico.org/v3
  kind: IPPool
  metadata:
    creationTimestamp: null
    name: default-ipv4-ippool
  spec:
    allowedUses:
    - Workload
    - Tunnel
    blockSize: 30
    cidr: 192.168.0.0/16
    ipipMode: Always
    natOutgoing: true
    nodeSelector: all()
    vxlanMode: Never
kind: IPPoolList
metadata: {}
---
apiVersion: projectcalico.org/v3
items: null
kind: BGPPeerList
metadata:
  resourceVersion: "77"
---
apiVersion: projectcalico.org/v3
items:
- apiVersion: projectcalico.org/v3
  kind: NetworkPolicy
  metadata:
    creationTimestamp: null
    name: web
    namespace: shop
  spec:
    ingress:
    - action: Allow
      destination: {}
      protocol: TCP
      source: {}
    order: 10
    selector: app == 'web'
    types:
    - Ingress
kind: NetworkPolicyList
metadata: {}
---
apiVersion: projectcalico.org/v3
items:
- metadata:
    creationTimestamp: null
    labels:
      rack: a
    name: node-1
  spec:
    addresses:
    - address: 172.31.1.11/24
      type: CalicoNodeIP
    bgp:
      ipv4Address: 172.31.1.11/24
      ipv4IPIPTunnelAddr: 192.168.201.0
    orchRefs:
    - nodeName: node-1
      orchestrator: k8s
  status: {}
kind: NodeList
metadata: {}
---
"""
INFORMATION = {
    "kind": "ClusterInformation",
    "apiVersion": "projectcalico.org/v3",
    "metadata": {"name": "default", "uid": "5", "resourceVersion": "9", "creationTimestamp": None},
    "spec": {
        "clusterGUID": "0123456789abcdef0123456789abcdef",
        "clusterType": "k8s,bgp",
        "calicoVersion": "v3.30.0",
        "datastoreReady": False,
    },
}
BLOCK = {
    "cidr": "192.168.201.0/30",
    "affinity": "host:node-1",
    "affinity_claim_time": "2026-01-02T03:04:05Z",
    "allocations": [0, 1, None, None],
    "unallocated": [2, 3],
    "attributes": [
        {"handle_id": "ipip-tunnel-addr-node-1", "secondary": {"node": "node-1"}},
        {"handle_id": "k8s-pod-network.ABC", "secondary": {"pod": "web", "namespace": "shop"}},
    ],
    "deleted": False,
    "sequenceNumber": 5,
    "sequenceNumberForAllocation": {"0": 3, "1": 4},
}


def record(path: str, value: object) -> dict[str, object]:
    return {"Key": f"/calico/ipam/v2/{path}", "Value": value, "TTL": 0}


USED = {"block": {"192.168.201.0/30": 1}, "deleted": False}
IPAM = {
    "block_affinities": [
        record("host/node-1/ipv4/block/192.168.201.0-30", {"state": "confirmed", "deleted": False})
    ],
    "blocks": [record("assignment/ipv4/block/192.168.201.0-30", BLOCK)],
    "handles": [
        record("handle/ipip-tunnel-addr-node-1", USED),
        record("handle/k8s-pod-network.ABC", USED),
    ],
    "config": record(
        "config", {"strict_affinity": False, "auto_allocate_blocks": True, "maxBlocksPerHost": 4}
    ),
}


def export(
    resources: str = RESOURCES, information: object = INFORMATION, ipam: object = IPAM
) -> bytes:
    parts = [json.dumps(part, indent=2) + "\n" for part in (information, ipam)]
    return "===\n".join([resources, *parts]).encode()


def lines(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def test_everything_is_brought_in_and_in_use(tmp_path: Path) -> None:
    store = SqliteDatastore(tmp_path / "store.db")
    objects = migrate.read(lines(export()))
    results = migrate.import_all(store, objects)
    assert {r.outcome for r in results} == {Outcome.CREATED, Outcome.UPDATED}, results
    assert [r for r in results if r.reason] == []
    assert {r.key for r in results} == {
        Key("IPPool", "default-ipv4-ippool"),
        Key("NetworkPolicy", "web", "shop"),
        Key("Node", "node-1"),
        Key("ClusterInformation", "default"),
        Key("BlockAffinity", "node-1-192-168-201-0-30"),
        Key("IPAMBlock", "192-168-201-0-30"),
        Key("IPAMHandle", "ipip-tunnel-addr-node-1"),
        Key("IPAMHandle", "k8s-pod-network.abc"),
        Key("IPAMConfiguration", "default"),
    }
    again = migrate.import_all(store, objects)
    assert {r.outcome for r in again} == {Outcome.PRESENT}
    assert migrate.is_locked(store)
    assert store.get(migrate.CLUSTER).value["spec"] == INFORMATION["spec"]
    assert store.get(Key("IPAMHandle", "k8s-pod-network.abc")).value["spec"] == {
        "handleID": "k8s-pod-network.ABC",
        "block": {"192.168.201.0/30": 1},
        "deleted": False,
    }
    block = store.get(Key("IPAMBlock", "192-168-201-0-30")).value["spec"]
    assert block["affinityClaimTime"] == "2026-01-02T03:04:05Z"
    assert store.get(Key("IPAMConfiguration", "default")).value["spec"]["maxBlocksPerHost"] == 4

    migrate.unlock(store)
    allocator = Allocator(store, "node-1")
    assert allocator.addresses("k8s-pod-network.ABC") == [parse_net("192.168.201.1/32")]
    assert allocator.release("k8s-pod-network.ABC")
    assert allocator.assign("new", {}).address == parse_net("192.168.201.2/32")
    store.close()


def test_what_a_conflict_is(tmp_path: Path) -> None:
    store = SqliteDatastore(tmp_path / "store.db")
    objects = migrate.read(lines(export()))
    other = json.loads(json.dumps(objects[0]))
    other["spec"]["cidr"] = "10.0.0.0/16"
    store.create(Key("IPPool", "default-ipv4-ippool"), other)
    planned = migrate.import_all(store, objects, dry_run=True)
    (conflict,) = [r for r in planned if r.outcome == Outcome.CONFLICT]
    assert (conflict.key.name, conflict.reason) == ("default-ipv4-ippool", "differs in spec")
    assert not migrate.is_locked(store)
    store.close()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"kind: IPPoolList\n===\n{}\n", "2 parts, expected 3"),
        (export() + b"===\n", "4 parts, expected 3"),
        (export("{\n"), "resources: "),
        (export("- 1\n"), "document 1: expected an object with a kind"),
        (export("kind: IPPoolList\nitems: [5]\n"), "items: expected objects"),
        (export(information=[]), "the cluster's information: expected a JSON object"),
        (export()[:-20], "IPAM: "),
        (export(ipam={"bocks": []}), "IPAM: bocks: not known"),
        (export(ipam={"blocks": [{"Key": "/x", "Value": {}}]}), "blocks: '/x': expected Key"),
        (export(ipam={"handles": [{"Key": "/calico/ipam/v2/handle/a"}]}), "expected Key"),
        (export(ipam={"handles": ["x"]}), "handles: None: expected Key"),
    ],
)
def test_what_is_no_whole_export_says_why(data: bytes, complaint: str) -> None:
    with pytest.raises(FormatError) as caught:
        migrate.read(lines(data))
    assert complaint in str(caught.value)


@given(st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    whole = export()
    at = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(0, 200))
    junk = data.draw(st.binary(max_size=8))
    damaged = whole[:at] + junk + whole[at + length :]
    try:
        assert isinstance(migrate.read(lines(damaged)), list)
    except FormatError as error:
        assert str(error)
