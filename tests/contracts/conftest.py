"""Every test of the datastore contract runs against every store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datastore.interface import Datastore
from tests.contracts import backends
from tests.contracts.backends import Backend

BACKENDS: dict[str, Callable[[Path], Backend]] = {"sqlite": backends.sqlite}


@pytest.fixture(params=BACKENDS)
def fresh(request: pytest.FixtureRequest) -> Callable[[Path], Backend]:
    """Makes an empty store in a directory, for tests that need several."""
    return BACKENDS[request.param]


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
