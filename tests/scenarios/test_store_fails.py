"""The store is down at the start, goes away, or holds what nobody can read: packets tell."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from datastore.connect import connect
from datastore.interface import Key
from tests.bird_glue.world import BIRD_COMMON, BIRD_SESSION, Ping, world
from tests.felix.world import Listener, is_dropped, reaches
from tests.manxctl.test_diags import contents
from tests.scenarios.fabrics import calico
from tests.scenarios.machine import ETCD, NAMESPACE, PROGRAMS, Machine, machine, settings
from tests.support.netns import connect as wire
from tests.support.netns import eventually

OUTAGE = 60.0  # seconds
TRY_AGAIN_LATER = 11  # CNI spec, well-known error codes


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return calico("NetworkPolicy", name, **spec) | {
        "metadata": {"name": name, "namespace": NAMESPACE}
    }


def check_waiting(node: Machine, words: str) -> None:
    """Programs without a store say so, try again, and write nothing into the kernel."""
    before = node.kernel()
    node.start()
    for program in PROGRAMS:
        eventually(lambda p=program: words in node.log(p))  # type: ignore[misc]
    eventually(lambda: node.log("cni").count("repair, next in") >= 3)
    status = node.status()
    for agent in ("felix", "bgp"):
        assert status[agent]["in_sync"] is False
        assert words in status[agent]["datastore"]
    shown = node.manx("node", "status").stdout
    assert shown.count("datastore not followed: ") == 2
    code, answer = node.call("ADD", node.container("early"))
    assert (code != 0, answer["code"]) == (True, TRY_AGAIN_LATER)
    assert words in f"{answer['msg']} {answer.get('details')}"
    assert node.kernel() == before
    for program in PROGRAMS:
        assert "Traceback" not in node.log(program)


def check_working(node: Machine) -> None:
    """The store is there now: without a restart everything is done."""
    node.apply(*settings())
    eventually(node.followed)
    one, other = node.container("one"), node.container("other")
    node.plug(one)
    address = node.plug(other)
    eventually(lambda: one.reaches(address))
    eventually(lambda: bool(node.status()["bgp"]["blocks"]))
    with Listener(other.namespace, 7777):
        eventually(lambda: reaches(one.namespace, address, 7777) is not None)
        node.apply(policy("nothing", selector="all()", types=["Ingress"]))
        eventually(lambda: is_dropped(one.namespace, address, 7777))


def test_an_etcd_that_refuses_at_the_start() -> None:
    with machine(ETCD) as node:
        check_waiting(node, "127.0.0.1:2379")
        node.start_etcd()
        check_working(node)


def test_a_file_that_cannot_be_opened_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "absent" / "store.db"
    with machine(f"sqlite://{file}") as node:
        check_waiting(node, str(file))
        file.parent.mkdir()
        check_working(node)


def check_diags(node: Machine, file: Path) -> None:
    """The report of a node whose programs run has their answers, tables and logs."""
    done = node.manx("node", "diags", "-o", str(file), "--log-dir", str(node.directory))
    assert done.returncode == 0, done.stderr
    found = contents(file)
    assert json.loads(found["status/felix.json"])["ready"] is True
    assert json.loads(found["status/bgp.json"])["in_sync"] is True
    assert "cali" in found["kernel/links.txt"]
    assert "cali-" in found["kernel/nftables.txt"] + found["kernel/iptables-v4.txt"]
    assert {f"log/{program}.log" for program in PROGRAMS} <= found.keys()


def test_what_cannot_be_read_is_reported_alone(tmp_path: Path) -> None:
    with machine(f"sqlite://{tmp_path}/store.db") as node:
        node.apply(*settings())
        store = connect(node.url)
        broken = [
            Key("NetworkPolicy", "broken", "elsewhere"),
            Key("BGPPeer", "broken"),
            Key("BlockAffinity", "broken"),
            Key("IPPool", "broken"),
            Key("WorkloadEndpoint", "broken", NAMESPACE),
            Key("Tier", "broken"),
        ]
        for key in broken:
            store.create(key, {"spec": ["not", "a", "mapping"], "metadata": 5})
        store.close()
        node.start()
        check_working(node)
        status = node.status()
        told = {error["object"] for error in status["felix"]["errors"]}
        assert told == {str(key) for key in broken if key.kind != "BGPPeer"}
        problems = "\n".join(status["bgp"]["problems"])
        for kind in ("BGPPeer", "IPPool"):
            assert f"{kind} broken" in problems
        shown = node.manx("node", "status").stdout
        assert "NetworkPolicy(elsewhere/broken)" in shown
        assert "BGPPeer broken" in shown
        check_diags(node, tmp_path / "report.tar.gz")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_store_that_is_away_for_a_minute(tmp_path: Path) -> None:
    """Nothing that flows stops, no policy opens or closes, and afterwards all is caught up."""
    with world(tmp_path) as made:
        ground, tor, outside = made.host("node"), made.bird("tor"), made.host("outside")
        wire(ground.namespace, "eth0", tor.namespace, "node", ["172.31.1.11/24", "172.31.1.1/24"])
        wire(tor.namespace, "out", outside.namespace, "eth0", ["192.0.2.1/24", "192.0.2.9/24"])
        outside.run("ip", "route", "add", "default", "via", "192.0.2.1")
        tor.start(
            BIRD_COMMON.format(router_id="172.31.1.1")
            + BIRD_SESSION.format(
                name="node", local="172.31.1.1", asn=65001, peer="172.31.1.11", peer_asn=64512,
                export="all",
            )
        )  # fmt: skip
        with machine(ETCD, namespace=ground.namespace) as node:
            node.start_etcd()
            node.apply(
                *settings(),
                calico("BGPPeer", "tor", peerIP="172.31.1.1", asNumber=65001),
                policy(
                    "some",
                    selector="all()",
                    ingress=[
                        {"action": "Allow", "protocol": "ICMP"},
                        {"action": "Allow", "protocol": "TCP", "destination": {"ports": [7777]}},
                    ],
                ),
            )
            node.start()
            eventually(node.followed)
            one, other, late = (node.container(name) for name in ("one", "other", "late"))
            node.plug(one)
            address = node.plug(other)
            eventually(lambda: one.reaches(address) and outside.reaches(address))
            with Listener(other.namespace, 7777), Listener(other.namespace, 7778):

                def policy_stands() -> None:
                    assert reaches(one.namespace, address, 7777) is not None
                    assert is_dropped(one.namespace, address, 7778)

                eventually(lambda: is_dropped(one.namespace, address, 7778))
                tables = node.kernel()
                with Ping(one, address) as inner, Ping(outside, address) as outer:
                    node.kill_etcd()
                    end = time.monotonic() + OUTAGE
                    policy_stands()
                    code, answer = node.call("ADD", late)
                    assert (code != 0, answer["code"]) == (True, TRY_AGAIN_LATER)
                    assert "127.0.0.1:2379" in f"{answer['msg']} {answer.get('details')}"
                    eventually(lambda: not node.followed())
                    while time.monotonic() < end:
                        policy_stands()
                        assert not node.followed()
                        assert outside.reaches(address)
                    assert node.kernel() == tables
                    node.start_etcd()
                    eventually(node.followed)
                    policy_stands()
                for ping in (inner, outer):
                    assert ping.lost == 0
                node.apply(policy("none", order=1, selector="all()", ingress=[{"action": "Deny"}]))
                eventually(lambda: is_dropped(one.namespace, address, 7777))
                assert node.manx("delete", "np", "none", "-n", NAMESPACE).returncode == 0
                new = node.plug(late)
                eventually(lambda: outside.reaches(new))
