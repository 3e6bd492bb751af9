"""Real processes on one store that take and give back addresses, some killed in the act."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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

MOST_KILLS = 200  # far more than it takes to meet a process between two writes


def test_killed_processes_neither_double_nor_lose_an_address(
    store: SqliteDatastore, tmp_path: Path
) -> None:
    add_pool(store, "pool", "10.0.0.0/26", 29)
    # Two processes of the first node, as the CNI daemon and the agent are.
    nodes = ("n1", "n2", "n3", "n1")
    crowd = Crowd(store, f"sqlite:///{tmp_path / 'datastore.db'}", tmp_path, nodes)
    crowd.work(given=300, kills=10)
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
        crowd = Crowd(store, url, tmp_path, [f"n{number % 10}" for number in range(20)])
        crowd.work(given=10_000, kills=20)
        check_and_repair(store)
        store.close()


@dataclass
class Program:
    """A process that comes and goes, and the node it is of."""

    node: str
    name: str
    process: BaseProcess


@dataclass
class Crowd:
    """A process for each of ``nodes`` that takes and gives back addresses of ``store``.

    ``given``: addresses that they were given. ``halves``: handles of processes that were killed
    which count what they do not hold: they died between the two writes of an assign or release.
    """

    store: Datastore
    url: str
    directory: Path
    nodes: Sequence[str]
    given: int = 0
    killed: int = 0
    halves: set[str] = field(default_factory=set)
    running: dict[Connection, Program] = field(default_factory=dict)

    def work(self, *, given: int, kills: int) -> None:
        """Until so much was given; kill one now and then, whatever it does; in the end all.

        More than ``kills`` are killed where none of those was in the midst of something.
        """
        marks = self.directory / "marks"
        marks.mkdir()
        dice = random.Random(0)
        for node in self.nodes:
            self.begin(marks, node)
        next_kill = dice.uniform(0, given / kills)
        while self.given < given or self.killed < kills or not self.halves:
            assert self.killed < MOST_KILLS, "no process was ever killed between two writes"
            ready = wait(list(self.running), timeout=120)
            assert ready, "no process does anything any more"
            for said in ready:
                assert isinstance(said, Connection)
                self.hear(said)
            if self.given >= next_kill:
                next_kill += dice.uniform(0, 2 * given / kills)
                # any of them, which goes on meanwhile
                program = self.kill(dice.choice(list(self.running)))
                self.repair(marks, program)
                self.begin(marks, program.node)
        for said in list(self.running):
            self.kill(said)

    def begin(self, marks: Path, node: str) -> None:
        name = f"{node}-{self.killed}-{len(self.running)}"
        process, said = start(come_and_go, self.url, marks, node, name)
        self.running[said] = Program(node, name, process)

    def hear(self, said: Connection) -> None:
        message = said.recv_bytes()
        assert message.isdigit(), message.decode()
        self.given += int(message)

    def kill(self, said: Connection) -> Program:
        program = self.running.pop(said)
        program.process.kill()
        program.process.join()
        try:
            while said.poll():
                self.hear(said)
        except (EOFError, OSError):
            pass  # in the midst of a word
        said.close()
        self.killed += 1
        return program

    def repair(self, marks: Path, program: Program) -> None:
        """Release what one had that was killed, as a DEL of each does: all that it counted."""
        prefix = f"{program.name}."
        self.halves |= half_done(self.store, prefix)
        allocator = Allocator(self.store, program.node)
        for handle in handles(self.store, prefix):
            for address in allocator.addresses(handle):
                (marks / str(address.address)).unlink(missing_ok=True)
            allocator.release(handle)
        assert handles(self.store, prefix) == {}
        assert not any(holder.startswith(prefix) for holder in allocated(self.store).values())


def half_done(store: Datastore, prefix: str) -> set[str]:
    """The handles, of those whose names begin so, that count what they do not hold."""
    counted = {id_: sum(handle.counts.values()) for id_, handle in handles(store, prefix).items()}
    held = Counter(allocated(store).values())
    return {id_ for id_, count in counted.items() if count != held[id_]}


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
