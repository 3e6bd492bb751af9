"""Admission policies: what the API server fills in, and refuses, beyond what a CRD can say.

Defaults that depend on other fields (mutating.yaml, Kubernetes 1.36 or newer), as Calico's own in
``api/admission``; programs of Manx fill in the same when they read, others see it only so. And
rules (validating.yaml, Kubernetes 1.30 or newer) about metadata, or that would be too dear in a
CRD, where the worst case counts: here only what an object has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api import networkset
from api.fields import QUALIFIED_NAME
from api.ippool import DEFAULT_BLOCK_SIZE
from api.kinds import CALICO, KINDS
from api.policy import BUILT_IN_TIERS, TIER_LABEL
from manifests.cel import Rule, given
from manifests.files import render

DIRECTORY = Path(__file__).parent / "admission"

POLICIES = (
    *("NetworkPolicy", "GlobalNetworkPolicy"),
    *("StagedNetworkPolicy", "StagedGlobalNetworkPolicy"),
)
DRAFT = "StagedKubernetesNetworkPolicy"
WRITES = ("CREATE", "UPDATE")

_API = "admissionregistration.k8s.io/v1"
_RULES = (
    "(has(object.spec.ingress) ? object.spec.ingress : [])"
    " + (has(object.spec.egress) ? object.spec.egress : [])"
)
_SIDES = " + ".join(
    f"variables.rules.map(r, has(r.{side}), r.{side})" for side in ("source", "destination")
)
_PORTS = " + ".join(
    f"variables.sides.map(s, has(s.{field}), s.{field})" for field in ("ports", "notPorts")
)
_PEERS = " + ".join(f"variables.rules.map(r, has(r.{to}), r.{to})" for to in ("from", "to"))
_QUALIFIED = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"([a-z0-9][-a-z0-9_.]{0,61})?[a-z0-9]$"
)

RANGE = Rule(
    "variables.ports.all(l, l.all(p, type(p) != string || !p.matches('^[0-9]+:[0-9]+$')"
    " || int(p.split(':')[0]) <= int(p.split(':')[1])))",
    "ports: a range whose first port is not greater than its last",
)
RULE_ANNOTATIONS = Rule(
    "variables.rules.all(r, !has(r.metadata) || !has(r.metadata.annotations)"
    f" || r.metadata.annotations.all(k, k.lowerAscii().matches(r'{_QUALIFIED}')))",
    f"metadata.annotations of a rule: keys: {QUALIFIED_NAME}",
)
EXCEPTIONS = Rule(
    "variables.peers.all(l, l.all(p, !has(p.ipBlock) || !has(p.ipBlock.except)"
    " || p.ipBlock.except.all(e, cidr(p.ipBlock.cidr).containsCIDR(cidr(e))"
    " && cidr(e).prefixLength() > cidr(p.ipBlock.cidr).prefixLength())))",
    "ipBlock.except: networks inside its cidr, not all of it",
)
COMMUNITY_NAMES = Rule(
    "!has(object.spec.prefixAdvertisements) || object.spec.prefixAdvertisements.all(a,"
    " !has(a.communities) || a.communities.all(c, c.contains(':') || c in variables.names))",
    "prefixAdvertisements: communities: aa:nn, aa:nn:mm, or a name from communities",
)
AGENTS_LABEL = Rule(
    f"!has(object.metadata.labels) || !('{networkset.NAMESPACE_LABEL}' in object.metadata.labels)",
    f"metadata.labels: {networkset.NAMESPACE_LABEL} must be absent: the agent sets it itself",
)
KEPT_TIERS = Rule(
    f"!(oldObject.metadata.name in {sorted(BUILT_IN_TIERS)})",
    f"the tiers {', '.join(sorted(BUILT_IN_TIERS))} are built in and cannot be deleted",
)


def _given(field: str) -> str:
    return given(f"spec.{field}").replace("self.", "object.")


def _untyped(field: str) -> str:
    """A draft of a deletion applies to nothing: no types are filled in."""
    staged = "has(object.spec.stagedAction) && object.spec.stagedAction == 'Delete'"
    return f"!{_given(field)} && !({staged})"


_TYPES = (
    f"({_given('egress')} ? ({_given('ingress')} ? ['Ingress', 'Egress'] : ['Egress'])"
    " : ['Ingress'])"
)
_DRAFT_TYPES = f"({_given('egress')} ? ['Ingress', 'Egress'] : ['Ingress'])"
_BLOCK_SIZE = (
    f"(cidr(object.spec.cidr).ip().family() == 6 ? {DEFAULT_BLOCK_SIZE[6]}"
    f" : {DEFAULT_BLOCK_SIZE[4]})"
)
_USES = f"({_given('namespaceSelector')} ? ['Workload'] : ['Workload', 'Tunnel'])"


def _add(path: str, value: str) -> str:
    return f"[JSONPatch{{op: 'add', path: {path}, value: {value}}}]"


def validating() -> list[dict[str, Any]]:
    """ValidatingAdmissionPolicies and their bindings."""
    rules = {"rules": _RULES, "sides": _SIDES, "ports": _PORTS}
    names = {"names": "has(object.spec.communities) ? object.spec.communities.map(c, c.name) : []"}
    return [
        *_validating("policy-rules", POLICIES, (RANGE, RULE_ANNOTATIONS), rules),
        *_validating("draft-networks", (DRAFT,), (EXCEPTIONS,), {"rules": _RULES, "peers": _PEERS}),
        *_validating("community-names", ("BGPConfiguration",), (COMMUNITY_NAMES,), names),
        *_validating("network-set-labels", ("NetworkSet", "GlobalNetworkSet"), (AGENTS_LABEL,)),
        *_validating("built-in-tiers", ("Tier",), (KEPT_TIERS,), operations=("DELETE",)),
    ]


def mutating() -> list[dict[str, Any]]:
    """MutatingAdmissionPolicies and their bindings."""
    label = f"'/metadata/labels/' + jsonpatch.escapeKey('{TIER_LABEL}')"
    return [
        *_mutating(
            "policy-types",
            POLICIES,
            {"untyped": _untyped("types")},
            f"variables.untyped ? {_add(repr('/spec/types'), _TYPES)} : []",
        ),
        *_mutating(
            "draft-types",
            (DRAFT,),
            {"untyped": _untyped("policyTypes")},
            f"variables.untyped ? {_add(repr('/spec/policyTypes'), _DRAFT_TYPES)} : []",
        ),
        *_mutating(
            "policy-tier",
            POLICIES,
            {"tier": f"{_given('tier')} ? object.spec.tier : 'default'"},
            _add("'/spec/tier'", "variables.tier")
            + " + (has(object.metadata.labels) ? [] : "
            + _add("'/metadata/labels'", "{}")
            + ") + "
            + _add(label, "variables.tier"),
        ),
        *_mutating(
            "pool",
            ("IPPool",),
            {
                "sized": "(has(object.spec.blockSize) && object.spec.blockSize != 0)"
                " || !has(object.spec.cidr) || !isCIDR(object.spec.cidr)",
                "used": _given("allowedUses"),
            },
            f"(variables.sized ? [] : {_add(repr('/spec/blockSize'), _BLOCK_SIZE)})"
            f" + (variables.used ? [] : {_add(repr('/spec/allowedUses'), _USES)})",
            operations=("CREATE",),  # what an older version stored must not change by itself
        ),
    ]


def _validating(
    name: str,
    kinds: tuple[str, ...],
    rules: tuple[Rule, ...],
    variables: Mapping[str, str] = {},
    operations: tuple[str, ...] = WRITES,
) -> list[dict[str, Any]]:
    checks = [{"expression": rule.rule, "message": rule.message} for rule in rules]
    spec = _spec(kinds, variables, operations) | {"validations": checks}
    return _with_binding("Validating", name, spec, {"validationActions": ["Deny"]})


def _mutating(
    name: str,
    kinds: tuple[str, ...],
    variables: Mapping[str, str],
    patch: str,
    operations: tuple[str, ...] = WRITES,
) -> list[dict[str, Any]]:
    mutation = {"patchType": "JSONPatch", "jsonPatch": {"expression": patch}}
    spec = _spec(kinds, variables, operations)
    spec |= {"reinvocationPolicy": "IfNeeded", "mutations": [mutation]}
    return _with_binding("Mutating", name, spec, {})


def _spec(
    kinds: tuple[str, ...], variables: Mapping[str, str], operations: tuple[str, ...]
) -> dict[str, Any]:
    group, _, version = CALICO.partition("/")
    resources = {
        "apiGroups": [group],
        "apiVersions": [version],
        "operations": [*operations],
        "resources": [KINDS[kind].resource for kind in kinds],
    }
    return {
        "failurePolicy": "Fail",
        "matchConstraints": {"resourceRules": [resources]},
    } | (
        {"variables": [{"name": name, "expression": text} for name, text in variables.items()]}
        if variables
        else {}
    )


def _with_binding(
    what: str, name: str, spec: dict[str, Any], actions: dict[str, Any]
) -> list[dict[str, Any]]:
    metadata = {"name": f"{name}.manx.projectcalico.org"}
    kind = f"{what}AdmissionPolicy"
    bound = {"policyName": metadata["name"]} | actions
    return [
        {"apiVersion": _API, "kind": kind, "metadata": metadata, "spec": spec},
        {"apiVersion": _API, "kind": f"{kind}Binding", "metadata": metadata, "spec": bound},
    ]


def files() -> dict[Path, str]:
    """Every file and its content."""
    return {
        DIRECTORY / "mutating.yaml": render(mutating(), "admission"),
        DIRECTORY / "validating.yaml": render(validating(), "admission"),
    }
