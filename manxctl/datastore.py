"""``manxctl datastore migrate``: lock, export, import, unlock."""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import click

from datastore import migrate as moving
from datastore.interface import Datastore
from manxctl.documents import title
from manxctl.options import open_store

_URL = click.option(
    "--datastore", "url", metavar="URL", help="Another datastore than that of MANX_DATASTORE."
)


@click.group("datastore")
def command() -> None:
    """Move the data to another datastore."""


@command.group("migrate")
def migrate() -> None:
    """Lock, export, import, unlock: in this order, from the old datastore to the new one."""


@migrate.command("lock")
@_URL
def lock(url: str | None) -> None:
    """Tell all agents to keep what is in force and to change nothing."""
    with _store(url) as store:
        moving.lock(store)
    click.echo("datastore locked")


@migrate.command("unlock")
@_URL
def unlock(url: str | None) -> None:
    """Let all agents go on."""
    with _store(url) as store:
        moving.unlock(store)
    click.echo("datastore unlocked")


@migrate.command("export")
@_URL
@click.option(
    "-f",
    "--filename",
    type=click.Path(dir_okay=False, allow_dash=True),
    default="-",
    help="File to write.",
)
def export(url: str | None, filename: str) -> None:
    """Write everything in the datastore, which must be locked, to a file (standard output).

    The passwords of BGP peers are in it, so only you may read the file.
    """
    with _store(url) as store:
        if not moving.is_locked(store):
            raise click.ClickException(
                "the datastore is not locked, so it may change meanwhile; run first:"
                " manxctl datastore migrate lock"
            )
        lines = moving.export(store)
        try:
            with _written(filename) as file:
                file.writelines(lines)
        except OSError as error:
            raise click.ClickException(f"{filename}: {error.strerror}") from error


@contextmanager
def _written(filename: str) -> Iterator[BinaryIO]:
    """A file that its owner alone may read, also where there was one that others could."""
    if filename == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with os.fdopen(os.open(filename, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # and no terminal, nor /dev/null
            os.fchmod(file.fileno(), 0o600)
            file.truncate()
        yield file


@migrate.command("import")
@_URL
@click.option(
    "-f", "--filename", type=click.File("rb"), required=True, help="File to read; - for stdin."
)
@click.option("--dry-run", is_flag=True, help="Write nothing; tell what would be done.")
def import_(url: str | None, filename: BinaryIO, dry_run: bool) -> None:
    """Bring an export into the datastore, which is locked first and stays so.

    What is there already is never overwritten: when it differs, it is reported, and the exit
    status is 1. After an interruption, run it again.
    """
    try:
        objects = moving.read(filename)
    except moving.FormatError as error:
        raise click.ClickException(f"{filename.name}: {error}") from error
    with _store(url) as store:
        results = moving.import_all(store, objects, dry_run=dry_run, tell=_tell)
    counts = Counter(result.outcome for result in results)
    summary = ", ".join(
        f"{counts[outcome]} {outcome}" for outcome in moving.Outcome if counts[outcome]
    )
    click.echo(f"{'would be: ' if dry_run else ''}{summary or 'nothing to import'}")
    if counts[moving.Outcome.CONFLICT] or counts[moving.Outcome.REFUSED]:
        sys.exit(1)
    if not dry_run:
        click.echo(
            "still locked; when the agents use this datastore: manxctl datastore migrate unlock"
        )


_WORTH_A_LINE = frozenset(
    (moving.Outcome.CONFLICT, moving.Outcome.REFUSED, moving.Outcome.LEFT_OUT)
)


def _tell(result: moving.Result) -> None:
    if result.outcome in _WORTH_A_LINE or result.reason:
        click.echo(f"{title(result.key)}: {result.outcome}: {result.reason}", err=True)


@contextmanager
def _store(url: str | None) -> Iterator[Datastore]:
    if url is None:
        with open_store() as store:
            yield store
        return
    from datastore.connect import connect

    try:
        store = connect(url)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    try:
        yield store
    finally:
        store.close()
