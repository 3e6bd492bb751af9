"""Death at every step of attaching and detaching: no address is lost or given twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kernel.netns import Namespace, inside
from tests.cni.mortal import DIED
from tests.cni.rig import NETWORK, NODE, ROOT, Rig
from tests.support.etcd import single_node
from tests.support.netns import eventually
from tests.support.relay import Relay

MOST_STEPS = 40  # far more than there are


# A test that is worth its time on both stores.
on_both = pytest.mark.parametrize("_mortals", ["sqlite", "etcd"], indirect=True)


class Mortals:
    """Processes that do a daemon's work on a rig without one."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.wants: dict[str, Any] = {}  # what each attachment shall have
        self._number = 0
        with inside(rig.namespace.fd):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cni.mortal", rig.url, NODE],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()

    def pod(self) -> dict[str, Any]:
        self._number += 1
        name = f"pod-{self._number}"
        return {
            "network": NETWORK,
            "container_id": f"{self._number:064x}",
            "ifname": "eth0",
            "namespace": "red",
            "pod": name,
        }

    def do(
        self,
        verb: str,
        pod: Any = None,
        netns: Namespace | None = None,
        die: int = 0,
        others: Sequence[tuple[Any, Namespace]] = (),
    ) -> bool:
        """Whether the job was done; False when its process died before.

        ``others`` are attached together with the pod.
        """
        path = f"/proc/{os.getpid()}/fd/{netns.fd}" if netns else ""
        job = {"verb": verb, "attachment": pod, "netns": path, "die": die, "wants": self.wants}
        job["others"] = [
            {"attachment": each, "netns": f"/proc/{os.getpid()}/fd/{theirs.fd}"}
            for each, theirs in others
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        assert status in (0, DIED)
        return status == 0


@pytest.fixture(scope="module", params=["sqlite"])
def _mortals(request: pytest.FixtureRequest) -> Iterator[Mortals]:
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="manx-cni-"))
        url = ""
        if request.param == "etcd":
            etcd = stack.enter_context(single_node())
            url = f"etcd://{etcd.endpoints[0]}"
        rig = Rig(Path(directory), Path("/bin/false"), url)
        stack.callback(rig.close)
        if request.param == "etcd":
            relay = Relay(etcd.endpoints[0], rig.namespace)
            stack.callback(relay.close)
            rig.url = f"etcd://{relay.endpoint}"
        rig.create("IPPool", "pods", spec={"cidr": "10.65.0.0/24"})
        rig.create("IPPool", "six", spec={"cidr": "fd00:65::/64"})
        mortals = Mortals(rig)
        stack.callback(mortals.close)
        yield mortals


@pytest.fixture
def mortals(_mortals: Mortals) -> Iterator[Mortals]:
    """The node has its blocks already: to claim them is not what is tried."""
    _mortals.wants = {"families": [4, 6]}
    with Namespace.create() as netns:
        pod = _mortals.pod()
        assert _mortals.do("attach", pod, netns)
        assert _mortals.do("detach", pod)
    _mortals.wants = {}
    yield _mortals
    _mortals.wants = {}


