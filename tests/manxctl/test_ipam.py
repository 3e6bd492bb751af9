"""ipam show, and what deleting a pool means, on addresses that IPAM gave."""

from __future__ import annotations

from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator
from tests.manxctl.conftest import Run
from tests.manxctl.test_files import POOL


def test_nothing_yet(run: Run) -> None:
    assert run("ipam", "show").stdout == "GROUPING   CIDR   IPS TOTAL   IN USE   RESERVED   FREE\n"


def test_show(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POOL)
    run("apply", "-f", "-", stdin=POOL.replace("pods", "six").replace("10.0.0.0/16", "fd00::/64"))
    allocator = Allocator(store, "node-1")
    one = allocator.assign("k8s-pod-network.abc", {"pod": "web", "namespace": "shop"})
    assert run("ipam", "show").stdout.splitlines() == [
        "GROUPING       CIDR          IPS TOTAL    IN USE    RESERVED   FREE",
        "IP pool pods   10.0.0.0/16   65536        1 (<1%)   0 (0%)     65535 (>99%)",
        "IP pool six    fd00::/64     1.8447e+19   0 (0%)    0 (0%)     1.8447e+19 (100%)",
    ]
    lines = run("ipam", "show", "--show-blocks").stdout.splitlines()
    assert lines[0].endswith("FREE                AFFINITY")
    assert " ".join(lines[2].split()) == f"Block {one.block} 64 1 (2%) 0 (0%) 63 (98%) host:node-1"
    address = str(one.address).partition("/")[0]
    assert run("ipam", "show", "--ip", address).stdout.splitlines() == [
        f"{address} is in use",
        f"block: {one.block}",
        "handle: k8s-pod-network.abc",
        "namespace: shop",
        "pod: web",
    ]
    assert run("ipam", "show", "--ip=10.9.9.9").stdout == "10.9.9.9 is not in use\n"
    assert run("ipam", "show", "--ip=10.0.0.0/8").exit_code == 2


def test_a_pool_in_use_is_not_deleted(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POOL)
    allocator = Allocator(store, "node-1")
    allocator.assign("one", {})
    result = run("delete", "pool", "pods")
    assert result.exit_code == 1
    assert "IPPool pods: 1 of its addresses are in use" in result.stderr
    assert run("delete", "pool", "pods", "--force").exit_code == 0
    assert "Block in no pool" in run("ipam", "show").stdout
    assert store.list("BlockAffinity").entries == []


def test_a_deleted_pool_leaves_no_blocks(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-f", "-", stdin=POOL)
    allocator = Allocator(store, "node-1")
    allocator.assign("one", {})
    allocator.release("one")
    assert run("delete", "pool", "pods").stdout == "IPPool pods deleted\n"
    for kind in ("IPPool", "IPAMBlock", "BlockAffinity", "IPAMHandle"):
        assert store.list(kind).entries == []
