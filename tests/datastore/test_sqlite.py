"""The SQLite store beyond the contract: crashes, sharing, and what is wrong with a file."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from datastore import sqlite, sqlite_file, sqlite_watch
from datastore.interface import (
    JSON,
    AlreadyExistsError,
    Key,
    RevisionGoneError,
    UnavailableError,
    Watch,
)
from datastore.sqlite import SqliteDatastore
from tests.datastore.programs import (
    count_for_ever,
    elsewhere,
    hold_write_lock,
    numbered,
    pool_key,
    start,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "datastore.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteDatastore]:
    store = SqliteDatastore(path)
    yield store
    store.close()


def raw(path: Path, *statements: str) -> None:
    """What somebody else does to the file, without telling watchers."""
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def numbers(watch: Watch, last: int) -> list[int]:
    """The numbers of the watched object, until ``last`` comes."""
    found: list[int] = []
    while last not in found:
        events = watch.next(timeout=30)
        assert events, f"{last} did not come after {found}"
        found.extend(event.entry.value["number"] for event in events if event.entry)
    return found


# --- crashes ---


def test_killed_writers_leave_a_consistent_store(path: Path, store: SqliteDatastore) -> None:
    names = ["a", "b", "c"]
    for name in names:
        store.create(pool_key(name), numbered(0))
    told: dict[str, list[int]] = {name: [] for name in names}

    def take(watch: Watch) -> None:
        for event in watch.next(timeout=30):
            assert event.entry is not None
            told[event.key.name].append(event.entry.value["number"])

    with store.watch(["IPPool"], store.list("IPPool").revision) as watch:
        for round_ in range(4):
            writers = {name: start(count_for_ever, path, name) for name in names}
            committed = {name: last_said(said) for name, (_, said) in writers.items()}
            for _ in range(7 + 30 * round_):
                take(watch)
                for name, (_, said) in writers.items():
                    committed[name] = last_said(said, committed[name])
            for process, _ in writers.values():
                process.kill()
            for name, (process, said) in writers.items():
                process.join()
                committed[name] = last_said(said, committed[name])
                found = store.get(pool_key(name)).value
                assert found == numbered(found["number"])
                assert found["number"] - committed[name] in (0, 1)
        for name in names:
            store.update(pool_key(name), numbered(-1))
        while any(-1 not in numbers for numbers in told.values()):
            take(watch)
    for numbers in told.values():
        assert numbers == [*range(1, len(numbers)), -1]
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def last_said(said: Connection, before: int | None = None) -> int:
    """The last number that a process said; waits for the first if there was none before."""
    while before is None or said.poll():
        try:
            before = int(said.recv_bytes())
        except EOFError:
            break
    assert before is not None
    return before


def test_watch_hears_of_a_commit_whose_writer_died_before_telling(
    path: Path, store: SqliteDatastore
) -> None:
    store.create(pool_key("a"), numbered(0))
    with store.watch(["IPPool"], store.list("IPPool").revision) as watch:
        assert not watch.next(timeout=0)
        raw(
            path,
            "INSERT INTO changes (time, kind, namespace, name, value)"
            """ VALUES (0, 'IPPool', '', 'a', '{"number": 1}')""",
        )
        assert numbers(watch, 1) == [1]


def test_file_of_a_creator_killed_at_once_is_used(path: Path, store: SqliteDatastore) -> None:
    path.touch()
    assert store.list("IPPool").entries == []
    store.create(pool_key("a"), numbered(0))


@pytest.mark.parametrize("how", ["VACUUM INTO ?", "backup"])
def test_a_copy_made_while_all_runs_can_be_used(
    path: Path, store: SqliteDatastore, how: str, tmp_path: Path
) -> None:
    store.create(pool_key("a"), numbered(1))
    source = sqlite3.connect(path)
    if how == "backup":
        target = sqlite3.connect(tmp_path / "copy.db")
        source.backup(target)
        target.close()
    else:
        source.execute(how, [str(tmp_path / "copy.db")])
    source.close()
    copy = SqliteDatastore(tmp_path / "copy.db")
    assert copy.list("IPPool") == store.list("IPPool")
    assert copy.update(pool_key("a"), numbered(2)).revision == "2"
    copy.close()


# --- sharing ---


def test_processes_in_other_namespaces_share_the_store(
    path: Path, store: SqliteDatastore, tmp_path: Path
) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    store.create(pool_key("a"), numbered(0))
    program = f"""
from datastore.sqlite import SqliteDatastore
from tests.datastore.programs import numbered, pool_key
store = SqliteDatastore({str(mounted / path.name)!r})
for number in range(1, 6):
    assert store.get(pool_key("a")).value == numbered(number - 1)
    store.update(pool_key("a"), numbered(number))
watch = store.watch(["IPPool"], store.list("IPPool").revision)
print("watching", flush=True)
[event] = watch.next(timeout=30)
print(event.entry.value["number"], flush=True)
watch.close()
store.close()
"""
    bind_mount = f'mount --bind "{path.parent}" "{mounted}"'
    with store.watch(["IPPool"], store.list("IPPool").revision) as watch:
        with elsewhere(bind_mount, program, "--net", "--pid", "--fork") as process:
            assert process.stdout is not None
            assert numbers(watch, 5) == [1, 2, 3, 4, 5]
            assert process.stdout.readline() == "watching\n"
            store.update(pool_key("a"), numbered(6))
            assert process.stdout.read() == "6\n"
        assert process.returncode == 0
    assert list(mounted.iterdir()) == []


def test_reads_do_not_wait_for_a_writer(path: Path, store: SqliteDatastore) -> None:
    store.create(pool_key("a"), numbered(1))
    process, said = start(hold_write_lock, path)
    assert said.recv_bytes() == b"locked"
    assert store.get(pool_key("a")).value == numbered(1)
    with store.watch(["IPPool"], "0") as watch:
        assert numbers(watch, 1) == [1]
    said.send_bytes(b"go")
    process.join()


def test_writers_wait_for_a_slow_one(path: Path, store: SqliteDatastore) -> None:
    store.create(pool_key("a"), numbered(1))
    process, said = start(hold_write_lock, path)
    assert said.recv_bytes() == b"locked"
    waiting = [
        threading.Thread(target=store.update, args=(pool_key("a"), numbered(number)))
        for number in (2, 3)
    ]
    for thread in waiting:
        thread.start()
    assert store.get(pool_key("a")).value == numbered(1)
    said.send_bytes(b"go")
    for thread in waiting:
        thread.join(30)
    assert store.get(pool_key("a")).value["number"] in (2, 3)
    process.join()


def test_writer_that_never_lets_go_is_named_in_the_end(
    path: Path, store: SqliteDatastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_LOCK_SECONDS", 0.2)
    store.create(pool_key("a"), numbered(1))
    process, said = start(hold_write_lock, path)
    assert said.recv_bytes() == b"locked"
    with pytest.raises(UnavailableError, match=r"write lock.*fuser"):
        store.update(pool_key("a"), numbered(2))
    assert store.get(pool_key("a")).value == numbered(1)
    process.kill()
    process.join()
    store.update(pool_key("a"), numbered(2))


def test_first_opens_at_once_make_one_store(path: Path) -> None:
    stores = [SqliteDatastore(path) for _ in range(8)]
    threads = [
        threading.Thread(target=store.create, args=(pool_key(f"p{number}"), numbered(number)))
        for number, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(stores[0].list("IPPool").entries) == 8
    for store in stores:
        store.close()


def test_file_is_for_its_owner_alone(path: Path, store: SqliteDatastore) -> None:
    store.create(pool_key("a"), numbered(1))
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


# --- history ---


def test_old_changes_are_forgotten(
    path: Path, monkeypatch: pytest.MonkeyPatch, store: SqliteDatastore
) -> None:
    entry = store.create(pool_key("a"), numbered(0))
    monkeypatch.setattr(sqlite, "HISTORY_SECONDS", -1)  # all is too old at once
    for number in range(1, 250):
        store.update(entry.key, numbered(number))
    with store.watch(["IPPool"], entry.revision) as watch, pytest.raises(RevisionGoneError):
        watch.next(timeout=0)
    latest = store.list("IPPool")
    assert latest.revision == "250"
    assert latest.entries[0].value["number"] == 249
    assert store.update(entry.key, numbered(250)).revision == "251"


def test_changes_that_were_listed_do_not_hold_up_later_ones(store: SqliteDatastore) -> None:
    """A watch that must pass over more of them than it reads at once does not wait."""
    first = store.list("Node").revision
    store.create(pool_key("a"), {})
    for _ in range(2 * sqlite_watch._BATCH):
        store.update(pool_key("a"), {})
    positions = {"Node": first, "IPPool": store.list("IPPool").revision}
    store.update(pool_key("a"), numbered(1))
    with store.watch(["Node", "IPPool"], positions) as watch:
        [event] = watch.next(timeout=0)
    assert event.entry == store.get(pool_key("a"))


def test_log_of_the_file_does_not_grow_for_ever(
    path: Path, store: SqliteDatastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_WAL_BYTES", 1 << 20)
    store.create(pool_key("a"), {})
    for _ in range(1000):
        store.update(pool_key("a"), {"padding": "x" * 10_000})
    wal = path.with_name("datastore.db-wal")
    assert wal.stat().st_size < 10 << 20  # 25 MB were written


def test_what_was_there_already_moves_nothing_to_the_file(
    path: Path, store: SqliteDatastore
) -> None:
    objects: list[tuple[Key, JSON]] = [(pool_key(name), {}) for name in "abcdefgh"]
    store.create_all(objects)
    with closing(SqliteDatastore(path)) as other:
        other.get(pool_key("a"))  # who is the last to close the file moves everything
        size = path.stat().st_size
        outcomes = store.create_all(objects)
        assert {type(outcome) for outcome in outcomes} == {AlreadyExistsError}
        for thread in threading.enumerate():
            if thread.name == "sqlite-checkpoint":
                thread.join()
        assert path.stat().st_size == size


@pytest.mark.parametrize("revision", ["", "x", "7.5", "1000"])
def test_revision_of_another_store_can_not_be_watched_from(
    store: SqliteDatastore, revision: str
) -> None:
    with pytest.raises(RevisionGoneError), store.watch(["IPPool"], revision) as watch:
        watch.next(timeout=0)


# --- what is wrong with a file ---


def damaged(path: Path) -> None:
    path.write_bytes(b"no database at all, but long enough to be read as one" * 100)


def half_written(path: Path) -> None:
    store = SqliteDatastore(path)
    for number in range(50):
        store.create(pool_key(f"p{number}"), numbered(number))
    store.close()
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)


def of_another_program(path: Path) -> None:
    raw(path, "CREATE TABLE objects (a, b)")


def of_another_version(path: Path) -> None:
    SqliteDatastore(path).list("IPPool")
    gc.collect()
    raw(path, "PRAGMA user_version = 99")


def directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damaged, "damaged.*restore a copy"),
        (half_written, "damaged.*restore a copy"),
        (of_another_program, "another program.*MANX_DATASTORE"),
        (of_another_version, "schema version 99.*knows 1"),
        (directory, "not a regular file"),
    ],
)
def test_file_that_can_not_be_used(
    path: Path, store: SqliteDatastore, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    for attempt in (
        lambda: store.list("IPPool"),
        lambda: store.create(pool_key("new"), numbered(1)),
        lambda: store.watch(["IPPool"], "0").next(timeout=0),
    ):
        with pytest.raises(UnavailableError, match=f"(?s){path}.*{said}"):
            attempt()
    assert before is None or path.read_bytes() == before


def test_missing_directory_is_named(tmp_path: Path) -> None:
    store = SqliteDatastore(tmp_path / "missing" / "datastore.db")
    with pytest.raises(UnavailableError, match=r"missing exists.*MANX_DATASTORE"):
        store.list("IPPool")
    (tmp_path / "missing").mkdir()
    assert store.list("IPPool").entries == []
    store.close()


def test_file_that_can_not_be_written(path: Path, tmp_path: Path) -> None:
    """Root writes to any file, so the file system is made read-only, in a mount namespace."""
    SqliteDatastore(path).list("IPPool")
    program = f"""
