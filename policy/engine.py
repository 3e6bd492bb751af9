"""Everything together: endpoints, profiles, policies and tiers → what to enforce here.

``set_*`` take the state as it is now, in any order and as often as one likes; ``flush``
works off what changed, in proportion to it, and says what became different. The result is
a function of the state alone.

A policy is active, and its sets exist, while it selects a local endpoint.

Where a tier stands may not be known: it does not exist, or its order can't be read. It is enforced
before all others then, and what its policies allow only passes: so what it denies is denied, what
others deny is denied, and nothing is allowed that would not be wherever the tier may belong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from types import MappingProxyType

from api.errors import Problem
from api.policy import BUILT_IN_TIERS, GlobalNetworkPolicy, NetworkPolicy, Tier
from api.policy import Rule as ApiRule
from policy.active import ActiveRules
from policy.compile import (
    SERVICE_LABEL,
    SERVICE_PORT,
    Compilation,
    CompiledRules,
    compile_policy,
    compile_rules,
)
from policy.labelindex import LabelIndex
from policy.model import (
    Action,
    Binding,
    CompiledPolicy,
    Endpoint,
    EndpointBinding,
    EndpointId,
    HostBinding,
    Member,
    NamedPort,
    Part,
    PolicyId,
    Rule,
    ServiceSlice,
    TierBinding,
)
from policy.selector import Selector
from policy.sets import JoinedSets, SetDelta, Sets

__all__ = ["UNPLACED", "Changes", "Engine", "Profile", "SetDelta", "profile_id"]

UNPLACED = -math.inf  # the order of a tier of which nobody knows where it stands
_MISSING = UNPLACED, Action.DENY


@dataclass(frozen=True, slots=True)
class Profile:
    """What endpoints inherit: labels, and the rules that decide when no policy does."""

    labels: tuple[tuple[str, str], ...] = ()
    ingress: tuple[ApiRule, ...] = ()
    egress: tuple[ApiRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """What became different between two flushes; None: it is no longer there."""

    sets: dict[str, SetDelta]
    policies: dict[PolicyId, CompiledPolicy | None]
    endpoints: dict[EndpointId, Binding | None]

    def __bool__(self) -> bool:
        return bool(self.sets or self.policies or self.endpoints)


def profile_id(name: str) -> PolicyId:
    """Under which id a profile's rules stand among the policies."""
    return PolicyId("Profile", "", name)


# Which endpoints have a profile.
_Users = dict[str, set[EndpointId]]


