"""get and label."""

from __future__ import annotations

import json

import yaml

from api.kinds import KINDS
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from tests.manxctl.conftest import Run

V3 = "projectcalico.org/v3"


def put(store: SqliteDatastore, kind: str, name: str, spec: object, namespace: str = "") -> None:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    value = {"apiVersion": V3, "kind": kind, "metadata": metadata, "spec": spec}
    store.create(Key(kind, name, namespace), value)


def test_tables(run: Run, store: SqliteDatastore) -> None:
    put(store, "IPPool", "pods", {"cidr": "10.0.0.0/16", "natOutgoing": True})
    put(store, "IPPool", "more", {"cidr": "fd00::/64", "nodeSelector": "rack == 'a'"})
    assert run("get", "pools").stdout.splitlines() == [
        "NAME   CIDR          SELECTOR",
        "more   fd00::/64     rack == 'a'",
        "pods   10.0.0.0/16   all()",
    ]
    assert run("get", "IPPOOL", "pods", "-o", "wide").stdout.splitlines() == [
        "NAME   CIDR          NAT    IPIPMODE   VXLANMODE   DISABLED   DISABLEBGPEXPORT   "
        "SELECTOR   ASSIGNMENTMODE",
        "pods   10.0.0.0/16   true   Never      Never       false      false              "
        "all()      Automatic",
    ]


def test_namespaces(run: Run, store: SqliteDatastore) -> None:
    put(store, "NetworkPolicy", "a", {"order": 10.0, "selector": "all()"}, "default")
    put(store, "NetworkPolicy", "b", {"tier": "t", "order": 0.5}, "shop")
    assert run("get", "np", "-o", "wide").stdout.splitlines() == [
        "NAME   TIER      ORDER   SELECTOR",
        "a      default   10      all()",
    ]
    assert run("get", "np", "-A").stdout.splitlines() == [
        "NAMESPACE   NAME   TIER",
        "default     a      default",
        "shop        b      t",
    ]
    assert run("get", "np", "b", "-n", "shop", "-o", "name").stdout == "networkpolicy/b\n"
    assert run("get", "np", "b").exit_code == 1
    assert run("get", "np", "b", "-A").exit_code == 2


def test_all_kinds_have_a_table(run: Run, store: SqliteDatastore) -> None:
    specs: list[object] = [{}, [], None, {"podSelector": {"matchExpressions": [{}]}, "bgp": 5}]
    for kind in KINDS.values():
        for spec in specs:
            key = Key(kind.id, "x", "default" if kind.namespaced else "")
            store.create(key, {"metadata": {"name": "x"}, "spec": spec})
            for output in ("table", "wide", "name", "yaml", "json"):
                assert "x" in run("get", kind.plural, "-o", output).stdout
            store.delete(key)


def test_cells(run: Run, store: SqliteDatastore) -> None:
    put(store, "BGPPeer", "tor", {"peerIP": "192.0.2.1", "asNumber": 65001})
    put(store, "BGPPeer", "rack", {"nodeSelector": "rack == 'a'", "peerSelector": "x"})
    put(
        store,
        "WorkloadEndpoint",
        "n-k8s-p-eth0",
        {"pod": "p", "node": "n", "ipNetworks": ["10.0.0.1/32", "fd00::1/128"]},
        "default",
    )
    put(store, "IPAMBlock", "10-0-0-0-30", {"cidr": "10.0.0.0/30", "allocations": [0, None]})
    assert run("get", "bgppeers").stdout.splitlines()[1:] == [
        "rack   -           rack == 'a'   -",
        "tor    192.0.2.1   (global)      65001",
    ]
    assert "p          n      10.0.0.1/32,fd00::1/128" in run("get", "wep").stdout
    assert run("get", "blocks", "-o", "wide").stdout.splitlines()[1].endswith("1/2")


def test_cells_of_lists(run: Run, store: SqliteDatastore) -> None:
    put(store, "BGPFilter", "f", {"exportV4": [{"action": "Reject"}], "importV6": "broken"})
    put(store, "GlobalNetworkSet", "g", {"nets": [f"10.0.{n}.0/24" for n in range(20)]})
    put(
        store, "HostEndpoint", "h", {"node": "n", "interfaceName": "*", "expectedIPs": ["10.0.0.1"]}
    )
    assert run("get", "bgpfilters").stdout.splitlines() == [
        "NAME   NUMEXPORTV4   NUMIMPORTV4   NUMEXPORTV6   NUMIMPORTV6",
        "f      1             0             0             0",
    ]
    nets = run("get", "gns", "-o", "wide").stdout.splitlines()[1].split()[1]
    assert len(nets) == 80
    assert nets.startswith("10.0.0.0/24,10.0.1.0/24,")
    assert nets.endswith("…")
    assert run("get", "heps", "-o", "wide").stdout.splitlines() == [
        "NAME   NODE   INTERFACE   IPS        PROFILES",
        "h      n      *           10.0.0.1   -",
    ]


