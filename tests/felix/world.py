"""A node in a network namespace with the real agent on it, and pods wired as a CNI plugin does.

The agent is a process of its own; the datastore is a real file; packets are real.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api.names import interface_name, workload_endpoint_name
from api.net import parse_net
from api.registry import key_parts
from datastore.connect import connect
from datastore.interface import AlreadyExistsError, Datastore, Key
from felix.status import query
from kernel.addresses import Address, address_add
from kernel.links import Links, link_up, parse_link, veth
from kernel.neighbours import Neighbour, neighbour_replace
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside
from kernel.routes import Hop, Route, route_add
from tests.support.netns import connect as connect_namespaces
from tests.support.netns import eventually, run

ROOT = Path(__file__).parents[2]
V3 = "projectcalico.org/v3"
GATEWAY = parse_net("169.254.1.1")
HOST_MAC = "ee:ee:ee:ee:ee:ee"
# How long a packet that should get through may take on a busy machine, and how long one must
# be missing to count as dropped.
PATIENCE = 20.0
DROPPED = 0.25


class Pod:
    """A network namespace with an address, behind ``cali…`` of a node."""

    def __init__(self, node: Node, namespace: str, name: str, address: str) -> None:
        self.node = node
        self.namespace = namespace
        self.name = name
        self.address = address
        self.interface = interface_name("cali", namespace, name)
        self.key = Key(
            "WorkloadEndpoint", workload_endpoint_name(node.name, "k8s", name, "eth0"), namespace
        )
        self.netns = Namespace.create()
        self.index = 0

    def __repr__(self) -> str:
        return f"{self.namespace}/{self.name}"

    def plug(self) -> None:
        """``ip link add … type veth`` and what makes the pod's end usable."""
        with (
            NetlinkSocket(netns_fd=self.node.netns.fd) as host,
            NetlinkSocket(netns_fd=self.netns.fd) as own,
        ):
            link = parse_link(self._pair(host))
            self.index = link.index
            assert own.batch([link_up(1), link_up(link.peer_index)]) == []
        self.add_address(self.address)

    def _pair(self, host: NetlinkSocket) -> bytes:
        """The kernel's answer. The last of that name may be about to go with its namespace."""
        request = veth(self.interface, "eth0", peer_netns_fd=self.netns.fd, mac=HOST_MAC)
        answers: list[bytes] = []

        def made() -> bool:
            with contextlib.suppress(FileExistsError):
                answers.append(host.request(request))
            return bool(answers)

        eventually(made)
        return answers[0]

    def add_address(self, address: str) -> None:
        """``ip address add … dev eth0``, and the way there and back."""
        with (
            NetlinkSocket(netns_fd=self.node.netns.fd) as host,
            NetlinkSocket(netns_fd=self.netns.fd) as own,
        ):
            link = Links(own).get("eth0")
            net = parse_net(address)
            messages = [address_add(Address(link.index, net, net.length))]
            if net.version == 4:
                gateway = GATEWAY
                messages.append(route_add(Route(gateway, (Hop(link.index),), protocol=3)))
                default = parse_net("0.0.0.0/0")
            else:
                gateway = parse_net("fe80::ecee:eeff:feee:eeee")
                default = parse_net("::/0")
            hop = Hop(link.index, gateway.address)
            messages.append(route_add(Route(default, (hop,), protocol=3)))
            messages.append(neighbour_replace(Neighbour(link.index, gateway, HOST_MAC)))
            assert own.batch(messages) == []
            neighbour = Neighbour(self.index, net, link.mac, protocol=0)
            assert host.batch([neighbour_replace(neighbour)]) == []

    def unplug(self) -> None:
        """The interface goes."""
        run(self.node.netns, "ip", "link", "del", self.interface)

    def endpoint(self, **spec: Any) -> dict[str, Any]:
        """The WorkloadEndpoint as the CNI plugin writes it."""
        labels = spec.pop("labels", {})
        return {
            "apiVersion": V3,
            "kind": "WorkloadEndpoint",
            "metadata": {
                "name": self.key.name,
                "namespace": self.namespace,
                "labels": {
                    **labels,
                    "projectcalico.org/namespace": self.namespace,
                    "projectcalico.org/orchestrator": "k8s",
                },
            },
            "spec": {
                "orchestrator": "k8s",
                "node": self.node.name,
                "pod": self.name,
                "endpoint": "eth0",
                "interfaceName": self.interface,
                "ipNetworks": [str(parse_net(self.address))],
                "profiles": [f"kns.{self.namespace}"],
                **spec,
            },
        }

    def remove(self) -> None:
        """Endpoint and namespace go."""
        self.node.delete(self.key)
        self.netns.close()


