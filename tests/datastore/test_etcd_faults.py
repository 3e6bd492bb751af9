"""What an etcd store and its followers survive: long outages, floods, clocks that disagree."""

from __future__ import annotations

import base64
import gc
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import grpc
import pytest

from datastore import etcd_pb2 as pb
from datastore.connect import connect
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import TXN, EtcdClient, EtcdSettings, TlsFiles
from datastore.etcd_keys import path_of
from datastore.etcd_values import encode
from datastore.follower import Follower, InSync, Update
from datastore.interface import (
    JSON,
    ConflictError,
    Entry,
    Event,
    Key,
    Listing,
    NotFoundError,
    RevisionGoneError,
    StoreError,
    UnavailableError,
)
from ipam.allocator import Allocator
from tests.contracts.backends import compact
from tests.datastore.etcd_front import EtcdFront
from tests.datastore.programs import pool_key
from tests.support.etcd import Etcd, EtcdMember, single_node
from tests.support.netns import eventually

REPOSITORY = Path(__file__).resolve().parents[2]


def numbered(number: int) -> JSON:
    return {"metadata": {"name": "p"}, "number": number}


def patiently(action: Callable[[], Entry]) -> Entry:
    deadline = time.monotonic() + 60
    while True:
        try:
            return action()
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def once(store: EtcdDatastore, entry: Entry, number: int) -> Entry:
    """Write the next number; though the answer may have been lost before, not a second time."""
    try:
        return store.update(entry.key, numbered(number), entry.revision)
    except ConflictError:
        written = store.get(entry.key)
        assert written.value["number"] == number
        return written


class CountingStore(EtcdDatastore):
    """Counts its lists."""

    lists = 0

    def list(self, kind: str, namespace: str | None = None, prefix: str = "") -> Listing:
        self.lists += 1
        return super().list(kind, namespace, prefix)


class Record:
    """What a follower of IPPools and Nodes told."""

    def __init__(self, etcd: Etcd, sink: Callable[[Update | InSync], None] | None = None) -> None:
        self.told: list[Update | InSync] = []
        self.writer = EtcdDatastore(EtcdSettings(tuple(etcd.endpoints)))
        self.store = CountingStore(EtcdSettings(tuple(etcd.endpoints)))
        self.follower = Follower(self.store, ["IPPool", "Node"], sink or self.told.append)

    def numbers(self, name: str) -> list[int]:
        return [
            update.value["number"]
            for update in self.told
            if isinstance(update, Update) and update.value and update.key.name == name
        ]

    def close(self) -> None:
        self.follower.stop()
        self.store.close()
        self.writer.close()


@contextmanager
def followed(etcd: Etcd) -> Iterator[Record]:
    """A follower that knows two objects."""
    record = Record(etcd)
    for name in ("kept", "counter"):
        record.writer.create(pool_key(name), numbered(0))
    record.follower.start()
    eventually(lambda: InSync() in record.told)
    yield record
    record.close()


def outage(etcd: Etcd, record: Record, how: str, seconds: float) -> None:
    """Away for so long; the last state stands; then changes come, each once and in order."""
    daemon = etcd.members[0].daemon
    before = list(record.told)
    daemon.pause() if how == "stopped" else daemon.kill()
    assert not threading.Event().wait(seconds)
    assert "no member answers" in (record.follower.problem or "")
    assert record.told == before
    daemon.resume() if how == "stopped" else daemon.start()
    entry = patiently(lambda: record.writer.get(pool_key("counter")))
    for number in range(1, 101):
        entry = patiently(partial(once, record.writer, entry, number))
    eventually(lambda: record.numbers("counter")[-1] == 100, seconds=60)
    eventually(lambda: record.follower.in_sync)
    numbers = record.numbers("counter")
    assert numbers == sorted(set(numbers)), "none twice, none out of order"
    assert numbers == list(range(101)), "what is still in etcd's history is told in full"
    assert record.numbers("kept") == [0]
    assert record.store.lists == 2, "the watch went on where it was"


@pytest.mark.slow
def test_a_minute_without_the_store() -> None:
    """One that hangs and one that was killed; both at once, to save a minute."""
    with ExitStack() as stack:
        pairs = []
        for how in ("stopped", "killed"):
            etcd = stack.enter_context(single_node())
            pairs.append((etcd, stack.enter_context(followed(etcd)), how))
        failures: list[BaseException] = []

        def run(etcd: Etcd, record: Record, how: str) -> None:
            try:
                outage(etcd, record, how, 60)
            except BaseException as error:
                failures.append(error)

        # the kernel ends a daemon with the thread that started it: the last is this one
        other = threading.Thread(target=run, args=pairs[0])
        other.start()
        run(*pairs[1])
        other.join()
        for failure in failures:
            raise failure


