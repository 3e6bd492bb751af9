"""Desired table against actual table: what to create, update and delete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Plan(Generic[K, V]):
    """The steps from actual to desired. ``delete`` keeps the actual value, to undo by."""

    create: dict[K, V] = field(default_factory=dict)
    update: dict[K, V] = field(default_factory=dict)
    delete: dict[K, V] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.create or self.update or self.delete)

    def __len__(self) -> int:
        return len(self.create) + len(self.update) + len(self.delete)


def diff(
    desired: Mapping[K, V],
    actual: Mapping[K, V],
    same: Callable[[V, V], bool] | None = None,
) -> Plan[K, V]:
    """The plan that makes ``actual`` equal to ``desired``; both are left as they are.

    ``same`` says when two values need no update; equality by default.
    """
    plan: Plan[K, V] = Plan()
    for key, value in desired.items():
        if key not in actual:
            plan.create[key] = value
        elif not (same(value, actual[key]) if same else value == actual[key]):
            plan.update[key] = value
    for key, value in actual.items():
        if key not in desired:
            plan.delete[key] = value
    return plan
