"""Verdicts on many flows: what ``policy.evaluate`` says, fifty times faster.

That is the reference; tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from policy.engine import Changes, SetDelta
from policy.evaluate import EARLY, Flow, Stage, Tables, Verdict, original, stages
from policy.model import (
    Action,
    Direction,
    EndpointBinding,
    EndpointId,
    HostBinding,
    Part,
    PolicyId,
)
from policy.program import Addresses, Program
from policy.walk import Outcome, Row

_STEP = 200  # members, of a set that is read

_NOTHING_ASKED = Verdict(Action.ALLOW, "", None, None, ())


class Evaluator:
    """Verdicts by the policy of ``tables``. Not for several threads at once.

    Building one takes time in proportion to the members of all sets, ``update`` to what changed.
    Built ``in_steps``, it begins with nothing: see ``prepare``.
    """

    def __init__(self, tables: Tables, *, in_steps: bool = False) -> None:
        self._tables = tables
        self._addresses = Addresses({} if in_steps else tables.sets)
        # Sets that are still to be read, and what became meanwhile of the one that is being read.
        self._unread: set[str] = set(tables.sets) if in_steps else set()
        self._reading = ""
        self._late: list[SetDelta] = []
        # The stages of workloads have tables of their own: to hash a Stage takes longer than to
        # decide.
        self._egress: dict[EndpointId, Program] = {}
        self._ingress: dict[EndpointId, Program] = {}
        self._of_hosts: dict[Stage, Program] = {}
        self._users: dict[PolicyId, set[EndpointId]] = {}
        self._uses: dict[EndpointId, set[PolicyId]] = {}

    def prepare(self) -> Iterator[None]:
        """Read the sets, so many members a step. To be read to its end before anything is asked.

        ``update`` may come in between.
        """
        while self._unread:
            self._reading = self._unread.pop()
            members = iter(self._tables.sets[self._reading])
            while some := list(islice(members, _STEP)):
                self._addresses.change(self._reading, some, ())
                yield
            late, self._late = self._late, []
            for delta in late:
                self._change({self._reading: delta})
            self._reading = ""

    def update(self, changes: Changes) -> None:
        """What the engine's last flush changed. Must be told of every one."""
        now: dict[str, SetDelta] = {}
        for set_id, delta in changes.sets.items():
            if set_id == self._reading:
                self._late.append(delta)
            elif set_id not in self._unread:
                now[set_id] = delta
            elif delta.deleted:
                self._unread.discard(set_id)
        self._change(now)
        stale = set(changes.endpoints)
        for policy in changes.policies:
            stale |= self._users.get(policy, set())
        for endpoint in stale:
            for policy in self._uses.pop(endpoint, ()):
                self._users[policy].discard(endpoint)
                if not self._users[policy]:
                    del self._users[policy]
            self._egress.pop(endpoint, None)
            self._ingress.pop(endpoint, None)
            for part in Part if endpoint.kind == "HostEndpoint" else ():
                for direction in Direction:
                    self._of_hosts.pop(Stage(endpoint, direction, part), None)

    def _change(self, sets: Mapping[str, SetDelta]) -> None:
        gone = {set_id for set_id, delta in sets.items() if delta.deleted}
        if gone:
            self._addresses.forget(gone)
        for set_id, delta in sets.items():
            self._addresses.change(set_id, delta.added, delta.removed)

    def evaluate(self, flow: Flow) -> Verdict:
        """The verdict of all policy that the flow meets on its way through the node."""
        src, dst = flow.src_endpoint, flow.dst_endpoint
        if (
            flow.entry is not None
            or flow.exit is not None
            or (src is not None and src.kind == "HostEndpoint")
            or (dst is not None and dst.kind == "HostEndpoint")
        ):
            return self._evaluate_stages(flow)
        verdict = _NOTHING_ASKED
        if src is not None:
            program = self._egress.get(src) or self._program(
                Stage(src, Direction.EGRESS, Part.NORMAL)
            )
            if program is not None:
                verdict = program.evaluate(flow).verdict
                if verdict.action is Action.DENY:
                    return verdict
        if dst is not None:
            program = self._ingress.get(dst) or self._program(
                Stage(dst, Direction.INGRESS, Part.NORMAL)
            )
            if program is not None:
                return _then(verdict, program.evaluate(flow))
        return verdict

    def _evaluate_stages(self, flow: Flow) -> Verdict:
        verdict = _NOTHING_ASKED
        accepted: set[tuple[EndpointId, Direction]] = set()
        before = original(flow)
        for stage in stages(flow):
            program = None if stage[:2] in accepted else self._program(stage)
            if program is None:
                continue
            early = stage.part in EARLY
            outcome = program.evaluate(before if early else flow)
            verdict = _then(verdict, outcome)
            if verdict.action is Action.DENY:
                break
            if early and outcome.decides:
                accepted.add(stage[:2])
        return verdict

    def _program(self, stage: Stage) -> Program | None:
        """What decides in a stage, made at the first use; None: it is no endpoint of ours."""
        endpoint, direction, part = stage
        table = self._egress if direction is Direction.EGRESS else self._ingress
        is_host = endpoint.kind == "HostEndpoint"
        program = self._of_hosts.get(stage) if is_host else table.get(endpoint)
        binding = self._tables.endpoints.get(endpoint)
        if program is not None or binding is None:
            return program
        if isinstance(binding, HostBinding):
            program = self._of_hosts[stage] = self._make(stage, binding.part(part))
        else:
            program = table[endpoint] = self._make(stage, binding)
        return program

    def _make(self, stage: Stage, binding: EndpointBinding) -> Program:
        used = {id for tier in binding.tiers for id in tier.policies(stage.direction)}
        used.update(binding.profiles)
        self._uses.setdefault(stage.endpoint, set()).update(used)
        for id in used:
            self._users.setdefault(id, set()).add(stage.endpoint)
        return Program(Row(self._tables, binding, stage), self._addresses)


def _then(verdict: Verdict, outcome: Outcome) -> Verdict:
    """Of one stage after the other, neither of which denies but perhaps the last."""
    found, decides = outcome
    if not verdict.trace:
        return found
    action, tier, policy, rule_index, _ = found if decides else verdict
    return Verdict(action, tier, policy, rule_index, verdict.trace + found.trace)