class Engine:
    """See the module. Not for several threads at once."""

    def __init__(self) -> None:
        self._sets = Sets()
        self._services = Sets()
        self._rules = ActiveRules(self._sets, self._services)
        self._all_sets: Mapping[str, frozenset[Member]] = JoinedSets(self._sets, self._services)
        self._bindings: dict[EndpointId, Binding] = {}
        self._problems: dict[PolicyId, tuple[Problem, ...]] = {}

        self._endpoints: dict[EndpointId, Endpoint] = {}
        self._profiles: dict[str, Profile] = {}
        self._profile_rules: dict[PolicyId, CompiledRules] = {}
        self._profile_users: _Users = {}
        self._local_profile_users: _Users = {}
        self._policies: dict[PolicyId, Compilation] = {}
        self._tiers: dict[str, tuple[float, Action]] = {}
        self._local: LabelIndex[EndpointId] = LabelIndex()  # by the selectors of policies
        self._by_selector: dict[str, set[PolicyId]] = {}

        self._new_endpoints: dict[EndpointId, Endpoint | None] = {}
        self._new_profiles: dict[str, Profile | None] = {}
        self._new_policies: dict[PolicyId, NetworkPolicy | GlobalNetworkPolicy | None] = {}
        self._new_tiers: dict[str, Tier | None] = {}
        self._dirty_policies: set[PolicyId] = set()  # may have become active or inactive
        self._dirty_bindings: set[EndpointId] = set()
        for name in BUILT_IN_TIERS:
            self._apply_tier(name, None)

    @property
    def sets(self) -> Mapping[str, frozenset[Member]]:
        """All sets that active policies and profiles use."""
        return self._all_sets

    @property
    def policies(self) -> Mapping[PolicyId, CompiledPolicy]:
        """The active policies, and the profiles that have rules, of local endpoints."""
        return MappingProxyType(self._rules.active)

    @property
    def endpoints(self) -> Mapping[EndpointId, Binding]:
        """The local endpoints, and what decides about each; a HostEndpoint has a HostBinding."""
        return MappingProxyType(self._bindings)

    @property
    def problems(self) -> Mapping[PolicyId, tuple[Problem, ...]]:
        """What is wrong with policies, active or not, as of the last flush."""
        return MappingProxyType(self._problems)

    def users(self, id: PolicyId) -> Iterable[EndpointId]:
        """The local endpoints that a policy selects, or that have a profile."""
        if id == profile_id(id.name):
            return frozenset(self._local_profile_users.get(id.name, ()))
        compilation = self._policies.get(id)
        return self._local.matches(compilation.selector) if compilation else ()

    def set_endpoint(self, endpoint: Endpoint | None, id: EndpointId) -> None:
        """An endpoint as it is now; None: it is gone."""
        self._new_endpoints[id] = endpoint

    def set_profile(self, name: str, profile: Profile | None) -> None:
        """A profile as it is now; None: it is gone."""
        self._new_profiles[name] = profile

    def set_policy(self, id: PolicyId, policy: NetworkPolicy | GlobalNetworkPolicy | None) -> None:
        """A policy as it is now; None: it is gone. Kubernetes' kinds are converted before."""
        self._new_policies[id] = policy

    def set_service_slice(self, namespace: str, name: str, slice: ServiceSlice | None) -> None:
        """An EndpointSlice, by its own name, as it is now; None: it is gone."""
        id = EndpointId("EndpointSlice", namespace, name)
        endpoint = labels = None
        if slice is not None:
            ports = tuple(NamedPort(SERVICE_PORT, *port) for port in slice.ports)
            labels = {SERVICE_LABEL: slice.service}
            endpoint = Endpoint(id, (), (), slice.nets, ports)
        self._services.set_endpoint(id, endpoint, labels)

    def set_tier(self, name: str, tier: Tier | None) -> None:
        """A tier as it is now; None: it is gone. The built-in ones are always there.

        Its order may be ``UNPLACED``.
        """
        self._new_tiers[name] = tier

    def flush(self) -> Changes:
        """Work off everything that was set since the last flush."""
        policies_before: dict[PolicyId, CompiledPolicy | None] = {}
        for name, profile in self._new_profiles.items():
            self._apply_profile(name, profile)
        for id, endpoint in self._new_endpoints.items():
            self._apply_endpoint(id, endpoint)
        for name, tier in self._new_tiers.items():
            self._apply_tier(name, tier)
        for policy_id, policy in self._new_policies.items():
            self._apply_policy(policy_id, policy)
        for policy_id in self._dirty_policies:
            policies_before[policy_id] = self._rules.active.get(policy_id)
            self._activate(policy_id)
        changes = Changes(
            self._sets.flush() | self._services.flush(),
            {
                id: self._rules.active.get(id)
                for id, before in policies_before.items()
                if self._rules.active.get(id) != before
            },
            dict(self._rebind(self._dirty_bindings)),
        )
        for work in (
            self._new_endpoints,
            self._new_profiles,
            self._new_policies,
            self._new_tiers,
            self._dirty_policies,
            self._dirty_bindings,
        ):
            work.clear()
        return changes

    # --- what was set ---

    def _apply_profile(self, name: str, profile: Profile | None) -> None:
        id = profile_id(name)
        old = self._profiles.pop(name, None)
        self._profile_rules.pop(id, None)
        if profile is not None:
            self._profiles[name] = profile
            if profile.ingress or profile.egress:
                self._profile_rules[id] = compile_rules(id, profile.ingress, profile.egress)
        self._note_problems(id, self._profile_rules.get(id))
        self._dirty_policies.add(id)
        self._dirty_bindings |= self._local_profile_users.get(name, set())
        if (old.labels if old else ()) != (profile.labels if profile else ()):
            for user in self._profile_users.get(name, ()):
                self._index(user)

    def _apply_endpoint(self, id: EndpointId, endpoint: Endpoint | None) -> None:
        old = self._endpoints.get(id)
        if old == endpoint:
            return
        if old is not None:
            del self._endpoints[id]
            _leave(self._profile_users, id, old.profiles)
            if old.local:
                _leave(self._local_profile_users, id, old.profiles)
                self._dirty_policies.update(map(profile_id, old.profiles))
        if endpoint is not None:
            self._endpoints[id] = endpoint
            _join(self._profile_users, id, endpoint.profiles)
            if endpoint.local:
                _join(self._local_profile_users, id, endpoint.profiles)
                self._dirty_policies.update(map(profile_id, endpoint.profiles))
        self._dirty_bindings.add(id)
        self._index(id)

    def _apply_tier(self, name: str, tier: Tier | None) -> None:
        before, was_placed = self._tiers.get(name), self._is_placed(name)
        if tier is not None:
            order = math.inf if tier.spec.order is None else tier.spec.order
            self._tiers[name] = order, Action(tier.spec.default_action)
        elif name in BUILT_IN_TIERS:
            order, action = BUILT_IN_TIERS[name]
            self._tiers[name] = order, Action(action)
        else:
            self._tiers.pop(name, None)
        if self._tiers.get(name) == before:
            return
        for policy_id, compilation in self._policies.items():
            if compilation.tier == name:
                if self._is_placed(name) is not was_placed:
                    self._dirty_policies.add(policy_id)
                self._note_problems(policy_id, compilation.rules, compilation.tier)
                self._dirty_bindings.update(self._local.matches(compilation.selector))

    def _apply_policy(
        self, id: PolicyId, policy: NetworkPolicy | GlobalNetworkPolicy | None
    ) -> None:
        old = self._policies.pop(id, None)
        new = None if policy is None else compile_policy(id, policy)
        if new is not None:
            self._policies[id] = new
        self._note_problems(id, new.rules if new else None, new.tier if new else None)
        self._dirty_policies.add(id)
        if old and new and old.selector == new.selector:
            if not old.stands_like(new):
                self._dirty_bindings.update(self._local.matches(new.selector))
            return
        if old:
            self._dirty_bindings.update(self._local.matches(old.selector))
            sharing = self._by_selector[old.selector.id]
            sharing.remove(id)
            if not sharing:
                del self._by_selector[old.selector.id]
                self._local.remove_selector(old.selector)
        if new:
            self._by_selector.setdefault(new.selector.id, set()).add(id)
            self._dirty_bindings.update(self._local.add_selector(new.selector))

    def _note_problems(
        self, id: PolicyId, rules: CompiledRules | None, tier: str | None = None
    ) -> None:
        problems = rules.problems if rules else ()
        if tier is not None and tier not in self._tiers:
            problems = (*problems, Problem("spec.tier", tier, "a tier that exists"))
        if problems:
            self._problems[id] = problems
        else:
            self._problems.pop(id, None)

    # --- what follows ---

    def _index(self, id: EndpointId) -> None:
        """Match an endpoint, with the labels it inherits, against all selectors."""
        endpoint = self._endpoints.get(id)
        labels = self._labels(endpoint) if endpoint else None
        self._sets.set_endpoint(id, endpoint, labels)
        local = labels if endpoint and endpoint.local else None
        for selectors in self._local.set_item(id, local):
            if selectors:
                self._dirty_policies.update(self._selecting(selectors))
                self._dirty_bindings.add(id)

    def _labels(self, endpoint: Endpoint) -> dict[str, str]:
        labels: dict[str, str] = {}
        for name in reversed(endpoint.profiles):
            profile = self._profiles.get(name)
            if profile:
                labels.update(profile.labels)
        labels.update(endpoint.labels)
        return labels

    def _selecting(self, selectors: Iterable[Selector]) -> Iterable[PolicyId]:
        for selector in selectors:
            yield from self._by_selector[selector.id]

    def _activate(self, id: PolicyId) -> None:
        """Enforce a policy or profile, or cease to, as local endpoints demand."""
        rules: CompiledRules | None = None
        if id in self._profile_rules:
            if id.name in self._local_profile_users:
                rules = self._profile_rules[id]
        elif id in self._policies:
            compilation = self._policies[id]
            if self._applies(compilation):
                rules = compilation.rules
                if not (self._is_placed(compilation.tier) or id.is_staged):
                    rules = replace(rules, policy=_restrained(rules.policy))
        if rules:
            self._rules.put(rules)
        else:
            self._rules.drop(id)

    def _applies(self, compilation: Compilation) -> bool:
        """Whether a policy is for any local endpoint: a host where it isn't for workloads."""
        if Part.NORMAL in compilation.parts:
            return self._local.any_match(compilation.selector)
        return any(_is_host(id) for id in self._local.matches(compilation.selector))

    def _rebind(self, ids: Iterable[EndpointId]) -> Iterable[tuple[EndpointId, Binding | None]]:
        for id in ids:
            before = self._bindings.get(id)
            endpoint = self._endpoints.get(id)
            if endpoint and endpoint.local:
                binding = self._bindings[id] = self._bind(endpoint)
                if binding != before:
                    yield id, binding
            elif before is not None:
                del self._bindings[id]
                yield id, None

    def _bind(self, endpoint: Endpoint) -> Binding:
        selecting = sorted(
            self._selecting(self._local.selectors_of(endpoint.id)), key=self._sort_key
        )
        # What a profile says that isn't there nobody knows: none is asked behind it.
        known = takewhile(self._profiles.__contains__, endpoint.profiles)
        profiles = dict.fromkeys(map(profile_id, known))
        normal = EndpointBinding(
            self._tier_bindings(selecting, Part.NORMAL),
            tuple(id for id in profiles if id in self._rules.active),
        )
        if not _is_host(endpoint.id):
            return normal
        forward, pre_dnat, untracked = (
            EndpointBinding(self._tier_bindings(selecting, part), ())
            for part in (Part.FORWARD, Part.PRE_DNAT, Part.UNTRACKED)
        )
        return HostBinding(normal, forward, pre_dnat, untracked)

    def _tier_bindings(self, selecting: Iterable[PolicyId], part: Part) -> tuple[TierBinding, ...]:
        """The policies that are for these packets, by tier."""
        compilations = (self._policies[id] for id in selecting)
        mine = (compilation for compilation in compilations if part in compilation.parts)
        tiers = []
        for name, members in groupby(mine, key=lambda compilation: compilation.tier):
            policies = [compilation.rules.policy for compilation in members]
            ingress = tuple(policy.id for policy in policies if policy.ingress is not None)
            egress = tuple(policy.id for policy in policies if policy.egress is not None)
            if ingress or egress:
                tiers.append(TierBinding(name, self._tier(name)[1], ingress, egress))
        return tuple(tiers)

    def _tier(self, name: str) -> tuple[float, Action]:
        return self._tiers.get(name, _MISSING)

    def _is_placed(self, tier: str) -> bool:
        return self._tier(tier)[0] != UNPLACED

    def _sort_key(self, id: PolicyId) -> tuple[float, str, float, str]:
        """Order of tiers, then of policies; ties by name."""
        compilation = self._policies[id]
        return (
            self._tier(compilation.tier)[0],
            compilation.tier,
            compilation.order,
            f"{id.name}/{id.namespace}/{id.kind}",
        )


def _restrained(policy: CompiledPolicy) -> CompiledPolicy:
    """The policy, where what it allows is left to others."""

    def passing(rules: tuple[Rule, ...] | None) -> tuple[Rule, ...] | None:
        return rules and tuple(
            replace(rule, action=Action.PASS) if rule.action is Action.ALLOW else rule
            for rule in rules
        )

    return replace(policy, ingress=passing(policy.ingress), egress=passing(policy.egress))


def _is_host(id: EndpointId) -> bool:
    return id.kind == "HostEndpoint"


def _join(users: _Users, id: EndpointId, profiles: Iterable[str]) -> None:
    for name in profiles:
        users.setdefault(name, set()).add(id)


def _leave(users: _Users, id: EndpointId, profiles: Iterable[str]) -> None:
    for name in set(profiles):
        users[name].discard(id)
        if not users[name]:
            del users[name]