@pytest.mark.slow
def test_an_outage_that_ends_the_watch(etcd_cluster: Etcd) -> None:
    """Two of three members hang for longer than a watch bears."""
    certificate = etcd_cluster.certificate
    assert certificate is not None
    files = TlsFiles(certificate.ca, certificate.cert, certificate.key)
    store = EtcdDatastore(EtcdSettings(tuple(etcd_cluster.endpoints), tls=files))
    entry = store.create(pool_key("a"), numbered(0))
    told: list[Update | InSync] = []
    follower = Follower(store, ["IPPool", "Node"], told.append)
    follower.start()
    eventually(lambda: InSync() in told)
    hanging = etcd_cluster.members[:2]
    for member in hanging:
        member.daemon.pause()
    eventually(lambda: not follower.in_sync, seconds=60)
    assert told == [Update(pool_key("a"), numbered(0)), InSync()]
    for member in hanging:
        member.daemon.resume()
    # a call that nobody answered may have been done: the next one finds that out, and no more
    with suppress(ConflictError):
        patiently(lambda: store.update(entry.key, numbered(1), entry.revision))
    eventually(lambda: told[-1] == Update(pool_key("a"), numbered(1)), seconds=60)
    assert len(told) == 3
    follower.stop()
    store.close()


# --- floods ---

COUNT = 30_000


def flood(member: EtcdMember, count: int = COUNT) -> None:
    """Create as many pools as fast as etcd takes them, fifty a transaction."""
    client = EtcdClient(EtcdSettings((member.endpoint,)))
    for first in range(0, count, 50):
        request = pb.TxnRequest()
        for number in range(first, first + 50):
            key = pool_key(f"p{number}")
            put = request.success.add().request_put
            put.key, put.value = path_of(key, {}).encode(), encode(key, numbered(number))
        client.call(TXN, request)
    client.close()


def live_events() -> int:
    return sum(type(thing) is Event for thing in gc.get_objects())


def test_a_consumer_that_falls_behind_costs_no_more_memory_and_misses_nothing() -> None:
    with single_node() as etcd:
        store = EtcdDatastore(EtcdSettings(tuple(etcd.endpoints)))
        before = live_events()
        with store.watch(["IPPool"], store.list("IPPool").revision) as watch:
            flood(etcd.members[0])
            full = 10_000
            eventually(lambda: live_events() - before >= full)
            numbers: list[int] = []
            most = 0
            while len(numbers) < COUNT:
                events = watch.next(timeout=30)
                assert events, f"no more than {len(numbers)}"
                numbers += [event.entry.value["number"] for event in events if event.entry]
                most = max(most, live_events() - before)
            assert not watch.next(timeout=0)
        assert numbers == list(range(COUNT))
        assert most < 2 * full
        store.close()


def test_history_lost_behind_a_slow_consumer_is_made_good() -> None:
    """etcd forgets what the consumer has not taken yet: everything is listed again."""
    with single_node() as etcd:
        go_on = threading.Event()
        told: dict[Key, int] = {}
        doubled: list[Key] = []

        def slow(message: Update | InSync) -> None:
            if isinstance(message, Update):
                if message.key == pool_key("p1"):
                    assert go_on.wait(60)
                assert message.value is not None
                if told.get(message.key) == message.value["number"]:
                    doubled.append(message.key)
                told[message.key] = message.value["number"]

        record = Record(etcd, slow)
        record.follower.start()
        eventually(lambda: record.follower.in_sync)
        flood(etcd.members[0], 20_000)
        last = record.writer.create(pool_key("last"), numbered(-1))
        compact(etcd, last.revision)
        etcd.members[0].kill()  # so that the stream ends, wherever it is
        etcd.start()
        go_on.set()
        eventually(lambda: pool_key("last") in told, seconds=60)
        eventually(lambda: len(told) == 20_001, seconds=60)
        assert not doubled
        assert record.store.lists > 2
        record.close()


# --- clocks ---

YEAR = 365 * 86400

_CLIENT = """
import sys, time
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import EtcdSettings
from datastore.interface import ConflictError, Key
store = EtcdDatastore(EtcdSettings((sys.argv[1],)))
key = Key("IPPool", "shared")
with store.watch(["IPPool"], store.list("IPPool").revision) as watch:
    for _ in range(50):
        while True:
            entry = store.get(key)
            value = {"metadata": {"name": "p"}, "number": entry.value["number"] + 1}
            try:
                store.update(key, value, entry.revision)
                break
            except ConflictError:
                continue
    seen = []
    while sum(entry is not None for entry in seen) < 50:
        events = watch.next(timeout=30)
        assert events
        seen += [event.entry for event in events]
assert [e.value["number"] for e in seen] == sorted({e.value["number"] for e in seen})
print(time.time(), time.monotonic())
"""


