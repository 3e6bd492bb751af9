"""Which pools may serve a request, and in what order a node looks through their blocks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from api.errors import InvalidObjectError
from api.ippool import IPPool
from api.net import BITS, Net, parse_net
from api.registry import parse_as
from datastore.interface import Datastore, Entry
from ipam.errors import NoPoolError
from policy.selector import Selector, parse

Labels = Mapping[str, str]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pool:
    """An IPPool as far as IPAM is concerned. A selector that is None selects everything."""

    name: str
    net: Net
    block_length: int  # prefix length of its blocks
    uses: tuple[str, ...]
    disabled: bool
    automatic: bool  # may be used without being asked for
    node_selector: Selector | None
    namespace_selector: Selector | None

    def __str__(self) -> str:
        return f"{self.name} ({self.net})"

    def block_of(self, address: Net) -> Net:
        """The block an address of the pool lies in."""
        shift = BITS[self.net.version] - self.block_length
        return Net(self.net.version, address.address >> shift << shift, self.block_length)

    def selects(self, node_labels: Labels) -> bool:
        """Whether a node with these labels may have blocks of it."""
        return self.node_selector is None or self.node_selector.matches(node_labels)

    @property
    def block_count(self) -> int:
        """How many blocks it has."""
        return 1 << (self.block_length - self.net.length)

    def blocks(self, node: str, skip: int = 0) -> Iterator[Net]:
        """Every block of the pool once, in an order of the node's own, from a place in it on.

        Nodes start at different places and make different steps, so they seldom meet: the
        number of blocks tried before a free one depends on how full the pool is, not on how
        large.
        """
        count = self.block_count
        seed = hashlib.sha256(f"{node} {self.net}".encode()).digest()
        start = int.from_bytes(seed[:16])
        step = int.from_bytes(seed[16:]) | 1  # odd, and count is a power of two: all are reached
        size = 1 << (BITS[self.net.version] - self.block_length)
        for number in range(skip, skip + count):
            place = (start + number * step) % count
            yield Net(self.net.version, self.net.address + place * size, self.block_length)


@dataclass(frozen=True, slots=True)
class Request:
    """What an address is wanted for. ``pools``: names or CIDRs; none means any that fits."""

    node: str
    version: int
    use: str
    pools: Sequence[str]
    node_labels: Callable[[], Labels]
    namespace_labels: Labels | None


class Pools:
    """The pools of a store; each is parsed once for every revision of it."""

    def __init__(self, store: Datastore) -> None:
        self._store = store
        self._parsed: dict[str, tuple[str, Pool | None]] = {}

    def all(self) -> list[Pool]:
        """Every pool, by name. One that is malformed is left out and logged."""
        entries = self._store.list("IPPool").entries
        self._parsed = {entry.key.name: self._parse(entry) for entry in entries}
        return [pool for _, pool in self._parsed.values() if pool is not None]

    def usable(self, request: Request) -> list[Pool]:
        """``usable`` of all. Raises NoPoolError."""
        return usable(self.all(), request)

    def _parse(self, entry: Entry) -> tuple[str, Pool | None]:
        known = self._parsed.get(entry.key.name)
        if known is not None and known[0] == entry.revision:
            return known
        try:
            return entry.revision, _pool(entry)
        except (InvalidObjectError, ValueError) as error:
            _log.error("pool not used: %s", error)
            return entry.revision, None


def usable(pools: Iterable[Pool], request: Request) -> list[Pool]:
    """The pools that may serve a request, in the order to try them. Raises NoPoolError."""
    pools = [pool for pool in pools if pool.net.version == request.version]
    if request.pools:
        return [_requested(text, pools, request) for text in dict.fromkeys(request.pools)]
    verdicts = {pool: _unsuitable(pool, request) for pool in pools}
    usable = [pool for pool, reason in verdicts.items() if reason is None]
    if not usable:
        reasons = [f"{pool} {reason}" for pool, reason in verdicts.items()] or ["there is none"]
        raise NoPoolError(
            f"no IPv{request.version} pool for {request.use} addresses of node"
            f" {request.node}: {'; '.join(reasons)}. Create an IPPool, or change one of these"
        )
    return usable


def _pool(entry: Entry) -> Pool:
    resource = parse_as("IPPool", entry.value)
    assert isinstance(resource, IPPool)
    spec = resource.spec
    return Pool(
        name=entry.key.name,
        net=spec.net,
        block_length=spec.block_size,
        uses=tuple(spec.allowed_uses),
        disabled=spec.disabled,
        automatic=spec.assignment_mode != "Manual",
        node_selector=_selector(spec.node_selector),
        namespace_selector=_selector(spec.namespace_selector),
    )


def _selector(text: str) -> Selector | None:
    return None if text in ("", "all()") else parse(text)


def _requested(text: str, pools: Sequence[Pool], request: Request) -> Pool:
    """The pool asked for by name or CIDR. Selectors and assignmentMode don't count then."""
    for pool in pools:
        if text == pool.name or _same_net(text, pool.net):
            reason = _closed(pool, request)
            if reason is not None:
                raise NoPoolError(f"the pool asked for can't be used: {pool} {reason}")
            return pool
    there = ", ".join(map(str, pools)) or "none"
    raise NoPoolError(
        f"the pool asked for does not exist: {text!r}; IPv{request.version} pools: {there}"
    )


def _same_net(text: str, net: Net) -> bool:
    try:
        return parse_net(text) == net
    except ValueError:
        return False


def _closed(pool: Pool, request: Request) -> str | None:
    """Why a pool can't be used whoever asks; None when it can."""
    if pool.disabled:
        return "is disabled"
    if request.use not in pool.uses:
        return f"is not for {request.use} addresses (allowedUses: {', '.join(pool.uses)})"
    return None


def _unsuitable(pool: Pool, request: Request) -> str | None:
    """Why a pool can't be used for a request that names none; None when it can."""
    reason = _closed(pool, request)
    if reason is not None:
        return reason
    if not pool.automatic:
        return "must be asked for (assignmentMode: Manual)"
    if pool.node_selector is not None and not pool.selects(request.node_labels()):
        return f"selects other nodes (nodeSelector: {pool.node_selector})"
    if pool.namespace_selector is not None and (
        request.namespace_labels is None
        or not pool.namespace_selector.matches(request.namespace_labels)
    ):
        return f"selects other namespaces (namespaceSelector: {pool.namespace_selector})"
    return None
