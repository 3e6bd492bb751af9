"""What an Allocator gives, from where, and what it says when it can't."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import orjson
import pytest

from api.names import cidr_name
from api.net import Net, parse_net
from api.registry import parse_as
from datastore.follower import Follower
from datastore.interface import JSON, ConflictError, Datastore, Entry, Key, UnavailableError
from datastore.sqlite import SqliteDatastore
from ipam import claims
from ipam.allocator import (
    AddressInUseError,
    AddressUnusableError,
    Allocator,
    BlockLimitError,
    ContentionError,
    IpamError,
    NoPoolError,
    PoolExhaustedError,
    ReleaseError,
)
from ipam.block import Block
from ipam.records import CONFIRMED, Records, owner
from tests.ipam.world import (
    Grouping,
    Interposed,
    add_pool,
    affinities,
    allocated,
    blocks,
    check_consistency,
    configure,
    handles,
    overtaken_at,
    reserve,
    until,
    until_heard,
)

HANDLE = "k8s-pod-network.0123abc"
POD = {"pod": "web", "namespace": "default", "node": "n1"}


@pytest.fixture
def small(store: SqliteDatastore) -> SqliteDatastore:
    """A store with one pool of four blocks of four addresses."""
    add_pool(store, "small", "10.0.0.0/28", 30)
    return store


def fill(store: SqliteDatastore, node: str, count: int, **options: object) -> list[Net]:
    allocator = Allocator(store, node)
    return [
        allocator.assign(f"{node}-{number}", POD, **options).address  # type: ignore[arg-type]
        for number in range(count)
    ]


# --- assign ---


def test_first_address_of_a_node(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.244.0.0/16", 26)
    found = Allocator(store, "n1").assign(HANDLE, POD)
    assert found.pool == "pool"
    assert found.block.length == 26
    assert found.address == Net(4, found.block.address, 32)
    assert allocated(store) == {found.address: HANDLE}
    assert blocks(store)[found.block].attributes == [{"handle_id": HANDLE, "secondary": POD}]
    handle = store.get(Key("IPAMHandle", HANDLE)).value
    parse_as("IPAMHandle", handle)
    assert handle["spec"] == {
        "handleID": HANDLE,
        "block": {str(found.block): 1},
        "deleted": False,
    }


def test_own_block_is_used_up_before_another_is_claimed(small: SqliteDatastore) -> None:
    given = fill(small, "n1", 5)
    assert len(set(given)) == 5
    assert len(blocks(small)) == 2
    assert len(affinities(small)) == 2
    assert given[:4] == sorted(given[:4])


def test_an_address_that_was_released_rests_longest(small: SqliteDatastore) -> None:
    allocator = Allocator(small, "n1")
    first, *_ = fill(small, "n1", 2)
    allocator.release("n1-0")
    later = [allocator.assign(f"later-{number}", {}).address for number in range(3)]
    assert later[-1] == first


def test_nodes_have_blocks_of_their_own(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.0.0.0/24", 28)
    for node in ("n1", "n2", "n3"):
        fill(store, node, 3)
    assert sorted(affinity.node for affinity in affinities(store)) == ["n1", "n2", "n3"]
    assert {block.affinity for block in blocks(store).values()} == {
        owner("n1"),
        owner("n2"),
        owner("n3"),
    }


def test_both_families_for_one_handle(store: SqliteDatastore) -> None:
    add_pool(store, "four", "10.0.0.0/24", 26)
    add_pool(store, "six", "fd00:10::/64", 122)
    allocator = Allocator(store, "n1")
    four = allocator.assign(HANDLE, POD)
    six = allocator.assign(HANDLE, POD, version=6)
    assert (four.address.version, six.address.version) == (4, 6)
    assert six.address.is_host
    assert set(allocator.addresses(HANDLE)) == {four.address, six.address}
    assert set(allocator.release(HANDLE)) == {four.address, six.address}


def test_tunnel_addresses_come_from_pools_that_allow_them(store: SqliteDatastore) -> None:
    add_pool(store, "pods", "10.0.0.0/24", 26, allowedUses=["Workload"])
    add_pool(store, "tunnels", "10.1.0.0/24", 32, allowedUses=["Tunnel"])
    allocator = Allocator(store, "n1")
    tunnel = allocator.assign("vxlan-tunnel-addr-n1", {"type": "vxlanTunnelAddress"}, use="Tunnel")
    assert (tunnel.pool, tunnel.block.length) == ("tunnels", 32)
    assert allocator.assign(HANDLE, POD).pool == "pods"


def test_labels_come_from_the_node_object_unless_given(store: SqliteDatastore) -> None:
    add_pool(store, "r1", "10.1.0.0/24", 26, nodeSelector="rack == 'r1'")
    add_pool(store, "r2", "10.2.0.0/24", 26, nodeSelector="rack == 'r2'")
    allocator = Allocator(store, "n1")
    with pytest.raises(NoPoolError, match="selects other nodes"):
        allocator.assign(HANDLE, POD)
    store.create(Key("Node", "n1"), {"metadata": {"name": "n1", "labels": {"rack": "r2"}}})
    assert allocator.assign(HANDLE, POD).pool == "r2"
    assert allocator.assign(HANDLE, POD, labels={"rack": "r1"}).pool == "r1"
    assert allocator.assign(HANDLE, POD, pools=["r1"]).pool == "r1"


def test_own_blocks_in_pools_that_do_not_fit_are_left_alone(store: SqliteDatastore) -> None:
    add_pool(store, "a", "10.0.0.0/24", 26)
    allocator = Allocator(store, "n1")
    allocator.assign("one", POD)
    add_pool(store, "b", "10.1.0.0/24", 26)
    pool = store.get(Key("IPPool", "a"))
    pool.value["spec"]["disabled"] = True
    store.update(pool.key, pool.value)
    assert allocator.assign("two", POD).pool == "b"


def test_pools_are_used_one_after_the_other(small: SqliteDatastore) -> None:
    add_pool(small, "tail", "10.1.0.0/28", 30)
    given = fill(small, "n1", 32)
    assert len(set(given)) == 32
    small_net = parse_net("10.0.0.0/28")
    assert [small_net.contains(address) for address in given] == [True] * 16 + [False] * 16


def test_block_left_half_claimed_is_finished_first(small: SqliteDatastore) -> None:
    net = parse_net("10.0.0.8/30")
    Records(small).create_affinity("n1", net, "pending")
    assert Allocator(small, "n1").assign(HANDLE, POD).block == net
    assert [affinity.state for affinity in affinities(small)] == ["confirmed"]


def test_a_claim_that_is_another_s_in_truth_is_dropped(small: SqliteDatastore) -> None:
    net = parse_net("10.0.0.8/30")
    claims.claim(Records(small), "n2", net)
    Records(small).create_affinity("n1", net, "confirmed")
    assert Allocator(small, "n1").assign(HANDLE, POD).block != net
    assert {(a.node, a.net) for a in affinities(small)} >= {("n2", net)}
    assert ("n1", net) not in {(a.node, a.net) for a in affinities(small)}


# --- when there is no free block ---


def test_borrowing_from_others(small: SqliteDatastore) -> None:
    for node in ("n2", "n3", "n4", "n5"):
        fill(small, node, 1)
    given = fill(small, "n1", 12)
    assert len(set(given)) == 12
    assert {affinity.node for affinity in affinities(small)} == {"n2", "n3", "n4", "n5"}
    with pytest.raises(
        PoolExhaustedError, match=r"node n1: pool small \(10\.0\.0\.0/28\) has no free address: .*"
    ):
        Allocator(small, "n1").assign(HANDLE, POD)
    assert HANDLE not in handles(small)


def test_no_borrowing_with_strict_affinity(small: SqliteDatastore) -> None:
    configure(small, strictAffinity=True)
    for node in ("n2", "n3", "n4", "n5"):
        fill(small, node, 1)
    with pytest.raises(PoolExhaustedError, match=r"strictAffinity.*create another IPPool"):
        Allocator(small, "n1").assign(HANDLE, POD)
    assert HANDLE not in handles(small)
    assert "n1" not in {affinity.node for affinity in affinities(small)}


def test_empty_block_of_another_is_taken_over_after_a_minute(small: SqliteDatastore) -> None:
    configure(small, strictAffinity=True)
    for node in ("n2", "n3", "n4", "n5"):
        fill(small, node, 1)
    Allocator(small, "n3").release("n3-0")
    with pytest.raises(PoolExhaustedError):
        Allocator(small, "n1").assign(HANDLE, POD)
    [entry] = [
        entry
        for entry in small.list("IPAMBlock").entries
        if entry.value["spec"]["affinity"] == "host:n3"
    ]
    then = datetime.now(UTC) - timedelta(seconds=61)
    entry.value["spec"]["affinityClaimTime"] = then.strftime("%Y-%m-%dT%H:%M:%SZ")
    small.update(entry.key, entry.value)
    found = Allocator(small, "n1").assign(HANDLE, POD)
    assert str(found.block) == entry.value["spec"]["cidr"]
    assert {affinity.node for affinity in affinities(small)} == {"n1", "n2", "n4", "n5"}
    check_consistency(small)


@pytest.mark.parametrize(
    ("claimed", "taken_over"),
    [
        ("yesterday", True),
        (5, True),
        ("2026-01-01T00:00:00", True),  # without a zone
        ("2999-01-01T00:00:00", False),
    ],
)
def test_times_of_claims_that_others_wrote(
    small: SqliteDatastore, claimed: object, taken_over: bool
) -> None:
    """One that makes no sense is as good as none, and keeps nobody from an address."""
    fill(small, "n1", 16)
    emptied, *_ = blocks(small)
    allocator = Allocator(small, "n2")
    allocator.release_addresses([Net(4, emptied.address + number, 32) for number in range(4)])
    entry = small.get(Key("IPAMBlock", cidr_name(emptied)))
    entry.value["spec"]["affinityClaimTime"] = claimed
    small.update(entry.key, entry.value)
    given = allocator.assign("h", POD)
    assert given.block == emptied
    assert (blocks(small)[emptied].affinity == owner("n2")) == taken_over


def test_limit_of_blocks_is_an_error_not_a_reason_to_borrow(small: SqliteDatastore) -> None:
    configure(small, strictAffinity=True, maxBlocksPerHost=2)
    fill(small, "n2", 1)
    fill(small, "n1", 8)
    with pytest.raises(BlockLimitError, match=r"2 blocks.*no more than 2; raise maxBlocksPerHost"):
        Allocator(small, "n1").assign(HANDLE, POD)
    assert HANDLE not in handles(small)


def test_limit_of_blocks_unless_set(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.0.0.0/24", 31)
    fill(store, "n1", 40)
    with pytest.raises(BlockLimitError, match="no more than 20"):
        Allocator(store, "n1").assign(HANDLE, POD)


def test_blocks_only_as_given_beforehand(small: SqliteDatastore) -> None:
    configure(small, autoAllocateBlocks=False)
    with pytest.raises(PoolExhaustedError, match="autoAllocateBlocks is false"):
        Allocator(small, "n1").assign(HANDLE, POD)
    claims.claim(Records(small), "n1", parse_net("10.0.0.8/30"))
    assert Allocator(small, "n1").assign(HANDLE, POD).block == parse_net("10.0.0.8/30")


def test_pool_made_again_with_another_block_size(store: SqliteDatastore) -> None:
    """Blocks of the old size are used on; no new one ever lies over them."""
    add_pool(store, "pool", "10.0.0.0/26", 28)
    before = fill(store, "old", 1) + fill(store, "n1", 1)
    store.delete(Key("IPPool", "pool"))
    add_pool(store, "pool", "10.0.0.0/26", 29)
    after = fill(store, "n2", 20) + fill(store, "n1", 15, version=4)[1:]
    assert len({*before, *after}) == len(before) + len(after)
    check_consistency(store)


def test_reserved_addresses_are_not_given_but_may_be_asked_for(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.0.0.0/29", 30)
    reserve(store, "10.0.0.2/31", "10.0.0.5/32")
    given = fill(store, "n1", 5)
    assert not {parse_net("10.0.0.2"), parse_net("10.0.0.3"), parse_net("10.0.0.5")} & set(given)
    with pytest.raises(PoolExhaustedError):
        Allocator(store, "n1").assign(HANDLE, POD)
    assert HANDLE not in handles(store)
    found = Allocator(store, "n1").assign_specific(parse_net("10.0.0.2"), HANDLE, POD)
    assert found.address == parse_net("10.0.0.2")


def test_a_block_that_is_all_reserved_is_not_claimed(small: SqliteDatastore) -> None:
    reserve(small, "10.0.0.0/29", "10.0.0.8/31", "10.0.0.10/31", "10.0.0.8/32")
    assert {address.address & 12 for address in fill(small, "n1", 4)} == {12}
    assert [str(net) for net in blocks(small)] == ["10.0.0.12/30"]
    with pytest.raises(PoolExhaustedError):
        Allocator(small, "n1").assign(HANDLE, POD)


def test_an_ipv6_pool_that_is_all_reserved(store: SqliteDatastore) -> None:
    """It has more blocks than can be counted through."""
    add_pool(store, "six", "fd00::/64", 122)
    reserve(store, "fd00::/65", "fd00:0:0:0:8000::/65")
    with pytest.raises(PoolExhaustedError):
        Allocator(store, "n1").assign(HANDLE, POD, version=6)


def test_what_is_malformed_in_a_reservation_is_left_out_and_told(
    small: SqliteDatastore, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest of it is honoured, single addresses as Calico's own examples have them, too."""
    reserve(small, "10.0.0.3", "10.0.0.300", "10.0.0.5/31", " 10.0.0.9/32")
    [entry] = small.list("IPReservation").entries
    entry.value["spec"]["ofANewerCalico"] = True
    small.update(entry.key, entry.value)
    given = set(map(str, fill(small, "n1", 12)))
    assert given == {f"10.0.0.{n}/32" for n in range(16) if n not in (3, 4, 5, 9)}
    assert "not honoured: '10.0.0.300'" in caplog.text


