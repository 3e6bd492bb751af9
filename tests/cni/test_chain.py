"""A chain as libcni runs it: ours first, then plugins of the reference set."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from datastore.interface import JSON
from kernel.netns import inside
from tests.cni.rig import NETWORK, Container, Rig, sysctl
from tests.support.netns import connect, fresh_namespace, run

REFERENCE = Path("/usr/lib/cni")
VERSION = "1.0.0"  # the newest that Debian's plugins speak
PORTS = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
PLUGINS: list[JSON] = [
    {"type": "manx"},
    {"type": "tuning", "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"}},
    {"type": "portmap", "runtimeConfig": {"portMappings": PORTS}},
    {"type": "firewall", "backend": "iptables"},
]


def execute(rig: Rig, command: str, pod: Container, plugin: JSON, previous: Any) -> Any:
    """Run one plugin of the chain; its result."""
    stdin = plugin | {"cniVersion": VERSION, "name": NETWORK}
    if previous is not None:
        stdin["prevResult"] = previous
    if plugin["type"] == "manx":
        return rig.call(command, pod, stdin).ok()
    environment = {
        "PATH": os.environ["PATH"],
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod.id,
        "CNI_IFNAME": pod.ifname,
        "CNI_NETNS": pod.netns,
        "CNI_ARGS": pod.arguments,
        "CNI_PATH": str(REFERENCE),
    }
    with inside(rig.namespace.fd):
        done = subprocess.run(
            [REFERENCE / plugin["type"]],
            env=environment,
            input=json.dumps(stdin).encode(),
            capture_output=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout else None


def test_a_chain_of_reference_plugins(rig: Rig) -> None:
    pod = rig.container()
    result: Any = None
    for plugin in PLUGINS:
        result = execute(rig, "ADD", pod, plugin, result)
    assert [interface["name"] for interface in result["interfaces"]][1:] == ["eth0"]
    # portmap 1.1 looks for IPv6 rules in its CHECK that it has no reason to make
    for plugin in (plugin for plugin in PLUGINS if plugin["type"] != "portmap"):
        execute(rig, "CHECK", pod, plugin, result)
    with fresh_namespace() as outside, socket.socket() as server:
        connect(rig.namespace, "up0", outside, "eth0", ["192.0.2.1/24", "192.0.2.2/24"])
        run(outside, "ip", "route", "add", "default", "via", "192.0.2.1")
        sysctl(rig.namespace, {"net/ipv4/conf/up0/forwarding": "1"})
        with inside(pod.namespace.fd):
            server = socket.create_server(("", 80))
        with inside(outside.fd), socket.create_connection(("192.0.2.1", 8080), 10):
            connection, (source, _) = server.accept()
            connection.close()
            server.close()
        assert source == "192.0.2.2"
    for plugin in reversed(PLUGINS):
        execute(rig, "DEL", pod, plugin, result)
