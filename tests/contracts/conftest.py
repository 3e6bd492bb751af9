"""Every test of the datastore contract runs against every store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datastore.interface import Datastore
from tests.contracts import backends
from tests.contracts.backends import Backend
from tests.support.kube import KubeApiserver, api_server

BACKENDS = (
    "sqlite",
    "etcd",
    "kubernetes",
)


@pytest.fixture(scope="session")
def forgetful_apiserver() -> Iterator[KubeApiserver]:
    """An API server that keeps no events in memory: it forgets what its etcd forgets."""
    with api_server(extra_flags=("--watch-cache=false",)) as server:
        backends.prepare(server)
        yield server


@pytest.fixture(params=BACKENDS)
def fresh(request: pytest.FixtureRequest) -> Callable[[Path], Backend]:
    """Makes an empty store (where it needs one, in a directory), for tests that need several."""
    if request.param == "sqlite":
        return backends.sqlite
    if request.param == "etcd":
        etcd = request.getfixturevalue("etcd")
        return lambda _: backends.etcd(etcd)
    server = request.getfixturevalue("forgetful_apiserver")
    return lambda _: backends.kubernetes(server)


@pytest.fixture
def backend(fresh: Callable[[Path], Backend]) -> Iterator[Backend]:
    """An empty store."""
    with tempfile.TemporaryDirectory() as directory:
        yield fresh(Path(directory))


@pytest.fixture
def store(backend: Backend) -> Iterator[Datastore]:
    """A client of ``backend``'s store."""
    store = backend.connect()
    yield store
    store.close()
