"""Staged policies: evaluated and counted, never enforced.

``stagedAction`` says what the draft stands for: Set (the policy as it would be), Delete (the
policy of this name would go), Learn and Ignore (drafts that tools keep).
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from api.kubernetes import KubernetesNetworkPolicySpec
from api.metadata import CalicoResource, Checked, Fault
from api.policy import (
    POLICY_NAME,
    GlobalNetworkPolicySpec,
    NetworkPolicySpec,
    is_global_policy_name,
    is_policy_name,
)

StagedAction = Literal["Set", "Delete", "Learn", "Ignore"]


class Staged(Checked):
    """Beside a policy's spec: what the draft stands for."""

    # what Calico's admission policy writes into every policy without rules, drafts of a
    # deletion included
    types_without_rules: ClassVar[list[str]] = ["Ingress"]

    staged_action: StagedAction = "Set"

    def model_post_init(self, context: Any, /) -> None:
        """A deletion applies to nothing: no types are filled in."""
        if self.staged_action != "Delete":
            super().model_post_init(context)

    def faults(self) -> Iterator[Fault]:
        """As of the policy; where it would be deleted, everything but its tier."""
        if self.staged_action != "Delete":
            yield from super().faults()
            return
        empty = type(self).model_construct(staged_action="Delete")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value == getattr(empty, name) or name in ("tier", "staged_action"):
                continue
            if name in ("types", "policy_types") and value == self.types_without_rules:
                continue
            yield Fault((field.alias or name,), value, "absent, because stagedAction is Delete")


class StagedNetworkPolicySpec(Staged, NetworkPolicySpec):
    """spec of a StagedNetworkPolicy."""


class StagedGlobalNetworkPolicySpec(Staged, GlobalNetworkPolicySpec):
    """spec of a StagedGlobalNetworkPolicy."""


class StagedKubernetesNetworkPolicySpec(Staged, KubernetesNetworkPolicySpec):
    """spec of a StagedKubernetesNetworkPolicy: as of a networking.k8s.io/v1 NetworkPolicy."""

    def faults(self) -> Iterator[Fault]:
        """As of all drafts; a type that stands there twice."""
        yield from super().faults()
        if len(set(self.policy_types)) != len(self.policy_types):
            yield Fault(("policyTypes",), self.policy_types, "each value once")


class StagedNetworkPolicy(CalicoResource):
    """A NetworkPolicy that is only tried."""

    namespaced: ClassVar[bool] = True

    kind: Literal["StagedNetworkPolicy"] = "StagedNetworkPolicy"
    spec: StagedNetworkPolicySpec = Field(default_factory=StagedNetworkPolicySpec)

    def name_expected(self) -> str | None:
        """As of a NetworkPolicy."""
        return None if is_policy_name(self.name) else POLICY_NAME


class StagedGlobalNetworkPolicy(CalicoResource):
    """A GlobalNetworkPolicy that is only tried."""

    kind: Literal["StagedGlobalNetworkPolicy"] = "StagedGlobalNetworkPolicy"
    spec: StagedGlobalNetworkPolicySpec = Field(default_factory=StagedGlobalNetworkPolicySpec)

    def name_expected(self) -> str | None:
        """As of a GlobalNetworkPolicy."""
        return None if is_global_policy_name(self.name) else POLICY_NAME


class StagedKubernetesNetworkPolicy(CalicoResource):
    """A Kubernetes NetworkPolicy that is only tried."""

    namespaced: ClassVar[bool] = True

    kind: Literal["StagedKubernetesNetworkPolicy"] = "StagedKubernetesNetworkPolicy"
    spec: StagedKubernetesNetworkPolicySpec = Field(
        default_factory=StagedKubernetesNetworkPolicySpec
    )
