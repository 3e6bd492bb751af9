"""The etcd store beyond the contract: Calico's data, TLS, users, and everything that can fail."""

from __future__ import annotations

import base64
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from api.net import parse_net
from datastore.connect import connect
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import EtcdSettings, TlsFiles
from datastore.follower import Follower, InSync, Update
from datastore.interface import (
    JSON,
    ConflictError,
    Entry,
    Key,
    NotFoundError,
    StoreError,
    UnavailableError,
)
from ipam.allocator import Allocator
from tests.contracts.backends import compact
from tests.datastore.programs import pool_key
from tests.support.etcd import Etcd, EtcdMember, single_node
from tests.support.netns import eventually
from tests.support.pki import Authority
from tests.support.relay import Relay


def pool(number: int, **more: Any) -> JSON:
    return {"metadata": {"name": "p"}, "number": number} | more


def encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def put(member: EtcdMember, path: str, value: JSON) -> None:
    """As another program writes it."""
    member.call("/v3/kv/put", {"key": encode(path), "value": encode(json.dumps(value))})


def read(member: EtcdMember, path: str) -> JSON:
    """As another program reads it."""
    (kv,) = member.call("/v3/kv/range", {"key": encode(path)})["kvs"]
    found: JSON = json.loads(base64.b64decode(kv["value"]))
    return found


def wipe(member: EtcdMember) -> None:
    member.call("/v3/kv/deleterange", {"key": encode("/calico/"), "range_end": encode("/calico0")})


@pytest.fixture
def member(etcd: Etcd) -> EtcdMember:
    wipe(etcd.members[0])
    return etcd.members[0]


@pytest.fixture
def store(member: EtcdMember) -> Iterator[EtcdDatastore]:
    store = EtcdDatastore(EtcdSettings((member.endpoint,)))
    yield store
    store.close()


# --- beside Calico ---

CALICO_BLOCK = {
    "cidr": "10.0.0.0/26",
    "affinity": "host:node-1",
    "affinity_claim_time": "2026-01-01T00:00:00Z",
    "allocations": [0] + [None] * 63,
    "unallocated": list(range(1, 64)),
    "attributes": [{"handle_id": "MyNet.abc", "secondary": {"pod": "a", "namespace": "default"}}],
    "sequenceNumber": 5,
    "sequenceNumberForAllocation": {"0": 4},
    "deleted": False,
    "ofNewerVersions": {"kept": True},
}
BLOCK_PATH = "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26"
HANDLE_PATH = "/calico/ipam/v2/handle/MyNet.abc"


def test_ipam_goes_on_with_a_block_that_calico_made(
    member: EtcdMember, store: EtcdDatastore
) -> None:
    put(
        member,
        "/calico/resources/v3/projectcalico.org/ippools/pods",
        {
            "kind": "IPPool",
            "apiVersion": "projectcalico.org/v3",
            "metadata": {"name": "pods", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"cidr": "10.0.0.0/16", "blockSize": 26, "nodeSelector": "all()"},
        },
    )
    put(member, BLOCK_PATH, CALICO_BLOCK)
    put(
        member,
        "/calico/ipam/v2/host/node-1/ipv4/block/10.0.0.0-26",
        {"state": "confirmed", "deleted": False},
    )
    put(member, HANDLE_PATH, {"block": {"10.0.0.0/26": 1}, "deleted": False})
    put(member, "/calico/ipam/v2/config", {"auto_allocate_blocks": True})
    allocator = Allocator(store, "node-1")
    assert allocator.addresses("MyNet.abc") == [parse_net("10.0.0.0/32")]
    taken = allocator.assign("k8s-pod-network.def", {"pod": "b"})
    assert taken.address == parse_net("10.0.0.1/32")
    block = read(member, BLOCK_PATH)
    assert block["allocations"][:2] == [0, 1]
    assert block["affinity_claim_time"] == CALICO_BLOCK["affinity_claim_time"]
    assert "affinityClaimTime" not in block
    assert block["sequenceNumber"] == 6
    assert read(member, "/calico/ipam/v2/handle/k8s-pod-network.def")["block"] == {"10.0.0.0/26": 1}
    assert allocator.release("MyNet.abc") == [parse_net("10.0.0.0/32")]
    with pytest.raises(KeyError, match="kvs"):
        read(member, HANDLE_PATH)


