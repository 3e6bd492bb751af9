"""How use is told: by pool, by block, by address."""

from __future__ import annotations

from api.net import parse_net
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator
from ipam.utilisation import BlockUse, Holder, PoolUse, holder, utilisation
from tests.ipam.world import add_pool


def test_pools_and_their_blocks(store: SqliteDatastore) -> None:
    assert utilisation(store) == []
    add_pool(store, "a", "10.0.0.0/24", 26)
    add_pool(store, "b", "10.1.0.0/24", 26, disabled=True)
    allocator = Allocator(store, "n1")
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.200"):
        allocator.assign_specific(parse_net(address), address, {"pod": "p"})
    a, b = utilisation(store)
    assert a == PoolUse(
        "a",
        parse_net("10.0.0.0/24"),
        [
            BlockUse(parse_net("10.0.0.0/26"), "host:n1", 2, 62),
            BlockUse(parse_net("10.0.0.192/26"), "host:n1", 1, 63),
        ],
    )
    assert (a.total, a.used, a.free) == (256, 3, 253)
    assert (b.total, b.used, b.free) == (256, 0, 256)


def test_blocks_in_no_pool(store: SqliteDatastore) -> None:
    add_pool(store, "a", "10.0.0.0/24", 26)
    Allocator(store, "n1").assign_specific(parse_net("10.0.0.1"), "h", {})
    store.delete(Key("IPPool", "a"))
    [homeless] = utilisation(store)
    assert (homeless.name, homeless.net) == ("", None)
    assert (homeless.total, homeless.used, homeless.free) == (64, 1, 63)


def test_who_holds_an_address(store: SqliteDatastore) -> None:
    add_pool(store, "a", "10.0.0.0/24", 26)
    Allocator(store, "n1").assign_specific(parse_net("10.0.0.1"), "h", {"pod": "p"})
    assert holder(store, parse_net("10.0.0.1")) == Holder(
        parse_net("10.0.0.0/26"), "h", {"pod": "p"}
    )
    assert holder(store, parse_net("10.0.0.2")) is None
    assert holder(store, parse_net("10.7.0.1")) is None
