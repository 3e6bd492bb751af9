"""Death at every step of attaching and detaching: no address is lost or given twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel.netns import Namespace, inside
from tests.cni.mortal import DIED
from tests.cni.rig import NETWORK, NODE, ROOT, Rig
from tests.support.netns import eventually

MOST_STEPS = 40  # far more than there are


class Mortals:
    """Processes that do a daemon's work on a rig without one."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
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

    def do(self, verb: str, pod: Any = None, netns: Namespace | None = None, die: int = 0) -> bool:
        """Whether the job was done; False when its process died before."""
        path = f"/proc/{os.getpid()}/fd/{netns.fd}" if netns else ""
        job = {"verb": verb, "attachment": pod, "netns": path, "die": die}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        assert status in (0, DIED)
        return status == 0


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    with tempfile.TemporaryDirectory(prefix="manx-cni-") as directory:
        rig = Rig(Path(directory), Path("/bin/false"))
        rig.create("IPPool", "pods", spec={"cidr": "10.65.0.0/24"})
        mortals = Mortals(rig)
        # the first claims the block, which is not what is tried here
        with Namespace.create() as netns:
            pod = mortals.pod()
            assert mortals.do("attach", pod, netns)
            assert mortals.do("detach", pod)
        yield mortals
        mortals.close()
        rig.close()


def die_at_every_step(mortals: Mortals, recover: Callable[[Any, Namespace], object]) -> int:
    """Attach, dying one step later each time; after ``recover`` nothing may be left."""
    for step in range(1, MOST_STEPS):
        with Namespace.create() as netns:
            pod = mortals.pod()
            done = mortals.do("attach", pod, netns, die=step)
            recover(pod, netns)
            mortals.rig.assert_empty()
        if done:
            return step
    raise AssertionError("attaching never ends")


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
