"""A whole chain, called by libcni: Manx, then tuning, portmap, bandwidth and firewall."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from lab.client import Lab
from tests.e2e.runtimes import CallError, CniTool, Host, container_name, fetched
from tests.scenarios.fabrics import until

# what they call is built, once, with a Go toolchain
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFLIST = "/run/chain/10-chain.conflist"
VERSION = "1.0.0"  # the newest that Debian's plugins speak
SYSCTL = "net.ipv4.ip_unprivileged_port_start"
NODE_ADDRESS = "172.31.1.12"  # of the second node
HOST_PORT = 8080
BIT_RATE = 20_000_000  # a second
BURST = 256_000  # bits
CAPABILITIES = {
    "portMappings": [{"hostPort": HOST_PORT, "containerPort": 80, "protocol": "tcp"}],
    "bandwidth": {
        "ingressRate": BIT_RATE,
        "ingressBurst": BURST,
        "egressRate": BIT_RATE,
        "egressBurst": BURST,
    },
}
ARGUMENTS = json.dumps(CAPABILITIES)
# More than the burst, at once.
FLOOD = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
    for _ in range(200):
        out.sendto(bytes(1400), (sys.argv[1], 9))
"""


@pytest.fixture(scope="module")
def tool(hosts: list[Host]) -> CniTool:
    """libcni on the second node, with the chain."""
    host = hosts[1]
    chain = [
        {"type": "manx"},
        {"type": "tuning", "sysctl": {SYSCTL: "0"}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        {"type": "firewall", "backend": "iptables"},
    ]
    conflist = {"cniVersion": VERSION, "name": "chain", "plugins": chain}
    host.write(CONFLIST, json.dumps(conflist))
    return CniTool(host, CONFLIST)


@pytest.fixture
def container(tool: CniTool) -> Iterator[str]:
    """A container behind the chain, which serves its files on port 80."""
    name = container_name()
    tool.start(name, CAP_ARGS=ARGUMENTS)
    tool.execute(name, "/bin/httpd", "-p", "80", "-h", "/")
    address = tool.address(name)
    yield name
    tool.stop(name, CAP_ARGS=ARGUMENTS)
    assert buckets(tool) == {}
    assert address not in tool.host.run("iptables-save")


def buckets(tool: CniTool) -> dict[str, dict[str, Any]]:
    """The token buckets of the node, by interface."""
    found = json.loads(tool.host.run("tc", "-s", "-j", "qdisc", "show"))
    return {each["dev"]: each for each in found if each["kind"] == "tbf"}


def test_a_port_of_the_node_leads_to_the_container(lab: Lab, container: str, tool: CniTool) -> None:
    expected = (tool.host.root / "etc/passwd").stat().st_size
    port = f"{NODE_ADDRESS}:{HOST_PORT}"
    for member in ("outside", "node-1a"):
        until(partial(fetched, lab, member, port, "/etc/passwd"), f"{member} reaches the port")
        assert fetched(lab, member, port, "/etc/passwd") == expected
    # and the container itself has no such port
    assert fetched(lab, "node-1a", f"{tool.address(container)}:{HOST_PORT}", "/etc/passwd") == 0


def test_both_ways_are_limited(lab: Lab, container: str, tool: CniTool) -> None:
    address = tool.address(container)
    found = buckets(tool)
    assert {each["options"]["rate"] for each in found.values()} == {BIT_RATE // 8}
    (into,) = (name for name in found if name.startswith("cali"))
    (out_of,) = found.keys() - {into}
    size = (tool.host.root / "bin/busybox").stat().st_size
    until(lambda: fetched(lab, "node-1a", address, "/bin/busybox") == size, "the file arrives")
    lab.run("node-1a", sys.executable, "-c", FLOOD, address)
    until(lambda: buckets(tool)[into]["drops"] > 0, "what comes too fast is dropped")
    assert buckets(tool)[out_of]["overlimits"] > 0  # the file had to wait


def test_the_kernel_settings_of_the_container(container: str, tool: CniTool) -> None:
    assert tool.execute(container, "/bin/sysctl", "-n", SYSCTL) == "0\n"


def test_the_firewall_lets_the_container_through(container: str, tool: CniTool) -> None:
    rules = tool.host.run("iptables-save", "-t", "filter")
    assert f"-s {tool.address(container)}/32" in rules


def test_check_through_the_whole_chain(tool: CniTool) -> None:
    """Without a port: portmap 1.1 looks for its IPv4 rules among those of IPv6."""
    name = container_name()
    arguments = json.dumps({"bandwidth": CAPABILITIES["bandwidth"]})
    tool.start(name, CAP_ARGS=arguments)
    tool.call("check", name, CAP_ARGS=arguments)
    tool.host.run("ip", "netns", "exec", name, "ip", "route", "delete", "default")
    with pytest.raises(CallError, match=r"0\.0\.0\.0/0"):
        tool.call("check", name, CAP_ARGS=arguments)
    tool.stop(name, CAP_ARGS=arguments)


def test_del_may_be_repeated(tool: CniTool) -> None:
    name = container_name()
    tool.start(name, CAP_ARGS=ARGUMENTS)
    for _ in range(3):
        tool.call("del", name, CAP_ARGS=ARGUMENTS)
    tool.stop(name, CAP_ARGS=ARGUMENTS)


def test_a_plugin_after_us_that_fails_leaves_nothing(tool: CniTool) -> None:
    """libcni leaves the DEL to its caller, as runtimes know."""
    path = "/run/chain/20-broken.conflist"
    tuning = {"type": "tuning", "sysctl": {"net.ipv4.no_such_setting": "1"}}
    broken = {"cniVersion": VERSION, "name": "broken", "plugins": [{"type": "manx"}, tuning]}
    tool.host.write(path, json.dumps(broken))
    with pytest.raises(CallError, match="no_such_setting"):
        CniTool(tool.host, path).start(container_name())
    assert "cali" not in tool.host.run("ip", "-o", "link")


def test_status_and_gc_of_the_newest_version(tool: CniTool) -> None:
    """A container that libcni has forgotten is collected all the same."""
    path = "/run/chain/30-newest.conflist"
    newest = {"cniVersion": "1.1.0", "name": "newest", "plugins": [{"type": "manx"}]}
    tool.host.write(path, json.dumps(newest))
    alone = CniTool(tool.host, path)
    alone.call("status")
    name = container_name()
    alone.start(name)
    tool.host.run("rm", "-r", f"{CniTool.FOLDER}/cache")
    assert "cali" in tool.host.run("ip", "-o", "link")
    alone.call("gc")
    assert "cali" not in tool.host.run("ip", "-o", "link")
    alone.stop(name)
