"""Programs are kept running, their logs bounded, and stopped when told."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.namespaces import Namespaces
from lab.routers import Program
from lab.supervisor import LOG_LIMIT, Supervised, listens, tail


@pytest.fixture
def here() -> Iterator[Namespaces]:
    """The namespaces the test itself is in."""
    fds = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("mnt", "net", "uts", "pid")]
    with Namespaces.from_fds(fds) as namespaces:
        yield namespaces


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        time.sleep(0.01)


def sh(script: str, socket: str = "") -> Program:
    return Program("sh", ("/bin/sh", "-c", script), socket)


def supervise(here: Namespaces, program: Program, tmp_path: Path) -> Supervised:
    def ready() -> bool:
        return listens(Path(program.socket))

    return Supervised(program, here, {"PATH": os.environ["PATH"]}, tmp_path / "log", ready)


def stop(supervised: Supervised) -> None:
    supervised.request_stop()
    until(lambda: supervised.status().pid is None)


def test_a_killed_program_is_started_again(here: Namespaces, tmp_path: Path) -> None:
    supervised = supervise(here, sh("echo begun; exec sleep 60"), tmp_path)
    supervised.start()
    until(lambda: "begun" in tail(supervised.log) and supervised.status().pid is not None)
    first = supervised.status().pid
    assert supervised.signal(signal.SIGKILL)
    until(lambda: supervised.status().pid not in (None, first))
    status = supervised.status()
    assert status.restarts == 1
    assert status.last_exit == "was killed by SIGKILL"
    assert "starting it again" in tail(supervised.log)
    stop(supervised)
    assert supervised.status().pid is None
    assert not supervised.signal(signal.SIGTERM)


def test_one_that_keeps_failing_waits_longer_and_says_why(here: Namespaces, tmp_path: Path) -> None:
    supervised = supervise(here, sh("exit 3"), tmp_path)
    supervised.start()
    until(lambda: supervised.status().restarts >= 3)
    assert supervised.status().last_exit == "exited with status 3"
    stop(supervised)


def test_one_that_is_not_there_is_reported(here: Namespaces, tmp_path: Path) -> None:
    supervised = supervise(here, Program("none", ("/nowhere/none",), ""), tmp_path)
    supervised.start()
    until(lambda: supervised.status().restarts >= 1)
    assert "No such file" in str(supervised.status().last_exit)
    stop(supervised)


def test_one_that_ignores_sigterm_can_be_killed_and_stays_away(
    here: Namespaces, tmp_path: Path
) -> None:
    supervised = supervise(here, sh("trap '' TERM; echo deaf; sleep 60 & wait; wait"), tmp_path)
    supervised.start()
    until(lambda: "deaf" in tail(supervised.log))
    supervised.request_stop()
    assert supervised.signal(signal.SIGKILL)
    until(lambda: supervised.status().last_exit == "was killed by SIGKILL")
    assert supervised.status().restarts == 0


def test_ready_means_listening(here: Namespaces, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    supervised = supervise(here, sh("exec sleep 60", str(path)), tmp_path)
    supervised.start()
    until(lambda: supervised.status().pid)
    assert not supervised.is_ready()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        assert not supervised.is_ready()
        listener.listen()
        assert supervised.is_ready()
    stop(supervised)
    assert not supervised.is_ready()


def test_a_log_is_cut_to_its_last_half(here: Namespaces, tmp_path: Path) -> None:
    supervised = supervise(here, sh("true"), tmp_path)
    supervised.trim_log()  # none yet
    supervised.log.write_text("".join(f"line {i:>20}\n" for i in range(LOG_LIMIT // 20)))
    supervised.trim_log()
    lines = supervised.log.read_text().splitlines()
    assert supervised.log.stat().st_size <= LOG_LIMIT // 2
    assert len(lines[0]) == len(lines[-1])  # no half line at the top
    assert lines[-1].endswith(str(LOG_LIMIT // 20 - 1))


def test_the_tail_of_no_log_is_empty(tmp_path: Path) -> None:
    assert tail(tmp_path / "none") == ""