def test_addresses_rest_for_the_cooldown(small: SqliteDatastore) -> None:
    configure(small, ipCooldownSeconds=600)
    allocator = Allocator(small, "n1")
    given = [allocator.assign(str(number), POD).address for number in range(16)]
    assert allocator.release("3") == [given[3]]
    assert "3" not in handles(small)
    with pytest.raises(PoolExhaustedError):
        allocator.assign(HANDLE, POD)
    with pytest.raises(AddressInUseError, match=r"released at 20.* rests \(ipCooldownSeconds\)"):
        allocator.assign_specific(given[3], HANDLE, POD)
    [entry] = [e for e in small.list("IPAMBlock").entries if "releasedAt" in str(e.value)]
    for attribute in entry.value["spec"]["attributes"]:
        if "releasedAt" in attribute:
            attribute["releasedAt"] = "2026-01-01T00:00:00Z"
    small.update(entry.key, entry.value)
    assert allocator.assign(HANDLE, POD).address == given[3]


def test_an_empty_block_whose_addresses_have_rested_is_taken_over(small: SqliteDatastore) -> None:
    configure(small, ipCooldownSeconds=600, strictAffinity=True)
    for node in ("n2", "n3", "n4", "n5"):
        fill(small, node, 1)
    Allocator(small, "n3").release("n3-0")
    [entry] = [e for e in small.list("IPAMBlock").entries if "releasedAt" in str(e.value)]
    entry.value["spec"]["affinityClaimTime"] = "2026-01-01T00:00:00Z"
    small.update(entry.key, entry.value)
    with pytest.raises(PoolExhaustedError):
        Allocator(small, "n1").assign(HANDLE, POD)
    entry = small.get(entry.key)
    entry.value["spec"]["attributes"] = [{"releasedAt": "2026-01-01T00:00:00Z"}]
    small.update(entry.key, entry.value)
    assert str(Allocator(small, "n1").assign(HANDLE, POD).block) == entry.value["spec"]["cidr"]
    check_consistency(small)