def test_a_handle_with_capitals_that_another_program_makes_is_found(
    etcd: Etcd, store: EtcdDatastore
) -> None:
    """Soon, also after it was looked for, and when it comes again written otherwise."""
    member, key = etcd.members[0], Key("IPAMHandle", "othernet.abc")
    for number, written in enumerate(("OtherNet.abc", "OTHERNET.abc")):
        path = f"/calico/ipam/v2/handle/{written}"
        with pytest.raises(NotFoundError):
            store.get(key)
        put(member, path, {"block": {"10.0.0.0/26": number + 1}, "deleted": False})
        eventually(lambda: found(store, key), seconds=20)
        spec = store.get(key).value["spec"]
        assert spec == {"handleID": written, "block": {"10.0.0.0/26": number + 1}, "deleted": False}
        store.delete(key)


def found(store: EtcdDatastore, key: Key) -> bool:
    try:
        return store.get(key).key == key
    except NotFoundError:
        return False


def test_a_handle_with_capitals_is_one_object_by_its_lower_case_name(
    member: EtcdMember, store: EtcdDatastore
) -> None:
    put(member, HANDLE_PATH, {"block": {}, "deleted": False})
    key = Key("IPAMHandle", "mynet.abc")
    entry = store.get(key)
    assert entry.value["spec"]["handleID"] == "MyNet.abc"
    entry = store.update(key, entry.value, entry.revision)
    assert [e.key for e in store.list("IPAMHandle").entries] == [key]
    store.delete(key, entry.revision)
    with pytest.raises(NotFoundError):
        store.get(key)


def test_a_handle_with_capitals_is_found_among_others(
    member: EtcdMember, store: EtcdDatastore
) -> None:
    put(member, HANDLE_PATH, {"block": {}, "deleted": False})
    put(member, BLOCK_PATH, CALICO_BLOCK)
    keys = [Key("IPAMHandle", name) for name in ("mynet.abc", "none.abc")]
    handle, none, block = store.get_all([*keys, Key("IPAMBlock", "10-0-0-0-26")])
    assert isinstance(handle, Entry)
    assert handle.value["spec"]["handleID"] == "MyNet.abc"
    assert isinstance(none, NotFoundError)
    assert isinstance(block, Entry)
    assert block == store.get(block.key)


def test_one_that_can_not_be_stored_keeps_the_others_from_it(store: EtcdDatastore) -> None:
    def handle(name: str, written: str) -> tuple[Key, JSON]:
        return Key("IPAMHandle", name), {"spec": {"handleID": written, "block": {}}}

    stored = store.create(*handle("d", "d"))
    others = [handle("a", "A"), handle("e", "x")]
    with pytest.raises(StoreError, match="handleID"):
        store.update_with(stored.key, stored.value, stored.revision, others)
    assert store.list("IPAMHandle").entries == [stored]
    store.update_with(stored.key, stored.value, stored.revision, others[:1])
    assert store.get(Key("IPAMHandle", "a")).value["spec"]["handleID"] == "A"


def test_fields_of_newer_versions_survive_our_writing(
    member: EtcdMember, store: EtcdDatastore
) -> None:
    put(member, BLOCK_PATH, CALICO_BLOCK)
    entry = store.get(Key("IPAMBlock", "10-0-0-0-26"))
    entry.value["spec"]["sequenceNumber"] += 1
    store.update(entry.key, entry.value, entry.revision)
    assert read(member, BLOCK_PATH) == CALICO_BLOCK | {"sequenceNumber": 6}