def test_clocks_that_disagree_by_years_do_no_harm(etcd: Etcd) -> None:
    """One machine was started years before the others; two, where faketime(1) is, live then."""
    store = EtcdDatastore(EtcdSettings(tuple(etcd.endpoints)))
    with suppress(NotFoundError):
        store.delete(pool_key("shared"))
    store.create(pool_key("shared"), numbered(0))
    python = [sys.executable, "-c", _CLIENT, etcd.endpoints[0]]
    machines = [
        python,
        ["unshare", "--time", "--fork", "--monotonic", str(3 * YEAR), *python],
    ]
    if shutil.which("faketime"):
        machines += [["faketime", "-f", shift, *python] for shift in ("+3y", "-3y")]
    processes = [
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in machines
    ]
    clocks = []
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        clocks.append([float(word) for word in output.split()])
    assert clocks[1][1] - clocks[0][1] > 2 * YEAR
    if len(clocks) > 2:
        assert clocks[2][0] - clocks[3][0] > 5 * YEAR
    assert store.get(pool_key("shared")).value["number"] == 50 * len(machines)
    store.delete(pool_key("shared"))
    store.close()


# --- watches that are never taken on ---


@pytest.fixture
def front(etcd: Etcd) -> Iterator[EtcdFront]:
    front = EtcdFront(etcd.endpoints[0])
    yield front
    front.close()


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_a_watch_brought_before_it_failed_is_brought_again(
    etcd: Etcd, store: EtcdDatastore, front: EtcdFront, forgotten: bool
) -> None:
    """Whoever asked for it never got to see it: from there another watch must not go on."""
    old = store.create(pool_key("a"), numbered(1)).revision
    store.create(pool_key("b"), numbered(2))
    begin = store.update(pool_key("b"), numbered(3)).revision
    store.create(pool_key("c"), numbered(4))
    if forgotten:
        compact(etcd, begin)
    positions = {"IPPool": begin, "Node": old}
    answers: list[pb.WatchResponse] = []

    def told(answer: pb.WatchResponse) -> list[pb.WatchResponse]:
        """First the event, then (if so) that Node's watch is over, and never that it began."""
        if answer.events or answer.canceled:
            answers.append(answer)
            answers.sort(key=lambda answer: answer.canceled)
            return answers if len(answers) == 1 + forgotten else []
        return [] if answer.created and answer.watch_id == 2 else [answer]

    front.told = told
    distant = EtcdDatastore(EtcdSettings((front.endpoint,), timeout=3))
    with pytest.raises(RevisionGoneError if forgotten else UnavailableError) as caught:
        distant.watch(positions, positions)
    assert len(answers) == 1 + forgotten
    resume = {kind: text.partition("@")[0] for kind, text in caught.value.resume.items()}
    assert resume == ({"IPPool": begin} if forgotten else positions)
    front.told = lambda answer: [answer]
    with distant.watch(["IPPool"], caught.value.resume["IPPool"]) as watch:
        assert [event.key for event in watch.next(timeout=30)] == [pool_key("c")]
    distant.close()


# --- an etcd that has too much to do ---

