"""One policy changed among many: when packets see it, and what it costs the agent.

The whole way is measured with everything real: the object written to SQLite, the agent a process
of its own, UDP packets from pod to pod. Nobody answers these, so each is judged as new.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from api.registry import key_parts
from bench._measure import quantiles
from bench._policy_world import PORT, SERVER, Place, World, elsewhere, place, policy, policy_key
from datastore.interface import JSON, Key
from felix.calculate import Calculator
from felix.dataplane import Dataplane
from felix.nftables_dataplane import NftablesDataplane
from felix.snapshot import Snapshot
from kernel.netns import inside
from tests.felix.world import cluster

_POLICIES, _SELECTING = 1000, 20
_CHANGES = 300
_PAUSE = 0.02  # seconds between changes
_MISSES = 3  # packets in a row that must not arrive, for a change to count as seen
_PATIENCE = 10.0
_CALM = 0.001

_SIZES = (100, 1000, 5000)
_PODS = 50
_COSTED = 60  # changes


def visible() -> dict[str, float]:
    """Milliseconds from before the write until a packet is treated as the policy says.

    ``queued`` is how long the agent and this thread were ready and had no CPU: nothing on an idle
    machine. ``unqueued`` are the changes where that was less than a millisecond.
    """
    world = World(_POLICIES, _SELECTING)
    with place(world) as where, _ends(where) as (near, far):
        assert where.node.agent is not None
        processes = where.node.agent.pid, os.getpid()
        delays, queued, writes = [], [], []
        for number in range(_CHANGES):
            time.sleep(_PAUSE)
            allow = bool(number % 2)
            changed = policy(world, _SELECTING - 1, allow=allow)
            waited = _queued(processes)
            begun = time.perf_counter()
            where.node.store.update(policy_key(_SELECTING - 1), changed)
            writes.append(time.perf_counter() - begun)
            delays.append(_seen(near, far, allow) - begun)
            queued.append(_queued(processes) - waited)
    calm = [delay for delay, wait in zip(delays, queued, strict=True) if wait < _CALM]
    return {
        **quantiles("change_visible", delays),
        "change_queued_p99_ms": 1000 * statistics.quantiles(queued, n=100)[98],
        **(quantiles("change_visible_unqueued", calm) if len(calm) > 1 else {}),
        "change_unqueued_share": len(calm) / len(delays),
        "change_written_p50_ms": 1000 * statistics.median(writes),
    }


def _queued(processes: Iterable[int]) -> float:
    """Seconds that the threads of processes were ready and had no CPU (schedstat of proc(5))."""
    stats = [
        path.read_text().split()
        for process in processes
        for path in Path(f"/proc/{process}/task").glob("*/schedstat")
    ]
    return sum(int(waited) for _, waited, _ in stats) / 1e9


def cost() -> dict[str, float]:
    """CPU milliseconds in the agent for a change, from the object to the kernel, by size."""
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        agents = {size: _Agent(World(size, _SELECTING), stack) for size in _SIZES}
        found: dict[int, list[float]] = {size: [] for size in _SIZES}
        for number in range(_COSTED):
            for size, agent in agents.items():
                found[size].append(agent.change(allow=bool(number % 2)))
    for size, costs in found.items():
        figures[f"change_cpu_{size}_ms"] = 1000 * statistics.median(costs)
    pairs = zip(found[_SIZES[-1]], found[_SIZES[1]], strict=True)
    figures["change_cpu_ratio_5000_to_1000"] = statistics.median(a / b for a, b in pairs)
    return figures


class _Agent:
    """What an agent does, in this thread."""

    def __init__(self, world: World, stack: ExitStack) -> None:
        (self._node,) = stack.enter_context(cluster("bench", addresses=("198.51.100.1/24",)))
        self._world = world
        self._snapshot = Snapshot()
        calculator = self._calculator = Calculator(self._node.name)
        self._put({"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "default"}})
        for number in range(1000):
            self._put(elsewhere(number))
        for number in range(world.policies):
            self._put(policy(world, number))
        for number in range(_PODS):
            pod = self._node.pod(f"pod-{number}", f"10.0.0.{2 + number}", endpoint=False)
            stack.callback(pod.netns.close)
            self._put(pod.endpoint(labels={"app": f"app-{number // 2}"}))
        with inside(self._node.netns.fd):
            enforcer = NftablesDataplane(calculator.settings, calculator.ruleset.members)
            self._dataplane = Dataplane(enforcer)
            stack.callback(self._dataplane.close)
            self._dataplane.want(calculator.calculate(self._snapshot))
            self._dataplane.read()
            self._dataplane.apply(time.monotonic())
        gc.collect()
        gc.freeze()

    def change(self, *, allow: bool) -> float:
        """Change the policy that allows; the CPU seconds it took."""
        changed = policy(self._world, self._world.selecting - 1, allow=allow)
        with inside(self._node.netns.fd):
            begun = time.thread_time()
            self._put(changed)
            self._dataplane.want(self._calculator.calculate(self._snapshot))
            self._dataplane.apply(time.monotonic())
            return time.thread_time() - begun

    def _put(self, obj: JSON) -> None:
        kind, namespace, name = key_parts(obj)
        self._snapshot.update(Key(kind, name, namespace), obj)


@contextlib.contextmanager
def _ends(where: Place) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected sender, and the receiver."""
    with inside(where.client.netns.fd):
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with inside(where.server.netns.fd):
        far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with near, far:
        far.bind((SERVER, PORT))
        far.setblocking(False)
        near.connect((SERVER, PORT))
        yield near, far


def _seen(near: socket.socket, far: socket.socket, allow: bool) -> float:
    """When the first packet is treated as it should be from now on."""
    deadline = time.perf_counter() + _PATIENCE
    missed, first = 0, 0.0
    while True:
        near.send(b"?")
        now = time.perf_counter()
        try:
            far.recv(1)
        except BlockingIOError:
            missed += 1
            first = now if missed == 1 else first
            if not allow and missed == _MISSES:
                return first
        else:
            missed = 0
            if allow:
                return now
        if now > deadline:
            raise RuntimeError(f"a changed policy is not in force after {_PATIENCE:.0f} s")
        time.sleep(0.0001)
