"""A running ``iptables-restore`` that applies one transaction after the other.

Starting the program costs more than most changes do, so it is kept: it applies what it
has read at each COMMIT and, being verbose, repeats comment lines, which tells us how far
it has come. On any error it says why and ends, with the table as it was; the next
transaction starts it again. When we end, it reads the end of its input and ends too.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Sequence

from kernel.netns import in_namespace

_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
# For the lock that legacy iptables takes, and for the transaction itself
LOCK_SECONDS = 10
_ANSWER_SECONDS = 60
_LINE_NUMBER = re.compile(r"\bline:? (\d+)")


class RestoreError(Exception):
    """A transaction failed. Nothing of it was applied, unless the program was killed.

    ``line`` is the index of the line at fault among those given, None where the program
    does not say.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def has_program(name: str) -> bool:
    """Whether an iptables program is installed."""
    return _which(name) is not None


def find_program(name: str) -> str:
    """The path of an iptables program. Raises FileNotFoundError."""
    path = _which(name)
    if path is None:
        raise FileNotFoundError(f"{name}: not found; install the package iptables")
    return path


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")


class Restore:
    """``iptables-restore`` (``program``: which of them), started when first needed.

    It works in the network namespace ``netns_fd``, by default that of the thread that
    starts it. For one thread at a time.
    """

    def __init__(self, program: str, *, netns_fd: int | None = None) -> None:
        self._command = (find_program(program), "--noflush", "--verbose", "-w", str(LOCK_SECONDS))
        self._program = program
        self._netns_fd = netns_fd
        self._process: subprocess.Popen[bytes] | None = None
        self._lines = 0  # that this process was sent
        self._transactions = 0

    @property
    def pid(self) -> int | None:
        """The process, None while there is none."""
        return self._process.pid if self._process else None

    def apply(self, lines: Sequence[str]) -> None:
        """Apply one transaction, from ``*table`` to ``COMMIT``. Raises RestoreError."""
        process = self._running()
        self._transactions += 1
        token = f"# transaction {self._transactions}\n"
        data = "\n".join(lines) + "\n" + token
        try:
            output, complete = self._converse(process, data.encode(), token.encode())
        except BaseException:
            process.kill()
            self.close()
            raise
        if complete:
            self._lines += len(lines) + 1
            return
        sent = self._lines
        code = self.close()
        raise self._error(output, code, sent, len(lines))

    def close(self) -> int:
        """End the process, if there is one; its exit code. It starts again when needed."""
        process, self._process, self._lines = self._process, None, 0
        if process is None:
            return 0
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            code = process.wait(_ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        return code

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            with in_namespace(self._netns_fd):
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    bufsize=0,
                    start_new_session=True,  # a Ctrl-C is ours to handle
                )
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
        return self._process

    def _converse(
        self, process: subprocess.Popen[bytes], data: bytes, token: bytes
    ) -> tuple[bytes, bool]:
        """Send ``data``; what the program printed, and whether it got to the token.

        Reads while it writes, so that neither side waits for the other for ever.
        """
        assert process.stdin is not None and process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        poll.register(process.stdin, select.POLLOUT)
        deadline = time.monotonic() + LOCK_SECONDS + _ANSWER_SECONDS
        unsent = memoryview(data)
        output = b""
        while token not in output:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RestoreError(f"{self._program}: no answer, killed")
            ready = dict(poll.poll(left * 1000))
            if process.stdin.fileno() in ready:
                try:
                    unsent = unsent[os.write(process.stdin.fileno(), unsent) :]
                except BrokenPipeError:
                    unsent = unsent[:0]
                if not unsent:
                    poll.unregister(process.stdin)
            if process.stdout.fileno() in ready:
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    return output, False
                output += part
        return output, True

    def _error(self, output: bytes, code: int, sent: int, count: int) -> RestoreError:
        said = [
            line.strip()
            for line in output.decode(errors="replace").splitlines()
            if line.strip() and not line.startswith(("#", "Try `"))
        ]
        if code < 0 or not said:
            reason = f"{self._program}: ended with {code}; {' '.join(said)}".rstrip("; ")
            return RestoreError(reason)
        found = _LINE_NUMBER.search(output.decode(errors="replace"))
        line = int(found[1]) - sent - 1 if found else None
        if line is not None and not 0 <= line < count:
            line = None
        return RestoreError(" ".join(said), line)
