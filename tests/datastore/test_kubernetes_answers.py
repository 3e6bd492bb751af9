"""Answers that are rare: of an API server that is busy, forgets, or is none; and of odd objects."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from api.errors import InvalidObjectError
from api.registry import parse_as
from datastore import kubernetes_watch
from datastore.interface import JSON, Entry, Key, UnavailableError
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from tests.contracts.backends import policy, policy_key
from tests.datastore.kubernetes_world import (
    NODE,
    delete_if_there,
    delete_pod,
    events,
    make,
    make_pod,
)
from tests.support.front import Asked, Front, Reply, event
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
    """As no API server sends it: a number where a text must be."""
    odd = {"labels": {"number": 1}, "resourceVersion": str(revision)}
    return {**value, "metadata": {**value["metadata"], **odd}}


@pytest.mark.parametrize("kind", ["Pod", "WorkloadEndpoint", "Node", "KubernetesNode"])
def test_objects_that_can_not_be_read_are_reported_alone(
    server: KubeApiserver,
    front: Front,
    distant: KubernetesDatastore,
    store: KubernetesDatastore,
    kind: str,
) -> None:
    of_nodes = kind in ("Node", "KubernetesNode")
    path = "/api/v1/nodes" if of_nodes else "/api/v1/pods"
    bad, good = ("k8s-store-bad", NODE) if of_nodes else ("unreadable", "readable")
    if of_nodes:
        make(server, path, {"metadata": {"name": bad}})
    else:
        make_pod(server, bad), make_pod(server, good)
    found = server.request("GET", path)[1]
    value = next(item for item in found["items"] if item["metadata"]["name"] == bad)

    def spoil(asked: Asked) -> Reply | None:
        if asked.path != path:
            return None
        if asked.watches:
            reached = int(found["metadata"]["resourceVersion"])
            types = enumerate(("MODIFIED", "DELETED"), start=reached + 1)
            return Reply(parts=[event(type_, spoiled(value, number)) for number, type_ in types])
        items = [spoiled(i) if i["metadata"]["name"] == bad else i for i in found["items"]]
        return Reply(parts=[json.dumps({**found, "items": items}).encode()])

    keys = {entry.key for entry in store.list(kind).entries}
    front.instead = spoil
    listing = distant.list(kind)
    assert {entry.key for entry in listing.entries} == keys
    (key,) = (entry.key for entry in listing.entries if not is_readable(kind, entry))
    assert bad in (key.name, *key.name.split("-"))
    with distant.watch([kind], listing.revision) as watch:
        changed, deleted = events(watch, 2)
    assert changed.key == deleted.key == key
    assert changed.entry is not None
    assert not is_readable(kind, changed.entry)
    assert deleted.entry is None
    if of_nodes:
        assert server.request("DELETE", f"{path}/{bad}")[0] == 200
    else:
        for name in (bad, good):
            delete_pod(server, name)


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
    # 0.05 s, 0.1 s, … 1 s, each at least half: five in the first second, then two at most
    assert 4 <= len(watches(front)) <= 7 + 2 * seconds


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
    store.delete(key)
