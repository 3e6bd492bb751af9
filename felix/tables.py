"""One kernel table: what should be there, what is there, and which keys may differ.

Work is proportional to the keys that changed. What failed is not tried again before its time,
or before something else is wanted of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from reconcile.backoff import Backoff
from reconcile.plan import Plan

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_log = logging.getLogger(__name__)


class Table(Generic[K, V]):
    """Desired and actual state of the keys of one kind of kernel object.

    ``apply`` does a plan and returns the errors of the steps that failed. ``errors`` says,
    for every key that is not as it should be, why.
    """

    def __init__(self, apply: Callable[[Plan[K, V]], Mapping[K, Exception]]) -> None:
        self.desired: dict[K, V] = {}
        self.actual: dict[K, V] = {}
        self.errors: dict[K, Exception] = {}
        self._apply = apply
        self._dirty: set[K] = set()
        self._backoff: Backoff[K] = Backoff()

    def want(self, key: K, value: V | None) -> None:
        """``key`` should be ``value``, or (None) not be there."""
        if self.desired.get(key) == value:
            return
        if value is None:
            del self.desired[key]
        else:
            self.desired[key] = value
        self._dirty.add(key)

    def found(self, actual: Mapping[K, V]) -> None:
        """All that is in the kernel, just read: every key is compared again."""
        self.actual = dict(actual)
        keys = self.desired.keys() | self.actual.keys()
        self._dirty = {key for key in keys if self.desired.get(key) != self.actual.get(key)}
        self._dirty |= self.errors.keys()

    def vanished(self, keys: Iterable[K]) -> None:
        """The kernel removed these by itself."""
        for key in keys:
            if self.actual.pop(key, None) is not None:
                self._dirty.add(key)

    def apply(self, now: float) -> int:
        """Do what is due at ``now`` (monotonic seconds); returns the number of steps."""
        self._dirty.update(self._backoff.due(now))
        if not self._dirty:
            return 0
        plan = self._plan()
        errors: Mapping[K, Exception] = {}
        if plan:
            try:
                errors = self._apply(plan)
            except OSError as error:
                # Not a step but the conversation with the kernel failed: nothing is certain.
                errors = dict.fromkeys((*plan.create, *plan.update, *plan.delete), error)
        self._note(plan, errors, now)
        return len(plan)

    def next_retry(self) -> float | None:
        """When something that failed is due again."""
        return self._backoff.next_due()

    def _plan(self) -> Plan[K, V]:
        plan: Plan[K, V] = Plan()
        for key in self._dirty:
            wanted, present = self.desired.get(key), self.actual.get(key)
            if wanted is None and present is not None:
                plan.delete[key] = present
            elif wanted is not None and present is None:
                plan.create[key] = wanted
            elif wanted is not None and wanted != present:
                plan.update[key] = wanted
        return plan

    def _note(self, plan: Plan[K, V], errors: Mapping[K, Exception], now: float) -> None:
        for steps in (plan.create, plan.update):
            self.actual.update((key, value) for key, value in steps.items() if key not in errors)
        for key in plan.delete:
            if key not in errors:
                self.actual.pop(key, None)
        for key in self._dirty:
            if key in errors:
                self._backoff.failed(key, now)
                if str(self.errors.get(key)) != str(errors[key]):
                    _log.warning("%s; will be tried again", errors[key])
            elif self.errors.pop(key, None) is not None:
                self._backoff.succeeded(key)
        self.errors.update(errors)
        self._dirty.clear()
