"""The follower: what a consumer hears at the start, during changes, and across outages."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datastore.follower import Follower, InSync, Update
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from tests.datastore.programs import count_for_ever, numbered, pool_key, start

Sink = Callable[[Update | InSync], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "datastore.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteDatastore]:
    store = SqliteDatastore(path)
    yield store
    store.close()


@pytest.fixture
def heard() -> queue.SimpleQueue[Update | InSync]:
    return queue.SimpleQueue()


@pytest.fixture
def follow(store: SqliteDatastore) -> Iterator[Callable[[Sink], Follower]]:
    """Starts a follower of three kinds; stopped at the end."""
    followers: list[Follower] = []

    def starter(sink: Sink) -> Follower:
        follower = Follower(store, ["IPPool", "Node", "Pod"], sink)
        followers.append(follower)
        follower.start()
        return follower

    yield starter
    for follower in followers:
        follower.stop()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def take(heard: queue.SimpleQueue[Update | InSync], count: int) -> list[Update | InSync]:
    return [heard.get(timeout=30) for _ in range(count)]


def update(name: str, number: int | None) -> Update:
    return Update(pool_key(name), None if number is None else numbered(number))


def test_all_objects_then_in_sync_then_changes(
    store: SqliteDatastore,
    heard: queue.SimpleQueue[Update | InSync],
    follow: Callable[[Sink], Follower],
) -> None:
    store.create(pool_key("a"), numbered(1))
    store.create(Key("Pod", "p", "default"), {})
    store.create(Key("BGPPeer", "not-asked-for"), {})
    follower = follow(heard.put)
    assert take(heard, 3) == [update("a", 1), Update(Key("Pod", "p", "default"), {}), InSync()]
    until(lambda: follower.in_sync)
    store.create(pool_key("b"), numbered(2))
    store.update(pool_key("a"), numbered(3))
    store.delete(pool_key("b"))
    assert take(heard, 3) == [update("b", 2), update("a", 3), update("b", None)]


def test_several_are_informed_by_one_watch(store: SqliteDatastore) -> None:
    pools: list[Update | InSync] = []
    both: list[Update | InSync] = []
    follower = Follower(store, ["IPPool"], pools.append)
    follower.also(["IPPool", "Node"], both.append)
    store.create(pool_key("a"), numbered(1))
    node = Update(Key("Node", "n"), {})
    store.create(node.key, {})
    follower.catch_up()
    assert pools == [update("a", 1), InSync()]
    assert both == [update("a", 1), node, InSync()]
    store.delete(node.key)
    store.update(pool_key("a"), numbered(2))
    follower.catch_up()
    assert pools[2:] == [update("a", 2)]
    assert both[3:] == [Update(node.key, None), update("a", 2)]
    follower.stop()


def test_stop_ends_the_stream(
    store: SqliteDatastore,
    heard: queue.SimpleQueue[Update | InSync],
    follow: Callable[[Sink], Follower],
) -> None:
    follower = follow(heard.put)
    assert take(heard, 1) == [InSync()]
    follower.stop()
    store.create(pool_key("a"), numbered(1))
    assert heard.empty()
    follower.stop()
    Follower(store, ["IPPool"], heard.put).stop()  # never started


def test_closing_the_store_is_an_outage(
    store: SqliteDatastore,
    heard: queue.SimpleQueue[Update | InSync],
    follow: Callable[[Sink], Follower],
) -> None:
    follower = follow(heard.put)
    assert take(heard, 1) == [InSync()]
    store.close()
    until(lambda: "closed" in (follower.problem or ""))
    assert heard.empty()


def test_store_that_comes_later(
    tmp_path: Path,
    heard: queue.SimpleQueue[Update | InSync],
    caplog: pytest.LogCaptureFixture,
) -> None:
    later = tmp_path / "later"
    store = SqliteDatastore(later / "datastore.db")
    follower = Follower(store, ["IPPool"], heard.put)
    with caplog.at_level(logging.INFO):
        follower.start()
        until(lambda: "make sure that the directory" in (follower.problem or ""))
        assert not follower.in_sync
        assert heard.empty()
        later.mkdir()
        assert take(heard, 1) == [InSync()]
        until(lambda: follower.in_sync)
    follower.stop()
    store.close()
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1, "an outage is told once, not at every attempt"
    assert str(later) in warnings[0]
    assert "in sync" in caplog.records[-1].message


def test_last_state_stands_during_an_outage(
    path: Path,
    store: SqliteDatastore,
    heard: queue.SimpleQueue[Update | InSync],
    follow: Callable[[Sink], Follower],
) -> None:
    for name in "abc":
        store.create(pool_key(name), numbered(1))
    follower = follow(heard.put)
    take(heard, 4)
    files = [path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", "")]
    away = [file.with_name("away-" + file.name) for file in files]
    for file, place in zip(files, away, strict=True):
        file.rename(place)
    until(lambda: "removed while in use" in (follower.problem or ""))
    assert heard.empty()
    for file, place in zip(files, away, strict=True):
        place.rename(file)
    store.update(pool_key("a"), numbered(2))
    store.delete(pool_key("b"))
    assert sorted(map(str, take(heard, 2))) == sorted(map(str, [update("a", 2), update("b", None)]))
    until(lambda: follower.in_sync)
    assert heard.empty()


def test_after_lost_history_only_the_difference_is_told(
    path: Path, store: SqliteDatastore, follow: Callable[[Sink], Follower]
) -> None:
    for name in ("deleted", "changed", "same", "remade"):
        store.create(pool_key(name), numbered(1))
    heard: list[Update | InSync] = []
    go_on = threading.Event()

    def slow(message: Update | InSync) -> None:
        heard.append(message)
        if message == update("stop", 1):
            assert go_on.wait(30)

    follow(slow)
    until(lambda: InSync() in heard)
    heard.clear()
    store.create(pool_key("stop"), numbered(1))
    until(lambda: bool(heard))
    store.delete(pool_key("deleted"))
    store.update(pool_key("changed"), numbered(2))
    store.delete(pool_key("remade"))
    store.create(pool_key("remade"), numbered(1))
    forgetful = SqliteDatastore(path, history=1)
    for _ in range(250):
        forgetful.update(pool_key("stop"), numbered(2))
    forgetful.close()
    go_on.set()
    until(lambda: update("stop", 2) in heard)
    assert heard == [
        update("stop", 1),
        update("deleted", None),
        update("changed", 2),
        update("remade", 1),
        update("stop", 2),
    ]
    store.create(pool_key("last"), numbered(1))
    until(lambda: heard[-1] == update("last", 1))


def test_nothing_is_told_twice_or_in_wrong_order(
    path: Path,
    store: SqliteDatastore,
    follow: Callable[[Sink], Follower],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While three processes write and the history is lost now and then."""
    names = ["a", "b", "c"]
    for name in names:
        store.create(pool_key(name), numbered(0))
    told: dict[str, list[int]] = {name: [] for name in names}

    def note(message: Update | InSync) -> None:
        if isinstance(message, Update):
            assert message.value is not None
            told[message.key.name].append(message.value["number"])

    writers = [start(count_for_ever, path, name) for name in names]
    forgetful = SqliteDatastore(path, history=1)
    forgetful.create(Key("BGPPeer", "filler"), {})
    follow(note)
    while min(map(len, told.values())) < 150 or "list again" not in caplog.text:
        forgetful.update(Key("BGPPeer", "filler"), {})
        for _, said in writers:
            while said.poll():
                said.recv_bytes()
    for process, _ in writers:
        process.kill()
        process.join()
    forgetful.close()
    for name in names:
        last = store.get(pool_key(name)).value["number"]
        until(lambda name=name, last=last: told[name][-1] == last)  # type: ignore[misc]
        assert told[name] == sorted(set(told[name]))
    assert "list again" in caplog.text


def test_sink_that_fails_does_not_end_the_stream(
    store: SqliteDatastore, follow: Callable[[Sink], Follower], caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Update | InSync] = []

    def fragile(message: Update | InSync) -> None:
        heard.append(message)
        if len(heard) == 2:
            raise ZeroDivisionError

    store.create(pool_key("a"), numbered(1))
    store.create(pool_key("b"), numbered(1))
    follow(fragile)
    until(lambda: InSync() in heard)
    assert heard == [update("a", 1), update("b", 1), update("b", 1), InSync()]
    assert "ZeroDivisionError" in caplog.text
