"""Many threads of one node that need more blocks than it has, all at the same moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator

THREADS = 50
EACH = 4


@pytest.mark.parametrize("follow", [False, True])
def test_threads_share_the_claims_of_their_node(tmp_path: Path, follow: bool) -> None:
    """A claim that another thread is at looks like one that was left half-done."""
    store = SqliteDatastore(tmp_path / "store.db")
    pool = {"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "pool"}}
    store.create(Key("IPPool", "pool"), pool | {"spec": {"cidr": "10.65.0.0/16"}})
    allocator = Allocator(store, "node-1", follow=follow)
    allocator.start()

    def assign(thread: int) -> list[str]:
        numbers = range(EACH)
        return [str(allocator.assign(f"{thread}-{i}", {}).address) for i in numbers]

    with ThreadPoolExecutor(THREADS) as pool_of_threads:
        addresses = [
            text for texts in pool_of_threads.map(assign, range(THREADS)) for text in texts
        ]
    allocator.stop()
    assert len(set(addresses)) == THREADS * EACH
    # 200 addresses are four blocks of 64, of which nobody claimed one too many
    assert len(store.list("IPAMBlock").entries) == 4
    store.close()
