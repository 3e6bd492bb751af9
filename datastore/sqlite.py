"""The embedded store: one SQLite file for all processes of a machine.

What a crash and a power loss may cost, and who may share the file: ``datastore.sqlite_file``.
Revisions are the numbers of a single counter, as text. The latest changes are kept for
watches: at most ``HISTORY`` of them, none older than ``HISTORY_SECONDS``.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import orjson

from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Entry,
    Key,
    Listing,
    NotFoundError,
    StoreError,
)
from datastore.sqlite_file import SqliteFile
from datastore.sqlite_watch import SqliteWatch
from datastore.unreadable import read

HISTORY = 10_000
HISTORY_SECONDS = 3600
_LAST = "\U0010ffff"
_COMPACT_EVERY = 250  # revisions
_CHECKPOINT_EVERY = 100  # revisions, about 2 MB of log

_KEY = "kind = ? AND namespace = ? AND name = ?"
_SELECT = f"SELECT revision, value FROM objects WHERE {_KEY}"
_INSERT = "INSERT INTO objects (kind, namespace, name, revision, value) VALUES (?, ?, ?, ?, ?)"
_UPDATE = f"UPDATE objects SET revision = ?, value = ? WHERE {_KEY}"
_DELETE = f"DELETE FROM objects WHERE {_KEY}"
_LOG = "INSERT INTO changes (time, kind, namespace, name, value) VALUES (?, ?, ?, ?, ?)"
_UNLOG = "DELETE FROM changes WHERE revision = ?"  # the last one, whose number is then free again

Row = tuple[int, bytes]  # revision and value
T = TypeVar("T")


class SqliteDatastore:
    """A ``Datastore`` in one SQLite file, opened by the first operation.

    ``path``: the file, made when it is missing; its directory must exist.
    ``synchronous``: ``normal``, or ``full`` for commits that survive a power loss.
    ``history``: how many changes are kept for watches.
    Every operation may raise UnavailableError, which names the file and a remedy.
    """

    prompt = True  # a watch reads what is committed

    def __init__(
        self, path: Path | str, *, synchronous: str = "normal", history: int = HISTORY
    ) -> None:
        self._file = SqliteFile(Path(path), synchronous)
        self._history = history
        self._watches: weakref.WeakSet[SqliteWatch] = weakref.WeakSet()
        self._watches_lock = threading.Lock()

    @property
    def given(self) -> frozenset[str]:
        """None: all objects are made by those who use the store."""
        return frozenset()

    def get(self, key: Key) -> Entry:
        """The object. Raises NotFoundError."""
        rows = self._file.rows(_SELECT, (key.kind, key.namespace, key.name))
        return _entry(key, _existing(key, rows[0] if rows else None))

    def get_all(self, keys: Sequence[Key]) -> Sequence[Entry | StoreError]:
        """Objects of one moment; NotFoundError for one that is not there."""
        try:
            with self._file.snapshot() as connection:
                rows = [_row(connection, key) for key in keys]
        except StoreError as error:
            return [error] * len(keys)
        outcomes: list[Entry | StoreError] = []
        for key, row in zip(keys, rows, strict=True):
            try:
                outcomes.append(_entry(key, _existing(key, row)))
            except NotFoundError as error:
                outcomes.append(error)
        return outcomes

    def list(self, kind: str, namespace: str | None = None, prefix: str = "") -> Listing:
        """The objects of a kind, sorted by key, in one namespace or (None) in all.

        ``prefix``: only those whose names begin with it.
        """
        where, values = "kind = ?", [kind]
        if namespace is not None:
            where, values = f"{where} AND namespace = ?", [*values, namespace]
        if prefix:
            # A range of the index; the highest character of all comes after every name.
            where, values = f"{where} AND name >= ? AND name < ?", [*values, prefix, prefix + _LAST]
        with self._file.snapshot() as connection:
            (revision,) = connection.execute("SELECT max(revision) FROM changes").fetchone()
            rows = connection.execute(
                f"SELECT namespace, name, revision, value FROM objects WHERE {where}"
                " ORDER BY name, namespace",
                values,
            ).fetchall()
        entries = [
            _entry(Key(kind, name, space), (number, value)) for space, name, number, value in rows
        ]
        return Listing(entries, str(revision or 0))

    def create(self, key: Key, value: JSON) -> Entry:
        """Store a new object. Raises AlreadyExistsError."""
        data = _encoded(key, value)

        def insert(connection: sqlite3.Connection, revision: int) -> int:
            _insert(connection, key, data, revision)
            return revision

        return Entry(key, value, str(self._change(key, data, insert)))

    def create_all(self, objects: Sequence[tuple[Key, JSON]]) -> Sequence[Entry | StoreError]:
        """Store new objects in one transaction; an AlreadyExistsError for each that is there."""
        rows = [(key, value, _encoded(key, value)) for key, value in objects]

        def insert(connection: sqlite3.Connection) -> tuple[list[Entry | StoreError], list[int]]:
            outcomes: list[Entry | StoreError] = []
            numbers = []
            for key, value, data in rows:
                revision = _log(connection, key, data)
                try:
                    _insert(connection, key, data, revision)
                except AlreadyExistsError as error:
                    connection.execute(_UNLOG, (revision,))
                    outcomes.append(error)
                else:
                    outcomes.append(Entry(key, value, str(revision)))
                    numbers.append(revision)
                    self._compact_if_due(connection, revision)
            return outcomes, numbers

        try:
            outcomes, numbers = self._file.write(insert)
        except StoreError as error:
            return [error] * len(rows)
        self._checkpoint_if_due(numbers)
        return outcomes

    def update_with(
        self, key: Key, value: JSON, revision: str, objects: Sequence[tuple[Key, JSON]]
    ) -> tuple[Entry, Sequence[Entry]]:
        """Replace an object at ``revision`` and store new ones, in one transaction.

        Raises NotFoundError, ConflictError, AlreadyExistsError; then nothing has changed.
        """
        rows = [(new, value_, _encoded(new, value_)) for new, value_ in objects]
        data = _encoded(key, value)

        def change(connection: sqlite3.Connection) -> list[int]:
            numbers = []
            for new, _, data_ in rows:
                numbers.append(_log(connection, new, data_))
                _insert(connection, new, data_, numbers[-1])
            numbers.append(_log(connection, key, data))
            _replace(connection, key, data, numbers[-1], revision)
            for number in numbers:
                self._compact_if_due(connection, number)
            return numbers

        numbers = self._file.write(change)
        self._checkpoint_if_due(numbers)
        entries = [
            Entry(new, value_, str(number))
            for (new, value_, _), number in zip(rows, numbers, strict=False)
        ]
        return Entry(key, value, str(numbers[-1])), entries

    def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
        """Replace an object, only at ``revision`` when one is given.

        Raises NotFoundError, ConflictError.
        """
        data = _encoded(key, value)

        def replace(connection: sqlite3.Connection, new: int) -> int:
            _replace(connection, key, data, new, revision)
            return new

        return Entry(key, value, str(self._change(key, data, replace)))

    def delete(self, key: Key, revision: str | None = None) -> Entry:
        """Delete an object, only at ``revision`` when one is given; returns what it was.

        Raises NotFoundError, ConflictError.
        """

        def remove(connection: sqlite3.Connection, _: int) -> Row:
            row = _unchanged(key, _row(connection, key), revision)
            connection.execute(_DELETE, (key.kind, key.namespace, key.name))
            return row

        return _entry(key, self._change(key, None, remove))

    def watch(self, kinds: Iterable[str], revision: str | Mapping[str, str]) -> SqliteWatch:
        """Every change of these kinds after ``revision``, which a ``list`` or event gave."""
        watch = SqliteWatch(self._file, kinds, revision)
        with self._watches_lock:
            self._watches.add(watch)
        return watch

    def close(self) -> None:
        """End all watches and let go of the file."""
        with self._watches_lock:
            watches = list(self._watches)
        for watch in watches:
            watch.close()
        self._file.close()

    def _change(
        self, key: Key, data: bytes | None, do: Callable[[sqlite3.Connection, int], T]
    ) -> T:
        """In a transaction, ``do`` sets an object (``data``) or deletes it (None).

        It is given the revision of the change; when it raises, nothing has changed.
        """

        def change(connection: sqlite3.Connection) -> tuple[T, int]:
            revision = _log(connection, key, data)
            result = do(connection, revision)
            self._compact_if_due(connection, revision)
            return result, revision

        result, revision = self._file.write(change)
        self._checkpoint_if_due((revision,))
        return result

    def _checkpoint_if_due(self, revisions: Sequence[int]) -> None:
        """After changes that have these."""
        if any(revision % _CHECKPOINT_EVERY == 0 for revision in revisions):
            self._file.checkpoint()

    def _compact_if_due(self, connection: sqlite3.Connection, revision: int) -> None:
        """Forget the oldest changes: always from the front, so that no gap can arise."""
        if revision % _COMPACT_EVERY:
            return
        (first_young,) = connection.execute(
            "SELECT revision FROM changes WHERE time >= ? ORDER BY revision LIMIT 1",
            (int(time.time()) - HISTORY_SECONDS,),
        ).fetchone() or (revision,)
        connection.execute(
            "DELETE FROM changes WHERE revision < ?",
            (min(revision, max(first_young, revision - self._history + 1)),),
        )


def _log(connection: sqlite3.Connection, key: Key, data: bytes | None) -> int:
    """The revision of a change that is about to be made."""
    row = (int(time.time()), key.kind, key.namespace, key.name, data)
    revision = connection.execute(_LOG, row).lastrowid
    assert revision is not None
    return revision


def _insert(connection: sqlite3.Connection, key: Key, data: bytes, revision: int) -> None:
    try:
        connection.execute(_INSERT, (key.kind, key.namespace, key.name, revision, data))
    except sqlite3.IntegrityError:
        raise AlreadyExistsError(f"{key}: exists already", key) from None


def _replace(
    connection: sqlite3.Connection, key: Key, data: bytes, new: int, revision: str | None
) -> None:
    statement = _UPDATE if revision is None else f"{_UPDATE} AND revision = ?"
    values = [new, data, key.kind, key.namespace, key.name]
    if revision is not None:
        values.append(revision)
    if not connection.execute(statement, values).rowcount:
        _unchanged(key, _row(connection, key), revision)


def _encoded(key: Key, value: JSON) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise StoreError(f"{key}: can't be written as JSON: {error}", key) from error


def _row(connection: sqlite3.Connection, key: Key) -> Row | None:
    row: Row | None = connection.execute(_SELECT, (key.kind, key.namespace, key.name)).fetchone()
    return row


def _existing(key: Key, row: Row | None) -> Row:
    if row is None:
        raise NotFoundError(f"{key}: does not exist", key)
    return row


def _unchanged(key: Key, row: Row | None, revision: str | None) -> Row:
    found, value = _existing(key, row)
    if revision is not None and revision != str(found):
        raise ConflictError(
            f"{key}: is at revision {found}, not {revision}; read it again and retry", key
        )
    return found, value


def _entry(key: Key, row: Row) -> Entry:
    revision, value = row
    return Entry(key, read(key, str(key), value), str(revision))
