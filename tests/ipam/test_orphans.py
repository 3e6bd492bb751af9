"""Handles of assigns that died before they took an address."""

from __future__ import annotations

import pytest

from datastore.sqlite import SqliteDatastore
from ipam import claims
from ipam.allocator import Allocator
from ipam.orphans import delete_orphans
from ipam.records import Records
from tests.ipam.world import Died, add_pool, allocated, blocks, dies_after, handles, overtaken_at


@pytest.fixture
def orphaned(store: SqliteDatastore) -> SqliteDatastore:
    """A store in which ``used`` has an address, and ``orphan`` died before it had one."""
    add_pool(store, "pool", "10.0.0.0/26", 28)
    Allocator(store, "n1").assign("used", {})
    with pytest.raises(Died):
        Allocator(dies_after(store, 1), "n1").assign("orphan", {})
    assert set(handles(store)) == {"used", "orphan"}
    return store


def test_only_the_orphan_goes(orphaned: SqliteDatastore) -> None:
    assert delete_orphans(orphaned, "n2") == []
    assert delete_orphans(orphaned, "n1") == ["orphan"]
    assert delete_orphans(orphaned, "n1") == []
    assert set(handles(orphaned)) == set(allocated(orphaned).values()) == {"used"}


def test_an_orphan_whose_block_is_gone(orphaned: SqliteDatastore) -> None:
    Allocator(orphaned, "n1").release("used")
    for net in blocks(orphaned):
        claims.release(Records(orphaned), "n1", net)
    assert blocks(orphaned) == {}
    assert delete_orphans(orphaned, "n1") == ["orphan"]


@pytest.mark.parametrize("write", range(2))
def test_an_assign_under_way_is_not_harmed(orphaned: SqliteDatastore, write: int) -> None:
    def sweep() -> None:
        delete_orphans(orphaned, "n1")

    found = Allocator(overtaken_at(orphaned, write, sweep), "n1").assign("orphan", {})
    assert Allocator(orphaned, "n1").addresses("orphan") == [found.address]


@pytest.mark.parametrize("write", range(2))
def test_an_orphan_that_comes_to_life_stays(orphaned: SqliteDatastore, write: int) -> None:
    def assign() -> None:
        Allocator(orphaned, "n1").assign("orphan", {})

    assert delete_orphans(overtaken_at(orphaned, write, assign), "n1") == []
    assert len(Allocator(orphaned, "n1").addresses("orphan")) == 1
