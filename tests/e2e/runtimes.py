"""Container runtimes on a node of a lab, each of which calls CNI in its own way.

A container of any of them runs BusyBox from a local root file system, sleeps, and can be told
to execute something.
"""

from __future__ import annotations

import abc
import importlib.util
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from lab.client import Lab
from tests.support.netns import eventually

IMAGE = "localhost/busybox:manx"
NETWORK = "k8s-pod-network"
CONFLIST = "/etc/cni/net.d/10-manx.conflist"
SLEEP = ["/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 1000 & wait; done"]
_PROTO = Path(__file__).with_name("cri.proto")
_CALL_SECONDS = 100
_FETCH = """
import sys, urllib.request
print(len(urllib.request.urlopen(sys.argv[1], timeout=20).read()))
"""
_CAPABILITIES = ["CAP_NET_RAW", "CAP_NET_BIND_SERVICE"]


def container_name() -> str:
    """A name for a container."""
    return f"c-{uuid.uuid4().hex[:8]}"


def fetched(lab: Lab, member: str, address: str, path: str) -> int:
    """How many bytes of a file of a container a member of the lab gets by HTTP; 0 for none."""
    done = lab.run(member, sys.executable, "-c", _FETCH, f"http://{address}{path}")
    return int(done.stdout or 0)


class CallError(Exception):
    """A runtime could not do what it was asked."""


@dataclass(frozen=True, slots=True)
class Host:
    """A node as its runtimes need it. ``group``: their control group, below each hierarchy."""

    lab: Lab
    node: str
    root: Path
    archive: Path
    cnitool: Path
    group: str

    def run(self, *argv: str, **variables: str) -> str:
        """Run a command on the node; its output. Raises CallError."""
        assignments = [f"{name}={value}" for name, value in variables.items()]
        done = self.lab.run(self.node, "env", *assignments, *argv)
        if done.returncode != 0:
            raise CallError(f"{' '.join(argv)}: {done.stderr}")
        return done.stdout

    def write(self, path: str, text: str) -> None:
        """Write a file of the node."""
        script = 'mkdir -p "${1%/*}" && cat >"$1"'
        done = self.lab.run(self.node, "sh", "-c", script, "sh", path, input=text)
        assert done.returncode == 0, done.stderr

    def conflist(self, path: str = CONFLIST) -> dict[str, Any]:
        """A network configuration list of the node."""
        found: dict[str, Any] = json.loads(self.run("cat", path))
        return found


class Runtime(abc.ABC):
    """The runtime of a node. Containers have names that no other has."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @abc.abstractmethod
    def start(self, name: str) -> None:
        """Run a container; it has its network when this returns. Raises CallError."""

    @abc.abstractmethod
    def execute(self, name: str, *argv: str) -> str:
        """Run a command in it; its output. Raises CallError."""

    @abc.abstractmethod
    def stop(self, name: str) -> None:
        """End and remove it. Raises CallError."""

    def address(self, name: str) -> str:
        """The IPv4 address of its eth0."""
        words: list[str] = []

        def shown() -> bool:  # on a busy machine ctr may end before it has shown all
            words[:] = self.execute(name, "/bin/ip", "-o", "-4", "addr", "show", "eth0").split()
            return "inet" in words

        eventually(shown)
        return words[words.index("inet") + 1].partition("/")[0]

    def pings(self, name: str, address: str) -> bool:
        """Whether it reaches an address."""
        try:
            self.execute(name, "/bin/ping", "-c", "1", "-W", "10", address)
        except CallError:
            return False
        return True


class Containerd:
    """containerd on a node, which ``ctr`` and the CRI talk to."""

    FOLDER = "/run/ctd"
    SOCKET = f"{FOLDER}/containerd.sock"

    def __init__(self, host: Host) -> None:
        self.host = host
        host.write(f"{self.FOLDER}/config.toml", self._configuration())
        self._log = f"{self.FOLDER}/log"
        command = f"exec containerd -c {self.FOLDER}/config.toml >{self._log} 2>&1"
        self.process = host.lab.popen(host.node, ["sh", "-c", command])
        eventually(self._serves)
        self.ctr("-n", "k8s.io", "images", "import", "--snapshotter", "native", str(host.archive))

    def _configuration(self) -> str:
        # What a machine without privileges of its own (oom_score_adj), AppArmor or a file system
        # that overlayfs can lie on (the lab's tmpfs) needs.
        return f"""
version = 2
root = "{self.FOLDER}/root"
state = "{self.FOLDER}/state"
[grpc]
  address = "{self.SOCKET}"
[ttrpc]
  address = "{self.SOCKET}.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{IMAGE}"
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "/etc/cni/net.d"
    bin_dir = "/opt/cni/bin"
