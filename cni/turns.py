"""How many threads take requests, and how many of those compute.

Python runs one thread at a time. Where a request is hardly anything but work, as on a store in a
file of this machine, one thread takes what has come and works on it: threads that do so side by
side take Python from each other at every system call, which makes it take half as long again. Who
must wait for something else (another process, the kernel to delete an interface) gives the turn
up, for good.

When others change interfaces the kernel lets us wait for its lock, longer than we compute. Then,
too, another gets the turn: one computes and the rest wait in the kernel, side by side.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from types import TracebackType

# Seconds: what takes the kernel longer has waited for its lock. (A veth pair takes it 0.3 ms.)
_QUICK = 0.001


class _Own(threading.local):
    """What a thread has, and by what it is woken."""

    turn = False
    computes = False

    def __init__(self) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()


class Turns:
    """At most ``number`` threads have a turn; if ``alone``, one at a time computes."""

    def __init__(self, number: int, *, alone: bool = False) -> None:
        self._free = threading.Semaphore(number)
        self._alone = alone
        self._own = _Own()
        self._guard = threading.Lock()  # of the following
        self._called = 0  # threads that are to come without a turn
        self._busy = False
        self._back: deque[threading.Lock] = deque()  # wait to go on with what they have begun
        self._new: deque[threading.Lock] = deque()
        self._slow = False  # the kernel, lately

    def take(self) -> bool:
        """Wait for a turn, unless this thread has one, or for a ``call``: False, without a turn."""
        if not self._own.turn:
            self._free.acquire()
            with self._guard:
                called = self._called > 0
                self._called -= called
            self._own.turn = not called
        return self._own.turn

    def call(self) -> None:
        """Have one of those who wait for a turn, or the next who does, come without."""
        with self._guard:
            self._called += 1
        self._free.release()

    def give_up(self) -> None:
        """Let another thread have this thread's turn. Harmless where it has none."""
        self.rest()
        if self._own.turn:
            self._own.turn = False
            self._free.release()

    @property
    def held(self) -> bool:
        """Whether this thread has a turn."""
        return self._own.turn

    def compute(self) -> None:
        """Begin, when those who came before have done."""
        if self._alone and not self._own.computes:
            self._wait_in(self._new)

    def rest(self) -> None:
        """Let another thread compute. Harmless where this one doesn't."""
        if not self._own.computes:
            return
        self._own.computes = False
        with self._guard:
            waiting = self._back or self._new
            if waiting:
                waiting.popleft().release()
            else:
                self._busy = False

    def aside(self, number: int = 1) -> Aside:
        """A block in which others have the turn if it takes long: this thread is in the kernel.

        It then computes again afterwards, without a turn. ``number``: of interfaces that are made.
        """
        return Aside(self, self._own.computes, number)

    def timed(self, seconds: float) -> None:
        """How long the kernel took for one."""
        self._slow = seconds > _QUICK

    @property
    def slow(self) -> bool:
        """Whether the kernel takes long, as far as one can know beforehand."""
        return self._slow

    @property
    def waiting(self) -> int:
        """How many threads wait until they may compute."""
        return len(self._back) + len(self._new)

    def go_on(self) -> None:
        """``compute``, before those who have not begun."""
        self._wait_in(self._back)

    def _wait_in(self, queue: deque[threading.Lock]) -> None:
        with self._guard:
            wait, self._busy = self._busy, True
            if wait:
                queue.append(self._own.wake)
        if wait:
            self._own.wake.acquire()  # who wakes us leaves it busy for us
        self._own.computes = True


class Aside:
    """See ``Turns.aside``."""

    __slots__ = ("_begun", "_computes", "_lent", "_number", "_turns")

    def __init__(self, turns: Turns, computes: bool, number: int) -> None:
        self._turns = turns
        self._computes = computes
        self._number = number

    def __enter__(self) -> None:
        self._lent = self._computes and self._turns.slow
        if self._lent:
            self._turns.give_up()
        self._begun = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._turns.timed((time.monotonic() - self._begun) / self._number)
        if self._lent:
            self._turns.go_on()
