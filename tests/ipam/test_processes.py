"""Real processes on one store that take and give back addresses, some killed in the act."""

from __future__ import annotations

from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from api.net import Net
from datastore.sqlite import SqliteDatastore
from ipam import claims
from ipam.allocator import Allocator
from ipam.records import Records
from tests.ipam.programs import come_and_go, start
from tests.ipam.world import add_pool, affinities, allocated, blocks, check_consistency, handles

NODES = ("n1", "n2", "n3")
ADDRESSES = 64


def test_killed_processes_neither_double_nor_lose_an_address(
    store: SqliteDatastore, tmp_path: Path
) -> None:
    add_pool(store, "pool", "10.0.0.0/26", 29)
    marks = tmp_path / "marks"
    marks.mkdir()
    running: dict[Connection, tuple[str, BaseProcess]] = {}

    def begin(node: str, seed: int) -> None:
        process, said = start(come_and_go, tmp_path / "datastore.db", marks, node, seed)
        running[said] = node, process

    # Two processes of the first node, as the CNI daemon and the agent are.
    for seed, node in enumerate((*NODES, NODES[0])):
        begin(node, seed)
    told, killed = 0, 0
    while killed < 10:
        ready = wait(list(running), timeout=60)
        assert ready, "no process does anything any more"
        for said in ready:
            assert isinstance(said, Connection)
            message = said.recv_bytes()
            assert message == b"ok", message.decode()
            told += 1
            if told % 40 == 0:
                node, process = running.pop(said)
                process.kill()
                process.join()
                killed += 1
                begin(node, 100 + killed)
    for _, process in running.values():
        process.kill()
        process.join()

    check_consistency(store)
    in_use = allocated(store)
    allocator = Allocator(store, "n1")
    for handle in handles(store):
        assert set(allocator.addresses(handle)) == {a for a in in_use if in_use[a] == handle}
        allocator.release(handle)
    assert allocated(store) == {}
    assert handles(store) == {}
    for affinity in affinities(store):
        claims.release(Records(store), affinity.node, affinity.net)
    assert blocks(store) == {}
    assert len(all_addresses(allocator)) == ADDRESSES


def all_addresses(allocator: Allocator) -> set[Net]:
    return {allocator.assign("all", {}).address for _ in range(ADDRESSES)}