def test_load_balancers_have_blocks_of_their_own(store: SqliteDatastore) -> None:
    add_pool(store, "lb", "10.0.0.0/28", 30, allowedUses=["LoadBalancer"])
    allocator = Allocator(store, "n1")
    found = allocator.assign("lb-0123", {"service": "web"}, use="LoadBalancer")
    assert blocks(store)[found.block].affinity == "virtual:load-balancer"
    name = f"load-balancer-{store.list('IPAMBlock').entries[0].key.name}"
    affinity = store.get(Key("BlockAffinity", name)).value
    parse_as("BlockAffinity", affinity)
    assert affinity["spec"]["type"] == "virtual"
    again = Allocator(store, "n2").assign("lb-4567", {}, use="LoadBalancer")
    assert again.block == found.block, "whoever asks"
    wanted = parse_net("10.0.0.15")
    if wanted not in (found.address, again.address):
        allocator.assign_specific(wanted, "lb-89", {}, use="LoadBalancer")
    assert {block.affinity for block in blocks(store).values()} == {"virtual:load-balancer"}
    with pytest.raises(AddressUnusableError, match="not for Workload addresses"):
        allocator.assign_specific(parse_net("10.0.0.1"), HANDLE, POD, use="Workload")
    with pytest.raises(NoPoolError):
        allocator.assign(HANDLE, POD)


