"""What an earlier version enforced with: taken over without a gap, and nothing of it stays.

``released`` has what version 0.1.0 put into the kernel for the node of this test, and stays as it
is: ``iptables-save``, ``ipset save``, and ``nft list ruleset`` with what that can't read again put
right (interfaces' names in maps, ``fib … missing``).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel.netns import inside
from tests.felix.test_takeover import CHOICES
from tests.felix.world import (
    ROOT,
    V3,
    Flow,
    Node,
    cluster,
    felix_configuration,
    policy,
)
from tests.support.netns import eventually, run

RELEASED = Path(__file__).with_name("released")
RESTORES: dict[str, dict[str, tuple[str, ...]]] = {
    "nftables": {"nftables": ("nft", "-f", "-")},
    "nft": {
        "ipset": ("ipset", "restore"),
        "iptables": ("iptables-nft-restore",),
        "ip6tables": ("ip6tables-nft-restore",),
    },
    "legacy": {
        "ipset": ("ipset", "restore"),
        "iptables": ("iptables-legacy-restore",),
        "ip6tables": ("ip6tables-legacy-restore",),
    },
}


@pytest.mark.parametrize("chosen", CHOICES)
def test_rules_of_an_earlier_version(chosen: str) -> None:
    with cluster("node1", addresses=("172.31.0.1/24",)) as (node,):
        node.put(felix_configuration("default", **CHOICES[chosen]))
        pool = {"cidr": "10.0.0.0/16", "natOutgoing": True}
        node.put({"apiVersion": V3, "kind": "IPPool", "metadata": {"name": "p"}, "spec": pool})
        web = node.pod("web", "10.0.0.1", labels={"app": "web"})
        client = node.pod("client", "10.0.0.2", labels={"app": "client"})
        allow = {
            "action": "Allow",
            "protocol": "UDP",
            "source": {"selector": "app == 'client'"},
            "destination": {"ports": [5001]},
        }
        node.put(policy("web", selector="app == 'web'", types=["Ingress"], ingress=[allow]))
        for pod in (web, client):
            forwarding = f"net.ipv4.conf.{pod.interface}.forwarding=1"
            run(node.netns, "sysctl", "-qw", forwarding)
            run(node.netns, "ip", "route", "add", pod.address, "dev", pod.interface, "proto", "80")
        for name, command in RESTORES[chosen].items():
            run(node.netns, *command, stdin=(RELEASED / f"{name}.rules").read_text())
        assert any("cali-FORWARD" in line for line in kernel(node))
        with (
            Flow(client.netns, web.netns, web.address, 5001) as good,
            Flow(client.netns, web.netns, web.address, 5002) as bad,
        ):
            eventually(lambda: good.sent > 100 and bad.sent > 100)
            node.start()
            node.settle()
            sent = good.sent
            eventually(lambda: good.sent > sent + 100)
            assert good.finish(0) == set(range(good.sent))
            assert bad.finish() == set()
        assert node.errors() == {}
        found = kernel(node)
        node.kill()
        remove(node)
        node.start()
        node.settle()
        assert found == kernel(node)
        for pod in (web, client):
            pod.netns.close()


def kernel(node: Node) -> list[str]:
    """All rules and sets, without counters, seeds, and keys, which nft shows where it made them."""
    listings = (
        ("nft", "-s", "list", "ruleset"),
        ("iptables-legacy-save",),
        ("ip6tables-legacy-save",),
        ("ipset", "save"),
    )
    lines = (line for each in listings for line in run(node.netns, *each).stdout.splitlines())
    varying = re.compile(r' initval .*| \[.*|"cali\w*"(?= : goto)')
    return sorted(varying.sub("", line).replace('""', "") for line in lines if line[:1] != "#")


def remove(node: Node) -> None:
    """``manx-felix --remove``."""
    environment = {"PATH": os.environ["PATH"], "MANX_RUN_DIR": str(node.run_dir)}
    with inside(node.netns.fd):
        subprocess.run(
            [sys.executable, "-m", "felix", "--remove"], env=environment, cwd=ROOT, check=True
        )
