"""One enforcer takes over from another, and back: both IP versions, pods and the host itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from api.net import parse_net
from kernel.netns import Namespace, inside
from tests.felix.world import (
    ROOT,
    V3,
    Flow,
    Listener,
    Node,
    cluster,
    felix_configuration,
    global_policy,
    is_dropped,
    policy,
    reaches,
)
from tests.support.netns import connect, eventually, fresh_namespace, run

NODE = {4: "172.31.0.1", 6: "fd31::1"}
NEAR = {4: "172.31.0.2", 6: "fd31::2"}
WEB = {4: "10.0.0.1", 6: "fd10::1"}
CLIENT = {4: "10.0.0.2", 6: "fd10::2"}

# What a FelixConfiguration says, and with which commands its work and its remains show.
CHOICES = {
    "nftables": {"nftablesMode": "Enabled"},
    "nft": {"nftablesMode": "Disabled", "iptablesBackend": "NFT"},
    "legacy": {"nftablesMode": "Disabled", "iptablesBackend": "Legacy"},
}
ORDER = ("legacy", "nft", "nftables", "nft", "legacy", "nftables")


def present(node: Node) -> set[tuple[str, int]]:
    """Which enforcers have anything in the kernel, in which IP versions."""
    listings: dict[str, list[tuple[str, ...]]] = {
        "nftables": [("nft", "list", "table", family, "calico") for family in ("ip", "ip6")],
        "nft": [("iptables-nft-save",), ("ip6tables-nft-save",)],
        "legacy": [("iptables-legacy-save",), ("ip6tables-legacy-save",)],
    }
    return {
        (name, version)
        for name, commands in listings.items()
        for version, command in zip((4, 6), commands, strict=True)
        if "cali-" in run(node.netns, *command, check=False).stdout
    }


@contextmanager
def flows(node: Node, near: Namespace, web: Namespace, client: Namespace) -> Iterator[None]:
    """To the node and to a pod: what is allowed arrives, all of it, and nothing else does."""
    with ExitStack() as stack:

        def flow(*ends: object) -> Flow:
            return stack.enter_context(Flow(*ends))  # type: ignore[arg-type]

        good, bad = [], []
        for version in (4, 6):
            good.append(flow(near, node.netns, NODE[version], 5001))
            bad.append(flow(near, node.netns, NODE[version], 5002))
            good.append(flow(client, web, WEB[version], 5003))
            bad.append(flow(near, web, WEB[version], 5004))
        eventually(lambda: all(each.sent > 50 for each in good + bad))
        yield
        sent = [each.sent for each in good]
        eventually(lambda: all(e.sent > s + 50 for e, s in zip(good, sent, strict=True)))
        for each in good:
            arrived = each.finish(0)
            assert arrived == set(range(each.sent)), f"{each.sent - len(arrived)} lost"
        for each in bad:
            assert each.finish() == set()


def test_enforcers_take_over_from_each_other() -> None:
    with cluster("node1", addresses=(f"{NODE[4]}/24",)) as (node,), fresh_namespace() as near:
        ends = [f"{end[v]}/{size}" for v, size in ((4, 24), (6, 64)) for end in (NODE, NEAR)]
        connect(node.netns, "eth0", near, "eth0", ends)
        for version in (4, 6):
            run(near, "ip", f"-{version}", "route", "add", "default", "via", NODE[version])
        eventually(lambda: "tentative" not in run(near, "ip", "-6", "address").stdout)
        pods = {}
        for name, addresses in (("web", WEB), ("client", CLIENT)):
            pods[name] = node.pod(name, addresses[4], endpoint=False)
            pods[name].add_address(addresses[6])
            networks = [str(parse_net(address)) for address in addresses.values()]
            node.put(pods[name].endpoint(labels={"app": name}, ipNetworks=networks))
        udp = {"action": "Allow", "protocol": "UDP"}
        node.put(
            policy(
                "web",
                selector="app == 'web'",
                types=["Ingress"],
                ingress=[{**udp, "source": {"selector": "app == 'client'"}}],
            )
        )
        node.put(
            {
                "apiVersion": V3,
                "kind": "HostEndpoint",
                "metadata": {"name": "eth0", "labels": {"host": "eth0"}},
                "spec": {"node": node.name, "interfaceName": "eth0"},
            }
        )
        ingress = [{**udp, "destination": {"ports": [5001]}}]
        node.put(global_policy("host", selector="has(host)", types=["Ingress"], ingress=ingress))
        node.start()
        node.settle()
        with flows(node, near, pods["web"].netns, pods["client"].netns):
            for chosen in ORDER:
                node.put(felix_configuration(f"node.{node.name}", **CHOICES[chosen]))
                node.settle()
                expected = {(chosen, 4), (chosen, 6)}
                eventually(lambda expected=expected: present(node) == expected)  # type: ignore[misc]
        assert node.errors() == {}
        for pod in pods.values():
            pod.netns.close()


def test_a_backend_that_cannot_be_had_holds_up_no_policy() -> None:
    """No programs of iptables here: what enforces goes on to, until there are."""
    with cluster("node1") as (node,):
        pods = {
            name: node.pod(name, address, labels={"app": name})
            for name, address in (("web", WEB[4]), ("client", CLIENT[4]))
        }
        deny = policy("web", selector="app == 'web'", types=["Ingress"])
        node.start(hide="/usr/sbin")
        what = "FelixConfiguration nftablesMode, iptablesBackend"
        with Listener(pods["web"].netns, 80):
            for chosen in ("legacy", "nft"):
                assert reaches(pods["client"].netns, WEB[4], 80)
                wish = felix_configuration(f"node.{node.name}", **CHOICES[chosen])
                node.put(wish)
                key = node.put(deny)
                node.settle()
                assert is_dropped(pods["client"].netns, WEB[4], 80)
                run(node.netns, "nft", "delete", "table", "ip", "calico")
                eventually(lambda: is_dropped(pods["client"].netns, WEB[4], 80))
                assert "install the package iptables" in node.errors()[what]
                assert "enforced by nftables" in node.errors()[what]
                node.delete(key)
                node.settle()
            node.kill()
            node.put(deny)
            node.start(hide="/usr/sbin")  # nor is there one to keep
            assert is_dropped(pods["client"].netns, WEB[4], 80)
            assert what in node.errors()
            assert node.agent is not None
            run_in_mounts_of(node.agent.pid, "umount", "/usr/sbin")
            eventually(lambda: present(node) == {("nft", 4), ("nft", 6)})
            assert is_dropped(pods["client"].netns, WEB[4], 80)
            eventually(lambda: what not in node.errors())
        for pod in pods.values():
            pod.netns.close()


@pytest.mark.parametrize("chosen", CHOICES)
def test_nothing_stays_of_an_agent_that_is_removed(chosen: str) -> None:
    with cluster("node1", addresses=(f"{NODE[4]}/24",)) as (node,), fresh_namespace() as near:
        ends = [f"{end[4]}/24" for end in (NODE, NEAR)]
        connect(node.netns, "eth0", near, "eth0", ends)
        before = everything(node)
        node.put(felix_configuration("default", **CHOICES[chosen]))
        pool = {"cidr": "10.0.0.0/16", "vxlanMode": "Always", "natOutgoing": True}
        node.put({"apiVersion": V3, "kind": "IPPool", "metadata": {"name": "p"}, "spec": pool})
        web = node.pod("web", WEB[4], labels={"app": "web"})
        client = node.pod("client", CLIENT[4], labels={"app": "client"})
        allow = {"action": "Allow", "source": {"selector": "app == 'client'"}}
        node.put(policy("web", selector="app == 'web'", types=["Ingress"], ingress=[allow]))
        node.start()
        node.settle()
        with inside(client.netns.fd):
            connection = socket.socket()
        with Listener(web.netns, 80), connection:
            connection.connect((WEB[4], 80))
            node.put(policy("web", selector="app == 'web'", types=["Ingress"]))
            tables = ("nft", "list", "tables")
            eventually(lambda: "calico-ended" in run(node.netns, *tables).stdout)
            assert remove(node).returncode == 1, "it is running"
        node.kill()
        for pod in (web, client):
            pod.unplug()
            pod.netns.close()
        assert everything(node) != before
        for _ in range(2):
            done = remove(node)
            assert (done.returncode, done.stderr) == (0, "") and everything(node) == before


def everything(node: Node) -> list[str]:
    """That felix may have put there: rules, sets, routes, interfaces."""
    listings = (
        ("nft", "list", "ruleset"),
        ("iptables-legacy-save",),
        ("ipset", "list", "-name"),
        ("ip", "route"),
        ("ip", "-o", "link"),
    )
    words = ("cali", "vxlan", "proto 80")
    lines = (line for each in listings for line in run(node.netns, *each).stdout.splitlines())
    return [line for line in lines if any(word in line for word in words)]


def remove(node: Node) -> subprocess.CompletedProcess[str]:
    with inside(node.netns.fd):
        return subprocess.run(
            [sys.executable, "-m", "felix", "--remove"],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "MANX_RUN_DIR": str(node.run_dir),
                "MANX_LOG_LEVEL": "ERROR",
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )


def run_in_mounts_of(pid: int, *command: str) -> None:
    subprocess.run(["nsenter", "--mount", "--target", str(pid), *command], check=True)
