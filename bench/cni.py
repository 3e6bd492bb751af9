"""How fast pods are wired, beside the reference plugins ``ptp`` and ``host-local``.

Times are of whole plugin processes, from exec to exit, as a runtime waits for them: ours with
its daemon, theirs as they are. Both do the same in turn, in one network namespace that stands
for the node, on pods' namespaces that both use again and again, so that none is measured while
the kernel takes namespaces apart.

Sections: ``sqlite`` and ``etcd`` are the plugin alone; in ``enforced`` felix runs and an ADD
waits until it has programmed the pod's policy (SQLite); ``burst`` is 250 pods started together
under felix, until each answers a ping. ``…_daemon_cpu_ms`` is what the daemon computes for one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.net import parse_net
from cni import install
from datastore.connect import connect
from datastore.interface import Key
from kernel.addresses import Address, address_add
from kernel.links import link_up
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside
from tests.support.etcd import single_node

SECTIONS = ("sqlite", "etcd", "enforced", "burst")
REFERENCE = Path("/usr/lib/cni")  # Debian's containernetworking-plugins
ONE_BY_ONE = 150
TOGETHER = {10: 10, 50: 6}  # pods at once: rounds
BURST = 250
BURST_SECONDS = 60  # give up after that
VERSION = "1.0.0"  # the newest that Debian's reference plugins speak
NODE = "bench"
NODE_ADDRESS = "198.51.100.1"
READY_SECONDS = 30

# posix_spawn(3) goes straight to the executable; a fork of this process would take longer
# than the plugin.
_REDIRECT = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_ECHO = struct.Struct("!BBHHH")  # ICMP: type, code, checksum, identifier, sequence
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_IP_SOURCE = slice(12, 16)

# Seconds of each process, by verb and plugin; of ``daemon``: CPU time for each, of each round.
Times = dict[tuple[str, str], list[float]]
_MEASURED = ("manx", "ptp", "daemon")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin's executable, its configuration in a file, and where its output goes."""

    path: Path
    configuration: Path

    def spawn(self, command: str, pod: int, netns: Namespace) -> int:
        """Start the plugin for a pod; its process id."""
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"{pod:064x}",
            "CNI_NETNS": f"/proc/{os.getpid()}/fd/{netns.fd}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(REFERENCE),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=pod-{pod}",
        }
        return os.posix_spawn(
            self.path,
            [str(self.path)],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, str(self.configuration), os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.output(pod)), _REDIRECT, 0o600),
            ],
        )

    def output(self, pod: int) -> Path:
        """What the plugin said last about a pod."""
        return self.configuration.with_suffix(f".{pod}.out")


@dataclass(frozen=True, slots=True)
class Node:
    """A node with our daemon, and the plugins to compare."""

    manx: Plugin
    ptp: Plugin
    daemon: int  # process id


def run(sections: Sequence[str] = SECTIONS) -> dict[str, float]:
    """Measure the sections."""
    figures: dict[str, float] = {}
    for section in sections:
        figures |= _MEASUREMENTS[section]()
    return figures


def _sqlite() -> dict[str, float]:
    with _directory() as directory, _node(directory, _sqlite_url(directory), {}) as node:
        return _beside_ptp(node, "")


def _etcd() -> dict[str, float]:
    with (
        _directory() as directory,
        single_node() as server,
        _node(directory, f"etcd://{server.endpoints[0]}", {}) as node,
    ):
        figures = _beside_ptp(node, "")
    return {f"etcd_{name}": value for name, value in figures.items() if "ptp" not in name}


def _enforced() -> dict[str, float]:
    with _enforcing() as node:
        return _beside_ptp(node, "_enforced", dels=False)


def _burst() -> dict[str, float]:
    """250 pods at once, until the last answers; then the daemon's memory."""
    with _enforcing() as node, _pods(BURST) as pods:
        begun = time.perf_counter()
        times = _at_once(node.manx, "ADD", pods)
        outputs = [json.loads(node.manx.output(pod).read_bytes()) for pod in range(BURST)]
        _wait_for_answers({output["ips"][0]["address"].split("/")[0] for output in outputs})
        figures = {
            "burst_250_s": time.perf_counter() - begun,
            "burst_250_add_p50_ms": 1000 * statistics.median(times),
            "daemon_rss_mb": _rss(node.daemon),
        }
        figures["burst_250_del_p50_ms"] = 1000 * statistics.median(_at_once(node.manx, "DEL", pods))
        return figures


