"""The stores under the contract, and what other processes do with them."""

from __future__ import annotations

import base64
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from uuid import uuid4

import orjson

from datastore.etcd import EtcdDatastore
from datastore.etcd_client import EtcdSettings
from datastore.etcd_keys import path_of
from datastore.interface import JSON, AlreadyExistsError, ConflictError, Datastore, Key
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from datastore.sqlite import SqliteDatastore
from tests.support.crds import install_crds
from tests.support.etcd import Etcd
from tests.support.kube import KubeApiserver
from tests.support.relay import Relay

processes = get_context("spawn")
_GARBAGE = b'{"metadata": {"name"'


@dataclass(frozen=True, slots=True)
class Backend:
    """One store. ``connect`` makes a further client of it, in this or (pickled) any process.

    ``forget_history`` makes the store lose the changes so far, as time would; it writes to an
    object of its own, and calls its argument after each write. ``cuttable`` gives a client, and
    a context manager in which that client's watches hear nothing. ``spoil`` leaves a
    GlobalNetworkPolicy of that name in the store which no program can read.
    """

    connect: Callable[[], Datastore]
    forget_history: Callable[[Callable[[], object]], None]
    cuttable: Callable[[], AbstractContextManager[tuple[Datastore, Cut]]]
    spoil: Callable[[str], None]


Cut = Callable[[], AbstractContextManager[None]]


def sqlite(directory: Path) -> Backend:
    file = directory / "datastore.db"
    connect = partial(SqliteDatastore, file)
    return Backend(
        connect,
        partial(_forget_sqlite, file),
        partial(_idle, connect),
        partial(_spoil_sqlite, file),
    )


@contextmanager
def _idle(connect: Callable[[], Datastore]) -> Iterator[tuple[Datastore, Cut]]:
    """A watch that reads when it is asked hears nothing as long as it is not."""
    store = connect()
    yield store, nullcontext
    store.close()


def _forget_sqlite(file: Path, meanwhile: Callable[[], object]) -> None:
    """Changes are forgotten by count, at every 250th revision."""
    store = SqliteDatastore(file, history=5)
    entry = store.create(policy_key("filler"), policy("filler"))
    for _ in range(250):
        entry = store.update(entry.key, entry.value)
        meanwhile()
    store.close()


def _spoil_sqlite(file: Path, name: str) -> None:
    key = policy_key(name)
    with closing(sqlite3.connect(file)) as connection, connection:
        revision = connection.execute(
            "INSERT INTO changes (time, kind, namespace, name, value) VALUES (?, ?, '', ?, ?)",
            (int(time.time()), key.kind, key.name, _GARBAGE),
        ).lastrowid
        connection.execute(
            "INSERT INTO objects (kind, namespace, name, revision, value) VALUES (?, '', ?, ?, ?)",
            (key.kind, key.name, revision, _GARBAGE),
        )


def etcd(server: Etcd) -> Backend:
    """The server is shared: everything in it is deleted first."""
    everything = {"key": _base64(b"/calico/"), "range_end": _base64(b"/calico0")}
    server.members[0].call("/v3/kv/deleterange", everything)
    connect = partial(EtcdDatastore, EtcdSettings(tuple(server.endpoints)))
    return Backend(
        connect,
        partial(_forget_etcd, server),
        partial(_through_relay, server),
        partial(_spoil_etcd, server),
    )


def _forget_etcd(server: Etcd, meanwhile: Callable[[], object]) -> None:
    store = EtcdDatastore(EtcdSettings(tuple(server.endpoints)))
    entry = store.create(policy_key("filler"), policy("filler"))
    for _ in range(5):
        entry = store.update(entry.key, entry.value)
        meanwhile()
    store.close()
    compact(server, entry.revision)


def compact(server: Etcd, revision: str) -> None:
    """Let an etcd forget what was before a revision."""
    server.members[0].call("/v3/kv/compaction", {"revision": revision, "physical": True})


def _spoil_etcd(server: Etcd, name: str) -> None:
    path = path_of(policy_key(name), {}).encode()
    server.members[0].call("/v3/kv/put", {"key": _base64(path), "value": _base64(_GARBAGE)})


@contextmanager
def _through_relay(server: Etcd) -> Iterator[tuple[Datastore, Cut]]:
    relay = Relay(server.endpoints[0])
    store = EtcdDatastore(EtcdSettings((relay.endpoint,)))
    yield store, relay.cut
    store.close()
    relay.close()


