"""The few objects that every ADD looks at, remembered instead of read each time.

They are settings, pools and namespaces: seldom changed, by people. What is remembered may be a
moment old, as what is read is by the time it is used. An object that is not remembered may be
new, so it is for the datastore to say that there is none; unless the store is one that tells of
all that was written when it is asked, as whoever is about to change something does (``refresh``).
"""

from __future__ import annotations

import threading

from datastore.follower import Follower, InSync, Update
from datastore.interface import JSON, Datastore, Key, NotFoundError, PromptDatastore

_KINDS = ("ClusterInformation", "FelixConfiguration", "IPPool", "Namespace")


class Memory:
    """Objects of a store. ``follow``: remember them between ``start`` and ``stop``.

    Without, those of a PromptDatastore are remembered since the last ``refresh``. Else, and while
    the store can't be followed, each is read when it is asked for. Safe to use from several
    threads. ``refresh``, ``value`` and ``values`` may raise StoreError; what they return is not
    to be changed. Through ``follower`` others may hear of the store, who then are asked for no more
    than we are.
    """

    def __init__(self, store: Datastore, *, follow: bool = False) -> None:
        self._store = store
        self._follow = follow
        self._ask = not follow and isinstance(store, PromptDatastore)
        self.follower = Follower(store, _KINDS, self._notice)
        self._lock = threading.Lock()
        self._values: dict[str, dict[Key, JSON]] = {kind: {} for kind in _KINDS}
        self._complete = False

    def start(self) -> None:
        """Begin to follow the store."""
        if self._follow:
            self.follower.start()

    def stop(self) -> None:
        """Follow it no longer."""
        self.follower.stop()

    def refresh(self) -> None:
        """Have what is remembered be as it is now, where that can be asked."""
        if self._ask:
            self.follower.catch_up()

    def value(self, key: Key) -> JSON:
        """An object, empty when there is none."""
        if self._remembers and key.kind in self._values:
            with self._lock:
                value = self._values[key.kind].get(key)
            if value is not None or self._ask:
                return value or {}
        try:
            return self._store.get(key).value
        except NotFoundError:
            return {}

    def values(self, kind: str) -> list[JSON]:
        """All objects of a kind, in no order."""
        if self._remembers and kind in self._values:
            with self._lock:
                return list(self._values[kind].values())
        return [entry.value for entry in self._store.list(kind).entries]

    @property
    def _remembers(self) -> bool:
        return self._complete and self.follower.in_sync

    def _notice(self, update: Update | InSync) -> None:
        """In the follower's thread."""
        if isinstance(update, InSync):
            self._complete = True
            return
        with self._lock:
            values = self._values[update.key.kind]
            if update.value is None:
                values.pop(update.key, None)
            else:
                values[update.key] = update.value
