"""A Unix socket in the run directory, and the thread that answers who knocks."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

_BACKLOG = 16


class Door:
    """Hands every connection to ``answer``, in a thread of its own. Raises OSError.

    ``mode`` are the permissions of the socket: who may connect needs to write.
    """

    def __init__(self, path: Path, mode: int, answer: Callable[[socket.socket], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._path.unlink(missing_ok=True)  # left by an agent that was killed
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        previous = os.umask(0o777 & ~mode)
        try:
            self._socket.bind(str(self._path))
        finally:
            os.umask(previous)
        self._socket.listen(_BACKLOG)
        self._thread = threading.Thread(target=self._serve, name=path.stem, daemon=True)

    def start(self) -> None:
        """Start answering."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering, and remove the socket."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._thread.join()
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._answer(connection)
