"""``manxctl label``: labels of one resource."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import click

from api.errors import InvalidObjectError
from api.kinds import Kind
from api.registry import parse_stored
from datastore.interface import ConflictError, Datastore, Key
from manxctl.documents import DEFAULT_NAMESPACE
from manxctl.options import kind_named, moving, namespace_option, open_store, warn
from manxctl.writing import ATTEMPTS


@click.command("label")
@click.argument("kind", callback=kind_named)
@click.argument("name")
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE|KEY-...")
@namespace_option
@click.option("--overwrite", is_flag=True, help="Change labels that have another value.")
@click.option("--remove", is_flag=True, help="Remove the labels KEY....")
def command(
    kind: Kind,
    name: str,
    changes: tuple[str, ...],
    namespace: str | None,
    overwrite: bool,
    remove: bool,
) -> None:
    """Set (KEY=VALUE) or remove (KEY-) labels of a resource."""
    key = Key(kind.id, name, (namespace or DEFAULT_NAMESPACE) if kind.namespaced else "")
    wanted = dict(_change(text, remove) for text in changes)
    with open_store() as store:
        for doubt in moving(store):
            warn(doubt)
        _label(store, key, wanted, overwrite)
    click.echo(f"{kind.kind} {name} labelled")


def _change(text: str, remove: bool) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    if remove:
        if equals:
            raise click.UsageError(f"{text!r}: expected KEY alone with --remove")
        return key.removesuffix("-"), None
    if equals:
        return key, value
    if key.endswith("-"):
        return key[:-1], None
    raise click.UsageError(f"{text!r}: expected KEY=VALUE, or KEY- to remove a label")


def _label(store: Datastore, key: Key, wanted: dict[str, str | None], overwrite: bool) -> None:
    for _ in range(ATTEMPTS):
        entry = store.get(key)
        metadata: dict[str, Any] = entry.value.setdefault("metadata", {})
        labels: dict[str, str] = metadata.setdefault("labels", {})
        for label, value in wanted.items():
            if value is None:
                labels.pop(label, None)
            elif labels.get(label, value) != value and not overwrite:
                raise click.ClickException(
                    f"label {label} is {labels[label]!r} already; --overwrite changes it"
                )
            else:
                labels[label] = value
        try:
            parse_stored(key.kind, entry.value)
        except InvalidObjectError as error:
            raise click.ClickException(str(error)) from error
        with suppress(ConflictError):
            store.update(key, entry.value, entry.revision)
            return
    raise click.ClickException(f"{key} was changed by others {ATTEMPTS} times; try again")
