"""An ADD returns when the pod's policy is enforced: the daemon and felix together."""

from __future__ import annotations

import json
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cni.enforcement import MOST_WAITING, SOCKET, Enforcement
from cni.errors import NOT_AVAILABLE, TRY_AGAIN_LATER
from cni.server import WORKERS
from datastore.interface import Key
from kernel.links import Links
from kernel.netlink import NetlinkSocket
from kernel.netns import inside
from kernel.qdiscs import Qdiscs
from tests.cni.rig import Container, Felix, Rig, configuration, running
from tests.support.netns import eventually

pytestmark = pytest.mark.timeout(300)  # an ADD may wait for a minute

WAIT: dict[str, Any] = {"policy_setup_timeout_seconds": 60}
SHORT: dict[str, Any] = {"policy_setup_timeout_seconds": 1}


@pytest.fixture(scope="module")
def _node(patient_client: Path) -> Iterator[tuple[Rig, Felix]]:
    with running(patient_client) as rig:
        felix = Felix(rig)
        try:
            rig.create("Namespace", "red")
            rig.create(
                "GlobalNetworkPolicy",
                "only-web",
                spec={
                    "selector": "all()",
                    "types": ["Ingress", "Egress"],
                    "ingress": [
                        {"action": "Allow", "protocol": "TCP", "destination": {"ports": [80]}}
                    ],
                    "egress": [{"action": "Allow"}],
                },
            )
            felix.start()
            yield rig, felix
        finally:
            felix.kill()


@pytest.fixture
def rig(_node: tuple[Rig, Felix]) -> Iterator[Rig]:
    rig, _ = _node
    yield rig
    try:
        rig.assert_empty()
    finally:
        rig.collect_all()


@pytest.fixture
def felix(_node: tuple[Rig, Felix]) -> Felix:
    return _node[1]


def ip(result: Any) -> str:
    text: str = result["ips"][0]["address"]
    return text.split("/")[0]


@contextmanager
def serving(pod: Container, port: int) -> Iterator[None]:
    with inside(pod.namespace.fd):
        server = socket.create_server(("", port))
    with server:
        yield


def connects(pod: Container, address: str, port: int, seconds: float) -> bool:
    with inside(pod.namespace.fd):
        client = socket.socket()
    with client:
        client.settimeout(seconds)
        try:
            client.connect((address, port))
        except OSError:
            return False
        return True


def test_neither_unprotected_nor_before_a_closed_door(rig: Rig) -> None:
    """The very first packets are judged by the policy. A connection is not tried again here:
    what is dropped once is missed.
    """
    client = rig.container()
    rig.add(client, **WAIT)
    for _ in range(5):
        pod = rig.container("web")
        address = ip(rig.add(pod, **WAIT))
        with serving(pod, 80), serving(pod, 81):
            assert connects(client, address, 80, 0.9)
            assert not connects(client, address, 81, 0.2)
        # the next has the same name, and the old sandbox goes after it came
        after = rig.container("web")
        rig.add(after, **WAIT)
        rig.delete(pod)
        rig.delete(after)
    rig.delete(client)


def test_many_at_once(rig: Rig) -> None:
    pods = [rig.container() for _ in range(20)]
    adding = [rig.begin("ADD", pod, configuration(**WAIT)) for pod in pods]
    addresses = [ip(rig.end(process).ok()) for process in adding]
    with serving(pods[-1], 80):
        assert all(connects(pod, addresses[-1], 80, 0.9) for pod in pods[:5])
    for process in [rig.begin("DEL", pod) for pod in pods]:
        rig.end(process).ok()


def test_felix_hangs(rig: Rig, felix: Felix) -> None:
    """The wait has an end, what was made is taken back, and the next ADD does it."""
    pod = rig.container()
    felix.signal(signal.SIGSTOP)
    try:
        answer = rig.call("ADD", pod, configuration(**SHORT))
    finally:
        felix.signal(signal.SIGCONT)
    assert answer.error == TRY_AGAIN_LATER
    assert all(word in answer.json["msg"] for word in ("policy", "1 s", "felix", "node status"))
    assert pod.links() == set()
    rig.assert_empty()
    rig.add(pod, **WAIT)
    rig.delete(pod)


def test_a_wait_that_is_too_long(rig: Rig) -> None:
    """Calico's configurations may say any: it is as long as may be, and the log says so."""
    pod = rig.container()
    rig.add(pod, policy_setup_timeout_seconds=600)
    assert "policy_setup_timeout_seconds: 600: an ADD waits for 60 at most" in rig.log()
    rig.delete(pod)


