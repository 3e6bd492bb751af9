"""When to see again what is in the kernel, in case a stranger changed it.

All of it every so often, as the settings say; and what enforces policy, and where others drop what
they don't know, as soon as the kernel tells that somebody else changed it, which it does of
nftables and of the nft variant of iptables. Who changes it again and again does not keep us from
other work: there is a pause after each look.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from felix import names
from felix.backends import Backend
from felix.dataplane import Dataplane, Enforcer
from felix.iptables_dataplane import IptablesDataplane
from felix.nftables_dataplane import TABLE, NftablesDataplane
from felix.settings import Settings
from kernel.nft_monitor import TableChanged, TableMonitor, Watched

_PAUSE = 1.0  # s, at least, from one look that a stranger caused to the next
_SHARE = 10  # and so many times as long as the look took
_PAUSE_BESIDE = 3.0  # s, from one look at others' tables to the next

# Of the nft variant of iptables: where others drop what they don't know, and we let pods pass.
_BESIDE = Watched("filter", ("FORWARD", names.FORWARD))
WATCHED = (Watched(TABLE), _BESIDE)  # while nftables enforces


class Look(NamedTuple):
    """What was looked at: what it was time for, and what somebody else was told to have changed.

    ``beside``: others' tables are to be looked at (``backends.settle_others``).
    """

    planned: bool
    suspicious: bool
    beside: bool = False


class Drift:
    """``tell`` is called from another thread when somebody else changed what enforces policy."""

    def __init__(self, tell: Callable[[TableChanged], None]) -> None:
        self._tell = tell
        self._monitor: TableMonitor | None = None
        self._everything = True
        self._suspicion = False
        self._beside = False
        self._next_policy: float | None = None  # monotonic seconds; None: never
        self._next_network: float | None = None
        self._resume = 0.0
        self._resume_beside = 0.0

    def close(self) -> None:
        """Hear no more."""
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None

    def follow(self, enforcer: Enforcer) -> None:
        """This one enforces from now on; nothing is known of what is there."""
        self.close()
        self._everything = True
        watched: tuple[Watched, ...] = ()
        ports: frozenset[int] = frozenset()
        if isinstance(enforcer, NftablesDataplane):
            watched, ports = WATCHED, enforcer.ports
        elif isinstance(enforcer, IptablesDataplane) and enforcer.variant == "legacy":
            watched = (_BESIDE,)
        if watched:
            self._monitor = TableMonitor(watched, ports, self._tell)
            self._monitor.start()

    def doubt(self) -> None:
        """Nothing is certain: everything is to be looked at."""
        self._everything = True

    @property
    def in_doubt(self) -> bool:
        """Whether everything is to be looked at."""
        return self._everything

    def sees_interfaces(self, now: float) -> bool:
        """Whether ``look`` will see to interfaces, or all that there is."""
        return self._everything or _is_due(self._next_network, now)

    def suspect(self, change: TableChanged) -> None:
        """Somebody else changed what enforces policy, or what stands beside it."""
        if change.table == TABLE:
            self._suspicion = True
        else:
            self._beside = True

    def next_due(self) -> float | None:
        """When ``look`` has something to do, in monotonic seconds."""
        times = [
            self._next_policy,
            self._next_network,
            self._resume if self._suspicion else None,
            self._resume_beside if self._beside else None,
        ]
        return min((moment for moment in times if moment is not None), default=None)

    def look(self, dataplane: Dataplane, now: float) -> Look:
        """See what is due to be seen. Raises OSError."""
        policy, network = _is_due(self._next_policy, now), _is_due(self._next_network, now)
        suspicious = self._suspicion and now >= self._resume
        everything = self._everything
        if everything:
            dataplane.read()
        elif policy or suspicious:
            begin = time.perf_counter()
            dataplane.read_policy()
            if suspicious:
                pause = max(_PAUSE, _SHARE * (time.perf_counter() - begin))
                self._resume, self._suspicion = now + pause, False
        if network and not everything:
            dataplane.read_network()
        self._everything = False
        planned = everything or policy or network
        beside = planned or (self._beside and now >= self._resume_beside)
        if beside:
            self._resume_beside, self._beside = now + _PAUSE_BESIDE, False
        return Look(planned, suspicious, beside)

    def plan(self, settings: Settings, backend: Backend, now: float) -> None:
        """When to look next, now that it was looked at all that was due."""
        nftables = backend is Backend.NFTABLES
        policy = settings.refresh_nftables if nftables else settings.refresh_iptables
        self._next_policy = _next(self._next_policy, policy, now)
        self._next_network = _next(self._next_network, settings.refresh_network, now)


def _is_due(moment: float | None, now: float) -> bool:
    return moment is not None and now >= moment


def _next(moment: float | None, interval: float, now: float) -> float | None:
    """Kept, unless it is past or further away than the interval; None without an interval."""
    if not interval:
        return None
    return moment if moment is not None and now < moment <= now + interval else now + interval
