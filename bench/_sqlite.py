"""The SQLite store, beside the same swaps by the sqlite3 module alone."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import orjson

from bench._measure import CAS_SECONDS, OBJECTS, cost, cost_of_list, measure
from bench._objects import block, endpoint
from datastore.sqlite import SqliteDatastore


def run() -> dict[str, float]:
    """Measure."""
    with tempfile.TemporaryDirectory(prefix="manx-bench-") as name:
        path = Path(name) / "datastore.db"
        connect = partial(SqliteDatastore, path)
        figures = measure(connect)
        figures["plain_cas_per_s"] = _plain_swaps(Path(name) / "plain.db")
        store = connect()
        for number in range(OBJECTS):
            store.create(*endpoint(number))
        store.close()
        figures |= cost_of_list(connect, "WorkloadEndpoint").named("list_10k")
        return figures | cost(partial(_plain_list, Path(name) / "plain.db")).named("plain_list_10k")


def _plain_swaps(path: Path) -> float:
    """One process, one UPDATE … WHERE revision = ? a swap, no history, no news to watchers."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL").fetchone()
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("CREATE TABLE objects (name TEXT PRIMARY KEY, revision INT, value BLOB)")
    _, value = block(0)
    connection.execute("INSERT INTO objects VALUES ('a', 0, ?)", (orjson.dumps(value),))
    revision, start = 0, time.monotonic()
    while time.monotonic() < start + CAS_SECONDS:
        connection.execute(
            "UPDATE objects SET revision = ?, value = ? WHERE name = 'a' AND revision = ?",
            (revision + 1, orjson.dumps(value), revision),
        )
        revision += 1
    connection.close()
    return revision / (time.monotonic() - start)


def _plain_list(path: Path) -> Callable[[], int]:
    """One SELECT, and the JSON of each row."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("DELETE FROM objects")
    connection.execute("BEGIN")
    for key, value in map(endpoint, range(OBJECTS)):
        row = (key.name, 1, orjson.dumps(value))
        connection.execute("INSERT INTO objects VALUES (?, ?, ?)", row)
    connection.execute("COMMIT")
    kept: list[object] = []

    def list_all() -> int:
        for (data,) in connection.execute("SELECT value FROM objects ORDER BY name"):
            kept.append(orjson.loads(data))
        return len(kept)

    return list_all
