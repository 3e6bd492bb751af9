"""What an address costs: from a block at hand, from a new block, from a pool without any left.

Each with 100, 1,000 and 10,000 blocks of other nodes in the store, measured in turn. ``claim``:
the first address of a node, in a pool with much room. ``last``: the claim of the only free block
of a pool. ``borrow``: an address of a pool in which every block is another's. ``ratio``: with
10,000 blocks, to that with 100.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from api.net import Net, parse_net
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import EtcdSettings
from datastore.interface import Datastore, Key
from datastore.sqlite import SqliteDatastore
from ipam import claims
from ipam.allocator import Allocator
from ipam.block import Block
from ipam.pools import Pools
from ipam.records import CONFIRMED, Records, owner
from ipam.search import Search
from ipam.view import View
from tests.support.etcd import single_node

SECTIONS = ("sqlite", "etcd")

_SIZES = {"100": 100, "1k": 1000, "10k": 10_000}
_ROUNDS = 60
_AT_ONCE = 50
_BURSTS = 9
_SWITCH_INTERVAL = 0.0005  # seconds, as in the CNI daemon
_LARGE = parse_net("10.0.0.0/8")
_ATTRIBUTES = {"pod": "web-5d9c7b8f6-x2x9z", "namespace": "default", "node": "node-1"}


def run(sections: Sequence[str] = SECTIONS) -> dict[str, float]:
    """Measure stores; the names of a store's figures begin with its own."""
    stores = {"sqlite": _sqlite, "etcd": _etcd}
    figures: dict[str, float] = {}
    for section in sections:
        with ExitStack() as stack:
            sides = {
                name: stack.enter_context(_Side.filled(stack.enter_context(stores[section]()), n))
                for name, n in _SIZES.items()
            }
            found = _costs(sides) | sides["10k"].throughput()
        figures |= {f"{section}.{name}": value for name, value in found.items()}
    return figures


@contextmanager
def _sqlite() -> Iterator[Datastore]:
    with tempfile.TemporaryDirectory(prefix="manx-bench-") as directory:
        store = SqliteDatastore(Path(directory) / "datastore.db")
        yield store
        store.close()


@contextmanager
def _etcd() -> Iterator[Datastore]:
    with single_node() as server:
        store = EtcdDatastore(EtcdSettings(tuple(server.endpoints)))
        yield store
        store.close()


