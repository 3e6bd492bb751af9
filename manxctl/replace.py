"""``manxctl replace``: resources that are there."""

from __future__ import annotations

import click

from api.metadata import Resource
from datastore.interface import Entry
from manxctl import writing
from manxctl.documents import Document
from manxctl.options import file_options, open_store, read_or_fail, warn


@click.command("replace")
@file_options()
def command(
    filenames: tuple[str, ...], recursive: bool, skip_empty: bool, namespace: str | None
) -> None:
    """Replace the resources in files, which must exist.

    Everything is checked before anything is written.
    """
    found = read_or_fail(filenames, namespace, recursive, skip_empty)
    with open_store() as store:
        writing.write_all(store, found, _objection, writing.update, click.echo, warn)


def _objection(document: Document, resource: Resource, stored: Entry | None) -> str | None:
    return "does not exist" if stored is None else writing.stale(resource, stored)