def test_more_wait_for_a_hanging_felix_than_there_are_workers(rig: Rig, felix: Felix) -> None:
    """Who waits occupies none, so all others are served."""
    standing = rig.container()
    rig.add(standing)
    felix.signal(signal.SIGSTOP)
    try:
        pods = [rig.container() for _ in range(WORKERS + 6)]
        waiting = [rig.begin("ADD", pod, configuration(**WAIT)) for pod in pods]
        eventually(lambda: len(rig.endpoints()) == len(pods) + 1)
        rig.add(other := rig.container())
        for pod in (standing, other):
            rig.delete(pod)
        assert all(process.poll() is None for process in waiting)
    finally:
        felix.signal(signal.SIGCONT)
    for process in waiting:
        rig.end(process).ok()
    for process in [rig.begin("DEL", pod) for pod in pods]:
        rig.end(process).ok()


def test_bandwidth_is_limited_when_the_add_returns(rig: Rig) -> None:
    annotations = {
        "kubernetes.io/ingress-bandwidth": "8M",
        "qos.projectcalico.org/egressBandwidth": "16M",
    }
    rig.create("Pod", "limited", "red", metadata={"annotations": annotations})
    pod = rig.container("limited")
    rig.add(pod, **WAIT)
    with NetlinkSocket(netns_fd=rig.namespace.fd) as netlink:
        found = Qdiscs(netlink).buckets()
    assert found.pop(rig.link(pod)).rate == 1_000_000
    assert [bucket.rate for bucket in found.values()] == [2_000_000]
    rig.delete(pod)

    def gone() -> bool:
        with NetlinkSocket(netns_fd=rig.namespace.fd) as netlink:
            return not any(link.kind == "ifb" for link in Links(netlink).read().values())

    eventually(gone)
    rig.store.delete(Key("Pod", "limited", "red"))


def test_a_restart_in_the_middle_of_waiting(rig: Rig, felix: Felix) -> None:
    """The daemon ends at once, ADDs that wait for felix go on with the next, DELs with them."""
    standing, waiting = (([rig.container() for _ in range(10)]) for _ in range(2))
    for pod in standing:
        rig.add(pod)
    felix.signal(signal.SIGSTOP)
    try:
        conf = configuration(**WAIT)
        adding = [rig.begin("ADD", pod, conf) for pod in waiting]
        eventually(lambda: len(rig.endpoints()) == 20)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(rig.socket))
            deleting = [rig.begin("DEL", pod) for pod in standing[:5]]
            assert rig.kill(signal.SIGTERM) == 0  # waits for less than 60 s
        deleting += [rig.begin("DEL", pod) for pod in standing[5:]]
        rig.start()
        for process in deleting:
            rig.end(process).ok()
        assert all(process.poll() is None for process in adding)
        assert len(rig.endpoints()) == len(rig.links()) == len(rig.held()) == 10
    finally:
        felix.signal(signal.SIGCONT)
    results = [rig.end(process).ok() for process in adding]
    assert len({ip(result) for result in results}) == 10
    assert "not taken back" not in rig.log()
    for pod, result in zip(waiting, results, strict=True):
        assert rig.call("CHECK", pod, configuration(prevResult=result)).ok() is None
        rig.delete(pod)


def test_felix_was_never_there(c_client: Path) -> None:
    """A daemon that has just started gives it a moment, not as long as an ADD would wait."""
    with running(c_client) as rig:
        eventually(lambda: rig.call("STATUS", conf=configuration(**WAIT)).code != 0)
        status = rig.call("STATUS", conf=configuration(**WAIT))
        assert status.error == NOT_AVAILABLE
        assert "felix has not been there" in status.json["msg"]
        assert rig.call("STATUS").ok() is None
        felix = Felix(rig)
        felix.start()
        try:
            eventually(lambda: rig.call("STATUS", conf=configuration(**WAIT)).code == 0)
        finally:
            felix.kill()


def test_felix_is_away(rig: Rig, felix: Felix) -> None:
    standing, late, waiting = (rig.container() for _ in range(3))
    result = rig.add(standing, **WAIT)
    felix.kill()
    try:
        # as long as an ADD may still succeed, the answer is yes
        assert rig.call("STATUS", conf=configuration(**WAIT)).ok() is None
        assert rig.call("ADD", late, configuration(**SHORT)).error == TRY_AGAIN_LATER
        eventually(lambda: rig.call("STATUS", conf=configuration(**SHORT)).code != 0)
        status = rig.call("STATUS", conf=configuration(**SHORT))
        assert status.error == NOT_AVAILABLE
        assert "felix has been away" in status.json["msg"]
        assert rig.call("STATUS").ok() is None
        # what felix enforced stands, so an ADD of it that is repeated succeeds
        assert rig.add(standing, **SHORT) == result
        # a daemon that never heard of felix can't know, but takes nothing back
        rig.kill()
        rig.start()
        assert rig.call("ADD", standing, configuration(**SHORT)).error == TRY_AGAIN_LATER
        assert standing.links() == {"eth0"}
        process = rig.begin("ADD", waiting, configuration(**WAIT))
        eventually(lambda: len(rig.endpoints()) == 2)
    finally:
        felix.start()
    rig.end(process).ok()
    assert rig.add(standing, **WAIT) == result
    for pod in (standing, waiting):
        rig.delete(pod)


