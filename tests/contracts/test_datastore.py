"""What datastore.interface promises, held against every store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import pytest

from api.errors import InvalidObjectError
from api.registry import parse_as
from datastore.interface import (
    AlreadyExistsError,
    ConflictError,
    Datastore,
    Entry,
    Event,
    GroupingDatastore,
    NotFoundError,
    RevisionGoneError,
    StoreError,
    UnavailableError,
    Watch,
    create_all,
    get_all,
)
from datastore.kubernetes import KubernetesDatastore
from tests.contracts.backends import (
    Backend,
    count_up,
    create_others_too,
    join,
    namespaced,
    namespaced_key,
    nothing,
    order,
    peer,
    peer_key,
    policy,
    policy_key,
    start,
    write_series,
)

KINDS = ("GlobalNetworkPolicy", "NetworkPolicy", "BGPPeer")


def collect(watch: Watch, enough: Callable[[list[Event]], bool]) -> list[Event]:
    """Events until there are enough; fails after 60 s."""
    events: list[Event] = []
    deadline = time.monotonic() + 60
    while not enough(events):
        assert time.monotonic() < deadline, f"not enough events: {events}"
        events.extend(watch.next(timeout=1))
    return events


def exactly(watch: Watch, count: int) -> list[Event]:
    """That many events, and no more at the moment."""
    events = collect(watch, lambda events: len(events) >= count)
    events.extend(watch.next(timeout=0))
    assert len(events) == count
    return events


def brief(events: Iterable[Event]) -> list[tuple[str, int | None]]:
    return [
        (event.key.name, None if event.entry is None else order(event.entry.value))
        for event in events
    ]


# --- objects ---


def test_created_object_is_read_back(store: Datastore) -> None:
    created = store.create(policy_key("a"), policy("a", 7))
    read = store.get(policy_key("a"))
    assert read == created
    assert read.key == policy_key("a")
    assert read.value["spec"]["order"] == 7
    assert read.value["metadata"]["name"] == "a"
    assert isinstance(read.revision, str)
    assert read.revision


def test_create_of_an_object_that_exists_is_refused(store: Datastore) -> None:
    first = store.create(policy_key("a"), policy("a", 1))
    with pytest.raises(AlreadyExistsError) as caught:
        store.create(policy_key("a"), policy("a", 2))
    assert caught.value.key == policy_key("a")
    assert store.get(policy_key("a")) == first


def test_many_are_read_and_what_is_not_there_hinders_no_other(store: Datastore) -> None:
    first, last = [store.create(policy_key(name), policy(name, 1)) for name in "ac"]
    other = store.create(peer_key("a"), peer("a"))
    keys = [policy_key("c"), policy_key("b"), peer_key("a"), policy_key("a"), policy_key("c")]
    found, missing, *rest = get_all(store, keys)
    assert [found, *rest] == [last, other, first, last]
    assert isinstance(missing, NotFoundError)
    assert missing.key == policy_key("b")
    assert get_all(store, []) == []


def test_many_are_created_and_what_is_there_hinders_no_other(store: Datastore) -> None:
    there = store.create(policy_key("b"), policy("b", 1))
    objects = [(policy_key(name), policy(name, 2)) for name in "abc"]
    with store.watch(["GlobalNetworkPolicy"], store.list("GlobalNetworkPolicy").revision) as watch:
        first, refused, last = create_all(store, objects)
        events = exactly(watch, 2)
    assert isinstance(refused, AlreadyExistsError)
    assert refused.key == policy_key("b")
    assert [event.entry for event in events] == [first, last]
    assert [store.get(policy_key(name)) for name in "abc"] == [first, there, last]
    assert [type(each) for each in create_all(store, objects)] == [AlreadyExistsError] * 3
    assert create_all(store, []) == []


def test_more_are_created_and_read_than_a_transaction_may_have(store: Datastore) -> None:
    names = [f"p{number:03}" for number in range(260)]
    there = store.create(policy_key(names[150]), policy(names[150], 1))
    objects = [(policy_key(name), policy(name, 2)) for name in [*names, names[3], names[259]]]
    outcomes = create_all(store, objects)
    refused = [n for n, each in enumerate(outcomes) if isinstance(each, AlreadyExistsError)]
    assert refused == [150, 260, 261]
    outcomes = [*outcomes[:150], there, *outcomes[151:260]]
    assert get_all(store, [policy_key(name) for name in names]) == outcomes
    assert store.list("GlobalNetworkPolicy").entries == outcomes


def test_one_is_replaced_and_others_created_or_nothing_is_done(store: Datastore) -> None:
    if isinstance(store, KubernetesDatastore):
        assert not isinstance(store, GroupingDatastore)  # it can't be
        return
    assert isinstance(store, GroupingDatastore)
    there = store.create(policy_key("a"), policy("a", 1))
    others = [(policy_key(name), policy(name, 2)) for name in "bc"]
    with store.watch(["GlobalNetworkPolicy"], store.list("GlobalNetworkPolicy").revision) as watch:
        with pytest.raises(ConflictError):
            store.update_with(policy_key("a"), policy("a", 3), "0", others)
        with pytest.raises(NotFoundError):
            store.update_with(policy_key("d"), policy("d", 3), there.revision, others)
        entry, entries = store.update_with(
            policy_key("a"), policy("a", 3), there.revision, others[:1]
        )
        with pytest.raises(AlreadyExistsError) as caught:
            store.update_with(policy_key("a"), policy("a", 4), entry.revision, others[::-1])
        events = exactly(watch, 2)
    assert caught.value.key == policy_key("b")
    assert [event.entry for event in events] == [*entries, entry]
    assert store.list("GlobalNetworkPolicy").entries == [entry, *entries]


@pytest.mark.parametrize("verb", ["get", "update", "update at", "delete", "delete at"])
def test_an_object_that_is_not_there(store: Datastore, verb: str) -> None:
    revision = store.create(policy_key("gone"), policy("gone")).revision
    store.delete(policy_key("gone"))
    with pytest.raises(NotFoundError, match="gone") as caught:
        match verb:
            case "get":
                store.get(policy_key("gone"))
            case "update":
                store.update(policy_key("gone"), policy("gone"))
            case "update at":
                store.update(policy_key("gone"), policy("gone"), revision)
            case "delete":
                store.delete(policy_key("gone"))
            case "delete at":
                store.delete(policy_key("gone"), revision)
    assert caught.value.key == policy_key("gone")


def test_update_replaces_the_whole_object(store: Datastore) -> None:
    labelled = policy("a", 1)
    labelled["metadata"]["labels"] = {"colour": "red"}
    created = store.create(policy_key("a"), labelled)
    updated = store.update(policy_key("a"), policy("a", 2))
    assert updated.revision != created.revision
    read = store.get(policy_key("a"))
    assert read == updated
    assert order(read.value) == 2
    assert not read.value["metadata"].get("labels")


def test_update_at_a_revision_is_compare_and_swap(store: Datastore) -> None:
    first = store.create(policy_key("a"), policy("a", 1))
    second = store.update(policy_key("a"), policy("a", 2), first.revision)
    with pytest.raises(ConflictError) as caught:
        store.update(policy_key("a"), policy("a", 3), first.revision)
    assert caught.value.key == policy_key("a")
    assert store.get(policy_key("a")) == second
    assert order(store.update(policy_key("a"), policy("a", 4), second.revision).value) == 4


def test_delete_at_a_revision_is_compare_and_swap(store: Datastore) -> None:
    first = store.create(policy_key("a"), policy("a", 1))
    second = store.update(policy_key("a"), policy("a", 2))
    with pytest.raises(ConflictError):
        store.delete(policy_key("a"), first.revision)
    deleted = store.delete(policy_key("a"), second.revision)
    assert deleted.key == policy_key("a")
    assert order(deleted.value) == 2
    with pytest.raises(NotFoundError):
        store.get(policy_key("a"))


def test_an_object_made_again_has_a_revision_of_its_own(store: Datastore) -> None:
    first = store.create(policy_key("a"), policy("a", 1))
    store.delete(policy_key("a"))
    again = store.create(policy_key("a"), policy("a", 1))
    assert again.revision != first.revision
    with pytest.raises(ConflictError):
        store.update(policy_key("a"), policy("a", 2), first.revision)


@pytest.mark.parametrize("odd", [{1, 2}, 1 << 70, "\ud800", {1: 2}, b""])
def test_what_is_no_json_is_refused(store: Datastore, odd: object) -> None:
    first = store.create(policy_key("a"), policy("a", 1))
    value = policy("a", 2)
    value["spec"]["odd"] = odd
    for write in (store.create, store.update):
        with pytest.raises(StoreError, match=r"GlobalNetworkPolicy\(a\): can't be") as caught:
            write(policy_key("a"), value)
        assert type(caught.value) is StoreError
        assert caught.value.key == policy_key("a")
    assert store.get(policy_key("a")) == first


def test_values_belong_to_the_caller(store: Datastore) -> None:
    mine = policy("a", 1)
    created = store.create(policy_key("a"), mine)
    mine["spec"]["order"] = 50
    created.value["spec"]["order"] = 51
    store.get(policy_key("a")).value["spec"]["order"] = 52
    store.list("GlobalNetworkPolicy").entries[0].value["spec"]["order"] = 53
    assert order(store.get(policy_key("a")).value) == 1


def test_kind_and_namespace_are_part_of_the_key(store: Datastore) -> None:
    store.create(policy_key("same"), policy("same"))
    store.create(peer_key("same"), peer("same"))
    store.create(namespaced_key("one", "same"), namespaced("one", "same"))
    store.create(namespaced_key("two", "same"), namespaced("two", "same"))
    store.delete(namespaced_key("one", "same"))
    store.get(policy_key("same"))
    store.get(peer_key("same"))
    store.get(namespaced_key("two", "same"))
    with pytest.raises(NotFoundError):
        store.get(namespaced_key("one", "same"))


# --- lists ---


def test_list_is_sorted_and_of_one_kind(store: Datastore) -> None:
    for name in ("b", "a.example", "a-1", "a", "c"):
        store.create(policy_key(name), policy(name))
    store.create(peer_key("a"), peer("a"))
    listing = store.list("GlobalNetworkPolicy")
    assert [entry.key.name for entry in listing.entries] == ["a", "a-1", "a.example", "b", "c"]
    assert [entry.key for entry in listing.entries] == sorted(e.key for e in listing.entries)
    assert listing.entries == [store.get(entry.key) for entry in listing.entries]


def test_list_of_one_namespace_or_all(store: Datastore) -> None:
    keys = [namespaced_key(space, name) for space in ("one", "one-b", "two") for name in "ba"]
    for key in keys:
        store.create(key, namespaced(key.namespace, key.name))
    assert [e.key for e in store.list("NetworkPolicy").entries] == sorted(keys)
    assert [e.key for e in store.list("NetworkPolicy", "one").entries] == [
        namespaced_key("one", "a"),
        namespaced_key("one", "b"),
    ]
    assert store.list("NetworkPolicy", "three").entries == []


def test_list_of_nothing_can_be_watched_from(store: Datastore) -> None:
    listing = store.list("GlobalNetworkPolicy")
    assert listing.entries == []
    with store.watch(["GlobalNetworkPolicy"], listing.revision) as watch:
        store.create(policy_key("a"), policy("a", 1))
        assert brief(exactly(watch, 1)) == [("a", 1)]


# --- watches ---


def test_watch_tells_every_change_in_order(store: Datastore) -> None:
    store.create(policy_key("before"), policy("before"))
    with store.watch(["GlobalNetworkPolicy"], store.list("GlobalNetworkPolicy").revision) as watch:
        created = store.create(policy_key("a"), policy("a", 1))
        updated = store.update(policy_key("a"), policy("a", 2))
        store.delete(policy_key("a"))
        again = store.create(policy_key("a"), policy("a", 3))
        events = exactly(watch, 4)
    assert [event.entry for event in events] == [created, updated, None, again]
    assert {event.key for event in events} == {policy_key("a")}
    assert len({event.revision for event in events}) == 4
    assert [e.revision for e in events if e.entry] == [e.entry.revision for e in events if e.entry]


def test_a_refused_write_is_no_event(store: Datastore) -> None:
    first = store.create(policy_key("a"), policy("a", 1))
    with store.watch(["GlobalNetworkPolicy"], store.list("GlobalNetworkPolicy").revision) as watch:
        store.update(policy_key("a"), policy("a", 2))
        with pytest.raises(ConflictError):
            store.update(policy_key("a"), policy("a", 3), first.revision)
        with pytest.raises(AlreadyExistsError):
            store.create(policy_key("a"), policy("a", 4))
        with pytest.raises(ConflictError):
            store.delete(policy_key("a"), first.revision)
        store.update(policy_key("a"), policy("a", 5))
        events = exactly(watch, 2)
    assert brief(events) == [("a", 2), ("a", 5)]


def test_watch_of_some_kinds(store: Datastore) -> None:
    revision = store.list("BGPPeer").revision
    with store.watch(["BGPPeer", "NetworkPolicy"], revision) as watch:
        store.create(policy_key("a"), policy("a"))
        store.create(peer_key("b"), peer("b"))
        store.create(namespaced_key("n", "c"), namespaced("n", "c"))
        store.delete(policy_key("a"))
        store.delete(peer_key("b"))
        events = exactly(watch, 3)
    # Order is promised for each object; kinds of one store may come apart.
    assert [
        (event.key, event.entry is None) for event in events if event.key.kind == "BGPPeer"
    ] == [
        (peer_key("b"), False),
        (peer_key("b"), True),
    ]
    assert [e.key for e in events if e.key.kind != "BGPPeer"] == [namespaced_key("n", "c")]


def test_each_kind_watched_from_its_own_listing(store: Datastore) -> None:
    positions = {}
    for number, kind in enumerate(KINDS):
        positions[kind] = store.list(kind).revision
        store.create(policy_key(f"after-{number}"), policy(f"after-{number}"))
        store.create(peer_key(f"after-{number}"), peer(f"after-{number}"))
    with store.watch(KINDS, positions) as watch:
        events = exactly(watch, 4)
        assert not watch.next(timeout=0)
    names = {kind: [e.key.name for e in events if e.key.kind == kind] for kind in KINDS}
    assert names == {
        "GlobalNetworkPolicy": ["after-0", "after-1", "after-2"],
        "NetworkPolicy": [],
        "BGPPeer": ["after-2"],
    }


def test_watch_resumes_after_any_event(store: Datastore) -> None:
    revision = store.list("GlobalNetworkPolicy").revision
    for number in range(5):
        store.create(policy_key(f"p{number}"), policy(f"p{number}", number))
    with store.watch(["GlobalNetworkPolicy"], revision) as watch:
        events = exactly(watch, 5)
    for seen, event in enumerate(events, start=1):
        with store.watch(["GlobalNetworkPolicy"], event.revision) as watch:
            assert exactly(watch, 5 - seen) == events[seen:]


def test_watch_waits_no_longer_than_asked(store: Datastore) -> None:
    with store.watch(["GlobalNetworkPolicy"], store.list("GlobalNetworkPolicy").revision) as watch:
        assert not watch.next(timeout=0)
        assert not watch.next(timeout=0.01)
        store.create(policy_key("a"), policy("a", 1))
        assert brief(exactly(watch, 1)) == [("a", 1)]
        assert not watch.next(timeout=0)


def test_two_watches_tell_the_same(backend: Backend, store: Datastore) -> None:
    other = backend.connect()
    revision = store.list("GlobalNetworkPolicy").revision
    with (
        store.watch(["GlobalNetworkPolicy"], revision) as first,
        other.watch(["GlobalNetworkPolicy"], revision) as second,
    ):
        for number in range(20):
            store.create(policy_key(f"p{number}"), policy(f"p{number}", number))
        assert exactly(first, 20) == exactly(second, 20)
    other.close()


def test_close_from_another_thread_wakes_the_watch(store: Datastore) -> None:
    watch = store.watch(["GlobalNetworkPolicy"], store.list("GlobalNetworkPolicy").revision)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(watch.next()))
    waiting.start()
    watch.close()
    waiting.join(30)
    assert not waiting.is_alive()
    assert [list(answer) for answer in answers] == [[]]
    watch.close()
    assert not watch.next()


def test_closing_the_store_ends_its_watches(backend: Backend) -> None:
    store = backend.connect()
    watch = store.watch(["GlobalNetworkPolicy"], store.list("GlobalNetworkPolicy").revision)
    waiting = threading.Thread(target=watch.next)
    waiting.start()
    store.close()
    waiting.join(30)
    assert not waiting.is_alive()
    with pytest.raises(UnavailableError):
        store.get(policy_key("a"))
    store.close()


def test_history_that_is_gone_is_said_to_be(backend: Backend, store: Datastore) -> None:
    old = store.list("GlobalNetworkPolicy").revision
    store.create(policy_key("a"), policy("a"))
    backend.forget_history(nothing)
    with pytest.raises(RevisionGoneError), store.watch(["GlobalNetworkPolicy"], old) as watch:
        watch.next(timeout=30)
    listing = store.list("GlobalNetworkPolicy")
    assert policy_key("a") in [entry.key for entry in listing.entries]
    with store.watch(["GlobalNetworkPolicy"], listing.revision) as watch:
        store.create(policy_key("b"), policy("b", 1))
        assert brief(exactly(watch, 1)) == [("b", 1)]


def test_watch_that_fell_behind_goes_on_failing(backend: Backend) -> None:
    with backend.cuttable() as (store, cut):
        old = store.list("BGPPeer").revision
        watch = store.watch(["BGPPeer", "GlobalNetworkPolicy"], old)
        with cut():
            backend.forget_history(nothing)
        for _ in range(2):
            with pytest.raises(RevisionGoneError):
                # some of the changes may still come before
                collect(watch, lambda events: False)


def test_watch_that_keeps_up_outlives_its_history(backend: Backend, store: Datastore) -> None:
    """Also when none of what is forgotten was of its kind."""
    with store.watch(["BGPPeer"], store.list("BGPPeer").revision) as watch:

        def keep_up() -> None:
            assert not watch.next(timeout=0)

        backend.forget_history(keep_up)
        store.create(peer_key("a"), peer("a"))
        assert [event.key for event in exactly(watch, 1)] == [peer_key("a")]


def test_an_object_that_can_not_be_read_is_one_among_good_ones(
    backend: Backend, store: Datastore
) -> None:
    store.create(policy_key("a"), policy("a", 1))
    revision = store.list("GlobalNetworkPolicy").revision
    with store.watch(["GlobalNetworkPolicy"], revision) as watch:
        backend.spoil("bad")
        store.create(policy_key("z"), policy("z", 2))
        events = collect(watch, lambda events: policy_key("z") in [e.key for e in events])
    good, bad = readable(event.entry for event in events if event.entry)
    assert good == ["z"]
    assert bad in ([], ["bad"])
    good, bad = readable(store.list("GlobalNetworkPolicy").entries)
    assert (good, bad) == (["a", "z"], ["bad"])
    assert readable([store.get(policy_key("bad"))]) == ([], ["bad"])
    store.update(policy_key("bad"), policy("bad", 3))
    assert readable(store.list("GlobalNetworkPolicy").entries) == (["a", "bad", "z"], [])
    backend.spoil("worse")
    store.delete(policy_key("worse"))
    assert readable(store.list("GlobalNetworkPolicy").entries) == (["a", "bad", "z"], [])


def readable(entries: Iterable[Entry]) -> tuple[list[str], list[str]]:
    """The names of those that are policies, and of those that are not, and say whose they are."""
    good, bad = [], []
    for entry in entries:
        try:
            parse_as("GlobalNetworkPolicy", entry.value)
            good.append(entry.key.name)
        except InvalidObjectError as error:
            assert entry.key.name in str(error)
            bad.append(entry.key.name)
    return good, bad


def test_a_watch_cut_again_and_again_in_a_burst_loses_and_doubles_nothing(
    backend: Backend,
) -> None:
    times, names = 100, ["w0", "w1"]
    with backend.cuttable() as (store, cut):
        revision = store.list("GlobalNetworkPolicy").revision
        with store.watch(["GlobalNetworkPolicy", "BGPPeer"], revision) as watch:
            writers = [start(write_series, backend.connect, name, times) for name in names]
            events: list[Event] = []

            def over(more: list[Event]) -> bool:
                return sum(event.entry is None for event in events + more) == len(names)

            for _ in range(8):
                events += collect(watch, lambda more: len(more) >= 12 or over(more))
                with cut():
                    pass
            events += collect(watch, over)
            join(*writers)
            assert not watch.next(timeout=0)
    for name in names:
        assert brief(event for event in events if event.key.name == name) == [
            *((name, number) for number in range(1, times + 1)),
            (name, None),
        ]


# --- several at once ---


def test_increments_from_processes_all_count(backend: Backend, store: Datastore) -> None:
    store.create(policy_key("counter"), policy("counter", 0))
    join(*[start(count_up, backend.connect, "counter", 50) for _ in range(3)])
    assert order(store.get(policy_key("counter")).value) == 150


def test_increments_from_threads_all_count(store: Datastore) -> None:
    store.create(policy_key("counter"), policy("counter", 0))

    class Shared:
        """The same client for all threads, which must not close it."""

        def __getattr__(self, name: str) -> object:
            return (lambda: None) if name == "close" else getattr(store, name)

    threads = [threading.Thread(target=count_up, args=(Shared, "counter", 25)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert order(store.get(policy_key("counter")).value) == 100


def test_only_one_of_many_creates_wins(backend: Backend, store: Datastore) -> None:
    revision = store.list("GlobalNetworkPolicy").revision
    with store.watch(["GlobalNetworkPolicy"], revision) as watch:
        racers = [start(create_others_too, backend.connect, number, 20) for number in range(3)]
        events = exactly(watch, 20)
        join(*racers)
        assert not watch.next(timeout=0)
    assert len({event.key for event in events}) == 20
    assert [e.entry for e in sorted(events, key=lambda e: e.key)] == store.list(
        "GlobalNetworkPolicy"
    ).entries


def test_concurrent_writers_lose_and_double_no_event(backend: Backend, store: Datastore) -> None:
    times, names = 200, ["w0", "w1", "w2"]
    revision = store.list("GlobalNetworkPolicy").revision
    with store.watch(["GlobalNetworkPolicy"], revision) as watch:
        writers = [start(write_series, backend.connect, name, times) for name in names]
        events = collect(watch, lambda events: sum(e.entry is None for e in events) >= 3)
        join(*writers)
        assert not watch.next(timeout=0)
    for name in names:
        assert brief(event for event in events if event.key.name == name) == [
            *((name, number) for number in range(1, times + 1)),
            (name, None),
        ]
