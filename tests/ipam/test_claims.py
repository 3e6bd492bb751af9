"""The affinity protocol: each step, each half-done step, each race."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from api.net import parse_net
from api.registry import parse_as
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam import claims
from ipam.allocator import Allocator
from ipam.block import Block
from ipam.errors import ContentionError
from ipam.records import CONFIRMED, PENDING, PENDING_DELETION, Affinity, Records, owner
from tests.ipam.world import (
    Died,
    Interposed,
    add_pool,
    affinities,
    blocks,
    dies_after,
    overtaken_at,
)

NET = parse_net("10.0.0.64/26")
MINE = Affinity("n1", NET, CONFIRMED)
THEIRS = Affinity("n2", NET, CONFIRMED)


def use_an_address(store: SqliteDatastore) -> None:
    stored = Records(store).block(NET)
    assert stored is not None
    stored.thing.take(1, "h", {})
    Records(store).write_block(stored)


def test_a_claimed_block_is_as_calico_stores_it(store: SqliteDatastore) -> None:
    stored = claims.claim(Records(store), "node-1", NET)
    assert stored is not None
    assert stored.entry == store.get(Key("IPAMBlock", "10-0-0-64-26"))
    block = store.get(Key("IPAMBlock", "10-0-0-64-26")).value
    affinity = store.get(Key("BlockAffinity", "node-1-10-0-0-64-26")).value
    parse_as("IPAMBlock", block)
    parse_as("BlockAffinity", affinity)
    assert affinity["spec"] == {
        "state": "confirmed",
        "node": "node-1",
        "type": "host",
        "cidr": "10.0.0.64/26",
        "deleted": False,
    }
    assert block["spec"]["affinity"] == "host:node-1"
    claimed = datetime.fromisoformat(block["spec"]["affinityClaimTime"])
    assert abs((datetime.now(UTC) - claimed).total_seconds()) < 600
    assert block["spec"]["sequenceNumber"] > 1_600_000_000 * 10**9  # nanoseconds since 1970


def test_ipv6_names(store: SqliteDatastore) -> None:
    claims.claim(Records(store), "n1", parse_net("fd00:10::40/122"))
    store.get(Key("IPAMBlock", "fd00-10--40-122"))
    store.get(Key("BlockAffinity", "n1-fd00-10--40-122"))


@pytest.mark.parametrize("writes", range(4))
def test_a_claim_that_died_is_finished_by_the_next(store: SqliteDatastore, writes: int) -> None:
    with pytest.raises(Died):
        claims.claim(Records(dies_after(store, writes)), "n1", NET)
    assert claims.claim(Records(store), "n1", NET)
    assert affinities(store) == [MINE]
    assert blocks(store)[NET].affinity == owner("n1")


@pytest.mark.parametrize("writes", range(1, 4))
def test_a_claim_that_died_does_not_keep_others_out(store: SqliteDatastore, writes: int) -> None:
    with pytest.raises(Died):
        claims.claim(Records(dies_after(store, writes)), "n1", NET)
    got_it = claims.claim(Records(store), "n2", NET) is not None
    assert got_it == (writes < 2)  # the block decides, and the second write made it
    assert (claims.claim(Records(store), "n1", NET) is None) == got_it
    assert affinities(store) == [THEIRS if got_it else MINE]


@pytest.mark.parametrize("write", range(3))
def test_two_nodes_that_claim_at_once(store: SqliteDatastore, write: int) -> None:
    won: list[bool] = []

    def other() -> None:
        won.append(claims.claim(Records(store), "n2", NET) is not None)

    mine = claims.claim(Records(overtaken_at(store, write, other)), "n1", NET)
    assert won == [mine is None]
    assert affinities(store) == [MINE if mine else THEIRS]


@pytest.mark.parametrize("write", range(4))
def test_two_programs_of_one_node_that_claim_at_once(store: SqliteDatastore, write: int) -> None:
    def other() -> None:
        assert claims.claim(Records(store), "n1", NET)

    assert claims.claim(Records(overtaken_at(store, write, other)), "n1", NET)
    assert affinities(store) == [MINE]


def test_a_claim_whose_block_vanished_is_pending_until_there_is_one(
    store: SqliteDatastore,
) -> None:
    Records(store).create_affinity("n1", NET, CONFIRMED)
    with pytest.raises(Died):
        claims.claim(Records(dies_after(store, 1)), "n1", NET)
    assert affinities(store) == [Affinity("n1", NET, PENDING)]


def test_a_block_made_after_its_claim_was_taken_away(store: SqliteDatastore) -> None:
    """And then its maker died: the one case of a block whose owner has no claim to it."""
    add_pool(store, "pool", "10.0.0.64/26", 26)

    def taken_away() -> None:
        claims.release(Records(store), "n1", NET)

    for finder in ("n1", "n2"):
        with pytest.raises(Died):
            claims.claim(Records(dies_after(overtaken_at(store, 1, taken_away), 2)), "n1", NET)
        assert affinities(store) == []
        [entry] = store.list("IPAMBlock").entries
        entry.value["spec"]["affinityClaimTime"] = "2026-01-01T00:00:00Z"
        store.update(entry.key, entry.value)
        assert Allocator(store, finder).assign("h", {}).block == NET
        assert affinities(store) == [Affinity(finder, NET, CONFIRMED)]
        Allocator(store, finder).release("h")
        claims.release(Records(store), finder, NET)


def test_an_empty_block_that_is_released_goes(store: SqliteDatastore) -> None:
    claims.claim(Records(store), "n1", NET)
    assert claims.release(Records(store), "n1", NET)
    assert blocks(store) == {}
    assert affinities(store) == []
    assert claims.release(Records(store), "n1", NET)


def test_a_block_in_use_that_is_released_stays_without_owner(store: SqliteDatastore) -> None:
    claims.claim(Records(store), "n1", NET)
    use_an_address(store)
    assert not claims.release(Records(store), "n1", NET, only_empty=True)
    assert affinities(store) == [MINE]
    assert claims.release(Records(store), "n1", NET)
    assert affinities(store) == []
    block = blocks(store)[NET]
    assert (block.affinity, block.claimed) == (None, None)
    assert block.held_by("h")
    assert claims.claim(Records(store), "n1", NET) is None
    assert affinities(store) == []


def test_the_block_of_another_is_not_released(store: SqliteDatastore) -> None:
    claims.claim(Records(store), "n2", NET)
    Records(store).create_affinity("n1", NET, CONFIRMED)  # stale
    assert claims.release(Records(store), "n1", NET)
    assert affinities(store) == [THEIRS]
    assert blocks(store)[NET].affinity == owner("n2")


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize("writes", range(1, 4))
def test_a_release_that_died_is_finished_or_undone(
    store: SqliteDatastore, writes: int, in_use: bool
) -> None:
    claims.claim(Records(store), "n1", NET)
    if in_use:
        use_an_address(store)
    with pytest.raises(Died):
        claims.release(Records(dies_after(store, writes)), "n1", NET)
    if writes == 1:
        assert affinities(store) == [Affinity("n1", NET, PENDING_DELETION)]
    mine = claims.claim(Records(store), "n1", NET)
    assert (mine is None) == (in_use and writes > 1)
    assert affinities(store) == ([MINE] if mine else [])
    assert claims.release(Records(store), "n1", NET)
    assert affinities(store) == []
    assert NET not in blocks(store) or blocks(store)[NET].affinity is None


@pytest.mark.parametrize("write", range(3))
def test_an_address_taken_during_a_release_is_kept(store: SqliteDatastore, write: int) -> None:
    for only_empty in (True, False):
        claims.claim(Records(store), "n1", NET)

        def other() -> None:
            if NET in blocks(store):
                use_an_address(store)

        overtaken = Records(overtaken_at(store, write, other))
        gone = claims.release(overtaken, "n1", NET, only_empty=only_empty)
        block = blocks(store).get(NET)
        if block is None:
            assert write == 2
            assert gone
        else:
            assert block.held_by("h")
            assert gone != only_empty
            assert affinities(store) == ([] if gone else [MINE])
            Records(store).delete_block(Records(store).block(NET))  # type: ignore[arg-type]


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize("write", range(3))
def test_a_claim_during_a_release_of_the_same_node(
    store: SqliteDatastore, write: int, in_use: bool
) -> None:
    claims.claim(Records(store), "n1", NET)
    if in_use:
        use_an_address(store)
    mine: list[bool] = []

    def other() -> None:
        mine.append(claims.claim(Records(store), "n1", NET) is not None)
        if in_use and write < 2:
            assert blocks(store)[NET].held_by("h")

    claims.release(Records(overtaken_at(store, write, other)), "n1", NET)
    assert mine == [not (in_use and write == 2)]
    assert affinities(store) == []
    assert NET not in blocks(store) or blocks(store)[NET].affinity is None


@pytest.mark.parametrize("state", ["", PENDING, PENDING_DELETION])
def test_states_that_others_wrote(store: SqliteDatastore, state: str) -> None:
    records = Records(store)
    affinity = records.create_affinity("n1", NET, PENDING)
    records.write_affinity(affinity, state)
    [read] = records.affinities("n1")
    assert read.thing.state == (state or CONFIRMED)
    assert claims.claim(records, "n1", NET)
    assert affinities(store) == [MINE]


@pytest.mark.parametrize("kind", ["IPAMBlock", "BlockAffinity"])
def test_an_object_marked_deleted_counts_as_gone(store: SqliteDatastore, kind: str) -> None:
    records = Records(store)
    claims.claim(records, "n1", NET)
    [entry] = store.list(kind).entries
    entry.value["spec"]["deleted"] = True
    store.update(entry.key, entry.value)
    assert (records.block(NET) is None) == (kind == "IPAMBlock")
    assert (records.affinities("n1") == []) == (kind == "BlockAffinity")
    assert claims.claim(records, "n1", NET)
    assert affinities(store) == [MINE]


def test_affinities_of_a_node_are_not_those_of_its_namesakes(store: SqliteDatastore) -> None:
    records = Records(store)
    records.create_affinity("n1", NET, CONFIRMED)
    records.create_affinity("n1-10", parse_net("10.0.0.0/26"), CONFIRMED)
    records.create_affinity("n11", parse_net("10.0.0.128/26"), CONFIRMED)
    assert [stored.thing for stored in records.affinities("n1")] == [MINE]


@pytest.mark.parametrize(
    ("there", "wanted", "overlaps"),
    [
        ("10.0.0.64/28", "10.0.0.64/26", True),
        ("10.0.0.112/28", "10.0.0.64/26", True),
        ("10.0.0.127/32", "10.0.0.64/26", True),
        ("10.0.0.128/28", "10.0.0.64/26", False),
        ("10.0.1.64/28", "10.0.0.64/26", False),
        ("10.0.0.0/24", "10.0.0.64/26", True),
        ("10.0.0.0/20", "10.0.7.64/26", True),
        ("10.0.0.0/20", "10.0.16.64/26", False),
        ("10.0.5.192/26", "10.0.0.0/20", True),
        ("10.0.16.0/26", "10.0.0.0/20", False),
        ("10.0.0.0/22", "10.0.0.0/20", True),
        ("fd00::40/124", "fd00::40/122", True),
        ("fd00::/128", "fd00::/122", True),
        ("fd00::1000/124", "fd00::/122", False),
        ("fd00::1240/128", "fd00::1200/120", True),
        ("fd00::1340/128", "fd00::1200/120", False),
        ("fd00::1f40/122", "fd00::1000/116", True),
        ("fd00::1000/116", "fd00::1f40/122", True),
        ("fd00:0:0:1::/124", "fd00:0:0:1::/122", True),
        ("1:2:3:4:5:6:0:40/124", "1:2:3:4:5:6:0:40/122", True),
        ("1:2:3:4:5:6:7:0/124", "1:2:3:4:5:6:7:0/122", True),
        ("1:0:0:0:1:0:0:8/126", "1:0:0:0:1:0:0:0/122", True),
    ],
)
def test_a_block_over_others_of_another_size_is_not_made(
    store: SqliteDatastore, there: str, wanted: str, overlaps: bool
) -> None:
    """As a pool would have it that was deleted while in use, and came back with other blocks."""
    records = Records(store)
    records.create_block(Block.new(parse_net(there), owner("n2"), 1, None))
    found = [stored.thing.net for stored in claims.overlapping(records, parse_net(wanted))]
    assert set(found) == ({parse_net(there)} if overlaps else set())
    assert (claims.claim(records, "n1", parse_net(wanted)) is None) == overlaps
    assert ("n1" in {affinity.node for affinity in affinities(store)}) != overlaps


def test_a_claim_costs_the_same_however_many_blocks_there_are(store: SqliteDatastore) -> None:
    costs = []
    for count in (0, 100, 1000):
        for number in range(len(blocks(store)), count):
            net = parse_net(f"10.{number // 256}.{number % 256}.0/26")
            Records(store).create_block(Block.new(net, owner("n2"), 1, None))
        counting = Interposed(store)
        claims.claim(Records(counting), "n1", parse_net(f"10.9.{count % 256}.0/26"))
        costs.append(counting.reads)
    assert costs[0] == costs[1] == costs[2] < 15


def test_endless_interference_is_told(store: SqliteDatastore) -> None:
    claims.claim(Records(store), "n1", NET)

    def meddle(_: int) -> None:
        [entry] = store.list("BlockAffinity").entries
        store.update(entry.key, entry.value)

    with pytest.raises(ContentionError, match=r"block 10\.0\.0\.64/26.*try again"):
        claims.claim(Records(Interposed(store, before=meddle)), "n1", NET)


@pytest.mark.parametrize("write", range(3))
@pytest.mark.parametrize("other", ["10.0.0.64/28", "10.0.0.0/24"])
def test_two_nodes_with_different_block_sizes_in_mind(
    store: SqliteDatastore, write: int, other: str
) -> None:
    """As while a pool is made anew: never two confirmed blocks that overlap."""
    theirs: list[bool] = []

    def claim_other() -> None:
        theirs.append(claims.claim(Records(store), "n2", parse_net(other)) is not None)

    mine = claims.claim(Records(overtaken_at(store, write, claim_other)), "n1", NET)
    confirmed = [claim.net for claim in affinities(store) if claim.state == CONFIRMED]
    assert len(confirmed) == (mine is not None) + theirs[0] <= 1
    assert list(blocks(store)) == confirmed
    # whoever tries again gets one
    assert claims.claim(Records(store), "n1", NET) or confirmed == [parse_net(other)]
