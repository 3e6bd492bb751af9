"""Staged policies: beside what holds for the policies, what a draft of a deletion may have."""

from __future__ import annotations

from pydantic import BaseModel

from api import staged
from manifests.cel import Rule, given, true
from manifests.rules.policy import GLOBAL_NAME, NAME

LISTS = ("ingress", "egress", "performanceHints")
DELETION = "self.stagedAction != 'Delete'"


def _absent(field: str, empty: str) -> Rule:
    return Rule(f"{DELETION} || {empty}", f"{field} must be absent, because stagedAction is Delete")


def _types(field: str) -> Rule:
    return _absent(field, f"!{given(field)} || self.{field} == ['Ingress']")


POLICY = (
    _absent("order", "!has(self.order)"),
    *(
        _absent(field, f"!{given(field)}")
        for field in ("selector", "serviceAccountSelector", *LISTS)
    ),
    _types("types"),
)

GLOBAL_POLICY = (
    _absent("namespaceSelector", f"!{given('namespaceSelector')}"),
    *(_absent(field, f"!{true(field)}") for field in ("doNotTrack", "preDNAT", "applyOnForward")),
)

KUBERNETES_POLICY = (
    _absent(
        "podSelector",
        "!has(self.podSelector)"
        " || (!has(self.podSelector.matchLabels) && !has(self.podSelector.matchExpressions))",
    ),
    *(_absent(field, f"!{given(field)}") for field in ("ingress", "egress")),
    _types("policyTypes"),
)

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    staged.Staged: (),
    staged.StagedNetworkPolicySpec: POLICY,
    staged.StagedGlobalNetworkPolicySpec: (*POLICY, *GLOBAL_POLICY),
    staged.StagedKubernetesNetworkPolicySpec: KUBERNETES_POLICY,
    staged.StagedNetworkPolicy: (NAME,),
    staged.StagedGlobalNetworkPolicy: (GLOBAL_NAME,),
}
