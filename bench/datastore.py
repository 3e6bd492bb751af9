"""How fast the datastores are, beside plain clients of the same servers in the same run.

For each store: compare-and-swaps a second, the delay of a watch, and what it takes to list ten
thousand WorkloadEndpoints (memory beyond that of the imported program). The servers are those of
the tests: Debian's etcd, and the kube-apiserver built from its Go module.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

from datastore.interface import JSON, ConflictError, Datastore, Key

SECTIONS = ("sqlite", "etcd", "kubernetes")

PROCESSES = 4
CAS_SECONDS = 3.0
WATCH_EVENTS = 400
OBJECTS = 10_000

Connect = Callable[[], Datastore]

_processes = multiprocessing.get_context("spawn")


def run(sections: Sequence[str] = SECTIONS) -> dict[str, float]:
    """Measure stores; the names of a store's figures begin with its own."""
    from bench import _etcd, _kubernetes, _sqlite

    stores = {"sqlite": _sqlite.run, "etcd": _etcd.run, "kubernetes": _kubernetes.run}
    figures: dict[str, float] = {}
    for section in sections:
        figures |= {f"{section}.{name}": value for name, value in stores[section]().items()}
    return figures


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


def cas_per_second(connect: Connect) -> float:
    """Successful swaps a second of four processes, each on an object of its own."""
    barrier = _processes.Barrier(PROCESSES)
    with _processes.Pool(PROCESSES, _remember, (barrier,)) as pool:
        return sum(pool.map(partial(_swap, connect), range(PROCESSES), chunksize=1))


def watch_delays(connect: Connect) -> list[float]:
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
                now - float(at)
                for event in events
                if event.entry is not None and (at := _written_at(event.entry.value))
            ]
        writer.join()
    store.close()
    return delays


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds and megabytes of what a function brought and kept."""

    seconds: float
    megabytes: float

    def named(self, name: str) -> dict[str, float]:
        """As figures."""
        return {f"{name}_s": self.seconds, f"{name}_mb": self.megabytes}


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


def block(number: int) -> tuple[Key, JSON]:
    """A block as it is in use, about 2 KB."""
    key = Key("IPAMBlock", f"10-0-{number}-0-26")
    used = 12
    attributes = [
        {
            "handle_id": f"k8s-pod-network.{index:064x}",
            "secondary": {"namespace": "default", "node": "node-1", "pod": f"pod-{index}"},
        }
        for index in range(used)
    ]
    spec = {
        "cidr": f"10.0.{number}.0/26",
        "affinity": "host:node-1",
        "allocations": [*range(used), *[None] * (64 - used)],
        "unallocated": [*range(used, 64)],
        "attributes": attributes,
        "sequenceNumber": 1,
        "sequenceNumberForAllocation": {str(index): 1 for index in range(used)},
        "deleted": False,
        "strictAffinity": False,
    }
    value: JSON = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "IPAMBlock",
        "metadata": {"name": key.name},
        "spec": spec,
    }
    return key, value


def endpoint(number: int) -> tuple[Key, JSON]:
    """One of the WorkloadEndpoints to list."""
    pod, node = f"web-{number}", f"node-{number % 100}"
    dashes = [part.replace("-", "--") for part in (node, pod)]
    key = Key("WorkloadEndpoint", f"{dashes[0]}-k8s-{dashes[1]}-eth0", "shop")
    labels = {
        "app": "web",
        "pod-template-hash": "7d4b9c6f5",
        "projectcalico.org/namespace": "shop",
        "projectcalico.org/orchestrator": "k8s",
        "projectcalico.org/serviceaccount": "default",
    }
    spec = {
        "orchestrator": "k8s",
        "node": node,
        "pod": pod,
        "containerID": f"{number:064x}",
        "endpoint": "eth0",
        "serviceAccountName": "default",
        "ipNetworks": [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32"],
        "profiles": ["kns.shop", "ksa.shop.default"],
        "interfaceName": f"cali{number:011x}",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
    }
    value: JSON = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "WorkloadEndpoint",
        "metadata": {"name": key.name, "namespace": "shop", "labels": labels},
        "spec": spec,
    }
    return key, value


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
    entry = store.create(*block(PROCESSES))
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
