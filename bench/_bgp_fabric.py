"""What the BGP benchmarks stand on: a link, speakers at both ends, and an eye on the kernel.

A ``Machine`` is a network namespace with a directory; all of a ``fabric`` share one subnet. One
BIRD with many addresses plays many peers (``peers_configuration``), so that 200 of them fit on
two cores and leave these to what is measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api.names import cidr_name
from api.net import format_address, parse_net
from bird_glue.detector import kill as kill_bfd
from bird_glue.engine import EXABGP
from bird_glue.process import Bird as BirdDaemon
from bird_glue.process import Daemon, ExaBgp
from datastore.connect import connect
from datastore.interface import Key
from kernel.addresses import Address, address_add
from kernel.links import Links, link_up, veth
from kernel.netlink import NETLINK_ROUTE, NetlinkSocket
from kernel.netns import Namespace, inside
from kernel.routes import PROTO_BGP, RTM_DELROUTE, RTM_NEWROUTE

PROTO_BIRD = 12
SUBNET = "172.16.0.0/12"
ROUTERS = "172.31.255.1", "172.31.255.2"  # greater as text than all peers: they call
LONGEST = 90.0  # seconds until a run is given up
ANSWER_SECONDS = 30.0
ENGINES: tuple[type[Daemon], ...] = (ExaBgp, BirdDaemon)

_FIRST = parse_net("172.30.0.1").address
_GROUPS = 0x40  # RTMGRP_IPV4_ROUTE
_KERNEL_BUFFER = 64 << 20
_SO_RCVBUFFORCE = 33
_HEADER = 16  # bytes of struct nlmsghdr
_PROTOCOL_OFFSET, _KIND_OFFSET = 5, 7  # of rtm_protocol and rtm_type in struct rtmsg
_UNICAST = 1
_PORTS = 10000
FIRST_TABLE = 1000


def peer_address(number: int) -> str:
    """The address of peer ``number``, from 0."""
    return format_address(4, _FIRST + number)


def block(number: int) -> str:
    """The ``number``th block of all, a /26 of 10.0.0.0/8."""
    return f"{format_address(4, (10 << 24) + (number << 6))}/26"


@dataclass(frozen=True)
class Bird:
    """A running BIRD."""

    process: subprocess.Popen[bytes]
    control: Path

    def ask(self, *words: str) -> str:
        """``birdc WORDS``, as soon as BIRD can be asked."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while not self.control.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        command = ("birdc", "-s", str(self.control), *words)
        answer = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, text=True, timeout=ANSWER_SECONDS
        )
        return answer.stdout


