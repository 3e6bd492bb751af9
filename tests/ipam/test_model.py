"""IPAM against a simple model: many nodes, deaths at every write, others at work at every call.

No address is given twice, and none is lost once everything half-done was done again. So it is
whether the programs remember nothing, all that there is, or what there was some time ago.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from api.net import Net, parse_net
from datastore.interface import Datastore, Key, NotFoundError
from datastore.sqlite import SqliteDatastore
from ipam import claims
from ipam.allocator import Allocator, Assignment, IpamError
from ipam.orphans import delete_orphans
from ipam.records import CONFIRMED, Records, owner
from tests.ipam.world import (
    Died,
    Grouping,
    Interposed,
    Remembering,
    add_pool,
    affinities,
    allocated,
    blocks,
    check_consistency,
    handles,
    reserve,
)

NODES = ("n1", "n2", "n3")
POOLS = {4: ("four", "10.0.0.0/28"), 6: ("six", "fd00::/125")}
CAPACITY = {4: 16, 6: 8}
LONG_AGO = "2026-01-01T00:00:00Z"

nodes = st.sampled_from(NODES)
holders = st.sampled_from([f"h{number}" for number in range(6)])
versions = st.sampled_from([4, 4, 6])
counts = st.sampled_from([1, 1, 1, 2, 3])
places = st.integers(0, 15)  # in the IPv4 pool
bools = st.booleans()
cooldowns = st.sampled_from([0, 600])
writes = st.integers(0, 5)
news = st.sampled_from([0, 1, 2, None])
# Before which write, or which call of any kind: an assign makes five, or thirty.
moments = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 3)), st.tuples(st.just("call"), st.integers(0, 30))
)

Action = Callable[[Allocator, Datastore], None]


class Memory(StrEnum):
    """What programs know without asking."""

    NOTHING = "nothing"
    FRESH = "fresh"  # all there is
    LATE = "late"  # all there was, up to what they heard last
    LATE_IN_ONE = "late-in-one"  # so, and handle and block are one write


class Node:
    """A node with two programs, the CNI daemon and the agent."""

    def __init__(self, store: SqliteDatastore, name: str, memory: Memory) -> None:
        self.name = name
        self.store = store
        self.memory = memory
        self.hooks = Hooks()
        self.seen: Interposed = Interposed(store)
        self.daemon = Allocator(self.seen, name)
        self.restart()
        self.agent_seen = self.client()
        self.agent = Allocator(self.agent_seen, name)
        self.begin(self.agent)

    def restart(self) -> None:
        """The daemon begins anew, and knows nothing."""
        self.daemon.stop()
        self.seen = self.client(
            before=lambda number: self.hooks.before(),
            after=lambda number: self.hooks.after(),
            call=lambda number: self.hooks.call(),
        )
        self.daemon = Allocator(self.seen, self.name)
        self.begin(self.daemon)
        in_one = self.memory in (Memory.FRESH, Memory.LATE_IN_ONE)
        assert Records(self.seen).can_begin == in_one  # or something else would be tried

    def client(self, **hooks: Callable[[int], object]) -> Interposed:
        if self.memory is Memory.NOTHING:
            return Interposed(self.store, **hooks)
        if self.memory is Memory.FRESH:
            return Grouping(self.store, late=False, **hooks)
        if self.memory is Memory.LATE_IN_ONE:
            return Grouping(self.store, late=True, **hooks)
        return Remembering(self.store, late=True, **hooks)

    def begin(self, allocator: Allocator) -> None:
        if self.memory is not Memory.NOTHING:
            allocator.start()

    def hear(self, daemon: int | None = None, agent: int | None = None) -> None:
        """Of so many changes each; None: of all."""
        for client, count in ((self.seen, daemon), (self.agent_seen, agent)):
            if isinstance(client, Remembering):
                client.hear(count)

    def stop(self) -> None:
        self.daemon.stop()
        self.agent.stop()


class Hooks:
    """What happens during one operation: others at some moments, death at a write."""

    def __init__(self) -> None:
        self.others: dict[tuple[str, int], Callable[[], None]] = {}
        self.dies_at: int | None = None
        self._calls = self._writes = 0

    def call(self) -> None:
        self._calls += 1
        if action := self.others.pop(("call", self._calls - 1), None):
            action()

    def before(self) -> None:
        if action := self.others.pop(("write", self._writes), None):
            action()
        self.live()

    def live(self) -> None:
        if self.dies_at is not None and self._writes >= self.dies_at:
            raise Died

    def after(self) -> None:
        self._writes += 1
        self.live()


class IpamMachine(RuleBasedStateMachine):
    """``held``: what each handle surely has. ``doubtful``: handles whose user died.

    ``resting``: what must not be given again yet.
    """

    memory = Memory.NOTHING

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.store = SqliteDatastore(Path(self.directory.name) / "datastore.db")
        add_pool(self.store, *POOLS[4], 30)
        add_pool(self.store, *POOLS[6], 127)
        self.nodes = {name: Node(self.store, name, self.memory) for name in NODES}
        self.held: dict[str, set[Net]] = {}
        self.doubtful: set[str] = set()
        self.resting: set[Net] = set()
        self.reserved: set[Net] = set()
        self.settings: dict[str, Any] = {}
        self.in_use: set[Net] = set()  # before the operation
        self.assigning: list[str] = []  # handles for which an assign is under way
        self.overtaken: list[str] = []  # those of them that were released meanwhile
        self.together: set[str] = set()  # those for which one assign is made, in an operation

    # what a program does

    def note_given(self, handle: str, found: list[Assignment]) -> None:
        for assignment in found:
            address = assignment.address
            assert all(address not in addresses for addresses in self.held.values())
            assert address not in self.resting
            assert assignment.block.contains(address)
            self.held.setdefault(handle, set()).add(address)

    def do_assign(self, allocator: Allocator, handle: str, version: int, count: int) -> None:
        attributes = {"node": allocator.node}
        self.assigning.append(handle)
        released = len(self.overtaken)
        try:
            found = allocator.assign_many(count, handle, attributes, version=version)
        except IpamError:
            return
        finally:
            self.assigning.remove(handle)
        assert len(found) == count
        self.note_assigned(handle, found, released)

    def do_assign_each(self, allocator: Allocator, wanted: set[str], version: int) -> None:
        """For several handles at once; those that are not new by then get nothing."""
        self.together |= wanted
        self.assigning += wanted
        released = len(self.overtaken)
        try:
            attributes = {"node": allocator.node}
            found = allocator.assign_each(dict.fromkeys(wanted, attributes), version=version)
        finally:
            for handle in wanted:
                self.assigning.remove(handle)
        assert found.keys() <= wanted
        for handle, assignment in found.items():
            self.note_assigned(handle, [assignment], released)

    def note_assigned(self, handle: str, found: list[Assignment], released: int) -> None:
        """``released``: the number of those that were overtaken, before."""
        assert not self.reserved & {assignment.address for assignment in found}
        if handle in self.overtaken[released:]:
            # Whoever released the handle meanwhile has released what was taken by then; and of that
            # some may have been taken for the same handle again, by this assign or another one.
            has, others = allocated(self.store), self.held.get(handle, set())
            still = {each.address: each for each in found if has.get(each.address) == handle}
            found = [each for address, each in still.items() if address not in others]
        self.note_given(handle, found)

    def do_assign_specific(self, allocator: Allocator, handle: str, place: int) -> None:
        address = Net(4, parse_net(POOLS[4][1]).address + place, 32)
        try:
            found = allocator.assign_specific(address, handle, {"node": allocator.node})
        except IpamError:
            return
        assert found.address == address
        self.note_given(handle, [found])

    def note_released(self, released: set[Net]) -> None:
        if self.settings.get("ipCooldownSeconds"):
            self.resting |= released

    def do_release(self, allocator: Allocator, handle: str) -> None:
        released = set(allocator.release(handle))
        if handle in self.assigning:
            self.overtaken.append(handle)
        # Half of what an assign wants may be taken, before it finds that there is no more.
        if handle not in self.doubtful and handle not in self.assigning:
            assert released <= self.held.get(handle, set())
        self.held[handle] = self.held.get(handle, set()) - released
        self.note_released(released)

    def do_release_some(self, allocator: Allocator, handle: str) -> None:
        wanted = sorted(self.held.get(handle, set()))[:2]
        try:
            released = set(allocator.release_addresses(wanted, handle=handle))
        except IpamError:
            return
        assert released <= set(wanted)
        self.held[handle] = self.held.get(handle, set()) - released
        self.note_released(released)

    def do_give_up_blocks(self, store: Datastore, node: str, *, only_empty: bool) -> None:
        """As garbage collection does with the blocks of a node."""
        records = Records(store)
        for stored in records.affinities(node):
            claims.release(records, node, stored.thing.net, only_empty=only_empty)

    def do_sweep(self, store: Datastore, node: str) -> None:
        """As the CNI daemon of a node does when it starts."""
        delete_orphans(store, node)

    def do_remake_pool(self, version: int, longer: int) -> None:
        """The pool as it was, but for the size of blocks."""
        name, cidr = POOLS[version]
        self.store.delete(Key("IPPool", name))
        add_pool(self.store, name, cidr, {4: 29, 6: 126}[version] + longer)

    # rules

    def draw_action(self, data: st.DataObject, handle: str) -> Action:
        version, count = data.draw(versions), data.draw(counts)
        place, empty = data.draw(places), data.draw(st.booleans())
        together = {handle, *data.draw(st.sets(holders, max_size=3))}
        actions: dict[str, Action] = {
            "assign": lambda by, store: self.do_assign(by, handle, version, count),
            "assign one": lambda by, store: self.do_assign(by, handle, version, 1),
            "assign each": lambda by, store: self.do_assign_each(by, together, version),
            "specific": lambda by, store: self.do_assign_specific(by, handle, place),
            "release": lambda by, store: self.do_release(by, handle),
            "release all": lambda by, store: self.do_release(by, handle),
            "release some": lambda by, store: self.do_release_some(by, handle),
            "blocks": lambda by, store: self.do_give_up_blocks(store, by.node, only_empty=empty),
            "sweep": lambda by, store: self.do_sweep(store, by.node),
        }
        return actions[data.draw(st.sampled_from(list(actions)), "action")]

    @rule(name=nodes, handle=holders, data=st.data())
    def act(self, name: str, handle: str, data: st.DataObject) -> None:
        """One program does something, in whose midst others do things, and dies, or not."""
        node = self.nodes[name]
        action = self.draw_action(data, handle)
        with self.disturbed(data, node, handle):
            action(node.daemon, node.seen)

    @rule(name=nodes, handle=holders, version=versions, count=counts, data=st.data())
    def assign(self, name: str, handle: str, version: int, count: int, data: st.DataObject) -> None:
        """The same of what is done most."""
        node = self.nodes[name]
        with self.disturbed(data, node, handle):
            self.do_assign(node.daemon, handle, version, count)

    @rule(name=nodes, wanted=st.sets(holders, min_size=1), version=versions, data=st.data())
    def assign_each(self, name: str, wanted: set[str], version: int, data: st.DataObject) -> None:
        """The same for several at once."""
        node = self.nodes[name]
        with self.disturbed(data, node, min(wanted)):
            self.do_assign_each(node.daemon, wanted, version)

    @rule(name=nodes, handle=holders, version=versions)
    def assign_undisturbed(self, name: str, handle: str, version: int) -> None:
        node = self.nodes[name]
        owned = self.owned(name, version)
        self.do_assign(node.daemon, handle, version, 1)
        limit = self.settings.get("maxBlocksPerHost") or 20
        # who has not heard yet that the other program has claimed some may claim one too many
        late = self.memory in (Memory.LATE, Memory.LATE_IN_ONE)
        assert self.owned(name, version) <= max(owned, limit) + late
        if self.settings.get("strictAffinity") and handle not in self.doubtful:
            by_net = blocks(self.store)
            for address in set(node.daemon.addresses(handle)) - self.in_use:
                [block] = [block for net, block in by_net.items() if net.contains(address)]
                assert block.affinity == owner(name)

    @rule(name=nodes, handle=holders)
    def release_undisturbed(self, name: str, handle: str) -> None:
        self.do_release(self.nodes[name].daemon, handle)
        self.doubtful.discard(handle)
        assert not self.held.pop(handle, None)

    @initialize(strict=bools, cooldown=cooldowns)
    def begin(self, strict: bool, cooldown: int) -> None:
        self.configure(strict, cooldown)

    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        """Something about the cluster."""
        changes = {
            "configuration": lambda: self.configure(data.draw(bools), data.draw(cooldowns)),
            "pool": lambda: self.do_remake_pool(data.draw(versions), data.draw(bools)),
            "reservation": lambda: self.reserve_or_not(data.draw(places)),
            "time": self.time_passes,
        }
        changes[data.draw(st.sampled_from(list(changes)))]()

    @rule(name=nodes, daemon=news, agent=news)
    def hear(self, name: str, daemon: int | None, agent: int | None) -> None:
        """Of what has changed, the daemon and the agent each of as much as it is told."""
        self.nodes[name].hear(daemon, agent)

    def all_hear(self) -> None:
        """Whoever gives addresses by yesterday's settings is no fault of theirs."""
        for node in self.nodes.values():
            node.hear()

    def configure(self, strict: bool, cooldown: int) -> None:
        self.set_up(strictAffinity=strict, ipCooldownSeconds=cooldown, maxBlocksPerHost=3 * strict)
        if not cooldown:
            self.resting.clear()
        self.all_hear()

    def reserve_or_not(self, place: int) -> None:
        address = Net(4, parse_net(POOLS[4][1]).address + place, 32)
        name = f"r-{str(address).replace('/', '-')}"
        if address in self.reserved:
            self.store.delete(Key("IPReservation", name))
        else:
            reserve(self.store, str(address))
        self.reserved ^= {address}
        self.all_hear()

    def time_passes(self) -> None:
        """Addresses have rested, empty blocks are old enough to be taken over."""
        self.resting.clear()
        for entry in self.store.list("IPAMBlock").entries:
            spec = entry.value["spec"]
            if "affinityClaimTime" in spec:
                spec["affinityClaimTime"] = LONG_AGO
            for attribute in spec["attributes"]:
                if "releasedAt" in attribute:
                    attribute["releasedAt"] = LONG_AGO
            self.store.update(entry.key, entry.value)

    @contextmanager
    def disturbed(self, data: st.DataObject, node: Node, handle: str) -> Iterator[None]:
        node.hooks = Hooks()
        for _ in range(data.draw(st.integers(0, 3), "others")):
            node.hooks.others[data.draw(moments)] = self.another(data, node, handle)
        if data.draw(st.booleans(), "dies"):
            node.hooks.dies_at = data.draw(writes)
        try:
            yield
        except Died:
            node.restart()
            for lost in {handle, *self.together}:
                self.doubtful.add(lost)
                self.held.pop(lost, None)
        finally:
            self.together = set()
            node.hooks = Hooks()

    def another(self, data: st.DataObject, node: Node, handle: str) -> Callable[[], None]:
        """What another program does; every other time on the same node or for the same handle."""
        handle = data.draw(st.one_of(st.just(handle), holders))
        if data.draw(st.integers(0, 5)) == 0:
            version, longer = data.draw(versions), data.draw(st.integers(0, 1))
            return lambda: self.do_remake_pool(version, longer)
        other = self.nodes[data.draw(st.one_of(st.just(node.name), nodes))]
        action = self.draw_action(data, handle)
        return lambda: action(other.agent, self.store)

    # what must hold

    @invariant()
    def the_store_is_consistent(self) -> None:
        check_consistency(self.store)

    @invariant()
    def everybody_has_what_was_given(self) -> None:
        in_use = allocated(self.store)
        counted = handles(self.store)
        allocator = Allocator(self.store, "anyone")
        for handle in {*self.held, *in_use.values(), *counted}:
            has = {address for address, holder in in_use.items() if holder == handle}
            assert set(allocator.addresses(handle)) == has
            if handle not in self.doubtful:
                assert has == self.held.get(handle, set())
                by_net = counted[handle].counts if handle in counted else {}
                assert sum(by_net.values()) == len(has)
        self.in_use = set(in_use)

    def owned(self, node: str, version: int) -> int:
        claims_ = affinities(self.store)
        return sum(
            claim.node == node and claim.net.version == version and claim.state == CONFIRMED
            for claim in claims_
        )

    def set_up(self, **spec: Any) -> None:
        key = Key("IPAMConfiguration", "default")
        value = {
            "apiVersion": "projectcalico.org/v3",
            "kind": "IPAMConfiguration",
            "metadata": {"name": "default"},
            "spec": spec,
        }
        try:
            self.store.update(key, value)
        except NotFoundError:
            self.store.create(key, value)
        self.settings = spec

    def teardown(self) -> None:
        """Release everything once more: then all is free, and can be given again."""
        self.set_up()
        for address in list(self.reserved):
            self.reserve_or_not(address.address & 15)
        allocator = Allocator(self.store, "n1")
        for handle in handles(self.store):
            allocator.release(handle)
        assert allocated(self.store) == {}
        assert handles(self.store) == {}
        check_consistency(self.store)
        self.time_passes()
        records = Records(self.store)
        for net in blocks(self.store):
            allocator.collect(net)
        for node in NODES:
            self.do_give_up_blocks(self.store, node, only_empty=False)
        for net, block in blocks(self.store).items():
            if block.affinity is not None:
                # Made by one who was overtaken by a release of the claim, and then died.
                claims.release(records, block.affinity.removeprefix("host:"), net)
        assert blocks(self.store) == {}
        for version, capacity in CAPACITY.items():
            given = {allocator.assign("all", {}, version=version).address for _ in range(capacity)}
            assert len(given) == capacity
        for each in self.nodes.values():
            each.stop()
        self.store.close()
        self.directory.cleanup()


@pytest.mark.parametrize("memory", list(Memory))
def test_ipam_against_the_model(memory: Memory) -> None:
    run_state_machine_as_test(
        type("Machine", (IpamMachine,), {"memory": memory}),
        settings=settings(max_examples=50, stateful_step_count=25, deadline=None),
    )