def test_cells_of_kubernetes_kinds(run: Run, store: SqliteDatastore) -> None:
    store.create(
        Key("Service", "web", "default"),
        {
            "metadata": {"name": "web"},
            "spec": {
                "type": "LoadBalancer",
                "clusterIP": "10.96.0.1",
                "ports": [{"port": 80}, {"port": 53, "protocol": "UDP"}],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"hostname": "lb"}]}},
        },
    )
    store.create(
        Key("EndpointSlice", "web-1", "default"),
        {
            "metadata": {"name": "web-1"},
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}],
            "ports": [{"port": 8080}, {}],
        },
    )
    addresses = [{"type": "InternalIP", "address": "172.31.1.11"}, {"address": "node-1"}]
    store.create(
        Key("KubernetesNode", "node-1"),
        {"metadata": {"name": "node-1"}, "status": {"addresses": addresses}},
    )
    assert run("get", "svc").stdout.splitlines()[1].split() == [
        *("web", "LoadBalancer", "10.96.0.1", "192.0.2.1,lb", "80/TCP,53/UDP"),
    ]
    assert run("get", "endpointslices").stdout.splitlines()[1].split() == [
        *("web-1", "IPv4", "8080,*", "10.0.0.1,10.0.0.2"),
    ]
    assert run("get", "knodes").stdout.splitlines()[1].split() == ["node-1", "172.31.1.11,node-1"]


def test_pod_selectors(run: Run, store: SqliteDatastore) -> None:
    selector = {
        "matchLabels": {"app": "web"},
        "matchExpressions": [{"key": "t", "operator": "In", "values": ["a", "b"]}],
    }
    put(store, "KubernetesNetworkPolicy", "web", {"podSelector": selector}, "default")
    put(store, "KubernetesNetworkPolicy", "all", {"podSelector": {}}, "default")
    lines = run("get", "netpol").stdout.splitlines()
    assert lines[1:] == ["all    <none>", "web    app=web,t In (a,b)"]


def test_yaml_and_json(run: Run, store: SqliteDatastore) -> None:
    put(store, "IPPool", "pods", {"cidr": "10.0.0.0/16"})
    revision = store.get(Key("IPPool", "pods")).revision
    one = yaml.safe_load(run("get", "pools", "pods", "-o", "yaml").stdout)
    assert one["metadata"] == {"name": "pods", "resourceVersion": revision}
    many = json.loads(run("get", "pools", "-o", "json").stdout)
    assert (many["kind"], many["items"]) == ("IPPoolList", [one])
    empty = yaml.safe_load(run("get", "bgppeers", "-o", "yaml").stdout)
    assert (empty["kind"], empty["items"]) == ("BGPPeerList", [])


def test_what_is_missing(run: Run, store: SqliteDatastore) -> None:
    put(store, "IPPool", "pods", {"cidr": "10.0.0.0/16"})
    result = run("get", "pools", "absent", "pods")
    assert result.exit_code == 1
    assert result.stderr == "Error: IPPool absent: does not exist\n"
    assert "10.0.0.0/16" in result.stdout
    assert run("get", "pools", "absent").stdout == ""
    result = run("get", "ippolls")
    assert result.exit_code == 2
    assert "'ippolls': no such kind; did you mean ippools?" in result.stderr


def test_labels(run: Run, store: SqliteDatastore) -> None:
    put(store, "Node", "n1", {})
    assert run("label", "node", "n1", "rack=a", "x=y").exit_code == 0
    assert "rack is 'a' already" in run("label", "node", "n1", "rack=b").stderr
    assert run("label", "node", "n1", "rack=b", "x-", "--overwrite").exit_code == 0
    assert store.get(Key("Node", "n1")).value["metadata"]["labels"] == {"rack": "b"}
    assert "a label value" in run("label", "node", "n1", "rack=b c", "--overwrite").stderr
    assert run("label", "node", "n1", "rack").exit_code == 2
    assert run("label", "node", "absent", "a=b").exit_code == 1
