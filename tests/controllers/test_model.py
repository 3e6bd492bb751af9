"""Collection while pods come and go on several nodes, one call of a store at a time, and deaths.

No address of a running pod is ever given back, and in the end everything that leaked is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from api.net import Net
from controllers.housekeeping import Housekeeping
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator, IpamError
from ipam.audit import audit
from ipam.reading import read
from ipam.renewal import renew
from tests.controllers.stepping import Actor, Stepped
from tests.controllers.world import (
    Clock,
    add_nodes,
    attachment,
    forget,
    record,
    release,
    remove,
)
from tests.ipam.world import add_pool, allocated, check_consistency, configure, handles
from tests.support.etcd import fast_directory

NODES = ("n1", "n2", "n3")
GRACE = 900  # the default
nodes = st.sampled_from(NODES)
calls = st.sampled_from([0, 1, 2, 3, 5, 8, 99])  # of the store, that something makes at once


@dataclass
class Container:
    """A container of a pod; ``addresses`` while it runs."""

    id: str
    node: str
    pod: str
    addresses: list[Net] = field(default_factory=list)
    busy: Actor | None = None


class Collectors(RuleBasedStateMachine):
    """``containers``: all there ever were. Two controllers work at once: neither trusts a lease.

    ``remember``: an ADD goes by what it was told when it began, as the CNI daemon's does.
    """

    remember = False

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        directory = self.stack.enter_context(fast_directory("manx-model-"))
        self.store = SqliteDatastore(directory / "datastore.db")
        add_pool(self.store, "four", "10.0.0.0/28", 30)
        add_pool(self.store, "six", "fd00::/125", 127)
        add_nodes(self.store, *NODES)
        self.clock = Clock()
        self.there = set(NODES)
        self.containers: list[Container] = []
        self.controllers = [self.controller(), self.controller()]
        self.rounds: list[Actor | None] = [None, None]

    @initialize(strict=st.booleans())
    def begin_with_pods(self, strict: bool) -> None:
        """On every node one that runs, and one of which only the addresses are left."""
        configure(self.store, strictAffinity=strict)
        for node in NODES:
            for pod in ("web", "db"):
                container = Container(f"c{len(self.containers)}", node, pod)
                self.containers.append(container)
                self.begin(container, self.adding(container, (4,)), 99)
            container.addresses = []
            forget(self.store, node, container.pod, container.id)

    def controller(self) -> tuple[Stepped, Housekeeping]:
        stepped = Stepped(self.store)
        return stepped, Housekeeping(stepped, clock=self.clock)

    # pods

    @rule(node=nodes, pod=st.sampled_from(["web", "db"]), dual=st.booleans(), calls=calls)
    def begin_add(self, node: str, pod: str, dual: bool, calls: int) -> None:
        if node in self.there:
            container = Container(f"c{len(self.containers)}", node, pod)
            self.containers.append(container)
            self.begin(container, self.adding(container, (4, 6) if dual else (4,)), calls)

    @rule(data=st.data(), calls=calls)
    @precondition(lambda self: any(not container.addresses for container in self.idle()))
    def begin_add_again(self, data: st.DataObject, calls: int) -> None:
        """As a runtime does whose first call had no answer, perhaps much later."""
        container = data.draw(st.sampled_from([c for c in self.idle() if not c.addresses]))
        self.begin(container, self.adding(container, (4,)), calls)

    @rule(data=st.data(), calls=calls)
    @precondition(lambda self: self.idle())
    def begin_del(self, data: st.DataObject, calls: int) -> None:
        container = data.draw(st.sampled_from(self.idle()))
        container.addresses = []

        def work(store: Stepped) -> None:
            forget(store, container.node, container.pod, container.id)
            release(store, container.node, container.pod, container.id)

        self.begin(container, work, calls)

    @rule(data=st.data())
    @precondition(lambda self: self.idle())
    def lose(self, data: st.DataObject) -> None:
        """A DEL that died between its two halves, and is not repeated."""
        container = data.draw(st.sampled_from(self.idle()))
        container.addresses = []
        forget(self.store, container.node, container.pod, container.id)

    def adding(self, container: Container, versions: tuple[int, ...]) -> Callable[[Stepped], None]:
        made = attachment(container.pod, container.id)
        for other in self.containers:
            # A pod has one container: those before it were stopped.
            if (other.node, other.pod) == (container.node, container.pod):
                other.addresses = []
                if other.busy is not None and not other.busy.ended:
                    other.busy.kill()

        def work(store: Stepped) -> None:
            with ExitStack() as stack:
                add(store, stack)

        def add(store: Stepped, stack: ExitStack) -> None:
            allocator = Allocator(store, container.node)
            stack.callback(allocator.stop)
            if self.remember:
                allocator.start()
            addresses = renew(store, made.handle)  # what an ADD that died has left
            attributes = made.attributes(container.node, "t")
            try:
                for version in versions:
                    if all(address.version != version for address in addresses):
                        given = allocator.assign(made.handle, attributes, version=version)
                        addresses.append(given.address)
            except IpamError:
                allocator.release(made.handle)
                return
            record(store, container.node, container.pod, container.id, addresses)
            container.addresses = addresses

        return work

    def begin(self, container: Container, work: Callable[[Stepped], None], calls: int) -> None:
        store = Stepped(self.store)
        container.busy = Actor(store, lambda: work(store))
        self.advance(container.busy, calls)

    def advance(self, actor: Actor, calls: int) -> None:
        for _ in range(calls):
            if not actor.ended:
                actor.step()

    def idle(self) -> list[Container]:
        """Containers of which no call is under way, on nodes that are there."""
        return [
            container
            for container in self.containers
            if container.node in self.there and (container.busy is None or container.busy.ended)
        ]

    # rounds, steps, deaths

    @rule(which=st.integers(0, 1))
    def begin_round(self, which: int) -> None:
        actor = self.rounds[which]
        if actor is None or actor.ended:
            stepped, housekeeping = self.controllers[which]
            self.rounds[which] = Actor(stepped, housekeeping.round)

    @rule(which=st.integers(0, 1))
    def finish_round(self, which: int) -> None:
        self.begin_round(which)
        actor = self.rounds[which]
        assert actor is not None
        actor.finish()

    @rule(data=st.data(), which=st.integers(0, 1), calls=st.integers(6, 16))
    def begin_round_with_proof(self, data: st.DataObject, which: int, calls: int) -> None:
        """A round that finds proof, if there is any, and stops somewhere after its reading."""
        self.finish_round(which)
        self.time_passes(GRACE, data)
        self.begin_round(which)
        actor = self.rounds[which]
        assert actor is not None
        self.advance(actor, calls)

    @rule(data=st.data(), calls=calls)
    @precondition(lambda self: self.running())
    def step(self, data: st.DataObject, calls: int) -> None:
        self.advance(data.draw(st.sampled_from(self.running())), calls)

    @rule(data=st.data())
    @precondition(lambda self: self.running())
    def die(self, data: st.DataObject) -> None:
        self.kill(data.draw(st.sampled_from(self.running())))

    def running(self) -> list[Actor]:
        actors = [*(container.busy for container in self.containers), *self.rounds]
        return [actor for actor in actors if actor is not None and not actor.ended]

    def kill(self, actor: Actor) -> None:
        actor.kill()
        if actor in self.rounds:
            which = self.rounds.index(actor)
            self.controllers[which] = self.controller()

    @rule(seconds=st.sampled_from([61, GRACE]), data=st.data())
    def wait(self, seconds: int, data: st.DataObject) -> None:
        self.time_passes(seconds, data)

    def time_passes(self, seconds: int, data: st.DataObject) -> None:
        """Rounds may take for ever. A call of a runtime does not: it ends, or is given up."""
        for actor in self.running():
            if actor not in self.rounds:
                if data.draw(st.booleans(), "ends"):
                    actor.finish()
                else:
                    self.kill(actor)
        self.clock.now += seconds

    # nodes

    @rule(node=nodes)
    def node_dies(self, node: str) -> None:
        """With all that ran on it."""
        if len(self.there) > 1 and node in self.there:
            self.there.discard(node)
            remove(self.store, "Node", node)
            for container in self.containers:
                if container.node == node:
                    container.addresses = []
                    if container.busy is not None and not container.busy.ended:
                        container.busy.kill()

    @rule(node=nodes)
    def node_comes_back(self, node: str) -> None:
        if node not in self.there:
            self.there.add(node)
            add_nodes(self.store, node)

    # what must hold

    @invariant()
    def the_store_is_consistent(self) -> None:
        check_consistency(self.store)

    @invariant()
    def running_pods_have_their_addresses(self) -> None:
        given = allocated(self.store)
        for container in self.containers:
            handle = attachment(container.pod, container.id).handle
            for address in container.addresses:
                assert given.get(address) == handle, (container, address)

    def teardown(self) -> None:
        for actor in self.running():
            self.kill(actor)
        self.running_pods_have_their_addresses()
        # What a runtime that was not answered asks for in the end; or the node's own repair.
        running = {container.id for container in self.containers if container.addresses}
        for entry in self.store.list("WorkloadEndpoint").entries:
            spec = entry.value["spec"]
            if spec["node"] in self.there and spec["containerID"] not in running:
                self.store.delete(entry.key)
        self.controllers = [self.controller(), self.controller()]
        for _ in range(5):
            self.clock.now += GRACE
            for _, housekeeping in self.controllers:
                housekeeping.round()
        self.all_is_well()
        self.store.close()
        self.stack.close()

    def all_is_well(self) -> None:
        live = {address for container in self.containers for address in container.addresses}
        assert set(allocated(self.store)) == live
        assert set(handles(self.store)) == set(allocated(self.store).values())
        assert [finding for finding in audit(read(self.store)) if finding.problem] == []
        assert {key.name for key in self.keys("BlockAffinity")} == {
            f"{stored['spec']['affinity'].removeprefix('host:')}-{key.name}"
            for key, stored in self.objects("IPAMBlock")
            if stored["spec"].get("affinity")
        }

    def keys(self, kind: str) -> list[Key]:
        return [entry.key for entry in self.store.list(kind).entries]

    def objects(self, kind: str) -> list[tuple[Key, dict[str, dict[str, str]]]]:
        return [(entry.key, entry.value) for entry in self.store.list(kind).entries]


@pytest.mark.parametrize("remember", [False, True])
def test_collection_against_the_model(remember: bool) -> None:
    run_state_machine_as_test(
        type("Machine", (Collectors,), {"remember": remember}),
        settings=settings(max_examples=30, stateful_step_count=40, deadline=None),
    )


@pytest.mark.parametrize("calls", range(1, 14))
def test_every_switch_between_a_round_and_an_add(calls: int) -> None:
    """A round that has its proof stops at each of its calls, and a late ADD at each of its own."""
    for more in range(99):
        machine = Collectors()
        machine.begin_with_pods(strict=False)
        lost = next(container for container in machine.containers if not container.addresses)
        machine.finish_round(0)
        machine.clock.now += GRACE
        machine.begin_round(0)
        collector = machine.rounds[0]
        assert collector is not None
        machine.advance(collector, calls)
        machine.begin(lost, machine.adding(lost, (4,)), more)
        collector.finish()
        machine.running_pods_have_their_addresses()
        assert lost.busy is not None
        all_calls_before = lost.busy.ended
        lost.busy.finish()
        machine.running_pods_have_their_addresses()
        machine.teardown()
        if all_calls_before:
            return
