"""What stands in for a policy that can't be read: it denies, wherever the policy would apply.

Leaving the policy out could let through what it forbids, and keeping an older version of it
would make the result depend on what was before. So what can be read of it says where it
applies (selectors, directions, tier, order), and what can't be read is taken as "everywhere".
Where all but some rules can be read, those rules alone fail closed.
A tier is read as far as it goes, too; see ``policy.engine`` for one whose order can't be.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, Literal

from api.clusternetworkpolicy import ClusterNetworkPolicy
from api.errors import InvalidObjectError
from api.kubernetes import KubernetesNetworkPolicy
from api.metadata import ObjectMeta
from api.policy import (
    BUILT_IN_TIERS,
    GlobalNetworkPolicy,
    GlobalNetworkPolicySpec,
    NetworkPolicy,
    NetworkPolicySpec,
    PolicyType,
    Rule,
    Tier,
    TierSpec,
)
from api.registry import parse_as
from datastore.interface import Key
from felix.policies import read_policy
from policy import cluster, convert
from policy.engine import UNPLACED

# Their tiers; None: that is written in the policy.
_TIERS = {
    "ClusterNetworkPolicy": None,
    "AdminNetworkPolicy": cluster.TIERS["Admin"],
    "BaselineAdminNetworkPolicy": cluster.TIERS["Baseline"],
}
_WITHOUT_PRIORITY = ("BaselineAdminNetworkPolicy",)
_BOTH: list[PolicyType] = ["Ingress", "Egress"]
_DENY = [Rule(action="Deny")]


def closed_policy(key: Key, value: object) -> NetworkPolicy | GlobalNetworkPolicy:
    """The stand-in for the object stored under ``key``. Never raises."""
    if key.kind == "KubernetesNetworkPolicy":
        return _kubernetes(key, _part(value, "spec"))
    spec = _fields(value)
    if key.kind in _TIERS:
        return _of_administrators(key, spec)
    fields: dict[str, Any] = {
        "tier": _tier(spec.get("tier")),
        "order": _order(spec.get("order")),
        # A selector that can't be parsed selects everything in the policy's reach.
        "selector": _text(spec.get("selector")),
        "service_account_selector": _text(spec.get("serviceaccountselector")),
        "types": _types(spec),
        "ingress": _rules(key, spec, "ingress"),
        "egress": _rules(key, spec, "egress"),
    }
    metadata = ObjectMeta.model_construct(name=key.name, namespace=key.namespace)
    if key.kind == "NetworkPolicy":
        return NetworkPolicy.model_construct(
            metadata=metadata, spec=NetworkPolicySpec.model_construct(**fields)
        )
    fields["namespace_selector"] = _text(spec.get("namespaceselector"))
    fields |= _flags(spec)
    return GlobalNetworkPolicy.model_construct(
        metadata=metadata, spec=GlobalNetworkPolicySpec.model_construct(**fields)
    )


def tier_as_far_as_readable(key: Key, value: object) -> Tier:
    """The stand-in for a tier: it ends in Deny where it doesn't clearly say Pass. Never raises."""
    spec = _fields(value)
    order: float | None
    action: object
    if key.name in BUILT_IN_TIERS:
        order, action = BUILT_IN_TIERS[key.name]
    else:
        order, action = _order(spec.get("order") if spec else ""), spec.get("defaultaction")
    read = TierSpec.model_construct(
        order=order, default_action="Pass" if action == "Pass" else "Deny"
    )
    return Tier.model_construct(metadata=ObjectMeta.model_construct(name=key.name), spec=read)


def _kubernetes(key: Key, spec: Mapping[str, Any]) -> NetworkPolicy:
    metadata = {"name": key.name, "namespace": key.namespace}
    for selector in (spec.get("podSelector") or {}, {}):
        try:
            readable = parse_as(key.kind, {"metadata": metadata, "spec": {"podSelector": selector}})
        except InvalidObjectError:
            continue
        assert isinstance(readable, KubernetesNetworkPolicy)
        policy = convert.network_policy(readable)
        declared = {"types": spec.get("policyTypes"), "egress": spec.get("egress")}
        policy.spec.types = _types(declared)
        policy.spec.ingress = _rules(key, spec, "ingress")
        policy.spec.egress = _rules(key, spec, "egress")
        return policy
    raise AssertionError(f"{key}: an empty podSelector can be read")


