"""``manxctl create``: resources that are not there yet."""

from __future__ import annotations

import click

from api.metadata import Resource
from datastore.interface import Datastore, Entry
from manxctl import writing
from manxctl.documents import Document
from manxctl.options import file_options, open_store, read_or_fail, warn


@click.command("create")
@file_options()
@click.option("--skip-exists", is_flag=True, help="Leave alone what exists already.")
def command(
    filenames: tuple[str, ...],
    recursive: bool,
    skip_empty: bool,
    namespace: str | None,
    skip_exists: bool,
) -> None:
    """Create the resources in files.

    Everything is checked before anything is written.
    """

    def objection(document: Document, resource: Resource, stored: Entry | None) -> str | None:
        if resource.metadata.resource_version is not None:
            return "metadata.resourceVersion: expected to be absent in a new object"
        return "exists already" if stored is not None and not skip_exists else None

    def create(store: Datastore, document: Document, resource: Resource) -> str:
        if skip_exists and writing.find(store, document) is not None:
            return writing.SKIPPED
        return writing.create(store, document, resource)

    found = read_or_fail(filenames, namespace, recursive, skip_empty)
    with open_store() as store:
        writing.write_all(store, found, objection, create, click.echo, warn)