class Listener:
    """Answers every TCP connection and every UDP packet on a port inside a namespace."""

    def __init__(self, netns: Namespace, port: int, *, version: int = 4) -> None:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with inside(netns.fd):
            self.tcp = socket.socket(family, socket.SOCK_STREAM)
            self.udp = socket.socket(family, socket.SOCK_DGRAM)
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.tcp.bind(("", port))
        self.tcp.listen(socket.SOMAXCONN)  # nobody takes the connections off the queue
        self.udp.bind(("", port))

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.tcp.close()
        self.udp.close()


class Flow:
    """One-way UDP packets, numbered, sent as fast as the machine allows.

    As nobody answers, connection tracking never calls them established: each is judged by
    the policy as it is at that moment.
    """

    def __init__(self, source: Namespace, target: Namespace, address: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(source.fd):
            self._out = socket.socket(family, socket.SOCK_DGRAM)
        with inside(target.fd):
            self._in = socket.socket(family, socket.SOCK_DGRAM)
        self._in.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 26)
        self._in.bind((address, port))
        self._in.setblocking(False)
        # Few packets are on their way at a time, lest a queue be full where the kernel is behind.
        self._out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self._to = (address, port)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self.sent = 0

    def __enter__(self) -> Flow:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._out.close()
        self._in.close()

    def _send(self) -> None:
        while not self._stop.wait(0.0002):
            self._out.sendto(b"%d" % self.sent, self._to)
            self.sent += 1

    def finish(self, expected: int | None = None) -> set[int]:
        """Stop sending; the numbers that arrived.

        Those from ``expected`` on are waited for, as long as a packet may take.
        """
        self._stop.set()
        self._thread.join()
        missing = set() if expected is None else set(range(expected, self.sent))
        arrived: set[int] = set()
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(BlockingIOError):
                while True:
                    arrived.add(int(self._in.recv(100)))
            if missing <= arrived or time.monotonic() > deadline:
                return arrived
            time.sleep(0.01)


_SO_RCVBUFFORCE = 33


