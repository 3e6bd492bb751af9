"""Which pools serve a request, and why others don't."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.net import parse_net
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam.errors import NoPoolError
from ipam.pools import Pool, Pools, Request
from tests.ipam.world import add_pool


def request(
    *,
    version: int = 4,
    use: str = "Workload",
    pools: Sequence[str] = (),
    node_labels: Mapping[str, str] | None = None,
    namespace_labels: Mapping[str, str] | None = None,
) -> Request:
    return Request("n1", version, use, pools, lambda: node_labels or {}, namespace_labels)


def usable(store: SqliteDatastore, request: Request) -> list[str]:
    return [pool.name for pool in Pools(store).usable(request)]


def test_every_pool_that_fits_in_the_order_of_names(store: SqliteDatastore) -> None:
    add_pool(store, "b", "10.1.0.0/24", 26)
    add_pool(store, "a", "10.0.0.0/24", 26)
    add_pool(store, "six", "fd00::/64", 122)
    assert usable(store, request()) == ["a", "b"]
    assert usable(store, request(version=6)) == ["six"]


@pytest.mark.parametrize(
    ("spec", "asked", "reason"),
    [
        ({"disabled": True}, request(), "is disabled"),
        ({"allowedUses": ["Tunnel"]}, request(), r"not for Workload .*\(allowedUses: Tunnel\)"),
        ({"assignmentMode": "Manual"}, request(), "must be asked for"),
        ({"nodeSelector": "rack == 'r2'"}, request(node_labels={"rack": "r1"}), "other nodes"),
        ({"namespaceSelector": "team == 'a'"}, request(), "selects other namespaces"),
        (
            {"namespaceSelector": "team == 'a'"},
            request(namespace_labels={"team": "b"}),
            "selects other namespaces",
        ),
        ({}, request(version=6), "there is none"),
    ],
)
def test_a_pool_that_does_not_fit_is_named_with_the_reason(
    store: SqliteDatastore, spec: dict[str, object], asked: Request, reason: str
) -> None:
    add_pool(store, "a", "10.0.0.0/24", 26, **spec)
    with pytest.raises(NoPoolError, match=f"no IPv{asked.version} pool.*n1.*{reason}"):
        Pools(store).usable(asked)
    if asked.version == 4:
        add_pool(store, "b", "10.1.0.0/24", 26)
        assert usable(store, asked) == ["b"]


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ({"allowedUses": ["Tunnel"]}, request(use="Tunnel")),
        ({"nodeSelector": "rack == 'r1'"}, request(node_labels={"rack": "r1"})),
        ({"namespaceSelector": "team == 'a'"}, request(namespace_labels={"team": "a"})),
        ({"assignmentMode": "Manual"}, request(pools=["a"])),
        ({"nodeSelector": "rack == 'r2'"}, request(pools=["10.0.0.0/24"])),
        ({"namespaceSelector": "team == 'a'"}, request(pools=["a", "10.0.0.0/24"])),
    ],
)
def test_a_pool_that_fits(store: SqliteDatastore, spec: dict[str, object], asked: Request) -> None:
    add_pool(store, "a", "10.0.0.0/24", 26, **spec)
    assert set(usable(store, asked)) == {"a"}


def test_pools_that_are_asked_for_in_that_order(store: SqliteDatastore) -> None:
    for number, name in enumerate("abc"):
        add_pool(store, name, f"10.{number}.0.0/24", 26)
    assert usable(store, request(pools=["c", "10.0.0.0/24"])) == ["c", "a"]


@pytest.mark.parametrize(
    ("wanted", "spec", "reason"),
    [
        ("x", {}, r"does not exist: 'x'; IPv4 pools: a \(10.0.0.0/24\)"),
        ("10.0.0.0/25", {}, "does not exist"),
        ("six", {}, "does not exist"),
        ("a", {"disabled": True}, r"a \(10.0.0.0/24\) is disabled"),
        ("a", {"allowedUses": ["Tunnel"]}, "is not for Workload"),
    ],
)
def test_a_pool_that_is_asked_for_in_vain(
    store: SqliteDatastore, wanted: str, spec: dict[str, object], reason: str
) -> None:
    add_pool(store, "a", "10.0.0.0/24", 26, **spec)
    add_pool(store, "six", "fd00::/64", 122)
    with pytest.raises(NoPoolError, match=reason):
        Pools(store).usable(request(pools=[wanted]))


def test_a_malformed_pool_is_left_out_and_told_once(
    store: SqliteDatastore, caplog: pytest.LogCaptureFixture
) -> None:
    add_pool(store, "bad", "10.0.0.1/24", 26)
    add_pool(store, "worse", "10.2.0.0/24", 26, nodeSelector="rack ==")
    add_pool(store, "good", "10.1.0.0/24", 26)
    pools = Pools(store)
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            assert [pool.name for pool in pools.usable(request())] == ["good"]
    assert len(caplog.records) == 2
    assert "IPPool bad: spec.cidr: '10.0.0.1/24'" in caplog.text
    assert "rack ==" in caplog.text


def test_a_changed_pool_counts_at_once(store: SqliteDatastore) -> None:
    add_pool(store, "a", "10.0.0.0/24", 26)
    pools = Pools(store)
    assert pools.usable(request())
    value = store.get(Key("IPPool", "a")).value
    value["spec"]["disabled"] = True
    store.update(Key("IPPool", "a"), value)
    with pytest.raises(NoPoolError):
        pools.usable(request())


@given(st.text("abc", min_size=1), st.integers(0, 6), st.sampled_from([4, 6]))
def test_every_block_is_visited_once(node: str, bits: int, version: int) -> None:
    cidr, length = ("10.64.0.0/20", 20 + bits) if version == 4 else ("fd00::/116", 116 + bits)
    pool = Pool("a", parse_net(cidr), length, (), False, True, None, None)
    visited = list(pool.blocks(node))
    assert len(visited) == len(set(visited)) == 1 << bits
    assert all(pool.net.contains(net) and net.length == length for net in visited)
    assert visited == list(pool.blocks(node))


def test_nodes_begin_at_different_blocks() -> None:
    pool = Pool("a", parse_net("10.0.0.0/16"), 26, (), False, True, None, None)
    first = {next(pool.blocks(f"node-{number}")) for number in range(100)}
    assert len(first) > 80
    vast = Pool("b", parse_net("fd00::/48"), 122, (), False, True, None, None)
    assert len({next(vast.blocks(f"node-{number}")) for number in range(100)}) == 100
