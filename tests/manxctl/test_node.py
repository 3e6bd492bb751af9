"""node status, asked over the sockets the two programs answer on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bird_glue import status as bgp
from cni.findings import Teller
from felix import status as felix
from ipam.audit import Fault, Finding
from tests.manxctl.conftest import Run

FELIX = {
    "in_sync": True,
    "ready": True,
    "endpoints": {"a": {}, "b": {}},
    "policies": 3,
    "errors": [{"object": "NetworkPolicy(shop/web)", "message": "no such protocol"}],
}


def peer(address: str, **more: Any) -> bgp.PeerStatus:
    fields: dict[str, Any] = {
        "address": address,
        "port": 179,
        "type": "global",
        "asn": 65001,
        "state": "Established",
        "since": time.time(),
        "info": "",
        "received": 5,
        "used": 4,
        "installed": 4,
        "announced": 2,
    }
    return bgp.PeerStatus(**fields | more)


BGP = bgp.BgpStatus(
    node="n1",
    asn=64512,
    router_id="172.31.1.11",
    in_sync=True,
    holding=False,
    pid=42,
    blocks=["10.0.0.0/26"],
    peers=[
        peer("172.31.1.1", since=0.0, bfd="up (2.5 s)", refused={"in a pool of this cluster": 1}),
        peer("172.31.1.2", port=1790, state="Active", info="hold timer expired"),
        peer("fd00::1", type="node-to-node mesh"),
    ],
    problems=["BGPPeer x: spec.node: 'y': expected a node"],
)


@contextmanager
def programs(run_dir: Path, said: bgp.BgpStatus = BGP) -> Iterator[None]:
    """Both programs' servers, answering at once."""
    run_dir.mkdir()
    agent = felix.StatusServer(run_dir, lambda request: request.reply.put(FELIX))
    speaker = bgp.StatusServer(run_dir, lambda request: request.answer(bgp.status_answer(said)))
    agent.start()
    speaker.start()
    try:
        yield
    finally:
        agent.stop()
        speaker.stop()


def test_status(run: Run, tmp_path: Path) -> None:
    with programs(tmp_path / "run"):
        result = run("node", "status")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:5] == [
        "felix: ready (2 endpoints, 3 policies)",
        "  NetworkPolicy(shop/web): no such protocol",
        "BGP: running (AS 64512, router ID 172.31.1.11, blocks: 10.0.0.0/26)",
        "  BGPPeer x: spec.node: 'y': expected a node",
        "",
    ]
    assert lines[5] == "IPv4 peers"
    assert lines[6].split("   ")[0] == "PEER ADDRESS"
    assert lines[7].split("   ")[0] == "172.31.1.1"
    told = "5 prefixes in, 4 accepted, 4 installed, 2 out; BFD up (2.5 s)"
    assert lines[7].endswith(told)
    assert lines[8].startswith("172.31.1.2:1790   global      Active")
    assert lines[8].endswith("hold timer expired")
    assert lines[9] == "  of 172.31.1.1 1 refused: in a pool of this cluster"
    assert lines[11] == "IPv6 peers"
    assert "node-to-node mesh   Established" in lines[13]


def test_what_the_cni_daemon_found(run: Run, tmp_path: Path) -> None:
    """Between felix and BGP, where there is a daemon."""
    finding = Finding(Fault.INTERFACE, "cali1", "is of no endpoint of this node")
    with programs(tmp_path / "run"):
        teller = Teller(tmp_path / "run")
        teller.tell([])
        assert "interfaces, routes and endpoints: all agrees (at 2" in run("node", "status").stdout
        teller.tell([finding])
        lines = run("node", "status").stdout.splitlines()
        found = json.loads(run("node", "status", "-o", "json").stdout)["cni"]["findings"]
    assert lines[2].startswith("interfaces, routes and endpoints: 1 disagreements (at 2")
    assert lines[3] == "  kernel interface: cali1: is of no endpoint of this node"
    assert found == [{"fault": "kernel interface", "subject": "cali1", "message": finding.message}]


@pytest.mark.parametrize(
    ("peers", "state"),
    [([], "no peers to talk to"), ([peer("172.31.1.1")], "ExaBGP does not run")],
)
def test_without_exabgp(run: Run, tmp_path: Path, peers: list[bgp.PeerStatus], state: str) -> None:
    with programs(tmp_path / "run", replace(BGP, pid=None, peers=peers)):
        assert f"\nBGP: {state} (AS 64512" in run("node", "status").stdout


def test_json(run: Run, tmp_path: Path) -> None:
    with programs(tmp_path / "run"):
        both = json.loads(run("node", "status", "-o", "json").stdout)
    assert both["felix"] == FELIX
    assert both["bgp"]["peers"][1]["info"] == "hold timer expired"


def test_programs_that_do_not_run(run: Run) -> None:
    result = run("node", "status")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "does manx-felix run?" in result.stderr
    assert "does manx-bird-glue run?" in result.stderr
