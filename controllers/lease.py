"""Leader election by a Lease in the datastore, whichever store that is.

As in Kubernetes' client-go, no clock is compared with another machine's: whoever wants the lease
watches for changes of it by its own clock, and takes it when it has not changed for as long as
its holder asked for. The holder writes it again and again, and counts itself out, by its own
clock, well before others may take it. Source: client-go tools/leaderelection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Datastore,
    Entry,
    Key,
    NotFoundError,
    StoreError,
)

LEASE = Key("Lease", "manx-controllers", "kube-system")

_log = logging.getLogger(__name__)


def steady() -> float:
    """Seconds by a clock that never goes back and also counts while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. ``duration``: how long others wait for a change. ``retry``: between two tries.

    ``renewal``: how long the holder goes on leading without having written the lease.
    """

    duration: float = 15.0
    renewal: float = 10.0
    retry: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.retry < self.renewal < self.duration:
            raise ValueError(f"{self}: 0 < retry < renewal < duration is needed")


TIMING = Timing()


@dataclass(frozen=True, slots=True)
class Leadership:
    """Who leads now. ``problem``: why it can't be told, None when it can."""

    leading: bool
    holder: str
    problem: str | None = None


class Lease:
    """One candidate's view of the lease. Not a thread: ``attempt`` does one step."""

    def __init__(
        self,
        store: Datastore,
        identity: str,
        timing: Timing = TIMING,
        *,
        clock: Callable[[], float] = steady,
    ) -> None:
        self.identity = identity
        self.holder = ""
        self._store = store
        self._timing = timing
        self._clock = clock
        self._seen: tuple[str, JSON] | None = None  # revision and spec, as last observed
        self._seen_at = 0.0
        self._renewed: float | None = None

    @property
    def leading(self) -> bool:
        """Whether the lease is ours at this moment, for certain."""
        renewed = self._renewed
        return renewed is not None and self._clock() - renewed < self._timing.renewal

    def attempt(self) -> bool:
        """Renew the lease or, if it is free, take it; whether it is ours. Raises StoreError."""
        begin = self._clock()  # what is written counts from before it was written
        try:
            entry = self._store.get(LEASE)
        except NotFoundError:
            return self._won(begin, lambda: self._store.create(LEASE, self._object({}, None)))
        self._observe(entry)
        spec = entry.value.get("spec") or {}
        if self.holder not in ("", self.identity) and not self._expired(spec):
            self._renewed = None
            return False
        value = self._object(spec, entry.value)
        return self._won(begin, lambda: self._store.update(LEASE, value, entry.revision))

    def release(self) -> None:
        """Give the lease up, so that another need not wait. Raises StoreError."""
        self._renewed = None
        try:
            entry = self._store.get(LEASE)
            spec = entry.value.get("spec") or {}
            if spec.get("holderIdentity") != self.identity:
                return
            spec = spec | {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
            self._store.update(LEASE, entry.value | {"spec": spec}, entry.revision)
        except (NotFoundError, ConflictError):
            return  # another has it

    def _won(self, begin: float, write: Callable[[], Entry]) -> bool:
        try:
            self._observe(write())
        except (AlreadyExistsError, ConflictError, NotFoundError):
            self._renewed = None  # another was faster
            return False
        self._renewed = begin
        return True

    def _observe(self, entry: Entry) -> None:
        spec = entry.value.get("spec") or {}
        seen = (entry.revision, spec)
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock()
        self.holder = spec.get("holderIdentity") or ""

    def _expired(self, spec: JSON) -> bool:
        duration = spec.get("leaseDurationSeconds") or self._timing.duration
        return self._clock() - self._seen_at >= float(duration)

    def _object(self, spec: JSON, found: JSON | None) -> JSON:
        """The lease as ours: renewed, or taken."""
        now = _now()
        ours: dict[str, Any] = spec | {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": max(1, round(self._timing.duration)),
            "renewTime": now,
        }
        if spec.get("holderIdentity") != self.identity:
            ours["acquireTime"] = now
            ours["leaseTransitions"] = (spec.get("leaseTransitions") or 0) + bool(found)
        if found is not None:
            return found | {"spec": ours}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": LEASE.name, "namespace": LEASE.namespace},
            "spec": ours,
        }


class Elector:
    """A thread that tries for the lease, keeps it, and tells ``report`` of every change."""

    def __init__(
        self, lease: Lease, timing: Timing, report: Callable[[Leadership], object]
    ) -> None:
        self._lease = lease
        self._timing = timing
        self._report = report
        self._said: Leadership | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elector", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. The lease stays; give it up when the work that it covers has ended."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            problem = None
            try:
                self._lease.attempt()
            except StoreError as error:
                problem = str(error)
            except Exception as error:
                _log.exception("unexpected error while trying for the lease")
                problem = repr(error)
            self._say(Leadership(self._lease.leading, self._lease.holder, problem))
            if self._stopping.wait(self._timing.retry):
                return

    def _say(self, now: Leadership) -> None:
        before, self._said = self._said, now
        if now == before:
            return
        if now.problem and (before is None or now.problem != before.problem):
            _log.warning("lease %s: %s", LEASE, now.problem)
        if now.leading != (before is not None and before.leading):
            _log.info("%s", "leading" if now.leading else f"not leading: {now.holder or 'nobody'}")
        self._report(now)


def _now() -> str:
    """As Kubernetes' MicroTime. For people: no program reckons with it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
