"""Answers that are rare: of an API server that is busy, forgets, or is none; and of odd objects."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from api.errors import InvalidObjectError
from api.kinds import CALICO
from api.registry import parse_as
from datastore import kubernetes, kubernetes_watch
from datastore.interface import JSON, ConflictError, Entry, Key, UnavailableError
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from tests.contracts.backends import policy, policy_key
from tests.datastore.kubernetes_world import (
    NAMESPACE,
    NODE,
    delete_if_there,
    delete_pod,
    events,
    make,
    make_pod,
)
from tests.support.front import Asked, Front, Reply, event, status
from tests.support.kube import KubeApiserver
from tests.support.netns import eventually


@pytest.fixture
def front(server: KubeApiserver) -> Iterator[Front]:
    front = Front(server)
    yield front
    front.close()


@pytest.fixture
def distant(front: Front, tmp_path: Path) -> Iterator[KubernetesDatastore]:
    """The store, through ``front``."""
    config = front.kubeconfig(tmp_path / "fronted")
    with closing(KubernetesDatastore(KubernetesSettings(str(config), timeout=5))) as store:
        yield store


# --- objects that can't be read, one among good ones ---


def test_a_node_with_an_empty_address(server: KubeApiserver, store: KubernetesDatastore) -> None:
    """As a cloud's controller leaves it where there is no such address."""
    name = "k8s-store-half"
    with store.watch(["Node"], store.list("Node").revision) as watch:
        make(server, "/api/v1/nodes", {"metadata": {"name": name}})
        addresses = [
            {"type": "InternalIP", "address": "10.1.0.7"},
            {"type": "ExternalIP", "address": ""},
        ]
        path, patch = f"/api/v1/nodes/{name}/status", {"status": {"addresses": addresses}}
        media_type = "application/merge-patch+json"
        assert server.request("PATCH", path, patch, media_type=media_type)[0] == 200
        told = events(watch, 2)[-1].entry
    expected = [{"address": "10.1.0.7", "type": "InternalIP"}]
    assert told is not None
    assert told.value["spec"]["addresses"] == expected
    assert store.get(Key("Node", name)) == told
    assert {e.key.name for e in store.list("Node").entries} >= {name, NODE}
    parse_as("Node", told.value)
    assert server.request("DELETE", f"/api/v1/nodes/{name}")[0] == 200


def spoiled(value: JSON, revision: int = 1) -> JSON:
    """As no API server sends it: a list where a mapping must be."""
    odd = {"labels": ["no", "mapping"], "resourceVersion": str(revision)}
    return {**value, "metadata": {**value["metadata"], **odd}}


BAD = "k8s-store-bad"


@pytest.mark.parametrize(
    ("kind", "path", "name"),
    [
        ("Pod", "/api/v1/pods", BAD),
        ("WorkloadEndpoint", "/api/v1/pods", "k8s--store--node-k8s-k8s--store--bad-eth0"),
        ("KubernetesNode", "/api/v1/nodes", BAD),
        ("Node", "/api/v1/nodes", BAD),
        ("Profile", "/api/v1/namespaces", f"kns.{BAD}"),
        ("Profile", "/api/v1/serviceaccounts", f"ksa.{NAMESPACE}.{BAD}"),
    ],
)
def test_objects_that_can_not_be_read_are_reported_alone(
    server: KubeApiserver,
    front: Front,
    distant: KubernetesDatastore,
    store: KubernetesDatastore,
    kind: str,
    path: str,
    name: str,
) -> None:
    make_pod(server, BAD), make_pod(server, "k8s-store-good")
    of_namespace = path.replace("v1/s", f"v1/namespaces/{NAMESPACE}/s")
    if "pods" not in path:
        make(server, of_namespace, {"metadata": {"name": BAD}})
    found = server.request("GET", path)[1]
    value = next(item for item in found["items"] if item["metadata"]["name"] == BAD)

    def spoil(asked: Asked) -> Reply | None:
        if asked.path != path:
            return None
        if asked.watches:
            reached = int(found["metadata"]["resourceVersion"])
            types = enumerate(("MODIFIED", "DELETED"), start=reached + 1)
            return Reply(parts=[event(type_, spoiled(value, number)) for number, type_ in types])
        items = [spoiled(i) if i["metadata"]["name"] == BAD else i for i in found["items"]]
        return Reply(parts=[json.dumps({**found, "items": items}).encode()])

    keys = {entry.key for entry in store.list(kind).entries}
    front.instead = spoil
    listing = distant.list(kind)
    assert {entry.key for entry in listing.entries} == keys
    (key,) = (entry.key for entry in listing.entries if not is_readable(kind, entry))
    assert key.name == name
    with distant.watch([kind], listing.revision) as watch:
        changed, deleted = events(watch, 2)
    assert changed.key == deleted.key == key
    assert changed.entry is not None
    assert not is_readable(kind, changed.entry)
    assert deleted.entry is None
    for pod in (BAD, "k8s-store-good"):
        delete_pod(server, pod)
    if "pods" not in path:
        assert server.request("DELETE", f"{of_namespace}/{BAD}")[0] == 200


