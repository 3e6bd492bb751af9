"""The SQLite file under the embedded store: opening it, sharing it, saying what is wrong with it.

One file in WAL mode serves all processes of a machine, in whatever network or mount
namespaces they run: locks, shared memory and inotify all go by inode.

- A transaction that writes takes SQLite's write lock at its beginning (``BEGIN IMMEDIATE``),
  so it never fails half-way. Waiting for the lock is fair: the longer one has waited, the
  more often one tries.
- After each commit the file's times are set (``touch FILE``). Watchers hear of that through
  inotify, and it comes strictly after the commit is visible.
- The first use pins the file. When it disappears or another file takes its place, every
  operation fails until the pinned one is back or the program is started again: an agent must
  not mistake an empty new file for a cluster in which everything was deleted.
- Killing a process at any moment costs at most its uncommitted transaction. A power loss
  never damages the file, but under ``synchronous=normal`` it may take back the last commits
  (those since the last checkpoint); under ``full`` each commit is on the disk first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from urllib.parse import quote

from datastore.interface import UnavailableError

SYNCHRONOUS = ("normal", "full")

_APPLICATION_ID = 0x4D414E58  # "MANX", for file(1) and for us
_SCHEMA_VERSION = 1
_SCHEMA = (
    # value: JSON text in UTF-8; revision: that of the object's last change
    """CREATE TABLE objects (
        kind TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
        revision INTEGER NOT NULL, value BLOB NOT NULL,
        PRIMARY KEY (kind, name, namespace))""",
    # The latest changes, for watches; value is NULL for a deletion. The last row is never
    # removed, so the next revision is always greater than any before.
    """CREATE TABLE changes (
        revision INTEGER PRIMARY KEY, time INTEGER NOT NULL,
        kind TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL, value BLOB)""",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)

_LOCK_SECONDS = 30.0  # how long to wait for the write lock
_READERS = 8  # connections; to open one takes longer than to wait for one
_LONG_WAL_BYTES = 6 << 20  # writers wait until a log this long is in the file
_WAL_BYTES = 64 << 20  # a log this long is cut, which makes writers wait for a moment

_random = Random()  # of its own: the global one belongs to programs
_log = logging.getLogger(__name__)
T = TypeVar("T")


class SqliteFile:
    """Connections and transactions on one store file. Safe to use from several threads."""

    def __init__(self, path: Path, synchronous: str) -> None:
        self.path = path
        self._name = str(path)
        self._synchronous = synchronous
        self._pinned: tuple[int, int] | None = None  # device and inode
        self._writer: sqlite3.Connection | None = None
        self._writer_lock = threading.Lock()
        self._readers: list[sqlite3.Connection] = []
        self._readers_lock = threading.Lock()
        self._reading = threading.BoundedSemaphore(_READERS)
        self._checkpoint: threading.Thread | None = None
        self._closed = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with; each statement sees one moment. Raises UnavailableError.

        Not to be nested: there are as many as ``_READERS``, for all threads.
        """
        with self._explained(), self._reading:
            self.check()
            connection = self._take_reader()
            healthy = True
            try:
                yield connection
            except sqlite3.Error:
                healthy = False
                raise
            finally:
                self._give_back(connection, healthy)

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[Any]:
        """What a statement that takes no time finds. Raises UnavailableError.

        With the connection that writes, where that is free: it still knows the pages that it has
        written, which others must read anew after every commit.
        """
        if self._writer_lock.acquire(blocking=False):
            try:
                if self._writer is not None:
                    self.check()
                    return self._writer.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                self._drop_writer()
                raise UnavailableError(self._explain(error)) from error
            finally:
                self._writer_lock.release()
        with self.reading() as connection:
            return connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """A connection all of whose statements see the same moment. Raises UnavailableError."""
        with self.reading() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

    def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """What ``change`` returns, done in a transaction; undone by an exception.

        Raises UnavailableError; then nothing was written.
        """
        if not self._writer_lock.acquire(timeout=_LOCK_SECONDS):
            raise UnavailableError(self._locked())
        try:
            result = self._transact(change)
        except sqlite3.Error as error:
            self._drop_writer()
            raise UnavailableError(self._explain(error)) from error
        finally:
            self._writer_lock.release()
        # Watchers look again every second anyway, should this fail or never be reached.
        with contextlib.suppress(OSError):
            os.utime(self._name)
        return result

    def _transact(self, change: Callable[[sqlite3.Connection], T]) -> T:
        self.check()
        connection = self._writer
        if connection is None:
            with self._explained():
                # fair waiting instead of SQLite's
                connection = self._writer = self._connect(0)
        try:
            _patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
            result = change(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return result

    def checkpoint(self) -> None:
        """Move committed pages from the log into the file. May raise UnavailableError.

        SQLite would do it inside COMMIT, where everybody waits for the disk. A thread of its own
        does it beside those who write; but what they write meanwhile it leaves over, and so the
        log may grow. When it is long they wait after all.
        """
        wal = self.path.with_name(self.path.name + "-wal")
        with self._explained(), contextlib.suppress(FileNotFoundError):
            if wal.stat().st_size > _LONG_WAL_BYTES:
                with self._writer_lock:
                    if self._writer is not None:
                        self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                        if wal.stat().st_size > _WAL_BYTES:
                            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                return
        with self._readers_lock:
            busy = self._checkpoint is not None and self._checkpoint.is_alive()
            if not busy and not self._closed:
                self._checkpoint = threading.Thread(
                    target=self._run_checkpoint, name="sqlite-checkpoint", daemon=True
                )
                self._checkpoint.start()

    def _run_checkpoint(self) -> None:
        try:
            with self.reading() as connection:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except UnavailableError as error:
            if not self._closed:
                _log.warning("checkpoint, to be done later: %s", error)

    def check(self) -> None:
        """Raise UnavailableError unless the file is there and is the one first opened."""
        if self._closed:
            raise UnavailableError(f"datastore {self.path}: closed by this program")
        if self._pinned is None:
            return
        try:
            found = os.stat(self._name)  # noqa: PTH116 - several times in every operation
        except OSError as error:
            raise UnavailableError(
                f"datastore {self.path}: was removed while in use ({error.strerror});"
                " put it back, or restart this program to begin with an empty one"
            ) from error
        if (found.st_dev, found.st_ino) != self._pinned:
            raise UnavailableError(
                f"datastore {self.path}: was replaced by another file while in use;"
                " restart this program to use the new one"
            )

    def close(self) -> None:
        """Close all connections, those in use as soon as they are given back."""
        self._closed = True
        with self._readers_lock:
            checkpoint = self._checkpoint
        if checkpoint is not None:
            checkpoint.join()
        with self._writer_lock:
            self._drop_writer()
        with self._readers_lock:
            readers, self._readers = self._readers, []
        for connection in readers:
            connection.close()

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _take_reader(self) -> sqlite3.Connection:
        with self._readers_lock:
            if self._readers:
                return self._readers.pop()
        return self._connect(_LOCK_SECONDS)  # waits only while another recovers the log

    def _give_back(self, connection: sqlite3.Connection, healthy: bool) -> None:
        with self._readers_lock:
            if healthy and not self._closed:
                self._readers.append(connection)
                return
        connection.close()

    def _connect(self, lock_seconds: float) -> sqlite3.Connection:
        with contextlib.suppress(FileExistsError):
            if self._pinned is None:
                # mknod, because closing a descriptor of our own would drop SQLite's locks
                os.mknod(self.path, stat.S_IFREG | 0o600)
        before = self.path.stat()
        if not stat.S_ISREG(before.st_mode):
            raise UnavailableError(f"datastore {self.path}: is not a regular file")
        connection = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode=rw",
            uri=True,
            timeout=lock_seconds,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _patiently(lambda: self._prepare(connection))
            after = self.path.stat()
            if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
                raise UnavailableError(f"datastore {self.path}: was replaced while being opened")
            if self._pinned is None:
                self._pinned = after.st_dev, after.st_ino
            self.check()
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        ours = self._recognised(connection)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise UnavailableError(
                f"datastore {self.path}: the file system can't do SQLite's WAL mode"
                " (network file systems can't); move the file to a local disk"
            )
        if not ours:
            connection.execute("BEGIN IMMEDIATE")
            try:
                if not self._recognised(connection):
                    for statement in _SCHEMA:
                        connection.execute(statement)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        connection.execute("PRAGMA wal_autocheckpoint = 0")

    def _recognised(self, connection: sqlite3.Connection) -> bool:
        """Whether the file has our schema; False when it is still empty."""
        # One statement, so that it sees one moment: another process may be at making the schema.
        application, version, tables = connection.execute(
            "SELECT (SELECT application_id FROM pragma_application_id),"
            " (SELECT user_version FROM pragma_user_version),"
            " (SELECT count(*) FROM sqlite_master)"
        ).fetchone()
        if not application and not version and not tables:
            return False
        if application != _APPLICATION_ID:
            raise UnavailableError(
                f"datastore {self.path}: is an SQLite database of another program;"
                " name another file in MANX_DATASTORE"
            )
        if version != _SCHEMA_VERSION:
            raise UnavailableError(
                f"datastore {self.path}: has schema version {version}, this program knows"
                f" {_SCHEMA_VERSION}; run the version of Manx that wrote it"
            )
        return True

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of SQLite and the file system into UnavailableError with a remedy."""
        try:
            yield
        except sqlite3.Error as error:
            raise UnavailableError(self._explain(error)) from error
        except OSError as error:
            raise UnavailableError(
                f"datastore {self.path}: {error.strerror}; make sure that the directory"
                f" {self.path.parent} exists and can be written, or correct MANX_DATASTORE"
            ) from error

    def _explain(self, error: sqlite3.Error) -> str:
        code = _primary_code(error)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return self._locked()
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            remedy = (
                "is damaged or no SQLite database; restore a copy of it (how: docs/datastore.md)"
            )
        elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            remedy = (
                "can't be opened for writing; check owner and mode of the file and of its"
                " directory, and that the file system is not mounted read-only"
            )
        elif code == sqlite3.SQLITE_FULL:
            remedy = "the disk is full; make room"
        else:
            remedy = "can't be used now"
        return f"datastore {self.path}: {remedy} ({error})"

    def _locked(self) -> str:
        return (
            f"datastore {self.path}: another process has held the write lock for"
            f" {_LOCK_SECONDS:.0f} s; find it with: fuser -v {self.path}"
        )


def _primary_code(error: sqlite3.Error) -> int:
    code = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF if code is not None else sqlite3.SQLITE_ERROR


def _patiently(step: Callable[[], T]) -> T:
    """Run ``step`` until it is not turned away by somebody else's lock."""
    started = time.monotonic()
    while True:
        try:
            return step()
        except sqlite3.OperationalError as error:
            waited = time.monotonic() - started
            if _primary_code(error) != sqlite3.SQLITE_BUSY or waited > _LOCK_SECONDS:
                raise
        # A transaction takes about 0.1 ms. Newcomers sleep for some of them, those who have
        # waited 10 ms for hardly one; after a second the holder is stuck and haste is useless.
        pause = 0.01 if waited > 1 else max(0.0001, 0.001 - waited / 10)
        time.sleep(pause * _random.uniform(0.5, 1.0))
