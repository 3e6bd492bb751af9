"""Garbage collection: what nobody uses any more is given back, after proof.

Proof of an address: at two observations or more, over the whole grace period, nothing used it,
and it was the same allocation (handle and sequence number) each time. The same holds for every
other address of its handle: all are given back or none is. Just before the release the pod and
its endpoint are read once more, and the release itself is a compare-and-swap of the block that
refuses when the address was given anew meanwhile.

Blocks and claims are given back by the claim protocol, so a node that takes an address at that
moment wins. Nothing depends on the clocks of two machines, and nothing is remembered across a
restart: then the periods begin anew.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Generic, TypeVar

from api.errors import InvalidObjectError
from api.net import Net
from datastore.interface import ConflictError, Datastore, Key, NotFoundError
from ipam import claims
from ipam.allocator import Allocator
from ipam.block import Cooldown, ReleaseError
from ipam.errors import IpamError
from ipam.inventory import Allocation, Inventory, allocations_of, host_of
from ipam.orphans import delete_orphan
from ipam.reading import users_of
from ipam.records import CONFIRMED, Records

K = TypeVar("K", bound=Hashable)

_log = logging.getLogger(__name__)


class HaltedError(Exception):
    """Collection was to stop in the middle."""


@dataclass(frozen=True, slots=True)
class Periods:
    """How long something must stand, in seconds, at two observations or more.

    ``grace``: addresses that nobody uses, nodes that do not exist. ``quiet``: empty blocks,
    half-made claims, handles without addresses; no step of an assign may take as long.
    """

    grace: float = 900.0
    quiet: float = 60.0


@dataclass(slots=True)
class Collected:
    """What a run gave back, what it could not, and what still waits for its period to end."""

    addresses: list[Net] = field(default_factory=list)
    blocks: list[Net] = field(default_factory=list)
    claims: list[Net] = field(default_factory=list)
    handles: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    waiting: Counter[str] = field(default_factory=Counter)


class Standing(Generic[K]):
    """Since when, and how often in a row, something was observed."""

    def __init__(self) -> None:
        self._seen: dict[K, tuple[float, int]] = {}

    def observe(self, keys: Iterable[K], now: float) -> None:
        """These are there now, and nothing else is."""
        seen = {}
        for key in keys:
            since, times = self._seen.get(key, (now, 0))
            seen[key] = (since, times + 1)
        self._seen = seen

    def lasted(self, key: K, now: float, seconds: float) -> bool:
        """Whether it was there twice or more, and for so long."""
        since, times = self._seen.get(key, (now, 0))
        return times > 1 and now - since >= seconds

    def __iter__(self) -> Iterator[K]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)


class Collector:
    """Remembers what it observed. ``clock``: seconds of this machine that never go back.

    ``kubernetes``: where the pods are, if that is another store.
    ``proceed`` is asked before each step; once it says no, ``run`` raises HaltedError.
    """

    def __init__(
        self,
        store: Datastore,
        kubernetes: Datastore | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        proceed: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._kubernetes = kubernetes
        self._records = Records(store)
        self._allocator = Allocator(store, "")
        self._clock = clock
        self._proceed = proceed
        self._unused: Standing[Allocation] = Standing()
        self._gone: Standing[str] = Standing()
        self._empty: Standing[tuple[Net, int]] = Standing()
        self._half_made: Standing[tuple[str, Net, str, int]] = Standing()
        self._orphans: Standing[tuple[str, str]] = Standing()

    def run(self, inventory: Inventory, periods: Periods) -> Collected:
        """Observe, and give back what has been proved. Raises StoreError, HaltedError."""
        now = self._clock()
        done = Collected()
        self._observe(inventory, now)
        if inventory.blind:
            done.problems.append("no address is collected while an object can't be read")
        else:
            self._free_addresses(inventory, periods, now, done)
        self._leave_nodes(inventory, periods, now, done)
        self._mend_claims(inventory, periods, now, done)
        self._end_cooldowns(inventory, done)
        self._return_blocks(inventory, periods, now, done)
        self._delete_handles(periods, now, done)
        return done

    def _observe(self, inventory: Inventory, now: float) -> None:
        if not inventory.blind:
            allocations = inventory.allocations.values()
            self._unused.observe((each for each in allocations if inventory.unused(each)), now)
        claimants = {stored.thing.node for stored in inventory.affinities}
        owners = {host_of(stored.thing) for stored in inventory.blocks.values()}
        holders = {allocation.attribute("node") for allocation in inventory.allocations.values()}
        self._gone.observe(inventory.gone(claimants | owners | holders), now)
        self._empty.observe(
            (
                (net, stored.thing.sequence)
                for net, stored in inventory.blocks.items()
                if stored.thing.empty
            ),
            now,
        )
        self._half_made.observe(_half_made(inventory), now)
        self._orphans.observe(
            (
                (id_, stored.entry.revision)
                for id_, stored in inventory.handles.items()
                if id_ not in inventory.by_handle
            ),
            now,
        )

    # addresses

    def _free_addresses(
        self, inventory: Inventory, periods: Periods, now: float, done: Collected
    ) -> None:
        for handle in dict.fromkeys(allocation.handle for allocation in self._unused):
            held = inventory.by_handle[handle]
            if all(self._leaked(allocation, periods, now) for allocation in held):
                self._free(held, done)
            else:
                done.waiting["addresses"] += len(held)

    def _leaked(self, allocation: Allocation, periods: Periods, now: float) -> bool:
        if self._unused.lasted(allocation, now, periods.grace):
            return True
        # Its node has been away for as long: whoever used it is gone with it.
        node_left = self._gone.lasted(allocation.attribute("node"), now, periods.grace)
        return node_left and self._unused.lasted(allocation, now, periods.quiet)

    def _free(self, leak: list[Allocation], done: Collected) -> None:
        self._step()
        try:
            released = release_unused(self._store, self._allocator, leak, self._kubernetes)
        except (IpamError, InvalidObjectError, ReleaseError) as error:
            done.problems.append(f"{leak[0].address}: not released: {error}")
            return
        if released:
            texts = ", ".join(map(str, released))
            _log.info("%s: released: %s is not there any more", texts, leak[0].holder)
        done.addresses += released

    # blocks and claims

    def _leave_nodes(
        self, inventory: Inventory, periods: Periods, now: float, done: Collected
    ) -> None:
        """Take the claims of nodes that are gone, once nothing of theirs holds an address."""
        freed = set(done.addresses)
        busy = {
            allocation.attribute("node")
            for allocation in inventory.allocations.values()
            if allocation.address not in freed and (allocation.workload or allocation.machine)
        }
        for node in self._gone:
            if not self._gone.lasted(node, now, periods.grace) or node in busy:
                done.waiting["nodes"] += 1
                continue
            nets = {net for net, each in inventory.blocks.items() if host_of(each.thing) == node}
            nets |= {each.thing.net for each in inventory.affinities if each.thing.node == node}
            for net in sorted(nets):
                if not self._absent(node):
                    break
                self._release_claim(node, net, done.blocks, done, only_empty=False)

    def _mend_claims(
        self, inventory: Inventory, periods: Periods, now: float, done: Collected
    ) -> None:
        """Finish or take back what a claim or a release that died left."""
        for mark in self._half_made:
            node, net, _, _ = mark
            if node not in inventory.nodes:
                continue
            if self._half_made.lasted(mark, now, periods.quiet):
                self._release_claim(node, net, done.claims, done, only_empty=True)
            else:
                done.waiting["claims"] += 1

    def _end_cooldowns(self, inventory: Inventory, done: Collected) -> None:
        """Free what has rested, in blocks where nobody takes an address, which would do it."""
        resting = [
            stored
            for stored in inventory.blocks.values()
            if not stored.thing.empty and next(allocations_of(stored.thing), None) is None
        ]
        if not resting:
            return
        try:
            seconds = self._records.configuration().ip_cooldown_seconds
        except InvalidObjectError as error:
            done.problems.append(str(error))
            return
        cooldown = Cooldown(seconds, datetime.now(UTC))
        for stored in resting:
            if stored.thing.collect(cooldown):
                self._step()
                with contextlib.suppress(ConflictError, NotFoundError):  # it is in use after all
                    self._records.write_block(stored)

    def _return_blocks(
        self, inventory: Inventory, periods: Periods, now: float, done: Collected
    ) -> None:
        """Give back empty blocks; of those in a pool that is in use a node keeps one."""
        by_node: dict[tuple[str, int], list[Net]] = defaultdict(list)
        for net, stored in inventory.blocks.items():
            pool = inventory.pool_of(net)
            if pool is not None and not pool.disabled:
                by_node[host_of(stored.thing), net.version].append(net)
        for net, sequence in self._empty:
            stored = inventory.blocks[net]
            node = host_of(stored.thing)
            if not node and stored.thing.affinity is not None:
                continue  # not a node's
            own = by_node[node, net.version]
            if net in own and len(own) == 1 and node in inventory.nodes:
                continue  # its last
            if not self._empty.lasted((net, sequence), now, periods.quiet):
                done.waiting["blocks"] += 1
            elif stored.thing.affinity is None:
                self._step()
                try:
                    self._records.delete_block(stored)
                except (ConflictError, NotFoundError):
                    continue  # it is in use after all
                done.blocks.append(net)
            elif (
                node in inventory.nodes
                and (net not in own or self._has_another(node, net))
                and self._release_claim(node, net, done.blocks, done, only_empty=True)
                and net in own
            ):
                own.remove(net)

    def _release_claim(
        self, node: str, net: Net, given_back: list[Net], done: Collected, *, only_empty: bool
    ) -> bool:
        self._step()
        try:
            released = claims.release(self._records, node, net, only_empty=only_empty)
        except (IpamError, InvalidObjectError) as error:
            done.problems.append(f"block {net} of {node}: not released: {error}")
            return False
        if released:
            _log.info("block %s: released, it was %s's", net, node)
            given_back.append(net)
        return released

    def _has_another(self, node: str, net: Net) -> bool:
        """Whether the node has another confirmed block at this moment."""
        return any(
            stored.thing.state == CONFIRMED
            and stored.thing.net != net
            and stored.thing.net.version == net.version
            for stored in self._records.affinities(node)
        )

    def _absent(self, node: str) -> bool:
        try:
            self._store.get(Key("Node", node))
        except NotFoundError:
            return True
        return False

    # handles

    def _delete_handles(self, periods: Periods, now: float, done: Collected) -> None:
        for id_, revision in self._orphans:
            if not self._orphans.lasted((id_, revision), now, periods.quiet):
                done.waiting["handles"] += 1
                continue
            self._step()
            try:
                if delete_orphan(self._store, id_):
                    _log.info("IPAM handle %s: deleted: it holds nothing", id_)
                    done.handles.append(id_)
            except InvalidObjectError as error:
                done.problems.append(f"handle {id_}: not deleted: {error}")

    def _step(self) -> None:
        if not self._proceed():
            raise HaltedError


def release_unused(
    store: Datastore,
    allocator: Allocator,
    leak: list[Allocation],
    kubernetes: Datastore | None = None,
) -> list[Net]:
    """Give back the addresses of one holder, unless it is there by now; returns which.

    Raises StoreError, IpamError; InvalidObjectError when what may use them can't be understood;
    ReleaseError when one was given anew meanwhile.
    """
    if any(holder_there(store, allocation, kubernetes) for allocation in leak):
        return []
    return allocator.release_addresses(
        [allocation.address for allocation in leak],
        handle=leak[0].handle or None,
        sequences={each.address: each.sequence for each in leak if each.sequence is not None},
    )


def holder_there(
    store: Datastore, allocation: Allocation, kubernetes: Datastore | None = None
) -> bool:
    """Whether, at this moment, the holder of an address is found by its name, and may use it."""
    users = users_of(store, allocation, kubernetes)
    if allocation.machine:
        return bool(users)
    return not Inventory({}, {}, [], users, frozenset()).unused(allocation)


def _half_made(inventory: Inventory) -> Iterator[tuple[str, Net, str, int]]:
    """Node, block, and the revisions at which there is a claim without block, or the reverse."""
    claimed = set()
    for stored in inventory.affinities:
        node, net = stored.thing.node, stored.thing.net
        claimed.add((node, net))
        block = inventory.blocks.get(net)
        owned = block is not None and host_of(block.thing) == node
        if not owned or stored.thing.state != CONFIRMED:
            yield node, net, stored.entry.revision, block.thing.sequence if block else 0
    for net, found in inventory.blocks.items():
        node = host_of(found.thing)
        if node and (node, net) not in claimed:
            yield node, net, "", found.thing.sequence
