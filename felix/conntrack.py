"""What becomes of running connections when policy changes, or an address goes.

The kernel lets pass what belongs to a flow it knows, so a policy that forbids a flow would not
end it. After a change is in force the flows that it may concern are held against policy, and
those it forbids are removed from connection tracking: their next packet is judged as a first one.
The flows of an address that is gone go as well, lest who gets the address inherits them.

To look at flows takes time, for the table may be large. So only flows of addresses that a change
concerns are looked at, and never for more than a part of all time. They are listed in a thread of
its own, and judged a few milliseconds at a time, so that no change waits for it. Each is judged by
policy as it is now, and ended in the same turn: what is allowed again meanwhile goes on, and what
a newer change forbids is looked for once that is in force.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from api.net import BITS, V4, V6, Net
from felix.calculate import Calculator
from felix.conntrack_ended import Ended
from felix.conntrack_gone import Gone
from felix.conntrack_judge import Judge
from felix.conntrack_lister import Lister, Listing
from felix.desired import Delta
from kernel.conntrack import Conntrack, Flow, Tuple
from policy.model import EndpointId, Member, NamedPortMember, PolicyId

_SLICE = 0.002  # s, to judge flows before other work has its turn
_SHARE = 0.1  # of all time, at most, is spent on this
_PATIENCE = 5.0  # s, until what failed is tried again

FORBIDDEN_FLOWS = "MANX_FORBIDDEN_FLOWS"

_log = logging.getLogger(__name__)


def ends_forbidden(env: Mapping[str, str]) -> bool:
    """What ``MANX_FORBIDDEN_FLOWS`` says: ``end`` (or nothing), or ``keep``. Raises ValueError."""
    choice = env.get(FORBIDDEN_FLOWS) or "end"
    if choice not in ("end", "keep"):
        raise ValueError(f"{FORBIDDEN_FLOWS}: {choice!r}: expected end or keep")
    return choice == "end"


@dataclass(slots=True)
class _Concerned:
    """Whose flows a change may concern. ``everybody``: all of them.

    ``policies``: theirs whom one of these is for. As a container: of addresses, packed.
    """

    everybody: bool = False
    hosts: set[Net] = field(default_factory=set)
    networks: set[Net] = field(default_factory=set)
    policies: set[PolicyId] = field(default_factory=set)
    _packed: frozenset[bytes] = frozenset()
    _prefixes: Mapping[tuple[int, int], frozenset[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.everybody or bool(self.hosts or self.networks or self.policies)

    def __contains__(self, packed: object) -> bool:
        if packed in self._packed:
            return True
        if not self._prefixes or not isinstance(packed, bytes):
            return False
        number, size = int.from_bytes(packed, "big"), len(packed)
        return any(
            number >> spare in prefixes
            for (of, spare), prefixes in self._prefixes.items()
            if of == size
        )

    def add(self, members: Iterable[Member]) -> None:
        """Members of a set that came or went."""
        for member in members:
            net = member.net if isinstance(member, NamedPortMember) else member
            (self.hosts if net.is_host else self.networks).add(net)

    def merge(self, other: _Concerned) -> None:
        """Those of the other, too."""
        self.everybody |= other.everybody
        self.hosts |= other.hosts
        self.networks |= other.networks
        self.policies |= other.policies

    def pack(self) -> None:
        """Get ready to be asked; nothing may be added from now on."""
        self._packed = frozenset(net.packed() for net in self.hosts)
        prefixes: dict[tuple[int, int], set[int]] = {}
        for version, number, length in self.networks:
            spare = BITS[version] - length
            prefixes.setdefault((BITS[version] // 8, spare), set()).add(number >> spare)
        self._prefixes = {key: frozenset(numbers) for key, numbers in prefixes.items()}


class Connections:
    """Looks after the flows of local endpoints, in the calling thread's network namespace.

    Begins with what ``calculator`` has calculated, and all flows. ``wake`` is called, in another
    thread, when ``review`` has more to do. ``ends_forbidden`` False: what policy forbids is left to
    end by itself, unless the settings say otherwise.
    """

    def __init__(
        self, calculator: Calculator, wake: Callable[[], None], *, ends_forbidden: bool = True
    ) -> None:
        self._calculator = calculator
        self._wake = wake
        self._ends_forbidden = ends_forbidden
        self._lister = Lister(wake)
        self._conntrack = Conntrack()
        self._ended = {version: Ended(version) for version in (V4, V6)}
        self._judge = Judge(calculator, self._find)
        self._known = set(calculator.pods)
        self._gone = Gone(wake)
        self._concerned = _Concerned(everybody=True)
        self._unsure: _Concerned = _Concerned()  # looked at when not all was in force
        self._sweep = True
        self._review: Iterator[bool] | None = None
        self._waiting = False  # for what is listed
        self._under_review = _Concerned()
        self._doomed: list[Flow] = []
        self._pardoned: list[Tuple] = []
        self._spent = 0.0
        self._resume = 0.0
        self._retry = 0.0  # to forget, after it failed
        self._problem: str | None = None
        self.ended = 0  # flows, since the start

    def close(self) -> None:
        """Close the sockets. What is in the kernel stays."""
        self._judge.look_around()
        self._gone.close()
        self._lister.close()
        self._conntrack.close()
        for ended in self._ended.values():
            ended.close()

    def note(self, delta: Delta) -> None:
        """What the calculator's last calculation changed. Must be told of every later one."""
        changes = self._calculator.changes
        self._judge.note(changes)
        concerned = self._concerned
        concerned.everybody |= delta.settings is not None
        concerned.policies.update(changes.policies)
        self._add_endpoints(concerned, changes.endpoints)
        for change in changes.sets.values():
            if not (change.created or change.deleted):
                concerned.add(change.added)
                concerned.add(change.removed)
        for net, interface in delta.pods.items():
            if interface is None:
                self._known.discard(net)
                self._gone.add(net)
            elif net in self._known:
                self._gone.add(net)  # it has moved
            else:
                self._known.add(net)
                concerned.hosts.discard(net)  # nothing could pass before
            if interface is not None:
                self._gone.inherit(net)

    def restore(self) -> None:
        """Put back what a stranger took of what keeps ended flows ended."""
        for version, ended in self._ended.items():
            try:
                begun = ended.restore()
                found = [flow for own in begun if (flow := self._conntrack.find(own))]
                self._conntrack.delete(found)
            except OSError as error:
                self._failed(error)
                continue
            if begun:
                _log.warning(
                    "somebody else let %d flows of IPv%d go on that policy ended: ended again",
                    len(begun),
                    version,
                )

    def doubt(self) -> None:
        """Policy was not in force for a while: look at everybody's flows."""
        self._concerned.everybody = True

    def forget(self) -> None:
        """Remove flows of addresses that are gone: of those that somebody has got, at once.

        To be called when ``review`` is.
        """
        some = bool(self._gone)
        try:
            self._gone.forget(_SLICE)
        except OSError as error:
            self._failed(error)
            self._retry = self._resume
        else:
            if some and not self.reviewing:
                self._problem = None

    def review(self, now: float, *, in_force: bool) -> None:
        """Look at flows for a moment; ``in_force``: all that policy says is enforced.

        To be called when it is ``next_due``, and when it was woken.
        """
        if in_force and self._unsure:
            self._concerned.merge(self._unsure)
            self._unsure = _Concerned()
        if self._review is None and not self._begin(now, in_force):
            return
        assert self._review is not None
        begin = time.perf_counter()
        self._judge.catch_up()
        try:
            for has_more in self._review:
                self._waiting = not has_more
                if self._waiting or time.perf_counter() - begin > _SLICE:
                    break
            else:
                self._review = None
            self._end()  # now: what they are may be allowed the next time
        except OSError as error:
            self._concerned.merge(self._under_review)
            self._failed(error)
            return
        self._spent += time.perf_counter() - begin
        if self._review is None:
            self._problem = None
            spent = self._spent + self._lister.spent
            self._resume = time.monotonic() + spent * (1 / _SHARE - 1)
            self._spent = self._lister.spent = 0.0

    def next_due(self) -> float | None:
        """When there is something to do, in monotonic seconds. None: nothing, as yet."""
        moments = [self._retry] if self._gone.ready else []
        is_waiting = self._review is not None and self._waiting and not self._lister.ready
        if (self._review is not None or self._concerned) and not is_waiting:
            moments.append(self._resume)
        return min(moments, default=None)

    @property
    def ends_forbidden(self) -> bool:
        """Whether what policy forbids is ended: as the settings say, or else the environment."""
        configured = self._calculator.settings.ends_forbidden
        return self._ends_forbidden if configured is None else configured

    @property
    def reviewing(self) -> bool:
        """Whether flows are still to be looked at, or connections of addresses gone to be ended."""
        return self._review is not None or bool(self._concerned) or bool(self._gone)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(object, what the kernel said)."""
        if self._problem is not None:
            yield "connection tracking", self._problem

    def _find(self, began: Tuple) -> Flow | None:
        return self._conntrack.find(began)

    def _add_endpoints(self, concerned: _Concerned, ids: Iterable[EndpointId]) -> None:
        for id in ids:
            if id.kind == "HostEndpoint":
                concerned.everybody = True
            concerned.hosts.update(self._calculator.addresses(id))

    def _begin(self, now: float, in_force: bool) -> bool:
        """Begin to look at the flows of those concerned, if there are any and it is time."""
        if not self._concerned or now < self._resume:
            return False
        concerned, self._concerned = self._concerned, _Concerned()
        self._under_review = concerned
        if not in_force:
            self._unsure.merge(concerned)
        if not self.ends_forbidden:
            self._review = self._release()
            return True
        for policy in concerned.policies:
            self._add_endpoints(concerned, self._calculator.engine.users(policy))
        concerned.pack()
        self._judge.look_around()
        self._review = self._steps(concerned)
        return True

    def _release(self) -> Iterator[bool]:
        """What was ended may go on."""
        for ended in self._ended.values():
            self._pardoned += ended.held()
            yield True

    def _steps(self, concerned: _Concerned) -> Iterator[bool]:
        """One flow after the other; False: wait until there are more."""
        judge = self._judge
        versions = self._calculator.ruleset.versions
        for version in (V4, V6) if self._calculator.guards else versions:
            for flows in self._lister.listed(self._listing(concerned, version)):
                if flows is None:
                    yield False
                    continue
                for flow in flows:
                    for _ in judge.prepare():
                        yield True
                    if judge.forbids(flow) or (self._sweep and judge.is_stray(flow)):
                        self._doomed.append(flow)
                    yield True
            for began in self._ended[version].held():
                for _ in judge.prepare():
                    yield True
                if not judge.forbids_tuple(began):
                    self._pardoned.append(began)
                yield True
        self._sweep = False

    def _listing(self, concerned: _Concerned, version: int) -> Listing:
        """The flows of those concerned. It is another thread that asks for them."""
        if concerned.everybody:
            # Those of the host alone are of no concern where nothing guards it.
            everywhere = self._sweep or self._calculator.guards
            ends = None if everywhere else {net.packed() for net in self._calculator.pods}
            return lambda conntrack: conntrack.steps(version, ends)
        if concerned.networks:
            return lambda conntrack: conntrack.steps(version, concerned)
        own = [net for net in concerned.hosts if net.version == version]
        return lambda conntrack: conntrack.steps_of(version, own)

    def _end(self) -> None:
        """End the flows that were found to be forbidden; what isn't any more may go on."""
        doomed, self._doomed = self._doomed, []
        pardoned, self._pardoned = self._pardoned, []
        for version, ended in self._ended.items():
            ended.release([began for began in pardoned if began.src.version == version])
        if not doomed:
            return
        for version, ended in self._ended.items():
            try:
                ended.add([flow for flow in doomed if flow.original.src.version == version])
            except OSError as error:
                _log.warning("%s; a server may go on with what policy ended", error)
        self._conntrack.delete(doomed)
        self.ended += len(doomed)
        _log.info("ended %d flows that policy forbids, such as %s", len(doomed), doomed[0])

    def _failed(self, error: OSError) -> None:
        if self._problem != str(error):
            _log.warning("connection tracking: %s; will be tried again", error)
        self._problem = str(error)
        if self._review is not None:
            self._concerned.merge(self._under_review)
            self._review = None
        self._doomed.clear()
        self._pardoned.clear()
        for conversation in (self._lister, self._conntrack):
            conversation.close()  # perhaps in the midst of an answer
        self._lister, self._conntrack = Lister(self._wake), Conntrack()
        self._resume = time.monotonic() + _PATIENCE
