"""Effective selectors against the recorded cases."""

from __future__ import annotations

from typing import Any

from policy.effective import global_policy_selector, policy_selector, rule_selector
from policy.selector import Selector, parse
from tests.support import vectors


def optional(text: str | None) -> Selector | None:
    return parse(text) if text else None


def of_rule(rule: dict[str, Any], namespace: str | None) -> Selector | None:
    accounts = rule.get("serviceAccounts") or {}
    return rule_selector(
        namespace or "",
        selector=optional(rule.get("selector")),
        namespace_selector=optional(rule.get("namespaceSelector")),
        service_account_selector=optional(accounts.get("selector")),
        service_account_names=accounts.get("names", ()),
        has_not_selector=bool(rule.get("notSelector")),
    )


def of_policy(policy: dict[str, Any]) -> Selector:
    spec = policy["spec"]
    selector = optional(spec.get("selector"))
    accounts = optional(spec.get("serviceAccountSelector"))
    if policy["kind"] == "NetworkPolicy":
        namespace = policy["metadata"]["namespace"]
        return policy_selector(namespace, selector=selector, service_account_selector=accounts)
    return global_policy_selector(
        selector=selector,
        namespace_selector=optional(spec.get("namespaceSelector")),
        service_account_selector=accounts,
    )


def test_tricky_4_5_6_recorded_rules() -> None:
    content = vectors.load("effective_selectors")
    for row in content["entity_rules"]:
        selector = of_rule(row["rule"], row["policy_namespace"])
        if row["effective_selector"] == "":
            assert selector is None, row
            continue
        assert selector == parse(row["effective_selector"])  # so its set id is Calico's, too
        for name, expected in row["matches"].items():  # of the positive selectors alone
            assert selector.matches(content["endpoints"][name]) is expected, (row, name)


def test_recorded_policies() -> None:
    content = vectors.load("effective_selectors")
    for row in content["policies"]:
        selector = of_policy(row["policy"])
        assert selector == parse(row["expected"]["selector"])
        for name, expected in row["matches"].items():
            assert selector.matches(content["endpoints"][name]) is expected, (row, name)


def test_recorded_prefixes() -> None:
    for row in vectors.load("selectors")["prefix_visitor"]:
        selector = of_rule({"serviceAccounts": {"selector": row["input"]}}, "")
        assert str(selector) == row["output"].replace(row["prefix"], "pcsa.")


def test_service_account_names_join_the_selector() -> None:
    rule = {
        "serviceAccounts": {"names": ["b", "a"], "selector": "role == 'x'"},
        "selector": "all()",
    }
    assert str(of_rule(rule, "")) == (
        '((pcsa.role == "x" && projectcalico.org/serviceaccount in {"a", "b"}) && all())'
    )


def test_a_selector_cannot_leave_its_namespace() -> None:
    selector = of_rule({"selector": "has(a) || has(b)"}, "ns")
    assert selector is not None
    assert not selector.matches({"b": "", "projectcalico.org/namespace": "other"})
    assert selector.matches({"b": "", "projectcalico.org/namespace": "ns"})


def test_quoted_all_is_a_value() -> None:
    selector = of_rule({"namespaceSelector": "team == 'all()' && all()"}, "")
    assert str(selector) == '(pcns.team == "all()" && has(projectcalico.org/namespace))'
