"""Policies, tiers and profiles as neutral chains and rules: what all endpoints have in common.

A policy that allows sets the mark ACCEPT, one that passes sets PASS. A staged policy counts what
it would have decided, and decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from felix import names
from felix.chains import (
    Action,
    Chain,
    ChainRule,
    ClearMarks,
    Condition,
    Deny,
    Jump,
    Log,
    Mark,
    MarkAndReturn,
    Return,
    State,
)
from felix.settings import Settings
from policy.model import Action as PolicyAction
from policy.model import CompiledPolicy, Direction, EndpointBinding, Match, Rule, TierBinding

ALLOWED = Condition(marked=Mark.ACCEPT)
UNDECIDED = Condition(unmarked=Mark.PASS)
ESTABLISHED = Condition(states=(State.RELATED, State.ESTABLISHED))

_ICMPV6 = 58
# RFC 4890, 4.4.1: multicast listener messages and neighbour discovery, without which nobody
# finds a neighbour or a gateway.
NEIGHBOUR_DISCOVERY = tuple(
    Condition(packet=Match(protocol=_ICMPV6, icmp_type=kind))
    for kind in (130, 131, 132, 133, 135, 136)
)

# What a rule does that isn't staged and doesn't log.
UNIFORM: Mapping[PolicyAction, Action] = {
    PolicyAction.ALLOW: MarkAndReturn(Mark.ACCEPT),
    PolicyAction.DENY: Deny(),
    PolicyAction.PASS: MarkAndReturn(Mark.PASS),
}

_RETURN = (ChainRule(Return(), ALLOWED),)


def policy_chain(policy: CompiledPolicy, direction: Direction, settings: Settings) -> Chain | None:
    """A policy's or profile's chain; None where it does not apply in that direction."""
    rules = policy.ingress if direction is Direction.INGRESS else policy.egress
    if rules is None:
        return None
    return Chain(
        names.policy_chain(direction, policy.id),
        tuple(
            ChainRule(
                _action(rule, policy, settings),
                Condition(packet=rule.match),
                f"{policy.id} {direction.value} rule {rule.index}",
            )
            for rule in rules
            if not (policy.id.is_staged and rule.action is PolicyAction.LOG)
        ),
    )


def _action(rule: Rule, policy: CompiledPolicy, settings: Settings) -> Action:
    if policy.id.is_staged:
        return Return()  # and the rule is counted
    if rule.action is PolicyAction.LOG:
        return Log(f"{_log_prefix(settings.log_prefix, policy)}: ")
    return UNIFORM[rule.action]


# Of those that can log.
_SHORT_KINDS = {"NetworkPolicy": "np", "GlobalNetworkPolicy": "gnp", "Profile": "pro"}


def _log_prefix(form: str, policy: CompiledPolicy) -> str:
    """What ``logPrefix`` becomes: which policy logs."""
    id = policy.id
    words = {
        "%t": policy.tier,
        "%k": _SHORT_KINDS.get(id.kind, id.kind),
        "%n": id.name,
        "%p": f"{id.namespace}/{id.name}" if id.namespace else id.name,
    }
    return re.sub("%[tknp]", lambda found: words[found[0]], form)


class Step(NamedTuple):
    """A chain to walk on the way through a tier; not ``decides``: whatever it says, go on."""

    chain: str
    decides: bool = True


def policy_steps(tier: TierBinding, direction: Direction) -> Iterator[Step]:
    """A tier's policies, one by one."""
    for policy in tier.policies(direction):
        yield Step(names.policy_chain(direction, policy), not policy.is_staged)


def tier_rules(
    binding: EndpointBinding,
    direction: Direction,
    *,
    ends: bool = True,
    allowed: tuple[ChainRule, ...] = _RETURN,
    steps: Callable[[TierBinding, Direction], Iterable[Step]] = policy_steps,
) -> Iterator[ChainRule]:
    """Tiers in order. ``allowed``: what follows a policy; not ``ends``: a tier never denies.

    ``steps``: what to walk for a tier, if not its policies one by one.
    ACCEPT must be clear, unless all policies are staged.
    """
    for tier in binding.tiers:
        if not tier.policies(direction):
            continue
        yield ChainRule(ClearMarks(Mark.PASS), comment=f"Tier {tier.name}")
        for step in steps(tier, direction):
            yield ChainRule(Jump(step.chain), UNDECIDED)
            if step.decides:
                yield from allowed
        if ends and tier.ends(direction) and tier.default_action is PolicyAction.DENY:
            yield ChainRule(Deny(), UNDECIDED, comment=f"End of tier {tier.name}")


def profile_rules(binding: EndpointBinding, direction: Direction) -> Iterator[ChainRule]:
    """Profiles in order."""
    for profile in binding.profiles:
        yield ChainRule(Jump(names.policy_chain(direction, profile)))
        yield from _RETURN
