"""Real daemons for tests: started, waited for, killed by their process id.

A daemon dies with the test process, even when that is killed: ``setpriv --pdeathsig``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"


class PortReservation:
    """A TCP port on 127.0.0.1 that nobody else is given while this object is open.

    The socket is bound but does not listen. A server that sets SO_REUSEADDR, as every Go program
    does, can bind beside it; the kernel hands the port to nobody who asks for any port.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((HOST, 0))
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


class Daemon:
    """One process that can be started, killed and started again. Its output goes to ``log``.

    Start it from the thread that outlives it: the kernel kills it when that thread ends.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command = ["setpriv", "--pdeathsig", "KILL", *command]
        self.log = log
        self.environment = os.environ | (environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the running process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process; it need not be ready when this returns."""
        assert not self.running
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def wait(self, ready: Callable[[], bool], seconds: float = 60) -> None:
        """Return when ``ready``. Raises RuntimeError, with the log's end, on death or timeout."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running:
                raise RuntimeError(f"{self.command[3]} ended: {self.tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.command[3]} not ready in {seconds} s: {self.tail()}")
            time.sleep(0.02)

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, no connection is closed in order."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that does not help within 10 seconds."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, from when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT after ``pause``."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
