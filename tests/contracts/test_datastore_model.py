"""A store behaves as a dict would, and its watch tells the dict's history."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from datastore.interface import (
    AlreadyExistsError,
    ConflictError,
    Entry,
    Event,
    Key,
    NotFoundError,
    StoreError,
)
from tests.contracts.backends import Backend, order, peer, peer_key, policy, policy_key

KINDS = ("GlobalNetworkPolicy", "BGPPeer")
keys = st.sampled_from([policy_key("a"), policy_key("b"), peer_key("a")])
numbers = st.integers(1, 1000)


def value(key: Key, number: int) -> dict[str, object]:
    return policy(key.name, number) if key.kind == KINDS[0] else peer(key.name, number)


class StoreMachine(RuleBasedStateMachine):
    """Two clients of one store against a dict."""

    fresh: Callable[[Path], Backend]

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        backend = type(self).fresh(Path(self.directory.name))
        self.clients = [backend.connect(), backend.connect()]
        self.model: dict[Key, Entry] = {}
        self.stale: dict[Key, str] = {}  # a revision each object no longer has
        self.history: list[tuple[Key, Entry | None]] = []
        self.start = {kind: self.clients[0].list(kind).revision for kind in KINDS}
        self.seen: dict[Key, Entry] = {}
        self.watch = self.clients[1].watch(KINDS, self.start)

    def expect(
        self, expected: type[StoreError] | None, action: Callable[[], Entry]
    ) -> Entry | None:
        """``action`` fails exactly as the model says."""
        try:
            result = action()
        except StoreError as error:
            assert type(error) is expected
            return None
        assert expected is None
        return result

    def changed(self, key: Key, entry: Entry | None) -> None:
        if key in self.model:
            self.stale[key] = self.model[key].revision
        self.model.pop(key, None)
        if entry is not None:
            self.model[key] = entry
        self.history.append((key, entry))

    @rule(client=st.integers(0, 1), key=keys, number=numbers)
    def create(self, client: int, key: Key, number: int) -> None:
        expected = AlreadyExistsError if key in self.model else None
        entry = self.expect(expected, lambda: self.clients[client].create(key, value(key, number)))
        if entry is not None:
            self.changed(key, entry)

    @rule(client=st.integers(0, 1), key=keys, number=numbers)
    def update(self, client: int, key: Key, number: int) -> None:
        expected = None if key in self.model else NotFoundError
        entry = self.expect(expected, lambda: self.clients[client].update(key, value(key, number)))
        if entry is not None:
            self.changed(key, entry)

    @rule(client=st.integers(0, 1), key=keys, number=numbers, fresh=st.booleans())
    def swap(self, client: int, key: Key, number: int, fresh: bool) -> None:
        revision = self.model[key].revision if fresh and key in self.model else self.stale.get(key)
        if revision is None:
            return
        expected = self.outcome(key, revision)
        entry = self.expect(
            expected, lambda: self.clients[client].update(key, value(key, number), revision)
        )
        if entry is not None:
            self.changed(key, entry)

    @rule(client=st.integers(0, 1), key=keys, choice=st.sampled_from(["any", "fresh", "stale"]))
    def delete(self, client: int, key: Key, choice: str) -> None:
        revision = self.stale.get(key) if choice == "stale" else None
        if choice == "fresh" and key in self.model:
            revision = self.model[key].revision
        expected = self.outcome(key, revision)
        entry = self.expect(expected, lambda: self.clients[client].delete(key, revision))
        if entry is not None:
            assert entry == self.model[key]
            self.changed(key, None)

    def outcome(self, key: Key, revision: str | None) -> type[StoreError] | None:
        if key not in self.model:
            return NotFoundError
        if revision is not None and revision != self.model[key].revision:
            return ConflictError
        return None

    @precondition(lambda self: self.history)
    @rule()
    def watch_catches_up(self) -> None:
        self.follow()
        assert self.seen == self.model

    def follow(self) -> None:
        """Read until what was written last has come."""
        events: list[Event] = []
        while len(events) < len(self.history):
            more = self.watch.next(timeout=30)
            assert more, f"no more than {events} for {self.history}"
            events.extend(more)
        for kind in KINDS:
            assert [(e.key, e.entry) for e in events if e.key.kind == kind] == [
                (key, entry) for key, entry in self.history if key.kind == kind
            ]
        for event in events:
            self.seen.pop(event.key, None)
            if event.entry is not None:
                self.seen[event.key] = event.entry
        self.history.clear()

    @invariant()
    def reads_agree(self) -> None:
        for client in self.clients:
            for kind in KINDS:
                wanted = sorted(k for k in self.model if k.kind == kind)
                assert client.list(kind).entries == [self.model[key] for key in wanted]
        for key, entry in self.model.items():
            assert self.clients[0].get(key) == entry
            if key.kind == KINDS[0]:
                assert order(entry.value) >= 1

    def teardown(self) -> None:
        self.follow()
        self.watch.close()
        for client in self.clients:
            client.close()
        self.directory.cleanup()


def test_store_against_a_dict(fresh: Callable[[Path], Backend]) -> None:
    machine = type("Machine", (StoreMachine,), {"fresh": staticmethod(fresh)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=25, stateful_step_count=25, deadline=None)
    )
