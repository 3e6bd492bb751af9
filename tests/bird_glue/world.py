"""Real agents, ExaBGP, BIRD and FRR in namespaces of their own, and packets between them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from api.names import cidr_name
from api.net import parse_net
from bird_glue.detector import kill as kill_bfd
from bird_glue.process import Bird as BirdProcess
from bird_glue.process import ExaBgp
from bird_glue.status import BgpStatus, PeerStatus, StatusError, query
from datastore.connect import connect as connect_store
from datastore.interface import Key
from kernel.netns import Namespace, inside
from tests.support.netns import connect, eventually, fresh_namespace, run

_FLOW = 20  # packets
_ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}


R = TypeVar("R", bound="Router")


class Process:
    """A program in a namespace, killed by its process id at the end."""

    def __init__(
        self, namespace: Namespace, *command: str, log: Path, env: dict[str, str] | None = None
    ) -> None:
        with inside(namespace.fd), log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=_ENVIRONMENT | (env or {}),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self, number: int = signal.SIGKILL) -> int:
        self._process.send_signal(number)
        return self._process.wait(20)

    def wait(self) -> int:
        return self._process.wait(20)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self.end()


class Ping:
    """Echo requests, 200 a second, and how many were not answered. Leave the block first.

    They flow when the block begins, and as long again before it ends.
    """

    def __init__(self, source: Station, target: str) -> None:
        self._log = source.directory / f"ping-{target}.log"
        self._log.unlink(missing_ok=True)
        self._process = Process(
            source.namespace, "ping", "-n", "-i", "0.005", target, log=self._log
        )

    def __enter__(self) -> Ping:
        eventually(lambda: self._answers() > _FLOW)
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        before = self._answers()
        try:
            if kind is None:
                eventually(lambda: self._answers() > before + _FLOW)
        finally:
            self._process.end(signal.SIGINT)

    def _answers(self) -> int:
        return self._log.read_text().count(" bytes from ")

    @property
    def report(self) -> tuple[int, int]:
        """(sent, received); the last packet may still have been under way."""
        found = re.search(r"(\d+) packets transmitted, (\d+) received", self._log.read_text())
        assert found, self._log.read_text()
        return int(found[1]), int(found[2])

    @property
    def lost(self) -> int:
        sent, received = self.report
        return max(0, sent - received - 1)


class Store:
    """The datastore of a test; objects are written as users write them."""

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite://{path}"
        self._store = connect_store(self.url)

    def put(self, kind: str, name: str, **spec: Any) -> None:
        value = {
            "apiVersion": "projectcalico.org/v3",
            "kind": kind,
            "metadata": {"name": name, "labels": spec.pop("labels", {})},
            "spec": spec,
        }
        self.put_raw(kind, name, value)

    def put_raw(self, kind: str, name: str, value: dict[str, Any], namespace: str = "") -> None:
        key = Key(kind, name, namespace)
        if any(entry.key == key for entry in self._store.list(kind).entries):
            self._store.update(key, value)
        else:
            self._store.create(key, value)

    def delete(self, kind: str, name: str) -> None:
        self._store.delete(Key(kind, name))

    def node(self, name: str, address: str, **bgp: Any) -> None:
        labels = bgp.pop("labels", {})
        self.put("Node", name, labels=labels, bgp={"ipv4Address": address, **bgp})

    def block(self, node: str, cidr: str, state: str = "confirmed") -> None:
        name = f"{node}-{cidr_name(parse_net(cidr))}"
        self.put("BlockAffinity", name, state=state, node=node, type="host", cidr=cidr)

    def drop_block(self, node: str, cidr: str) -> None:
        self.delete("BlockAffinity", f"{node}-{cidr_name(parse_net(cidr))}")

    def close(self) -> None:
        self._store.close()


@dataclass
class Station:
    """A machine: its namespace and its directory."""

    name: str
    namespace: Namespace
    directory: Path

    def run(self, *command: str) -> str:
        return run(self.namespace, *command).stdout

    def routes(self, selector: str = "proto 179", family: str = "-4") -> list[str]:
        """``ip route show``, one route a line, without flags and padding."""
        output = self.run("ip", family, "-o", "route", "show", *selector.split())
        lines = (" ".join(line.replace("\\", " ").split()) for line in output.splitlines())
        return [line for line in lines if line]

    def route_to(self, net: str) -> str:
        """The routes of BGP to exactly this prefix, as text, whoever wrote them; or empty."""
        family = "-6" if ":" in net else "-4"
        selectors = (f"exact {net} proto {protocol}" for protocol in ("179", "bird"))
        found = [self.routes(selector, family) for selector in selectors]
        return " | ".join(line for lines in found for line in lines)

    def reaches(self, target: str) -> bool:
        """Whether a single echo request is answered."""
        command = ("ping", "-n", "-c", "1", "-W", "1", target)
        return run(self.namespace, *command, check=False).returncode == 0

    def set_forwarding(self) -> None:
        with inside(self.namespace.fd):
            for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path("/proc/sys/net", name).write_text("1")
            for family in ("ipv4", "ipv6"):
                Path("/proc/sys/net", family, "fib_multipath_hash_policy").write_text("1")


class Node(Station):
    """A machine with the agent."""

    store: Store
    agent: Process
    engine: str = ""  # where nothing says so, it is the agent that chooses

    def start(self, **env: str) -> None:
        self.agent = Process(
            self.namespace,
            sys.executable,
            "-m",
            "bird_glue",
            log=self.directory / "agent.log",
            env={
                "MANX_NODENAME": self.name,
                "MANX_DATASTORE": self.store.url,
                "MANX_RUN_DIR": str(self.run_dir),
                "MANX_BGP_ENGINE": self.engine,
                **env,
            },
        )

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def status(self) -> BgpStatus | None:
        try:
            return query(self.run_dir)
        except StatusError:
            return None

    def peer(self, address: str) -> PeerStatus | None:
        status = self.status()
        found = status.peers if status else []
        return next((peer for peer in found if peer.address == address), None)

    def established(self, *addresses: str) -> bool:
        return all(
            (peer := self.peer(address)) is not None and peer.state == "Established"
            for address in addresses
        )

    def sessions(self, *addresses: str) -> dict[str, float]:
        """Since when sessions have been as they are, by peer."""
        status = self.status()
        found = {peer.address: peer.since for peer in (status.peers if status else [])}
        return {address: found[address] for address in addresses}

    def established_since(self, before: dict[str, float]) -> bool:
        """Whether sessions were made anew. That there was none meanwhile may be over too soon for
        anybody to see it.
        """
        status = self.status()
        found = {peer.address: peer for peer in (status.peers if status else [])}
        return all(
            address in found
            and found[address].state == "Established"
            and found[address].since > since
            for address, since in before.items()
        )

    def exabgp(self) -> int:
        """The process id of ExaBGP; 0 while there is none."""
        found = ExaBgp.find(self.run_dir)
        if found is None:
            return 0
        found.close()
        return found.pid

    def failure_detectors(self) -> list[str]:
        """The process ids of those for BFD, also of one that has only just been started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_text().split("\0")
                if str(self.run_dir) in words and any("bfd_main" in word for word in words):
                    found.append(path.parent.name)
        return found

    def end(self) -> None:
        with contextlib.suppress(AttributeError):
            self.agent.__exit__()
        kill_bfd(self.run_dir)
        for kind in (ExaBgp, BirdProcess):
            found = kind.find(self.run_dir)
            if found is not None:
                found.signal(signal.SIGKILL)
                found.stop(5)
                found.close()

    def logs(self) -> str:
        run = ("exabgp.log", "exabgp.out", "exabgp.conf", "bird.log", "bird.out")
        names = ("agent.log", *(f"run/{name}" for name in run))
        found = (self.directory / name for name in names)
        return "\n".join(f"--- {p}\n{p.read_text()[-4000:]}" for p in found if p.exists())


