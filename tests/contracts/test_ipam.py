"""IPAM does the same on every store."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from api.net import Net, parse_net
from datastore.interface import Datastore, Key
from ipam import claims
from ipam.allocator import (
    AddressInUseError,
    AddressUnusableError,
    Allocator,
    BlockLimitError,
    NoPoolError,
    PoolExhaustedError,
)
from ipam.audit import Fault, standing
from ipam.records import PENDING, Records
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


def test_whose_blocks_a_node_may_use(store: Datastore) -> None:
    """Borrowing, strict affinity, the limit of blocks, selectors of nodes and namespaces."""
    add_pool(store, "four", "10.0.0.0/29", 30, nodeSelector="has(fast)")
    fast = {"fast": "yes"}
    one, two, three = (Allocator(store, name) for name in ("n1", "n2", "n3"))
    with pytest.raises(NoPoolError, match="nodeSelector"):
        one.assign("h0", POD, labels={})
    blocks_of = {
        allocator.node: allocator.assign(allocator.node, POD, labels=fast).block
        for allocator in (one, two)
    }
    assert len(set(blocks_of.values())) == 2
    borrowed = three.assign("h3", POD, labels=fast)
    assert borrowed.block in blocks_of.values()
    assert {claim.node for claim in affinities(store)} == {"n1", "n2"}
    three.release("h3")
    configure(store, strictAffinity=True)
    with pytest.raises(PoolExhaustedError, match="strictAffinity"):
        three.assign("h3", POD, labels=fast)
    change_configuration(store, strictAffinity=True, maxBlocksPerHost=1)
    two.release("n2")
    claims.release(Records(store), "n2", blocks_of["n2"])
    one.assign_many(3, "h1", POD, labels=fast)
    with pytest.raises(BlockLimitError, match="no more than 1"):
        one.assign("h1", POD, labels=fast)
    add_pool(store, "shop", "10.1.0.0/29", 30, namespaceSelector="team == 'shop'")
    with pytest.raises(NoPoolError, match="namespaceSelector"):
        three.assign("h3", POD, labels={}, namespace_labels={"team": "x"})
    found = three.assign("h3", POD, labels={}, namespace_labels={"team": "shop"})
    assert found.pool == "shop"
    check_consistency(store)


def change_configuration(store: Datastore, **spec: object) -> None:
    entry = store.get(Key("IPAMConfiguration", "default"))
    store.update(entry.key, entry.value | {"spec": spec}, entry.revision)


def test_one_address_and_blocks_of_another_size(store: Datastore) -> None:
    add_pool(store, "four", "10.0.0.0/28", 30)
    one, two = Allocator(store, "n1"), Allocator(store, "n2")
    wanted = parse_net("10.0.0.6")
    assert one.assign_specific(wanted, "H.One", POD).block == parse_net("10.0.0.4/30")
    with pytest.raises(AddressInUseError, match=r"held by H\.One"):
        two.assign_specific(wanted, "h2", POD)
    with pytest.raises(AddressUnusableError, match="no IPPool"):
        two.assign_specific(parse_net("192.0.2.1"), "h2", POD)
    store.delete(Key("IPPool", "four"))
    add_pool(store, "four", "10.0.0.0/28", 29)
    given = {two.assign(f"h{number}", POD).address for number in range(10)}
    assert wanted not in given
    check_consistency(store)
    for allocator, handle in ((one, "H.One"), *((two, f"h{number}") for number in range(10))):
        assert len(allocator.release(handle)) == 1
    assert (handles(store), allocated(store)) == ({}, {})


def test_the_audit(store: Datastore) -> None:
    """Of what every store keeps itself: blocks, handles, claims and pools."""
    add_pool(store, "four", "10.0.0.0/24", 28)
    allocator = Allocator(store, "n1")
    block = allocator.assign("lb-web", {}, use="Workload").block
    ours = ("10.0.0.", "10-0-0-", "IPPool(four)", "IPAMHandle(", "block 10.0.0.")

    def found() -> set[Fault]:
        # the server may be shared, and the nodes and pods of others on it
        about = [each for each in standing(store)[1] if any(text in str(each) for text in ours)]
        return {finding.fault for finding in about} - {Fault.GONE_NODE}

    assert found() == set()
    store.delete(Key("IPAMHandle", "lb-web"))
    assert found() == {Fault.NO_HANDLE}
    Records(store).create_affinity("n1", parse_net("10.0.0.240/28"), PENDING)
    add_pool(store, "wide", "10.0.0.0/16", 28)
    assert found() == {Fault.NO_HANDLE, Fault.CLAIM, Fault.POOL_OVERLAP}
    [stored] = [each for each in Records(store).blocks() if each.thing.net == block]
    stored.thing.affinity = None
    Records(store).write_block(stored)
    assert Fault.CLAIM in found()
