"""What runs in the guest: a node with ipvs, pods and hosts around it, rules, and probes.

It reads a plan and writes what it saw, both JSON. Only the standard library is there, without
site-packages, and few programs are run: there a start costs seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PATIENCE = 60.0  # for what is to arrive
_AGAIN = 5.0  # after which that is sent anew: neighbours are given up where a guest is so slow
_GRACE = 0.25  # for what is not, once all else has
_TABLES = ("raw", "mangle", "nat", "filter")
_MAC = "ee:ee:ee:ee:ee:ee"
_GATEWAYS = ("169.254.1.1", "fe80::ecee:eeff:feee:eeee")
# sched.h, linux/netlink.h, linux/netfilter/nfnetlink.h
_CLONE_NEWNET = 0x40000000
_NETLINK_NETFILTER = 12
_REQUEST, _ACK = 1, 4
_BEGIN, _END, _SUBSYSTEM = 16, 17, 10
_libc = ctypes.CDLL(None, use_errno=True)

_ports = itertools.count(20_000)  # that probes come from


def run(*command: str, stdin: str = "") -> str:
    """What a program writes. Raises RuntimeError with what it complains about."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def configure(netns: str, *lines: str) -> None:
    """``ip`` with each of the lines."""
    run("ip", "-n", netns, "-batch", "-", stdin="\n".join(lines))


def enter(netns: str) -> None:
    """This process, and what it starts, is in the network namespace from now on."""
    fd = os.open(f"/run/netns/{netns}", os.O_RDONLY)
    try:
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {netns}")
    finally:
        os.close(fd)


def socket_in(netns: str, version: int, kind: socket.SocketKind) -> socket.socket:
    """A socket in another network namespace than the node's, where this process is."""
    enter(netns)
    try:
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
    finally:
        enter("node")
    made.setblocking(False)
    return made


