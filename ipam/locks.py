"""One lock a name, made when it is wanted and forgotten when nobody wants it any more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Lock:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class KeyedLocks:
    """Locks by name. What happens under different names happens side by side.

    ``before_waiting`` is called by a thread that finds a lock held by another.
    """

    def __init__(self, before_waiting: Callable[[], object] = lambda: None) -> None:
        self._before_waiting = before_waiting
        self._guard = threading.Lock()
        self._locks: dict[str, _Lock] = {}

    def hold(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock ``name`` for the block. Not reentrant."""
        return self.hold_all((name,))

    @contextlib.contextmanager
    def hold_all(self, names: Iterable[str]) -> Iterator[None]:
        """Hold several, whoever else wants them in whatever order."""
        held: list[tuple[str, _Lock]] = []
        try:
            for name in sorted(names):
                entry = self._enter(name)
                if not entry.lock.acquire(blocking=False):
                    self._before_waiting()
                    entry.lock.acquire()
                held.append((name, entry))
            yield
        finally:
            for name, entry in held:
                entry.lock.release()
                self._leave(name, entry)

    @contextlib.contextmanager
    def hold_free(self, names: Iterable[str]) -> Iterator[set[str]]:
        """Hold for the block those of the locks that nobody holds; which they are."""
        with contextlib.ExitStack() as held:
            free = set()
            for name in names:
                entry = self._enter(name)
                held.callback(self._leave, name, entry)
                if entry.lock.acquire(blocking=False):
                    held.callback(entry.lock.release)
                    free.add(name)
            yield free

    def _enter(self, name: str) -> _Lock:
        with self._guard:
            entry = self._locks.setdefault(name, _Lock())
            entry.users += 1
        return entry

    def _leave(self, name: str, entry: _Lock) -> None:
        with self._guard:
            entry.users -= 1
            if not entry.users:
                del self._locks[name]