class Router(Station):
    """A machine with a router's software."""

    def end(self) -> None:
        """Kill what runs on it."""


class Bird(Router):
    """A machine with BIRD 2."""

    daemon: Process

    def start(self, configuration: str, *options: str) -> None:
        (self.directory / "b").unlink(missing_ok=True)
        self.configure(configuration, reload=False)
        self.daemon = Process(
            self.namespace,
            "bird",
            "-f",
            "-c",
            str(self.directory / "bird.conf"),
            "-s",
            str(self.directory / "b"),
            *options,
            log=self.directory / "bird.log",
        )
        ask = ("birdc", "-s", str(self.directory / "b"), "show", "status")
        eventually(lambda: run(self.namespace, *ask, check=False).returncode == 0)

    def configure(self, configuration: str, *, reload: bool = True) -> None:
        (self.directory / "bird.conf").write_text(configuration)
        if reload:
            self.birdc("configure")

    def birdc(self, *words: str) -> str:
        return self.run("birdc", "-s", str(self.directory / "b"), *words)

    def knows(self, net: str) -> bool:
        """Whether BIRD has a route to exactly this prefix."""
        return any(line.startswith(f"{net} ") for line in self.shown(net).splitlines())

    def shown(self, net: str) -> str:
        """The routes to a prefix or what is around it, attributes and all; or that there are none,
        which is a failure to birdc.
        """
        command = ("birdc", "-s", str(self.directory / "b"), "show", "route", "for", net, "all")
        return run(self.namespace, *command, check=False).stdout

    def blocks(self) -> set[str]:
        """The prefixes learned by BGP."""
        output = self.birdc("show", "route", "where", "source", "=", "RTS_BGP")
        return set(re.findall(r"^([0-9a-f.:]+/\d+)\s", output, re.MULTILINE))

    def session(self, protocol: str) -> str:
        """The two ends of the session's TCP connection, once there is one: a session made anew has
        others.

        The time that BIRD shows for it moves with the machine's clock, when that is set.
        """
        shown = self.birdc("show", "protocols", "all", protocol)
        (neighbor,) = re.findall(r"Neighbor address: ([^\s%]+)", shown)
        ends: list[str] = []

        def is_one() -> bool:
            found = self.run("ss", "-tnH", "state", "established", "dst", neighbor)
            both = (" ".join(line.split()[2:4]) for line in found.splitlines())
            ends[:] = [line for line in both if re.search(r":179\b", line)]
            return len(ends) == 1

        eventually(is_one)
        return ends[0]

    def end(self) -> None:
        with contextlib.suppress(AttributeError):
            self.daemon.__exit__()


