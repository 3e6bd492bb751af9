"""Who leads: at most one, whatever the clocks say, and soon another when it is gone."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers.lease import LEASE, Elector, Leadership, Lease, Timing
from datastore.connect import connect
from datastore.interface import Datastore, UnavailableError
from datastore.sqlite import SqliteDatastore
from tests.controllers.world import Clock
from tests.ipam.world import overtaken_at
from tests.support.etcd import Etcd

TIMING = Timing(duration=15, renewal=10, retry=2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteDatastore]:
    store = SqliteDatastore(tmp_path / "datastore.db")
    yield store
    store.close()


def candidate(store: Datastore, name: str, clock: Callable[[], float] | None = None) -> Lease:
    return Lease(store, name, TIMING, clock=clock or Clock())


def leads(lease: Lease) -> bool:
    return lease.leading


def spec(store: Datastore) -> dict[str, object]:
    found: dict[str, object] = store.get(LEASE).value["spec"]
    return found


def test_the_first_has_it_and_keeps_it(store: SqliteDatastore) -> None:
    one, other = candidate(store, "one"), candidate(store, "other")
    assert one.attempt()
    assert not other.attempt()
    assert (one.leading, other.leading, other.holder) == (True, False, "one")
    assert spec(store)["leaseTransitions"] == 0
    assert one.attempt()
    assert spec(store)["leaseTransitions"] == 0


def test_it_is_taken_when_it_has_not_changed_for_its_duration(store: SqliteDatastore) -> None:
    clock = Clock()
    one, other = candidate(store, "one"), candidate(store, "other", clock)
    one.attempt()
    assert not other.attempt()
    clock.now += 14
    assert not other.attempt()
    one.attempt()  # renewed
    clock.now += 1
    assert not other.attempt()
    clock.now += 14
    assert not other.attempt()
    clock.now += 1
    assert other.attempt()
    assert spec(store)["leaseTransitions"] == 1
    assert not one.attempt()
    assert not one.leading


def test_the_clocks_of_machines_need_not_agree(store: SqliteDatastore) -> None:
    """Neither the times in the lease nor the offset of a clock matter."""
    clock = Clock(5e9)
    one, other = candidate(store, "one", Clock(3)), candidate(store, "other", clock)
    one.attempt()
    entry = store.get(LEASE)
    for time in ("1970-01-01T00:00:00.000000Z", "2999-01-01T00:00:00.000000Z"):
        ours = entry.value["spec"] | {"renewTime": time}
        entry = store.update(LEASE, entry.value | {"spec": ours}, entry.revision)
        assert not other.attempt()
        clock.now += 14.9
        assert not other.attempt()
    clock.now += 0.1
    assert other.attempt()


def test_who_can_not_renew_does_not_lead(store: SqliteDatastore) -> None:
    clock = Clock()
    one = candidate(store, "one", clock)
    one.attempt()
    clock.now += 9.9
    assert leads(one)
    clock.now += 0.1
    assert not leads(one)
    assert one.attempt()  # nobody took it
    assert leads(one)


def test_a_released_lease_is_free_at_once(store: SqliteDatastore) -> None:
    one, other = candidate(store, "one"), candidate(store, "other")
    one.attempt()
    other.attempt()
    other.release()  # it is not its own
    assert spec(store)["holderIdentity"] == "one"
    one.release()
    assert not one.leading
    assert other.attempt()


@pytest.mark.parametrize("first", ["create", "update"])
def test_one_of_two_at_the_same_moment(store: SqliteDatastore, first: str) -> None:
    faster = candidate(store, "faster")
    if first == "update":
        before = candidate(store, "before")
        before.attempt()
        before.release()
    slower = candidate(overtaken_at(store, 0, faster.attempt), "slower")
    assert not slower.attempt()
    assert (faster.leading, slower.leading) == (True, False)
    assert not slower.attempt()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 20)), max_size=40))
def test_never_two(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, float]]
) -> None:
    store = SqliteDatastore(tmp_path_factory.mktemp("lease") / "datastore.db")
    clocks = [Clock(offset) for offset in (0.0, 1e6, 1e9)]
    candidates = [candidate(store, f"c{n}", clock) for n, clock in enumerate(clocks)]
    for who, seconds in steps:
        for clock in clocks:
            clock.now += seconds
        candidates[who].attempt()
        assert sum(each.leading for each in candidates) <= 1
    store.close()


class Unwell:
    """A store that can be out of reach."""

    def __init__(self, store: Datastore) -> None:
        self._store = store
        self.well = True

    def __getattr__(self, name: str) -> object:
        if not self.well:
            raise UnavailableError("out of reach")
        return getattr(self._store, name)


def wait_for(said: queue.SimpleQueue[Leadership], *, leading: bool) -> Leadership:
    while (heard := said.get(timeout=60)).leading != leading:
        pass
    return heard


def test_the_elector_tells_of_every_change(store: SqliteDatastore) -> None:
    timing = Timing(duration=3, renewal=2, retry=0.02)
    said: queue.SimpleQueue[Leadership] = queue.SimpleQueue()
    unwell = Unwell(store)
    elector = Elector(Lease(unwell, "one", timing), timing, said.put)  # type: ignore[arg-type]
    elector.start()
    assert wait_for(said, leading=True) == Leadership(True, "one")
    unwell.well = False
    heard = said.get(timeout=60)
    assert heard.problem == "out of reach"
    wait_for(said, leading=False)
    unwell.well = True
    assert wait_for(said, leading=True) == Leadership(True, "one")
    elector.stop()


def test_on_etcd(etcd: Etcd) -> None:
    with_clock = Clock()
    store = connect(f"etcd://{etcd.endpoints[0]}")
    try:
        one, other = candidate(store, "one"), candidate(store, "other", with_clock)
        assert one.attempt()
        assert one.attempt()
        assert not other.attempt()
        with_clock.now += 15
        assert other.attempt()
        assert not one.attempt()
        other.release()
        assert one.attempt()
        one.release()
    finally:
        store.close()


def test_impossible_times_are_refused() -> None:
    with pytest.raises(ValueError, match="retry < renewal < duration"):
        Timing(duration=5, renewal=5, retry=1)
