"""The daemon's life: killed in the middle of work, started again, stopped, and by whom asked."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.server import WORKERS
from kernel.links import set_group
from kernel.netlink import NetlinkSocket
from tests.cni.rig import NODE, ROOT, Answer, Container, Rig, configuration, running
from tests.support.netns import eventually


@pytest.fixture
def node(c_client: Path) -> Iterator[Rig]:
    """A node of one's own, to do bad things to."""
    with running(c_client) as rig:
        yield rig
        if rig.daemon is not None:
            rig.collect_all()
            rig.assert_empty()


@pytest.mark.parametrize("restart", [True, False])
def test_killed_in_the_middle_of_many(node: Rig, restart: bool) -> None:
    """What was half-done when it died is finished by clients that ask again, or taken back."""
    pods = [node.container() for _ in range(20)]
    standing, going = pods[:3], pods[3:8]
    for pod in (*standing, *going):
        node.add(pod)
    working = [node.begin("ADD", pod) for pod in pods[8:]]
    working += [node.begin("DEL", pod) for pod in going]
    eventually(lambda: len(node.links()) != 8)
    node.kill()
    if restart:
        node.start()
    answers = [node.end(process) for process in working]
    # with a restart usually none: but on a busy machine that may take longer than they wait
    assert {answer.error for answer in answers if answer.code} <= {11}
    if not restart:
        node.start()
    for pod in (*going, *pods[8:]):
        node.delete(pod)
    assert len(node.held()) == len(node.links()) == len(node.endpoints()) == 3
    for pod in standing:
        result = node.add(pod)
        assert node.call("CHECK", pod, configuration(prevResult=result)).ok() is None


def test_killed_again_and_again(c_client: Path) -> None:
    """200 ADDs and DELs under a daemon that dies five times: nothing is leaked, none doubled.

    Who gets error 11 asks again, as a runtime does. Where the daemon is so quick that it has done
    all of it before it died so often, those that were deleted are added again, and the other way
    round.
    """
    with running(c_client, pool="10.65.0.0/16") as node:
        there, others = ([node.container() for _ in range(100)] for _ in range(2))
        for process in [node.begin("ADD", pod) for pod in there]:
            node.end(process).ok()
        kills = 0
        for _ in range(10):
            kills += change_over(node, there, others, 5 - kills)
            there, others = others, there
            if kills == 5:
                break
        assert kills == 5
        ids = {pod.id for pod in there}
        endpoints = [endpoint["spec"] for endpoint in node.endpoints().values()]
        assert {spec["containerID"] for spec in endpoints} == ids
        addresses = {address for spec in endpoints for address in spec["ipNetworks"]}
        assert len(addresses) == len(endpoints) == len(node.links()) == 100
        assert node.held() == {f"k8s-pod-network.{id_}": 1 for id_ in ids}
        assert len(node.store.list("IPAMHandle").entries) == 100
        assert [pod.links() for pod in there] == [{"eth0"}] * 100
        assert [pod.links() for pod in others] == [set()] * 100


def change_over(node: Rig, going: list[Container], coming: list[Container], kills: int) -> int:
    """Delete these and add those, at once, while the daemon is killed so often at most."""
    todo = [(pod, "ADD") for pod in coming] + [(pod, "DEL") for pod in going]
    killed = 0
    for _ in range(20):
        working = [(pod, verb, node.begin(verb, pod)) for pod, verb in todo]
        while killed < kills and until_something_is_done(node, [item[2] for item in working]):
            node.kill()
            node.start()
            killed += 1
        answers = [(pod, verb, node.end(process)) for pod, verb, process in working]
        todo = [(pod, verb) for pod, verb, answer in answers if answer.code]
        assert {answer.error for _, _, answer in answers if answer.code} <= {11}
        if not todo:
            return killed
    raise AssertionError(f"{len(todo)} were refused 20 times in a row")


def until_something_is_done(node: Rig, working: list[subprocess.Popen[bytes]]) -> bool:
    """Whether there is more to be done; False also when there was nothing any more."""
    before = state(node)

    def busy() -> bool:
        return any(process.poll() is None for process in working)

    eventually(lambda: state(node) != before or not busy())
    return busy()


def state(node: Rig) -> tuple[set[str], int]:
    """What changes while the daemon works."""
    return node.links(), len(node.endpoints())


