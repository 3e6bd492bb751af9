"""What an allocator looks up before it writes: pools, reservations, configuration, claims.

Followed, that is remembered until the store tells of a change, so an assign reads nothing. A
store that tells at once of all that was written is asked for that instead, once an operation.
Not followed, or while the store can't be followed, everything is read when it is wanted.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection
from typing import TypeVar, cast

from api.ipam import IPAMConfigurationSpec
from api.net import Net, parse_net
from datastore.follower import Follower, InSync, Update
from datastore.interface import Datastore, PromptDatastore, part
from ipam.pools import Pool, Pools
from ipam.records import Affinity, Records, net_of

T = TypeVar("T")

_KINDS = ("IPPool", "IPReservation", "IPAMConfiguration", "BlockAffinity")

_log = logging.getLogger(__name__)


class View:
    """Safe to use from several threads. All methods may raise StoreError.

    ``follower``: somebody else's, who starts it, or has it catch up before he asks us anything.
    """

    def __init__(
        self,
        store: Datastore,
        records: Records,
        *,
        follow: bool = False,
        follower: Follower | None = None,
    ) -> None:
        self._store = store
        self._records = records
        self._pools = Pools(store)
        self._follow = follow
        self._prompt = isinstance(store, PromptDatastore)
        self._asks = False
        self._shares = follower is not None
        if follower is None:
            self._follower = Follower(store, _KINDS, self._notice)
        else:
            self._follower = follower
            follower.also(_KINDS, self._notice)
        self._lock = threading.Lock()  # held for moments only
        self._reading = threading.Lock()
        self._remembered: dict[str, object] = {}
        self._changes = 0
        self._affinities: dict[str, Net] = {}  # what they claim, by their names
        self._claimed: Counter[Net] = Counter()
        self._given_up = 0

    def start(self) -> None:
        """Begin to follow the store."""
        if self._shares:
            return
        if self._follow:
            self._follower.start()
        self._asks = not self._follow and self._prompt

    def stop(self) -> None:
        """Follow it no longer."""
        self._asks = False
        if not self._shares:
            self._follower.stop()

    def refresh(self) -> None:
        """Have what is remembered be as it is now, where that can be asked."""
        if self._asks:
            self._follower.catch_up()

    @property
    def remembers(self) -> bool:
        """Whether what we say may be a moment old."""
        return self._follower.in_sync

    def forget(self) -> None:
        """Look everything up anew."""
        with self._lock:
            self._remembered.clear()
            self._changes += 1

    def pools(self) -> list[Pool]:
        """Every pool, by name."""
        return self._recall("IPPool", self._pools.all)

    def reservations(self) -> list[Net]:
        """What must not be given out by itself. What is no CIDR is left out and logged."""
        return self._recall("IPReservation", self._read_reservations)

    def configuration(self) -> IPAMConfigurationSpec:
        """The IPAMConfiguration. Raises InvalidObjectError."""
        return self._recall("IPAMConfiguration", self._records.configuration)

    def claims(self, node: str, type_: str) -> list[Affinity]:
        """What an owner claims."""
        return self._recall(
            f"{node}-",
            lambda: [stored.thing for stored in self._records.affinities(node, type_)],
        )

    def forget_claims(self, node: str) -> None:
        """Look up anew what an owner claims."""
        with self._lock:
            self._remembered.pop(f"{node}-", None)
            self._changes += 1

    def claimed(self) -> Collection[Net] | None:
        """All blocks that anybody claims; None when it is not at hand: see ``Records.claimed``."""
        return self._claimed if self.remembers else None

    def all_claimed(self) -> set[Net]:
        """The same, read where it is not at hand."""
        if not self.remembers:
            return self._records.claimed()
        with self._lock:
            return set(self._claimed)

    @property
    def given_up(self) -> int:
        """How many claims were given up, by anybody, since the start."""
        return self._given_up

    def _recall(self, topic: str, read: Callable[[], T]) -> T:
        if not self.remembers:
            return read()
        with self._lock:
            if topic in self._remembered:
                return cast(T, self._remembered[topic])
        with self._reading:
            with self._lock:
                if topic in self._remembered:  # read by another while we waited
                    return cast(T, self._remembered[topic])
                before = self._changes
            value = read()
            with self._lock:
                if self._changes == before:
                    self._remembered[topic] = value
            return value

    def _notice(self, update: Update | InSync) -> None:
        """In the follower's thread."""
        if isinstance(update, InSync):
            return
        key = update.key
        with self._lock:
            self._changes += 1
            if key.kind == "BlockAffinity":
                self._notice_claim(key.name, part(update.value, "spec"))
            else:
                self._remembered.pop(key.kind, None)

    def _notice_claim(self, name: str, spec: dict[str, str]) -> None:
        for topic in [topic for topic in self._remembered if name.startswith(topic)]:
            del self._remembered[topic]
        old = self._affinities.pop(name, None)
        if old is not None:
            self._given_up += 1
            self._claimed[old] -= 1
            if not self._claimed[old]:
                del self._claimed[old]
        try:
            if spec:
                net = net_of(spec["cidr"])
                self._affinities[name] = net
                self._claimed[net] += 1
        except (KeyError, TypeError, ValueError) as error:
            _log.error("BlockAffinity %s: not taken into account: spec.cidr: %s", name, error)

    def _read_reservations(self) -> list[Net]:
        """Each CIDR by itself: what else is wrong with an object does not free what it reserves."""
        nets = []
        for entry in self._store.list("IPReservation").entries:
            cidrs = part(entry.value, "spec").get("reservedCIDRs") or []
            for cidr in cidrs if isinstance(cidrs, list) else [cidrs]:
                try:
                    nets.append(parse_net(str(cidr).strip(), strict=False))
                except ValueError as error:
                    _log.error("%s: spec.reservedCIDRs: not honoured: %s", entry.key, error)
        return nets
