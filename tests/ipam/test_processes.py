"""Real processes on one store that take and give back addresses, some killed in the act."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from api.net import Net
from datastore.connect import connect
from datastore.interface import Datastore
from datastore.sqlite import SqliteDatastore
from ipam import claims
from ipam.allocator import Allocator
from ipam.records import Records
from tests.ipam.programs import come_and_go, start
from tests.ipam.world import add_pool, affinities, allocated, blocks, check_consistency, handles
from tests.support.etcd import single_node


def test_killed_processes_neither_double_nor_lose_an_address(
    store: SqliteDatastore, tmp_path: Path
) -> None:
    add_pool(store, "pool", "10.0.0.0/26", 29)
    url = f"sqlite:///{tmp_path / 'datastore.db'}"
    # Two processes of the first node, as the CNI daemon and the agent are.
    work(url, tmp_path, ("n1", "n2", "n3", "n1"), acts=400, kills=10)
    check_and_repair(store)
    allocator = Allocator(store, "n1")
    given = {allocator.assign("all", {}).address for _ in range(64)}
    assert len(given) == 64


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_processes_on_etcd_ten_thousand_addresses(tmp_path: Path) -> None:
    with single_node() as server:
        url = f"etcd://{server.endpoints[0]}"
        store = connect(url)
        add_pool(store, "pool", "10.0.0.0/21", 27)
        work(url, tmp_path, [f"n{number % 10}" for number in range(20)], acts=10_000, kills=12)
        check_and_repair(store)
        store.close()


def work(url: str, directory: Path, nodes: Sequence[str], *, acts: int, kills: int) -> None:
    """Let a process for each of ``nodes`` take and give back; kill some; then kill all."""
    marks = directory / "marks"
    marks.mkdir()
    running: dict[Connection, tuple[str, BaseProcess]] = {}

    def begin(node: str, seed: int) -> None:
        process, said = start(come_and_go, url, marks, node, seed)
        running[said] = node, process

    for seed, node in enumerate(nodes):
        begin(node, seed)
    done, killed = 0, 0
    while done < acts:
        ready = wait(list(running), timeout=120)
        assert ready, "no process does anything any more"
        for said in ready:
            assert isinstance(said, Connection)
            message = said.recv_bytes()
            assert message == b"ok", message.decode()
            done += 1
            if done % (acts // kills) == 0:
                node, process = running.pop(said)
                end(process)
                killed += 1
                begin(node, 100 + killed)
    assert killed >= kills
    for _, process in running.values():
        end(process)


def end(process: BaseProcess) -> None:
    process.kill()
    process.join()


def check_and_repair(store: Datastore) -> None:
    """No address is lost: all that is held can be released, and then there is nothing left."""
    check_consistency(store)
    in_use = allocated(store)
    held: dict[str, set[Net]] = {}
    for address, handle in in_use.items():
        held.setdefault(handle, set()).add(address)
    allocator = Allocator(store, "n1")
    counted = handles(store)
    assert held.keys() <= counted.keys()
    for handle in counted:
        assert set(allocator.release(handle)) == held.get(handle, set())
    assert allocated(store) == {}
    assert handles(store) == {}
    for affinity in affinities(store):
        claims.release(Records(store), affinity.node, affinity.net)
    assert blocks(store) == {}
