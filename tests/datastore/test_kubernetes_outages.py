"""Watches that are cut, and API servers that are down, hang, restart or forget."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from datastore import kubernetes_watch
from datastore.follower import Follower, InSync, Update
from datastore.interface import (
    Entry,
    Key,
    RevisionGoneError,
    UnavailableError,
)
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from tests.contracts.backends import policy, policy_key
from tests.datastore.kubernetes_world import (
    client,
    delete_if_there,
    kubeconfig,
    make,
    patiently,
    through,
)
from tests.support.crds import install_crds
from tests.support.kube import ADMIN, NEXT_ADMIN, KubeApiserver, api_server
from tests.support.netns import eventually
from tests.support.relay import Relay


def number(entry: Entry | None) -> int | None:
    return None if entry is None else entry.value["spec"]["order"]


def test_a_watch_cut_in_a_burst_goes_on_where_it_was(
    server: KubeApiserver, store: KubernetesDatastore, tmp_path: Path
) -> None:
    name = "k8s-store-burst"
    delete_if_there(store, policy_key(name))
    relay = Relay(server.url.removeprefix("https://"))
    with closing(through(server, relay, tmp_path / "relayed")) as distant:
        revision = store.create(policy_key(name), policy(name, 0)).revision
        with distant.watch(["GlobalNetworkPolicy", "BGPPeer"], revision) as watch:
            writing = threading.Thread(
                target=lambda: [
                    store.update(policy_key(name), policy(name, n)) for n in range(1, 301)
                ]
            )
            writing.start()
            told: list[int | None] = []
            while 300 not in told:
                before = len(told)
                told += [number(event.entry) for event in watch.next(timeout=30)]
                if before // 50 != len(told) // 50:
                    relay.sever()
            writing.join(30)
            assert not watch.next(timeout=0)
        assert told == list(range(1, 301))
    relay.close()


class Listing(KubernetesDatastore):
    """Notes which kinds are listed."""

    def __init__(self, server: KubeApiserver, relay: Relay, path: Path) -> None:
        super().__init__(through(server, relay, path).settings)
        self.listed: list[str] = []

    def list(self, kind: str, *args: Any, **options: Any) -> Any:
        self.listed.append(kind)
        return super().list(kind, *args, **options)


def test_nobody_waits_for_connections_that_were_replaced(
    server: KubeApiserver, tmp_path: Path
) -> None:
    """More ask at a time than there are connections, and these are cut again and again."""
    relay = Relay(server.url.removeprefix("https://"))
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    through(server, relay, tmp_path / "relayed").close()
    settings = KubernetesSettings(str(tmp_path / "relayed"), timeout=20)
    with closing(KubernetesDatastore(settings)) as distant:

        def ask() -> None:
            for _ in range(5):
                distant.get(Key("Namespace", "default"))
                done.put(1)

        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for count in range(120):
            done.get(timeout=60)
            if count % 20 == 10:
                relay.sever()
        for thread in threads:
            thread.join(30)
    relay.close()


@pytest.mark.parametrize(
    "seconds", [0, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(200)])]
)
def test_an_outage_is_caught_up_with_exactly(
    server: KubeApiserver,
    store: KubernetesDatastore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
) -> None:
    """And without listing anything again, which would cost every node's whole state."""
    if not seconds:
        monkeypatch.setattr(kubernetes_watch, "_OUTAGE_SECONDS", 0.1)
    keys = [policy_key(f"k8s-store-{name}") for name in ("deleted", "changed", "same", "new")]
    deleted, changed, same, new = keys
    delete_if_there(store, *keys)
    for key in keys[:3]:
        store.create(key, policy(key.name, 1))
    relay = Relay(server.url.removeprefix("https://"))
    with closing(Listing(server, relay, tmp_path / "relayed")) as distant:
        heard: queue.SimpleQueue[Update | InSync] = queue.SimpleQueue()
        follower = Follower(distant, ["GlobalNetworkPolicy", "Namespace"], heard.put)
        follower.start()
        while heard.get(timeout=30) != InSync():
            pass
        with relay.cut():
            store.delete(deleted)
            store.update(changed, policy(changed.name, 2))
            began = time.monotonic()
            eventually(lambda: "no answer" in (follower.problem or ""), 30)
            eventually(lambda: time.monotonic() >= began + seconds, seconds + 1)
            assert not follower.in_sync
            assert heard.empty()
            store.create(new, policy(new.name, 3))
        told = [heard.get(timeout=60) for _ in range(3)]
        assert {brief(update) for update in told} == {(deleted, None), (changed, 2), (new, 3)}
        store.update(same, policy(same.name, 4))
        assert brief(heard.get(timeout=30)) == (same, 4)
        assert heard.empty()
        eventually(lambda: follower.in_sync)
        assert distant.listed == ["GlobalNetworkPolicy", "Namespace"]
        follower.stop()
    relay.close()


