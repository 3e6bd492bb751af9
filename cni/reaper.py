"""Deleting interfaces, many at once.

The kernel takes about as long to delete fifty interfaces of one device group as to delete
one (tens of milliseconds, most of it waiting), and one after the other otherwise. So a
single thread deletes in one go all that it was given while it was busy with those before.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cni.wiring import DELETING
from kernel.links import delete_group, delete_link, set_group
from kernel.netlink import NetlinkSocket


@dataclass(slots=True)
class _Removal:
    index: int
    done: threading.Event = field(default_factory=threading.Event)
    error: OSError | None = None


class Reaper:
    """The thread that deletes interfaces of the node.

    ``before_waiting`` is called by each that gives it something to do.
    """

    def __init__(self, before_waiting: Callable[[], object] = lambda: None) -> None:
        self._before_waiting = before_waiting
        self._queue: queue.SimpleQueue[_Removal | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="cni-reaper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after all that it was given before."""
        self._queue.put(None)
        self._thread.join()

    def remove(self, index: int) -> None:
        """Delete an interface and wait until it is gone; it may have gone by itself.

        Raises OSError.
        """
        removal = _Removal(index)
        self._queue.put(removal)
        self._before_waiting()
        removal.done.wait()
        if removal.error is not None:
            raise removal.error

    def _run(self) -> None:
        stopping = False
        while not stopping:
            waiting = [self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get())
            stopping = None in waiting
            removals = [removal for removal in waiting if removal is not None]
            try:
                _delete(removals)
            except OSError as error:
                for removal in removals:
                    removal.error = error
            for removal in removals:
                removal.done.set()


def _delete(removals: Sequence[_Removal]) -> None:
    """``ip link set … group DELETING`` for each, then ``ip link del group DELETING``."""
    if not removals:
        return
    messages = [set_group(removal.index, DELETING) for removal in removals]
    messages.append(delete_group(DELETING))
    if len(removals) == 1:
        messages = [delete_link(removals[0].index)]
    with NetlinkSocket() as socket:
        failures = socket.batch(messages)
    for failure in failures:
        if failure.errno == errno.ENODEV:  # the container's namespace took it along
            continue
        if failure.index == len(removals):
            raise failure.error("deleting interfaces")
        removal = removals[failure.index]
        removal.error = failure.error(f"deleting interface #{removal.index}")