class World:
    """The node, what is around it, and sockets that answer."""

    def __init__(self, plan: dict[str, Any]) -> None:
        others = (*plan["hosts"], *plan["pods"])
        run("ip", "-batch", "-", stdin="".join(f"netns add {n}\n" for n in ("node", *others)))
        configure("node", *self._links(plan))
        for name, host in plan["hosts"].items():
            addresses = (f"addr add {a} dev eth0 nodad" for a in host["own"])
            routes = (f"route add default via {a.partition('/')[0]}" for a in host["node"])
            configure(name, *addresses, "link set eth0 up", *routes)
        for name, pod in plan["pods"].items():
            configure(
                name,
                *(f"addr add {a} dev eth0 nodad" for a in pod["addresses"]),
                "link set eth0 up",
                *(f"neigh add {gateway} lladdr {_MAC} dev eth0" for gateway in _GATEWAYS),
                f"route add {_GATEWAYS[0]} dev eth0",
                *(f"route add default via {gateway} dev eth0" for gateway in _GATEWAYS),
            )
        enter("node")
        self._balance(plan["services"])
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self.selector = selectors.DefaultSelector()
        for place, port in plan["listeners"]:
            self._listen(place, port)

    def _links(self, plan: dict[str, Any]) -> list[str]:
        lines = ["link set lo up", "link add kube-ipvs0 type dummy"]
        for address in plan["virtual"]:
            lines.append(f"addr add {address} dev kube-ipvs0 nodad")
        for name, host in plan["hosts"].items():
            interface = host["interface"]
            lines.append(f"link add {interface} type veth peer name eth0 netns {name}")
            lines += [f"addr add {a} dev {interface} nodad" for a in host["node"]]
            lines.append(f"link set {interface} up")
        for name, pod in plan["pods"].items():
            interface = pod["interface"]
            pair = f"{interface} address {_MAC} type veth peer name eth0 netns {name}"
            lines += [f"link add {pair}", f"link set {interface} up"]
            lines += [f"route add {a} dev {interface}" for a in pod["addresses"]]
        return lines

    def _balance(self, services: list[list[str]]) -> None:
        """The services, as kube-proxy would have them: TCP and UDP, translated, in turn."""
        rules = []
        for service, target in services:
            for flag in ("-t", "-u"):
                rules += [f"-A {flag} {service} -s rr", f"-a {flag} {service} -r {target} -m"]
        run("ipvsadm", "-R", stdin="\n".join(rules) + "\n")
        for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/vs/conntrack"):
            Path("/proc/sys/net", setting).write_text("1")

    def _listen(self, place: str, port: int) -> None:
        """TCP and UDP, IPv4 as well, that give back what comes."""
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            made = socket_in(place, 6, kind)
            made.bind(("::", port))
            if kind is socket.SOCK_STREAM:
                made.listen()
                self.selector.register(made, selectors.EVENT_READ, self._accept)
            else:
                self.selector.register(made, selectors.EVENT_READ, _give_back)

    def _accept(self, made: socket.socket) -> None:
        connection, _ = made.accept()
        self.selector.register(connection, selectors.EVENT_READ, self._echo)

    def _echo(self, connection: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(100)
        if data:
            connection.send(data)
        else:
            self.selector.unregister(connection)
            connection.close()

    def enforce(self, rules: dict[str, Any]) -> None:
        """Rules become those of the next step."""
        if rules.get("anew"):
            run("nft", "flush", "ruleset")
        for transaction in rules.get("nftables", ()):
            self._commit([(kind, flags, bytes.fromhex(body)) for kind, flags, body in transaction])
        if "ipset" in rules:
            run("ipset", "-exist", "restore", stdin=rules["ipset"])
            for command, saved in rules["iptables"].items():
                missing = (table for table in _TABLES if f"*{table}\n" not in saved)
                empty = "".join(f"*{table}\nCOMMIT\n" for table in missing)
                run(f"{command}-restore", stdin=saved + empty)

    def _commit(self, messages: list[tuple[int, int, bytes]]) -> None:
        """One transaction of nftables, as netlink messages of (type, flags, body)."""
        frame = struct.pack(">BBH", 0, 0, _SUBSYSTEM)
        batch = [(_BEGIN, 0, frame), *messages, (_END, 0, frame)]
        parts = []
        for number, (kind, flags, body) in enumerate(batch):
            # The last of them: what is wrong with another is told unasked.
            asked = _REQUEST | (_ACK if number == len(messages) else 0)
            header = struct.pack("=IHHII", 16 + len(body), kind, flags | asked, number, 0)
            parts += [header, body, bytes(-len(body) % 4)]
        self._netlink.send(b"".join(parts))
        while True:
            number, _, error = struct.unpack_from("=IIi", self._netlink.recv(1 << 16), 8)
            if error:
                raise OSError(-error, f"message {number} of {len(batch)}: {batch[number]}")
            if number == len(messages):
                return

    def turn(self, until: float) -> None:
        """Answer what comes, if anything does."""
        for key, _ in self.selector.select(max(0.0, until - time.monotonic())):
            key.data(key.fileobj)

    def probe(self, probes: list[list[Any]]) -> list[bool]:
        """Which of (from, address, port, protocol, whether it is to arrive) are answered."""
        made = [_Probe(self, *probe[:4]) for probe in probes]
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            again = min(deadline, time.monotonic() + _AGAIN)
            missing = [n for n, probe in enumerate(probes) if probe[4] and not made[n].answered]
            if not missing:
                break
            while time.monotonic() < again and not all(made[n].answered for n in missing):
                self.turn(again)
            for number in missing:
                if not made[number].answered:
                    made[number].close()
                    made[number] = _Probe(self, *probes[number][:4])
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            self.turn(deadline)
        for one in made:
            one.close()
        return [one.answered for one in made]


def _give_back(made: socket.socket) -> None:
    data, peer = made.recvfrom(100)
    made.sendto(data, peer)


class _Probe:
    """One connection, or one packet of UDP."""

    def __init__(self, world: World, source: str, address: str, port: int, protocol: str) -> None:
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        self.answered = False
        self._world = world
        self._socket = socket_in(source, 6 if ":" in address else 4, kind)
        # Not one that the kernel chooses: a flow that was allowed before may have had it.
        self._socket.bind(("", next(_ports)))
        with contextlib.suppress(BlockingIOError):
            self._socket.connect((address, port))
        if kind is socket.SOCK_STREAM:
            world.selector.register(self._socket, selectors.EVENT_WRITE, self._connected)
        else:
            self._socket.send(b"probe")
            world.selector.register(self._socket, selectors.EVENT_READ, self._received)

    def _connected(self, own: socket.socket) -> None:
        self.answered = own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        self._world.selector.unregister(own)

    def _received(self, own: socket.socket) -> None:
        with contextlib.suppress(OSError):  # refused
            self.answered = own.recv(100) == b"probe"
        self._world.selector.unregister(own)

    def close(self) -> None:
        """The end."""
        if self._socket in self._world.selector.get_map():
            self._world.selector.unregister(self._socket)
        self._socket.close()


class Conversation:
    """A connection that goes on for several steps."""

    def __init__(self, world: World, source: str, address: str, port: int) -> None:
        self._world = world
        self._socket = socket_in(source, 4, socket.SOCK_STREAM)
        with contextlib.suppress(BlockingIOError):
            self._socket.connect((address, port))

    def goes_on(self, *, patience: float = _PATIENCE) -> bool:
        """Whether what is said is answered."""
        deadline = time.monotonic() + patience
        is_said = False
        while time.monotonic() < deadline:
            self._world.turn(time.monotonic() + 0.02)
            with contextlib.suppress(BlockingIOError):
                if not is_said:
                    self._socket.send(b"still there?")
                    is_said = True
                elif self._socket.recv(100):
                    return True
        return False


def play(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What was seen in each step."""
    world = World(plan)
    seen = []
    for step in plan["steps"]:
        world.enforce(step["rules"])
        found: dict[str, Any] = {}
        if step["talks"] == "begins":
            talk = Conversation(world, *step["probes"][0][:3])
            found["flow"] = talk.goes_on() and run(
                "conntrack", "-L", "-p", "tcp", "--state", "ESTABLISHED"
            )
        elif step["talks"] == "ends":
            found["went_on"] = talk.goes_on()
            run("conntrack", "-D", "-p", "tcp")
            found["ended"] = not talk.goes_on(patience=4 * _GRACE)
        found["answered"] = world.probe(step["probes"])
        seen.append(found)
    return seen


if __name__ == "__main__":
    json.dump(play(json.load(sys.stdin)), sys.stdout)