def _of_administrators(key: Key, spec: Mapping[str, Any]) -> GlobalNetworkPolicy:
    """It applies in the directions in which it has rules: to all pods, if not its subject's."""
    types: list[PolicyType] = []
    if spec.get("ingress"):
        types.append("Ingress")
    if spec.get("egress"):
        types.append("Egress")
    pods, namespaces = _subject(spec)
    baseline = spec.get("tier") == "Baseline"
    return GlobalNetworkPolicy.model_construct(
        metadata=ObjectMeta.model_construct(name=key.name),
        spec=GlobalNetworkPolicySpec.model_construct(
            tier=_TIERS[key.kind] or cluster.TIERS["Baseline" if baseline else "Admin"],
            order=_order(spec.get("priority", None if key.kind in _WITHOUT_PRIORITY else "")),
            selector=pods,
            namespace_selector=namespaces,
            types=types,
            ingress=_rules(key, spec, "ingress"),
            egress=_rules(key, spec, "egress"),
        ),
    )


def _rules(
    key: Key, spec: Mapping[str, Any], direction: Literal["ingress", "egress"]
) -> list[Rule]:
    """Of those that can't be read one that allows is left out; any other denies everything.

    So does the policy, where anything else can't be read.
    """
    rest = {name: part for name, part in spec.items() if name not in ("ingress", "egress")}
    metadata = {"name": key.name} | ({"namespace": key.namespace} if key.namespace else {})

    def read(rules: list[Any]) -> list[Rule]:
        policy, _ = read_policy(key, {"metadata": metadata, "spec": {**rest, direction: rules}})
        assert policy is not None
        return policy.spec.ingress if direction == "ingress" else policy.spec.egress

    given = spec.get(direction)
    try:
        read([])
    except InvalidObjectError:
        return _DENY
    if not isinstance(given, list):
        return _DENY
    found: list[Rule] = []
    for index, rule in enumerate(given):
        try:
            rules = read([rule])
        except InvalidObjectError:
            rules = [] if _never_denies(key, rule) else [Rule(action="Deny")]
        found += [each.made_from(index) for each in rules]
    return found


def _never_denies(key: Key, rule: object) -> bool:
    if key.kind == "KubernetesNetworkPolicy":
        return True
    return isinstance(rule, Mapping) and rule.get("action") in ("Allow", "Accept", "Log")


def _subject(spec: Mapping[str, Any]) -> tuple[str, str]:
    subjects: tuple[object, ...] = (spec.get("subject"), {"namespaces": {}})
    for subject in subjects:
        readable = {
            "metadata": {"name": "x"},
            "spec": {"tier": "Admin", "priority": 0, "subject": subject},
        }
        try:
            policy = parse_as("ClusterNetworkPolicy", readable)
        except InvalidObjectError:
            continue
        assert isinstance(policy, ClusterNetworkPolicy)
        return cluster.subject_selectors(policy.spec.subject)
    raise AssertionError("all namespaces can be read")


def _types(spec: Mapping[str, Any]) -> list[PolicyType]:
    """The directions it declares; without a word, Ingress, and Egress if it has such rules."""
    declared = spec.get("types")
    if declared is None or declared == []:
        return _BOTH if spec.get("egress") else ["Ingress"]
    if isinstance(declared, list) and all(word in _BOTH for word in declared):
        return [word for word in _BOTH if word in declared]
    return _BOTH


def _flags(spec: Mapping[str, Any]) -> dict[str, bool]:
    """Which of a host's packets it is for; to, from and through it where that can't be read."""
    flags = {
        "do_not_track": "donottrack",
        "pre_dnat": "prednat",
        "apply_on_forward": "applyonforward",
    }
    found = {field: spec.get(name) for field, name in flags.items()}
    if not all(flag is None or isinstance(flag, bool) for flag in found.values()):
        return {"do_not_track": False, "pre_dnat": False, "apply_on_forward": True}
    return {field: bool(flag) for field, flag in found.items()}


def _fields(value: object) -> Mapping[str, Any]:
    """Of its spec, whose names are matched without regard to case, as everywhere."""
    return {str(name).lower(): part for name, part in _part(value, "spec").items()}


def _part(value: object, name: str) -> Mapping[str, Any]:
    part = value.get(name) if isinstance(value, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _tier(name: object) -> str:
    """One that doesn't exist where the name can't be read."""
    if name is None or name == "":
        return "default"
    return _text(name)


def _order(value: object) -> float | None:
    """None: the last. The first where it can't be read: what allows must not come before it."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
    return UNPLACED
