"""A lab from the outside: bring one up, find one that runs, work in it, take it down."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from api.fields import LABEL, is_label
from lab import control
from lab.control import JSON
from lab.errors import CommandError, LabError
from lab.fabric import Fabric, Pod
from lab.namespaces import Namespaces

START_TIMEOUT = 60.0  # seconds for everything in a fabric to be ready
END_TIMEOUT = 15.0  # seconds for the kernel to take a lab away


@dataclass(frozen=True, slots=True)
class PodInfo:
    """A pod as it runs. ``add_started`` is of the monotonic clock, ``add_seconds`` is how
    long the CNI plugins took for ADD, from exec to exit.
    """

    name: str
    namespace: str
    node: str
    addresses: tuple[str, ...]
    container_id: str
    add_started: float
    add_seconds: float

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @property
    def address(self) -> str:
        """Its first address. Raises LabError when it has none."""
        if not self.addresses:
            raise LabError(f"pod {self.key} has no address")
        return self.addresses[0]


@dataclass(frozen=True, slots=True)
class Place:
    """A member or pod from the outside: its namespaces, environment and addresses."""

    name: str
    namespaces: Namespaces
    env: Mapping[str, str]
    addresses: tuple[str, ...]

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *exc: object) -> None:
        self.namespaces.close()


class Lab:
    """A running lab. ``with`` takes it down at the end of the block."""

    def __init__(self, name: str, lifeline: socket.socket | None = None) -> None:
        """Use ``up`` or ``connect``. ``lifeline``: while it is open the lab lives."""
        self.name = name
        self._lifeline = lifeline
        self._started: list[subprocess.Popen[Any]] = []

    @classmethod
    def up(
        cls,
        fabric: Fabric,
        *,
        name: str | None = None,
        keep: bool = False,
        timeout: float = START_TIMEOUT,
        say: Callable[[str], None] = lambda text: None,
    ) -> Lab:
        """Build a lab. It is ready when this returns; when it raises, nothing is left of it.

        Unless ``keep``, it ends with the calling process too, however that ends. ``say``
        is told what is being done. Raises LabError.
        """
        name = name or fabric.name
        if not is_label(name):
            raise LabError(f"name of the lab: {name!r}: expected {LABEL}")
        starting = _Starting(name)
        try:
            request = {"name": name, "fabric": fabric.model_dump(mode="json"), "timeout": timeout}
            starting.follow(request, say)
        except BaseException:
            starting.abort()
            raise
        lab = cls(name, starting.lifeline)
        if keep:
            lab.keep()
        return lab

    @classmethod
    def connect(cls, name: str | None = None) -> Lab:
        """A lab that runs; without a name, the only one. Raises LabError."""
        running = control.running_labs()
        if name is None:
            if len(running) != 1:
                if not running:
                    raise LabError("no lab is running")
                raise LabError(f"several labs run, name the one you mean: {', '.join(running)}")
            name = running[0]
        elif name not in running:
            known = f"running: {', '.join(running)}" if running else "none is running"
            raise LabError(f"there is no lab {name!r}; {known}")
        return cls(name)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()

    def keep(self) -> None:
        """Let the lab live on when this process ends. Raises LabError."""
        if self._lifeline is None:
            return
        try:
            control.send(self._lifeline, {"op": "keep"})
            control.receive(self._lifeline)
        except (EOFError, OSError) as error:
            raise LabError(f"lab {self.name} is gone") from error
        self._lifeline.close()
        self._lifeline = None

    def down(self) -> None:
        """Take the lab down; when this returns its processes are gone. Raises LabError."""
        try:
            _, fds = self._ask({"op": "down"})
        finally:
            if self._lifeline is not None:
                self._lifeline.close()
                self._lifeline = None
        (init,) = fds
        try:
            _await_end(self.name, init, self._started)
        finally:
            os.close(init)

    def status(self) -> JSON:
        """Everything in the lab and how it is: name, fabric, members, pods."""
        return self._ask({"op": "status"})[0]

    def pods(self) -> list[PodInfo]:
        """The pods, by key."""
        return [_pod(each) for each in self.status()["pods"]]

    def processes(self, member: str) -> list[tuple[int, list[str]]]:
        """The processes in a member: pid (as ``exec`` there sees it) and command line."""
        reply, _ = self._ask({"op": "processes", "member": member})
        return [(each["pid"], each["argv"]) for each in reply["processes"]]

    def add_pod(self, pod: Pod) -> PodInfo:
        """Create a pod and connect it through CNI. Raises LabError; nothing remains then."""
        return _pod(self._ask({"op": "pod-add", "pod": pod.model_dump(mode="json")})[0])

    def delete_pod(self, name: str) -> None:
        """Disconnect and remove the pod ``[NAMESPACE/]NAME``. Raises LabError."""
        self._ask({"op": "pod-delete", "name": name})

    def open(self, target: str) -> Place:
        """A member or pod, to act inside. Close it. Raises LabError."""
        reply, fds = self._ask({"op": "open", "target": target})
        return Place(target, Namespaces.from_fds(fds), reply["env"], tuple(reply["addresses"]))

    def popen(
        self,
        target: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
    ) -> subprocess.Popen[Any]:
        """Start a command in a member or pod, in the caller's folder; it ends with the lab.

        Raises LabError.
        """
        with self.open(target) as place:
            try:
                process = place.namespaces.popen(
                    argv,
                    env={**place.env, **(env or {})},
                    cwd=str(Path.cwd()),
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    text=text,
                )
            except OSError as error:
                raise CommandError(f"{target}: {argv[0]}: {error.strerror}", error) from error
        self._started = [each for each in self._started if each.returncode is None]
        self._started.append(process)
        return process

    def run(
        self, target: str, *argv: str, input: str | None = None, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and collect its output. Raises LabError (also for a timeout).

        A status other than 0 is for the caller to judge.
        """
        process = self.popen(
            target,
            argv,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            output, errors = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise LabError(f"{target}: {' '.join(argv)}: no end within {timeout:.0f} s") from None
        return subprocess.CompletedProcess(list(argv), process.returncode, output, errors)

    def _ask(self, request: JSON) -> tuple[JSON, list[int]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.connect(control.address(self.name))
                if not control.peer_is_trusted(connection):
                    raise LabError(f"lab {self.name} belongs to another user")
                control.send(connection, request)
                reply, fds = control.receive(connection)
            except (EOFError, OSError, ValueError) as error:
                raise LabError(f"lab {self.name} is gone: {error}") from error
        if not reply["ok"]:
            raise LabError(reply["error"], reply.get("log", ""))
        return reply, fds


class _Starting:
    """A keeper that is building its lab. ``lifeline``: the lab ends when it is closed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._init = -1  # a descriptor of the lab's PID 1; pidfd_open(2)
        self.lifeline, theirs = socket.socketpair()
        with theirs:
            # it forks away from this process, which ends at once
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lab.keeper", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def follow(self, request: JSON, say: Callable[[str], None]) -> None:
        """Have it built; returns when it is ready. Raises LabError."""
        try:
            control.send(self.lifeline, request)
            while (event := self._next())["event"] != "ready":
                if event["event"] == "step":
                    say(event["text"])
                elif event["event"] == "failed":
                    raise LabError(event["error"], event.get("log", ""))
        except (EOFError, OSError, ValueError) as error:
            text = f"lab {self._name}: its keeper died while it started: {error}"
            raise LabError(text) from error
        self._process.wait()
        os.close(self._init)

    def abort(self) -> None:
        """End it; when this returns nothing of it is left."""
        self.lifeline.close()
        self._process.wait()
        if self._init >= 0:
            _await_end(self._name, self._init)
            os.close(self._init)

    def _next(self) -> JSON:
        event, fds = control.receive(self.lifeline)
        if event["event"] == "started":
            (self._init,) = fds
        return event


def _await_end(name: str, init: int, started: Sequence[subprocess.Popen[Any]] = ()) -> None:
    """Wait until a lab's PID 1 has ended, and so all of its processes; pidfd_open(2).

    PID 1 can't end before those processes ``started`` in the lab by us are reaped.
    """
    poller = select.poll()
    poller.register(init, select.POLLIN)
    deadline = time.monotonic() + END_TIMEOUT
    while not poller.poll(20):
        for process in started:
            process.poll()
        if time.monotonic() > deadline:
            raise LabError(f"lab {name} has not ended within {END_TIMEOUT:.0f} s")


def _pod(reply: JSON) -> PodInfo:
    return PodInfo(
        name=reply["name"],
        namespace=reply["namespace"],
        node=reply["node"],
        addresses=tuple(reply["addresses"]),
        container_id=reply["containerID"],
        add_started=reply["addStarted"],
        add_seconds=reply["addSeconds"],
    )
