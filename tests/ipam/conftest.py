"""Fixtures of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.sqlite import SqliteDatastore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteDatastore]:
    """An empty store."""
    store = SqliteDatastore(tmp_path / "datastore.db")
    yield store
    store.close()
