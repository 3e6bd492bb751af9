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

processes = get_context("spawn")


def come_and_go(url: str, marks: Path, node: str, seed: int, said: Connection) -> None:
    """Take and give back addresses for ever; say "ok" each time, or what is wrong.

    Whoever is given an address puts a mark of that name into ``marks``, and takes it away
    before giving the address back: a mark that is there already means that it was given twice.
    """
    allocator = Allocator(connect(url), node, follow=True)
    allocator.start()
    held: list[str] = []
    dice = random.Random(seed)
    for number in range(1_000_000):
        if held and dice.random() < 0.4:
            handle = held.pop(dice.randrange(len(held)))
            for address in allocator.addresses(handle):
                (marks / str(address.address)).unlink()
            allocator.release(handle)
        else:
            handle = f"{node}-{seed}-{number}"
            try:
                address = allocator.assign(handle, {"node": node}).address
            except (PoolExhaustedError, BlockLimitError):
                held += [handle]  # releasing it must do no harm
                said.send_bytes(b"ok")
                continue
            try:
                (marks / str(address.address)).touch(exist_ok=False)
            except FileExistsError:
                said.send_bytes(f"{address} was given twice, now for {handle}".encode())
                return
            held.append(handle)
        said.send_bytes(b"ok")


def start(target: Callable[..., None], *args: object) -> tuple[BaseProcess, Connection]:
    """A process, and our end of the pipe to it that it got as last argument."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=target, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours
