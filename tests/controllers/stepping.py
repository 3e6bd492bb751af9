"""Programs on one store that advance one call at a time, in an order that the test chooses."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from datastore.interface import JSON, Datastore, Entry, Key, Listing, Watch
from tests.ipam.world import Died

_PATIENCE = 60.0

T = TypeVar("T")


class Stepped:
    """A store, each of whose calls waits until it may be made; but not to hear of changes."""

    prompt = True  # as SqliteDatastore says of itself

    def __init__(self, store: Datastore) -> None:
        self._store = store
        self.actor: Actor | None = None  # None: calls do not wait

    @property
    def given(self) -> frozenset[str]:
        return self._store.given

    def get(self, key: Key) -> Entry:
        return self._call(lambda: self._store.get(key))

    def list(self, kind: str, namespace: str | None = None, prefix: str = "") -> Listing:
        return self._call(lambda: self._store.list(kind, namespace, prefix))

    def create(self, key: Key, value: JSON) -> Entry:
        return self._call(lambda: self._store.create(key, value))

    def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
        return self._call(lambda: self._store.update(key, value, revision))

    def delete(self, key: Key, revision: str | None = None) -> Entry:
        return self._call(lambda: self._store.delete(key, revision))

    def watch(self, kinds: Iterable[str], revision: str | Mapping[str, str]) -> Watch:
        return self._store.watch(kinds, revision)

    def close(self) -> None:
        pass

    def _call(self, call: Callable[[], T]) -> T:
        if self.actor is not None:
            self.actor.wait_for_turn()
        return call()


class Actor:
    """``work`` in a thread of its own, which waits before its first call and before each other."""

    def __init__(self, store: Stepped, work: Callable[[], object]) -> None:
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: die
        self._waiting: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: ended
        self._error: BaseException | None = None
        self.ended = False
        self.died = False
        store.actor = self
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._await()

    def step(self) -> None:
        """Let it make its next call, and return when it waits again or has ended."""
        assert not self.ended
        self._turns.put(True)
        self._await()

    def finish(self) -> None:
        """Let it make all its calls."""
        while not self.ended:
            self.step()

    def kill(self) -> None:
        """It dies instead of making its next call."""
        self.died = True
        while not self.ended:
            self._turns.put(False)
            self._await()

    def wait_for_turn(self) -> None:
        """For the store: the thread that calls waits here."""
        self._waiting.put(True)
        if not self._turns.get(timeout=_PATIENCE):
            raise Died

    def _await(self) -> None:
        self.ended = not self._waiting.get(timeout=_PATIENCE)
        if self.ended:
            self._thread.join()
            if self._error is not None:
                raise self._error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Died:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._waiting.put(False)
