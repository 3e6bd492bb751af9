"""How fast pods are wired, beside the reference plugins ``ptp`` and ``host-local``.

Times are of whole plugin processes, from exec to exit, as a runtime waits for them: ours with
its daemon, theirs as they are. Both do the same in turn, in one network namespace that stands
for the node, on pods' namespaces that are as fresh.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cni import install
from datastore.connect import connect
from datastore.interface import Key
from kernel.links import link_up
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside

REFERENCE = Path("/usr/lib/cni")  # Debian's containernetworking-plugins
ONE_BY_ONE = 150
TOGETHER = {10: 8, 50: 4}  # pods at once: rounds
VERSION = "1.0.0"  # the newest that Debian's reference plugins speak

# posix_spawn(3) goes straight to the executable; a fork of this process would take longer
# than the plugin.
_REDIRECT = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin's executable, its configuration in a file, and its environment."""

    path: Path
    configuration: Path
    environment: dict[str, str]

    def spawn(self, command: str, pod: int, netns: Namespace) -> int:
        """Start the plugin for a pod; its process id."""
        environment = {
            **self.environment,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"{pod:064x}",
            "CNI_NETNS": f"/proc/{os.getpid()}/fd/{netns.fd}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(REFERENCE),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=pod-{pod}",
        }
        output = self.configuration.with_suffix(".out")
        return os.posix_spawn(
            self.path,
            [str(self.path)],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, str(self.configuration), os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(output), _REDIRECT, 0o600),
            ],
        )


def run() -> dict[str, float]:
    """Measure one by one and at once."""
    with _node() as (manx, ptp, daemon):
        figures = _one_by_one(manx, ptp)
        for number, rounds in TOGETHER.items():
            figures |= _together(manx, ptp, number, rounds)
        figures["daemon_rss_mb"] = _rss(daemon)
    return figures


def _one_by_one(manx: Plugin, ptp: Plugin) -> dict[str, float]:
    times = _measure(manx, ptp, 1, ONE_BY_ONE)
    figures = {}
    for verb in ("add", "del"):
        ours, theirs = times[verb, manx.path.name], times[verb, ptp.path.name]
        for prefix, values in (("", ours), ("ptp_", theirs)):
            figures[f"{prefix}{verb}_p50_ms"] = 1000 * _quantile(values, 50)
            figures[f"{prefix}{verb}_p99_ms"] = 1000 * _quantile(values, 99)
        figures |= _ratios(verb, ours, theirs)
    return figures


def _together(manx: Plugin, ptp: Plugin, number: int, rounds: int) -> dict[str, float]:
    times = _measure(manx, ptp, number, rounds)
    figures = {}
    for verb in ("add", "del"):
        ours, theirs = times[verb, manx.path.name], times[verb, ptp.path.name]
        figures[f"{verb}_x{number}_p50_ms"] = 1000 * _quantile(ours, 50)
        figures |= _ratios(f"{verb}_x{number}", ours, theirs)
    return figures


def _ratios(name: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_p{percent}_ratio": _quantile(ours, percent) / _quantile(theirs, percent)
        for percent in (50, 99)
    }


def _quantile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _measure(
    manx: Plugin, ptp: Plugin, number: int, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each process by verb and plugin: ``rounds`` times ``number`` at once."""
    times: dict[tuple[str, str], list[float]] = {
        (verb, plugin.path.name): [] for verb in ("add", "del") for plugin in (manx, ptp)
    }
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            pods = [
                (plugin, [stack.enter_context(Namespace.create()) for _ in range(number)])
                for plugin in (manx, ptp)
            ]
            for verb in ("ADD", "DEL"):
                for plugin, namespaces in pods:
                    times[verb.lower(), plugin.path.name] += _at_once(plugin, verb, namespaces)
    return times


def _at_once(plugin: Plugin, verb: str, namespaces: Sequence[Namespace]) -> list[float]:
    started = {}
    for number, netns in enumerate(namespaces):
        now = time.perf_counter()
        started[plugin.spawn(verb, number, netns)] = now
    times = []
    while started:
        process, status = os.waitpid(-1, 0)
        now = time.perf_counter()
        if process not in started:
            raise RuntimeError(f"the daemon ended during the measurement: {status}")
        if status != 0:
            output = plugin.configuration.with_suffix(".out").read_text()
            raise RuntimeError(f"{plugin.path} {verb}: status {status}: {output}")
        times.append(now - started.pop(process))
    return times


@contextlib.contextmanager
def _node() -> Iterator[tuple[Plugin, Plugin, int]]:
    """A node with our daemon: the two plugins, and the daemon's process id."""
    with (
        tempfile.TemporaryDirectory(prefix="manx-bench-") as name,
        Namespace.create() as node,
        inside(node.fd),
    ):
        directory = Path(name)
        with NetlinkSocket() as netlink:
            netlink.batch([link_up(1)])
        url = f"sqlite://{directory}/datastore.db"
        _create_pool(url)
        socket = directory / "cni.sock"
        environment = {
            **os.environ,
            "MANX_NODENAME": "bench",
            "MANX_DATASTORE": url,
            "MANX_RUN_DIR": str(directory),
            "MANX_LOG_LEVEL": "WARNING",
        }
        with subprocess.Popen([sys.executable, "-m", "cni", "daemon"], env=environment) as daemon:
            try:
                while not socket.exists():
                    if daemon.poll() is not None:
                        raise RuntimeError(f"the daemon ended: {daemon.returncode}")
                    time.sleep(0.01)
                yield _manx(directory, socket), _ptp(directory), daemon.pid
            finally:
                daemon.terminate()


def _create_pool(url: str) -> None:
    store = connect(url)
    store.create(
        Key("IPPool", "bench"),
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "IPPool",
            "metadata": {"name": "bench"},
            "spec": {"cidr": "10.65.0.0/16"},
        },
    )
    store.close()


def _manx(directory: Path, socket: Path) -> Plugin:
    path, _ = install.install(directory / "bin", directory / "net.d", socket)
    configuration = {"cniVersion": VERSION, "name": "k8s-pod-network", "type": "manx"}
    return Plugin(path, _file(directory / "manx.conf", configuration), {})


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
    return Plugin(REFERENCE / "ptp", _file(directory / "ptp.conf", configuration), {})


def _file(path: Path, configuration: Mapping[str, object]) -> Path:
    path.write_text(json.dumps(configuration))
    return path


def _rss(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
