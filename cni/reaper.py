"""Deleting interfaces: told as soon as they are gone, and many at once where the kernel is behind.

The kernel takes an interface out of its namespace, with all its addresses, routes and neighbours,
within a millisecond and tells whoever listens (``RTM_DELLINK``: the first moment at which nobody
can find or use it). Then it lets others change interfaces again, and waits some tens of
milliseconds until no processor can be looking at what it is about to free; only after that it
answers who has asked. Nobody needs to wait for that but a thread of ours.

There are a few such threads. When all of them wait, what comes meanwhile is deleted in one go:
fifty interfaces of one device group take hardly longer than one.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cni.wiring import DELETING, Sockets
from kernel.links import LinkEvent, LinkMonitor, delete_group, delete_link, set_group
from kernel.netlink import NetlinkSocket

# Threads. One takes up to 25 ms for a deletion, of which the kernel does others meanwhile.
DELETERS = 8


@dataclass(slots=True)
class _Removal:
    """``done`` is set when the interface is gone, or (``error``) can't be deleted."""

    index: int
    done: threading.Event = field(default_factory=threading.Event)
    error: OSError | None = None


class Reaper:
    """Deletes interfaces of the namespace that ``sockets`` speak to, and the making thread is in.

    ``before_waiting`` is called by each that gives it something to do.
    """

    def __init__(
        self, sockets: Sockets, before_waiting: Callable[[], object] = lambda: None
    ) -> None:
        self._sockets = sockets
        self._before_waiting = before_waiting
        self._queue: queue.SimpleQueue[_Removal | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._awaited: dict[int, _Removal] = {}
        self._monitor = LinkMonitor(self._hear, only_deletions=True)
        self._threads = [
            threading.Thread(target=self._run, name="cni-reaper", daemon=True)
            for _ in range(DELETERS)
        ]

    def start(self) -> None:
        """Start the threads."""
        self._monitor.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, after all that they were given before."""
        self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._monitor.stop()

    def remove(self, index: int) -> None:
        """Delete an interface and wait until it is gone; it may have gone by itself.

        Raises OSError.
        """
        with self._lock:
            removal = self._awaited.get(index)
            if removal is None:
                removal = self._awaited[index] = _Removal(index)
                self._queue.put(removal)
        self._before_waiting()
        removal.done.wait()
        if removal.error is not None:
            raise removal.error

    def _hear(self, event: object) -> None:
        """In the monitor's thread. What it has missed, the answer of the kernel makes good."""
        if isinstance(event, LinkEvent):
            self._finish(event.index)

    def _finish(self, index: int, error: OSError | None = None) -> None:
        with self._lock:
            removal = self._awaited.pop(index, None)
        if removal is not None:
            removal.error = error
            removal.done.set()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            waiting = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while waiting[-1] is not None:
                    waiting.append(self._queue.get_nowait())
            stopping = waiting[-1] is None
            if stopping:
                self._queue.put(None)  # for the next thread
            indexes = [removal.index for removal in waiting if removal is not None]
            try:
                with self._sockets.borrow() as netlink:
                    errors = _delete(netlink, indexes)
            except OSError as error:
                errors = dict.fromkeys(indexes, error)
            for index in indexes:
                self._finish(index, errors.get(index))


def _delete(netlink: NetlinkSocket, indexes: Sequence[int]) -> dict[int, OSError]:
    """``ip link set … group DELETING`` for each, then ``ip link del group DELETING``.

    Returns what hindered it. Raises OSError when none could be deleted.
    """
    if not indexes:
        return {}
    messages = [set_group(index, DELETING) for index in indexes]
    messages.append(delete_group(DELETING))
    if len(indexes) == 1:
        messages = [delete_link(indexes[0])]
    errors = {}
    for failure in netlink.batch(messages):
        # The container's namespace took it along, or another thread the group.
        if failure.errno == errno.ENODEV:
            continue
        if failure.index == len(indexes):
            raise failure.error("deleting interfaces")
        index = indexes[failure.index]
        errors[index] = failure.error(f"deleting interface #{index}")
    return errors