def test_several_addresses_or_none(small: SqliteDatastore) -> None:
    allocator = Allocator(small, "n1")
    given = allocator.assign_many(10, HANDLE, POD)
    assert len({assignment.address for assignment in given}) == 10
    assert sorted(handles(small)[HANDLE].counts.values()) == [2, 4, 4]
    before = allocated(small)
    with pytest.raises(PoolExhaustedError):
        allocator.assign_many(7, "other", POD)
    with pytest.raises(PoolExhaustedError):
        allocator.assign_many(7, HANDLE, POD)
    assert allocated(small) == before
    assert set(handles(small)) == {HANDLE}
    assert sum(handles(small)[HANDLE].counts.values()) == 10
    assert len(allocator.assign_many(6, "other", POD)) == 6


def test_an_empty_block_is_given_up_when_its_pool_no_longer_selects_the_node(
    store: SqliteDatastore,
) -> None:
    add_pool(store, "r1", "10.0.0.0/28", 30, nodeSelector="rack == 'r1'")
    add_pool(store, "r2", "10.1.0.0/28", 30, nodeSelector="rack == 'r2'")
    allocator = Allocator(store, "n1")
    allocator.assign(HANDLE, POD, labels={"rack": "r1"})
    allocator.assign("in r2", POD, labels={"rack": "r2"})
    assert len(blocks(store)) == 2
    allocator.release(HANDLE)
    for number in range(4):
        allocator.assign(str(number), POD, labels={"rack": "r2"})
    r1 = parse_net("10.0.0.0/28")
    assert not [net for net in blocks(store) if r1.contains(net)]
    check_consistency(store)


# --- release and addresses ---


def test_release_is_idempotent_and_complete(small: SqliteDatastore) -> None:
    allocator = Allocator(small, "n1")
    assert allocator.addresses(HANDLE) == []
    assert allocator.release(HANDLE) == []
    given = {allocator.assign(HANDLE, POD).address for _ in range(6)}  # in two blocks
    assert set(allocator.addresses(HANDLE)) == given
    assert sorted(handles(small)[HANDLE].counts.values()) == [2, 4]
    assert set(Allocator(small, "n2").release(HANDLE)) == given
    assert allocator.release(HANDLE) == []
    assert allocator.addresses(HANDLE) == []
    assert handles(small) == {}
    assert len(blocks(small)) == 2, "blocks stay with their node"


def test_release_leaves_others_alone(small: SqliteDatastore) -> None:
    allocator = Allocator(small, "n1")
    mine = allocator.assign("mine", POD).address
    other = allocator.assign("other", POD).address
    assert allocator.release("mine") == [mine]
    assert allocated(small) == {other: "other"}


