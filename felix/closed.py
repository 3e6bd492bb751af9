"""What stands in for a policy that can't be read: it denies, wherever the policy would apply.

Leaving the policy out could let through what it forbids, and keeping an older version of it
would make the result depend on what was before. So what can be read of it says where it
applies (selectors, directions, tier, order), and what can't be read is taken as "everywhere".
Where all but some rules can be read, those rules alone fail closed. What is wrong, be it with us,
was told of where the whole couldn't be read: here it is enough that nothing is raised.
A tier is read as far as it goes, too; see ``policy.engine`` for one whose order can't be.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from api.clusternetworkpolicy import ClusterNetworkPolicy
from api.errors import UNREADABLE, Problem
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
_TWICE = object()  # the value of a field that stands there twice, in different case


def closed_policy(
    key: Key, value: object
) -> tuple[NetworkPolicy | GlobalNetworkPolicy, tuple[Problem, ...]]:
    """The stand-in for the object stored under ``key``, and what of it couldn't be converted.

    Never raises.
    """
    spec = _spec(value)
    policy: NetworkPolicy | GlobalNetworkPolicy
    if key.kind == "KubernetesNetworkPolicy":
        policy = _kubernetes(key, spec)
    elif key.kind in _TIERS:
        policy = _of_administrators(key, spec)
    else:
        policy = _calicos(key, spec)
    policy.spec.ingress, of_ingress = _rules(key, spec, "ingress")
    policy.spec.egress, of_egress = _rules(key, spec, "egress")
    return policy, (*of_ingress, *of_egress)


def tier_as_far_as_readable(key: Key, value: object) -> Tier:
    """The stand-in for a tier: it ends in Deny where it doesn't clearly say Pass. Never raises."""
    spec = _spec(value)
    order: float | None
    action: object
    if key.name in BUILT_IN_TIERS:
        order, action = BUILT_IN_TIERS[key.name]
    else:
        order = _order("" if UNREADABLE in spec else spec.get("order"))
        action = spec.get("defaultaction")
    read = TierSpec.model_construct(
        order=order, default_action="Pass" if action == "Pass" else "Deny"
    )
    return Tier.model_construct(metadata=ObjectMeta.model_construct(name=key.name), spec=read)


