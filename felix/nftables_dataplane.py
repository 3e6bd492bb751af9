"""Policy enforced by nftables: one table an IP version, changed in one transaction at a time."""

from __future__ import annotations

from collections.abc import Iterator

from api.net import V4, V6
from felix.dataplane import Members
from felix.desired import Delta
from felix.nftables_table import TABLE, NftablesTable
from felix.settings import Settings

__all__ = ["TABLE", "NftablesDataplane"]


class NftablesDataplane:
    """The ``Enforcer`` that speaks to nftables."""

    def __init__(self, settings: Settings, members: Members) -> None:
        self._families = {
            version: NftablesTable(version, settings, members) for version in (V4, V6)
        }
        self._quiet: int | None = None  # what ``_others`` was when everything was read

    @property
    def ports(self) -> frozenset[int]:
        """By which numbers the kernel tells of this one's changes (``kernel.nft_monitor``)."""
        return frozenset(family.port for family in self._families.values())

    def close(self) -> None:
        """Close the sockets. What is in the kernel stays."""
        for family in self._families.values():
            family.close()

    def want(self, delta: Delta) -> None:
        """Take what became different."""
        if delta.settings is not None:
            for family in self._families.values():
                family.configure(delta.settings)
        for key in delta.sets:
            self._families[key.version].want_set(key, delta)
        for chain_key, chain in delta.chains.items():
            family = self._families[chain_key.version]
            family.want_chain(chain_key.table, chain_key.name, chain)
        for (version, hook), rules in delta.hooks.items():
            self._families[version].want_hook(hook, rules)
        for family in self._families.values():
            family.reshape()

    def read(self) -> None:
        """See what is in the kernel. Raises OSError."""
        self._quiet = None
        others = self._others()
        for family in self._families.values():
            family.read()
        self._quiet = others

    def untouched(self) -> bool:
        """Whether nobody else has changed any table of nftables since ``read``."""
        return self._quiet is not None and self._others() == self._quiet

    def _others(self) -> int:
        """A number that grows by one with every transaction of somebody else's."""
        families = self._families.values()
        return next(iter(families)).generation() - sum(family.commits for family in families)

    def fill_sets(self, now: float) -> int:
        """Fill large new sets, which nothing refers to yet."""
        return sum(family.preload(now) for family in self._families.values())

    def apply_chains(self, now: float) -> int:
        """Sets, chains and hooks, in one transaction an IP version."""
        return sum(family.apply(now) for family in self._families.values())

    def trim_sets(self, now: float) -> int:
        """Nothing: members go in the same transaction as all else."""
        return 0

    def enforces(self, interface: str) -> bool:
        """Whether the chains of a workload's interface stand, and packets are sent there."""
        found = {family.enforces(interface) for family in self._families.values()}
        return True in found and False not in found

    def problems(self) -> Iterator[tuple[str, str]]:
        """(object, what the kernel said)."""
        for family in self._families.values():
            yield from family.problems()

    def next_retry(self) -> float | None:
        """When something that failed is due again."""
        times = [family.next_retry() for family in self._families.values()]
        return min((time for time in times if time is not None), default=None)
