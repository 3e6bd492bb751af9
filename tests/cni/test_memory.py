"""What the daemon remembers of a store that it follows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.memory import Memory
from datastore.interface import JSON, Datastore, Key, UnavailableError
from datastore.sqlite import SqliteDatastore
from tests.ipam.world import Remembering
from tests.support.netns import eventually

RED = Key("Namespace", "red")


def namespace(**labels: str) -> JSON:
    metadata = {"name": "red", "labels": labels}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteDatastore]:
    store = SqliteDatastore(tmp_path / "store.db")
    yield store
    store.close()


@pytest.fixture
def memory(store: SqliteDatastore) -> Iterator[Memory]:
    memory = Memory(store, follow=True)
    memory.start()
    yield memory
    memory.stop()


def test_follows_what_changes(store: Datastore, memory: Memory) -> None:
    assert memory.value(RED) == {}
    entry = store.create(RED, namespace(team="a"))
    # at once, even before it is heard of
    assert memory.value(RED) == namespace(team="a")
    store.update(RED, namespace(team="b"), entry.revision)
    eventually(lambda: memory.value(RED) == namespace(team="b"))
    eventually(lambda: memory.values("Namespace") == [namespace(team="b")])
    store.delete(RED)
    eventually(lambda: memory.value(RED) == {})
    assert memory.values("Namespace") == []


def test_what_is_new_and_not_heard_of(store: SqliteDatastore) -> None:
    """A setting is none yet, unless one must be sure; of the others there is no doubt."""
    deaf = Remembering(store, late=True)
    memory = Memory(deaf, follow=True)
    memory.start()
    eventually(lambda: memory.follower.in_sync)
    setting, lock = Key("FelixConfiguration", "default"), Key("ClusterInformation", "default")
    for key in (setting, lock, RED):
        assert memory.value(key) == {}
        store.create(key, namespace())
    assert memory.value(setting) == {}
    assert memory.value(setting, sure=True) == namespace()
    assert memory.value(lock) == memory.value(RED) == namespace()
    pods = [Key("Pod", name, "red") for name in ("web", "none")]
    store.create(pods[0], {"metadata": {"name": "web", "namespace": "red"}})
    found = memory.look([setting, lock, RED, *pods])
    web = {"metadata": {"name": "web", "namespace": "red"}}
    assert found == {setting: {}, lock: namespace(), RED: namespace(), pods[0]: web, pods[1]: {}}
    deaf.hear(None)
    eventually(lambda: memory.value(setting) == namespace())
    memory.stop()


def test_does_not_remember_others(store: Datastore, memory: Memory) -> None:
    pod = Key("Pod", "web", "red")
    store.create(pod, {"metadata": {"name": "web", "namespace": "red"}})
    store.update(pod, changed := {"metadata": {"name": "web", "namespace": "red", "uid": "1"}})
    assert memory.value(pod) == changed
    assert memory.values("Pod") == [changed]


def test_is_not_trusted_while_the_store_is_away(
    tmp_path: Path, store: Datastore, memory: Memory
) -> None:
    store.create(RED, namespace())
    eventually(lambda: len(memory.values("Namespace")) == 1)
    path = tmp_path / "store.db"
    away = path.rename(tmp_path / "away.db")

    def fails() -> bool:
        try:
            memory.value(RED)
        except UnavailableError:
            return True
        return False

    eventually(fails)
    away.rename(path)
    eventually(lambda: not fails())
    assert memory.value(RED) == namespace()


def test_without_following_the_store_is_asked(tmp_path: Path, store: Datastore) -> None:
    memory = Memory(store)
    memory.start()
    other = SqliteDatastore(tmp_path / "store.db")
    other.create(RED, namespace(team="a"))
    assert memory.value(RED) == namespace(team="a")
    for team in ("b", "c"):
        other.update(RED, namespace(team=team))
        memory.refresh()
        assert memory.value(RED) == namespace(team=team)
        assert memory.values("Namespace") == [namespace(team=team)]
    other.delete(RED)
    assert memory.value(RED) == namespace(team="c")  # as it was at the beginning of a request
    memory.refresh()
    assert memory.value(RED) == {}
    assert memory.values("Namespace") == []
    other.close()
    memory.stop()


def test_asks_again_for_all_after_what_was_missed(tmp_path: Path) -> None:
    store = SqliteDatastore(tmp_path / "store.db", history=10)
    memory = Memory(store)
    memory.start()
    store.create(RED, namespace(team="a"))
    memory.refresh()
    for number in range(600):
        store.update(RED, namespace(number=str(number)))
    store.delete(RED)
    memory.refresh()
    assert memory.value(RED) == {}
    path = tmp_path / "store.db"
    away = path.rename(tmp_path / "away.db")
    with pytest.raises(UnavailableError):
        memory.refresh()
    with pytest.raises(UnavailableError):
        memory.value(RED)
    away.rename(path)
    store.create(RED, namespace(team="b"))
    memory.refresh()
    assert memory.value(RED) == namespace(team="b")
    memory.stop()
    store.close()
