"""``manxctl validate``: is it right? Needs no datastore."""

from __future__ import annotations

import click

from manxctl.documents import DocumentsError, check
from manxctl.options import file_options, read_or_fail
from manxctl.overlaps import overlaps


@click.command("validate")
@file_options()
def command(
    filenames: tuple[str, ...], recursive: bool, skip_empty: bool, namespace: str | None
) -> None:
    """Check the resources in files, without a datastore.

    Says everything that is wrong, with file, document, object, field, value and what would
    be right.
    """
    found = read_or_fail(filenames, namespace, recursive, skip_empty)
    complaints = list(overlaps(found, check(found)))
    if complaints:
        raise DocumentsError(complaints)
    click.echo(f"{len(found)} {'resource' if len(found) == 1 else 'resources'}, all valid")
