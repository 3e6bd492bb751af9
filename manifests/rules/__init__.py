"""What the API server is told of values that depend on each other, for every model.

One module a topic, each with ``RULES``: model -> rules. Rules of a base hold for what derives
from it. Every model whose checks find contradictions stands there, so that none is forgotten;
with an empty tuple where CEL cannot say them, or need not.
"""

from __future__ import annotations

from pydantic import BaseModel

from api import metadata
from manifests.cel import Rule
from manifests.rules import (
    adminnetworkpolicy,
    bgp,
    clusternetworkpolicy,
    felix,
    kubernetes,
    others,
    policy,
    pool,
    staged,
)

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {}
for _topic in (
    adminnetworkpolicy,
    bgp,
    clusternetworkpolicy,
    felix,
    kubernetes,
    others,
    policy,
    pool,
    staged,
):
    RULES |= _topic.RULES

CHECKS = ("faults", "name_expected", "update_faults")


def rules_of(model: type[BaseModel]) -> list[Rule]:
    """The rules of a model and its bases. Raises LookupError for a model that was forgotten."""
    rules: list[Rule] = []
    for base in reversed(model.__mro__):
        if base.__module__ == metadata.__name__:
            continue  # what holds for all: the names of labels, which the API server checks
        if base not in RULES and any(check in vars(base) for check in CHECKS):
            raise LookupError(f"{base.__name__} checks itself, but has no rules")
        rules += RULES.get(base, ())
    return rules
