"""What BGP does on this node, for people and programs: asked over ``<run_dir>/bgp.sock``.

A request is one line of JSON, ``{"command": "status"}`` or ``{"command": "leave"}``; the
answer is one line of JSON, ``{"error": TEXT}`` where there is none.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

_log = logging.getLogger(__name__)

SOCKET = "bgp.sock"
_ANSWER_SECONDS = 10.0
_LEAVE_SECONDS = 30.0
_SEND_SECONDS = 2.0
_MAX_REQUEST = 4096


class StatusError(Exception):
    """The agent can't be asked, or has no answer."""


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One session.

    ``type``: node-to-node mesh, global or node specific. ``state`` as in RFC 4271 8.
    ``since``: seconds of the epoch. ``info``: the last error, in words. ``received``:
    prefixes the peer told; ``used``: of these, those that are selected; ``installed``: of
    these, those that are in the kernel; ``announced``: prefixes the peer was sent; ``intended``:
    those it should be sent, with BIRD of this node's own. ``refused``:
    why prefixes are not used, and how many. ``bfd``: ``up`` and the seconds of silence that would
    end it, ``down``, or empty where the peer has not taken part.
    """

    address: str
    port: int
    type: str
    asn: int
    state: str
    since: float
    info: str
    received: int
    used: int
    installed: int
    announced: int
    refused: dict[str, int] = field(default_factory=dict)
    bfd: str = ""
    intended: int = 0


@dataclass(frozen=True, slots=True)
class BgpStatus:
    """BGP on this node. ``holding``: routes of an earlier run are kept until peers are heard.

    ``problems``: what is wrong with objects, each with object, field, value and what would be
    right, and routes that the kernel refused. ``engine``: ``exabgp`` or ``bird``; ``pid``: its
    process id, None if not running; ``started`` and ``configured``: when it was, in seconds of the
    epoch, 0.0 for never. ``datastore``: ``followed``, or why it is not.
    """

    node: str
    asn: int
    router_id: str
    in_sync: bool
    holding: bool
    pid: int | None
    blocks: list[str]
    peers: list[PeerStatus]
    problems: list[str]
    datastore: str = "followed"
    engine: str = "exabgp"
    started: float = 0.0
    configured: float = 0.0


Answer = dict[str, Any]


def query(run_dir: Path) -> BgpStatus:
    """Ask the agent of ``run_dir``. Raises StatusError, whose text says what to do."""
    answer = _ask(run_dir, "status", _ANSWER_SECONDS)
    peers = [PeerStatus(**peer) for peer in answer.pop("peers")]
    return BgpStatus(peers=peers, **answer)


def leave(run_dir: Path) -> None:
    """Have the agent withdraw its routes from all peers and end. Raises StatusError."""
    _ask(run_dir, "leave", _LEAVE_SECONDS)


def _ask(run_dir: Path, command: str, seconds: float) -> Answer:
    path = run_dir / SOCKET
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(seconds)
            connection.connect(str(path))
            connection.sendall(orjson.dumps({"command": command}) + b"\n")
            with connection.makefile("rb") as reader:
                answer: Answer = orjson.loads(reader.readline())
    except (OSError, ValueError) as error:
        raise StatusError(f"{path}: {error or 'no answer'}; does manx-bird-glue run?") from error
    if "error" in answer:
        raise StatusError(f"{path}: {answer['error']}")
    return answer


class Request:
    """A command that the agent's loop is to answer."""

    def __init__(self, command: str) -> None:
        self.command = command
        self._answered = threading.Event()
        self._answer: Answer = {}

    def answer(self, answer: Answer) -> None:
        """Say what came of it; once."""
        self._answer = answer
        self._answered.set()

    def wait(self, seconds: float) -> Answer:
        """The answer, or that there is none."""
        if not self._answered.wait(seconds):
            return {"error": f"no answer within {seconds:g} s"}
        return self._answer


def status_answer(status: BgpStatus) -> Answer:
    """The answer to ``status``."""
    return asdict(status)


class StatusServer:
    """A thread that accepts requests and hands them to ``sink``."""

    def __init__(self, run_dir: Path, sink: Callable[[Request], object]) -> None:
        """Raises OSError."""
        self._sink = sink
        path = run_dir / SOCKET
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._serving: set[threading.Thread] = set()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop accepting, and wait until what was answered has been sent."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        for thread in tuple(self._serving):
            thread.join(_SEND_SECONDS)
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # stopped
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._serving.add(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_ANSWER_SECONDS)
            with connection.makefile("rb") as reader:
                line = reader.readline(_MAX_REQUEST)
            connection.sendall(orjson.dumps(self._answer(line)) + b"\n")
        self._serving.discard(threading.current_thread())

    def _answer(self, line: bytes) -> Answer:
        try:
            document = orjson.loads(line)
            command = document["command"]
        except (ValueError, KeyError, TypeError):
            return {"error": 'expected {"command": "status"} or {"command": "leave"}'}
        seconds = {"status": _ANSWER_SECONDS, "leave": _LEAVE_SECONDS}.get(command)
        if seconds is None:
            return {"error": f"command {command!r}: expected status or leave"}
        request = Request(command)
        self._sink(request)
        return request.wait(seconds)
