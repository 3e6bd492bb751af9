"""The agent: threads that put things on one queue, and the loop that takes them off.

The datastore's follower, the relay's channel, the kernel watch and the status socket only put;
everything else happens in the loop. The agent may end at any moment: ExaBGP and the kernel go
on, and the next one takes over.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import queue
import time
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path

from bird_glue.channel import FromRelay
from bird_glue.choice import AUTO
from bird_glue.core import Core
from bird_glue.detector import Detector, FromDetector, Timing
from bird_glue.engines import Engines
from bird_glue.fib import Fib
from bird_glue.keepsake import Keepsake, Passwords
from bird_glue.limits import DEFAULT_LIMIT, Resting
from bird_glue.nodestatus import NodeStatusWriter
from bird_glue.resources import GROUPS, KINDS
from bird_glue.secrets import SecretRead, SecretReader, own_namespace
from bird_glue.status import BgpStatus, Request, StatusServer, status_answer
from bird_glue.watch import KernelChanged, KernelReader, KernelWatch, source_of
from bird_glue.workloads import PeeringAddresses
from datastore.follower import Follower, InSync, Update
from datastore.interface import Datastore
from kernel.netlink import NetlinkSocket

_log = logging.getLogger(__name__)

_RESYNC_SECONDS = 60.0
_READ_PAUSE = 0.2  # between two looks at the kernel
_LEAVE_SECONDS = 5.0
_INIT = 1
# Thousands of routes come at once, and are here to stay; looking through all objects for
# cycles at each few hundred new ones takes longer than taking them in.
_GC = 50_000, 20, 50


class AlreadyRunningError(Exception):
    """Another agent uses the same directory."""


class Stop:
    """Put on the queue: end, and leave everything as it is."""


@dataclass(frozen=True, slots=True)
class GroupInSync:
    """Put on the queue: all objects of a group are known."""

    group: str


Item = (
    Update
    | InSync
    | FromRelay
    | FromDetector
    | KernelChanged
    | Request
    | GroupInSync
    | SecretRead
    | Stop
)


class Agent:
    """BGP of one node. ``run`` returns after ``stop``, or after a request to leave."""

    def __init__(
        self,
        node: str,
        run_dir: Path,
        store: Datastore,
        *,
        router_id: str = "",
        bfd: Timing | None = None,
        receive_limit: int = DEFAULT_LIMIT,
        engine: str = AUTO,
        pod_cidrs: bool = False,
    ) -> None:
        """``router_id``: an IPv4 address, ``hash``, or empty (see ``local_settings``).

        ``bfd``: how fast dead peers are found; None: when their hold time is over. ``engine``:
        ``exabgp``, ``bird`` or ``auto``, unless a resource says which. ``pod_cidrs``: the
        ranges that Kubernetes gave the node are its blocks, too.
        Raises AlreadyRunningError, OSError.
        """
        run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock = _lock(run_dir / "bgp.lock")
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._netlink = NetlinkSocket()
        self._kernel = KernelReader(self._netlink)
        self._fib = Fib(self._netlink)
        self._engines = Engines(run_dir, self._queue.put)
        self._detector = Detector(run_dir, self._queue.put, bfd)
        self._core = Core(
            node,
            router_id,
            self._engines,
            engine,
            self._fib,
            self._detector,
            Resting(receive_limit),
            Keepsake(run_dir / "bgp.objects"),
            Passwords(Keepsake(run_dir / "bgp.passwords")),
            silent=self._kernel.silent,
            source_of=source_of,
            pod_cidrs=pod_cidrs,
        )
        self._watch = KernelWatch(self._queue.put, self._netlink.port)
        self._store = store
        kinds = (*KINDS, "KubernetesNode") if pod_cidrs else KINDS
        self._follower = Follower(store, kinds, self._queue.put)
        self._group_followers: dict[str, Follower] = {}
        self._peering = PeeringAddresses(self._netlink)
        self._secrets = SecretReader(store, own_namespace(), self._queue.put)
        self._status = StatusServer(run_dir, self._queue.put)
        self._node_status = NodeStatusWriter(store, node, self._queue.put)
        self._stopping = False
        self._leaving: list[Request] = []
        self._leave_until: float | None = None
        self._read_due = 0.0

    def stop(self) -> None:
        """End the loop; ExaBGP and the routes stay. From any thread, or a signal handler."""
        self._queue.put(Stop())

    def run(self) -> None:
        """Work until told to stop. Raises OSError where ExaBGP can't be taken over."""
        gc.freeze()  # all that was imported stays, so nobody need look at it again
        gc.set_threshold(*_GC)
        now = time.monotonic()
        self._engines.adopt(now)
        self._watch.start()
        self._follower.start()
        self._status.start()
        self._node_status.start()
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._refuse_requests()
            self._node_status.stop()
            self._status.stop()
            self._follower.stop()
            for follower in self._group_followers.values():
                follower.stop()
            self._secrets.stop()
            self._watch.stop()
            self._engines.close()
            if os.getpid() == _INIT:  # all that runs here ends with us
                self._detector.end()
            else:
                self._detector.close()
            self._netlink.close()
            self._lock.close()

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self._read_due or self._fib.unread:
            self._read_kernel(now)
        self._core.reconcile(now)
        self._watch.blocks = self._core.blocks
        self._watch.bird_metrics = self._fib.bird_metrics
        self._secrets.want(self._core.wanted_secrets)
        self._follow_groups()
        self._set_peering_addresses(look=False)
        if self._leave_until is not None:
            self._go_on_leaving(now, self._leave_until)
        if self._stopping:  # nothing is to be started any more
            return
        self._detector.step(now)
        leaving = None if self._leave_until is None else self._engines.current.next_due(now)
        dues = (self._core.next_due(now), self._detector.next_due(now), self._read_due, leaving)
        due = min(time for time in dues if time is not None)
        for item in self._take(max(0.0, due - time.monotonic())):
            self._handle(item, time.monotonic())

    def _follow_groups(self) -> None:
        """Follow what there may be much of only where it is needed; from then on it is kept."""
        for group in self._core.needs - self._group_followers.keys():

            def sink(item: Update | InSync, group: str = group) -> None:
                self._queue.put(GroupInSync(group) if isinstance(item, InSync) else item)

            self._group_followers[group] = Follower(self._store, GROUPS[group], sink)
            self._group_followers[group].start()

    def _set_peering_addresses(self, *, look: bool) -> None:
        wanted = self._core.peering_addresses
        if wanted is None:
            return
        try:
            self._peering.apply(wanted, look=look)
        except OSError as error:
            _log.warning("can't set the addresses that workloads call: %s", error)

    def _take(self, seconds: float) -> list[Item]:
        """All that is on the queue; waits for the first."""
        try:
            items = [self._queue.get(timeout=seconds)]
        except queue.Empty:
            return []
        while True:
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                return items

    def _handle(self, item: Item, now: float) -> None:
        match item:
            case FromRelay():
                for event in self._engines.current.handle(item, now):
                    self._core.session(event, now)
            case FromDetector():
                for failure in self._detector.handle(item, now):
                    self._core.failed(failure)
            case Update():
                self._core.update(item)
            case InSync():
                self._core.in_sync()
            case SecretRead():
                self._core.secret(item)
            case GroupInSync(group=group):
                self._core.group_in_sync(group)
            case KernelChanged():
                self._read_due = min(self._read_due, now + _READ_PAUSE)
            case Request(command="status"):
                item.answer(status_answer(self._status_now()))
            case Request(command="routes"):
                item.answer({"routes": self._core.learned_routes()})
            case Request(command="leave"):
                self._leave(item, now)
            case Stop():
                self._stopping = True

    def _status_now(self) -> BgpStatus:
        status = self._core.status()
        problems = [
            f"{group} are not followed, what was known of them stands: {follower.problem}"
            for group, follower in sorted(self._group_followers.items())
            if follower.problem
        ]
        followed = self._follower.problem or "followed"
        return replace(status, datastore=followed, problems=status.problems + problems)

    def _refuse_requests(self) -> None:
        """Nobody should wait for an answer that won't come."""
        for item in self._take(0.0):
            if isinstance(item, Request):
                item.answer({"error": "manx-bird-glue is ending"})

    def _read_kernel(self, now: float) -> None:
        """See what the kernel has: after a change, and every minute in case one was missed."""
        self._watch.rearm()
        try:
            self._core.set_topology(self._kernel.topology(self._fib.owns))
            self._fib.read()
        except OSError as error:
            _log.warning("can't read the kernel's routes, trying again: %s", error)
            self._read_due = now + 1.0
            return
        self._set_peering_addresses(look=True)
        self._read_due = now + _RESYNC_SECONDS

    def _leave(self, request: Request, now: float) -> None:
        if self._leave_until is None:
            _log.info("leaving: withdrawing all routes")
            self._engines.current.leave()
            self._leave_until = now + _LEAVE_SECONDS
        self._leaving.append(request)

    def _go_on_leaving(self, now: float, until: float) -> None:
        engine = self._engines.current
        engine.step(now)  # which the core doesn't call before it knows what this node is to be
        left = engine.left
        if not left and now < until:
            return
        engine.stop()
        self._detector.end()
        problems = [] if left else ["not all peers could be told"]
        for what, remove in (
            ("files", self._core.forget),
            ("routes", self._fib.clear),
            ("addresses", self._peering.clear),
        ):
            try:
                remove()
            except OSError as error:
                problems.append(f"not all {what} could be removed: {error}")
        answer = {"error": "; ".join(problems)} if problems else {"left": True}
        for request in self._leaving:
            request.answer(answer)
        self._stopping = True


def _lock(path: Path) -> TextIOWrapper:
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise AlreadyRunningError(f"{path}: another manx-bird-glue is running") from None
    return lock
