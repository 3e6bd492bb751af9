"""The clients, and one node that the tests of a module share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cni.rig import Rig, build_client, running

_MUSL = ["musl-gcc"] if shutil.which("musl-gcc") else []


@pytest.fixture(scope="session", params=["c", *_MUSL, "python"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's executable: each test runs with all."""
    return build_client(request.param, tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="session")
def c_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's executable, for tests that are not about the client."""
    return build_client("c", tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="session")
def patient_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same; it asks for a minute, as a busy machine may take to start a daemon again."""
    return build_client("c", tmp_path_factory.mktemp("client"), "-DMANX_CNI_RETRIES=1200")


@pytest.fixture(scope="module")
def _node(c_client: Path) -> Iterator[Rig]:
    with running(c_client) as rig:
        yield rig


@pytest.fixture
def rig(_node: Rig) -> Iterator[Rig]:
    """A node whose daemon serves; after each test nothing may be left on it."""
    yield _node
    try:
        _node.assert_empty()
    finally:
        _node.collect_all()
