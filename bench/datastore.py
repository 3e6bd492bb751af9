"""How fast the datastores are: compare-and-swaps a second, and the delay of a watch."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

from datastore.interface import JSON, ConflictError, Datastore, Key
from datastore.sqlite import SqliteDatastore

PROCESSES = 4
CAS_SECONDS = 3.0
WATCH_EVENTS = 400

_processes = multiprocessing.get_context("spawn")


def run() -> dict[str, float]:
    """Measure every store; the names of its figures begin with its own."""
    with tempfile.TemporaryDirectory() as directory:
        connect = partial(SqliteDatastore, Path(directory) / "datastore.db")
        figures = {"sqlite.cas_per_s": cas_per_second(connect)}
        delays = watch_delays(connect)
    figures["sqlite.watch_p50_ms"] = 1000 * statistics.median(delays)
    figures["sqlite.watch_p99_ms"] = 1000 * statistics.quantiles(delays, n=100)[98]
    return figures


def cas_per_second(connect: Callable[[], Datastore]) -> float:
    """Successful swaps a second of four processes, each on an object of its own."""
    barrier = _processes.Barrier(PROCESSES)
    with _processes.Pool(PROCESSES, _remember, (barrier,)) as pool:
        return sum(pool.map(partial(_swap, connect), range(PROCESSES), chunksize=1))


def watch_delays(connect: Callable[[], Datastore]) -> list[float]:
    """Seconds from before an update in one process to its event in another, store idle."""
    store = connect()
    with store.watch(["IPAMBlock"], store.list("IPAMBlock").revision) as watch:
        writer = _processes.Process(target=_write_slowly, args=(connect,))
        writer.start()
        delays: list[float] = []
        while len(delays) < WATCH_EVENTS:
            events = watch.next(timeout=30)
            if not events:
                raise TimeoutError(f"no event for 30 s after {len(delays)} of {WATCH_EVENTS}")
            now = time.monotonic()
            delays += [
                now - event.entry.value["at"]
                for event in events
                if event.entry is not None and "at" in event.entry.value
            ]
        writer.join()
    store.close()
    return delays


def _remember(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


_barrier: Barrier


def _swap(connect: Callable[[], Datastore], number: int) -> float:
    store = connect()
    entry = store.create(Key("IPAMBlock", f"10-0-{number}-0-26"), _object())
    _barrier.wait()
    swaps, start = 0, time.monotonic()
    while time.monotonic() < start + CAS_SECONDS:
        try:
            entry = store.update(entry.key, entry.value, entry.revision)
            swaps += 1
        except ConflictError:
            entry = store.get(entry.key)
    rate = swaps / (time.monotonic() - start)
    store.close()
    return rate


def _write_slowly(connect: Callable[[], Datastore]) -> None:
    store = connect()
    entry = store.create(Key("IPAMBlock", "10-1-0-0-26"), _object())
    for _ in range(WATCH_EVENTS):
        time.sleep(0.01)
        entry.value["at"] = time.monotonic()  # one clock for all processes of a machine
        entry = store.update(entry.key, entry.value, entry.revision)
    store.close()


def _object() -> JSON:
    """About the size of a block in use: 2 KB."""
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": "IPAMBlock",
        "metadata": {"name": "10-0-0-0-26"},
        "spec": {"cidr": "10.0.0.0/26", "allocations": [None] * 64, "padding": "x" * 1600},
    }
