"""Token buckets and redirections: what is written is read again, and others' stay."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel.links import Links, ifb, link_up, veth
from kernel.netlink import Message, NetlinkSocket
from kernel.netns import Namespace
from kernel.qdiscs import (
    Bucket,
    Qdiscs,
    arriving_add,
    arriving_delete,
    bucket,
    bucket_delete,
    bucket_replace,
    redirect_add,
    redirect_delete,
)
from tests.support.netns import run


def do(netlink: NetlinkSocket, *messages: Message) -> None:
    assert netlink.batch(messages) == []


@pytest.fixture
def wire(netlink: NetlinkSocket) -> int:
    """The index of an interface."""
    do(netlink, veth("near", "far"))
    return Links(netlink).get("near").index


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rate=st.integers(125, 10**15 // 8),
    burst=st.integers(1514, (2**32 - 1)),
    factor=st.sampled_from([0, 0, 2, 1000]),
)
def test_buckets(netlink: NetlinkSocket, rate: int, burst: int, factor: int) -> None:
    """One is made of another in place; what the kernel has is what was asked for."""
    if not Links(netlink).read().keys() & {"near"}:
        do(netlink, veth("near", "far"))
    index = Links(netlink).get("near").index
    wanted = bucket(rate, burst, rate * factor, 9000)
    do(netlink, bucket_replace(index, wanted))
    assert Qdiscs(netlink).buckets() == {index: wanted}
    do(netlink, bucket_replace(index, Bucket(1000, 3000, 1 << 20)))
    assert Qdiscs(netlink).buckets() == {index: Bucket(1000, 3000, 1 << 20)}
    do(netlink, bucket_delete(index))
    assert Qdiscs(netlink).buckets() == {}


def test_buckets_of_others(namespace: Namespace, netlink: NetlinkSocket, wire: int) -> None:
    others = "tc qdisc add dev near root tbf rate 1mbit burst 32k latency 50ms"
    run(namespace, *others.split())
    assert Qdiscs(netlink).buckets() == {}
    assert netlink.batch([bucket_delete(wire)]) != []
    assert "tbf 8" in run(namespace, "tc", "qdisc", "show", "dev", "near").stdout


@pytest.mark.parametrize("kind", ["ingress", "clsact"])
def test_redirections(namespace: Namespace, netlink: NetlinkSocket, wire: int, kind: str) -> None:
    """Beside filters of others, wherever these are."""
    do(netlink, ifb("aside"))
    aside = Links(netlink).get("aside").index
    do(netlink, link_up(aside))
    assert Qdiscs(netlink).redirect(wire) == 0
    run(namespace, "tc", "qdisc", "add", "dev", "near", kind)
    others = "tc filter add dev near ingress pref 7 protocol ip u32 match ip src 192.0.2.1 "
    others += "action mirred egress redirect dev lo"
    run(namespace, *others.split())
    assert netlink.batch([arriving_add(wire)])[0].errno == 17
    assert Qdiscs(netlink).filtered(wire)
    assert Qdiscs(netlink).redirect(wire) == 0
    do(netlink, redirect_add(wire, aside))
    assert Qdiscs(netlink).redirect(wire) == aside
    shown = run(namespace, "tc", "filter", "show", "dev", "near", "ingress").stdout
    assert "pref 19800" in shown
    assert "aside" in shown
    do(netlink, redirect_delete(wire))
    assert Qdiscs(netlink).redirect(wire) == 0
    assert Qdiscs(netlink).filtered(wire)
    do(netlink, arriving_delete(wire))
    assert not Qdiscs(netlink).filtered(wire)