ENDPOINT = Key("WorkloadEndpoint", "web", "red")


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[tuple[Enforcement, socket.socket]]:
    """The listener, and a socket on which the test plays felix."""
    door = socket.socket(socket.AF_UNIX)
    with door:
        door.settimeout(20)
        door.bind(str(tmp_path / SOCKET))
        door.listen(4)
        enforcement = Enforcement(tmp_path)
        enforcement.start()
        yield enforcement, door
        enforcement.stop()


def say(connection: socket.socket, everything: bool, **endpoints: str | None) -> None:
    told = {"all": everything, "endpoints": {f"red/{k}": v for k, v in endpoints.items()}}
    connection.sendall(json.dumps(told).encode() + b"\n")


def hears(enforcement: Enforcement, endpoint: Key, container: str, seconds: float) -> bool | None:
    """What one who waits is told."""
    told: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
    enforcement.when_enforced(endpoint, container, seconds, told.put)
    return told.get(timeout=seconds + 20)


def test_only_the_very_container_counts(heard: tuple[Enforcement, socket.socket]) -> None:
    enforcement, door = heard
    connection, _ = door.accept()
    with connection:
        say(connection, True, web="old")
        assert hears(enforcement, ENDPOINT, "old", 20)
        assert not hears(enforcement, ENDPOINT, "new", 0.05)
        threading.Timer(0.1, say, (connection, False), {"web": "new"}).start()
        assert hears(enforcement, ENDPOINT, "new", 20)
        assert not hears(enforcement, ENDPOINT, "old", 0.01)
        say(connection, False, web=None)
        say(connection, False, other="x")
        assert hears(enforcement, Key("WorkloadEndpoint", "other", "red"), "x", 20)
        assert not hears(enforcement, ENDPOINT, "new", 0.01)
        assert enforcement.away() == 0


def test_many_wait_and_each_hears_once(heard: tuple[Enforcement, socket.socket]) -> None:
    enforcement, door = heard
    connection, _ = door.accept()
    with connection:
        say(connection, True, first="c")
        assert hears(enforcement, Key("WorkloadEndpoint", "first", "red"), "c", 20)
        told: queue.SimpleQueue[tuple[int, bool | None]] = queue.SimpleQueue()

        def fails(enforced: bool | None) -> None:
            told.put((-1, enforced))
            raise RuntimeError("a fault of one that hears")

        enforcement.when_enforced(ENDPOINT, "-1", 60, fails)
        for number in range(MOST_WAITING - 1):
            then = partial(lambda number, enforced: told.put((number, enforced)), number)
            enforcement.when_enforced(ENDPOINT, str(number), 60, then)
        before = time.monotonic()
        assert not hears(enforcement, ENDPOINT, "one too many", 60)
        assert time.monotonic() - before < 30  # refused, at once
        assert told.empty()
        for number in range(-1, MOST_WAITING - 1):
            say(connection, False, web=str(number))
        heard_of = [told.get(timeout=20) for _ in range(MOST_WAITING)]
        assert sorted(heard_of) == [(number, True) for number in range(-1, MOST_WAITING - 1)]
        assert enforcement.waiting == 0
        assert hears(enforcement, ENDPOINT, str(MOST_WAITING - 2), 0)


def test_each_is_told_when_its_own_time_is_over(
    heard: tuple[Enforcement, socket.socket],
) -> None:
    enforcement, door = heard
    connection, _ = door.accept()
    with connection:
        say(connection, True)
        eventually(lambda: enforcement.away() == 0)
        told: queue.SimpleQueue[str] = queue.SimpleQueue()

        def after(name: str, seconds: float) -> None:
            enforcement.when_enforced(
                ENDPOINT, name, seconds, lambda enforced: told.put(f"{name} {enforced}")
            )

        after("long", 60)
        after("third", 1.6)  # so far apart that they come in this order on a busy machine, too
        after("first", 0.05)
        after("second", 0.8)
        assert [told.get(timeout=20) for _ in range(3)] == [
            "first False",
            "second False",
            "third False",
        ]
        say(connection, False, web="third")
        say(connection, False, web="long")
        assert told.get(timeout=20) == "long True"
        assert enforcement.waiting == 0


@pytest.mark.parametrize("words", [b"", b"nonsense\n", b"[]\n", b'{"all": true}\n', b"\xff\xff"])
def test_a_felix_that_breaks_off(heard: tuple[Enforcement, socket.socket], words: bytes) -> None:
    """What it told stays true until it is back and tells all anew."""
    enforcement, door = heard
    connection, _ = door.accept()
    with connection:
        say(connection, True, web="c1")
        assert hears(enforcement, ENDPOINT, "c1", 20)
        connection.sendall(words)
    eventually(lambda: enforcement.away() > 0)
    assert hears(enforcement, ENDPOINT, "c1", 0)
    again, _ = door.accept()
    with again:
        say(again, True, other="c2")
        assert hears(enforcement, Key("WorkloadEndpoint", "other", "red"), "c2", 20)
        assert not hears(enforcement, ENDPOINT, "c1", 0.01)
