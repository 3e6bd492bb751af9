"""A watch on the SQLite store: the change log, read whenever inotify says there is news."""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from inotify_simple import INotify, flags

from datastore.interface import Entry, Event, Key, RevisionGoneError, StoreError, UnavailableError
from datastore.sqlite_file import SqliteFile
from datastore.unreadable import read

_BATCH = 1000  # most events handed out at once
_RECHECK_SECONDS = 1.0  # for a writer killed between its commit and the news of it
_RECHECK_WITHOUT_INOTIFY = 0.1

Row = tuple[int, str, str, str, bytes | None]  # revision, kind, namespace, name, value

_log = logging.getLogger(__name__)


class SqliteWatch:
    """See ``datastore.interface.Watch``."""

    def __init__(
        self, file: SqliteFile, kinds: Iterable[str], revision: str | Mapping[str, str]
    ) -> None:
        self._file = file
        if isinstance(revision, str):
            self._after = {kind: _number(revision) for kind in kinds}
        else:
            self._after = {kind: _number(revision[kind]) for kind in kinds}
        self._position = min(self._after.values(), default=0)
        self._select = (
            "SELECT revision, kind, namespace, name, value FROM changes WHERE revision >= ?1"
            f" AND (revision = ?1 OR kind IN ({','.join('?' * len(self._after))})"
            " OR revision = (SELECT max(revision) FROM changes))"
            f" ORDER BY revision LIMIT {_BATCH}"
        )
        self._turn = threading.Lock()  # held while ``next`` runs
        self._closed = False
        self._error: StoreError | None = None
        with file.reading():  # the file must exist for inotify
            pass
        self._news = _FileNews(file.path)

    def next(self, timeout: float | None = None) -> Sequence[Event]:
        """Wait for changes, at most ``timeout`` seconds (None: for ever), in commit order.

        Returns all that are ready (at most 1000), or an empty sequence at the timeout or
        after ``close``. Raises RevisionGoneError or UnavailableError; the watch is then over
        and goes on raising it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._turn:
            if self._error is not None:
                raise self._error
            try:
                while not self._closed:
                    if timeout != 0:  # else nobody waits for news
                        self._news.forget()
                    events = self._read()
                    if events:
                        return events
                    wait = self._news.recheck_seconds
                    if deadline is not None:
                        wait = min(wait, deadline - time.monotonic())
                        if wait <= 0:
                            break
                    self._news.wait(wait)
            except StoreError as error:
                self._error = error
                raise
        return ()

    def close(self) -> None:
        """End the watch and wake whoever waits in ``next``."""
        self._closed = True
        self._news.interrupt()
        with self._turn:
            self._news.close()

    def __enter__(self) -> SqliteWatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self) -> list[Event]:
        while True:
            rows, more = self._rows()
            events = [
                _event(Key(kind, name, namespace), value, str(revision))
                for revision, kind, namespace, name, value in rows
                if revision > self._after[kind]
            ]
            if events or not more:
                return events

    def _rows(self) -> tuple[list[Row], bool]:
        """The next changes of our kinds, which the position then is behind; whether more follow."""
        # In one statement, so at one moment: what was seen last, which shows that nothing is
        # missing since; the news; and what was written last, to go on from there.
        rows = self._file.rows(self._select, (self._position, *self._after))
        if not rows or rows[0][0] != self._position:
            self._check_history(bool(rows))
        seen = self._position
        if rows:
            self._position = rows[-1][0]
        news = [row for row in rows if row[0] > seen and row[1] in self._after]
        return news, len(rows) == _BATCH

    def _check_history(self, news: bool) -> None:
        """There must be all changes after the position. ``news``: whether there are any."""
        [(first, last)] = self._file.rows("SELECT min(revision), max(revision) FROM changes")
        # The last change is never forgotten, the first may be: since a moment ago, too.
        if (first or 1) - 1 <= self._position and (news or not self._position):
            return
        raise RevisionGoneError(
            f"datastore {self._file.path}: has the changes {first} to {last}, not all after"
            f" {self._position}; list again and watch from there"
        )


def _number(revision: str) -> int:
    try:
        return int(revision)
    except ValueError as error:
        raise RevisionGoneError(
            f"{revision!r} is no revision of an SQLite datastore; list again and watch from there"
        ) from error


def _event(key: Key, value: bytes | None, revision: str) -> Event:
    entry = None if value is None else Entry(key, read(key, str(key), value), revision)
    return Event(key, entry, revision)


class _FileNews:
    """Wakes a thread when somebody touched (committed to), removed or replaced a file."""

    def __init__(self, path: Path) -> None:
        self.recheck_seconds = _RECHECK_SECONDS
        self._lock = threading.Lock()
        self._interruption: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._inotify: INotify | None = None
        self._poll = select.poll()
        self._poll.register(self._interruption, select.POLLIN)
        try:
            self._inotify = INotify(nonblocking=True)
            self._inotify.add_watch(path, flags.ATTRIB | flags.DELETE_SELF | flags.MOVE_SELF)
            self._poll.register(self._inotify.fileno(), select.POLLIN)
        except OSError as error:
            if self._inotify is None and error.errno == errno.EMFILE:
                self.recheck_seconds = _RECHECK_WITHOUT_INOTIFY
                _log.warning(
                    "no inotify instance left, looking for changes every %.0f ms instead;"
                    " raise the limit: sysctl fs.inotify.max_user_instances=1024",
                    1000 * _RECHECK_WITHOUT_INOTIFY,
                )
                return
            self.close()
            raise UnavailableError(f"datastore {path}: inotify: {error.strerror}") from error

    def wait(self, seconds: float) -> None:
        """Until there is news, or an interruption, or the time is over."""
        self._poll.poll(max(1, round(seconds * 1000)))

    def forget(self) -> None:
        """Forget the news so far: whoever looks at the file after this has missed nothing."""
        if self._inotify is not None:
            self._inotify.read(timeout=0)

    def interrupt(self) -> None:
        """Wake the thread in ``wait``, and every later one."""
        with self._lock:
            if self._interruption is not None:
                os.eventfd_write(self._interruption, 1)

    def close(self) -> None:
        """Close the descriptors. Nobody may be in ``wait``."""
        with self._lock:
            if self._interruption is not None:
                os.close(self._interruption)
                self._interruption = None
            if self._inotify is not None:
                self._inotify.close()
                self._inotify = None