_MEASUREMENTS = {"sqlite": _sqlite, "etcd": _etcd, "enforced": _enforced, "burst": _burst}


def _beside_ptp(node: Node, suffix: str, *, dels: bool = True) -> dict[str, float]:
    """Both plugins one by one and at once. ``suffix`` ends the names: ``add_enforced_p50_ms``."""
    figures: dict[str, float] = {}
    with _pods(max(TOGETHER)) as pods:
        _measure(node, pods, 1, 5)  # what is slow only once
        for number, rounds in {1: ONE_BY_ONE, **TOGETHER}.items():
            times = _measure(node, pods, number, rounds)
            at_once = f"_x{number}" if number > 1 else ""
            for verb in ("add", "del") if dels else ("add",):
                ours, theirs = times[verb, "manx"], times[verb, "ptp"]
                name = f"{verb}{suffix}{at_once}"
                figures[f"{name}_daemon_cpu_ms"] = 1000 * statistics.mean(times[verb, "daemon"])
                for percent in (50, 99):
                    mine, other = _quantile(ours, percent), _quantile(theirs, percent)
                    figures[f"{name}_p{percent}_ms"] = 1000 * mine
                    figures[f"ptp_{name}_p{percent}_ms"] = 1000 * other
                    figures[f"{name}_p{percent}_ratio"] = mine / other
    return figures


def _quantile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _measure(node: Node, pods: Sequence[Namespace], number: int, rounds: int) -> Times:
    """``rounds`` times ``number`` at once; who comes first changes from round to round."""
    plugins = [("manx", node.manx), ("ptp", node.ptp)]
    times: Times = {(verb, name): [] for verb in ("add", "del") for name in _MEASURED}
    for turn in range(rounds):
        plugins.reverse()
        first = turn * number % len(pods)
        chosen = pods[first : first + number]
        for name, plugin in plugins:
            for verb in ("ADD", "DEL"):
                spent = _cpu_seconds(node.daemon)
                times[verb.lower(), name] += _at_once(plugin, verb, chosen)
                if plugin is node.manx:
                    cpu = (_cpu_seconds(node.daemon) - spent) / number
                    times[verb.lower(), "daemon"].append(cpu)
    return times


def _at_once(plugin: Plugin, verb: str, pods: Sequence[Namespace]) -> list[float]:
    started = {}
    for pod, netns in enumerate(pods):
        now = time.perf_counter()
        started[plugin.spawn(verb, pod, netns)] = now, pod
    times = []
    while started:
        process, status = os.waitpid(-1, 0)
        now = time.perf_counter()
        if process not in started:
            raise RuntimeError(f"a daemon ended during the measurement: {status}")
        begun, pod = started.pop(process)
        if status != 0:
            output = plugin.output(pod).read_text()
            raise RuntimeError(f"{plugin.path} {verb}: status {status}: {output}")
        times.append(now - begun)
    return times


def _wait_for_answers(addresses: set[str]) -> None:
    """Ping all of them until each has answered once (RFC 792)."""
    checksum = 0xFFFF - (_ECHO_REQUEST << 8)
    echo = _ECHO.pack(_ECHO_REQUEST, 0, checksum, 0, 0)
    deadline = time.monotonic() + BURST_SECONDS
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        icmp.settimeout(0.02)
        while addresses:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(addresses)} pods do not answer, {min(addresses)} for one")
            for address in addresses:
                icmp.sendto(echo, (address, 0))
            with contextlib.suppress(TimeoutError):
                while addresses:
                    packet = icmp.recv(1500)
                    if packet[(packet[0] & 15) * 4] == _ECHO_REPLY:
                        addresses.discard(socket.inet_ntoa(packet[_IP_SOURCE]))


