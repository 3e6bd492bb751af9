"""``manxctl get --watch``: what there is, then each change, across outages of the store."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterable

import click

from api.kinds import Kind
from datastore.follower import Follower, InSync, Update
from datastore.interface import JSON, Datastore, Entry, Key
from manxctl.outputs import Output, dumped
from manxctl.table import Table

ADDED, MODIFIED, DELETED = "ADDED", "MODIFIED", "DELETED"
INTERRUPTED = 130  # the exit status of what Ctrl-C ends


def watch(
    store: Datastore,
    kind: Kind,
    includes: Callable[[Key, JSON], bool],
    entries: Iterable[Entry],
    output: Output,
    namespaces: bool,
) -> None:
    """Print ``entries``, then every change of what ``includes`` says, until Ctrl-C.

    An object that no longer fits counts as deleted.
    """
    logging.basicConfig(format="%(message)s")  # the follower tells of outages
    found = list(entries)
    shown = {entry.key: entry.value for entry in found}
    printer = _Printer(kind, output, namespaces)
    printer.begin(shown)
    updates: queue.SimpleQueue[Update | InSync] = queue.SimpleQueue()
    follower = Follower(store, [kind.id], updates.put)
    follower.start()
    # Those that are stored may have gone before the follower listed.
    unheard = {entry.key for entry in found if entry.revision}
    try:
        while True:
            match updates.get():
                case InSync():
                    for key in unheard:
                        printer.change(DELETED, shown.pop(key))
                    unheard.clear()
                case Update(key, value):
                    unheard.discard(key)
                    _change(printer, shown, key, value if value and includes(key, value) else None)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    finally:
        follower.stop()


def _change(printer: _Printer, shown: dict[Key, JSON], key: Key, value: JSON | None) -> None:
    before = shown.get(key)
    if value is not None:
        shown[key] = value
        if value != before:
            printer.change(ADDED if before is None else MODIFIED, value)
    elif before is not None:
        printer.change(DELETED, shown.pop(key))


class _Printer:
    """A table that grows, or a stream of events as the Kubernetes API has them."""

    def __init__(self, kind: Kind, output: Output, namespaces: bool) -> None:
        self._kind = kind
        self._form = output.form
        self._columns = output.columns(kind, namespace=namespaces) if output.is_table else []
        self._table = Table(["EVENT", *(column.title for column in self._columns)])

    def begin(self, shown: dict[Key, JSON]) -> None:
        """What there is at the start."""
        if self._columns:
            click.echo(self._table.head([self._row(ADDED, value) for value in shown.values()]))
            return
        for value in shown.values():
            self.change(ADDED, value)

    def change(self, event: str, value: JSON) -> None:
        """One change."""
        if self._columns:
            click.echo(self._table.row(self._row(event, value)))
        elif self._form == "name":
            name = (value.get("metadata") or {}).get("name")
            click.echo(f"{event} {self._kind.id.lower()}/{name}")
        elif self._form == "json":
            import json

            click.echo(json.dumps({"type": event, "object": value}, ensure_ascii=False))
        else:
            click.echo("---\n" + dumped({"type": event, "object": value}, self._form), nl=False)

    def _row(self, event: str, value: JSON) -> list[str]:
        return [event, *(column.cell(value) for column in self._columns)]
