"""Endpoints and Nodes of machines that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controllers.housekeeping import Housekeeping, Round
from controllers.nodes import NodeCleaner
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam.collector import HaltedError
from ipam.inventory import read
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
    wait(0)
    remove(kubernetes, "KubernetesNode", "machine-2")
    wait(0)
    assert wait(GRACE - 1).removed.nodes == []
    assert wait(1).removed.nodes == ["n2"]
    wait(1)
    assert wait(GRACE - 1).removed.endpoints == []
    assert [key.name for key in wait(1).removed.endpoints] == ["n2-k8s-db-eth0"]
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