def test_block_without_owner_goes_with_its_last_address(small: SqliteDatastore) -> None:
    allocator = Allocator(small, "n1")
    found = allocator.assign(HANDLE, POD)
    claims.release(Records(small), "n1", found.block)
    assert allocator.release(HANDLE) == [found.address]
    assert blocks(small) == {}


def test_handle_of_which_a_block_is_gone(small: SqliteDatastore) -> None:
    allocator = Allocator(small, "n1")
    found = allocator.assign(HANDLE, POD)
    small.delete(Key("BlockAffinity", f"n1-{small.list('IPAMBlock').entries[0].key.name}"))
    small.delete(small.list("IPAMBlock").entries[0].key)
    assert allocator.addresses(HANDLE) == []
    assert allocator.release(HANDLE) == []
    assert handles(small) == {}
    assert allocator.assign(HANDLE, POD).address == found.address


def test_handles_that_differ_in_case_are_kept_apart(small: SqliteDatastore) -> None:
    """They would be one object, which is named in lower case."""
    allocator = Allocator(small, "n1")
    found = allocator.assign("net.ABC", POD)
    small.get(Key("IPAMHandle", "net.abc"))
    assert allocator.addresses("net.ABC") == [found.address]
    assert allocator.addresses("net.abc") == []
    assert allocator.release("net.abc") == []
    with pytest.raises(IpamError, match=r"differs only in case from net\.ABC"):
        allocator.assign("net.abc", POD)
    assert allocated(small) == {found.address: "net.ABC"}


def test_release_overtakes_an_assign_for_the_same_handle(small: SqliteDatastore) -> None:
    """Nothing may be held that a later release would not find."""
    Allocator(small, "n1").assign("first", POD)
    for write in range(3):
        overtaken = overtaken_at(small, write, lambda: Allocator(small, "n1").release(HANDLE))
        found = Allocator(overtaken, "n1").assign(HANDLE, POD)
        assert Allocator(small, "n1").addresses(HANDLE) == [found.address]
        assert Allocator(small, "n1").release(HANDLE) == [found.address]


# --- some addresses, whoever holds them ---


def test_some_addresses_are_released(small: SqliteDatastore) -> None:
    allocator = Allocator(small, "n1")
    given = [allocator.assign(HANDLE, POD).address for _ in range(6)]
    free = parse_net("10.9.9.9")
    assert allocator.release_addresses([*given[2:5], free]) == given[2:5]
    assert set(allocated(small)) == {*given[:2], given[5]}
    assert sum(handles(small)[HANDLE].counts.values()) == 3
    assert allocator.release_addresses(given) == [*given[:2], given[5]]
    assert handles(small) == {}


def test_addresses_that_were_given_anew_are_not_released(small: SqliteDatastore) -> None:
    allocator = Allocator(small, "n1")
    found = allocator.assign(HANDLE, POD)
    sequences = {found.address: next(iter(blocks(small)[found.block].sequences.values()))}
    with pytest.raises(ReleaseError, match="not by 'other'"):
        allocator.release_addresses([found.address], handle="other")
    allocator.release(HANDLE)
    allocator.assign_specific(found.address, HANDLE, POD)
    with pytest.raises(ReleaseError, match="sequence number"):
        allocator.release_addresses([found.address], handle=HANDLE, sequences=sequences)
    assert allocated(small) == {found.address: HANDLE}


# --- this very address ---


def test_specific_address_claims_its_block(small: SqliteDatastore) -> None:
    allocator = Allocator(small, "n1")
    wanted = parse_net("10.0.0.6")
    found = allocator.assign_specific(wanted, HANDLE, POD)
    assert (found.address, found.block, found.pool) == (wanted, parse_net("10.0.0.4/30"), "small")
    assert allocated(small) == {wanted: HANDLE}
    assert blocks(small)[found.block].affinity == "host:n1"
    assert allocator.addresses(HANDLE) == [wanted]


def test_specific_address_of_another_node_s_block(small: SqliteDatastore) -> None:
    claims.claim(Records(small), "n2", parse_net("10.0.0.4/30"))
    wanted = parse_net("10.0.0.6")
    assert Allocator(small, "n1").assign_specific(wanted, HANDLE, POD).address == wanted
    configure(small, strictAffinity=True)
    with pytest.raises(AddressUnusableError, match=r"belongs to host:n2.*strictAffinity"):
        Allocator(small, "n1").assign_specific(parse_net("10.0.0.5"), HANDLE, POD)


def test_specific_address_in_use(small: SqliteDatastore) -> None:
    wanted = parse_net("10.0.0.6")
    Allocator(small, "n1").assign_specific(wanted, HANDLE, POD)
    with pytest.raises(AddressInUseError, match=rf"10\.0\.0\.6: is held by {HANDLE}.*web"):
        Allocator(small, "n1").assign_specific(wanted, "other", POD)
    assert "other" not in handles(small)