def test_prefixes_of_ipam_names(store: EtcdDatastore) -> None:
    for node in ("a", "a-b"):
        for cidr in ("10.0.0.0/26", "10.0.0.64/26", "10.0.1.0/26", "fd00::10:0/122"):
            name = f"{node}-{cidr.replace('.', '-').replace(':', '-').replace('/', '-')}"
            spec = {"node": node, "cidr": cidr, "type": "host", "state": "confirmed"}
            store.create(Key("BlockAffinity", name), {"metadata": {"name": name}, "spec": spec})
            if node == "a":
                key = Key("IPAMBlock", name.removeprefix("a-"))
                store.create(key, {"metadata": {"name": key.name}, "spec": {"cidr": cidr}})

    def names(kind: str, prefix: str) -> list[str]:
        return [entry.key.name for entry in store.list(kind, prefix=prefix).entries]

    for kind in ("BlockAffinity", "IPAMBlock"):
        everything = names(kind, "")
        for name in everything:
            for length in range(len(name) + 1):
                prefix = name[:length]
                assert names(kind, prefix) == [n for n in everything if n.startswith(prefix)]


def test_what_can_not_be_read_is_one_bad_object_among_good_ones(
    member: EtcdMember, store: EtcdDatastore
) -> None:
    store.create(pool_key("good"), pool(1))
    revision = store.list("IPPool").revision
    member.call(
        "/v3/kv/put",
        {
            "key": encode("/calico/resources/v3/projectcalico.org/ippools/bad"),
            "value": encode("{not json"),
        },
    )
    assert [e.key.name for e in store.list("IPPool").entries] == ["bad", "good"]
    assert "unreadable" in store.get(pool_key("bad")).value["spec"]
    with store.watch(["IPPool"], revision) as watch:
        (event,) = watch.next(timeout=30)
        assert event.entry is not None
        assert "unreadable" in event.entry.value["spec"]
    entry = store.get(pool_key("bad"))
    store.update(pool_key("bad"), pool(2), entry.revision)  # can be put right
    assert store.get(pool_key("bad")).value["number"] == 2