"""

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.host.run("cat", self._log)
        done = self.host.lab.run(self.host.node, "ctr", "-a", self.SOCKET, "version")
        return done.returncode == 0

    def ctr(self, *argv: str) -> str:
        """``ctr``, the command. Raises CallError."""
        return self.host.run("ctr", "-a", self.SOCKET, *argv)

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self.process.terminate()
        self.process.wait(60)


class Ctr(Runtime):
    """``ctr run --cni``: CNI_NETNS is empty at DEL, and there is no pod."""

    def __init__(self, host: Host, containerd: Containerd) -> None:
        super().__init__(host)
        self._containerd = containerd
        self._running: dict[str, subprocess.Popen[Any]] = {}

    def _ctr(self, *argv: str) -> str:
        return self._containerd.ctr("-n", self.host.group, *argv)

    def start(self, name: str) -> None:
        command = ["ctr", "-a", Containerd.SOCKET, "-n", self.host.group, "run", "--rm", "--cni"]
        command += ["--rootfs", str(self.host.root), name, *SLEEP]
        process = self.host.lab.popen(
            self.host.node, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

        def runs() -> bool:
            return process.poll() is not None or self._state(name) == "RUNNING"

        eventually(runs)
        if process.poll() is not None:
            output, _ = process.communicate()
            raise CallError(output)
        self._running[name] = process

    def _state(self, name: str) -> str:
        lines = [line.split() for line in self._ctr("task", "ls").splitlines()]
        return next((line[2] for line in lines if line[0] == name), "")

    def execute(self, name: str, *argv: str) -> str:
        return self._ctr("task", "exec", "--exec-id", uuid.uuid4().hex, name, *argv)

    def stop(self, name: str) -> None:
        process = self._running.pop(name)
        self._ctr("task", "kill", "-s", "KILL", name)
        output, _ = process.communicate(timeout=_CALL_SECONDS)
        # the status is that of the container, which was killed
        if process.returncode != 128 + 9:
            raise CallError(output)


class Cri(Runtime):
    """The container runtime interface, as kubelet uses it: pods, and several DELs for each."""

    def __init__(self, host: Host, containerd: Containerd, messages: ModuleType) -> None:
        super().__init__(host)
        self._messages: Any = messages
        self._sandboxes: dict[str, str] = {}
        self._containers: dict[str, str] = {}
        # the socket as this process sees it: through the root directory of one in the node
        path = f"/proc/{containerd.process.pid}/root{Containerd.SOCKET}"
        self._channel = grpc.insecure_channel(f"unix:{path}")

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def _call(self, method: str, **fields: Any) -> Any:
        messages = self._messages
        call = self._channel.unary_unary(
            f"/runtime.v1.RuntimeService/{method}",
            request_serializer=getattr(messages, f"{method}Request").SerializeToString,
            response_deserializer=getattr(messages, f"{method}Response").FromString,
        )
        request = getattr(messages, f"{method}Request")(**fields)
        try:
            return call(request, timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            raise CallError(f"{method}: {error.details()}") from None

    def start(self, name: str, ports: Mapping[int, int] | None = None) -> None:
        """``ports``: those of the node (TCP), each with the container's behind it."""
        messages = self._messages
        pod = messages.PodSandboxConfig(
            metadata=messages.PodSandboxMetadata(
                name=name, namespace="default", uid=str(uuid.uuid4())
            ),
            hostname=name,
            log_directory=f"/run/log/pods/{name}",
            port_mappings=[
                messages.PortMapping(host_port=host, container_port=container)
                for host, container in (ports or {}).items()
            ],
            linux=messages.LinuxPodSandboxConfig(cgroup_parent=f"/{self.host.group}"),
        )
        sandbox = self._call("RunPodSandbox", config=pod).pod_sandbox_id
        self._sandboxes[name] = sandbox
        container = self._call(
            "CreateContainer",
            pod_sandbox_id=sandbox,
            sandbox_config=pod,
            config=messages.ContainerConfig(
                metadata=messages.ContainerMetadata(name="main"),
                image=messages.ImageSpec(image=IMAGE),
                log_path="main.log",
            ),
        ).container_id
        self._containers[name] = container
        self._call("StartContainer", container_id=container)

    def execute(self, name: str, *argv: str) -> str:
        done = self._call(
            "ExecSync", container_id=self._containers[name], cmd=argv, timeout=_CALL_SECONDS
        )
        if done.exit_code != 0:
            raise CallError(done.stderr.decode())
        output: str = done.stdout.decode()
        return output

    def address(self, name: str) -> str:
        """What the runtime says, which must be what the container sees."""
        status = self._call("PodSandboxStatus", pod_sandbox_id=self._sandboxes[name]).status
        seen = super().address(name)
        assert status.network.ip == seen
        return seen

    def stop(self, name: str) -> None:
        sandbox = self._sandboxes.pop(name)
        for method in ("StopPodSandbox", "StopPodSandbox", "RemovePodSandbox"):
            self._call(method, pod_sandbox_id=sandbox)