@pytest.mark.parametrize(
    ("address", "reason"), [("10.9.0.1", "lies in no IPPool"), ("10.1.0.1", "off .* is disabled")]
)
def test_specific_address_without_a_pool(small: SqliteDatastore, address: str, reason: str) -> None:
    add_pool(small, "off", "10.1.0.0/24", 26, disabled=True)
    with pytest.raises(AddressUnusableError, match=rf"{address}: .*{reason}"):
        Allocator(small, "n1").assign_specific(parse_net(address), HANDLE, POD)


@pytest.mark.parametrize("write", range(5))
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_specific_address_whose_block_is_claimed_meanwhile(
    small: SqliteDatastore, write: int, node: str
) -> None:
    net = parse_net("10.0.0.4/30")
    overtaken = overtaken_at(small, write, lambda: claims.claim(Records(small), node, net))
    wanted = parse_net("10.0.0.6")
    assert Allocator(overtaken, "n1").assign_specific(wanted, HANDLE, POD).address == wanted
    assert allocated(small) == {wanted: HANDLE}
    assert handles(small)[HANDLE].counts == {net: 1}
    check_consistency(small)


def test_specific_address_in_a_block_of_an_older_size(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.0.0.0/24", 28)
    Allocator(store, "n1").assign_specific(parse_net("10.0.0.17"), "old", POD)
    store.delete(Key("IPPool", "pool"))
    add_pool(store, "pool", "10.0.0.0/24", 26)
    found = Allocator(store, "n1").assign_specific(parse_net("10.0.0.18"), HANDLE, POD)
    assert found.block == parse_net("10.0.0.16/28")
    with pytest.raises(AddressUnusableError, match=r"smaller ones.*10\.0\.0\.16/28.*blockSize"):
        Allocator(store, "n1").assign_specific(parse_net("10.0.0.40"), HANDLE, POD)


# --- others at work, and errors ---


def test_threads_of_a_node_get_different_addresses(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.0.0.0/24", 28)
    allocator = Allocator(store, "n1")
    given: list[Net] = []

    def work(number: int) -> None:
        for i in range(5):
            handle = f"{number}-{i}"
            address = allocator.assign(handle, POD).address
            if i % 2:
                assert allocator.release(handle) == [address]
            else:
                given.append(address)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(given) == 24
    assert set(given) == set(allocated(store))


def test_endless_interference_is_told(small: SqliteDatastore) -> None:
    Allocator(small, "n1").assign("first", POD)

    class Restless(Interposed):
        def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
            if key.kind == "IPAMBlock":
                raise ConflictError("changed by somebody", key)
            return super().update(key, value, revision)

    with pytest.raises(ContentionError, match=r"block 10\.0\.0\..*100 times.*try again"):
        Allocator(Restless(small), "n1").assign(HANDLE, POD)
    assert HANDLE not in handles(small)


def test_store_that_fails_leaves_what_release_repairs(small: SqliteDatastore) -> None:
    Allocator(small, "n1").assign("first", POD)

    class Failing(Interposed):
        """The answer to the write of a block is lost; the write itself is done."""

        def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
            entry = super().update(key, value, revision)
            if key.kind == "IPAMBlock":
                raise UnavailableError("connection lost")
            return entry

    with pytest.raises(UnavailableError):
        Allocator(Failing(small), "n1").assign(HANDLE, POD)
    assert len(Allocator(small, "n1").addresses(HANDLE)) == 1
    assert len(Allocator(small, "n1").release(HANDLE)) == 1
    assert list(handles(small)) == ["first"]


@pytest.mark.parametrize("contended", [False, True])
def test_an_answer_that_is_lost_does_not_count_twice(
    small: SqliteDatastore, contended: bool
) -> None:
    """Nor does it cost the others theirs, even where it can't be counted anew at once."""
    Allocator(small, "n1").assign("first", POD)

    class Failing(Interposed):
        lost = "a"  # the answer to the creation of this handle
        contended = False

        def create(self, key: Key, value: JSON) -> Entry:
            entry = super().create(key, value)
            if key.name == self.lost:
                self.lost = ""
                raise UnavailableError("connection lost")
            return entry

        def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
            if self.contended and key.kind == "IPAMBlock":
                raise ConflictError("changed by somebody", key)
            self.contended = contended
            return super().update(key, value, revision)

    failing = Failing(small)
    with following(failing, "n1") as allocator:
        assert allocator.assign_each({"a": POD, "b": POD}).keys() == {"b"}
        failing.contended = contended = False
        allocator.assign("a", POD)
        counts = {id_: sum(handle.counts.values()) for id_, handle in handles(small).items()}
        assert counts == dict.fromkeys(["first", "a", "b"], 1)


@pytest.mark.parametrize("landed", ["before", "after", "never"])
def test_a_write_that_nobody_knows_the_end_of(small: SqliteDatastore, landed: str) -> None:
    """Handle and block in one: who gives the handle back is free of it, whenever it is done."""
    late: list[Callable[[], object]] = []

    class Losing(Grouping):
        def update_with(
            self, key: Key, value: JSON, revision: str, objects: Sequence[tuple[Key, JSON]]
        ) -> tuple[Entry, Sequence[Entry]]:
            written = orjson.loads(orjson.dumps(value))
            late.append(lambda: small.update_with(key, written, revision, objects))
            raise UnavailableError("no answer")

    with following(Losing(small, late=False), "n1") as allocator:
        allocator.assign("first", POD)
        assert allocator.assign_each({"a": POD, "b": POD}) == {}
        [write] = late
        if landed == "before":
            write()
        released = [*allocator.release("a"), *allocator.release("b")]
        assert len(released) == (2 if landed == "before" else 0)
        if landed == "after":
            with pytest.raises(ConflictError):
                write()
        assert handles(small).keys() == {"first"}
        assert len(allocated(small)) == 1
        revision = small.list("IPAMBlock").revision
        assert allocator.release("a") == []  # of which nothing is to be feared any more
        assert small.list("IPAMBlock").revision == revision
        check_consistency(small)


def test_who_is_not_new_keeps_nobody_from_beginning(small: SqliteDatastore) -> None:
    """A handle that is there is refused alone, and the others are begun with their block."""
    writes: list[int] = []

    class Counting(Grouping):
        def update_with(
            self, key: Key, value: JSON, revision: str, objects: Sequence[tuple[Key, JSON]]
        ) -> tuple[Entry, Sequence[Entry]]:
            result = super().update_with(key, value, revision, objects)
            writes.append(len(objects))
            return result

    with following(Counting(small, late=False), "n1") as allocator:
        allocator.assign("b", POD)
        assert allocator.assign_each({"a": POD, "b": POD, "c": POD}).keys() == {"a", "c"}
        assert writes == [2]
        check_consistency(small)


def test_cost_of_an_address_does_not_grow_with_the_cluster(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.0.0.0/16", 26)
    costs = []
    for nodes in (1, 40, 80):
        for number in range(nodes):
            Allocator(store, f"other-{number}").assign(f"{nodes}-{number}", POD)
        counting = Interposed(store)
        allocator = Allocator(counting, "n1")
        allocator.assign(f"{HANDLE}-{nodes}", POD)  # claims, or not
        counting.reads = counting.writes = 0
        allocator.assign(f"{HANDLE}-{nodes}-b", POD)
        costs.append((counting.reads, counting.writes))
    assert costs == [(3, 2)] * 3  # pools, reservations, affinities; handle, block


def test_a_followed_store_is_only_written_to(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.0.0.0/16", 26)
    counting = Interposed(store)
    with following(counting, "n1") as allocator:
        allocator.assign("first", POD)
        until_heard(allocator, store)  # the news of its claim has come back
        until(lambda: reads(allocator, counting) == 0)
        counting.reads = counting.writes = 0
        allocator.assign("second", POD)
        assert (counting.reads, counting.writes) == (0, 2)  # handle, block
        allocator.release("second")
        assert (counting.reads, counting.writes) == (0, 4)  # block, handle


def test_several_handles_at_once(small: SqliteDatastore) -> None:
    """All in one write for each handle and one of the block; who has an address is left over."""
    with following(small, "n1") as allocator:
        allocator.assign("there", POD)
        until_heard(allocator, small)
        before = int(small.list("IPAMHandle").revision)
        wanted = {name: POD | {"pod": name} for name in ("a", "there", "b", "c", "d")}
        found = allocator.assign_each(wanted)
        assert found.keys() == {"a", "b"}  # the block has three; one was thought of for "there"
        assert int(small.list("IPAMHandle").revision) == before + 3
        given = {assignment.address: handle for handle, assignment in found.items()}
        has = allocated(small)
        assert has.items() >= given.items()
        assert len(has) == 3
        [block] = blocks(small).values()
        assert [block.holder(net)["secondary"]["pod"] for net in given] == ["a", "b"]  # type: ignore[index]
        assert allocator.assign_each({"c": POD, "d": POD}).keys() == {"c"}
        assert allocator.assign_each({"d": POD}) == {}  # its block is full
        counts = {id_: sum(handle.counts.values()) for id_, handle in handles(small).items()}
        assert counts == dict.fromkeys(["there", "a", "b", "c"], 1)
        assert allocator.release("a") == [found["a"].address]


def test_the_follower_of_another_is_as_good(store: SqliteDatastore) -> None:
    """It is asked by its owner alone; then an assign is two writes and no read."""
    add_pool(store, "one", "10.1.0.0/24", 28)
    counting = Interposed(store)
    follower = Follower(store, ["Namespace"], lambda update: None)
    allocator = Allocator(counting, "n1", follower=follower)
    allocator.start()
    assert allocator.assign("h0", {}).pool == "one"  # without it, by asking
    follower.catch_up()
    assert allocator.following
    allocator.assign("h1", {})
    before = counting.writes, counting.reads
    allocator.assign("h2", {})
    assert (counting.writes, counting.reads) == (before[0] + 2, before[1])
    store.delete(Key("IPPool", "one"))
    add_pool(store, "two", "10.2.0.0/24", 28)
    follower.catch_up()
    assert allocator.assign("h3", {}).pool == "two"
    allocator.stop()
    assert follower.in_sync  # it is not ours to stop
    follower.stop()


def test_what_was_followed_is_asked_for_before_a_refusal(store: SqliteDatastore) -> None:
    with following(store, "n1") as allocator:
        with pytest.raises(NoPoolError):
            allocator.assign(HANDLE, POD)
        add_pool(store, "pool", "10.0.0.0/24", 26)
        assert allocator.assign(HANDLE, POD).pool == "pool"


def test_changes_are_followed(store: SqliteDatastore) -> None:
    add_pool(store, "a", "10.0.0.0/24", 26)
    add_pool(store, "b", "10.1.0.0/24", 26)
    with following(store, "n1") as allocator:
        assert allocator.assign("first", POD).pool == "a"
        pool = store.get(Key("IPPool", "a"))
        pool.value["spec"]["disabled"] = True
        store.update(pool.key, pool.value)
        until(lambda: allocator.assign(str(time.monotonic()), POD).pool == "b")
        reserve(store, "10.1.0.0/24")
        until(lambda: refuses(allocator))


def reads(allocator: Allocator, counting: Interposed) -> int:
    """What an assign costs."""
    before = counting.reads
    allocator.assign("first", POD)
    return counting.reads - before


def refuses(allocator: Allocator) -> bool:
    try:
        allocator.assign(HANDLE, POD)
    except PoolExhaustedError:
        return True
    return False


@contextmanager
def following(store: Datastore, node: str) -> Iterator[Allocator]:
    allocator = Allocator(store, node, follow=True)
    allocator.start()
    try:
        until(lambda: allocator.following)
        yield allocator
    finally:
        allocator.stop()


@pytest.mark.parametrize("strict", [False, True])
def test_the_cost_of_a_full_pool_does_not_grow_with_it(
    store: SqliteDatastore, strict: bool
) -> None:
    """All blocks are others', and have addresses left."""
    configure(store, strictAffinity=strict)
    costs = []
    for third, length in ((0, 19), (32, 17)):  # of 128 and 512 blocks
        net = parse_net(f"10.0.{third * 4}.0/{length}")
        add_pool(store, f"pool{length}", str(net), 26)
        populate(store, net, 26)
        counting = Interposed(store)
        with following(counting, "n1") as allocator:
            for _ in range(2):  # a first time for all there is to find out
                counting.reads = 0
                counting.listed.clear()
                try:
                    allocator.assign(HANDLE, POD, pools=[str(net)])
                except PoolExhaustedError:
                    assert strict
            costs.append(counting.reads)
    assert max(costs) <= 64  # some blocks one by one, twice; then lists
    assert "IPAMBlock" not in counting.listed, "that all of a large pool are full is remembered"


def populate(store: SqliteDatastore, pool: Net, length: int) -> None:
    """Blocks of other nodes everywhere, each with an address in use."""
    records = Records(store)
    size = 1 << (32 - length)
    for number in range(pool.size // size):
        net = Net(4, pool.address + number * size, length)
        block = Block.new(net, owner(f"other-{number}"), 1, "2999-01-01T00:00:00Z")
        block.take(1, f"h-{net}", {})
        records.create_block(block)
        records.create_affinity(f"other-{number}", net, CONFIRMED)


def test_threads_are_served_by_one_write(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.0.0.0/24", 26)
    at_work, go_on = threading.Event(), threading.Event()

    class Slow(Interposed):
        """The first write of a block takes until ``go_on``."""

        def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
            if key.kind == "IPAMBlock":
                block_writes.append(key.name)
                at_work.set()
                assert go_on.wait(60)
            return super().update(key, value, revision)

    block_writes: list[str] = []
    allocator = Allocator(Slow(store), "n1")
    Allocator(store, "n1").assign("before", POD)
    given: list[Net] = []
    threads = [
        threading.Thread(target=lambda n=n: given.append(allocator.assign(f"h{n}", POD).address))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    assert at_work.wait(60)
    until(lambda: len(handles(store)) == 21)  # all have counted, and want the block
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(set(given)) == 20
    assert len(block_writes) <= 10
    check_consistency(store)
    assert allocated(store).keys() > set(given)


def test_a_failure_reaches_all_who_wait_for_the_write(store: SqliteDatastore) -> None:
    add_pool(store, "pool", "10.0.0.0/24", 26)
    waiting = threading.Barrier(5)

    class Failing(Interposed):
        def create(self, key: Key, value: JSON) -> Entry:
            entry = super().create(key, value)
            if key.kind == "IPAMHandle":
                waiting.wait(60)
            return entry

        def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
            if key.kind == "IPAMBlock":
                raise UnavailableError("connection lost")
            return super().update(key, value, revision)

    Allocator(store, "n1").assign("before", POD)
    failing = Allocator(Failing(store), "n1")
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            failing.assign(f"h{number}", POD)
        except UnavailableError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(failures) == 5
    for number in range(5):
        assert Allocator(store, "n1").release(f"h{number}") == []
    assert set(handles(store)) == {"before"}
