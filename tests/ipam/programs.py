"""What the processes of the tests of this room do."""

from __future__ import annotations

import random
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from datastore.connect import connect
from ipam.allocator import Allocator, BlockLimitError, PoolExhaustedError

# Started once with all that is imported, so that a process in place of one killed begins at once.
processes = get_context("forkserver")
processes.set_forkserver_preload([__name__, "datastore.etcd", "datastore.sqlite"])

_MOST = 3  # addresses that one handle takes


def come_and_go(url: str, marks: Path, node: str, name: str, said: Connection) -> None:
    """Take and give back addresses for ever; say each time how many were given, or what is wrong.

    Whoever is given an address puts a mark of that name into ``marks``, and takes it away
    before giving the address back: a mark that is there already means that it was given twice.
    Its handles are called ``name.`` and a number.
    """
    allocator = Allocator(connect(url), node, follow=True)
    allocator.start()
    held: list[str] = []
    dice = random.Random(name)
    for number in range(1_000_000):
        if held and dice.random() < 0.5:
            handle = held.pop(dice.randrange(len(held)))
            for address in allocator.addresses(handle):
                (marks / str(address.address)).unlink()
            allocator.release(handle)
            said.send_bytes(b"0")
            continue
        handle = f"{name}.{number}"
        held.append(handle)  # releasing one that has nothing must do no harm
        try:
            given = allocator.assign_many(dice.randint(1, _MOST), handle, {"node": node})
        except (PoolExhaustedError, BlockLimitError):
            said.send_bytes(b"0")
            continue
        for assignment in given:
            try:
                (marks / str(assignment.address.address)).touch(exist_ok=False)
            except FileExistsError:
                said.send_bytes(f"{assignment.address} was given twice, now for {handle}".encode())
                return
        said.send_bytes(b"%d" % len(given))


def start(target: Callable[..., None], *args: object) -> tuple[BaseProcess, Connection]:
    """A process, and our end of the pipe to it that it got as last argument."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=target, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours
