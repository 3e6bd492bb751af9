"""Fabrics of the scenarios, and what their tests wait for."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lab.client import Lab
from lab.fabricfile import parse
from lab.probe import Pair, Probe, Reach

JSON = dict[str, Any]

PATIENCE = 60.0  # seconds for a busy machine


def calico(kind: str, name: str, **spec: Any) -> JSON:
    """A projectcalico.org/v3 object."""
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    }


def fabric(racks: list[JSON], resources: list[JSON], **spec: Any) -> JSON:
    """A fabric document; pods may talk to their own node, as installers set it."""
    accept = calico("FelixConfiguration", "default", defaultEndpointToHostAction="Accept")
    return {
        "apiVersion": "lab.manx.dev/v1alpha1",
        "kind": "Fabric",
        "metadata": {"name": "scenario"},
        "spec": {"racks": racks, "resources": [accept, *resources], **spec},
    }


def rack(number: int, asn: int, nodes: str, router: str = "bird", **node: Any) -> JSON:
    """Rack ``rack-N`` with router ``tor-N`` and a node ``node-Nx`` for each letter."""
    return {
        "name": f"rack-{number}",
        "subnet": f"172.31.{number}.0/24",
        "tor": {"name": f"tor-{number}", "asNumber": asn, "router": router},
        "nodes": [
            {"name": f"node-{number}{letter}", "address": f"172.31.{number}.{11 + i}", **node}
            for i, letter in enumerate(nodes)
        ],
    }


def pods(nodes: Iterable[str]) -> list[JSON]:
    """A pod ``p-Nx`` on every node ``node-Nx``."""
    return [
        {"name": f"p-{node.removeprefix('node-')}", "node": node, "labels": {"on": node}}
        for node in nodes
    ]


def up(document: JSON) -> Lab:
    """A running lab of the document, under a name of its own."""
    name = f"scenario-{uuid.uuid4().hex[:8]}"
    return Lab.up(parse(document, Path()), name=name, timeout=120)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def settle(probe: Probe, expected: Callable[[Pair], bool]) -> dict[Pair, Reach]:
    """Measure until every pair is as expected over TCP and ICMP; the last measurement."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = probe.matrix()
        wrong = {
            pair: reach
            for pair, reach in found.items()
            if {reach.tcp, reach.icmp} != {expected(pair)}
        }
        if not wrong:
            return found
        assert time.monotonic() < deadline, wrong


def apply(lab: Lab, node: str, *objects: JSON) -> None:
    """``manxctl apply`` on a node."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
    result = lab.run(node, "manxctl", "apply", "-f", "-", input=text)
    assert result.returncode == 0, result.stderr