BUSY = (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests")


def test_what_etcd_turns_away_is_asked_again(store: EtcdDatastore, front: EtcdFront) -> None:
    """Nothing was carried out, so a write is repeated, too."""
    refusals = [BUSY] * 3
    front.refuse = lambda _: refusals.pop() if refusals else None
    distant = EtcdDatastore(EtcdSettings((front.endpoint,)))
    distant.create(pool_key("a"), numbered(1))
    assert not refusals
    refusals += [BUSY] * 3
    assert distant.get(pool_key("a")) == store.get(pool_key("a"))
    front.refuse = lambda _: BUSY
    for ask in (distant.get, distant.delete):
        with pytest.raises(UnavailableError, match=r"turns us away .etcdserver: too many requests"):
            ask(pool_key("a"))
    assert store.get(pool_key("a")).value == numbered(1)
    distant.close()


def test_what_etcd_said_counts_and_not_that_time_ran_out_over_the_last_try(
    front: EtcdFront,
) -> None:
    asked: list[str] = []

    def late(method: str) -> tuple[grpc.StatusCode, str]:
        asked.append(method)
        if len(asked) > 1:
            time.sleep(2)
        return BUSY

    front.refuse = late
    distant = EtcdDatastore(EtcdSettings((front.endpoint,), timeout=1))
    with pytest.raises(UnavailableError, match=r"turns us away .etcdserver: too many requests"):
        distant.get(pool_key("a"))
    assert len(asked) == 2
    distant.close()


def test_an_etcd_that_takes_few_operations_at_once(store: EtcdDatastore, front: EtcdFront) -> None:
    """``--max-txn-ops``: it is asked for one by one; what must be all or nothing isn't done."""
    many = (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: too many operations in txn request")
    front.refuse = lambda method: many if method == TXN.path else None
    distant = EtcdDatastore(EtcdSettings((front.endpoint,)))
    first, last = [store.create(pool_key(name), numbered(1)) for name in "ac"]
    found, missing, other = distant.get_all([pool_key(name) for name in "abc"])
    assert (found, other) == (first, last)
    assert isinstance(missing, NotFoundError)
    with pytest.raises(StoreError, match="too many operations"):
        distant.update_with(first.key, numbered(2), first.revision, [(pool_key("d"), numbered(2))])
    assert store.list("IPPool").entries == [first, last]
    distant.close()


def test_handle_and_block_whose_writing_nobody_confirms(etcd: Etcd, front: EtcdFront) -> None:
    """It was carried out: the next try finds the address, and a release gives it back."""
    with ExitStack() as stack:
        store = connect(f"etcd://{etcd.endpoints[0]}")
        stack.callback(store.close)
        pool = {"metadata": {"name": "pods"}, "spec": {"cidr": "10.65.0.0/24"}}
        store.create(pool_key("pods"), pool)
        distant = EtcdDatastore(EtcdSettings((front.endpoint,), timeout=2))
        stack.callback(distant.close)
        allocator = Allocator(distant, "n1", follow=True)
        allocator.start()
        stack.callback(allocator.stop)
        eventually(lambda: allocator.following)
        allocator.assign("first", {})
        front.lose = lambda request: any(each.HasField("request_put") for each in request.success)
        assert allocator.assign_each({"h": {}}) == {}
        front.lose = lambda _: False
        [address] = allocator.addresses("h")
        assert allocator.release("h") == [address]
        assert len(store.list("IPAMHandle").entries) == 1


# --- small things ---


@pytest.fixture
def store(etcd: Etcd) -> Iterator[EtcdDatastore]:
    everything = {"key": _base64(b"/calico/"), "range_end": _base64(b"/calico0")}
    etcd.members[0].call("/v3/kv/deleterange", everything)
    store = EtcdDatastore(EtcdSettings(tuple(etcd.endpoints)))
    yield store
    store.close()


def test_no_revision_is_that_of_an_absent_object(store: EtcdDatastore) -> None:
    for revision in ("0", "-1", "", "1", "9" * 30, "1@abc"):
        with pytest.raises(NotFoundError):
            store.update(pool_key("absent"), numbered(1), revision)
        with pytest.raises(NotFoundError):
            store.delete(pool_key("absent"), revision)


def test_what_was_written_is_the_writers_own_and_the_readers(store: EtcdDatastore) -> None:
    value = numbered(1)
    written = store.create(pool_key("a"), value)
    value["number"] = 2
    assert written.value == numbered(1)
    written.value["number"] = 3
    assert written.value["number"] == 3
    assert store.get(pool_key("a")) != written
    assert store.get(pool_key("a")).value == numbered(1)


def test_keys_that_are_no_text_are_nobodys(etcd: Etcd, store: EtcdDatastore) -> None:
    revision = store.create(pool_key("a"), numbered(1)).revision
    odd = b"/calico/resources/v3/projectcalico.org/ippools/\xff\xfe"
    etcd.members[0].call("/v3/kv/put", {"key": _base64(odd), "value": _base64(b"{}")})
    store.create(pool_key("b"), numbered(2))
    assert [entry.key.name for entry in store.list("IPPool").entries] == ["a", "b"]
    with store.watch(["IPPool"], revision) as watch:
        events = watch.next(timeout=30)
        assert [event.key.name for event in events] == ["b"]


def test_revisions_of_another_cluster_are_not_gone_on_from(store: EtcdDatastore) -> None:
    for revision in ("1@abc", "x", "1@x"):
        with pytest.raises(RevisionGoneError), store.watch(["IPPool"], revision) as watch:
            watch.next(timeout=30)
    with pytest.raises(RevisionGoneError):
        store.watch(["IPPool", "Node"], {"IPPool": "1@abc", "Node": "1@abd"})


def test_a_watch_of_a_closed_store_says_so_at_once(etcd: Etcd) -> None:
    store = EtcdDatastore(EtcdSettings(tuple(etcd.endpoints)))
    store.close()
    with pytest.raises(UnavailableError, match="closed"):
        store.watch(["IPPool"], "1").next(timeout=5)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
