"""The processes of the engines: start one, find that which an earlier agent started, end it.

Each is in a session of its own and outlives the agent. A lock on ``exabgp.pid`` (``bird.pid``),
which it holds by inheriting the open file, says that it lives, so that a process id that was
used again is never mistaken for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

_PROGRAM = Path(__file__).with_name("exabgp_main.py")
_EXECUTE = """
import os, sys
os.write(int(sys.argv[1]), b"%d\\n" % os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""  # what exabgp_main.py does for ExaBGP
_START_SECONDS = 5.0
_INHERITED = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV")


P = TypeVar("P", bound="Daemon")


class Daemon:
    """A running daemon. ``fileno`` becomes readable when it has ended (see pidfd_open(2))."""

    name: ClassVar[str]

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError."""
        self.pid = pid
        self._fd = os.pidfd_open(pid)
        self._variables: dict[str, str] | None = None

    @classmethod
    def _start(
        cls: type[P], run_dir: Path, command: Sequence[str], variables: Mapping[str, str]
    ) -> P:
        """Run a command that writes its process id to the file descriptor ``{lock}``.

        Raises OSError, and BlockingIOError where one is running.
        """
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        output = run_dir / f"{cls.name}.out"  # the log goes elsewhere; this is for last words
        with (run_dir / f"{cls.name}.pid").open("a") as lock, output.open("w") as out:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            process = subprocess.Popen(
                [word.replace("{lock}", str(lock.fileno())) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment | dict(variables),
                cwd=run_dir,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
            process.returncode = 0  # ended() waits for it; Popen's destructor need not warn
            return cls(process.pid)

    @classmethod
    def find(cls: type[P], run_dir: Path) -> P | None:
        """The one that runs with this directory, if any. Raises OSError."""
        path = run_dir / f"{cls.name}.pid"
        deadline = time.monotonic() + _START_SECONDS
        while path.exists():
            with path.open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return None
                except BlockingIOError:
                    text = lock.read().strip()
            if text.isdigit():
                with contextlib.suppress(ProcessLookupError):
                    return cls(int(text))
            elif time.monotonic() > deadline:
                raise OSError(f"{path}: locked, but {text!r} is not a process id")
            time.sleep(0.01)  # it has just been started, or is just ending
        return None

    def fileno(self) -> int:
        """For poll."""
        return self._fd

    def variables(self) -> dict[str, str]:
        """Its environment variables."""
        if self._variables is None:
            try:
                raw = Path(f"/proc/{self.pid}/environ").read_bytes()
            except OSError:
                return {}
            pairs = (item.partition(b"=") for item in raw.split(b"\0"))
            self._variables = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
        return self._variables

    def signal(self, number: int) -> None:
        """Send a signal, to this process and no other."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def ended(self) -> bool:
        """Whether it has ended; if it was our child, it is waited for."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(0):
            return False
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._fd, os.WEXITED)
        return True

    def stop(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL where that doesn't end it in time."""
        self.signal(signal.SIGTERM)
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(seconds * 1000):
            self.signal(signal.SIGKILL)
            poll.poll(seconds * 1000)
        self.ended()

    def close(self) -> None:
        """Let go of it; it goes on."""
        os.close(self._fd)


class ExaBgp(Daemon):
    """A running ExaBGP."""

    name = "exabgp"

    @classmethod
    def start(cls, run_dir: Path, configuration: Path, variables: Mapping[str, str]) -> ExaBgp:
        """``exabgp server CONFIGURATION`` with these environment variables.

        Raises OSError, and BlockingIOError where one is running.
        """
        command = [sys.executable, "-P", str(_PROGRAM), "{lock}", str(configuration)]
        return cls._start(run_dir, command, variables)


class Bird(Daemon):
    """A running BIRD."""

    name = "bird"

    @classmethod
    def start(cls, run_dir: Path, configuration: Path, socket: Path, *, recover: bool) -> Bird:
        """``bird -f -c CONFIGURATION -s SOCKET``; ``recover`` adds ``-R``.

        With that it expects peers to have kept its routes, and the kernel to have kept theirs.
        Raises OSError, and BlockingIOError where one is running.
        """
        command = [sys.executable, "-I", "-S", "-c", _EXECUTE, "{lock}"]
        command += ["bird", "-f", "-c", str(configuration), "-s", str(socket)]
        return cls._start(run_dir, command + ["-R"] * recover, {"TZ": "UTC"})
