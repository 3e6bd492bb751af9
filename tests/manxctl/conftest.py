"""manxctl on a datastore of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from datastore.sqlite import SqliteDatastore
from manxctl.main import main

Run = Callable[..., Result]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "datastore.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteDatastore]:
    store = SqliteDatastore(path)
    yield store
    store.close()


@pytest.fixture
def run(path: Path, tmp_path: Path) -> Run:
    """``run("get", "pools", stdin=…)``: the command in this process."""
    environment = {"MANX_DATASTORE": f"sqlite://{path}", "MANX_RUN_DIR": str(tmp_path / "run")}

    def run(*arguments: str | Path, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(main, list(map(str, arguments)), input=stdin, env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
