"""What other processes do with the store in the tests of this room."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from datastore.interface import JSON, Key
from datastore.sqlite import SqliteDatastore

processes = get_context("spawn")


def pool_key(name: str) -> Key:
    return Key("IPPool", name)


def numbered(number: int) -> JSON:
    """A value that tells its number, of very different sizes (0 to 20 KB)."""
    return {"number": number, "padding": "x" * (number * 2371 % 20_000)}


def count_for_ever(path: Path, name: str, said: Connection) -> None:
    """Raise the number in an object again and again; say each one once it is committed."""
    store = SqliteDatastore(path)
    entry = store.get(pool_key(name))
    while True:
        number = entry.value["number"] + 1
        entry = store.update(entry.key, numbered(number), entry.revision)
        said.send_bytes(str(number).encode())


def hold_write_lock(path: Path, said: Connection) -> None:
    """Take SQLite's write lock and keep it until told to let go."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    said.send_bytes(b"locked")
    said.recv_bytes()
    connection.execute("ROLLBACK")
    connection.close()


def start(target: Callable[..., None], *args: object) -> tuple[BaseProcess, Connection]:
    """A process, and our end of the pipe to it that it got as last argument."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=target, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def elsewhere(mounts: str, program: str, *namespaces: str) -> subprocess.Popen[str]:
    """Run Python in a mount namespace of its own, in which ``mounts`` (shell) is done first."""
    command = ["unshare", "--mount", *namespaces, "sh", "-c", mounts + ' && exec "$@"', "sh"]
    return subprocess.Popen(
        [*command, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