class _Side:
    """A store with so many blocks, and an allocator that follows it, as the CNI daemon's does."""

    def __init__(self, store: Datastore, view: View, allocator: Allocator, full: Net) -> None:
        self._store = store
        self._records = Records(store)
        self._view = view
        self._allocator = allocator
        self._full = full
        self._search = Search(self._records, "node-1", owner("node-1"))
        self._numbers = itertools.count()

    @classmethod
    @contextmanager
    def filled(cls, store: Datastore, count: int) -> Iterator[_Side]:
        """Half of the blocks in a large pool, half in one that they fill but for one block."""
        half = 1 << (count // 2).bit_length()
        full = Net(4, parse_net("172.16.0.0").address, 26 - half.bit_length() + 1)
        _pool(store, "large", _LARGE)
        _pool(store, "full", full)
        nets = [Net(4, _LARGE.address + number * 64, 26) for number in range(count // 2)]
        nets += [Net(4, full.address + number * 64, 26) for number in range(1, half)]
        records = Records(store)
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda net: _occupy(records, net), nets))
        view, allocator = View(store, records, follow=True), Allocator(store, "node-1", follow=True)
        for follower in (view, allocator):
            follower.start()
        try:
            _until(lambda: view.remembers and allocator.following)
            yield cls(store, view, allocator, full)
        finally:
            for follower in (view, allocator):
                follower.stop()

    def assign(self) -> float:
        """An address from a block at hand, seconds; it is given back again."""
        handles: list[str] = []
        seconds = _timed(lambda: handles.append(self._assign("large")))
        self._allocator.release(handles[0])
        return seconds

    def claim(self) -> float:
        """The first address of a node that is new."""
        number = next(self._numbers)
        allocator = Allocator(self._store, f"new-{number}")
        return _timed(lambda: allocator.assign(f"new-{number}", _ATTRIBUTES, pools=["large"]))

    def last(self) -> float:
        """A claim of the only block that is free; it is given up again."""
        [pool] = [pool for pool in Pools(self._store).all() if pool.name == "full"]
        claimed: list[Net] = []

        def claim() -> None:
            net = next(self._search.free(self._view, pool, ()))
            if claims.claim(self._records, "node-1", net) is None:
                raise RuntimeError(f"{net} is not free")
            claimed.append(net)

        seconds = _timed(claim)
        [net] = claimed
        _until(lambda: net in (self._view.claimed() or ()))
        claims.release(self._records, "node-1", net)
        _until(lambda: net not in (self._view.claimed() or ()))
        return seconds

    def fill(self) -> None:
        """Take the last free block."""
        _occupy(self._records, Net(4, self._full.address, 26))
        self._assign("full")  # for what is found out once

    def borrow(self) -> float:
        """An address from a block of another."""
        return _timed(lambda: self._assign("full"))

    def throughput(self) -> dict[str, float]:
        """Many at once, from a block at hand: how long one waits, and how many there are a second.

        All are given back after each round.
        """
        sys.setswitchinterval(_SWITCH_INTERVAL)
        rounds = [self._at_once() for _ in range(_BURSTS)]
        return {
            "assign_x50_p50_ms": 1000 * statistics.median(w for waits, _ in rounds for w in waits),
            "assign_x50_per_s": _AT_ONCE / statistics.median(seconds for _, seconds in rounds),
        }

    def _at_once(self) -> tuple[list[float], float]:
        """Each one's wait, and that for the last; seconds."""
        waits: list[float] = []
        handles: list[str] = []

        def work() -> None:
            barrier.wait()
            waits.append(_timed(lambda: handles.append(self._assign("large"))))

        barrier = threading.Barrier(_AT_ONCE + 1)
        threads = [threading.Thread(target=work) for _ in range(_AT_ONCE)]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = time.monotonic()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - start
        for handle in handles:
            self._allocator.release(handle)
        return waits, seconds

    def _assign(self, pool: str) -> str:
        handle = f"h-{next(self._numbers)}"
        self._allocator.assign(handle, _ATTRIBUTES, pools=[pool])
        return handle


def _costs(sides: dict[str, _Side]) -> dict[str, float]:
    measures: dict[str, Callable[[_Side], float]] = {
        "assign": _Side.assign,
        "claim": _Side.claim,
        "last": _Side.last,
        "borrow": _Side.borrow,
    }
    figures: dict[str, float] = {}
    for what, measure in measures.items():
        for side in sides.values():
            if what == "borrow":
                side.fill()
            measure(side)  # once for what is found out once
        rounds = [{name: measure(side) for name, side in sides.items()} for _ in range(_ROUNDS)]
        for name in sides:
            figures[f"{what}_{name}_ms"] = 1000 * statistics.median(r[name] for r in rounds)
        figures[f"{what}_ratio"] = figures[f"{what}_10k_ms"] / figures[f"{what}_100_ms"]
    return figures


def _pool(store: Datastore, name: str, net: Net) -> None:
    store.create(
        Key("IPPool", name),
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "IPPool",
            "metadata": {"name": name},
            "spec": {"cidr": str(net), "blockSize": 26},
        },
    )


def _occupy(records: Records, net: Net) -> None:
    """A block of another node, with an address in use."""
    node = f"other-{net.address}"
    block = Block.new(net, owner(node), time.time_ns(), "2999-01-01T00:00:00Z")
    block.take(1, f"h-{net.address}", _ATTRIBUTES)
    records.create_affinity(node, net, CONFIRMED)
    records.create_block(block)


def _timed(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the store is not followed")
        time.sleep(0.001)