class Node:
    """A node: namespace, datastore, agent, uplink."""

    def __init__(
        self, name: str, store: Datastore, url: str, run_dir: Path, address: str | None
    ) -> None:
        self.name = name
        self.store = store
        self.address = address
        self.url = url
        self.run_dir = run_dir
        self.netns = Namespace.create()
        self.agent: subprocess.Popen[bytes] | None = None
        self.log = run_dir / "felix.log"
        self._fences = 0
        with NetlinkSocket(netns_fd=self.netns.fd) as netlink:
            assert netlink.batch([link_up(1)]) == []

    def start(self, *, wait: bool = True, hide: str = "", **more: str) -> None:
        """Start the agent, and wait until it enforces. ``more`` are environment variables.

        It finds nothing in the directory ``hide``, until somebody unmounts what hides it.
        """
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "MANX_NODENAME": self.name,
            "MANX_DATASTORE": self.url,
            "MANX_RUN_DIR": str(self.run_dir),
            "MANX_LOG_LEVEL": "INFO",
            **more,
        }
        if self.address is not None:
            environment["MANX_NODE_IP"] = self.address
        with inside(self.netns.fd), self.log.open("ab") as log:
            command = [sys.executable, "-m", "felix"]
            if hide:
                script = f'mount -t tmpfs none {hide} && exec "$@"'
                command = ["unshare", "--mount", "sh", "-c", script, "-", *command]
            self.agent = subprocess.Popen(command, env=environment, stderr=log, cwd=ROOT)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until the agent has applied everything for the first time."""

        def ready() -> bool:
            assert self.agent is not None
            assert self.agent.poll() is None, self.log.read_text()
            try:
                return bool(query(self.run_dir)["ready"])
            except (OSError, KeyError):
                return False

        eventually(ready)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the agent."""
        if self.agent is not None:
            self.agent.send_signal(number)
            self.agent.wait(60)
            self.agent = None

    def close(self) -> None:
        """Everything goes."""
        self.kill()
        self.netns.close()

    def status(self) -> dict[str, Any]:
        """What the agent says of itself. One that is too busy to answer is asked again."""
        deadline = time.monotonic() + 60
        while "pid" not in (answer := query(self.run_dir)) and time.monotonic() < deadline:
            pass
        return answer

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The agent does nothing for the block."""
        assert self.agent is not None
        self.agent.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.agent.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            yield
        finally:
            self.agent.send_signal(signal.SIGCONT)

    def errors(self) -> dict[str, str]:
        """What the agent complains about, by object; fences apart."""
        errors = {error["object"]: error["message"] for error in self.status()["errors"]}
        return {what: message for what, message in errors.items() if "fence-" not in what}

    def put(self, obj: dict[str, Any]) -> Key:
        """Write an object."""
        kind, namespace, name = key_parts(obj)
        key = Key(kind, name, namespace)
        self.put_raw(key, obj)
        return key

    def put_raw(self, key: Key, obj: dict[str, Any]) -> None:
        """Write whatever it is."""
        try:
            self.store.create(key, obj)
        except AlreadyExistsError:
            self.store.update(key, obj)

    def delete(self, key: Key) -> None:
        """Delete an object."""
        self.store.delete(key)

    def settle(self) -> None:
        """Until everything that was written is enforced.

        An object that can't be read is written last; when the agent complains about it, it has
        seen and done all that came before.
        """
        self._fences += 1
        key = Key("Tier", f"fence-{self.name}-{self._fences}")
        self.put_raw(key, {"spec": "fence"})
        eventually(lambda: any(e["object"] == str(key) for e in self.status()["errors"]))
        self.delete(key)

    def pod(
        self,
        name: str,
        address: str,
        *,
        namespace: str = "default",
        endpoint: bool = True,
        **spec: Any,
    ) -> Pod:
        """A pod, plugged, and its endpoint written."""
        made = Pod(self, namespace, name, address)
        made.plug()
        if endpoint:
            self.put(made.endpoint(**spec))
        return made


@contextlib.contextmanager
def cluster(
    *names: str, addresses: tuple[str, ...] = (), iptables: bool = False
) -> Iterator[tuple[Node, ...]]:
    """Nodes that share a datastore, not connected yet. Everything is gone afterwards.

    They enforce policy with iptables on request.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manx-felix-")))
        url = f"sqlite://{directory}/store.db"
        store = connect(url)
        stack.callback(store.close)
        nodes = []
        for number, name in enumerate(names):
            run_dir = directory / name
            run_dir.mkdir()
            address = addresses[number] if addresses else None
            node = Node(name, store, url, run_dir, address)
            stack.callback(node.close)
            nodes.append(node)
            if iptables:
                node.put(felix_configuration(f"node.{name}", nftablesMode="Disabled"))
        put_namespace(nodes[0], "default")
        yield tuple(nodes)


def felix_configuration(name: str, **spec: Any) -> dict[str, Any]:
    """A FelixConfiguration."""
    return {
        "apiVersion": V3,
        "kind": "FelixConfiguration",
        "metadata": {"name": name},
        "spec": spec,
    }


def put_namespace(node: Node, name: str, **labels: str) -> None:
    """A Kubernetes namespace, whose profile allows everything."""
    node.put(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    )


def policy(name: str, namespace: str = "default", **spec: Any) -> dict[str, Any]:
    """A NetworkPolicy."""
    return {
        "apiVersion": V3,
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def global_policy(name: str, **spec: Any) -> dict[str, Any]:
    """A GlobalNetworkPolicy."""
    return {
        "apiVersion": V3,
        "kind": "GlobalNetworkPolicy",
        "metadata": {"name": name},
        "spec": spec,
    }


def reaches(
    source: Namespace, address: str, port: int, *, patience: float = PATIENCE
) -> str | None:
    """The source address as which a TCP connection arrives; None when none is made in time."""
    version = parse_net(address).version
    with inside(source.fd):
        client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
    with client:
        client.settimeout(patience)
        try:
            client.connect((address, port))
        except OSError:
            return None
        local: str = client.getsockname()[0]
        return local


def is_dropped(source: Namespace, address: str, port: int) -> bool:
    """Whether a TCP connection gets no answer at all."""
    return reaches(source, address, port, patience=DROPPED) is None


def connect_uplinks(one: Node, other: Node) -> None:
    """Two nodes on one wire, with the addresses they were given."""
    assert one.address and other.address
    connect_namespaces(one.netns, "eth0", other.netns, "eth0", [one.address, other.address])
