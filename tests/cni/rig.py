"""A node to try the plugin on: its own namespace, datastore and daemon, and pods around it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cni import install
from cni.config import VALID_ATTACHMENTS
from datastore.connect import connect
from datastore.interface import JSON, Datastore, Key
from felix.status import query
from kernel.links import Links, link_up
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside
from tests.support.netns import eventually

ROOT = Path(__file__).parents[2]
NETWORK = "k8s-pod-network"
POOL = "10.65.0.0/24"
NODE = "node-1"


def configuration(version: str = "1.1.0", **keys: Any) -> JSON:
    """A network configuration as the runtime gives it to the plugin; no felix is waited for."""
    return {
        "cniVersion": version,
        "name": NETWORK,
        "type": "manx",
        "policy_setup_timeout_seconds": 0,
        **keys,
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """What the plugin said: exit code and output."""

    code: int
    output: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.output)

    @property
    def error(self) -> int:
        """The CNI error code; fails when it was a success."""
        assert self.code != 0, self.output
        report = self.json
        assert report["msg"]
        return int(report["code"])

    def ok(self) -> Any:
        """The result of a success, None where there is none; fails when it was an error."""
        assert self.code == 0, self.output
        return self.json if self.output else None


@dataclass(slots=True)
class Container:
    """A network namespace and the names a runtime gives it."""

    namespace: Namespace
    id: str
    arguments: str = ""
    ifname: str = "eth0"

    @property
    def netns(self) -> str:
        """The path a runtime would give."""
        return f"/proc/{os.getpid()}/fd/{self.namespace.fd}"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        with inside(self.namespace.fd):
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def pings(self, address: str) -> bool:
        """Whether the answer to one packet comes."""
        return self.run("ping", "-c1", "-W10", address).returncode == 0

    def links(self) -> set[str]:
        with NetlinkSocket(netns_fd=self.namespace.fd) as netlink:
            return set(Links(netlink).read()) - {"lo"}


class Rig:
    """A node with its daemon. ``client`` is the executable a runtime would run.

    ``url``: its datastore, a file of its own by default. ``prefix``: of the wires' names.
    """

    def __init__(self, directory: Path, client: Path, url: str = "", prefix: str = "cali") -> None:
        self.directory = directory
        self.client = client
        self.namespace = Namespace.create()
        with NetlinkSocket(netns_fd=self.namespace.fd) as netlink:
            netlink.batch([link_up(1)])
        self.url = url or f"sqlite://{directory}/datastore.db"
        self.prefix = prefix
        self.store: Datastore = connect(self.url)
        self.socket = directory / "run" / "cni.sock"
        self.daemon: subprocess.Popen[bytes] | None = None
        self._containers: list[Container] = []

    def start(self, **variables: str) -> None:
        environment = {
            **os.environ,
            "MANX_NODENAME": NODE,
            "MANX_DATASTORE": self.url,
            "MANX_RUN_DIR": str(self.socket.parent),
            **variables,
        }
        log = (self.directory / "daemon.log").open("ab")
        with log, inside(self.namespace.fd):
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "cni", "daemon"], cwd=ROOT, env=environment, stderr=log
            )
        eventually(self._serves)

    def _serves(self) -> bool:
        assert self.daemon is not None
        assert self.daemon.poll() is None, self.log()
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def log(self) -> str:
        return (self.directory / "daemon.log").read_text()

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.daemon is not None
        self.daemon.send_signal(number)
        code = self.daemon.wait(40)
        self.daemon = None
        return code

    def close(self) -> None:
        if self.daemon is not None:
            self.kill()
        self.store.close()
        self.namespace.close()
        for container in self._containers:
            container.namespace.close()

    def create(self, kind: str, name: str, namespace: str = "", **fields: Any) -> None:
        version = "v1" if kind in ("Pod", "Namespace") else "projectcalico.org/v3"
        metadata: dict[str, Any] = {"name": name, **({"namespace": namespace} if namespace else {})}
        metadata |= fields.pop("metadata", {})
        value = {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}
        self.store.create(Key(kind, name, namespace), value)

    def container(self, name: str = "", *, pod: bool = True) -> Container:
        """A new container; ``name`` is its pod's."""
        number = len(self._containers)
        name = name or f"pod-{number}"
        arguments = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=red;K8S_POD_NAME={name}" if pod else ""
        container = Container(Namespace.create(), f"{number:064x}", arguments)
        self._containers.append(container)
        return container

    def call(
        self,
        command: str,
        container: Container | None = None,
        conf: JSON | bytes | None = None,
        **variables: str,
    ) -> Answer:
        """Run the plugin as a runtime does."""
        process = self.begin(command, container, conf, **variables)
        return self.end(process)

    def begin(
        self,
        command: str,
        container: Container | None = None,
        conf: JSON | bytes | None = None,
        **variables: str,
    ) -> subprocess.Popen[bytes]:
        environment = {"CNI_COMMAND": command, "MANX_CNI_SOCKET": str(self.socket)}
        if container is not None:
            environment |= {
                "CNI_CONTAINERID": container.id,
                "CNI_IFNAME": container.ifname,
                "CNI_NETNS": container.netns,
                "CNI_ARGS": container.arguments,
                "CNI_PATH": "/usr/lib/cni",
            }
        environment |= variables
        stdin = conf if isinstance(conf, bytes) else json.dumps(conf or configuration()).encode()
        with inside(self.namespace.fd):
            process = subprocess.Popen(
                [self.client], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(stdin)
        process.stdin = None
        return process

    def end(self, process: subprocess.Popen[bytes]) -> Answer:
        with process:
            output, _ = process.communicate(timeout=100)
        return Answer(process.returncode, output)

    def add(self, container: Container, **keys: Any) -> Any:
        return self.call("ADD", container, configuration(**keys)).ok()

    def delete(self, container: Container, **variables: str) -> None:
        assert self.call("DEL", container, None, **variables).ok() is None

    def collect_all(self) -> None:
        """Detach everything that a failed test left."""
        self.call("GC", conf=configuration() | {VALID_ATTACHMENTS: []})

    def links(self) -> set[str]:
        """The interfaces of the node that are ours."""
        with NetlinkSocket(netns_fd=self.namespace.fd) as netlink:
            return {name for name in Links(netlink).read() if name.startswith(self.prefix)}

    def link(self, container: Container) -> int:
        """The index of the node's end of a container's wire."""
        with NetlinkSocket(netns_fd=container.namespace.fd) as netlink:
            return Links(netlink).get(container.ifname).peer_index

    def endpoints(self) -> dict[str, JSON]:
        """The WorkloadEndpoints, by name."""
        entries = self.store.list("WorkloadEndpoint").entries
        return {entry.key.name: entry.value for entry in entries}

    def held(self) -> dict[str, int]:
        """How many addresses each handle holds, according to the blocks."""
        counts: dict[str, int] = {}
        for entry in self.store.list("IPAMBlock").entries:
            spec = entry.value["spec"]
            for index in spec["allocations"]:
                if index is not None:
                    handle = spec["attributes"][index]["handle_id"]
                    counts[handle] = counts.get(handle, 0) + 1
        return counts

    def assert_empty(self) -> None:
        """Nothing is left of any container."""
        assert self.links() == set()
        assert self.endpoints() == {}
        assert self.held() == {}
        assert self.store.list("IPAMHandle").entries == []


class Felix:
    """The agent on a rig's node."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._run_dir = rig.socket.parent
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            **os.environ,
            "MANX_NODENAME": NODE,
            "MANX_DATASTORE": self._rig.url,
            "MANX_RUN_DIR": str(self._run_dir),
            "MANX_NODE_IP": "198.51.100.1/24",
        }
        log = (self._rig.directory / "felix.log").open("ab")
        with log, inside(self._rig.namespace.fd):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "felix"], cwd=ROOT, env=environment, stderr=log
            )
        eventually(self._ready)

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._rig.directory / "felix.log").read_text()
        try:
            return bool(query(self._run_dir)["ready"])
        except OSError:
            return False

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self._process = None


def build_client(kind: str, directory: Path, *flags: str) -> Path:
    """The plugin's executable, ``python`` or what a compiler makes: ``c``, or ``musl-gcc``.

    Warnings of the compiler are errors.
    """
    path = directory / f"manx-{kind}"
    nowhere = Path("/run/manx/nobody-listens-here.sock")
    if kind != "python":
        compiler = "cc" if kind == "c" else kind
        data = install.compiled(compiler, nowhere, ("-Werror", *flags))
    else:
        data = install.interpreted(nowhere)
    path.write_bytes(data)
    path.chmod(0o755)
    return path


@contextmanager
def running(client: Path, *, pool: str = POOL, **variables: str) -> Iterator[Rig]:
    """A node whose daemon serves, with these in its environment, for the block."""
    # a short path: that of a Unix socket has at most 107 bytes
    with tempfile.TemporaryDirectory(prefix="manx-cni-") as directory:
        rig = Rig(Path(directory), client)
        try:
            rig.create("IPPool", "pods", spec={"cidr": pool})
            rig.start(**variables)
            yield rig
        finally:
            rig.close()


def sysctl(namespace: Namespace, values: Mapping[str, str]) -> None:
    """Write settings below /proc/sys inside a namespace."""
    with inside(namespace.fd):
        for name, value in values.items():
            Path("/proc/sys", name).write_text(value)
