"""``manxctl get``: resources as a table, YAML or JSON, now or as they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import click

from api.kinds import Kind
from datastore.interface import JSON, Datastore, Entry, Key, NotFoundError
from manxctl.documents import DEFAULT_NAMESPACE, title
from manxctl.labelselector import label_filter
from manxctl.options import file_options, kind_named, open_store, read_or_fail
from manxctl.outputs import Output, dumped, exported, output_named
from manxctl.table import render
from manxctl.watching import watch

UNSTORED = ""  # the revision of what exists without being stored


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for of one kind. ``namespace`` None: all; no ``names``: all."""

    kind: Kind
    namespace: str | None
    names: tuple[str, ...]
    fits: Callable[[JSON], bool]

    def includes(self, key: Key, value: JSON) -> bool:
        """Whether an object of the kind is asked for."""
        here = not self.kind.namespaced or self.namespace in (None, key.namespace)
        return here and (not self.names or key.name in self.names) and self.fits(value)


@click.command("get")
@click.argument("kind", required=False, callback=kind_named)
@click.argument("names", nargs=-1)
@file_options(required=False)
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@click.option("-l", "--selector", metavar="SELECTOR", help="Only those whose labels fit.")
@click.option(
    "-o",
    "--output",
    default="table",
    show_default=True,
    callback=output_named,
    metavar="FORM",
    help="table (or ps), wide, yaml, json, name, custom-columns=NAME,CIDR or TITLE:.path.",
)
@click.option("--export", is_flag=True, help="Without what the cluster added.")
@click.option("-w", "--watch", "watching", is_flag=True, help="Go on, and show each change.")
def command(
    kind: Kind | None,
    names: tuple[str, ...],
    filenames: tuple[str, ...],
    recursive: bool,
    skip_empty: bool,
    namespace: str | None,
    all_namespaces: bool,
    selector: str | None,
    output: Output,
    export: bool,
    watching: bool,
) -> None:
    """Show the resources of a KIND, those with the given NAMES, or those that stand in files.

    KIND is a plural, a singular or a short name in any case: ippools, IPPool, pool. The
    YAML and JSON are what apply takes.
    """
    if bool(filenames) == bool(kind):
        raise click.UsageError("give either KIND and perhaps NAMES, or -f")
    if all_namespaces and (names or namespace):
        raise click.UsageError("-A shows all namespaces: give neither NAMES nor -n with it")
    fits = label_filter(selector)
    if kind is None:
        if watching or selector:
            raise click.UsageError("-w and -l take a KIND, not -f")
        keys = [d.key for d in read_or_fail(filenames, namespace, recursive, skip_empty)]
        with open_store() as store:
            _show_named(store, keys, output, export)
        return
    space = None if all_namespaces else (namespace or DEFAULT_NAMESPACE)
    wanted = Wanted(kind, space if kind.namespaced else None, tuple(dict.fromkeys(names)), fits)
    if names and not watching:
        keys = [Key(kind.id, n, (space or "") if kind.namespaced else "") for n in wanted.names]
        with open_store() as store:
            _show_named(store, keys, output, export, fits)
        return
    with open_store() as store:
        entries, revision = _listed(store, wanted)
        if watching:
            watch(store, wanted.kind, wanted.includes, entries, output, all_namespaces)
        else:
            _show_list(kind, entries, revision, output, all_namespaces, export)


def _listed(store: Datastore, wanted: Wanted) -> tuple[list[Entry], str]:
    """All that is wanted of a kind, and the revision of the list."""
    listing = store.list(wanted.kind.id, wanted.namespace)
    entries = listing.entries
    if wanted.kind.id == "Tier":
        stored = {entry.key for entry in entries}
        entries = sorted(
            [*entries, *(tier for tier in _built_in_tiers() if tier.key not in stored)],
            key=lambda entry: entry.key,
        )
    return [e for e in entries if wanted.includes(e.key, e.value)], listing.revision


def _built_in_tiers() -> Iterator[Entry]:
    """Tiers that always exist, stored or not."""
    from api.kinds import CALICO
    from api.policy import BUILT_IN_TIERS  # with all models, which other kinds need not load

    for name, (order, action) in BUILT_IN_TIERS.items():
        value = {
            "apiVersion": CALICO,
            "kind": "Tier",
            "metadata": {"name": name},
            "spec": {"order": order, "defaultAction": action},
        }
        yield Entry(Key("Tier", name), value, UNSTORED)


def _show_named(
    store: Datastore,
    keys: Iterable[Key],
    output: Output,
    export: bool,
    fits: Callable[[JSON], bool] = lambda value: True,
) -> None:
    """The objects under some keys; an error for each that is not there."""
    entries, missing, count = [], [], 0
    for key in keys:
        count += 1
        try:
            entries.append(_named(store, key))
        except NotFoundError:
            missing.append(key)
    entries = [entry for entry in entries if fits(entry.value)]
    values = [_printed(entry, export, namespace=not export or count > 1) for entry in entries]
    if output.is_table:
        _tables(entries, output)
    elif output.form == "name":
        _names(entries)
    elif count == 1 and values:
        click.echo(dumped(values[0], output.form), nl=False)
    elif values or not missing:
        click.echo(dumped(_list("v1", "List", values, None), output.form), nl=False)
    for key in missing:
        click.echo(f"Error: {title(key)}: does not exist", err=True)
    if missing:
        raise SystemExit(1)


def _named(store: Datastore, key: Key) -> Entry:
    try:
        return store.get(key)
    except NotFoundError:
        if key.kind == "Tier":
            for tier in _built_in_tiers():
                if tier.key == key:
                    return tier
        raise


def _tables(entries: list[Entry], output: Output) -> None:
    """A table of each kind, in the order in which the kinds come."""
    from api.kinds import KINDS

    by_kind: dict[str, list[Entry]] = {}
    for entry in entries:
        by_kind.setdefault(entry.key.kind, []).append(entry)
    for number, (kind, found) in enumerate(by_kind.items()):
        if number:
            click.echo()
        _show_list(KINDS[kind], found, None, output, namespaces=False, export=False)


def _show_list(
    kind: Kind,
    entries: list[Entry],
    revision: str | None,
    output: Output,
    namespaces: bool,
    export: bool,
) -> None:
    if output.is_table:
        chosen = output.columns(kind, namespace=namespaces)
        rows = [[column.cell(entry.value) for column in chosen] for entry in entries]
        click.echo(render([column.title for column in chosen], rows))
    elif output.form == "name":
        _names(entries)
    else:
        values = [_printed(entry, export, namespace=True) for entry in entries]
        whole = _list(kind.api_version, f"{kind.kind}List", values, None if export else revision)
        click.echo(dumped(whole, output.form), nl=False)


def _names(entries: Iterable[Entry]) -> None:
    for entry in entries:
        click.echo(f"{entry.key.kind.lower()}/{entry.key.name}")


def _printed(entry: Entry, export: bool, *, namespace: bool) -> JSON:
    if export:
        return exported(entry.value, namespace=namespace)
    if entry.revision == UNSTORED:
        return entry.value
    metadata = entry.value.get("metadata") or {}
    return entry.value | {"metadata": metadata | {"resourceVersion": entry.revision}}


def _list(api_version: str, kind: str, values: list[JSON], revision: str | None) -> JSON:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"resourceVersion": revision} if revision is not None else {},
        "items": values,
    }
