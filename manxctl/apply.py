"""``manxctl apply``: create what is absent, update what is there."""

from __future__ import annotations

import click

from api.metadata import Resource
from datastore.interface import AlreadyExistsError, Datastore, Entry, NotFoundError
from manxctl import writing
from manxctl.documents import Document, DocumentsError
from manxctl.options import file_options, open_store, read_or_fail, warn


@click.command("apply")
@file_options()
def command(
    filenames: tuple[str, ...], recursive: bool, skip_empty: bool, namespace: str | None
) -> None:
    """Create or update the resources in files.

    Everything is checked before anything is written.
    """
    found = read_or_fail(filenames, namespace, recursive, skip_empty)
    with open_store() as store:
        writing.write_all(store, found, _objection, _apply, click.echo, warn)


def _objection(document: Document, resource: Resource, stored: Entry | None) -> str | None:
    # What is absent is created, from whichever cluster the document and its version come.
    return writing.stale(resource, stored) if stored is not None else None


def _apply(store: Datastore, document: Document, resource: Resource) -> str:
    for _ in range(writing.ATTEMPTS):
        try:
            return writing.update(store, document, resource)
        except NotFoundError:
            pass
        try:
            return writing.create(store, document, resource)
        except DocumentsError as error:
            if not isinstance(error.__cause__, AlreadyExistsError):
                raise
    raise DocumentsError([document.complain("made and deleted by others again and again")])