def brief(update: Update | InSync) -> tuple[Key, int | None]:
    assert isinstance(update, Update)
    return update.key, None if update.value is None else update.value["spec"]["order"]


def test_a_revision_of_the_future_is_not_waited_for(
    server: KubeApiserver, store: KubernetesDatastore
) -> None:
    """As after the cluster's data were restored from a backup."""
    reached = store.list("Namespace").revision
    make(server, "/api/v1/namespaces", {"metadata": {"name": "k8s-store-since"}})
    positions = {"Namespace": reached, "GlobalNetworkPolicy": "9999999999"}
    with (
        pytest.raises(RevisionGoneError, match="restored from a backup") as caught,
        store.watch(positions, positions) as watch,
    ):
        watch.next(timeout=30)
    # what the other stream had brought by then was told to nobody
    assert caught.value.resume == {"Namespace": reached}
    for revision in ("", "x", "1,2,3"):
        with pytest.raises(RevisionGoneError):
            store.watch(["GlobalNetworkPolicy"], revision)


@pytest.mark.timeout(300)  # three starts of a server
def test_a_server_that_is_down_restarts_and_rotates_its_tokens(tmp_path: Path) -> None:
    """One server of its own, because every step takes one away."""
    heard: queue.SimpleQueue[Update | InSync] = queue.SimpleQueue()
    token = tmp_path / "token"
    token.write_text(ADMIN)
    with api_server() as server:
        install_crds(server)
        config = kubeconfig(server, tmp_path / "config", {"tokenFile": str(token)})
        server.kill()
        store = KubernetesDatastore(KubernetesSettings(str(config), timeout=5))
        # down at the start
        complaint = f"{server.url}: no answer .*refused"
        with pytest.raises(UnavailableError, match=complaint):
            store.get(policy_key("a"))
        with pytest.raises(UnavailableError, match=complaint):
            store.create(policy_key("a"), policy("a"))
        follower = Follower(store, ["GlobalNetworkPolicy", "Namespace"], heard.put)
        follower.start()
        eventually(lambda: "no answer" in (follower.problem or ""))
        assert heard.empty()
        server.start()
        while heard.get(timeout=60) != InSync():
            pass
        # a restart mid-way: the memory of events is gone with the old process
        store.create(policy_key("a"), policy("a", 1))
        assert brief(heard.get(timeout=30)) == (policy_key("a"), 1)
        server.kill()
        without = server.directory / "tokens.csv"
        tokens = without.read_text().splitlines()
        without.write_text("\n".join(line for line in tokens if not line.startswith(ADMIN)))
        server.token = NEXT_ADMIN
        server.start()
        # the old token is no longer good: the file is read again
        token.write_text(NEXT_ADMIN)
        patiently(lambda: store.update(policy_key("a"), policy("a", 2)))
        assert brief(heard.get(timeout=60)) == (policy_key("a"), 2)
        store.update(policy_key("a"), policy("a", 3))
        assert brief(heard.get(timeout=60)) == (policy_key("a"), 3)
        assert heard.empty()
        follower.stop()
        store.close()


def test_a_server_that_hangs_is_an_outage_with_an_end(tmp_path: Path) -> None:
    with api_server() as server, closing(client(server, timeout=1)) as store:
        assert patiently(lambda: store.list("Namespace")).entries
        server.daemon.pause()
        with pytest.raises(UnavailableError, match="no answer"):
            store.list("Namespace")
        with pytest.raises(UnavailableError, match="not known: read again"):
            store.create(Key("Namespace", "late"), {"metadata": {"name": "late"}})
        server.daemon.resume()
        assert patiently(lambda: store.list("Namespace")).entries
