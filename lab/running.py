"""A lab from the inside: builds the fabric, runs its programs, answers questions about it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from datastore.connect import connect
from lab import agents, objects, routers, world
from lab.control import JSON
from lab.errors import LabError
from lab.fabric import Fabric, Pod
from lab.namespaces import Namespaces
from lab.pods import Pods, RunningPod
from lab.runtime import CACHE_DIR, CONF_DIR, Runtime
from lab.supervisor import Supervised, tail
from lab.world import Member

MAX_RESTARTS = 2  # while a lab starts; a program that ends more often is why it can't
_POLL = 0.02  # seconds


@dataclass(frozen=True, slots=True)
class Opened:
    """A way into a member or pod. The receiver closes the namespaces."""

    namespaces: Namespaces
    env: dict[str, str]
    addresses: list[str]


class RunningLab:
    """All of a lab. ``say`` is told what is being done, for the person who waits."""

    def __init__(
        self, name: str, fabric: Fabric, timeout: float, say: Callable[[str], None]
    ) -> None:
        self._name = name
        self._fabric = fabric
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._say = say
        self._members: dict[str, Member] = {}
        self._env: dict[str, dict[str, str]] = {}
        self._programs: dict[str, list[Supervised]] = {}
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._store = connect(f"sqlite://{world.DATASTORE}/datastore.db")
        self._pods = Pods(self._store, {}, {})

    # -- from nothing to a lab -----------------------------------------------------------

    def start(self) -> None:
        """Build and start everything, wait until it is ready. Raises LabError."""
        self._say("cabling " + _count(self._fabric))
        self._members = world.build(self._fabric, self._pid_namespace)
        self._env = {name: agents.environment(each) for name, each in self._members.items()}
        self._programs = {name: [] for name in self._members}
        objects.write_fabric(self._store, self._fabric)
        self._say("starting routers")
        self._start_routers()
        nodes = [self._members[node.name] for _, node in self._fabric.all_nodes()]
        if self._fabric.spec.cni is not None:
            for node in nodes:
                agents.install_other(node, self._fabric.spec.cni)
        elif nodes:
            self._say("starting Manx on " + ", ".join(node.name for node in nodes))
            self._start_agents(nodes)
            self._await_programs()
        self._start_pods(nodes)

    def _start_routers(self) -> None:
        """Program after program: FRR's bgpd sleeps ten seconds when zebra is not there yet."""
        setups = [routers.setup(self._fabric, each) for each in self._fabric.all_routers()]
        waves = max(len(each.programs) for each in setups)
        for router, setup in zip(self._fabric.all_routers(), setups, strict=True):
            world.install_files(self._members[router.name], setup.files, setup.owner)
        for wave in range(waves):
            for router, setup in zip(self._fabric.all_routers(), setups, strict=True):
                for program in setup.programs[wave : wave + 1]:
                    self._supervise(self._members[router.name], program)
            self._await_programs()

    def _start_agents(self, nodes: list[Member]) -> None:
        installs = [(node, agents.install_manx(node, self._env[node.name])) for node in nodes]
        for node, process in installs:
            code = process.wait()
            if code != 0:
                log = tail(node.log("manx-cni-install"))
                raise LabError(f"node {node.name}: manx-cni install: exit status {code}", log)
        for node in nodes:
            for program in agents.PROGRAMS:
                self._supervise(node, program)

    def _supervise(self, member: Member, program: routers.Program) -> None:
        supervised = Supervised(
            program,
            member.namespaces,
            self._env[member.name],
            member.log(program.name),
            partial(agents.is_ready, program, member),
        )
        self._programs[member.name].append(supervised)
        supervised.start()

    def _await_programs(self) -> None:
        """Wait until every program listens. Raises LabError with the log of one that doesn't."""
        waiting = [(name, each) for name, programs in self._programs.items() for each in programs]
        while True:
            waiting = [(name, each) for name, each in waiting if not each.is_ready()]
            for name, each in waiting:
                status = each.status()
                if status.restarts > MAX_RESTARTS:
                    raise LabError(
                        f"{name}: {status.name} {status.last_exit}, {status.restarts} times",
                        tail(each.log),
                    )
            if not waiting:
                return
            if time.monotonic() > self._deadline:
                name, each = waiting[0]
                raise LabError(
                    f"{name}: {each.program.name} is not ready after {self._timeout:.0f} s",
                    tail(each.log),
                )
            time.sleep(_POLL)

    def _start_pods(self, nodes: list[Member]) -> None:
        runtimes = {
            node.name: Runtime(
                node.namespaces,
                self._env[node.name],
                node.seen_by_keeper(str(CONF_DIR)),
                node.seen_by_keeper(str(CACHE_DIR)),
            )
            for node in nodes
        }
        for name, runtime in runtimes.items():
            self._await_runtime(name, runtime)
        self._pods = Pods(self._store, {node.name: node.namespaces for node in nodes}, runtimes)
        if self._fabric.spec.pods:
            count = len(self._fabric.spec.pods)
            self._say(f"starting {count} pod{'' if count == 1 else 's'}")
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(self._pods.add, self._fabric.spec.pods):
                pass

    def _await_runtime(self, node: str, runtime: Runtime) -> None:
        """Wait until the CNI plugin says it can serve, as runtimes do before they run pods."""
        while True:
            try:
                runtime.status()
                return
            except LabError as error:
                if time.monotonic() > self._deadline:
                    error.message = f"node {node}: {error.message}"
                    raise
            time.sleep(_POLL)

    # -- questions and orders ------------------------------------------------------------

    def open(self, target: str) -> Opened:
        """The way into a member, or a pod (``[NAMESPACE/]NAME``). Raises LabError."""
        member = self._members.get(target)
        if member is not None:
            return Opened(member.namespaces.duplicate(), self._env[target], self._addresses(target))
        pod = self._pods.find(target)
        if pod is None:
            names = ", ".join([*self._members, *(each.pod.key for each in self._pods.running())])
            raise LabError(f"{target!r}: expected one of {names}")
        node = self._members[pod.pod.node]
        return Opened(node.namespaces.duplicate(net=pod.net), self._env[node.name], pod.addresses)

    def status(self) -> JSON:
        """Everything there is and how it is."""
        return {
            "name": self._name,
            "fabric": self._fabric.model_dump(mode="json"),
            "members": [
                {
                    "name": name,
                    "role": member.role,
                    "addresses": self._addresses(name),
                    "programs": [
                        {**asdict(each.status()), "ready": each.is_ready()}
                        for each in self._programs[name]
                    ],
                }
                for name, member in self._members.items()
            ],
            "pods": [_describe(pod) for pod in self._pods.running()],
        }

    def processes(self, name: str) -> list[JSON]:
        """The processes that run in a member, its pods' included: pid in the lab, argv."""
        member = self._members.get(name)
        if member is None:
            raise LabError(f"{name!r}: expected one of {', '.join(self._members)}")
        wanted = os.fstat(member.namespaces.mnt).st_ino
        found = []
        for folder in _processes():
            try:
                if (folder / "ns/mnt").stat().st_ino == wanted:
                    argv = (folder / "cmdline").read_bytes().decode(errors="replace")
                    found.append({"pid": int(folder.name), "argv": argv.rstrip("\0").split("\0")})
            except OSError:
                continue  # it has ended in between
        return found

    def add_pod(self, pod: JSON) -> JSON:
        """Create a pod. Raises LabError."""
        return _describe(self._pods.add(Pod.model_validate(pod)))

    def delete_pod(self, name: str) -> None:
        """Remove a pod. Raises LabError."""
        self._pods.delete(name)

    def trim_logs(self) -> None:
        """Keep log files from filling memory."""
        for each in self._supervised():
            each.trim_log()

    def stop(self, deadline: float) -> None:
        """Ask all processes to end, those of ``exec`` too; those that don't are killed."""
        for each in self._supervised():
            each.request_stop()
        os.kill(-1, signal.SIGTERM)  # all but PID 1 and the own process; kill(2)
        own = {"1", str(os.getpid())}
        while time.monotonic() < deadline and any(p.name not in own for p in _processes()):
            time.sleep(_POLL)

    def _supervised(self) -> Iterable[Supervised]:
        return (each for programs in self._programs.values() for each in programs)

    def _addresses(self, member: str) -> list[str]:
        for _, node in self._fabric.all_nodes():
            if node.name == member:
                return [str(node.address)]
        for host in self._fabric.spec.hosts:
            if host.name == member:
                return [str(host.address.ip)]
        return [str(address.ip) for address in self._fabric.addresses_of(member)]


def _processes() -> list[Path]:
    return [folder for folder in Path("/proc").iterdir() if folder.name.isdecimal()]


def _describe(pod: RunningPod) -> JSON:
    return {
        "name": pod.pod.name,
        "namespace": pod.pod.namespace,
        "node": pod.pod.node,
        "addresses": pod.addresses,
        "containerID": pod.attachment.container_id,
        "addStarted": pod.added.started,
        "addSeconds": pod.added.seconds,
    }


def _count(fabric: Fabric) -> str:
    counts = {
        "rack": len(fabric.spec.racks),
        "router": len(list(fabric.all_routers())),
        "node": len(list(fabric.all_nodes())),
        "host": len(fabric.spec.hosts),
    }
    return ", ".join(f"{n} {what}{'' if n == 1 else 's'}" for what, n in counts.items() if n)