def is_readable(kind: str, entry: Entry) -> bool:
    try:
        parse_as(kind, entry.value)
    except InvalidObjectError as error:
        assert entry.key.name in str(error)
        assert "spec.unreadable" in str(error)
        return False
    return True


# --- streams that bring nothing ---


def watches(front: Front) -> list[Asked]:
    return [asked for asked in front.asked if asked.watches]


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([], "ended as soon as it had begun, again and again"),
        ([b"<html>Sign in</html>\n"], "of b'<html>Sign in</html>'"),
        ([b'{"type": "ADDED", "obj'], "cut in the middle of an event"),
    ],
)
def test_streams_that_bring_nothing_are_an_outage_and_no_flood(
    front: Front,
    distant: KubernetesDatastore,
    monkeypatch: pytest.MonkeyPatch,
    parts: list[bytes],
    problem: str,
) -> None:
    """As of a proxy that answers 200 whatever is asked."""
    monkeypatch.setattr(kubernetes_watch, "_OUTAGE_SECONDS", 2.0)
    front.instead = lambda asked: Reply(parts=parts) if asked.watches else None
    revision = distant.list("GlobalNetworkPolicy").revision
    with distant.watch(["GlobalNetworkPolicy"], revision) as watch:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=problem) as caught:
            watch.next(timeout=60)
        seconds = time.monotonic() - began
    assert caught.value.resume == {"GlobalNetworkPolicy": revision}
    # 0.05 s, 0.1 s, … 1 s, each at least half: at most five in the first second, then two
    assert 2 <= len(watches(front)) <= 7 + 2 * seconds


