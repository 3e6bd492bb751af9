"""From a store to a stream of updates: list, watch, and go on when that breaks."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from random import Random

from api.kinds import KINDS
from datastore.interface import (
    JSON,
    Datastore,
    Entry,
    Key,
    NotFoundError,
    RevisionGoneError,
    StoreError,
    Watch,
)

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 10.0

_random = Random()  # of its own: the global one belongs to programs
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Update:
    """An object as it is now; ``value`` is None when it does not exist (any more)."""

    key: Key
    value: JSON | None


@dataclass(frozen=True, slots=True)
class InSync:
    """Every object that existed at the start has been sent. Sent once."""


class Follower:
    """A thread that keeps a consumer informed of all objects of some kinds.

    ``sink`` gets ``Update`` for every object and every change, in order for each object, and
    ``InSync`` after the first complete listing; it runs in the follower's thread, so it should
    be ``SimpleQueue.put``. Whatever goes wrong with the store is logged, and tried again with
    a growing pause (0.1 to 10 s); meanwhile the consumer's last state stands. Kinds whose watch
    can go on where it was are not listed again. After that only what differs is sent, with
    ``None`` for what disappeared.

    Instead of starting the thread one may ask for news, where the store is one that tells at once
    of all that was written before (``PromptDatastore``): see ``catch_up``.
    """

    def __init__(
        self, store: Datastore, kinds: Iterable[str], sink: Callable[[Update | InSync], object]
    ) -> None:
        self._store = store
        self._sinks: dict[str, list[Callable[[Update | InSync], object]]] = {}  # by kind
        self.also(kinds, sink)
        self._known: dict[Key, str] = {}  # what the consumer has, and at which revision
        self._resume: dict[str, str] = {}  # where the next watch can go on, by kind
        self._announced = False  # InSync was sent
        self._stopping = threading.Event()
        self._watch: Watch | None = None
        self._watch_lock = threading.Lock()
        self._problem: str | None = "not started"
        self._turn = threading.Lock()  # of the thread that catches up
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def also(self, kinds: Iterable[str], sink: Callable[[Update | InSync], object]) -> None:
        """Keep another consumer informed, too. To be called before anything is followed."""
        for kind in kinds:
            self._sinks.setdefault(kind, []).append(sink)

    @property
    def in_sync(self) -> bool:
        """Whether the store is followed at this moment (False during an outage)."""
        return self._problem is None

    @property
    def problem(self) -> str | None:
        """Why it is not followed, in words; None when all is well."""
        return self._problem

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait until nothing more can reach the sink."""
        self._stopping.set()
        with self._watch_lock:
            if self._watch is not None:
                self._watch.close()
        if self._thread.ident is not None:
            self._thread.join()

    def catch_up(self) -> None:
        """Send what has changed until now, in this thread; the first time everything.

        Raises StoreError; the next call then makes good for it. For several threads, but not
        together with ``start``.
        """
        with self._turn:
            try:
                try:
                    self._ask()
                except RevisionGoneError:
                    self._end_watch()
                    self._ask()
            except StoreError as error:
                self._end_watch()
                self._problem = str(error)
                raise

    def _ask(self) -> None:
        watch = self._watch
        if watch is None:
            watch = self._open(self._list(self._sinks))
            self._recovered()
        while events := watch.next(0):
            for event in events:
                self._send(event.key, event.entry)

    def _end_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            followed_since = math.inf
            try:
                positions = self._resume | self._list(self._sinks.keys() - self._resume.keys())
                if self._resume:
                    self._probe()
                self._resume = {}
                with self._open(positions) as watch:
                    self._recovered()
                    followed_since = time.monotonic()
                    self._follow(watch)
            except StoreError as error:
                self._resume |= error.resume
                self._failed(str(error))
            except Exception as error:
                # A bug, in the store or in the sink: keep the rest of the program going.
                _log.exception("unexpected error while following the datastore")
                self._failed(repr(error))
            # One that always breaks at once must not make us list everything again and again.
            if time.monotonic() - followed_since > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            self._stopping.wait(pause * _random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _list(self, kinds: Collection[str]) -> dict[str, str]:
        """Send all that differs from what the consumer has; returns where to watch from."""
        positions = {}
        for kind in (kind for kind in self._sinks if kind in kinds):
            listing = self._store.list(kind)
            positions[kind] = listing.revision
            present = {entry.key for entry in listing.entries}
            for key in [key for key in self._known if key.kind == kind and key not in present]:
                self._send(key, None)
            for entry in listing.entries:
                self._send(entry.key, entry)
        return positions

    def _probe(self) -> None:
        """See that the store answers: opening a watch says nothing of that. Raises StoreError."""
        kind = min(self._sinks, key=lambda kind: KINDS[kind].namespaced)
        with contextlib.suppress(NotFoundError):
            self._store.get(Key(kind, "default", "default" if KINDS[kind].namespaced else ""))

    def _open(self, positions: dict[str, str]) -> Watch:
        watch = self._store.watch(tuple(self._sinks), positions)
        with self._watch_lock:
            self._watch = watch
            if self._stopping.is_set():
                watch.close()
        return watch

    def _follow(self, watch: Watch) -> None:
        while events := watch.next():  # none: closed, by us or with the store
            for event in events:
                self._send(event.key, event.entry)

    def _send(self, key: Key, entry: Entry | None) -> None:
        # Known is only what the sink took, so that the rest is sent again after an error.
        if entry is not None:
            if self._known.get(key) == entry.revision:
                return
            self._tell(key.kind, Update(key, entry.value))
            self._known[key] = entry.revision
        elif key in self._known:
            self._tell(key.kind, Update(key, None))
            del self._known[key]

    def _tell(self, kind: str, update: Update) -> None:
        for sink in self._sinks[kind]:
            sink(update)

    def _recovered(self) -> None:
        if not self._announced:
            for sink in dict.fromkeys(sink for sinks in self._sinks.values() for sink in sinks):
                sink(InSync())
            self._announced = True
            _log.info("datastore in sync: %d objects", len(self._known))
        elif self._problem is not None:
            _log.info("datastore followed again: %d objects", len(self._known))
        self._problem = None

    def _failed(self, problem: str) -> None:
        if problem != self._problem:
            _log.warning("datastore not followed, the last state stands: %s", problem)
        self._problem = problem
