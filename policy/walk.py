"""All that is asked at an endpoint in one direction, in order, and the way through it.

Made once of what is bound there. With the rules that match known (``policy.program``), which way a
packet goes is a matter of the bits that stand for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from policy.evaluate import EARLY, Stage, Step, Tables, Verdict, verdict_of
from policy.model import Action, Direction, EndpointBinding, Match, Part, PolicyId


class Outcome(NamedTuple):
    """The verdict of one stage; and whether it ``decides``, or the packet goes on undecided."""

    verdict: Verdict
    decides: bool


class _Policy(NamedTuple):
    """The rules of a policy: which bits they are, and what to tell of each, or of none."""

    first: int
    mask: int
    rules: tuple[Step, ...]
    none: Step
    is_staged: bool


class _Tier(NamedTuple):
    policies: tuple[_Policy, ...]
    end: Step | None


class Row:
    """What is asked in a stage. ``matches`` are the conditions of all rules in order."""

    __slots__ = ("_end", "_profiles", "_tiers", "matches")

    def __init__(self, tables: Tables, binding: EndpointBinding, stage: Stage) -> None:
        self.matches: list[Match] = []
        endpoint, direction, part = stage
        tiers = []
        for tier in binding.tiers:
            ids = tier.policies(direction)
            policies = tuple(self._policy(tables, id, tier.name, stage) for id in ids)
            end = None
            if tier.ends(direction) and part not in EARLY:
                end = Step(endpoint, direction, tier.name, None, None, tier.default_action, part)
            tiers.append(_Tier(policies, end))
        self._tiers = tuple(tiers)
        self._profiles: tuple[_Policy, ...] = ()
        self._end: Step | None = None
        if part is Part.NORMAL:
            self._profiles = tuple(self._policy(tables, id, "", stage) for id in binding.profiles)
            self._end = Step(endpoint, direction, "", None, None, Action.DENY)

    def _policy(self, tables: Tables, id: PolicyId, tier: str, stage: Stage) -> _Policy:
        endpoint, direction, part = stage
        policy = tables.policies[id]
        rules = (policy.ingress if direction is Direction.INGRESS else policy.egress) or ()
        first = len(self.matches)
        self.matches += [rule.match for rule in rules]
        steps = (
            Step(endpoint, direction, tier, id, rule.index, rule.action, part) for rule in rules
        )
        none = Step(endpoint, direction, tier, id, None, None, part)
        return _Policy(first, (1 << len(rules)) - 1, tuple(steps), none, id.is_staged)

    def walk(self, matching: int) -> Outcome:
        """The way of a packet that these rules match, as bits."""
        verdict = verdict_of(tuple(self._steps(matching)))
        return Outcome(verdict, any(step.decides for step in verdict.trace))

    def _steps(self, matching: int) -> Iterator[Step]:
        """As ``policy.evaluate`` has it."""
        for tier in self._tiers:
            action: Action | None = None
            for policy in tier.policies:
                for step in _looked_at(policy, matching):
                    yield step
                    if not policy.is_staged:
                        action = None if step.action is Action.LOG else step.action
                if action:
                    break
            else:
                if tier.end:
                    action = tier.end.action
                    yield tier.end
            if action in (Action.ALLOW, Action.DENY):
                return
        for profile in self._profiles:
            for step in _looked_at(profile, matching):
                yield step
                if step.decides:
                    return
        if self._end:
            yield self._end


def _looked_at(policy: _Policy, matching: int) -> Iterator[Step]:
    """The rules that match up to the first that decides; that none does at last."""
    own = matching >> policy.first & policy.mask
    while own:
        lowest = own & -own
        step = policy.rules[lowest.bit_length() - 1]
        yield step
        if step.action is not Action.LOG:
            return
        own ^= lowest
    yield policy.none
