"""Endpoints and Nodes of machines that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.net import Net
from cni.attachment import Attachment
from controllers.housekeeping import Housekeeping, Round
from controllers.nodes import NodeCleaner
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator
from ipam.collector import Collector, HaltedError, Periods
from ipam.reading import read
from tests.controllers.world import Clock, add_nodes, assign, attachment, plug, put, record, remove
from tests.ipam.world import add_pool, affinities, allocated, blocks, handles, overtaken_at

GRACE = 900


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteDatastore]:
    store = SqliteDatastore(tmp_path / "datastore.db")
    add_pool(store, "four", "10.0.0.0/24", 28)
    add_nodes(store, "n1")
    put(store, "Node", "n2", {"orchRefs": [{"orchestrator": "k8s", "nodeName": "machine-2"}]})
    yield store
    store.close()


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[SqliteDatastore]:
    """The cluster, in a store of its own."""
    store = SqliteDatastore(tmp_path / "kubernetes.db")
    put(store, "KubernetesNode", "machine-1", {})
    put(store, "KubernetesNode", "machine-2", {})
    yield store
    store.close()


def names(store: SqliteDatastore, kind: str) -> set[str]:
    return {entry.key.name for entry in store.list(kind).entries}


def test_a_machine_that_is_gone_leaves_nothing(
    store: SqliteDatastore, kubernetes: SqliteDatastore
) -> None:
    clock = Clock()
    housekeeping = Housekeeping(store, kubernetes, clock=clock)

    def wait(seconds: float) -> Round:
        clock.now += seconds
        return housekeeping.round()

    kept = plug(store, "n1", "web", "c1")
    plug(store, "n2", "db", "c2")
    for pod, node in (("web", "n1"), ("db", "n2")):
        put(kubernetes, "Pod", pod, {"nodeName": node}, namespace="shop")
    wait(0)
    remove(kubernetes, "KubernetesNode", "machine-2")
    wait(0)
    assert wait(GRACE - 1).removed.nodes == []
    assert wait(1).removed.nodes == ["n2"]
    wait(1)
    assert wait(GRACE - 1).removed.endpoints == []
    assert [key.name for key in wait(1).removed.endpoints] == ["n2-k8s-db-eth0"]
    remove(kubernetes, "Pod", "db", "shop")
    wait(60)
    assert len(wait(60).collected.addresses) == 1
    wait(60)
    assert (names(store, "Node"), names(store, "WorkloadEndpoint")) == (
        {"n1"},
        {"n1-k8s-web-eth0"},
    )
    assert set(allocated(store)) == set(kept)
    assert {claim.node for claim in affinities(store)} == {"n1"}
    assert len(blocks(store)) == len(handles(store)) == 1
    assert housekeeping.totals == {
        "addresses": 1,
        "blocks": 1,
        "claims": 0,
        "handles": 0,
        "endpoints": 1,
        "nodes": 1,
    }
    assert wait(60).findings == []


def test_pods_of_the_other_store_count(store: SqliteDatastore, kubernetes: SqliteDatastore) -> None:
    clock = Clock()
    housekeeping = Housekeeping(store, kubernetes, clock=clock)
    addresses = assign(store, "n1", "web", "c1")
    put(kubernetes, "Pod", "web", {"nodeName": "n1"}, namespace="shop")
    for _ in range(3):
        clock.now += GRACE
        assert housekeeping.round().collected.addresses == []
    remove(kubernetes, "Pod", "web", "shop")
    housekeeping.round()
    clock.now += GRACE
    assert housekeeping.round().collected.addresses == addresses


def test_a_pod_that_is_gone_leaves_nothing(
    store: SqliteDatastore, kubernetes: SqliteDatastore
) -> None:
    """Its DEL never came, on a node that is there: its endpoint goes first, then its address."""
    clock = Clock()
    housekeeping = Housekeeping(store, kubernetes, clock=clock)

    def wait(seconds: float) -> Round:
        clock.now += seconds
        return housekeeping.round()

    for pod in ("web", "done"):
        put(kubernetes, "Pod", pod, {"nodeName": "n1"}, namespace="shop")
    kept = plug(store, "n1", "web", "c1")
    (lost,) = plug(store, "n1", "gone", "c2")
    plug(store, "n1", "done", "c3")
    done = kubernetes.get(Key("Pod", "done", "shop"))
    kubernetes.update(done.key, done.value | {"status": {"phase": "Succeeded"}})
    bare = plug_bare(store, "n1", "c4")
    wait(0)
    round_ = wait(GRACE - 1)
    assert round_.removed.endpoints == []
    text = str(lost).removesuffix("/32")
    assert [str(finding) for finding in round_.findings] == [
        f"WorkloadEndpoint(shop/n1-k8s-gone-eth0): has {text}, and there is no Pod shop/gone"
    ]
    assert [key.name for key in wait(1).removed.endpoints] == ["n1-k8s-gone-eth0"]
    wait(1)
    assert wait(GRACE).collected.addresses == [lost]
    wait(0)
    assert names(store, "WorkloadEndpoint") == {
        "n1-k8s-web-eth0",
        "n1-k8s-done-eth0",
        "n1-cni-c4-eth0",
    }
    assert {*kept, *bare} < set(allocated(store))
    assert wait(60).findings == []


def plug_bare(store: SqliteDatastore, node: str, container: str) -> list[Net]:
    """A container that is no pod, as podman makes them."""
    made = Attachment("net", container, "eth0")
    address = Allocator(store, node).assign(made.handle, made.attributes(node, "t")).address
    key = made.endpoint_key(node)
    spec = {
        "orchestrator": "cni",
        "node": node,
        "endpoint": "eth0",
        "containerID": container,
        "interfaceName": "cali1",
        "ipNetworks": [str(address)],
    }
    put(store, "WorkloadEndpoint", key.name, spec, namespace=key.namespace)
    return [address]


def stand_alone(store: SqliteDatastore, pod: str) -> Net:
    """An address that ``manx-ipam`` gave to a container of another main plugin."""
    attributes = {"node": "n1", "type": "manx-ipam", "ipamAttachment": f"net/c-{pod}/eth0"}
    if pod:
        attributes["ipamPod"] = f"shop/{pod}"
    return Allocator(store, "n1").assign(f"net.c-{pod}", attributes).address


def test_addresses_of_other_plugins_go_with_their_pods(
    store: SqliteDatastore, kubernetes: SqliteDatastore
) -> None:
    """Where Kubernetes can be asked for those; else, and without one, with their node."""
    clock = Clock()
    housekeeping = Housekeeping(store, kubernetes, clock=clock)
    blind = Housekeeping(store, clock=clock)
    put(kubernetes, "Pod", "web", {"nodeName": "n1"}, namespace="shop")
    gone, back = (stand_alone(store, pod) for pod in ("gone", "back"))
    kept = [stand_alone(store, "web"), stand_alone(store, "")]
    found = housekeeping.round(), housekeeping.round()
    assert {finding.subject for finding in found[1].findings} == {
        str(net).removesuffix("/32") for net in (gone, back)
    }
    assert "net.c-gone (pod shop/gone) on n1, which is not there" in str(found[1].findings)
    status = {"phase": "Running", "podIP": str(kept[0]).removesuffix("/32")}
    entry = kubernetes.get(Key("Pod", "web", "shop"))
    kubernetes.update(entry.key, entry.value | {"status": status})  # it uses what it was given
    blind.round()
    clock.now += GRACE
    assert blind.round().collected.addresses == []
    collector = Collector(store, kubernetes, clock=clock)
    collector.run(read(store, kubernetes), Periods())
    clock.now += GRACE
    old = read(store, kubernetes)
    put(kubernetes, "Pod", "back", {"nodeName": "n1"}, namespace="shop")
    assert collector.run(old, Periods()).addresses == [gone]
    assert set(allocated(store)) == {back, *kept}
    assert housekeeping.round().findings == []


def test_a_pod_that_returns_or_is_replaced_keeps_its_endpoint(
    store: SqliteDatastore, kubernetes: SqliteDatastore
) -> None:
    clock = Clock()
    cleaner = NodeCleaner(store, kubernetes, clock=clock)
    for pod in ("back", "anew", "unbelieved"):
        plug(store, "n1", pod, f"c-{pod}")
    cleaner.run(read(store, kubernetes), GRACE)
    clock.now += GRACE
    old = read(store, kubernetes)
    put(kubernetes, "Pod", "back", {"nodeName": "n1"}, namespace="shop")
    record(store, "n1", "anew", "c-other", [])
    assert [key.name for key in cleaner.run(old, GRACE).endpoints] == ["n1-k8s-unbelieved-eth0"]
    plug(store, "n1", "unbelieved", "c9")
    for name in ("machine-1", "machine-2"):
        remove(kubernetes, "KubernetesNode", name)
    for _ in range(3):
        clock.now += GRACE
        assert cleaner.run(read(store, kubernetes), GRACE).endpoints == []


def test_no_machine_at_all_is_not_believed(
    store: SqliteDatastore, kubernetes: SqliteDatastore
) -> None:
    clock = Clock()
    cleaner = NodeCleaner(store, kubernetes, clock=clock)
    remove(kubernetes, "KubernetesNode", "machine-1")
    remove(kubernetes, "KubernetesNode", "machine-2")
    for _ in range(3):
        clock.now += GRACE
        assert cleaner.run(read(store), GRACE).nodes == []
    assert names(store, "Node") == {"n1", "n2"}


def test_a_node_that_returns_at_the_last_moment(store: SqliteDatastore) -> None:
    clock = Clock()
    cleaner = NodeCleaner(store, clock=clock)
    plug(store, "n1", "web", "c1")
    remove(store, "Node", "n1")
    cleaner.run(read(store), GRACE)
    clock.now += GRACE
    old = read(store)
    add_nodes(store, "n1")
    assert cleaner.run(old, GRACE).endpoints == []
    assert names(store, "WorkloadEndpoint") == {"n1-k8s-web-eth0"}


def test_an_endpoint_that_was_written_meanwhile_stays(store: SqliteDatastore) -> None:
    clock = Clock()
    plug(store, "n1", "web", "c1")
    remove(store, "Node", "n1")
    key = attachment("web", "c1").endpoint_key("n1")

    def write() -> None:
        record(store, "n1", "web", "c9", [])

    cleaner = NodeCleaner(overtaken_at(store, 0, write), clock=clock)
    cleaner.run(read(store), GRACE)
    clock.now += GRACE
    assert cleaner.run(read(store), GRACE).endpoints == []
    assert store.get(key).value["spec"]["containerID"] == "c9"


def test_it_stops_when_told_to(store: SqliteDatastore) -> None:
    clock = Clock()
    cleaner = NodeCleaner(store, clock=clock, proceed=lambda: False)
    plug(store, "n1", "web", "c1")
    remove(store, "Node", "n1")
    cleaner.run(read(store), GRACE)
    clock.now += GRACE
    with pytest.raises(HaltedError):
        cleaner.run(read(store), GRACE)
    assert store.get(Key("WorkloadEndpoint", "n1-k8s-web-eth0", "shop"))