from datastore.interface import UnavailableError
from datastore.sqlite import SqliteDatastore
from tests.datastore.programs import numbered, pool_key
store = SqliteDatastore({str(path)!r})
try:
    store.create(pool_key("a"), numbered(1))
except UnavailableError as error:
    print(error)
"""
    gc.collect()
    read_only = f'mount --bind "{tmp_path}" "{tmp_path}" && mount -o remount,ro,bind "{tmp_path}"'
    with elsewhere(read_only, program) as process:
        answer, _ = process.communicate()
    assert process.returncode == 0
    assert str(path) in answer
    assert "read-only" in answer


def test_disk_that_is_full(path: Path, tmp_path: Path) -> None:
    program = f"""
from datastore.interface import UnavailableError
from datastore.sqlite import SqliteDatastore
from tests.datastore.programs import numbered, pool_key
store = SqliteDatastore({str(path)!r})
written = 0
try:
    while True:
        store.create(pool_key(f"p{{written}}"), numbered(8))
        written += 1
except UnavailableError as error:
    print(error)
assert len(store.list("IPPool").entries) == written > 0
for i in range(written):
    assert store.get(pool_key(f"p{{i}}")).value == numbered(8)
store.close()
"""
    small = f'mount -t tmpfs -o size=1m none "{tmp_path}"'
    with elsewhere(small, program) as process:
        answer, _ = process.communicate()
    assert process.returncode == 0
    assert "the disk is full; make room" in answer


@pytest.mark.parametrize("successor", [False, True])
def test_a_store_that_vanished_is_not_taken_for_an_empty_one(
    path: Path, store: SqliteDatastore, successor: bool
) -> None:
    store.create(pool_key("a"), numbered(1))
    watch = store.watch(["IPPool"], store.list("IPPool").revision)
    files = [path, path.with_name("datastore.db-wal"), path.with_name("datastore.db-shm")]
    for file in files:
        file.rename(file.with_suffix(file.suffix + ".away"))
    if successor:
        new = SqliteDatastore(path)
        new.create(pool_key("b"), numbered(2))
        new.close()
    said = "replaced" if successor else "removed"
    with pytest.raises(UnavailableError, match=f"{path}.*{said}.*restart"):
        store.get(pool_key("a"))
    with pytest.raises(UnavailableError, match=said):
        store.update(pool_key("a"), numbered(2))
    for _ in range(2):
        with pytest.raises(UnavailableError, match=said):
            watch.next()
    watch.close()
    for file in files:  # it comes back, and all goes on
        file.with_suffix(file.suffix + ".away").rename(file)
    assert store.get(pool_key("a")).value == numbered(1)
    assert store.update(pool_key("a"), numbered(2)).value == numbered(2)


# --- resources ---


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_gives_everything_back(path: Path) -> None:
    gc.collect()
    before = open_files()
    store = SqliteDatastore(path)
    store.create(pool_key("a"), numbered(1))
    watches = [store.watch(["IPPool"], store.list("IPPool").revision) for _ in range(10)]
    readers = [threading.Thread(target=store.get, args=(pool_key("a"),)) for _ in range(20)]
    waiters = [threading.Thread(target=watch.next) for watch in watches[:5]]
    for thread in readers + waiters:
        thread.start()
    assert open_files() > before
    watches[9].close()
    store.close()
    for thread in readers + waiters:
        thread.join(30)
        assert not thread.is_alive()
    assert open_files() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # the log is folded in


def test_a_failed_watch_gives_its_files_back(path: Path, store: SqliteDatastore) -> None:
    store.list("IPPool")
    path.with_name("datastore.db-wal").unlink()
    before = open_files()
    path.rename(path.with_suffix(".away"))
    with pytest.raises(UnavailableError):
        store.watch(["IPPool"], "0")
    assert open_files() == before


def test_without_inotify_a_watch_looks_often(
    store: SqliteDatastore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def exhausted(**_: bool) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(sqlite_watch, "INotify", exhausted)
    with (
        caplog.at_level(logging.WARNING),
        store.watch(["IPPool"], store.list("IPPool").revision) as watch,
    ):
        thread = threading.Timer(0.05, store.create, (pool_key("a"), numbered(1)))
        thread.start()
        assert numbers(watch, 1) == [1]
        thread.join()
    assert "fs.inotify.max_user_instances" in caplog.text


def test_an_idle_watch_sleeps(store: SqliteDatastore, monkeypatch: pytest.MonkeyPatch) -> None:
    """No polling: it looks when it is asked, once a second, and when the time is over."""
    looks = []
    look = sqlite_watch.SqliteWatch._rows

    def counted(self: sqlite_watch.SqliteWatch) -> Any:
        looks.append(self)
        return look(self)

    monkeypatch.setattr(sqlite_watch.SqliteWatch, "_rows", counted)
    with store.watch(["IPPool"], store.list("IPPool").revision) as watch:
        assert not watch.next(timeout=1.2)
    assert len(looks) <= 3


def test_full_synchronous_store_works(path: Path) -> None:
    store = SqliteDatastore(path, synchronous="full")
    store.create(pool_key("a"), numbered(1))
    assert store.get(pool_key("a")).value == numbered(1)
    store.close()
