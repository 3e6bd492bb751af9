"""What is enforced: the policies and profiles, each of which keeps the sets that it refers to."""

from __future__ import annotations

from policy.compile import CompiledRules, SetSpec
from policy.model import CompiledPolicy, PolicyId
from policy.sets import Sets


class ActiveRules:
    """The policies and profiles that are enforced, and who uses which sets."""

    def __init__(self, of_endpoints: Sets, of_services: Sets) -> None:
        self.active: dict[PolicyId, CompiledPolicy] = {}
        self._sets = {False: of_endpoints, True: of_services}
        self._used: dict[PolicyId, frozenset[SetSpec]] = {}

    def put(self, rules: CompiledRules) -> None:
        """Enforce a policy or profile as it is now."""
        id = rules.policy.id
        before = self._used.get(id, frozenset())
        for spec in rules.sets - before:
            self._sets[spec.of_service].retain(spec)
        for spec in before - rules.sets:
            self._sets[spec.of_service].release(spec)
        self.active[id] = rules.policy
        self._used[id] = rules.sets

    def drop(self, id: PolicyId) -> None:
        """Enforce it no more, if it was."""
        if self.active.pop(id, None) is not None:
            for spec in self._used.pop(id):
                self._sets[spec.of_service].release(spec)