class Podman(Runtime):
    """podman with its CNI backend: a pod namespace named like the container."""

    FOLDER = "/run/podman"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        configuration = f"""
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "{self.FOLDER}/networks"
default_network = "{NETWORK}"
[containers]
default_sysctls = []
default_ulimits = []
"""
        host.write(f"{self.FOLDER}/containers.conf", configuration)
        host.write(f"{self.FOLDER}/networks/10-manx.conflist", json.dumps(host.conflist()))

    def _podman(self, *argv: str) -> str:
        command = ["podman", "--root", f"{self.FOLDER}/root", "--runroot", f"{self.FOLDER}/run"]
        command += ["--tmpdir", f"{self.FOLDER}/tmp", "--storage-driver", "vfs"]
        environment = {"CONTAINERS_CONF": f"{self.FOLDER}/containers.conf"}
        return self.host.run(*command, *argv, **environment)

    def start(self, name: str, address: str = "") -> None:
        options = ["--detach", "--name", name, "--network", NETWORK]
        options += ["--ip", address] if address else []
        options += ["--cgroup-parent", f"/{self.host.group}", "--oom-score-adj", "0"]
        self._podman("run", *options, "--rootfs", str(self.host.root), *SLEEP)

    def execute(self, name: str, *argv: str) -> str:
        return self._podman("exec", name, *argv)

    def stop(self, name: str) -> None:
        self._podman("rm", "--force", "--time", "0", name)


class CniTool(Runtime):
    """libcni by itself, and runc for the container in the namespace that it connected."""

    FOLDER = "/run/oci"

    def __init__(self, host: Host, conflist: str = CONFLIST) -> None:
        super().__init__(host)
        self._conflist = conflist

    def call(self, command: str, name: str = "", **variables: str) -> str:
        """``cnitool COMMAND``, for a container or for the network. Raises CallError."""
        attachment = [name, f"/run/netns/{name}", "eth0"] if name else []
        environment = {"CNI_PATH": "/opt/cni/bin", "CNI_CACHE": f"{self.FOLDER}/cache", **variables}
        argv = [str(self.host.cnitool), command, self._conflist, *attachment]
        return self.host.run(*argv, **environment)

    def start(self, name: str, **variables: str) -> None:
        """``variables``: of cnitool, such as CAP_ARGS."""
        self.host.run("ip", "netns", "add", name)
        try:
            self.call("add", name, **variables)
        except CallError:
            self.call("del", name, **variables)
            self.host.run("ip", "netns", "delete", name)
            raise
        bundle = f"{self.FOLDER}/{name}"
        self.host.write(f"{bundle}/config.json", json.dumps(self._bundle(name)))
        self._runc("run", "--detach", "--bundle", bundle, name)

    def _runc(self, *argv: str) -> str:
        # a container keeps what runc was given as its standard output
        if argv[0] == "run":
            script = f'exec runc --root {self.FOLDER}/state "$@" >{self.FOLDER}/log 2>&1 </dev/null'
            return self.host.run("sh", "-c", script, "sh", *argv)
        return self.host.run("runc", "--root", f"{self.FOLDER}/state", *argv)

    def _bundle(self, name: str) -> dict[str, Any]:
        sets = ("bounding", "effective", "permitted")
        namespaces: list[dict[str, str]] = [
            {"type": kind} for kind in ("pid", "mount", "ipc", "uts")
        ]
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": SLEEP,
                "env": ["PATH=/bin"],
                "cwd": "/",
                "capabilities": dict.fromkeys(sets, _CAPABILITIES),
            },
            "root": {"path": str(self.host.root), "readonly": True},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "namespaces": [*namespaces, {"type": "network", "path": f"/run/netns/{name}"}],
                "cgroupsPath": f"/{self.host.group}/{name}",
            },
        }

    def execute(self, name: str, *argv: str) -> str:
        return self._runc("exec", name, *argv)

    def stop(self, name: str, **variables: str) -> None:
        """``variables``: as for ``start``."""
        self._runc("delete", "--force", name)
        self.call("del", name, **variables)
        self.host.run("ip", "netns", "delete", name)


@contextmanager
def cri_messages(folder: Path) -> Iterator[ModuleType]:
    """The message classes of the CRI, made from cri.proto."""
    from grpc_tools import protoc

    arguments = ["protoc", f"-I{_PROTO.parent}", f"--python_out={folder}", _PROTO.name]
    assert protoc.main(arguments) == 0
    spec = importlib.util.spec_from_file_location("cri_pb2", folder / "cri_pb2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]
