"""When to try again what failed: later each time, spread out, up to a limit."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from random import Random
from typing import Generic, TypeVar

_random = Random()  # of its own: the global one belongs to programs
K = TypeVar("K", bound=Hashable)


class Backoff(Generic[K]):
    """Remembers per key how often it failed and when it is due again.

    All times are seconds of one clock, which the caller reads. The n-th failure in a row
    waits ``initial * factor ** (n - 1)`` seconds, at most ``maximum``, less a random part
    of it up to ``jitter`` (0 to 1), so that many keys don't come back at once.
    """

    def __init__(
        self,
        initial: float = 0.1,
        maximum: float = 30.0,
        factor: float = 2.0,
        jitter: float = 0.2,
        *,
        chance: Callable[[], float] = _random.random,
    ) -> None:
        """``chance`` gives numbers from 0 to 1. Raises ValueError for impossible numbers."""
        if not 0 < initial <= maximum or factor < 1 or not 0 <= jitter <= 1:
            raise ValueError(
                f"back-off initial={initial} maximum={maximum} factor={factor} jitter={jitter}: "
                "0 < initial <= maximum, factor >= 1 and 0 <= jitter <= 1 are needed"
            )
        self._initial = initial
        self._maximum = maximum
        self._factor = factor
        self._jitter = jitter
        self._chance = chance
        self._delays: dict[K, float] = {}
        self._next: dict[K, float] = {}

    def __len__(self) -> int:
        """How many keys wait."""
        return len(self._next)

    def failed(self, key: K, now: float) -> float:
        """``key`` failed at ``now``; returns when to try it again."""
        last = self._delays.get(key)
        delay = self._initial if last is None else min(last * self._factor, self._maximum)
        self._delays[key] = delay
        self._next[key] = now + delay * (1 - self._jitter * self._chance())
        return self._next[key]

    def succeeded(self, key: K) -> None:
        """``key`` is well, or gone: forget its failures."""
        self._delays.pop(key, None)
        self._next.pop(key, None)

    def due(self, now: float) -> list[K]:
        """The keys to try again now, the longest due first.

        They stay due until ``failed`` or ``succeeded`` says what became of them.
        """
        ready = [key for key, time in self._next.items() if time <= now]
        return sorted(ready, key=self._next.__getitem__)

    def next_due(self) -> float | None:
        """When the next key is due; None if none waits."""
        return min(self._next.values(), default=None)
