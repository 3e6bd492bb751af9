"""The process that is a lab: everything in the lab lives inside it and dies with it.

``python -m lab.keeper FD`` is started by ``lab.client``, which sends the fabric through the
socket FD and is told how it goes. The process unshares PID, mount, network and UTS
namespaces and forks twice: PID 1 in there only reaps orphans and ends when the keeper
proper, PID 2, ends. When either dies, however it dies, the kernel kills every process of
the PID namespace; namespaces, veths and mounts that nobody holds any more go with them.

Until the client says ``keep``, the lab ends when the client's end of the socket closes: an
interrupted or crashed ``up`` leaves nothing behind either.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from api import registry
from lab import control, world
from lab.control import JSON
from lab.errors import LabError
from lab.fabric import Fabric
from lab.namespaces import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    unshare,
)
from lab.running import RunningLab

STOP_WAIT = 2.0  # seconds for processes to end by themselves on ``down``


def main() -> None:
    """Entry point: ``sys.argv[1]`` is the descriptor of the socket to the client."""
    client = socket.socket(fileno=int(sys.argv[1]))
    try:
        request, _ = control.receive(client)
    except (EOFError, OSError):
        return  # the client has ended before it could say what to build
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # in the machine's network namespace, as abstract addresses belong to one
        listener.bind(control.address(request["name"]))
        listener.listen()
        unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS)
    except OSError as error:
        reason = str(error)
        if error.errno == errno.EADDRINUSE:
            reason = f"a lab {request['name']!r} runs already: ./dev lab down {request['name']}"
        control.send(client, {"event": "failed", "error": reason})
        return
    if os.fork() == 0:
        _init(lambda: Keeper(client, listener, request).run())


def _init(run_keeper: Callable[[], None]) -> NoReturn:
    """PID 1: reap whoever has no parent left, and end with the keeper. Does not return."""
    keeper = os.fork()
    if keeper == 0:
        status = 1
        try:
            os.setsid()
            run_keeper()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.closerange(0, 3)
    os.closerange(3, 1024)
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(keeper, number))
    while True:
        with contextlib.suppress(InterruptedError):
            pid, _ = os.wait()
            if pid == keeper:
                os._exit(0)


class Keeper:
    """Builds the lab, then answers requests until it is told to end."""

    def __init__(self, client: socket.socket, listener: socket.socket, request: JSON) -> None:
        self._client = client
        self._listener = listener
        self._name: str = request["name"]
        self._fabric = registry.validate(Fabric, request["fabric"])
        self._timeout: float = request["timeout"]
        self._lab: RunningLab | None = None
        self._kept = threading.Event()
        self._end = threading.Event()

    def run(self) -> None:
        """Live until ``down``, SIGTERM, or, unless kept, the client's end."""
        signal.signal(signal.SIGTERM, lambda number, frame: self._end.set())
        init = os.pidfd_open(1)
        self._tell({"event": "started"}, [init])
        os.close(init)
        threading.Thread(target=self._follow_client, daemon=True).start()
        threading.Thread(target=self._serve, daemon=True).start()
        try:
            world.prepare()
            _redirect_output(world.BASE / "keeper.log")
            lab = RunningLab(self._name, self._fabric, self._timeout, self._say)
            lab.start()
        except LabError as error:
            self._tell({"event": "failed", "error": error.message, "log": error.log})
            return
        except Exception:
            self._tell(
                {"event": "failed", "error": "the keeper failed", "log": traceback.format_exc()}
            )
            return
        self._lab = lab
        self._tell({"event": "ready"})
        while not self._end.wait(60):
            lab.trim_logs()
        lab.stop(time.monotonic() + STOP_WAIT)

    def _say(self, text: str) -> None:
        self._tell({"event": "step", "text": text})

    def _tell(self, message: JSON, fds: Sequence[int] = ()) -> None:
        # a client that has gone is noticed by _follow_client
        with contextlib.suppress(OSError):
            control.send(self._client, message, fds)

    def _follow_client(self) -> None:
        """The lab's life hangs on the client's until it says ``keep``."""
        while not self._kept.is_set():
            try:
                message, _ = control.receive(self._client)
            except (EOFError, OSError, ValueError):
                if self._end.is_set():
                    return  # it has said ``down``, and that is under way
                os._exit(1)
            if message == {"op": "keep"}:
                self._kept.set()
                control.send(self._client, {"ok": True})

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.ExitStack() as fds, contextlib.suppress(OSError, EOFError):
            if not control.peer_is_trusted(connection):
                return
            request, _ = control.receive(connection)
            to_send: list[int] = []
            try:
                reply = {"ok": True, **self._handle(request, to_send)}
            except LabError as error:
                reply = {"ok": False, "error": error.message, "log": error.log}
            except Exception as error:
                traceback.print_exc()
                reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            for fd in to_send:
                fds.callback(os.close, fd)
            control.send(connection, reply, to_send)

    def _handle(self, request: JSON, fds: list[int]) -> JSON:
        """One request; its reply, and in ``fds`` what to send along. Raises LabError."""
        operation = request.get("op")
        if operation == "down":
            fds.append(os.pidfd_open(1))
            self._end.set()
            if self._lab is None:
                # still being built: nothing in there needs an orderly end
                threading.Timer(0.1, os._exit, [0]).start()
            return {}
        if self._lab is None:
            raise LabError(f"lab {self._name} is still starting")
        if operation == "open":
            found = self._lab.open(request["target"])
            fds.extend(found.namespaces.fds())
            return {"env": found.env, "addresses": found.addresses}
        if operation == "status":
            return self._lab.status()
        if operation == "processes":
            return {"processes": self._lab.processes(request["member"])}
        if operation == "pod-add":
            return self._lab.add_pod(request["pod"])
        if operation == "pod-delete":
            self._lab.delete_pod(request["name"])
            return {}
        raise LabError(f"unknown request {json.dumps(operation)}")


def _redirect_output(log: Path) -> None:
    """Standard input from nowhere, output and errors to the keeper's log."""
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(null)
    os.close(out)


if __name__ == "__main__":
    main()
