"""Which enforcer a node uses, and how one takes over from another without a gap.

The new one stands beside the old one, then the old one's tables go: while both are there, a
packet must please both, and they say the same.

A packet must please everybody else's tables, too. Where iptables drops what no rule of its
FORWARD chain accepts, as Docker makes it do, nobody there speaks for pods while nftables, or the
other variant of iptables, enforces; so there, behind all others' rules, stand two of ours that
accept what comes from pods and goes to them: who enforces has the say about it.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from felix import names
from felix.chains import Accept, Chain, ChainRule, Condition, Hook, Jump, Table
from felix.dataplane import Enforcer, Members
from felix.desired import ChainKey, Delta, HookKey, SetKey
from felix.iptables_dataplane import IptablesDataplane
from felix.nftables_dataplane import TABLE, NftablesDataplane
from felix.ruleset import VERSIONS
from felix.settings import NftablesMode, Settings
from kernel.iptables import IptablesTable
from kernel.iptables_variants import IptablesError, detect_backend, exists
from kernel.nftables import Nftables
from policy.model import Member

# How often, and with what pause in seconds, sets are tried that rules held until just now.
_ATTEMPTS = 20
_PAUSE = 0.02

_log = logging.getLogger(__name__)

# What it says of an enforcer that can't be had.
FAILURES = (OSError, IptablesError)

# What a kernel without nf_tables says.
_UNKNOWN = (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL)


class Backend(Enum):
    """How policy is enforced."""

    NFTABLES = "nftables"
    IPTABLES_NFT = "iptables-nft"
    IPTABLES_LEGACY = "iptables-legacy"


_VARIANTS = {"nft": Backend.IPTABLES_NFT, "legacy": Backend.IPTABLES_LEGACY}
_NAMES = {backend: variant for variant, backend in _VARIANTS.items()}


def choose(settings: Settings, current: Backend | None) -> Backend:
    """nftables, unless the settings or the kernel will not have it.

    Raises OSError, IptablesError where iptables is asked for and can't be found out about.

    ``nftablesMode`` Auto: an ``iptablesBackend`` that names a variant asks for iptables. Where
    either variant will do, ``current`` stays.
    """
    variant = settings.iptables_backend
    if settings.nftables_mode is NftablesMode.ENABLED:
        return Backend.NFTABLES
    if settings.nftables_mode is NftablesMode.AUTO and variant == "auto" and has_nftables():
        return Backend.NFTABLES
    if variant == "auto":
        if current in _NAMES:
            return current
        variant = detect_backend()
    return _VARIANTS[variant]


def make(backend: Backend, settings: Settings, members: Members) -> Enforcer:
    """An enforcer that wants nothing yet. Raises OSError."""
    if backend is Backend.NFTABLES:
        if not has_nftables():
            raise OSError(errno.EPROTONOSUPPORT, "this kernel has no nftables")
        return NftablesDataplane(settings, members)
    return IptablesDataplane(settings, members, _NAMES[backend])


def make_any(
    settings: Settings, current: Backend | None, members: Members
) -> tuple[Backend, Enforcer, Exception | None]:
    """The enforcer that is asked for or, where it can't be had, another; and why.

    Raises OSError, IptablesError where none can be had.
    """
    try:
        wanted = choose(settings, current)
        return wanted, make(wanted, settings, members), None
    except FAILURES as error:
        refused = error
    for backend in Backend:
        try:
            return backend, make(backend, settings, members), refused
        except FAILURES as error:
            _log.info("nor can %s be had: %s", backend.value, error)
    raise refused


def settle_others(backend: Backend | None, settings: Settings) -> list[str]:
    """Remove what other backends left in the kernel; what could not be, in words.

    See to it that iptables, in the variants that don't enforce, lets pods' packets pass. None:
    nobody enforces any more, and nothing stays.
    """
    removals: dict[Backend, Callable[[], list[str]]] = {
        Backend.NFTABLES: _remove_nftables,
        Backend.IPTABLES_NFT: lambda: _settle_iptables("nft", settings, backend),
        Backend.IPTABLES_LEGACY: lambda: _settle_iptables("legacy", settings, backend),
    }
    problems = []
    for other, remove in removals.items():
        if other is backend:
            continue
        try:
            problems += remove()
        except FileNotFoundError:
            continue  # without its programs there is nothing of it
        except (OSError, IptablesError) as error:
            problems.append(str(error))
    return problems


def has_nftables() -> bool:
    """Whether the kernel has them. Raises OSError where that can't be found out."""
    try:
        with Nftables(4, TABLE) as table:
            table.generation()
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        _log.info("this kernel has no nftables: %s", error)
        return False
    return True


def _remove_nftables() -> list[str]:
    if not has_nftables():
        return []
    for version in (4, 6):
        with Nftables(version, TABLE) as table:
            if table.exists():
                _unhook(table)
                transaction = table.transaction()
                transaction.delete_table()
                table.commit(transaction)
                _log.info("removed table %s", table)
    return []


def _unhook(table: Nftables) -> None:
    """Let no more packets in.

    One that is among the rules when a transaction is committed ends its way through the old ones,
    but looks into the sets as they are then: without members what is allowed would be dropped.
    """
    transaction = table.transaction()
    for name, chain in table.read().chains.items():
        if chain.base is not None:
            transaction.flush_chain(name)
            transaction.delete_chain(name)
    table.commit(transaction)


def _settle_iptables(variant: str, settings: Settings, backend: Backend | None) -> list[str]:
    """Have an enforcer want no more than what stands beside the real one; it finds the rest."""
    iptables = IptablesDataplane(settings, _no_members, variant)
    manner = settings.nftables if backend is Backend.NFTABLES else settings.iptables
    try:
        if backend is not None and not manner.returns:
            iptables.want(_passage(variant, settings))
        iptables.read()
        if iptables.apply_chains(0.0):
            _log.info("changed what is ours in iptables-%s beside the enforcer", variant)
        # The sets of the iptables variants are the same ones, and the enforcer's own.
        for attempt in range(0 if backend in _NAMES else _ATTEMPTS):
            iptables.trim_sets(float(attempt))
            if iptables.next_retry() is None:
                break
            # The kernel lets go of a deleted rule's sets only some milliseconds later.
            time.sleep(_PAUSE)
        return [f"{what}: {message}" for what, message in iptables.problems()]
    finally:
        iptables.close()


def _passage(variant: str, settings: Settings) -> Delta:
    """Rules that let pods' packets pass where else they would be dropped."""
    delta = Delta(settings=replace(settings, append_hooks=True))
    pods = [f"{prefix}*" for prefix in settings.interface_prefixes]
    rules = (
        *(ChainRule(Accept(), Condition(in_interface=interface)) for interface in pods),
        *(ChainRule(Accept(), Condition(out_interface=interface)) for interface in pods),
    )
    for version in VERSIONS:
        if _drops_forwarded(version, variant):
            key = ChainKey(version, Table.FILTER, names.FORWARD)
            delta.chains[key] = Chain(names.FORWARD, rules)
            hook = HookKey(version, Hook(Table.FILTER, "FORWARD"))
            delta.hooks[hook] = (ChainRule(Jump(names.FORWARD), comment="Judged elsewhere"),)
    return delta


def _drops_forwarded(version: int, variant: str) -> bool:
    if not exists(version, Table.FILTER.value, variant):
        return False
    with IptablesTable(version, Table.FILTER.value, variant) as table:
        return table.read().policies.get("FORWARD") == "DROP"


def _no_members(key: SetKey) -> frozenset[Member]:
    raise KeyError(key)
