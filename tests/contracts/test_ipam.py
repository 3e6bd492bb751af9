"""IPAM does the same on every store."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from api.net import Net, parse_net
from datastore.interface import Datastore, Key
from ipam import claims
from ipam.allocator import AddressInUseError, Allocator, PoolExhaustedError
from ipam.records import Records
from tests.ipam.world import (
    add_pool,
    affinities,
    allocated,
    blocks,
    check_consistency,
    configure,
    handles,
    reserve,
    until,
)

POD = {"pod": "web", "namespace": "default", "node": "n1"}
KINDS = (
    *("IPPool", "IPReservation", "IPAMConfiguration"),
    *("IPAMBlock", "IPAMHandle", "BlockAffinity"),
)


@pytest.fixture(autouse=True)
def nothing_there(store: Datastore) -> None:
    """Also where a server is shared with other tests."""
    for kind in KINDS:
        for entry in store.list(kind).entries:
            store.delete(entry.key)


def test_both_families_from_the_first_address_to_the_last(store: Datastore) -> None:
    add_pool(store, "four", "10.0.0.0/28", 30)
    add_pool(store, "six", "fd00:10::/125", 127)
    reserve(store, "10.0.0.5/32")
    allocator = Allocator(store, "n1")
    given: set[Net] = set()
    for version, count in ((4, 15), (6, 8)):
        found = allocator.assign_many(count, "Net.Many", POD, version=version)
        given |= {assignment.address for assignment in found}
        with pytest.raises(PoolExhaustedError):
            allocator.assign("one more", POD, version=version)
    assert len(given) == 23
    assert set(allocated(store)) == given
    check_consistency(store)
    some = sorted(given)[3:9]
    assert set(allocator.release_addresses(some, handle="Net.Many")) == set(some)
    assert set(Allocator(store, "n2").release("Net.Many")) == given - set(some)
    assert (handles(store), allocated(store)) == ({}, {})
    for claim in affinities(store):
        claims.release(Records(store), claim.node, claim.net)
    assert (blocks(store), affinities(store)) == ({}, [])


def test_cooldown(store: Datastore) -> None:
    add_pool(store, "four", "10.0.0.0/30", 30)
    configure(store, ipCooldownSeconds=600)
    allocator = Allocator(store, "n1")
    given = [allocator.assign(f"h{number}", POD).address for number in range(4)]
    allocator.release("h2")
    with pytest.raises(AddressInUseError, match="rests"):
        allocator.assign_specific(given[2], "again", POD)
    [entry] = store.list("IPAMBlock").entries
    then = (datetime.now(UTC) - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    for attribute in entry.value["spec"]["attributes"]:
        if "releasedAt" in attribute:
            attribute["releasedAt"] = then
    store.update(entry.key, entry.value)
    assert allocator.assign("again", POD).address == given[2]


def test_load_balancers(store: Datastore) -> None:
    add_pool(store, "lb", "10.0.0.0/28", 30, allowedUses=["LoadBalancer"])
    found = Allocator(store, "n1").assign("lb-0123", {}, use="LoadBalancer")
    assert Allocator(store, "n2").assign("lb-4567", {}, use="LoadBalancer").block == found.block
    [claim] = affinities(store)
    assert (claim.node, claim.net) == ("load-balancer", found.block)
    [block] = blocks(store).values()
    assert block.affinity == "virtual:load-balancer"


def test_many_threads_of_an_allocator_that_follows(store: Datastore) -> None:
    add_pool(store, "four", "10.0.0.0/24", 28)
    allocator = Allocator(store, "n1", follow=True)
    allocator.start()
    try:
        until(lambda: allocator.following)
        problems: list[Exception] = []

        def work(number: int) -> None:
            try:
                for turn in range(4):
                    handle = f"h-{number}-{turn}"
                    address = allocator.assign(handle, POD).address
                    if turn % 2:
                        assert allocator.release(handle) == [address]
            except Exception as problem:
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert problems == []
        assert len(allocated(store)) == len(handles(store)) == 32
        check_consistency(store)
        store.delete(Key("IPPool", "four"))
        add_pool(store, "other", "10.1.0.0/24", 28)
        until(lambda: allocator.assign("late", POD).pool == "other")
        assert parse_net("10.1.0.0/24").contains(allocator.addresses("late")[-1])
    finally:
        allocator.stop()
