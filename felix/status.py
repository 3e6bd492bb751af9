"""The status socket: whoever connects gets one JSON object, and the connection ends.

The object is made by the loop itself, so that an agent that hangs does not call itself well.
"""

from __future__ import annotations

import logging
import queue
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from felix.door import Door

SOCKET = "felix.sock"
_ANSWER_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Somebody asks; the loop puts the answer into ``reply``."""

    reply: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)


class StatusServer:
    """A thread that hands requests to the loop and its answers to those who asked.

    ``name``: the socket's file; another program than felix has one of its own.
    """

    def __init__(
        self, run_dir: Path, ask: Callable[[StatusRequest], None], name: str = SOCKET
    ) -> None:
        self._ask = ask
        self._program = name.removesuffix(".sock")
        self._door = Door(run_dir / name, 0o660, self._serve)

    def start(self) -> None:
        """Start answering."""
        self._door.start()

    def stop(self) -> None:
        """Stop answering, and remove the socket."""
        self._door.stop()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(_ANSWER_SECONDS)
                connection.sendall(orjson.dumps(self._answer()) + b"\n")
            except OSError as error:
                _log.debug("status not delivered: %s", error)

    def _answer(self) -> dict[str, Any]:
        request = StatusRequest()
        self._ask(request)
        try:
            return request.reply.get(timeout=_ANSWER_SECONDS)
        except queue.Empty:
            busy = {"object": self._program, "message": "busy: no answer"}
            return {"ready": False, "errors": [busy]}


def query(
    run_dir: Path, timeout: float = 2 * _ANSWER_SECONDS, name: str = SOCKET
) -> dict[str, Any]:
    """The status of the agent that runs here. Raises OSError when none does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout)
        client.connect(str(run_dir / name))
        data = b""
        while part := client.recv(65536):
            data += part
    status: dict[str, Any] = orjson.loads(data)
    return status
