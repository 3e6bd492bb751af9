"""One machine in a network namespace with all programs of a node, and a store that may fail.

etcd runs inside of the namespace, so its address is the same on every machine of every test.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bird_glue.detector import kill as kill_bfd
from bird_glue.process import ExaBgp
from kernel.links import link_up
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside
from tests.bird_glue.world import Process, Station
from tests.cni.rig import build_client, configuration
from tests.scenarios.fabrics import calico
from tests.support.etcd import fast_directory
from tests.support.netns import eventually, fresh_namespace, run

ROOT = Path(__file__).resolve().parents[2]
NODE = "node-1"
ADDRESS = "172.31.1.11/24"
NAMESPACE = "red"
ETCD = "etcd://127.0.0.1:2379?timeout=1"
PROGRAMS = ("felix", "bird_glue", "cni")
# Everything that a node's programs write in the kernel.
TABLES = (
    "ip -d link show",
    "ip address show",
    "ip -4 route show table all",
    "ip -6 route show table all",
    "ip -4 rule show",
    "ip -6 rule show",
    "ip nexthop show",
    "ip neighbour show nud permanent",
    "bridge fdb show",
    "nft -s list ruleset",
    "ipset save",
    "sysctl -a -r ^net\\.ipv[46]\\.(ip_forward|conf\\..*(forwarding|rp_filter|proxy))",
)
_OF_THE_KERNEL = re.compile(r"\b(fe80|ff00):|valid_lft|^33:33:ff:")


class Machine:
    """A node whose programs are started, killed and asked by the test."""

    def __init__(self, namespace: Namespace, directory: Path, url: str, stack: ExitStack) -> None:
        self.namespace = namespace
        self.directory = directory
        self.url = url
        self.run_dir = directory / "run"
        self._stack = stack
        self._etcd_data = stack.enter_context(fast_directory("manx-outage-"))
        self._etcd: Process | None = None
        self._client = build_client("c", directory)
        self._pods = 0
        with NetlinkSocket(netns_fd=namespace.fd) as netlink:
            assert netlink.batch([link_up(1)]) == []
        stack.callback(self._end_exabgp)

    # -- the store ---------------------------------------------------------------------------

    def start_etcd(self) -> None:
        """Start etcd, or start it again with the data it had; returns when it serves."""
        client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        self._etcd = self._process(
            "etcd",
            *("etcd", "--name", "m0", "--data-dir", str(self._etcd_data / "m0")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"m0={peer}", "--logger", "zap", "--log-outputs", "stderr"),
        )
        eventually(lambda: self.manx("get", "pools").returncode == 0)

    def kill_etcd(self) -> None:
        """SIGKILL."""
        assert self._etcd is not None
        self._etcd.end()

    # -- the programs ------------------------------------------------------------------------

    def start(self) -> None:
        """Start felix, bird_glue and the CNI daemon."""
        for program in PROGRAMS:
            arguments = ("daemon",) if program == "cni" else ()
            self._process(program, sys.executable, "-m", program, *arguments)

    def _process(self, name: str, *command: str) -> Process:
        log = self.directory / f"{name}.log"
        process = Process(self.namespace, *command, log=log, env=self._environment)
        return self._stack.enter_context(process)

    @property
    def _environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(ROOT),
            "MANX_NODENAME": NODE,
            "MANX_NODE_IP": ADDRESS,
            "MANX_DATASTORE": self.url,
            "MANX_RUN_DIR": str(self.run_dir),
        }

    def log(self, program: str) -> str:
        """What a program has logged."""
        return (self.directory / f"{program}.log").read_text()

    def _end_exabgp(self) -> None:
        kill_bfd(self.run_dir)
        found = ExaBgp.find(self.run_dir)
        if found is not None:
            found.stop(5)
            found.close()

    def manx(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """``manxctl`` on this machine."""
        with inside(self.namespace.fd):
            return subprocess.run(
                [sys.executable, "-m", "manxctl", *arguments],
                env=self._environment | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                cwd=ROOT,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

    def apply(self, *objects: dict[str, Any]) -> None:
        """``manxctl apply``."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        result = self.manx("apply", "-f", "-", stdin=text)
        assert result.returncode == 0, result.stderr

    def status(self) -> dict[str, Any]:
        """``manxctl node status -o json``; empty answers of programs that can't be asked."""
        found: dict[str, Any] = json.loads(self.manx("node", "status", "-o", "json").stdout)
        return {name: answer or {} for name, answer in found.items()}

    def followed(self) -> bool:
        """Whether both agents follow the store."""
        status = self.status()
        return all(
            status[agent].get("in_sync") and status[agent].get("datastore") == "followed"
            for agent in ("felix", "bgp")
        )

    def kernel(self) -> dict[str, list[str]]:
        """Every table of the kernel that a node's programs write to.

        Without link-local addresses, which the kernel makes, and late, and what follows from them.
        """
        return {
            table: [line for line in self._table(table) if not _OF_THE_KERNEL.search(line)]
            for table in TABLES
        }

    def _table(self, table: str) -> list[str]:
        return run(self.namespace, *table.split(" ")).stdout.splitlines()

    # -- pods --------------------------------------------------------------------------------

    def container(self, name: str) -> Station:
        """A namespace for a pod, not plugged yet."""
        directory = self.directory / name
        directory.mkdir()
        return Station(name, self._stack.enter_context(fresh_namespace()), directory)

    def call(self, command: str, pod: Station) -> tuple[int, Any]:
        """Run the CNI plugin as a runtime does: its exit code, and what it said."""
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"container-{pod.name}",
            "CNI_IFNAME": "eth0",
            "CNI_NETNS": f"/proc/self/fd/{pod.namespace.fd}",
            "CNI_ARGS": f"K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={pod.name}",
            "CNI_PATH": "/usr/lib/cni",
            "MANX_CNI_SOCKET": str(self.run_dir / "cni.sock"),
        }
        with inside(self.namespace.fd):
            done = subprocess.run(
                [self._client],
                env=environment,
                input=json.dumps(configuration()).encode(),
                stdout=subprocess.PIPE,
                timeout=90,
                check=False,
                pass_fds=(pod.namespace.fd,),
            )
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def plug(self, pod: Station) -> str:
        """ADD, which must succeed; the pod's address."""
        code, answer = self.call("ADD", pod)
        assert code == 0, answer
        address: str = answer["ips"][0]["address"].partition("/")[0]
        return address


def settings() -> list[dict[str, Any]]:
    """What a cluster needs before its first pod."""
    return [
        calico("IPPool", "pods", cidr="10.65.0.0/16"),
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
    ]


@contextmanager
def machine(url: str = "", *, namespace: Namespace | None = None) -> Iterator[Machine]:
    """A machine with ``eth0``. ``url``: its store; by default a file in its directory."""
    with ExitStack() as stack:
        # a short path: that of a Unix socket has at most 107 bytes
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="manx-node-")))
        own = namespace or stack.enter_context(fresh_namespace())
        if namespace is None:
            for command in (
                "link add eth0 up type veth peer name wire",
                "link set wire up",
                f"address add {ADDRESS} dev eth0",
            ):
                run(own, "ip", *command.split(" "))
            # a moment later, as the kernel finds out by itself
            eventually(lambda: run(own, "ip", "link").stdout.count("state UP") == 2)
        made = Machine(own, directory, url or f"sqlite://{directory}/store.db", stack)
        try:
            yield made
        except BaseException:
            for program in PROGRAMS:
                if (directory / f"{program}.log").exists():
                    print(f"--- {program}\n{made.log(program)[-4000:]}")
            raise
