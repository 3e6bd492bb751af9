"""Keeps programs running in members of a lab, with their output in log files.

A program that ends is started again: at once the first time, later with back-off; one that
had run for a while counts as well again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.namespaces import Namespaces
from lab.routers import Program
from reconcile.backoff import Backoff

WELL_AFTER = 10.0  # seconds of running that make up for earlier failures
LOG_LIMIT = 8 << 20  # bytes of a log file; what is older than the last half of it goes


@dataclass(frozen=True, slots=True)
class ProgramStatus:
    """One program: ``pid`` is that in the lab's PID namespace, None while it is not running."""

    name: str
    pid: int | None
    restarts: int
    last_exit: str | None


class Supervised:
    """One program, started in a thread of its own that waits for it."""

    def __init__(
        self,
        program: Program,
        member: Namespaces,
        env: Mapping[str, str],
        log: Path,
        ready: Callable[[], bool],
    ) -> None:
        """``log``: a path as the keeper sees it. ``ready``: whether it serves, once it runs."""
        self.program = program
        self.log = log
        self._member = member
        self._env = dict(env)
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = 0
        self._last_exit: str | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards _process between starting and stopping
        self._thread = threading.Thread(
            target=self._run, name=f"supervise {program.name}", daemon=True
        )

    def start(self) -> None:
        """Begin. Never raises: a program that can't be started is one that ended."""
        self._thread.start()

    def status(self) -> ProgramStatus:
        """How it is now."""
        process = self._process
        running = process is not None and process.returncode is None
        return ProgramStatus(
            self.program.name,
            process.pid if process is not None and running else None,
            self._restarts,
            self._last_exit,
        )

    def is_ready(self) -> bool:
        """Whether it runs and serves."""
        return self.status().pid is not None and self._ready()

    def signal(self, number: int) -> bool:
        """Send a signal; False when it is not running."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                return False
            self._process.send_signal(number)
            return True

    def request_stop(self) -> None:
        """SIGTERM, and no more restarts."""
        self._stopping.set()
        self.signal(signal.SIGTERM)

    def trim_log(self) -> None:
        """Keep the log file from growing for ever; the program appends, so it may be cut."""
        with contextlib.suppress(FileNotFoundError):
            size = self.log.stat().st_size
            if size <= LOG_LIMIT:
                return
            with self.log.open("r+b") as file:
                file.seek(size - LOG_LIMIT // 2)
                rest = file.read()
                file.seek(0)
                file.truncate()
                file.write(rest[rest.find(b"\n") + 1 :])

    def _run(self) -> None:
        backoff: Backoff[str] = Backoff(initial=0.2, maximum=10.0)
        name = self.program.name
        failed_before = False
        while not self._stopping.is_set():
            started = time.monotonic()
            self._last_exit = self._run_once()
            now = time.monotonic()
            if now - started >= WELL_AFTER:
                backoff.succeeded(name)
                failed_before = False
            if self._stopping.is_set():
                return
            self._note(f"{name} {self._last_exit}; starting it again")
            self._restarts += 1
            if failed_before:
                self._stopping.wait(backoff.failed(name, now) - now)
            failed_before = True

    def _run_once(self) -> str:
        """Run it to its end; how it ended, in words."""
        with self.log.open("ab") as output:
            try:
                with self._lock:
                    if self._stopping.is_set():
                        return "was not started"
                    self._process = self._member.popen(
                        self.program.argv,
                        env=self._env,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
            except OSError as error:
                return f"could not be started: {error}"
        code = self._process.wait()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with status {code}"

    def _note(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.log.open("ab") as file:
            file.write(f"{stamp} lab: {text}\n".encode())


def listens(path: Path) -> bool:
    """Whether somebody accepts connections on a Unix stream socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log file; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
