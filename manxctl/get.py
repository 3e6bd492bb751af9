"""``manxctl get``: resources as a table, YAML or JSON."""

from __future__ import annotations

from typing import Any

import click

from api.kinds import Kind
from datastore.interface import JSON, Datastore, Entry, Key, NotFoundError
from manxctl import table
from manxctl.columns import columns
from manxctl.documents import DEFAULT_NAMESPACE, title
from manxctl.options import kind_named, open_store

OUTPUTS = ("table", "wide", "yaml", "json", "name")


@click.command("get")
@click.argument("kind", callback=kind_named)
@click.argument("names", nargs=-1)
@click.option(
    "-n", "--namespace", metavar="NAMESPACE", help="Of which namespace (default: default)."
)
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@click.option(
    "-o", "--output", type=click.Choice(OUTPUTS), default="table", show_default=True, help="How."
)
def command(
    kind: Kind, names: tuple[str, ...], namespace: str | None, all_namespaces: bool, output: str
) -> None:
    """Show the resources of a KIND, or those with the given NAMES.

    KIND is a plural, a singular or a short name in any case: ippools, IPPool, pool. The
    YAML and JSON are what apply takes.
    """
    if all_namespaces and (names or namespace):
        raise click.UsageError("-A shows all namespaces: give neither NAMES nor -n with it")
    space = None if all_namespaces else (namespace or DEFAULT_NAMESPACE)
    with open_store() as store:
        entries, revision, missing = _entries(store, kind, names, space)
    if output in ("table", "wide"):
        if entries or not missing:
            _table(kind, entries, wide=output == "wide", namespaces=all_namespaces)
    elif output == "name":
        for entry in entries:
            click.echo(f"{kind.id.lower()}/{entry.key.name}")
    else:
        values = [_with_revision(entry) for entry in entries]
        if len(names) == 1 and values:
            _dump(values[0], output)
        elif not missing or values:
            _dump(_list(kind, values, revision), output)
    for key in missing:
        click.echo(f"Error: {title(key)}: does not exist", err=True)
    if missing:
        raise SystemExit(1)


def _entries(
    store: Datastore, kind: Kind, names: tuple[str, ...], namespace: str | None
) -> tuple[list[Entry], str | None, list[Key]]:
    """What was found, the revision of a whole list, and what is missing."""
    if not names:
        listing = store.list(kind.id, namespace if kind.namespaced else None)
        return listing.entries, listing.revision, []
    entries, missing = [], []
    for name in dict.fromkeys(names):
        key = Key(kind.id, name, (namespace or "") if kind.namespaced else "")
        try:
            entries.append(store.get(key))
        except NotFoundError:
            missing.append(key)
    return entries, None, missing


def _table(kind: Kind, entries: list[Entry], *, wide: bool, namespaces: bool) -> None:
    chosen = columns(kind, wide=wide, namespace=namespaces)
    rows = [[column.cell(entry.value) for column in chosen] for entry in entries]
    click.echo(table.render([column.title for column in chosen], rows))


def _with_revision(entry: Entry) -> JSON:
    metadata = entry.value.get("metadata") or {}
    return entry.value | {"metadata": metadata | {"resourceVersion": entry.revision}}


def _list(kind: Kind, values: list[JSON], revision: str | None) -> JSON:
    return {
        "apiVersion": kind.api_version,
        "kind": f"{kind.kind}List",
        "metadata": {"resourceVersion": revision} if revision is not None else {},
        "items": values,
    }


def _dump(value: Any, output: str) -> None:
    if output == "json":
        import json

        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
        return
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text = yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=100)
    click.echo(text, nl=False)
