"""The few objects that every ADD looks at, remembered instead of read each time.

They are settings, pools and namespaces: seldom changed, by people. What is remembered may be a
moment old, as what is read is by the time it is used. An object that is not remembered may be
new, so it is for the datastore to say that there is none; unless it could only be a setting that
is new, or the store is one that tells of all that was written when it is asked, as whoever is
about to change something does (``refresh``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from datastore.follower import Follower, InSync, Update
from datastore.interface import (
    JSON,
    Datastore,
    Entry,
    Key,
    NotFoundError,
    PromptDatastore,
    StoreError,
    get_all,
)

_KINDS = ("ClusterInformation", "FelixConfiguration", "IPPool", "Namespace")
# A pod that is wired in the moment in which one of these is made may have come before it.
_SETTINGS = "FelixConfiguration"


class Memory:
    """Objects of a store. ``follow``: remember them between ``start`` and ``stop``.

    Without, those of a PromptDatastore are remembered since the last ``refresh``. Else, and while
    the store can't be followed, each is read when it is asked for. Safe to use from several
    threads. ``refresh``, ``value`` and ``values`` may raise StoreError; what is returned is not
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

    def value(self, key: Key, *, sure: bool = False) -> JSON:
        """An object, empty when there is none. ``sure``: not even a setting may be newly there."""
        value = self._recall(key)
        if value or (value is not None and not sure):
            return value
        try:
            return self._store.get(key).value
        except NotFoundError:
            return {}

    def look(self, keys: Sequence[Key]) -> dict[Key, JSON | StoreError]:
        """As ``value``, of several: what is to be asked for is, in one go."""
        found: dict[Key, JSON | StoreError] = {}
        unknown = []
        for key in dict.fromkeys(keys):
            value = self._recall(key)
            if value is None:
                unknown.append(key)
            else:
                found[key] = value
        for key, outcome in zip(unknown, get_all(self._store, unknown), strict=True):
            if isinstance(outcome, Entry):
                found[key] = outcome.value
            else:
                found[key] = {} if isinstance(outcome, NotFoundError) else outcome
        return found

    def values(self, kind: str) -> list[JSON]:
        """All objects of a kind, in no order."""
        if self._remembers and kind in self._values:
            with self._lock:
                return list(self._values[kind].values())
        return [entry.value for entry in self._store.list(kind).entries]

    def _recall(self, key: Key) -> JSON | None:
        """An object, empty when there is none; None: the datastore has to say."""
        if not self._remembers or key.kind not in self._values:
            return None
        with self._lock:
            value = self._values[key.kind].get(key)
        if value is None and (self._ask or key.kind == _SETTINGS):
            return {}
        return value

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