def test_a_start_repairs_what_nobody_asks_about(node: Rig) -> None:
    """Interfaces in the midst of an ADD or a DEL; addresses of containers that are gone."""
    pods = [node.container() for _ in range(4)]
    for pod in pods:
        node.add(pod)
    adding, deleting, vanished, _ = pods
    keys = {entry.value["spec"]["containerID"]: entry.key
            for entry in node.store.list("WorkloadEndpoint").entries}  # fmt: skip
    node.kill()
    with NetlinkSocket(netns_fd=node.namespace.fd) as netlink:
        unfinished, going = 0x6D616E01, 0x6D616E02
        netlink.batch([set_group(node.link(adding), unfinished)])
        netlink.batch([set_group(node.link(deleting), going)])
    for pod in (adding, deleting, vanished):
        node.store.delete(keys[pod.id])
    vanished.namespace.close()
    node.start()
    eventually(lambda: len(node.held()) == 1)
    eventually(lambda: len(node.links()) == 1)
    assert len(node.endpoints()) == 1


def test_datastore_that_is_away(node: Rig) -> None:
    pod = node.container()
    node.add(pod)
    path = node.directory / "datastore.db"
    away = path.with_suffix(".away")
    path.rename(away)
    try:
        other = node.container()
        answer = node.call("ADD", other)
        assert answer.error == 11
        assert "datastore" in answer.json["msg"]
        assert other.links() == set()
        assert node.call("STATUS").error == 50
        assert node.call("DEL", pod).error == 11
        # what is complete is not taken back because an ADD of it failed
        assert node.call("ADD", pod).error == 11
        assert pod.links() == {"eth0"}
    finally:
        away.rename(path)
    node.delete(pod)


def test_starts_without_its_datastore(node: Rig) -> None:
    node.kill()
    url, node.url = node.url, f"sqlite://{node.directory}/missing/datastore.db"
    node.start()
    assert node.call("STATUS").error == 50
    node.kill()
    node.url = url
    node.start()
    assert node.call("STATUS").ok() is None


def test_stops_when_told(node: Rig) -> None:
    pods = [node.container() for _ in range(10)]
    working = [node.begin("ADD", pod) for pod in pods]
    assert node.kill(signal.SIGTERM) == 0
    node.start()
    answers = [node.end(process) for process in working]
    assert {answer.error for answer in answers if answer.code} <= {11}
    for pod in pods:
        node.add(pod)
    assert len(node.held()) == 10


def test_one_daemon_for_a_socket(node: Rig) -> None:
    environment = {
        **os.environ,
        "MANX_NODENAME": NODE,
        "MANX_DATASTORE": node.url,
        "MANX_RUN_DIR": str(node.socket.parent),
    }
    second = subprocess.run(
        [sys.executable, "-m", "cni", "daemon"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert second.returncode == 1
    assert "another daemon" in second.stderr
    assert node.call("STATUS").ok() is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MANX_DATASTORE", "mysql://x"),
        ("MANX_NODENAME", "Not A Name"),
        ("MANX_RUN_DIR", "/proc/no"),
        ("MANX_PATROL_SECONDS", "soon"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, variable: str, value: str) -> None:
    environment = {**os.environ, "MANX_RUN_DIR": str(tmp_path), variable: value}
    done = subprocess.run(
        [sys.executable, "-m", "cni", "daemon"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert value in done.stderr


def test_only_root_may_ask(node: Rig) -> None:
    assert node.socket.stat().st_mode & 0o777 == 0o600
    # even where somebody opened the door
    for path in (node.directory, node.socket.parent):
        path.chmod(0o755)
    node.socket.chmod(0o666)
    program = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
try:
    connection.sendall(b"MNX1" + bytes(8))
    sys.exit(len(connection.recv(100)))
except ConnectionError:
    pass
"""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program, node.socket], user=65534, cwd="/", check=False
    )
    assert done.returncode == 0
    assert "only root" in node.log()


def test_a_silent_client_holds_up_nobody(node: Rig) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    try:
        for connection in silent:
            connection.connect(str(node.socket))
        assert node.call("STATUS") == Answer(0, b"")
    finally:
        for connection in silent:
            connection.close()


def test_it_comes_before_other_programs(node: Rig) -> None:
    """So pods and clients that keep the machine busy don't hold up those who wait for it."""
    assert node.daemon is not None
    expected = max(-20, os.getpriority(os.PRIO_PROCESS, 0) - 8)
    tasks = Path(f"/proc/{node.daemon.pid}/task")
    eventually(lambda: len(list(tasks.iterdir())) > WORKERS)
    threads = [int(path.name) for path in tasks.iterdir()]
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {expected}
