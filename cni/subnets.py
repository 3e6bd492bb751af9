"""Blocks as subnets, for plugins that wire containers to a bridge or the like.

To such a plugin a block is a subnet of this node, and the block's first address but one its
gateway. That one, and those that a subnet keeps for itself, are held on behalf of the node as long
as it has the block.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from api.names import cidr_name
from api.net import BITS, V4, Net, host_net
from ipam.allocator import AddressInUseError, Allocator, Assignment, PoolExhaustedError
from ipam.records import Records

_ATTEMPTS = 8  # at an address that is none of those a subnet keeps
_REMEMBERED = 60.0  # seconds that a block counts as a subnet without being looked at


class Subnets:
    """The subnets of one node. All methods may raise StoreError, IpamError.

    ``holder``: how the handles and attributes begin of what they keep. Addresses of blocks that are
    known to be subnets are taken side by side. To make one of a block, its first addresses must be
    nobody's: so that is done while nobody takes any.
    """

    def __init__(self, records: Records, allocator: Allocator, holder: str) -> None:
        self._records = records
        self._allocator = allocator
        self._holder = holder
        self._gate = _Gate()
        self._known: dict[Net, float] = {}

    def assign(
        self,
        handle: str,
        attributes: Mapping[str, str],
        version: int,
        pools: Sequence[str],
        namespace_labels: Mapping[str, str] | None,
    ) -> Assignment:
        """An address for a container."""

        def take() -> Assignment:
            return self._allocator.assign(
                handle,
                attributes,
                version=version,
                pools=pools,
                namespace_labels=namespace_labels,
            )

        if self._known:
            with self._gate.shared():
                assignment = take()
                if self._is_usable(assignment.address, assignment.block):
                    return assignment
                self._allocator.release_addresses([assignment.address], handle=handle)
        with self._gate.exclusive():
            for _ in range(_ATTEMPTS):
                assignment = take()
                if self._make(assignment.address, assignment.block, handle):
                    return assignment
        raise PoolExhaustedError(f"block {assignment.block}: no address left beside a subnet's own")

    def assign_specific(self, handle: str, attributes: Mapping[str, str], address: Net) -> Net:
        """Take an address that was asked for; returns its block."""
        with self._gate.exclusive():
            block = self._allocator.assign_specific(address, handle, attributes).block
            if self._make(address, block, handle):
                return block
        raise AddressInUseError(f"{address}: no container can have this address of block {block}")

    def of(self, handle: str, held: Collection[Net]) -> dict[Net, Net]:
        """The addresses a container holds since an earlier ADD, and their blocks.

        Where a daemon died before it had made the block a subnet, that is done now.
        """
        if not held:
            return {}
        stored = self._records.handle(handle)
        blocks = stored.thing.counts if stored else ()
        found = {address: block for address in held for block in blocks if block.contains(address)}
        if all(self._is_usable(address, block) for address, block in found.items()):
            return found
        with self._gate.exclusive():
            return {
                address: block
                for address, block in found.items()
                if self._make(address, block, handle)
            }

    def attributes(self) -> dict[str, str]:
        """What every address that is given here says of itself."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f +0000 UTC")
        return {"node": self._allocator.node, "timestamp": now, "type": self._holder}

    def _is_usable(self, address: Net, block: Net) -> bool:
        """Whether it lies in a block that is known to be a subnet, which does not keep it."""
        at = self._known.get(block)
        return at is not None and time.monotonic() < at + _REMEMBERED and address not in kept(block)

    def _make(self, address: Net, block: Net, handle: str) -> bool:
        """Hold the addresses of a block, of which ``address`` is given, that no container can have.

        False when it is one of them: it has been given back then.
        """
        node = self._allocator.node
        if self._records.affinity(node, block) is None:
            raise PoolExhaustedError(
                f"node {node}: no free block is left, and an address of another"
                f" node's ({block}) is of no use to other plugins; create another IPPool"
            )
        own = f"{self._holder}-subnet.{cidr_name(block)}"
        missing = kept(block).difference(self._allocator.addresses(own))
        usable = address not in missing
        if not usable:
            self._allocator.release_addresses([address], handle=handle)
        for needed in sorted(missing):
            try:
                self._allocator.assign_specific(needed, own, self.attributes())
            except AddressInUseError as error:
                raise AddressInUseError(
                    f"{error}. It is needed for the subnet {block}: give containers that another"
                    " plugin wires an IPPool of their own, and name it in ipam.ipv4_pools or"
                    " ipam.ipv6_pools"
                ) from None
        self._known[block] = time.monotonic()
        return usable


class _Gate:
    """Passed by many at once, or by one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._alone = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
            self._changed.wait_for(lambda: not self._sharing)
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


def gateway(block: Net) -> Net | None:
    """The address of the node in a block that serves as a subnet; None for one too small."""
    if BITS[block.version] - block.length < 2:
        return None
    return host_net(block.version, block.address + 1)


def kept(block: Net) -> frozenset[Net]:
    """The addresses of a block that no container can have when it serves as a subnet.

    The gateway's; the first (RFC 4291, 2.6.1: all routers of the subnet); of IPv4 the last
    (RFC 919: broadcast).
    """
    node = gateway(block)
    if node is None:
        return frozenset()
    addresses = {node, host_net(block.version, block.address)}
    if block.version == V4:
        addresses.add(host_net(V4, block.address + block.size - 1))
    return frozenset(addresses)
