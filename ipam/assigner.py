"""One request for addresses: from which blocks, and what happens when those are full."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from api.net import Net
from datastore.interface import ConflictError, NotFoundError
from ipam import claims
from ipam.block import Block, Cooldown
from ipam.errors import BlockLimitError, ContentionError, IpamError, PoolExhaustedError
from ipam.holdings import Holdings
from ipam.pools import Pool, Request, usable
from ipam.records import ATTEMPTS, CONFIRMED, HOST, Records, Stored, owner
from ipam.search import Search, deserted
from ipam.view import View

MAX_BLOCKS = 20  # of a node in the pools of a request, unless maxBlocksPerHost says otherwise
_BORROW_FROM = 16  # blocks to try to borrow from


@dataclass(frozen=True, slots=True)
class Assignment:
    """An address (a /32 or /128), the block it comes from, and the name of its pool."""

    address: Net
    block: Net
    pool: str


class Owner:
    """Who owns blocks: a node, or (``virtual``) somebody who is no machine."""

    def __init__(self, records: Records, node: str, type_: str) -> None:
        self.node = node
        self.type = type_
        self.affinity = owner(node, type_)
        self.search = Search(records, node, self.affinity)
        self.last: dict[int, Net] = {}  # by version: the block of the last success, tried first
        self.turn = threading.Lock()  # of the thread that looks for another block
        self.found = 0  # blocks since the start

    @property
    def is_node(self) -> bool:
        """Whether the limits of nodes concern it."""
        return self.type == HOST


@dataclass(frozen=True, slots=True)
class Wanted:
    """For whom, in whose blocks, by what knowledge of the store."""

    handle: str
    attributes: Mapping[str, str]
    owner: Owner
    view: View
    reserved: Sequence[Net] = ()


class Assigner:
    """Finds addresses. ``cooldown`` tells how long they rest, and the time."""

    def __init__(
        self, records: Records, holdings: Holdings, cooldown: Callable[[], Cooldown]
    ) -> None:
        self._records = records
        self._holdings = holdings
        self._cooldown = cooldown

    def assign(self, request: Request, count: int, wanted: Wanted) -> list[Assignment]:
        """``count`` addresses. Raises IpamError, and then gives back those it had."""
        found: list[Assignment] = []
        try:
            for _ in range(ATTEMPTS):
                self._assign_once(request, count, wanted, found)
                if len(found) == count:
                    return found
            raise ContentionError(
                f"node {request.node}: others took {ATTEMPTS} times what we found; try again"
            )
        except IpamError:
            self._give_back(found, wanted.handle)
            raise
        finally:
            self._holdings.settle(wanted.handle)

    def assign_each(self, request: Request, newcomers: Sequence[Wanted]) -> dict[str, Assignment]:
        """An address for each handle that is new, from the blocks that their owner has.

        All are of one owner. Those that got none so are not in the answer. Raises IpamError.
        """
        owner, view, reserved = newcomers[0].owner, newcomers[0].view, newcomers[0].reserved
        missing = {newcomer.handle: newcomer.attributes for newcomer in newcomers}
        found: dict[str, Assignment] = {}
        pools = usable(view.pools(), request)
        for net, pool, confirmed in self._own_blocks(pools, request.version, newcomers[0]):
            if confirmed and missing:
                taken = self._holdings.take_each(
                    net, missing, only_for=owner.affinity, reserved=reserved
                )
                for handle, address in taken.items():
                    del missing[handle]
                    if address is not None:
                        found[handle] = Assignment(address, net, pool.name)
                        owner.last[net.version] = net
        return found

    def _assign_once(
        self, request: Request, count: int, wanted: Wanted, found: list[Assignment]
    ) -> None:
        """More addresses to ``found``; perhaps none, when others were quicker."""
        found_before = wanted.owner.found
        pools = usable(wanted.view.pools(), request)
        own = self._own_blocks(pools, request.version, wanted)
        for net, pool, confirmed in own:
            found += self._from_own(net, pool, confirmed, count - len(found), wanted)
            if len(found) == count:
                return
        with wanted.owner.turn:
            if found_before == wanted.owner.found:  # else another thread found a block meanwhile
                found += self._from_other(request, pools, len(own), count - len(found), wanted)

    def _own_blocks(
        self, pools: Sequence[Pool], version: int, wanted: Wanted
    ) -> list[tuple[Net, Pool, bool]]:
        """The owner's blocks in these pools, with whether the claim is confirmed."""
        own = [
            (claim.net, pool, claim.state == CONFIRMED)
            for claim in wanted.view.claims(wanted.owner.node, wanted.owner.type)
            for pool in pools
            if pool.net.contains(claim.net)
        ]
        last = wanted.owner.last.get(version)
        order = {pool: place for place, pool in enumerate(pools)}
        return sorted(own, key=lambda block: (block[0] != last, order[block[1]]))

    def _from_own(
        self, net: Net, pool: Pool, confirmed: bool, count: int, wanted: Wanted
    ) -> list[Assignment]:
        if confirmed:
            found = self._take(net, pool, count, wanted, only_for=wanted.owner.affinity)
            if found or self._holdings.affinity(net) == wanted.owner.affinity:
                return found
        with wanted.owner.turn:
            # Half-done: by somebody who died, or by a thread of ours that is ready by now.
            if not self._is_ours(net, wanted.owner):
                return self._claim_and_take(net, pool, count, wanted)
        return self._take(net, pool, count, wanted, only_for=wanted.owner.affinity)

    def _is_ours(self, net: Net, owner: Owner) -> bool:
        """Whether a block is claimed in full, as the store has it now."""
        claim = self._records.affinity(owner.node, net)
        if claim is None or claim.thing.state != CONFIRMED:
            return False
        block = self._records.block(net)
        return block is not None and block.thing.affinity == owner.affinity

    def _from_other(
        self,
        request: Request,
        pools: Sequence[Pool],
        own: int,
        count: int,
        wanted: Wanted,
    ) -> list[Assignment]:
        """From a new block, from an empty one of another node, or borrowed."""
        configuration = wanted.view.configuration()
        limit = configuration.max_blocks_per_host or MAX_BLOCKS
        if wanted.owner.is_node and own >= limit:
            raise BlockLimitError(
                f"node {request.node}: its {own} blocks in {_names(pools)} are full, and"
                f" it may have no more than {limit}; raise maxBlocksPerHost in the"
                " IPAMConfiguration 'default', or run fewer pods on this node"
            )
        if not configuration.auto_allocate_blocks:
            raise PoolExhaustedError(
                f"node {request.node}: its blocks in {_names(pools)} are full, and"
                " autoAllocateBlocks is false in the IPAMConfiguration 'default'"
            )
        self._give_up_unselected(request, wanted)
        for pool in pools:
            for net in wanted.owner.search.free(wanted.view, pool, wanted.reserved):
                if found := self._claim_and_take(net, pool, count, wanted):
                    return found
        strict = configuration.strict_affinity
        if found := self._from_blocks_of_others(pools, strict, count, wanted):
            return found
        raise PoolExhaustedError(
            f"node {request.node}: pool {_names(pools)} has no free address"
            f"{' of this node (strictAffinity)' if strict else ''}: every block is taken;"
            " create another IPPool, or find what holds them with: manxctl ipam show"
        )

    def _from_blocks_of_others(
        self, pools: Sequence[Pool], strict: bool, count: int, wanted: Wanted
    ) -> list[Assignment]:
        """From a deserted block, which becomes ours; else, unless ``strict``, borrowed."""
        samples = [(pool, wanted.owner.search.of_others(pool)) for pool in pools]
        for _ in range(2):  # some of each pool, then all
            others = [(pool, stored) for pool, sample in samples for stored in next(sample, ())]
            cooldown = self._cooldown()
            for pool, stored in others:
                net = stored.thing.net
                if self._take_over(stored, cooldown) and (
                    found := self._claim_and_take(net, pool, count, wanted)
                ):
                    return found
            if strict:
                continue
            open_ = [(p, s) for p, s in others if s.thing.free(wanted.reserved)]
            for pool, stored in open_[:_BORROW_FROM]:
                if found := self._take(stored.thing.net, pool, count, wanted):
                    return found
        for pool in pools:
            wanted.owner.search.fruitless(pool)
        return []

    def _take_over(self, stored: Stored[Block], cooldown: Cooldown) -> bool:
        """Whether an empty block that nobody needs was given up for us."""
        block = stored.thing
        rested = block.collect(cooldown)
        host = deserted(block, cooldown)
        try:
            if block.affinity is None and block.empty:
                self._records.delete_block(stored)
                return True
            if host and rested:
                self._records.write_block(stored)
        except (ConflictError, NotFoundError):
            return False
        return host is not None and claims.release(self._records, host, block.net, only_empty=True)

    def _give_up_unselected(self, request: Request, wanted: Wanted) -> None:
        """Empty blocks of the node in pools that no longer select it are for others."""
        if not wanted.owner.is_node:
            return
        pools = [pool for pool in wanted.view.pools() if not pool.disabled]
        if not any(pool.node_selector for pool in pools):
            return
        labels = request.node_labels()
        for claim in wanted.view.claims(wanted.owner.node, HOST):
            homes = [pool for pool in pools if pool.net.contains(claim.net)]
            if not homes or any(pool.selects(labels) for pool in homes):
                continue
            stored = self._records.block(claim.net)
            if stored is None or stored.thing.empty:
                claims.release(self._records, wanted.owner.node, claim.net, only_empty=True)
                wanted.view.forget_claims(wanted.owner.node)

    def _claim_and_take(self, net: Net, pool: Pool, count: int, wanted: Wanted) -> list[Assignment]:
        stored = claims.claim(self._records, wanted.owner.node, net, type_=wanted.owner.type)
        wanted.view.forget_claims(wanted.owner.node)
        if stored is None:
            return []
        wanted.owner.found += 1
        self._holdings.adopt(stored)
        return self._take(net, pool, count, wanted, only_for=wanted.owner.affinity)

    def _take(
        self, net: Net, pool: Pool, count: int, wanted: Wanted, *, only_for: str | None = None
    ) -> list[Assignment]:
        taken = self._holdings.take(
            net,
            count,
            wanted.handle,
            wanted.attributes,
            only_for=only_for,
            reserved=wanted.reserved,
        )
        if taken:
            wanted.owner.last[net.version] = net
        return [Assignment(address, net, pool.name) for address in taken]

    def _give_back(self, found: Sequence[Assignment], handle: str) -> None:
        for assignment in found:
            self._holdings.give_back_some(assignment.block, [assignment.address], handle)
        if found:
            self._holdings.recount(handle)


def _names(pools: Sequence[Pool]) -> str:
    return ", ".join(map(str, pools))
