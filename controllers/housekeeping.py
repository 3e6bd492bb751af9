"""One round of the leader: host endpoints; read everything, audit, collect what is proved."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from controllers.hosts import Kept, keep_hosts
from controllers.nodes import NodeCleaner, Removed
from controllers.settings import Settings, read_settings
from datastore.interface import Datastore
from ipam.audit import Finding, audit
from ipam.collector import Collected, Collector, Periods
from ipam.reading import read

_QUIET = 60.0  # seconds; see ipam.collector.Periods
_SHOWN = 20  # findings in the status, of each kind


@dataclass(slots=True)
class Round:
    """What a round saw and did. ``findings``: those that the round before it saw, too."""

    settings: Settings
    findings: list[Finding] = field(default_factory=list)
    fresh: int = 0  # findings that only this round saw
    counts: dict[str, int] = field(default_factory=dict)
    collected: Collected = field(default_factory=Collected)
    removed: Removed = field(default_factory=Removed)
    hosts: Kept = field(default_factory=Kept)

    def status(self) -> dict[str, Any]:
        """For the status socket."""
        by_fault: dict[str, list[str]] = {}
        for finding in self.findings:
            by_fault.setdefault(finding.fault.value, []).append(str(finding))
        waiting = dict(self.collected.waiting)
        if self.removed.waiting:
            waiting["objects of gone nodes and pods"] = self.removed.waiting
        return {
            "idle": self.settings.idle,
            "period_seconds": self.settings.period,
            "grace_seconds": self.settings.grace,
            "counts": self.counts,
            "findings": {fault: len(texts) for fault, texts in by_fault.items()},
            "unconfirmed_findings": self.fresh,
            "shown": {fault: texts[:_SHOWN] for fault, texts in by_fault.items()},
            "waiting": waiting,
            "problems": [*self.collected.problems, *self.hosts.problems],
        }


class Housekeeping:
    """What is remembered from round to round. ``totals``: all that was given back so far."""

    def __init__(
        self,
        store: Datastore,
        kubernetes: Datastore | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        proceed: Callable[[], bool] = lambda: True,
        quiet: float = _QUIET,
    ) -> None:
        self._store = store
        self._kubernetes = kubernetes
        self._quiet = quiet
        self._proceed = proceed
        self._known: frozenset[Finding] = frozenset()
        self._collector = Collector(store, kubernetes, clock=clock, proceed=proceed)
        self._cleaner = NodeCleaner(store, kubernetes, clock=clock, proceed=proceed)
        self.totals: Counter[str] = Counter()

    def round(self) -> Round:
        """Do one. Raises StoreError, InvalidObjectError (the settings), HaltedError."""
        settings = read_settings(self._store)
        done = Round(settings)
        if settings.idle is not None:
            return done
        if settings.hosts is not None:
            done.hosts = keep_hosts(self._store, settings.hosts, proceed=self._proceed)
        inventory = read(self._store, self._kubernetes)
        findings = audit(inventory)
        done.findings = [finding for finding in findings if finding in self._known]
        done.fresh = len(findings) - len(done.findings)
        self._known = frozenset(findings)
        done.counts = {
            "addresses": len(inventory.allocations),
            "blocks": len(inventory.blocks),
            "handles": len(inventory.handles),
            "users": len(inventory.users),
            "nodes": len(inventory.nodes),
        }
        if settings.grace:
            done.removed = self._cleaner.run(inventory, settings.grace)
            periods = Periods(settings.grace, min(self._quiet, settings.grace))
            done.collected = self._collector.run(inventory, periods)
            self._count(done)
        return done

    def _count(self, done: Round) -> None:
        collected, removed = done.collected, done.removed
        self.totals.update(
            {
                "addresses": len(collected.addresses),
                "blocks": len(collected.blocks),
                "claims": len(collected.claims),
                "handles": len(collected.handles),
                "endpoints": len(removed.endpoints),
                "nodes": len(removed.nodes),
            }
        )