class Frr(Router):
    """A machine with FRR: zebra and bgpd, which run as the user frr."""

    daemons: tuple[Process, ...] = ()
    files: Path

    def start(self, bgp: str) -> None:
        (self.files / "bgpd.conf").write_text(bgp)
        (self.files / "zebra.conf").write_text("ip forwarding\n")
        options = ("-z", str(self.files / "z"), "--vty_socket", str(self.files))
        for name, ready in (("zebra", "z"), ("bgpd", "bgpd.vty")):
            daemon = Process(
                self.namespace, f"/usr/lib/frr/{name}", "-A", "127.0.0.1", "-P", "0",
                "-f", str(self.files / f"{name}.conf"), "-i", str(self.files / f"{name}.pid"),
                *options, log=self.directory / f"{name}.log",
            )  # fmt: skip
            self.daemons += (daemon,)
            eventually((self.files / ready).exists)

    def vtysh(self, command: str) -> str:
        return self.run("vtysh", "--vty_socket", str(self.files), "-c", command)

    def blocks(self) -> set[str]:
        """The prefixes of its BGP table."""
        table = json.loads(self.vtysh("show bgp ipv4 unicast json"))
        return set(table.get("routes", {}))

    def end(self) -> None:
        for daemon in self.daemons:
            daemon.__exit__()
        self.daemons = ()


BIRD_COMMON = """
log stderr all;
router id {router_id};
protocol device {{ scan time 1; }}
protocol direct {{ ipv4; }}
protocol kernel {{
  merge paths on; graceful restart on; persist;
  ipv4 {{ export where source != RTS_DEVICE; import none; }};
}}
"""

BIRD_SESSION = """
protocol bgp {name} {{
  local {local} as {asn}; neighbor {peer} as {peer_asn};
  graceful restart on; hold time 30;
  connect delay time 0; connect retry time 1; error wait time 1, 2;
  ipv4 {{ import all; export {export}; next hop self; }};
}}
"""


