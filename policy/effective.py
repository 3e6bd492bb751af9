"""What a policy or rule selects: its several selectors and its namespace as one selector.

``namespaceSelector`` and ``serviceAccounts.selector`` speak of the labels of namespaces and
service accounts, which endpoints inherit behind ``pcns.`` and ``pcsa.``. A policy in a
namespace selects, and its rules' selectors look, there only, unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from policy import labels
from policy.selector import And, Compare, Everything, Has, Membership, Node, Not, Or, Selector

_IN_A_NAMESPACE = Has(labels.NAMESPACE)
_HAS_A_SERVICE_ACCOUNT = Has(labels.SERVICE_ACCOUNT)


def rule_selector(
    namespace: str,
    *,
    selector: Selector | None,
    namespace_selector: Selector | None,
    service_account_selector: Selector | None,
    service_account_names: Sequence[str],
    has_not_selector: bool,
) -> Selector | None:
    """What one side of a rule must match; None: any address, inside the cluster or not.

    ``namespace`` is the policy's, empty for a global one. It limits a rule that uses any
    selector (``notSelector`` too) but has no ``namespaceSelector`` of its own. In that one,
    ``all()`` means every endpoint in a namespace, and ``global()`` every other.
    """
    accounts = _accounts(service_account_selector, service_account_names)
    endpoints = _and(accounts, selector.root if selector else None)
    scope: Node | None = None
    if namespace_selector is not None:
        meanings: dict[str, Node] = {"all": _IN_A_NAMESPACE, "global": Not(_IN_A_NAMESPACE)}
        scope = _translated(namespace_selector.root, labels.NAMESPACE_PREFIX, meanings)
    elif namespace and (endpoints is not None or has_not_selector):
        scope = Compare(labels.NAMESPACE, "==", namespace)
    node = _and(scope, endpoints)
    return Selector(node) if node else None


def policy_selector(
    namespace: str, *, selector: Selector | None, service_account_selector: Selector | None
) -> Selector:
    """Which endpoints a policy in a namespace applies to."""
    node: Node = Compare(labels.NAMESPACE, "==", namespace)
    if selector is not None:
        node = And((selector.root, node))
    if service_account_selector is not None:
        accounts = service_account_selector.root
        node = And((node, _translated(accounts, labels.SERVICE_ACCOUNT_PREFIX, {})))
    return Selector(node)


def global_policy_selector(
    *,
    selector: Selector | None,
    namespace_selector: Selector | None,
    service_account_selector: Selector | None,
) -> Selector:
    """Which endpoints a global policy applies to.

    As in Calico, ``all()`` anywhere in its selectors means every endpoint in a namespace as
    soon as there is a ``namespaceSelector``, or else every endpoint with a service account as
    soon as there is a ``serviceAccountSelector``; ``global()`` is simply true.
    """
    node = selector.root if selector else None
    for part, prefix, meaning in (
        (namespace_selector, labels.NAMESPACE_PREFIX, _IN_A_NAMESPACE),
        (service_account_selector, labels.SERVICE_ACCOUNT_PREFIX, _HAS_A_SERVICE_ACCOUNT),
    ):
        if part is not None:
            prefixed = _translated(part.root, prefix, {})
            joined = And((node, prefixed)) if node else prefixed
            node = _translated(joined, "", {"all": meaning})
    return Selector(node or Everything("all"))


def _accounts(selector: Selector | None, names: Sequence[str]) -> Node | None:
    return _and(
        _translated(selector.root, labels.SERVICE_ACCOUNT_PREFIX, {}) if selector else None,
        Membership(labels.SERVICE_ACCOUNT, "in", tuple(sorted(set(names)))) if names else None,
    )


def _and(first: Node | None, second: Node | None) -> Node | None:
    return And((first, second)) if first and second else first or second


def _translated(node: Node, prefix: str, meanings: Mapping[str, Node]) -> Node:
    """The tree with a prefix before every label, and another meaning of all() or global()."""
    match node:
        case Everything(name):
            return meanings.get(name, node)
        case Has(label):
            return Has(prefix + label)
        case Compare(label, operator, value):
            return Compare(prefix + label, operator, value)
        case Membership(label, operator, values):
            return Membership(prefix + label, operator, values)
        case Not(operand):
            inner = _translated(operand, prefix, meanings)
            return inner.operand if isinstance(inner, Not) else Not(inner)
        case And(operands):
            return And(tuple(_translated(operand, prefix, meanings) for operand in operands))
        case Or(operands):
            return Or(tuple(_translated(operand, prefix, meanings) for operand in operands))
