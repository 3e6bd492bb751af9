"""``manxctl patch``: some fields of one resource."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from api.errors import InvalidObjectError
from api.kinds import Kind
from api.syntax import SyntaxProblemError, documents
from datastore.interface import Datastore, Entry, Key
from manxctl import writing
from manxctl.documents import DEFAULT_NAMESPACE, Document, check
from manxctl.doubts import doubts
from manxctl.options import kind_named, namespace_option, open_store, warn
from manxctl.outputs import dumped
from manxctl.patching import PATCHES, PatchError


@click.command("patch")
@click.argument("kind", callback=kind_named)
@click.argument("name")
@namespace_option
@click.option("-p", "--patch", "text", metavar="JSON|YAML", help="The patch.")
@click.option(
    "--patch-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its file."
)
@click.option(
    "-t", "--type", "sort", type=click.Choice(list(PATCHES)), default="strategic", show_default=True
)
@click.option("--dry-run", is_flag=True, help="Only check, and print what it would become.")
def command(
    kind: Kind,
    name: str,
    namespace: str | None,
    text: str | None,
    patch_file: Path | None,
    sort: str,
    dry_run: bool,
) -> None:
    """Change some fields of the resource NAME of a KIND; what others write meanwhile stays.

    strategic and merge: a mapping with the fields to change, null removes one. json: a list of
    operations (RFC 6902).
    """
    if (text is None) == (patch_file is None):
        raise click.UsageError("give either -p or --patch-file")
    source = text if text is not None else patch_file.read_text() if patch_file else ""
    patch = _parsed(source)
    if sort != "json" and not isinstance(patch, dict):
        raise click.UsageError(f"-t {sort}: expected a mapping; a list of operations is -t json")
    key = Key(kind.id, name, (namespace or DEFAULT_NAMESPACE) if kind.namespaced else "")
    with open_store() as store:
        try:
            outcome = _patch(store, key, sort, patch, dry_run)
        except PatchError as error:
            raise click.ClickException(f"{kind.kind} {name}: patch: {error}") from error
    if isinstance(outcome, dict):
        click.echo(dumped(outcome, "yaml"), nl=False)
    else:
        click.echo(f"{kind.kind} {name} {outcome}")


def _parsed(text: str) -> Any:
    try:
        found = [value for _, value in documents(text)]
    except SyntaxProblemError as error:
        raise click.UsageError(f"patch: {error}") from error
    if len(found) != 1:
        raise click.UsageError("patch: expected one document")
    return found[0]


def _patch(store: Datastore, key: Key, sort: str, patch: Any, dry_run: bool) -> Any:
    """Patch what is stored, again when another writer was faster. Returns the outcome."""
    for _ in range(writing.ATTEMPTS):
        entry = store.get(key)
        metadata = (entry.value.get("metadata") or {}) | {"resourceVersion": entry.revision}
        wanted = PATCHES[sort](entry.value | {"metadata": metadata}, patch)
        document = _document(key, wanted)
        if reason := writing.kept_by_kubernetes(store, document):
            raise click.ClickException(reason)
        (resource,) = check([document], limits=_keeps_to_limits(entry))
        if complaint := writing.stale(resource, entry):
            raise click.ClickException(document.complain(complaint))
        for doubt in doubts(store, [document], [resource]):
            warn(doubt)
        if dry_run:
            return wanted
        outcome = writing.swap(store, document, resource, entry, whole=True)
        if outcome is not None:
            return "unchanged" if outcome == writing.UNCHANGED else "patched"
    raise click.ClickException(f"{key} was changed by others {writing.ATTEMPTS} times; try again")


def _keeps_to_limits(entry: Entry) -> bool:
    """Whether the stored object could be written now; an older one stays as long as it is."""
    from api.registry import parse_as, parse_stored

    try:
        parse_as(entry.key.kind, entry.value)
    except InvalidObjectError:
        with suppress(InvalidObjectError):
            parse_stored(entry.key.kind, entry.value)
            return False
    return True


def _document(key: Key, value: Any) -> Document:
    from api.kinds import KINDS, key_parts

    if not isinstance(value, dict):
        raise PatchError("it leaves no object")
    try:
        there = Key(*(key_parts(value)[i] for i in (0, 2, 1)))
    except InvalidObjectError as error:
        raise PatchError(str(error)) from error
    if there != key:
        raise PatchError("kind, name and namespace of an object can't be changed")
    return Document("patch", KINDS[key.kind], key, value)