def _calicos(key: Key, spec: Mapping[str, Any]) -> NetworkPolicy | GlobalNetworkPolicy:
    fields: dict[str, Any] = {
        "tier": _tier(spec.get("tier")),
        "order": _order(spec.get("order")),
        # A selector that can't be parsed selects everything in the policy's reach.
        "selector": _text(spec.get("selector")),
        "service_account_selector": _text(spec.get("serviceaccountselector")),
        "types": _types(spec.get("types"), spec),
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


def _kubernetes(key: Key, spec: Mapping[str, Any]) -> NetworkPolicy:
    """For all pods of its namespace, if not for those that it selects."""
    metadata = {"name": key.name, "namespace": key.namespace}
    pods, given = convert.pod_selector(None), {"podSelector": spec.get("podselector") or {}}
    with contextlib.suppress(Exception):
        readable = parse_as(key.kind, {"metadata": metadata, "spec": given})
        assert isinstance(readable, KubernetesNetworkPolicy)
        pods = convert.pod_selector(readable.spec.pod_selector)
    return NetworkPolicy.model_construct(
        metadata=ObjectMeta.model_construct(name=key.name, namespace=key.namespace),
        spec=NetworkPolicySpec.model_construct(
            order=convert.ORDER,
            selector=pods,
            types=_types(spec.get("policytypes"), spec, always=("Ingress",)),
        ),
    )


def _of_administrators(key: Key, spec: Mapping[str, Any]) -> GlobalNetworkPolicy:
    """It applies in the directions in which it has rules: to all pods, if not its subject's."""
    pods, namespaces = _subject(spec)
    baseline = spec.get("tier") == "Baseline"
    return GlobalNetworkPolicy.model_construct(
        metadata=ObjectMeta.model_construct(name=key.name),
        spec=GlobalNetworkPolicySpec.model_construct(
            tier=_TIERS[key.kind] or cluster.TIERS["Baseline" if baseline else "Admin"],
            order=_order(spec.get("priority", None if key.kind in _WITHOUT_PRIORITY else "")),
            selector=pods,
            namespace_selector=namespaces,
            types=_directions(spec),
        ),
    )


def _rules(
    key: Key, spec: Mapping[str, Any], direction: Literal["ingress", "egress"]
) -> tuple[list[Rule], list[Problem]]:
    """Of those that can't be read one that allows is left out; any other denies everything.

    So does the policy, where anything else can't be read. And what couldn't be converted.
    """
    rest = {name: part for name, part in spec.items() if name not in ("ingress", "egress")}
    metadata = {"name": key.name} | ({"namespace": key.namespace} if key.namespace else {})

    def read(rules: list[Any]) -> tuple[list[Rule], tuple[Problem, ...]]:
        alone = {"metadata": metadata, "spec": {**rest, direction: rules}}
        policy, wrong = read_policy(key, alone)
        assert policy is not None
        return (policy.spec.ingress if direction == "ingress" else policy.spec.egress), wrong

    given = spec.get(direction)
    try:
        read([])
    except Exception:
        return _DENY, []
    if given is None:
        return [], []
    if not isinstance(given, list):
        return _DENY, []
    found: list[Rule] = []
    problems: list[Problem] = []
    for index, rule in enumerate(given):
        wrong: tuple[Problem, ...] = ()
        try:
            rules, wrong = read([rule])
        except Exception:
            rules = [] if _never_denies(key, rule) else [Rule(action="Deny")]
        found += [each.made_from(index) for each in rules]
        where = f"spec.{direction}"
        problems += [
            replace(each, field=each.field.replace(f"{where}[0]", f"{where}[{index}]", 1))
            for each in wrong
        ]
    return found, problems


def _never_denies(key: Key, rule: object) -> bool:
    if key.kind == "KubernetesNetworkPolicy":
        return True
    return _fields(rule).get("action") in ("Allow", "Accept", "Log")


def _subject(spec: Mapping[str, Any]) -> tuple[str, str]:
    given = {"tier": "Admin", "priority": 0, "subject": spec.get("subject")}
    with contextlib.suppress(Exception):
        readable = parse_as("ClusterNetworkPolicy", {"metadata": {"name": "x"}, "spec": given})
        assert isinstance(readable, ClusterNetworkPolicy)
        return cluster.subject_selectors(readable.spec.subject)
    return convert.pod_selector(None), ""


def _types(
    declared: object, spec: Mapping[str, Any], *, always: tuple[PolicyType, ...] = ()
) -> list[PolicyType]:
    """The directions it declares; without a word those of its rules, and ``always``, or Ingress."""
    if declared is None or declared == []:
        found = {*always, *_directions(spec)} or {"Ingress"}
        return [word for word in _BOTH if word in found]
    if isinstance(declared, list) and all(word in _BOTH for word in declared):
        return [word for word in _BOTH if word in declared]
    return _BOTH


def _directions(spec: Mapping[str, Any]) -> list[PolicyType]:
    """Those in which it has rules, or what can't be read as none."""
    return [word for word in _BOTH if spec.get(word.lower()) not in (None, [])]


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


def _spec(value: object) -> Mapping[str, Any]:
    fields = _fields(value)
    return fields if UNREADABLE in fields else _fields(fields.get("spec"))


def _fields(part: object) -> Mapping[str, Any]:
    """The fields of a part, whose names are matched without regard to case, as everywhere."""
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        return {UNREADABLE: part}
    found: dict[str, Any] = {}
    for name, value in part.items():
        name = str(name).lower()
        found[name] = _TWICE if name in found else value
    return found


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