def kubernetes(server: KubeApiserver) -> Backend:
    """The server is shared: the objects of the contract are deleted first."""
    store = _kubernetes_store(server)
    for kind in ("GlobalNetworkPolicy", "NetworkPolicy", "BGPPeer"):
        for entry in store.list(kind).entries:
            store.delete(entry.key)
    store.close()
    return Backend(
        partial(KubernetesDatastore, KubernetesSettings(str(server.kubeconfig))),
        partial(_forget_kubernetes, server),
        partial(_through_tls_relay, server),
        partial(_spoil_kubernetes, server),
    )


def _kubernetes_store(server: KubeApiserver) -> KubernetesDatastore:
    return KubernetesDatastore(KubernetesSettings(str(server.kubeconfig)))


def prepare(server: KubeApiserver) -> None:
    """Install the CRDs, and the namespaces of the contract."""
    install_crds(server)
    for name in ("one", "one-b", "two", "three", "n"):
        server.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})


def _forget_kubernetes(server: KubeApiserver, meanwhile: Callable[[], object]) -> None:
    store = _kubernetes_store(server)
    entry = store.create(policy_key("filler"), policy("filler"))
    for number in range(5):
        entry = store.update(entry.key, policy("filler", number))
        meanwhile()
    store.close()
    compact(server.etcd, entry.revision)


def _spoil_kubernetes(server: KubeApiserver, name: str) -> None:
    """JSON that is no policy: for other bytes the API server itself has no answer."""
    bad = {**policy(name), "spec": ["no", "spec"]}
    bad["metadata"] |= {"uid": str(uuid4()), "creationTimestamp": "2026-01-01T00:00:00Z"}
    path = f"/registry/projectcalico.org/globalnetworkpolicies/{name}".encode()
    value = orjson.dumps(bad)
    server.etcd.members[0].call("/v3/kv/put", {"key": _base64(path), "value": _base64(value)})


@contextmanager
def _through_tls_relay(server: KubeApiserver) -> Iterator[tuple[Datastore, Cut]]:
    relay = Relay(server.url.removeprefix("https://"))
    kubeconfig = server.directory / "relayed"
    kubeconfig.write_text(
        server.kubeconfig.read_text().replace(server.url, f"https://{relay.endpoint}")
    )
    store = KubernetesDatastore(KubernetesSettings(str(kubeconfig)))
    yield store, relay.cut
    store.close()
    relay.close()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def nothing() -> None:
    """What happens meanwhile, when nothing does."""


def policy_key(name: str) -> Key:
    return Key("GlobalNetworkPolicy", name)


def policy(name: str, order: int = 0) -> JSON:
    """An object that every store takes, with a number in it."""
    return _v3("GlobalNetworkPolicy", {"name": name}, {"order": order, "selector": "all()"})


def namespaced_key(namespace: str, name: str) -> Key:
    return Key("NetworkPolicy", name, namespace)


def namespaced(namespace: str, name: str) -> JSON:
    metadata: JSON = {"name": name, "namespace": namespace}
    return _v3("NetworkPolicy", metadata, {"selector": "all()"})


def peer_key(name: str) -> Key:
    return Key("BGPPeer", name)


def peer(name: str, as_number: int = 64512) -> JSON:
    return _v3("BGPPeer", {"name": name}, {"peerIP": "192.0.2.1", "asNumber": as_number})


def order(value: JSON) -> int:
    """The number ``policy`` put in."""
    number: int = value["spec"]["order"]
    return number


def _v3(kind: str, metadata: JSON, spec: JSON) -> JSON:
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": kind,
        "metadata": metadata,
        "spec": spec,
    }


def count_up(connect: Callable[[], Datastore], name: str, times: int) -> None:
    """Add one to an object's number, ``times`` times, by compare-and-swap."""
    store = connect()
    for _ in range(times):
        while True:
            entry = store.get(policy_key(name))
            try:
                store.update(entry.key, policy(name, order(entry.value) + 1), entry.revision)
                break
            except ConflictError:
                continue
    store.close()


def write_series(connect: Callable[[], Datastore], name: str, times: int) -> None:
    """Create an object with number 1 and raise it to ``times``; then delete it."""
    store = connect()
    store.create(policy_key(name), policy(name, 1))
    for number in range(2, times + 1):
        store.update(policy_key(name), policy(name, number))
    store.delete(policy_key(name))
    store.close()


def create_others_too(connect: Callable[[], Datastore], number: int, count: int) -> None:
    """Try to create ``count`` objects that others also try to create."""
    store = connect()
    for i in range(count):
        try:
            store.create(policy_key(f"race-{i}"), policy(f"race-{i}", number))
        except AlreadyExistsError:
            continue
    store.close()


def start(target: Callable[..., None], *args: object) -> BaseProcess:
    process = processes.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def join(*started: BaseProcess) -> None:
    """Wait for processes that must end well."""
    for process in started:
        process.join(60)
        assert process.exitcode == 0, f"{process.name} ended with {process.exitcode}"
