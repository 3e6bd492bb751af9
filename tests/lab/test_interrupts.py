"""Ctrl-C, and clients that go away: nothing is left, and nobody reads a traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab import control
from tests.lab.fabrics import lab_name, small

INTERRUPTED = """
import os, signal
from lab.interrupts import ending_quietly
{before}
with ending_quietly():
    os.kill(os.getpid(), signal.SIGINT)
print("went on")
"""


def python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False
    )


def test_an_interrupt_while_modules_load_ends_the_process_without_a_word() -> None:
    ended = python(INTERRUPTED.format(before=""))
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_who_ignores_interrupts_goes_on_doing_so() -> None:
    ended = python(INTERRUPTED.format(before="signal.signal(signal.SIGINT, signal.SIG_IGN)"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on\n", "")


def test_afterwards_an_interrupt_is_an_exception_again() -> None:
    ended = python(
        "import os, signal\n"
        "from lab.interrupts import ending_quietly\n"
        "with ending_quietly(): pass\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt: print('undone')\n"
    )
    assert (ended.returncode, ended.stdout) == (0, "undone\n")


@pytest.mark.parametrize("asked", [False, True], ids=["before it asks", "when it has asked"])
def test_a_keeper_whose_client_has_gone_ends_without_a_word(asked: bool) -> None:
    name = lab_name()
    ours, theirs = socket.socketpair()
    if asked:
        control.send(ours, {"name": name, "fabric": small(), "timeout": 10.0})
    ours.close()
    with theirs:
        keeper = subprocess.run(
            [sys.executable, "-P", "-m", "lab.keeper", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            capture_output=True,  # until the last process of the lab has ended
            text=True,
            check=False,
        )
    assert (keeper.returncode, keeper.stdout, keeper.stderr) == (0, "", "")
    assert name not in control.running_labs()


def test_an_interrupted_up_says_that_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "fabric.yaml"
    path.write_text(json.dumps(small()))
    name = lab_name()
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "lab", "up", str(path), "--name", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as up:
        assert up.stdout is not None
        assert up.stdout.readline().startswith("cabling ")
        os.killpg(up.pid, signal.SIGINT)  # as a terminal does
        _, errors = up.communicate(timeout=100)
    assert (up.returncode, errors) == (130, "interrupted; nothing of the lab is left\n")
    assert name not in control.running_labs()
