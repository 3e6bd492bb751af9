"""Listing flows in a thread of its own, so that nobody else waits for the kernel meanwhile.

The kernel takes milliseconds to look for the flows of one address, and more to tell of many. Who
asks for them is woken when there are some, and takes them when it suits. The thread is ahead by a
few at most: while others are busy it rests, for it would take the interpreter from them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kernel.conntrack import Conntrack, Flow

# What it asks of the kernel. Runs in the lister's thread.
Listing = Callable[[Conntrack], Iterator[list[Flow]]]

_AHEAD = 2  # lists of flows


@dataclass(frozen=True, slots=True)
class _End:
    """Of a listing: the CPU seconds it took, and what it failed with."""

    seconds: float
    error: Exception | None


class Lister:
    """Lists the flows in the network namespace of the thread that makes it.

    ``wake`` is called in the lister's thread whenever there is something to take. All else is for
    one thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.spent = 0.0  # CPU seconds, of all listings that came to their end
        self._wake = wake
        self._conntrack = Conntrack()
        self._wanted: queue.SimpleQueue[Listing | None] = queue.SimpleQueue()
        self._found: queue.Queue[list[Flow] | _End] = queue.Queue(_AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flows", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, in the midst of a listing, too."""
        self._closing.set()
        self._wanted.put(None)
        while self.ready:
            self._found.get()  # there is room for what it holds
        self._thread.join()
        self._conntrack.close()

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""
        return not self._found.empty()

    def listed(self, listing: Listing) -> Iterator[list[Flow] | None]:
        """What a listing finds, as it comes; None: nothing yet. To be read to its end.

        Raises what the listing raises, which may leave the kernel in the midst of an answer: then
        there is nothing to be done but to close.
        """
        self._wanted.put(listing)
        while True:
            try:
                found = self._found.get_nowait()
            except queue.Empty:
                yield None
                continue
            if isinstance(found, _End):
                self.spent += found.seconds
                if found.error is not None:
                    raise found.error
                return
            yield found

    def _run(self) -> None:
        while (listing := self._wanted.get()) is not None and not self._closing.is_set():
            error = None
            begin = time.thread_time()
            try:
                for flows in listing(self._conntrack):
                    self._tell(flows)
                    if self._closing.is_set():
                        return
            except Exception as problem:
                error = problem
            self._tell(_End(time.thread_time() - begin, error))

    def _tell(self, found: list[Flow] | _End) -> None:
        self._found.put(found)
        self._wake()
