"""How many requests are worked on at once.

Python runs one thread at a time. Where a request is hardly anything but work, as on a store in a
file of this machine, fifty at once would all be done when the last is done; in turns, half of
them are done in half of that time, and no time goes into changing between them. Who must wait for
something else (another process, the kernel to delete an interface) gives its turn up, for good.
"""

from __future__ import annotations

import threading


class Turns:
    """At most ``number`` threads have a turn."""

    def __init__(self, number: int) -> None:
        self._free = threading.Semaphore(number)
        self._own = threading.local()

    def take(self) -> None:
        """Wait for a turn, unless this thread has one."""
        if not getattr(self._own, "turn", False):
            self._free.acquire()
            self._own.turn = True

    def give_up(self) -> None:
        """Let another thread have this thread's turn. Harmless where it has none."""
        if getattr(self._own, "turn", False):
            self._own.turn = False
            self._free.release()
