"""Two nodes that run Manx, and what container runtimes need on them."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.client import Lab
from tests.e2e.runtimes import IMAGE, SLEEP, Host
from tests.scenarios.fabrics import calico, fabric, rack, up
from tests.support.cnitool import cnitool
from tests.support.containers import image, remove_cgroups, root_file_system

__all__ = ["cnitool"]

NODES = ("node-1a", "node-1b")
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
POOL = "10.70.0.0/16"
INSTALL = [sys.executable, "-m", "cni", "install", "--chain", json.dumps(PORTMAP)]
REFERENCE = "/usr/lib/cni"  # Debian's containernetworking-plugins


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    """The name of the control groups of all containers."""
    name = f"manx-e2e-{uuid.uuid4().hex[:8]}"
    yield name
    remove_cgroups(name)


@pytest.fixture(scope="module")
def lab(group: str) -> Iterator[Lab]:
    """Two nodes in one rack, and a host outside. Its end is that of all in the ``group``."""
    document = fabric(
        [rack(1, 65001, "ab")],
        [calico("IPPool", "pods", cidr=POOL)],
        hosts=[{"name": "outside", "router": "tor-1", "address": "198.51.100.10/24"}],
    )
    with up(document) as running:
        for node in NODES:
            for command in (["sh", "-c", f"cp {REFERENCE}/* /opt/cni/bin/"], INSTALL):
                done = running.run(node, *command)
                assert done.returncode == 0, done.stderr
        yield running


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root file system of every container."""
    return root_file_system(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="session")
def archive(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an image."""
    return image(root, IMAGE, SLEEP, tmp_path_factory.mktemp("image") / "image.tar")


@pytest.fixture(scope="module")
def hosts(lab: Lab, root: Path, archive: Path, cnitool: Path, group: str) -> list[Host]:
    """The nodes."""
    return [Host(lab, node, root, archive, cnitool, group) for node in NODES]
