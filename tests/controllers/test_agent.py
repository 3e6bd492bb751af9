"""The program: several processes, of which one works, and another when that is killed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from controllers.agent import SOCKET
from controllers.lease import LEASE
from datastore.connect import connect
from datastore.interface import Datastore
from datastore.sqlite import SqliteDatastore
from felix.status import query
from manxctl.main import main
from tests.controllers.world import add_nodes, assign, plug, put
from tests.ipam.world import add_pool, allocated
from tests.support.daemon import Daemon
from tests.support.etcd import single_node

ROOT = Path(__file__).resolve().parents[2]


class Controllers:
    """Processes of the program, each with a run directory of its own."""

    def __init__(self, tmp_path: Path, url: str, **variables: str) -> None:
        self._tmp_path = tmp_path
        self._variables = {
            "MANX_DATASTORE": url,
            "MANX_LEASE_SECONDS": "5",  # a busy machine may take seconds to renew it
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        self.daemons: dict[str, Daemon] = {}

    def start(self, name: str) -> Daemon:
        variables = self._variables | {
            "MANX_NODENAME": name,
            "MANX_RUN_DIR": str(self._tmp_path / name),
        }
        command = [sys.executable, "-m", "controllers"]
        daemon = Daemon(command, self._tmp_path / f"{name}.log", variables)
        daemon.start()
        self.daemons[name] = daemon
        daemon.wait(lambda: self.status(name) is not None, 60)
        return daemon

    def status(self, name: str) -> dict[str, Any] | None:
        try:
            return query(self._tmp_path / name, name=SOCKET)
        except OSError:
            return None

    def until(self, name: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The status of a process once it is so."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            status = self.status(name)
            found.append(status or {})
            return status is not None and holds(status)

        self.daemons[name].wait(look, 60)
        return found[-1]

    def stop(self) -> None:
        for daemon in self.daemons.values():
            daemon.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "datastore.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteDatastore]:
    store = SqliteDatastore(path)
    yield store
    store.close()


@pytest.fixture
def controllers(tmp_path: Path, path: Path) -> Iterator[Controllers]:
    made = Controllers(tmp_path, f"sqlite://{path}")
    yield made
    made.stop()


def quick(store: Datastore) -> None:
    """Rounds every second, and a short grace period."""
    node = {"reconcilerPeriod": "1s", "leakGracePeriod": "1s"}
    put(store, "KubeControllersConfiguration", "default", {"controllers": {"node": node}})


def prepare(store: Datastore) -> set[Any]:
    """A cluster with a pod and a leak; the addresses that must stay."""
    add_pool(store, "pods", "10.0.0.0/26", 28)
    add_nodes(store, "n1")
    assign(store, "n1", "leaked", "c1")
    return set(plug(store, "n1", "web", "c2"))


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_leads_and_another_takes_over(controllers: Controllers, store: SqliteDatastore) -> None:
    quick(store)
    kept = prepare(store)
    one = controllers.start("one")
    status = controllers.until("one", lambda s: s["leading"] and s["ready"])
    assert status["holder"] == status["identity"]
    controllers.start("two")
    standby = controllers.until("two", lambda s: s["ready"])
    assert (standby["leading"], standby["last_round"]) == (False, None)
    wait(lambda: set(allocated(store)) == kept)
    controllers.until("one", lambda s: s["collected"].get("addresses") == 1)

    assign(store, "n1", "again", "c3")
    one.kill()
    controllers.until("two", lambda s: s["leading"] and s["holder"].startswith("two_"))
    wait(lambda: set(allocated(store)) == kept)
    assert store.get(LEASE).value["spec"]["leaseTransitions"] == 1


def test_sigterm_gives_the_lease_up(
    controllers: Controllers, store: SqliteDatastore, tmp_path: Path
) -> None:
    daemon = controllers.start("one")
    controllers.until("one", lambda s: s["leading"])
    daemon.stop()
    assert store.get(LEASE).value["spec"]["holderIdentity"] == ""
    assert controllers.status("one") is None
    result = ask(tmp_path / "one")
    assert (result.exit_code, "does manx-controllers run here?" in result.stderr) == (1, True)


def test_a_stopped_leader_does_no_more_work(
    controllers: Controllers, store: SqliteDatastore
) -> None:
    """Not even in the middle of a round: it finds that it does not lead any more."""
    one = controllers.start("one")
    controllers.until("one", lambda s: s["leading"])
    controllers.start("two")
    one.pause()
    controllers.until("two", lambda s: s["leading"])
    one.resume()
    controllers.until("one", lambda s: not s["leading"] and s["holder"].startswith("two_"))


def ask(run_dir: Path, *options: str) -> Result:
    """``manxctl ipam status``."""
    environment = {"MANX_RUN_DIR": str(run_dir)}
    return CliRunner().invoke(main, ["ipam", "status", *options], env=environment)


def test_what_disagrees_is_told(
    controllers: Controllers, store: SqliteDatastore, tmp_path: Path
) -> None:
    quick(store)
    prepare(store)
    configuration = {"reconcilerPeriod": "1s", "leakGracePeriod": "0s"}
    entry = store.list("KubeControllersConfiguration").entries[0]
    spec = {"controllers": {"node": configuration}}
    store.update(entry.key, entry.value | {"spec": spec})
    controllers.start("one")
    status = controllers.until("one", lambda s: bool((s["last_round"] or {}).get("findings")))
    result = ask(tmp_path / "one")
    assert result.exit_code == 0
    assert "controllers: ready, leads" in result.stdout
    assert "findings: 1 leaked address" in result.stdout
    assert json.loads(ask(tmp_path / "one", "-o", "json").stdout)["leading"]
    last = status["last_round"]
    assert last["findings"] == {"leaked address": 1}
    assert "shop/leaked" in last["shown"]["leaked address"][0]
    assert last["counts"]["addresses"] == 2
    assert status["collected"] == {}


def test_settings_that_make_no_sense_stop_the_work(
    controllers: Controllers, store: SqliteDatastore
) -> None:
    node = {"leakGracePeriod": "soon"}
    put(store, "KubeControllersConfiguration", "default", {"controllers": {"node": node}})
    controllers.start("one")
    status = controllers.until("one", lambda s: "leakGracePeriod" in str(s["errors"]))
    assert not status["ready"]
    quicker = store.list("KubeControllersConfiguration").entries[0]
    store.update(quicker.key, quicker.value | {"spec": {"controllers": {"node": {}}}})
    controllers.until("one", lambda s: s["ready"])


@pytest.mark.parametrize(
    ("kind", "name", "spec", "reason"),
    [
        ("ClusterInformation", "default", {"datastoreReady": False}, "is being moved"),
        ("KubeControllersConfiguration", "default", {"controllers": {}}, "no node controller"),
        (
            "KubeControllersConfiguration",
            "default",
            {"controllers": {"node": {"reconcilerPeriod": "0s"}}},
            "reconcilerPeriod",
        ),
    ],
)
def test_when_nothing_is_to_be_done(
    controllers: Controllers,
    store: SqliteDatastore,
    kind: str,
    name: str,
    spec: dict[str, Any],
    reason: str,
    tmp_path: Path,
) -> None:
    put(store, kind, name, spec)
    controllers.start("one")
    status = controllers.until("one", lambda s: s["last_round"] is not None)
    assert reason in status["last_round"]["idle"]
    assert reason in ask(tmp_path / "one").stdout
    assert status["last_round"]["counts"] == {}


def test_etcd_that_comes_and_goes(tmp_path: Path) -> None:
    with single_node() as etcd, ExitStack() as stack:
        url = f"etcd://{etcd.endpoints[0]}"
        store = connect(url)
        stack.callback(store.close)
        quick(store)
        kept = prepare(store)
        etcd.kill()
        controllers = Controllers(tmp_path, url)
        stack.callback(controllers.stop)
        controllers.start("one")
        controllers.until("one", lambda s: s["errors"] and not s["ready"])
        etcd.start()
        controllers.until("one", lambda s: s["leading"] and s["ready"])
        wait(lambda: set(allocated(store)) == kept)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MANX_LEASE_SECONDS", "0"), ("MANX_DATASTORE", "file:x"), ("MANX_KUBERNETES", "x:")],
)
def test_what_is_wrong_with_the_environment(tmp_path: Path, variable: str, value: str) -> None:
    variables = {"MANX_RUN_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), variable: value}
    if variable != "MANX_DATASTORE":
        variables["MANX_DATASTORE"] = f"sqlite://{tmp_path}/datastore.db"
    log = tmp_path / "log"
    daemon = Daemon([sys.executable, "-m", "controllers"], log, variables)
    daemon.start()
    wait(lambda: not daemon.running)
    assert value in log.read_text()
    assert "Traceback" not in log.read_text()