def die_at_every_step(
    mortals: Mortals,
    recover: Callable[[Any, Namespace], object],
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """Attach, dying one step later each time; after ``recover`` nothing may be left.

    ``prepare`` comes before each.
    """
    for step in range(1, MOST_STEPS):
        prepare()
        with Namespace.create() as netns:
            pod = mortals.pod()
            done = mortals.do("attach", pod, netns, die=step)
            recover(pod, netns)
            mortals.rig.assert_empty()
        if done:
            return step
    raise AssertionError("attaching never ends")


@on_both
def test_del_after_a_crash(mortals: Mortals) -> None:
    def recover(pod: Any, netns: Namespace) -> None:
        assert mortals.do("detach", pod)

    assert die_at_every_step(mortals, recover) > 6


def test_add_again_after_a_crash(mortals: Mortals) -> None:
    def recover(pod: Any, netns: Namespace) -> None:
        held = mortals.rig.held()
        assert mortals.do("attach", pod, netns)
        now = mortals.rig.held()
        assert list(now.values()) == [1]
        assert not held or held == now
        assert len(mortals.rig.links()) == len(mortals.rig.endpoints()) == 1
        assert mortals.do("detach", pod)

    die_at_every_step(mortals, recover)


@pytest.mark.parametrize("recovery", ["detach", "attach", "attach together", "repair"])
def test_a_crash_of_several_at_once(mortals: Mortals, recovery: str) -> None:
    """Whichever of them had got how far: each is completed or taken back for itself."""
    for step in range(1, MOST_STEPS):
        with ExitStack() as stack:
            pods = [(mortals.pod(), stack.enter_context(Namespace.create())) for _ in range(3)]
            (first, netns), *others = pods
            done = mortals.do("attach", first, netns, die=step, others=others)
            if recovery == "repair":
                assert mortals.do("repair")
                rig = mortals.rig
                assert len(rig.held()) == len(rig.links()) == len(rig.endpoints())
            elif recovery == "attach together":
                assert mortals.do("attach", first, netns, others=others)
            elif recovery == "attach":
                assert all(mortals.do("attach", pod, theirs) for pod, theirs in pods)
            if recovery.startswith("attach"):
                addresses = [
                    each["spec"]["ipNetworks"] for each in mortals.rig.endpoints().values()
                ]
                assert len(set(map(tuple, addresses))) == len(mortals.rig.links()) == 3
                assert list(mortals.rig.held().values()) == [1, 1, 1]
            for pod, _ in pods:
                assert mortals.do("detach", pod)
            mortals.rig.assert_empty()
        if done:
            assert step > 8
            return
    raise AssertionError("attaching never ends")


WANTS: dict[str, dict[str, Any]] = {
    "both families": {"families": [4, 6]},
    "addresses": {"addresses": ["10.65.0.99", "fd00:65::99"]},
    "another plugin": {},
}


@pytest.mark.parametrize("what", WANTS)
@pytest.mark.parametrize("again", [False, True])
def test_other_attachments(mortals: Mortals, tmp_path: Path, what: str, again: bool) -> None:
    """With several addresses, certain ones, those of another plugin: an ADD that is repeated
    succeeds; after a DEL, with or without that, nothing is left of any.
    """
    leases = tmp_path / NETWORK
    mortals.wants = WANTS[what] or {"data": str(tmp_path)}

    def recover(pod: Any, netns: Namespace) -> None:
        if again:
            assert mortals.do("attach", pod, netns)
            (endpoint,) = mortals.rig.endpoints().values()
            assert len(endpoint["spec"]["ipNetworks"]) == (1 if "data" in mortals.wants else 2)
            assert sum(mortals.rig.held().values()) == (0 if "data" in mortals.wants else 2)
        assert mortals.do("detach", pod)
        if leases.exists():
            assert [path.name for path in leases.iterdir() if path.name[0].isdigit()] == []

    assert die_at_every_step(mortals, recover) > 6


@pytest.mark.parametrize(
    ("_mortals", "recovery"),
    [
        ("sqlite", "detach"),
        ("sqlite", "repair"),
        ("sqlite", "another"),
        ("etcd", "attach"),
    ],
    indirect=["_mortals"],
)
def test_a_crash_while_blocks_are_claimed(_mortals: Mortals, recovery: str) -> None:
    """No block is claimed twice, and none is lost to its node: the next ADDs take from it."""
    mortals, rig = _mortals, _mortals.rig

    def unclaim() -> None:
        for kind in ("IPAMBlock", "BlockAffinity"):
            for entry in rig.store.list(kind).entries:
                rig.store.delete(entry.key)

    def recover(pod: Any, netns: Namespace) -> None:
        if recovery == "repair":
            assert mortals.do("repair")
        elif recovery == "attach":
            assert mortals.do("attach", pod, netns)
        elif recovery == "another":
            with Namespace.create() as theirs:
                other = mortals.pod()
                assert mortals.do("attach", other, theirs)
                assert mortals.do("detach", other)
        assert mortals.do("detach", pod)
        assert mortals.do("attach", pod, netns)
        blocks = [entry.value["spec"] for entry in rig.store.list("IPAMBlock").entries]
        assert [block["affinity"] for block in blocks] == [f"host:{NODE}"]
        states = [e.value["spec"]["state"] for e in rig.store.list("BlockAffinity").entries]
        assert states == ["confirmed"]
        assert mortals.do("detach", pod)

    assert die_at_every_step(mortals, recover, unclaim) > 9
    unclaim()


def test_repair_after_a_crash(mortals: Mortals) -> None:
    """Repair takes back what was not finished; what was is left for the runtime's DEL."""

    def recover(pod: Any, netns: Namespace) -> None:
        assert mortals.do("repair")
        rig = mortals.rig
        assert len(rig.held()) == len(rig.links()) == len(rig.endpoints())
        if rig.endpoints():
            assert mortals.do("detach", pod)

    die_at_every_step(mortals, recover)


def test_repair_after_a_crash_and_the_end_of_the_container(mortals: Mortals) -> None:
    def recover(pod: Any, netns: Namespace) -> None:
        if not mortals.rig.endpoints():
            netns.close()
            eventually(lambda: not mortals.rig.links())
            assert mortals.do("repair")
        else:
            assert mortals.do("detach", pod)

    die_at_every_step(mortals, recover)


@pytest.mark.parametrize("recovery", ["detach", "repair"])
def test_crash_of_a_del(mortals: Mortals, recovery: str) -> None:
    for step in range(1, MOST_STEPS):
        with Namespace.create() as netns:
            pod = mortals.pod()
            assert mortals.do("attach", pod, netns)
            done = mortals.do("detach", pod, die=step)
            if recovery == "repair" and not mortals.rig.endpoints():
                netns.close()
                eventually(lambda: not mortals.rig.links())
                assert mortals.do("repair")
            else:
                assert mortals.do("detach", pod)
            mortals.rig.assert_empty()
            if done:
                return
    raise AssertionError("detaching never ends")