class World:
    """Everything a test makes, and its end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self.store = Store(directory / "store.db")
        self._stack.callback(self.store.close)
        self.nodes: list[Node] = []

    def _station(self, kind: type[Station], name: str) -> Station:
        directory = self._directory / name
        directory.mkdir()
        station = kind(name, self._stack.enter_context(fresh_namespace()), directory)
        station.set_forwarding()
        return station

    def node(self, name: str) -> Node:
        node = self._station(Node, name)
        assert isinstance(node, Node)
        node.store = self.store
        self._stack.callback(node.end)
        self.nodes.append(node)
        return node

    def bird(self, name: str) -> Bird:
        return self.router(Bird, name)

    def frr(self, name: str) -> Frr:
        return self.router(Frr, name)

    def router(self, kind: type[R], name: str) -> R:
        """A machine with a router's software; ``end`` of it is called at the end."""
        station = self._station(kind, name)
        assert isinstance(station, kind)
        if isinstance(station, Frr):
            # pytest's directories are for root alone
            station.files = Path(self._stack.enter_context(TemporaryDirectory(prefix="manx-frr-")))
            shutil.chown(station.files, "frr", "frr")
        self._stack.callback(station.end)
        return station

    def switch(self, name: str, *members: tuple[Station, str]) -> Station:
        """A bridge, and the ``eth0`` of each member on it with an address."""
        switch = self.host(name)
        switch.run("ip", "link", "add", "br0", "type", "bridge")
        switch.run("ip", "link", "set", "br0", "up")
        for station, address in members:
            connect(station.namespace, "eth0", switch.namespace, station.name, [address])
            switch.run("ip", "link", "set", "dev", station.name, "master", "br0")
        return switch

    def host(self, name: str) -> Station:
        return self._station(Station, name)

    def pod(self, node: Node, name: str, address: str, six: str = "") -> Station:
        """A namespace behind a routed veth of the node, as the CNI plugin makes it.

        ``six``: its IPv6 address.
        """
        pod = self.host(name)
        connect(node.namespace, f"cali{name}", pod.namespace, "eth0")
        node.run("ip", "address", "add", "169.254.1.1/32", "dev", f"cali{name}")
        node.run("ip", "route", "add", f"{address}/32", "dev", f"cali{name}", "proto", "80")
        pod.run("ip", "address", "add", f"{address}/32", "dev", "eth0")
        pod.run("ip", "route", "add", "169.254.1.1", "dev", "eth0", "scope", "link")
        pod.run("ip", "route", "add", "default", "via", "169.254.1.1")
        if six:
            node.run("ip", "address", "add", "fe80::1/64", "dev", f"cali{name}", "nodad")
            node.run("ip", "route", "add", f"{six}/128", "dev", f"cali{name}", "proto", "80")
            pod.run("ip", "address", "add", f"{six}/128", "dev", "eth0", "nodad")
            pod.run("ip", "route", "add", "default", "via", "fe80::1", "dev", "eth0")
        return pod

    def rack(self, node: str, tor: str, outside: str) -> tuple[Node, Bird, Station]:
        """A node ``n1``, its top-of-rack router and a host beyond, with these addresses."""
        made = self.node("n1"), self.bird("tor"), self.host("outside")
        node_in, tor_in, outside_in = (station.namespace for station in made)
        connect(node_in, "eth0", tor_in, "n1", [f"{node}/24", f"{tor}/24"])
        beyond = str(next(ip_network(f"{outside}/24", strict=False).hosts()))
        connect(outside_in, "eth0", tor_in, "up", [f"{outside}/24", f"{beyond}/24"])
        made[2].run("ip", "route", "add", "default", "via", beyond)
        return made

    def secret(self, name: str, **values: str) -> None:
        """A Secret of kube-system, where the agent looks for passwords."""
        data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        metadata = {"name": name, "namespace": "kube-system"}
        value = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}
        self.store.put_raw("Secret", name, value, namespace="kube-system")

    def end(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def world(directory: Path) -> Iterator[World]:
    made = World(directory)
    try:
        yield made
    except BaseException:
        for node in made.nodes:
            print(f"=== {node.name}: {node.status()}\n{node.logs()}")
        raise
    finally:
        made.end()
