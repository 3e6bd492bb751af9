"""What is measured of every store: swaps a second, the delay of a watch, the cost of a list."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

from bench._objects import block
from datastore.interface import JSON, AlreadyExistsError, ConflictError, Datastore, Watch

PROCESSES = 4
CAS_SECONDS = 3.0
WATCH_EVENTS = 400
OBJECTS = 10_000  # to list

SLICE_SECONDS = 0.1
SLICES = 50  # of each side

Connect = Callable[[], Datastore]
Side = Callable[[], None]

_processes = multiprocessing.get_context("spawn")


def measure(connect: Connect) -> dict[str, float]:
    """Swaps and delays of a store."""
    figures = {"cas_per_s": cas_per_second(connect)}
    return figures | quantiles("watch", watch_delays(connect))


def quantiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds."""
    return {
        f"{name}_p50_ms": 1000 * statistics.median(seconds),
        f"{name}_p99_ms": 1000 * statistics.quantiles(seconds, n=100)[98],
    }


def in_turn(sides: Mapping[str, Side]) -> dict[str, list[float]]:
    """Calls a second of each side, slice by slice: what slows the machine slows all alike."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(SLICES):
        for name, side in sides.items():
            count, start = 0, time.monotonic()
            while time.monotonic() < start + SLICE_SECONDS:
                side()
                count += 1
            rates[name].append(count / (time.monotonic() - start))
    return rates


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the slices' ratios."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def cas_per_second(connect: Connect) -> float:
    """Successful swaps a second of four processes, each on an object of its own."""
    barrier = _processes.Barrier(PROCESSES)
    with _processes.Pool(PROCESSES, _remember, (barrier,)) as pool:
        return sum(pool.map(partial(_swap, connect), range(PROCESSES), chunksize=1))


def watch_delays(connect: Connect) -> list[float]:
    """Seconds from before an update in one process to its event in another, store idle."""
    store = connect()
    with store.watch(["IPAMBlock"], store.list("IPAMBlock").revision) as watch:
        delays = plain_delays(connect, lambda: _heard(watch))
    store.close()
    return delays


def plain_delays(connect: Connect, heard: Callable[[], Iterable[JSON]]) -> list[float]:
    """The same of any watch on IPAMBlocks. ``heard`` waits, and returns what came."""
    writer = _processes.Process(target=_write_slowly, args=(connect,))
    writer.start()
    delays: list[float] = []
    while len(delays) < WATCH_EVENTS:
        values = heard()
        now = time.monotonic()
        delays += [now - float(at) for value in values if (at := _written_at(value))]
    writer.join()
    return delays


def _heard(watch: Watch) -> list[JSON]:
    events = watch.next(timeout=30)
    if not events:
        raise TimeoutError("no event for 30 s")
    return [event.entry.value for event in events if event.entry is not None]


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds and megabytes of what a function brought and kept."""

    seconds: float
    megabytes: float

    def named(self, name: str) -> dict[str, float]:
        """As figures."""
        return {f"{name}_s": self.seconds, f"{name}_mb": self.megabytes}


def typical(costs: Sequence[Cost]) -> Cost:
    """The medians."""
    return Cost(
        statistics.median(one.seconds for one in costs),
        statistics.median(one.megabytes for one in costs),
    )


def cost_of_list(connect: Connect, kind: str) -> Cost:
    """What listing all objects of a kind costs, in a process that has done nothing else.

    The connection is made before: reading configuration and the like is the import's share.
    """
    return cost(partial(_list_after_start, connect, kind))


def cost(prepare: Callable[[], Callable[[], int]]) -> Cost:
    """The cost of the function that ``prepare`` returns, in a process of its own."""
    ours, theirs = _processes.Pipe()
    process = _processes.Process(target=_measure_cost, args=(prepare, theirs))
    process.start()
    found: Cost = ours.recv()
    process.join()
    return found


def _remember(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


_barrier: Barrier


def _swap(connect: Connect, number: int) -> float:
    store = connect()
    entry = store.create(*block(number))
    _barrier.wait()
    swaps, start = 0, time.monotonic()
    while time.monotonic() < start + CAS_SECONDS:
        entry.value["spec"]["sequenceNumber"] += 1
        try:
            entry = store.update(entry.key, entry.value, entry.revision)
            swaps += 1
        except ConflictError:
            entry = store.get(entry.key)
    rate = swaps / (time.monotonic() - start)
    store.close()
    return rate


def _write_slowly(connect: Connect) -> None:
    store = connect()
    key, value = block(PROCESSES)
    try:
        entry = store.create(key, value)
    except AlreadyExistsError:  # by the writer for another watch
        entry = store.get(key)
    for _ in range(WATCH_EVENTS):
        time.sleep(0.01)
        # one clock for all processes of a machine
        entry.value["metadata"]["annotations"] = {"at": str(time.monotonic())}
        entry = store.update(entry.key, entry.value, entry.revision)
    store.close()


def _written_at(value: JSON) -> str | None:
    text: str | None = (value["metadata"].get("annotations") or {}).get("at")
    return text


def _list_after_start(connect: Connect, kind: str) -> Callable[[], int]:
    store = connect()
    store.list("Namespace")
    _kept.append(store)
    return partial(_list_and_keep, store, kind)


def _list_and_keep(store: Datastore, kind: str) -> int:
    listing = store.list(kind)
    _kept.append(listing)
    return len(listing.entries)


_kept: list[object] = []


def _measure_cost(prepare: Callable[[], Callable[[], int]], found: object) -> None:
    function = prepare()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins anew
    before, start = _status("VmRSS"), time.monotonic()
    count = function()
    seconds = time.monotonic() - start
    if count != OBJECTS:
        raise RuntimeError(f"{count} objects were listed, expected {OBJECTS}")
    found.send(Cost(seconds, (_status("VmHWM") - before) / 1000))  # type: ignore[attr-defined]


def _status(field: str) -> float:
    """A field of /proc/self/status in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1])
    raise KeyError(field)
