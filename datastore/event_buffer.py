"""Between a thread that hears changes from a store and the one that waits for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

from datastore.interface import Event, StoreError

_FULL = 10_000  # events; a consumer this far behind makes the store's own buffers fill
_BATCH = 1000  # most events handed out at once


class EventBuffer:
    """Events in order, then at most one error. Safe to use from any threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self._error: StoreError | None = None
        self._closed = False

    @property
    def over(self) -> bool:
        """Whether nothing more is taken: it was closed, or it has failed."""
        return self._closed or self._error is not None

    @property
    def error(self) -> StoreError | None:
        """Why it has failed, if it has."""
        return self._error

    def put(self, events: Iterable[Event]) -> bool:
        """Add events; wait while the consumer is far behind. False: it is over, none was taken."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < _FULL or self.over)
            if self.over:
                return False
            self._events.extend(events)
            self._changed.notify_all()
            return True

    def fail(self, error: StoreError) -> None:
        """Let ``next`` raise this once the events are out, and from then on."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """Forget the events and wake whoever waits."""
        with self._changed:
            self._closed = True
            self._events.clear()
            self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Wait, but not for longer than it is open."""
        with self._changed:
            self._changed.wait_for(lambda: self.over, seconds)

    def next(self, timeout: float | None) -> Sequence[Event]:
        """As ``datastore.interface.Watch.next``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._events and not self.over:
                wait = None if deadline is None else deadline - time.monotonic()
                if (wait is not None and wait <= 0) or not self._changed.wait(wait):
                    return ()
            if self._closed:
                return ()
            if not self._events:
                assert self._error is not None
                raise self._error
            events = list(islice(self._events, _BATCH))
            if len(events) == len(self._events):
                self._events.clear()
            else:
                for _ in events:
                    self._events.popleft()
            self._changed.notify_all()
            return events