@contextlib.contextmanager
def _pods(number: int) -> Iterator[list[Namespace]]:
    """The network namespaces of that many pods."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Namespace.create()) for _ in range(number)]


@contextlib.contextmanager
def _enforcing() -> Iterator[Node]:
    """A node where felix runs, with a policy for every pod, and ADDs wait for it."""
    with _directory() as directory:
        url = _sqlite_url(directory)
        with (
            _node(directory, url, {"policy_setup_timeout_seconds": 10}) as node,
            _program("felix", directory, url),
        ):
            _until(lambda: _felix_is_ready(directory / "felix.sock"))
            yield node


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """A node's network namespace, which this thread is in, and a directory for its programs."""
    with (
        tempfile.TemporaryDirectory(prefix="manx-bench-") as name,
        Namespace.create() as namespace,
        inside(namespace.fd),
    ):
        with NetlinkSocket() as netlink:
            address = Address(1, parse_net(f"{NODE_ADDRESS}/32"), 32)
            netlink.batch([link_up(1), address_add(address)])
        yield Path(name)


def _sqlite_url(directory: Path) -> str:
    return f"sqlite://{directory}/datastore.db"


@contextlib.contextmanager
def _node(directory: Path, url: str, settings: Mapping[str, object]) -> Iterator[Node]:
    """The daemon, and both plugins; ``settings``: more keys of our configuration."""
    _create_objects(url)
    path = directory / "cni.sock"
    with _program("cni", directory, url, "daemon") as daemon:
        _until(path.exists)
        yield Node(_manx(directory, path, settings), _ptp(directory), daemon)


@contextlib.contextmanager
def _program(module: str, directory: Path, url: str, *arguments: str) -> Iterator[int]:
    """One of our daemons, for the block; its process id."""
    environment = {
        **os.environ,
        "MANX_NODENAME": NODE,
        "MANX_NODE_IP": f"{NODE_ADDRESS}/24",
        "MANX_DATASTORE": url,
        "MANX_RUN_DIR": str(directory),
        "MANX_LOG_LEVEL": "WARNING",
    }
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def _until(condition: Any) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"a daemon is not ready after {READY_SECONDS} s")
        time.sleep(0.01)


def _felix_is_ready(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        if connection.connect_ex(str(path)) != 0:
            return False
        with connection.makefile("rb") as answer:
            return bool(json.loads(answer.read() or b"{}").get("in_sync"))


def _create_objects(url: str) -> None:
    v3 = "projectcalico.org/v3"
    allow = [{"action": "Allow"}]
    policy = {"selector": "all()", "types": ["Ingress", "Egress"], "ingress": allow}
    objects = [
        ("IPPool", v3, {"cidr": "10.65.0.0/16"}),
        ("Namespace", "v1", {}),
        ("GlobalNetworkPolicy", v3, {**policy, "egress": allow}),
    ]
    store = connect(url)
    for kind, version, spec in objects:
        value = {"apiVersion": version, "kind": kind, "metadata": {"name": "bench"}, "spec": spec}
        store.create(Key(kind, "bench"), value)
    store.close()


def _manx(directory: Path, path: Path, settings: Mapping[str, object]) -> Plugin:
    executable, *_ = install.install(directory / "bin", directory / "net.d", path)
    configuration = {
        "cniVersion": VERSION,
        "name": "k8s-pod-network",
        "type": "manx",
        "policy_setup_timeout_seconds": 0,
        **settings,
    }
    return Plugin(executable, _file(directory / "manx.conf", configuration))


def _ptp(directory: Path) -> Plugin:
    configuration = {
        "cniVersion": VERSION,
        "name": "bench",
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "subnet": "10.66.0.0/16",
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(directory / "host-local"),
        },
    }
    return Plugin(REFERENCE / "ptp", _file(directory / "ptp.conf", configuration))


def _file(path: Path, configuration: Mapping[str, object]) -> Path:
    path.write_text(json.dumps(configuration))
    return path


def _rss(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _cpu_seconds(process: int) -> float:
    """What a process has used, user and system time; proc(5), /proc/PID/stat."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