def test_a_list_of_thousands_is_of_one_moment(store: EtcdDatastore) -> None:
    threads = [
        threading.Thread(
            target=lambda first: [
                store.create(pool_key(f"p{n:04}"), pool(n)) for n in range(first, 2500, 4)
            ],
            args=(first,),
        )
        for first in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    listing = store.list("IPPool")
    assert [entry.value["number"] for entry in listing.entries] == list(range(2500))
    assert [entry.key.name for entry in store.list("IPPool", prefix="p01").entries] == [
        f"p01{n:02}" for n in range(100)
    ]


def test_an_object_that_is_too_large_is_refused_by_name(store: EtcdDatastore) -> None:
    for size, complaint in ((2_000_000, "request is too large"), (5_000_000, "larger than max")):
        with pytest.raises(StoreError, match=complaint) as caught:
            store.create(pool_key("large"), pool(1, padding="x" * size))
        assert caught.value.key == pool_key("large")
        assert not isinstance(caught.value, UnavailableError)
    with pytest.raises(StoreError, match=r"metadata\.name: 'x': expected '10-0-0-0-26'"):
        store.create(Key("IPAMBlock", "x"), {"spec": {"cidr": "10.0.0.0/26"}})


def test_a_revision_of_another_store_never_matches(store: EtcdDatastore) -> None:
    store.create(pool_key("a"), pool(1))
    for revision in ("", "x", "-1", "0"):
        with pytest.raises(ConflictError):
            store.update(pool_key("a"), pool(2), revision)


# --- outages ---


def test_a_store_that_is_down_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    heard: queue.SimpleQueue[Update | InSync] = queue.SimpleQueue()
    with single_node() as etcd:
        etcd.kill()
        store = EtcdDatastore(EtcdSettings(tuple(etcd.endpoints), timeout=0.5))
        with pytest.raises(UnavailableError, match=f"etcd {etcd.endpoints[0]}: no member answers"):
            store.get(pool_key("a"))
        with pytest.raises(UnavailableError, match="make sure that etcd runs"):
            store.create(pool_key("a"), pool(1))
        follower = Follower(store, ["IPPool"], heard.put)
        follower.start()
        eventually(lambda: "no member answers" in (follower.problem or ""))
        assert heard.empty()
        etcd.start()
        assert heard.get(timeout=30) == InSync()
        with closing(EtcdDatastore(EtcdSettings(tuple(etcd.endpoints)))) as patient:
            patient.create(pool_key("a"), pool(1))
        assert heard.get(timeout=30) == Update(pool_key("a"), pool(1))
        follower.stop()
        store.close()


def test_an_outage_with_compaction_is_caught_up_with_exactly(
    member: EtcdMember, etcd: Etcd, store: EtcdDatastore
) -> None:
    for name in ("deleted", "changed", "same"):
        store.create(pool_key(name), pool(1))
    relay = Relay(member.endpoint)
    distant = EtcdDatastore(EtcdSettings((relay.endpoint,), timeout=0.3))
    heard: queue.SimpleQueue[Update | InSync] = queue.SimpleQueue()
    follower = Follower(distant, ["IPPool", "BGPPeer"], heard.put)
    follower.start()
    assert [heard.get(timeout=30) for _ in range(4)][-1] == InSync()
    with relay.cut():
        store.delete(pool_key("deleted"))
        store.update(pool_key("changed"), pool(2))
        last = store.create(pool_key("new"), pool(3))
        compact(etcd, last.revision)
    told = [heard.get(timeout=60) for _ in range(3)]
    assert sorted(map(str, told)) == sorted(
        map(
            str,
            [
                Update(pool_key("deleted"), None),
                Update(pool_key("changed"), pool(2)),
                Update(pool_key("new"), pool(3)),
            ],
        )
    )
    store.update(pool_key("same"), pool(4))
    assert heard.get(timeout=30) == Update(pool_key("same"), pool(4))
    follower.stop()
    distant.close()
    relay.close()


def test_a_watch_cut_in_a_burst_goes_on_where_it_was(
    member: EtcdMember, store: EtcdDatastore
) -> None:
    relay = Relay(member.endpoint)
    distant = EtcdDatastore(EtcdSettings((relay.endpoint,)))
    revision = store.create(pool_key("a"), pool(0)).revision
    told: list[int] = []
    with distant.watch(["IPPool", "BGPPeer"], revision) as watch:
        writing = threading.Thread(
            target=lambda: [store.update(pool_key("a"), pool(n)) for n in range(1, 1001)]
        )
        writing.start()
        while 1000 not in told:
            events = watch.next(timeout=30)
            assert events
            before = len(told)
            told += [event.entry.value["number"] for event in events if event.entry]
            if before // 100 != len(told) // 100:
                relay.sever()
        writing.join(30)
        assert not watch.next(timeout=0)
    assert told == list(range(1, 1001))
    distant.close()
    relay.close()


def test_an_idle_watch_outlives_a_restart_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with single_node() as etcd:
        store = EtcdDatastore(EtcdSettings(tuple(etcd.endpoints)))
        revision = store.create(pool_key("a"), pool(0)).revision
        with store.watch(["IPPool"], revision) as watch:
            assert not watch.next(timeout=0.1)
            etcd.kill()
            etcd.start()
            store.update(pool_key("a"), pool(1))
            (event,) = watch.next(timeout=30)
            assert event.entry is not None
            assert event.entry.value == pool(1)
        store.close()


def test_a_cluster_that_begins_anew_is_not_mistaken_for_the_old_one() -> None:
    with single_node() as old, single_node() as new:
        relay = Relay(old.endpoints[0])
        store = EtcdDatastore(EtcdSettings((relay.endpoint,)))
        entry = store.create(pool_key("a"), pool(0))
        for _ in range(5):
            entry = store.update(pool_key("a"), pool(0))
        watch = store.watch(["IPPool"], entry.revision)
        assert not watch.next(timeout=0.1)
        with relay.cut():
            relay.retarget(new.endpoints[0])
        with pytest.raises(StoreError, match="list again"):
            watch.next(timeout=30)
        watch.close()
        store.close()
        relay.close()


def test_a_member_that_hangs_is_left_for_another(etcd_cluster: Etcd) -> None:
    with closing(tls_store(etcd_cluster)) as store:
        store.create(pool_key("a"), pool(1))
        revision = store.list("IPPool").revision
        with store.watch(["IPPool"], revision) as watch:
            assert not watch.next(timeout=0.1)
            first = etcd_cluster.members[0]
            first.daemon.pause()
            assert store.get(pool_key("a")).value == pool(1)
            first.daemon.resume()
            store.update(pool_key("a"), pool(2))
            (event,) = watch.next(timeout=60)
            assert event.entry is not None
            assert event.entry.value == pool(2)


def tls_store(etcd: Etcd, timeout: float = 5) -> EtcdDatastore:
    """A client of all members."""
    certificate = etcd.certificate
    assert certificate is not None
    files = TlsFiles(certificate.ca, certificate.cert, certificate.key)
    return EtcdDatastore(EtcdSettings(tuple(etcd.endpoints), tls=files, timeout=timeout))


def count_up(store: EtcdDatastore, name: str, stop: threading.Event, done: list[int]) -> None:
    """Raise the object's number by compare-and-swap, each step once, whatever fails."""
    entry = store.create(pool_key(name), pool(0))
    number = 0
    while not stop.is_set():
        number += 1
        while True:
            try:
                entry = store.update(entry.key, pool(number), entry.revision)
                break
            except UnavailableError:
                # perhaps written: what is there tells
                entry = patiently(lambda: store.get(pool_key(name)))
                if entry.value["number"] == number:
                    break
        done[0] = number


def patiently(read: Callable[[], Any]) -> Any:
    while True:
        try:
            return read()
        except UnavailableError:
            time.sleep(0.05)


def test_leaders_killed_under_a_stream_of_swaps_lose_and_double_nothing(
    etcd_cluster: Etcd,
) -> None:
    """Two leaders in turn; four writers by compare-and-swap; two watches on other clients."""
    names = [f"w{n}" for n in range(4)]
    stores = [tls_store(etcd_cluster) for _ in range(3)]
    revision = stores[0].list("IPPool").revision
    stop, counts = threading.Event(), {name: [0] for name in names}
    writers = [
        threading.Thread(target=count_up, args=(stores[0], name, stop, counts[name]))
        for name in names
    ]
    watches = [store.watch(["IPPool", "Node"], revision) for store in stores[1:]]
    told: list[dict[str, list[int]]] = [{name: [] for name in names} for _ in watches]
    for writer in writers:
        writer.start()

    def listen(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not until():
            assert time.monotonic() < deadline
            for watch, heard in zip(watches, told, strict=True):
                for event in watch.next(timeout=0.05):
                    assert event.entry is not None
                    heard[event.key.name].append(event.entry.value["number"])

    def all_beyond(floor: dict[str, int]) -> bool:
        return all(counts[name][0] > floor[name] for name in names)

    for _ in range(2):
        floor = {name: counts[name][0] + 30 for name in names}
        listen(lambda floor=floor: all_beyond(floor))  # type: ignore[misc]
        leader = etcd_cluster.leader()
        leader.kill()
        floor = {name: counts[name][0] + 30 for name in names}
        listen(lambda floor=floor: all_beyond(floor))  # type: ignore[misc]
        leader.start()
    stop.set()
    for writer in writers:
        writer.join(60)
    final = {name: counts[name][0] for name in names}
    listen(lambda: all(heard[n][-1:] == [final[n]] for heard in told for n in names))
    for heard in told:
        assert heard == {name: list(range(final[name] + 1)) for name in names}
    for number, watch in enumerate(watches):
        assert not watch.next(timeout=0), number
        watch.close()
    assert {e.key.name: e.value["number"] for e in stores[2].list("IPPool").entries} == final
    for store in stores:
        store.close()


def test_without_a_majority_nothing_is_written_or_read(etcd_cluster: Etcd) -> None:
    with closing(tls_store(etcd_cluster)) as patient:
        patient.create(pool_key("a"), pool(1))
    with closing(tls_store(etcd_cluster, timeout=0.5)) as store:
        gone = etcd_cluster.members[:2]
        for member in gone:
            member.kill()
        with pytest.raises(UnavailableError):
            store.get(pool_key("a"))
        with pytest.raises(UnavailableError):
            store.update(pool_key("a"), pool(2))
        for member in gone:
            member.daemon.start()
        assert patiently(lambda: store.get(pool_key("a"))).value["number"] in (1, 2)


# --- who may ---


def test_a_certificate_of_another_authority_is_refused(etcd_cluster: Etcd, tmp_path: Path) -> None:
    assert etcd_cluster.certificate is not None
    other = Authority(tmp_path, "Another CA").issue("root")
    settings = EtcdSettings(tuple(etcd_cluster.endpoints), timeout=0.5)
    strange_server = TlsFiles(other.ca, etcd_cluster.certificate.cert, etcd_cluster.certificate.key)
    strange_client = TlsFiles(etcd_cluster.certificate.ca, other.cert, other.key)
    nobody = TlsFiles(etcd_cluster.certificate.ca)
    for files in (strange_server, strange_client, nobody):
        store = EtcdDatastore(replace(settings, tls=files))
        with pytest.raises(UnavailableError, match="no member answers"):
            store.get(pool_key("a"))
        store.close()
    missing = EtcdDatastore(replace(settings, tls=TlsFiles(tmp_path / "absent")))
    with pytest.raises(UnavailableError, match=r"MANX_ETCD_CA: .*absent: No such file"):
        missing.get(pool_key("a"))
    missing.close()


@pytest.fixture
def guarded() -> Iterator[EtcdMember]:
    """An etcd with users: root, and manx who may use /calico/, and guest who may nothing."""
    with single_node() as etcd:
        member = etcd.members[0]
        for name in ("root", "manx", "guest"):
            member.call("/v3/auth/user/add", {"name": name, "password": f"{name}-secret"})
            member.call("/v3/auth/role/add", {"name": name})
            member.call("/v3/auth/user/grant", {"user": name, "role": name})
        member.call(
            "/v3/auth/role/grant",
            {
                "name": "manx",
                "perm": {
                    "permType": "READWRITE",
                    "key": encode("/calico/"),
                    "range_end": encode("/calico0"),
                },
            },
        )
        member.call("/v3/auth/enable", {})
        yield member


def settings_of(member: EtcdMember, user: str, password: str = "") -> EtcdSettings:
    return EtcdSettings((member.endpoint,), user=user, password=password or f"{user}-secret")


def test_user_and_password(guarded: EtcdMember) -> None:
    environment = {"MANX_ETCD_USER": "manx", "MANX_ETCD_PASSWORD": "manx-secret"}
    store = connect(f"etcd://{guarded.endpoint}", environment)
    revision = store.list("IPPool").revision
    with store.watch(["IPPool"], revision) as watch:
        store.create(pool_key("a"), pool(1))
        assert [event.key for event in watch.next(timeout=30)] == [pool_key("a")]
        # Tokens live in the server's memory: after this every old one is refused.
        guarded.kill()
        guarded.daemon.start()
        guarded.daemon.wait(lambda: answers(guarded))
        # twice where the answer was lost
        patiently(lambda: store.update(pool_key("a"), pool(2)))
        assert {event.key for event in watch.next(timeout=30)} == {pool_key("a")}
    store.close()


def answers(member: EtcdMember) -> bool:
    try:
        return bool(member.call("/version"))
    except OSError:
        return False


def test_who_may_not(guarded: EtcdMember) -> None:
    for user, password, complaint in (
        ("guest", "", "user guest may not do that .* grant-permission"),
        ("manx", "wrong", "user manx: wrong user or password"),
        ("stranger", "", "user stranger: wrong user or password"),
    ):
        store = EtcdDatastore(settings_of(guarded, user, password))
        with pytest.raises(UnavailableError, match=complaint):
            store.get(pool_key("a"))
        with pytest.raises(UnavailableError, match=complaint):
            store.create(pool_key("a"), pool(1))
        with pytest.raises(UnavailableError, match=complaint):
            store.watch(["IPPool"], "1").next(timeout=60)
        store.close()
    nobody = EtcdDatastore(EtcdSettings((guarded.endpoint,)))
    with pytest.raises(UnavailableError, match="set MANX_ETCD_USER"):
        nobody.get(pool_key("a"))
    nobody.close()


def test_values_are_json_as_calico_writes_it(member: EtcdMember, store: EtcdDatastore) -> None:
    """Compact UTF-8, no escapes that a Go program would not read."""
    store.create(pool_key("p"), pool(1, note="é"))
    kvs = member.call(
        "/v3/kv/range", {"key": encode("/calico/resources/v3/projectcalico.org/ippools/p")}
    )["kvs"]
    assert orjson.loads(base64.b64decode(kvs[0]["value"])) == pool(1, note="é")
