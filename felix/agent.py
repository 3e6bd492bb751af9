"""The loop: updates from one queue → snapshot → calculation → dataplane → status.

Watchers are threads that only put updates on the queue; everything behind it happens in the
thread that calls ``run``. What is queued when the loop comes round is one batch. Nothing is
written to the kernel before the datastore has told everything it had at the start.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import Any

from datastore.environment import Environment
from datastore.follower import Follower, InSync, Update
from datastore.interface import Datastore
from felix import backends, names
from felix.addresses import host_addresses
from felix.announcer import SOCKET as ENDPOINTS_SOCKET
from felix.announcer import Announcer, Subscription
from felix.calculate import Calculator
from felix.conntrack import Connections, ends_forbidden
from felix.dataplane import Dataplane, Enforcer
from felix.door import Door
from felix.drift import Drift
from felix.registration import NODE_IP, Registrar, RegistrationProblem, node_address
from felix.snapshot import KINDS, Snapshot
from felix.status import StatusRequest, StatusServer
from kernel.links import AddressEvent, LinkEvent, LinkEventsLost, LinkMonitor
from kernel.nft_monitor import TableChanged
from policy.model import EndpointId
from reconcile.backoff import Backoff

# So many updates at most are one batch: the kernel need not wait for a flood to end.
_BATCH = 10_000

_LOCKED = (
    "spec.datastoreReady: false: the datastore is being moved; what is enforced stays until:"
    " manxctl datastore migrate unlock"
)

_log = logging.getLogger(__name__)


class FlowsListed:
    """There are connections to be judged."""


class Stop:
    """Asks the loop to end."""


Item = (
    Update
    | InSync
    | LinkEvent
    | LinkEventsLost
    | AddressEvent
    | TableChanged
    | RegistrationProblem
    | StatusRequest
    | Subscription
    | FlowsListed
    | Stop
)


class Agent:
    """The agent of ``environment.node``, in the network namespace of the thread that runs it.

    Raises ValueError for an environment variable that says what can't be.
    """

    def __init__(self, environment: Environment, store: Datastore) -> None:
        self._environment = environment
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._snapshot = Snapshot()
        self._calculator = Calculator(environment.node)
        self._dataplane: Dataplane | None = None
        self._connections: Connections | None = None
        self._ends_forbidden = ends_forbidden(os.environ)
        self._backend: backends.Backend | None = None
        self._unmet = ""  # why another is not the one that is asked for
        self._remains: list[str] | None = None  # of other backends; None: not looked for yet
        self._follower = Follower(store, KINDS, self._queue.put)
        self._registrar = Registrar(store, environment.node, self._address, self._queue.put)
        self._registration_problem: str | None = None
        self._in_sync = False
        self._stopping = False
        self._asked: list[StatusRequest] = []
        self._announcer = Announcer()
        self._drift = Drift(self._queue.put)
        self._backoff: Backoff[str] = Backoff()
        self._wish: Backoff[str] = Backoff()  # for another backend
        self._failure: str | None = None
        self._started = _now()
        self._last_apply: dict[str, Any] | None = None

    def stop(self) -> None:
        """End ``run`` soon. May come from any thread and from a signal handler."""
        self._queue.put(Stop())

    def run(self) -> None:
        """Run until ``stop``. What is enforced then stays enforced."""
        run_dir = self._environment.run_dir
        status = StatusServer(run_dir, self._queue.put)
        endpoints = Door(
            run_dir / ENDPOINTS_SOCKET,
            0o600,
            lambda connection: self._queue.put(Subscription(connection)),
        )
        with LinkMonitor(self._queue.put, addresses=True):
            for thread in (status, endpoints, self._registrar, self._follower):
                thread.start()
            try:
                while not self._stopping:
                    self._turn()
            finally:
                for thread in (self._follower, self._registrar, endpoints, status):
                    thread.stop()
                self._announcer.close()
                self._let_go()

    def _turn(self) -> None:
        try:
            self._take(self._queue.get(timeout=self._pause()))
            for _ in range(_BATCH):
                self._take(self._queue.get_nowait())
        except queue.Empty:
            pass
        if self._in_sync and not self._stopping:
            self._work(time.monotonic())
        # After the work, so that an answer speaks of all that was told before the question.
        while self._asked:
            self._asked.pop().reply.put(self._status())

    def _pause(self) -> float | None:
        """Seconds until something is due by itself; None: nothing is."""
        if not self._in_sync or (self._snapshot.locked and self._dataplane is None):
            return None
        times = [self._backoff.next_due()]
        if not len(self._backoff):  # else all has to wait for that
            times += [self._drift.next_due(), self._wish.next_due()]
            if self._dataplane is not None:
                times.append(self._dataplane.next_retry())
            if self._connections is not None:
                times.append(self._connections.next_due())
        due = [moment for moment in times if moment is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _take(self, item: Item) -> None:
        match item:
            case Update(key, value):
                self._snapshot.update(key, value)
            case InSync():
                self._in_sync = True
            case LinkEvent():
                self._calculator.host_changed(item)
                self._link_changed(item)
            case LinkEventsLost():
                self._drift.doubt()
            case AddressEvent():
                self._calculator.host_changed(item)
            case TableChanged():
                self._drift.suspect(item)
            case RegistrationProblem(text):
                self._registration_problem = text
            case StatusRequest():
                self._asked.append(item)
            case Subscription():
                self._announcer.subscribe(item)
            case FlowsListed():
                pass  # the turn that it began sees to them
            case Stop():
                self._stopping = True

    def _link_changed(self, event: LinkEvent) -> None:
        if self._dataplane is None or self._drift.in_doubt:
            return
        try:
            self._dataplane.link_changed(event)
        except OSError as error:
            _log.warning("interface %s: %s; reading everything again", event.name, error)
            self._drift.doubt()

    def _work(self, now: float) -> None:
        if len(self._backoff) and not self._backoff.due(now):
            return
        try:
            if self._drift.sees_interfaces(now):
                self._calculator.set_host_addresses(host_addresses())
            if not self._snapshot.locked:
                self._calculate(now)
            if self._dataplane is not None:  # also while locked: strangers don't know of it
                if self._wish.due(now):
                    self._follow_backend(now)
                self._apply(now)
                self._announcer.tell(self._is_enforced)
                self._review(now)
        except Exception as error:
            # Nothing is certain now: begin anew, from the snapshot and from what the kernel has.
            _log.exception("what is enforced stays; beginning anew")
            self._failure = f"{type(error).__name__}: {error}"
            self._backoff.failed("work", now)
            if self._snapshot.locked:
                self._drift.doubt()  # the snapshot is to wait
            else:
                self._abandon()
        else:
            self._failure = None
            self._backoff.succeeded("work")

    def _calculate(self, now: float) -> None:
        dirty = self._snapshot.dirty or self._calculator.hosts_changed
        if self._dataplane is not None and not dirty:
            return
        had_ipvs = self._calculator.has_ipvs
        before = self._calculator.registration
        delta = self._calculator.calculate(self._snapshot)
        if self._dataplane is None or self._connections is None:
            self._dataplane = Dataplane(self._first_enforcer(now))
            self._connections = Connections(
                self._calculator,
                lambda: self._queue.put(FlowsListed()),
                ends_forbidden=self._ends_forbidden,
            )
            self._dataplane.want(delta)
        else:
            self._connections.note(delta)
            if self._calculator.has_ipvs and not had_ipvs:
                self._connections.doubt()  # what it has sent to pods was not judged
            self._dataplane.want(delta)
            if delta.settings is not None:
                self._follow_backend(now)
        self._announcer.want(delta.endpoints)
        registration = self._calculator.registration
        if registration is not None and registration != before:
            self._registrar.want(registration)

    def _first_enforcer(self, now: float) -> Enforcer:
        calculator = self._calculator
        self._backend, enforcer, refused = backends.make_any(
            calculator.settings, self._backend, calculator.ruleset.members
        )
        self._note_wish(refused, now)
        self._begin_with(enforcer)
        return enforcer

    def _follow_backend(self, now: float) -> None:
        """Have another enforcer do all the work, if it is to be another and can be had."""
        assert self._dataplane is not None
        settings, ruleset = self._calculator.settings, self._calculator.ruleset
        try:
            backend = backends.choose(settings, self._backend)
            if backend is self._backend:
                self._note_wish(None, now)
                return
            enforcer = backends.make(backend, settings, ruleset.members)
            try:
                enforcer.want(ruleset.everything())
                enforcer.read()
            except BaseException:
                enforcer.close()
                raise
        except backends.FAILURES as error:
            self._note_wish(error, now)
            return
        self._note_wish(None, now)
        self._dataplane.switch(enforcer)
        self._backend = backend
        self._begin_with(enforcer)

    def _begin_with(self, enforcer: Enforcer) -> None:
        assert self._backend is not None
        _log.info("policy is enforced by %s", self._backend.value)
        self._remains = None
        self._drift.follow(enforcer)

    def _note_wish(self, refused: Exception | None, now: float) -> None:
        """Whether the backend that is asked for could be had."""
        if refused is None:
            self._unmet = ""
            self._wish.succeeded("backend")
            return
        assert self._backend is not None
        unmet = f"{refused}; policy is enforced by {self._backend.value}"
        if unmet != self._unmet:
            _log.warning("the backend that is asked for can't be had: %s", unmet)
        self._unmet = unmet
        self._wish.failed("backend", now)

    def _settle_others(self) -> None:
        """What another backend left goes once this one's work stands."""
        assert self._dataplane is not None and self._backend is not None
        if not any(self._dataplane.enforcer.problems()):
            self._remains = backends.settle_others(self._backend, self._calculator.settings)

    def _review(self, now: float) -> None:
        """See to the connections that the change, now in force, may concern."""
        assert self._connections is not None and self._dataplane is not None
        problems = self._dataplane.enforcer.problems()
        self._connections.review(now, in_force=not any(problems))

    def _apply(self, now: float) -> None:
        assert self._dataplane is not None and self._connections is not None
        assert self._backend is not None
        look = self._drift.look(self._dataplane, now)
        if look.beside:
            self._remains = None  # to be tried again, and others may have come
        self._drift.plan(self._calculator.settings, self._backend, now)
        begin = time.perf_counter()
        changes = self._dataplane.apply(now)
        if look.planned or look.suspicious:
            self._connections.restore()
            if changes:
                self._connections.doubt()
        if changes and look.suspicious:
            _log.warning("somebody else changed what enforces policy; did %d changes", changes)
        self._connections.forget()
        if self._remains is None:
            self._settle_others()
        if changes or self._last_apply is None:
            elapsed = 1000 * (time.perf_counter() - begin)
            first = self._last_apply is None
            level = logging.INFO if first else logging.DEBUG
            _log.log(level, "applied %d changes in %.1f ms", changes, elapsed)
            if first:
                gc.collect()
                gc.freeze()  # what is there now stays: later collections need not walk it
            self._last_apply = {
                "at": _now(),
                "changes": changes,
                "milliseconds": round(elapsed, 1),
            }

    def _is_enforced(self, id: EndpointId, interface: str) -> bool:
        assert self._dataplane is not None
        return self._calculator.holds(id, interface) and self._dataplane.enforces(interface)

    def _let_go(self) -> None:
        self._drift.close()
        for held in (self._connections, self._dataplane):
            if held is not None:
                held.close()
        self._connections = self._dataplane = None

    def _abandon(self) -> None:
        self._let_go()
        self._calculator = Calculator(self._environment.node)
        self._drift.doubt()
        self._snapshot.touch()

    def _address(self, known: Collection[str]) -> str:
        prefixes = self._calculator.settings.interface_prefixes
        return node_address(os.environ.get(NODE_IP), prefixes, known)

    def _status(self) -> dict[str, Any]:
        return {
            "node": self._environment.node,
            "pid": os.getpid(),
            "started": self._started,
            "in_sync": self._in_sync,
            "ready": self._in_sync and self._last_apply is not None and self._failure is None,
            "datastore": self._follower.problem or "followed",
            "last_apply": self._last_apply,
            "endpoints": {
                names.endpoint_text(id): {
                    "interface": interface,
                    "state": self._state(interface),
                }
                for id, interface in self._calculator.places.items()
            },
            "policies": len(self._calculator.engine.policies),
            "sets": len(self._calculator.ruleset.sets),
            "chains": len(self._calculator.ruleset.chains),
            "flows": {
                "ended": self._connections.ended if self._connections else 0,
                "reviewing": self._connections is None or self._connections.reviewing,
            },
            "errors": [{"object": what, "message": message} for what, message in self._errors()],
        }

    def _state(self, interface: str) -> str:
        if self._dataplane is None or self._last_apply is None:
            return "not enforced yet"
        return "waits for its interface" if self._dataplane.waiting(interface) else "enforced"

    def _errors(self) -> Iterator[tuple[str, str]]:
        if self._failure:
            yield "felix", self._failure
        if self._snapshot.locked:
            yield "ClusterInformation(default)", _LOCKED
        if self._unmet:
            yield "FelixConfiguration nftablesMode, iptablesBackend", self._unmet
        if self._registration_problem:
            yield f"Node({self._environment.node})", self._registration_problem
        yield from self._calculator.problems(self._snapshot)
        if self._dataplane is not None:
            yield from self._dataplane.problems()
        if self._connections is not None:
            yield from self._connections.problems()
        for remains in self._remains or ():
            yield "what another backend left", remains


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
