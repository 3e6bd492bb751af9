"""The program: threads that put things on one queue, and the loop that takes them off.

The elector tells who leads; a worker does the rounds, one at a time, and only while we lead; the
status socket asks. The loop itself waits for none of them, so it always answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from controllers.housekeeping import Housekeeping, Round
from controllers.lease import TIMING, Elector, Leadership, Lease, Timing
from datastore.environment import Environment
from datastore.interface import Datastore, StoreError
from felix.status import StatusRequest, StatusServer
from ipam.collector import HaltedError
from reconcile.backoff import Backoff

SOCKET = "controllers.sock"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Done:
    """A round ended: with what, or why not."""

    round: Round | None
    seconds: float
    failure: str | None = None


class Stop:
    """Asks the loop to end."""


Item = Leadership | Done | StatusRequest | Stop


class Agent:
    """One of any number in a cluster. ``identity``: unique among them, also after a restart."""

    def __init__(
        self,
        environment: Environment,
        store: Datastore,
        identity: str,
        *,
        kubernetes: Datastore | None = None,
        timing: Timing = TIMING,
    ) -> None:
        self._environment = environment
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._retry = timing.retry
        self._lease = Lease(store, identity, timing)
        self._elector = Elector(self._lease, timing, self._queue.put)
        self._housekeeping = Housekeeping(store, kubernetes, proceed=self._may_work)
        self._worker = _Worker(self._housekeeping.round, self._queue.put)
        self._leadership = Leadership(False, "", "not asked yet")
        self._stopping = threading.Event()
        self._backoff: Backoff[str] = Backoff(initial=1.0, maximum=60.0)
        self._next_round = 0.0
        self._working = False
        self._last: Round | None = None
        self._last_at: str | None = None
        self._last_seconds = 0.0
        self._failure: str | None = None
        self._started = _now()

    def stop(self) -> None:
        """End ``run`` soon. May come from any thread and from a signal handler."""
        self._stopping.set()
        self._queue.put(Stop())

    def run(self) -> None:
        """Run until ``stop``; then give up the lease, after the step that is under way."""
        status = StatusServer(self._environment.run_dir, self._queue.put, SOCKET)
        for thread in (status, self._elector, self._worker):
            thread.start()
        try:
            while not self._stopping.is_set():
                self._turn()
        finally:
            self._stopping.set()
            status.stop()
            self._worker.stop()
            self._elector.stop()
            try:
                self._lease.release()
            except StoreError as error:
                _log.warning("the lease is not given up, others must wait for its end: %s", error)

    def _may_work(self) -> bool:
        return self._lease.leading and not self._stopping.is_set()

    def _turn(self) -> None:
        with contextlib.suppress(queue.Empty):
            self._take(self._queue.get(timeout=self._pause()))
        now = time.monotonic()
        if not self._leadership.leading or self._working or now < self._next_round:
            return
        if self._may_work():
            self._working = True
            self._worker.work()
        else:
            self._next_round = now + self._retry  # the elector will tell

    def _pause(self) -> float | None:
        if not self._leadership.leading or self._working:
            return None
        return max(0.0, self._next_round - time.monotonic())

    def _take(self, item: Item) -> None:
        match item:
            case Leadership():
                self._leadership = item
            case Done():
                self._finished(item)
            case StatusRequest():
                item.reply.put(self._status())
            case Stop():
                pass  # the event says it

    def _finished(self, done: Done) -> None:
        self._working = False
        now = time.monotonic()
        self._failure = done.failure
        if done.round is None:
            halted = done.failure is None
            self._next_round = now + self._retry if halted else self._backoff.failed("round", now)
            return
        self._backoff.succeeded("round")
        self._last, self._last_at, self._last_seconds = done.round, _now(), done.seconds
        self._next_round = now + done.round.settings.period
        for problem in done.round.collected.problems:
            _log.warning("%s", problem)

    def _status(self) -> dict[str, Any]:
        leading = self._lease.leading
        last = None
        if self._last is not None:
            last = {"at": self._last_at, "seconds": round(self._last_seconds, 3)}
            last |= self._last.status()
        return {
            "identity": self._lease.identity,
            "pid": os.getpid(),
            "started": self._started,
            "leading": leading,
            "holder": self._leadership.holder,
            # One that waits for the lease is as ready as it can be.
            "ready": self._leadership.problem is None
            and self._failure is None
            and (not leading or self._last is not None),
            "last_round": last,
            "collected": dict(self._housekeeping.totals),
            "errors": [{"object": what, "message": message} for what, message in self._errors()],
        }

    def _errors(self) -> Iterator[tuple[str, str]]:
        if self._leadership.problem:
            yield "Lease", self._leadership.problem
        if self._failure:
            yield "ipam", self._failure


class _Worker:
    """A thread that does a round when it is told to."""

    def __init__(self, work: Callable[[], Round], report: Callable[[Done], object]) -> None:
        self._work = work
        self._report = report
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def work(self) -> None:
        self._asked.put(True)

    def stop(self) -> None:
        """End the thread, after what it is doing."""
        self._asked.put(False)
        self._thread.join()

    def _run(self) -> None:
        while self._asked.get():
            begin = time.monotonic()
            try:
                done = Done(self._work(), time.monotonic() - begin)
            except HaltedError:
                done = Done(None, time.monotonic() - begin)
            except Exception as error:
                expected = isinstance(error, StoreError | ValueError)
                _log.warning("round failed, trying again: %s", error, exc_info=not expected)
                done = Done(None, time.monotonic() - begin, str(error) or repr(error))
            self._report(done)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
