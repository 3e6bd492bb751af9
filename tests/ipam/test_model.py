"""IPAM against a simple model: many nodes, deaths between any two writes, overtaking writers.

No address is given twice, and none is lost once everything half-done was done again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from api.net import Net
from datastore.interface import Datastore
from datastore.sqlite import SqliteDatastore
from ipam import claims
from ipam.allocator import Allocator, IpamError
from ipam.orphans import delete_orphans
from ipam.records import Records
from tests.ipam.world import (
    Died,
    add_pool,
    allocated,
    blocks,
    check_consistency,
    configure,
    dies_after,
    handles,
    overtaken_at,
)

NODES = ("n1", "n2", "n3")
CAPACITY = {4: 16, 6: 8}

nodes = st.sampled_from(NODES)
holders = st.sampled_from([f"h{number}" for number in range(6)])
versions = st.sampled_from([4, 4, 6])
moments = st.integers(0, 4)  # how many writes before it happens


class IpamMachine(RuleBasedStateMachine):
    """``held``: what each handle surely has. ``doubtful``: handles whose user died."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.store = SqliteDatastore(Path(self.directory.name) / "datastore.db")
        add_pool(self.store, "four", "10.0.0.0/28", 30)
        add_pool(self.store, "six", "fd00::/125", 127)
        self.held: dict[str, set[Net]] = {}
        self.doubtful: set[str] = set()

    @initialize(strict=st.booleans())
    def choose(self, strict: bool) -> None:
        configure(self.store, strictAffinity=strict)

    # what a node does; ``store`` is how it sees the store

    def do_assign(self, store: Datastore, node: str, handle: str, version: int) -> None:
        try:
            found = Allocator(store, node).assign(handle, {"node": node}, version=version)
        except IpamError:
            return
        assert all(found.address not in addresses for addresses in self.held.values())
        self.held.setdefault(handle, set()).add(found.address)

    def do_release(self, store: Datastore, node: str, handle: str) -> None:
        released = set(Allocator(store, node).release(handle))
        if handle not in self.doubtful:
            assert released <= self.held.get(handle, set())
        self.held[handle] = self.held.get(handle, set()) - released

    def do_give_up_blocks(self, store: Datastore, node: str) -> None:
        """As garbage collection does with the blocks of a node."""
        records = Records(store)
        for stored in records.affinities(node):
            claims.release(records, node, stored.thing.net)

    def do_sweep(self, store: Datastore, node: str) -> None:
        """As the CNI daemon of a node does when it starts."""
        delete_orphans(store, node)

    @rule(node=nodes, handle=holders, version=versions, data=st.data())
    def assign(self, node: str, handle: str, version: int, data: st.DataObject) -> None:
        with self.disturbed(data, node, handle) as store:
            self.do_assign(store, node, handle, version)

    @rule(node=nodes, handle=holders, data=st.data())
    def release(self, node: str, handle: str, data: st.DataObject) -> None:
        with self.disturbed(data, node, handle) as store:
            self.do_release(store, node, handle)

    @rule(node=nodes, data=st.data())
    def give_up_blocks(self, node: str, data: st.DataObject) -> None:
        with self.disturbed(data, node, "") as store:
            self.do_give_up_blocks(store, node)

    @rule(node=nodes, data=st.data())
    def sweep(self, node: str, data: st.DataObject) -> None:
        with self.disturbed(data, node, "") as store:
            self.do_sweep(store, node)

    @rule(node=nodes, handle=holders)
    def release_undisturbed(self, node: str, handle: str) -> None:
        self.do_release(self.store, node, handle)
        self.doubtful.discard(handle)
        assert not self.held.pop(handle, None)

    @contextmanager
    def disturbed(self, data: st.DataObject, node: str, handle: str) -> Iterator[Datastore]:
        """The store, whose user is overtaken by another between two writes, or dies, or both."""
        store: Datastore = self.store
        if data.draw(st.booleans(), "overtaken"):
            store = overtaken_at(store, data.draw(moments), self.another(data, node, handle))
        if data.draw(st.booleans(), "dies"):
            store = dies_after(store, data.draw(moments))
        try:
            yield store
        except Died:
            if handle:
                self.doubtful.add(handle)
                self.held.pop(handle, None)

    def another(self, data: st.DataObject, node: str, handle: str) -> Callable[[], None]:
        """What another program does meanwhile; every other time for the same node and handle."""
        if not handle or data.draw(st.booleans()):
            handle = data.draw(holders)
        if data.draw(st.booleans()):
            node = data.draw(nodes)
        version = data.draw(versions)
        return data.draw(
            st.sampled_from(
                [
                    lambda: self.do_assign(self.store, node, handle, version),
                    lambda: self.do_release(self.store, node, handle),
                    lambda: self.do_give_up_blocks(self.store, node),
                    lambda: self.do_sweep(self.store, node),
                ]
            )
        )

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
                counts = counted[handle].counts if handle in counted else {}
                assert sum(counts.values()) == len(has)

    def teardown(self) -> None:
        """Release everything once more: then all is free, and can be given again."""
        allocator = Allocator(self.store, "n1")
        for handle in handles(self.store):
            allocator.release(handle)
        assert allocated(self.store) == {}
        assert handles(self.store) == {}
        check_consistency(self.store)
        for node in NODES:
            self.do_give_up_blocks(self.store, node)
        for net, block in blocks(self.store).items():
            # Made by one who was overtaken by a release of the claim, and then died.
            assert block.affinity is not None
            claims.release(Records(self.store), block.affinity.removeprefix("host:"), net)
        assert blocks(self.store) == {}
        for version, capacity in CAPACITY.items():
            given = {allocator.assign("all", {}, version=version).address for _ in range(capacity)}
            assert len(given) == capacity
        self.store.close()
        self.directory.cleanup()


def test_ipam_against_the_model() -> None:
    run_state_machine_as_test(
        IpamMachine, settings=settings(max_examples=50, stateful_step_count=25, deadline=None)
    )