def test_streams_that_are_short_but_bring_something_are_followed(
    front: Front,
    distant: KubernetesDatastore,
    store: KubernetesDatastore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One event each, and one bookmark in between; then the server itself."""
    monkeypatch.setattr(kubernetes_watch, "_OUTAGE_SECONDS", 0.5)
    key = policy_key("k8s-store-short")
    delete_if_there(store, key)
    listing = store.list("GlobalNetworkPolicy")
    made = store.create(key, policy(key.name, 0))
    value = {**made.value, "metadata": {**made.value["metadata"]}}
    first = int(made.revision)
    told = 0

    def one(asked: Asked) -> Reply | None:
        nonlocal told
        if not asked.watches or told == 30:
            return None
        told += 1
        value["metadata"]["resourceVersion"] = str(first + told)
        return Reply(parts=[event("BOOKMARK" if told % 3 == 0 else "MODIFIED", value)])

    front.instead = one
    with distant.watch(["GlobalNetworkPolicy"], listing.revision) as watch:
        found = events(watch, 20)
        eventually(lambda: len(watches(front)) > 30)
    assert [event.revision for event in found] == [
        str(first + number) for number in range(1, 31) if number % 3
    ]
    # each goes on where the last one, or its bookmark, had come to
    reached = [asked.query["resourceVersion"] for asked in watches(front)]
    assert reached[1:31] == [str(first + number) for number in range(1, 31)]
    assert {asked.query["allowWatchBookmarks"] for asked in watches(front)} == {"true"}
    store.delete(key)


# --- writes in two parts ---


@pytest.mark.parametrize("meanwhile", ["labelled", "told", "made again", "deleted"])
def test_an_object_that_others_change_before_its_status_is_written(
    front: Front, distant: KubernetesDatastore, store: KubernetesDatastore, meanwhile: str
) -> None:
    """The API server takes the status by itself, at the revision of the object without it."""
    key = Key("KubeControllersConfiguration", "k8s-store-status")
    delete_if_there(store, key)
    value = {"apiVersion": CALICO, "kind": key.kind, "metadata": {"name": key.name}}
    value |= {"spec": {"controllers": {}}}
    ours, theirs = ({"environmentVars": {"WHO": who}} for who in ("ours", "theirs"))

    def change(asked: Asked) -> Reply | None:
        if asked.path.endswith("/status"):
            front.instead = lambda _: None
            found = store.get(key).value
            if meanwhile in ("made again", "deleted"):
                store.delete(key)
            if meanwhile == "made again":
                store.create(key, value)
            elif meanwhile == "labelled":
                found["metadata"]["labels"] = {"changed": "meanwhile"}
                store.update(key, found)
            elif meanwhile == "told":
                store.update(key, found | {"status": theirs})
        return None

    front.instead = change
    written = distant.create(key, value | {"status": ours}).value
    expected = {"labelled": ours, "told": theirs, "made again": None, "deleted": None}
    assert written.get("status") == expected[meanwhile]
    assert ("labels" in written["metadata"]) == (meanwhile == "labelled")
    if meanwhile != "deleted":
        assert store.get(key).value == written
        store.delete(key)


# --- a server that is busy ---


@pytest.mark.parametrize("verb", ["read", "written"])
def test_a_busy_server_is_asked_again_when_it_says_so(
    front: Front, distant: KubernetesDatastore, store: KubernetesDatastore, verb: str
) -> None:
    """As priority and fairness answers: nothing was carried out, and how long to wait."""
    key = policy_key("k8s-store-busy")
    delete_if_there(store, key)
    if verb == "read":
        store.create(key, policy(key.name, 1))
    busy = status(429, "TooManyRequests", "too many requests, please try again later")

    def turned_away(asked: Asked) -> Reply | None:
        return Reply(429, [busy], {"Retry-After": "1"}) if len(front.asked) <= 2 else None

    front.instead = turned_away
    found = distant.get(key) if verb == "read" else distant.create(key, policy(key.name, 1))
    assert found == store.get(key)
    times = [asked.at for asked in front.asked]
    assert len(times) == 3
    assert all(later - earlier >= 1 for earlier, later in pairwise(times))
    store.delete(key)


def test_a_server_that_stays_busy_is_an_outage(front: Front, distant: KubernetesDatastore) -> None:
    """Asked again with a growing pause, where it names none, until the time-out."""
    front.instead = lambda _: Reply(429, [status(429, "TooManyRequests", "not now")])
    with pytest.raises(UnavailableError, match="429 not now"):
        distant.get(policy_key("a"))
    # 0.1 s, 0.2 s, … 1 s, each at least half, in 5 s
    assert 3 <= len(front.asked) <= 14


def test_what_the_server_said_counts_and_not_that_time_ran_out_over_the_last_try(
    front: Front, tmp_path: Path
) -> None:
    def late(_: Asked) -> Reply:
        if len(front.asked) > 1:
            time.sleep(2)
        return Reply(429, [status(429, "TooManyRequests", "not now")])

    front.instead = late
    settings = KubernetesSettings(str(front.kubeconfig(tmp_path / "config")), timeout=1)
    with closing(KubernetesDatastore(settings)) as impatient:
        with pytest.raises(UnavailableError, match="429 not now"):
            impatient.get(policy_key("a"))
        assert len(front.asked) > 1


@pytest.mark.parametrize("code", [500, 503])
def test_a_write_that_may_have_been_carried_out_is_not_repeated(
    front: Front, distant: KubernetesDatastore, code: int
) -> None:
    front.instead = lambda _: Reply(code, [status(code, "InternalError", "etcd: time-out")])
    with pytest.raises(UnavailableError, match="is not known: read again"):
        distant.create(policy_key("a"), policy("a"))
    assert len(front.asked) == 1


# --- lists in parts, and deletions of what was read ---


def test_a_list_that_is_forgotten_between_two_parts_begins_anew(
    server: KubeApiserver,
    front: Front,
    distant: KubernetesDatastore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what went meanwhile, after its part had come, is not in it."""
    monkeypatch.setattr(kubernetes, "_PART", 2)
    path = "/api/v1/namespaces/default/serviceaccounts"
    names = [f"anew-{number}" for number in range(5)]
    for name in names:
        make(server, path, {"metadata": {"name": name}})
    expired = status(410, "Expired", "The provided continue parameter is too old")
    forgotten = 0

    def forget(asked: Asked) -> Reply | None:
        nonlocal forgotten
        if "continue" not in asked.query or forgotten:
            return None
        forgotten += 1
        assert server.request("DELETE", f"{path}/{names[0]}")[0] == 200
        return Reply(410, [expired])

    front.instead = forget
    found = distant.list("ServiceAccount", "default", prefix="anew-")
    assert [entry.key.name for entry in found.entries] == names[1:]
    assert forgotten == 1
    assert {asked.query["limit"] for asked in front.asked} == {"2"}
    for name in names[1:]:
        server.request("DELETE", f"{path}/{name}")


def test_a_list_that_is_forgotten_again_and_again_is_an_outage(
    front: Front, distant: KubernetesDatastore
) -> None:
    front.instead = lambda _: Reply(410, [status(410, "Expired", "too old")])
    with pytest.raises(UnavailableError, match="forgot ServiceAccount while it was listed"):
        distant.list("ServiceAccount")


def test_what_is_deleted_is_the_object_that_was_read(
    server: KubeApiserver, front: Front, distant: KubernetesDatastore, store: KubernetesDatastore
) -> None:
    """Also where another of that name has its revision, as after a restored backup."""
    key = policy_key("k8s-store-again")
    delete_if_there(store, key)
    first = store.create(key, policy(key.name, 1))

    def make_again(asked: Asked) -> Reply | None:
        if asked.method != "DELETE":
            return None
        assert asked.body["preconditions"]["resourceVersion"] == first.revision
        store.delete(key)
        store.create(key, policy(key.name, 2))
        only = {"preconditions": {"uid": asked.body["preconditions"]["uid"]}}
        code, answer = server.request("DELETE", asked.path, only)
        return Reply(code, [json.dumps(answer).encode()])

    front.instead = make_again
    with pytest.raises(ConflictError):
        distant.delete(key, first.revision)
    assert store.get(key).value["spec"]["order"] == 2
    store.delete(key)