def wait_for_sessions(bird: Bird, number: int) -> None:
    """Until so many sessions are established. Raises RuntimeError."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while (up := bird.ask("show", "protocols").count("Established")) < number:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{up} sessions are established, expected {number}")
        time.sleep(0.2)


@dataclass
class Machine:
    """A network namespace, a directory, and the programs that run there."""

    namespace: Namespace
    switch: Namespace
    directory: Path
    addresses: Sequence[str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        """The agent's directory."""
        return self.directory / "run"

    def spawn(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a program here; it ends with the machine."""
        with inside(self.namespace.fd), (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )
        self.processes.append(process)
        return process

    def bird(self, configuration: str, *options: str) -> Bird:
        """Start BIRD."""
        path, control = self.directory / "bird.conf", self.directory / "bird.ctl"
        path.write_text(configuration)
        control.unlink(missing_ok=True)
        command = ("bird", "-f", "-c", str(path), "-s", str(control), *options)
        return Bird(self.spawn(*command), control)

    def agent(self, name: str, url: str, engine: str = EXABGP) -> subprocess.Popen[bytes]:
        """Start our agent as the node ``name``."""
        return self.spawn(
            sys.executable,
            "-m",
            "bird_glue",
            MANX_NODENAME=name,
            MANX_DATASTORE=url,
            MANX_RUN_DIR=str(self.run_dir),
            MANX_BGP_ENGINE=engine,
            MANX_LOG_LEVEL="WARNING",
        )

    def plug(self) -> None:
        """Connect it with the others."""
        run_in(self.switch, "ip", "link", "set", "dev", self.directory.name, "master", "br0")

    def unplug(self) -> None:
        """Its packets go nowhere from here on, and nobody is told."""
        run_in(self.switch, "ip", "link", "set", "dev", self.directory.name, "nomaster")

    def daemon(self, kind: type[Daemon]) -> int | None:
        """The process id of the agent's engine."""
        found = kind.find(self.run_dir)
        if found is None:
            return None
        found.close()
        return found.pid

    def computed(self) -> float:
        """Seconds of CPU that what was started here has taken, with its engine and relay.

        Without BFD. See proc(5), schedstat.
        """
        found = [process.pid for process in self.processes]
        for engine in filter(None, map(self.daemon, ENGINES)):
            children = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
            found += [engine, *map(int, children)]
        threads = (thread for pid in found for thread in Path(f"/proc/{pid}/task").iterdir())
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9

    def end(self) -> None:
        """Kill what runs here, and forget what it has left."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()
        kill_bfd(self.run_dir)
        for kind in ENGINES:
            if (found := kind.find(self.run_dir)) is not None:
                found.signal(signal.SIGKILL)
                found.stop(ANSWER_SECONDS)
                found.close()
        shutil.rmtree(self.run_dir, ignore_errors=True)
        for protocol in (PROTO_BGP, PROTO_BIRD):
            run_in(self.namespace, "ip", "route", "flush", "table", "all", "proto", str(protocol))


@contextlib.contextmanager
def fabric(*addresses: Iterable[str]) -> Iterator[list[Machine]]:
    """Machines on one subnet, each with its addresses; what runs there ends with the block."""
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manx-bgp-")))
        switch = stack.enter_context(Namespace.create())
        run_in(switch, "ip", "link", "add", "br0", "type", "bridge")
        run_in(switch, "ip", "link", "set", "br0", "up")
        machines = []
        for number, own in enumerate(addresses):
            directory = base / f"m{number}"
            directory.mkdir()
            namespace = stack.enter_context(Namespace.create())
            machine = Machine(namespace, switch, directory, tuple(own))
            stack.callback(machine.end)
            _wire(machine)
            machine.plug()
            machines.append(machine)
        yield machines


def run_in(namespace: Namespace, *command: str) -> None:
    """Run a command in a namespace. Raises CalledProcessError."""
    with inside(namespace.fd):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
    with process:
        _, error = process.communicate(timeout=ANSWER_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, None, error)


def _wire(machine: Machine) -> None:
    name = machine.directory.name
    with (
        NetlinkSocket(netns_fd=machine.namespace.fd) as here,
        NetlinkSocket(netns_fd=machine.switch.fd) as there,
    ):
        here.batch([veth("eth0", name, peer_netns_fd=machine.switch.fd), link_up(1)])
        own, port = Links(here).get("eth0"), Links(there).get(name)
        there.batch([link_up(port.index)])
        length = parse_net(SUBNET).length
        add = [address_add(Address(own.index, parse_net(a), length)) for a in machine.addresses]
        if failures := here.batch([link_up(own.index), *add]):
            raise RuntimeError(f"{name}: {failures[0]}")
    with inside(machine.namespace.fd):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


class Cluster:
    """The objects our agents read."""

    def __init__(self, directory: Path) -> None:
        self.url = f"sqlite://{directory}/store.db"
        self._store = connect(self.url)
        self.put("IPPool", "plain", cidr="10.0.0.0/8")

    def put(self, kind: str, name: str, **spec: Any) -> None:
        """Create an object."""
        value = {
            "apiVersion": "projectcalico.org/v3",
            "kind": kind,
            "metadata": {"name": name},
            "spec": spec,
        }
        self._store.create(Key(kind, name), value)

    def node(self, name: str, address: str, **bgp: Any) -> None:
        """Create a Node."""
        length = parse_net(SUBNET).length
        self.put("Node", name, bgp={"ipv4Address": f"{address}/{length}", **bgp})

    def block(self, node: str, cidr: str) -> None:
        """Give a node a block."""
        name = _affinity_name(node, cidr)
        spec = {"state": "confirmed", "node": node, "type": "host", "cidr": cidr}
        self.put("BlockAffinity", name, **spec)

    def drop_block(self, node: str, cidr: str) -> None:
        """Take it away again."""
        self._store.delete(Key("BlockAffinity", _affinity_name(node, cidr)))

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()


def _affinity_name(node: str, cidr: str) -> str:
    return f"{node}-{cidr_name(parse_net(cidr))}"


class KernelEye:
    """Sees every IPv4 route that comes into or goes from a kernel, and when.

    To be made before what it is to see begins.
    """

    def __init__(self, namespace: Namespace, protocol: int) -> None:
        self._protocol = protocol
        with inside(namespace.fd):
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _KERNEL_BUFFER)
        self._socket.bind((0, _GROUPS))

    def __enter__(self) -> KernelEye:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Look away."""
        self._socket.close()

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def next(self, seconds: float) -> tuple[bool, bytes] | None:
        """The next change of a route of the protocol: whether it was added, and its body.

        None where there was none in time, or one of another protocol. Bodies are not parsed
        here, that it takes little from what is measured.
        """
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(1 << 16)  # the kernel sends each change by itself
        except TimeoutError:
            return None
        kind = int.from_bytes(data[4:6], sys.byteorder)
        body = data[_HEADER:]
        if kind not in (RTM_NEWROUTE, RTM_DELROUTE) or body[_PROTOCOL_OFFSET] != self._protocol:
            return None
        return kind == RTM_NEWROUTE, body

    def until(self, wanted: int, *, added: bool = True) -> float:
        """Wait until so many unicast routes came, or went; when that was.

        Raises RuntimeError after LONGEST seconds.
        """
        seen: set[bytes] = set()
        deadline = time.monotonic() + LONGEST
        while (left := deadline - time.monotonic()) > 0:
            change = self.next(left)
            if change and change[0] == added and change[1][_KIND_OFFSET] == _UNICAST:
                seen.add(change[1])
                if len(seen) == wanted:
                    return time.monotonic()
        raise RuntimeError(f"{len(seen)} routes changed within {LONGEST:g} s, expected {wanted}")


_COMMON = """
log stderr {{ fatal, error, bug }};
router id {router_id};
protocol device {{}}
protocol bfd {{
  interface "*" {{ min rx interval 500 ms; min tx interval 500 ms; multiplier 5; }};
}}
template bgp session {{
  connect delay time 0; connect retry time 1; error wait time 1, 2;
  hold time 90; graceful restart on; direct; bfd on;
}}
"""


def peers_configuration(
    addresses: Sequence[str],
    routers: Sequence[str],
    blocks: Callable[[int], Sequence[str]],
    *,
    kernel: bool = False,
    extra: Callable[[int], Sequence[str]] | None = None,
) -> str:
    """BIRD as many iBGP peers of some routers: each an address, a table, blocks of its own.

    They wait to be called. ``kernel``: what peer N hears goes to the kernel's table 1000 + N;
    without it next hops may be addresses of this very machine, as those of other peers are.
    ``extra``: of peer N blocks that it tells while its static protocol ``xN`` is enabled.
    """
    parts = [_COMMON.format(router_id="172.30.0.0")]
    for number, address in enumerate(addresses):
        parts.append(f"ipv4 table t{number};\n")
        parts.append(_static(f"s{number}", f"table t{number};", blocks(number)))
        if extra:
            table = f"table t{number};"
            parts.append(_static(f"x{number}", table, extra(number), disabled=True))
        if kernel:
            parts.append(
                f"protocol kernel k{number} {{ kernel table {FIRST_TABLE + number};"
                f" scan time 600; ipv4 {{ table t{number}; import none;"
                " export where source = RTS_BGP; }; }\n"
            )
        for order, router in enumerate(routers):
            # BIRD has one session with an address and port at a time; who waits needs no port
            port = _PORTS + number
            parts.append(
                f"protocol bgp b{number}_{order} from session {{ passive; strict bind;\n"
                f"  router id {address}; local {address} as 64512;\n"
                f"  neighbor {router} port {port} as 64512;\n"
                f"  ipv4 {{ table t{number}; import all; export where source = RTS_STATIC;"
                f" next hop self; gateway {'direct' if kernel else 'recursive'}; }}; }}\n"
            )
    return "".join(parts)


def node_configuration(
    address: str, peers: Sequence[str], blocks: Sequence[str], *, reflects: bool = False
) -> str:
    """BIRD as a node: what ours does with the same resources."""
    export = "where source = RTS_STATIC"
    if reflects:
        export += " || source = RTS_BGP"
    parts = [
        _COMMON.format(router_id=address),
        "protocol direct { ipv4; }\n"
        "protocol kernel { merge paths on; persist; graceful restart; metric 1024;"
        " ipv4 { import none; export where source != RTS_DEVICE; }; }\n",
        _static("own", "", blocks),
    ]
    for number, peer in enumerate(peers):
        parts.append(
            f"protocol bgp b{number} from session {{\n"
            f"  local {address} as 64512; neighbor {peer} as 64512;\n"
            f"  {f'rr client; rr cluster id {address};' if reflects else ''}\n"
            f"  ipv4 {{ import all; export {export}; }}; }}\n"
        )
    return "".join(parts)


def _static(name: str, table: str, blocks: Sequence[str], *, disabled: bool = False) -> str:
    routes = " ".join(f"route {net} blackhole;" for net in blocks)
    state = "disabled; " if disabled else ""
    return f"protocol static {name} {{ {state}ipv4 {{ {table} }}; {routes} }}\n"
