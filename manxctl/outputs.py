"""How ``manxctl get`` prints objects: the forms of ``-o``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import click

from api.kinds import Kind
from datastore.interface import JSON
from manxctl.columns import Column, all_columns, columns, text

TABLES = ("table", "ps", "wide")
FORMS = (*TABLES, "yaml", "json", "name")
CUSTOM = "custom-columns="

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\*|\d+)\]")
# What a cluster adds to an object; ``--export`` leaves it out.
_OF_THE_CLUSTER = frozenset(
    (
        *("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"),
        *("selfLink", "deletionTimestamp", "deletionGracePeriodSeconds"),
        *("finalizers", "ownerReferences"),
    )
)
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(frozen=True, slots=True)
class Output:
    """One of ``FORMS``, or ``table`` with the columns a user asked for."""

    form: str
    custom: tuple[str, ...] = ()

    @property
    def is_table(self) -> bool:
        """Whether objects are rows."""
        return self.form in TABLES

    def columns(self, kind: Kind, *, namespace: bool) -> list[Column]:
        """The columns of a kind's table. Raises UsageError for one it does not have."""
        if not self.custom:
            return columns(kind, wide=self.form == "wide", namespace=namespace)
        return [_column(kind, each) for each in self.custom]


def output_named(context: click.Context, parameter: click.Parameter, value: str) -> Output:
    """Callback of ``-o``."""
    if value in FORMS:
        return Output("table" if value == "ps" else value)
    if value.startswith(CUSTOM):
        wanted = tuple(value.removeprefix(CUSTOM).split(","))
        if not all(wanted):
            raise click.BadParameter(
                f"{value!r}: expected {CUSTOM}NAME,CIDR or {CUSTOM}TITLE:.path"
            )
        return Output("table", wanted)
    if value.startswith(("go-template=", "go-template-file=")):
        raise click.BadParameter(
            "Go templates are not offered: use -o custom-columns=NAME,CIDR,"
            " -o custom-columns=TITLE:.spec.cidr, or -o json with jq"
        )
    raise click.BadParameter(f"{value!r}: expected one of {', '.join(FORMS)}, {CUSTOM}…")


def _column(kind: Kind, wanted: str) -> Column:
    title, colon, path = wanted.partition(":")
    if colon:
        return Column(title, _by_path(path))
    known = {column.title: column for column in all_columns(kind)}
    found = known.get(title.upper())
    if found is None:
        raise click.UsageError(
            f"-o {CUSTOM}{wanted}: {kind.plural} have no such column; expected"
            f" {', '.join(known)}, or TITLE:.path.of.a.field"
        )
    return found


def _by_path(path: str) -> Callable[[JSON], str]:
    """The cell at ``.spec.cidr``, ``.spec.nets[0]``, ``.spec.ingress[*].action``."""
    written = path if path.startswith((".", "[")) else f".{path}"
    steps = [found.group(1) or found.group(2) for found in _STEP.finditer(written)]
    if not steps or _STEP.sub("", written):
        raise click.UsageError(f"{path!r}: expected a path such as .spec.cidr or .spec.nets[*]")

    def cell(value: JSON) -> str:
        return ",".join(text(found) for found in _follow(value, steps))

    return cell


def _follow(value: Any, steps: list[str]) -> Iterator[Any]:
    if not steps:
        if value is not None:
            yield value
        return
    step, rest = steps[0], steps[1:]
    if isinstance(value, dict):
        yield from _follow(value.get(step), rest)
    elif isinstance(value, list) and step == "*":
        for item in value:
            yield from _follow(item, rest)
    elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
        yield from _follow(value[int(step)], rest)


def exported(value: JSON, *, namespace: bool) -> JSON:
    """An object without what its cluster added; with its ``namespace``, or for any."""
    metadata = {
        name: field
        for name, field in (value.get("metadata") or {}).items()
        if name not in _OF_THE_CLUSTER and (namespace or name != "namespace")
    }
    if annotations := metadata.get("annotations"):
        metadata["annotations"] = {k: v for k, v in annotations.items() if k != LAST_APPLIED}
    bare = {name: part for name, part in value.items() if name != "status"}
    return bare | {"metadata": metadata}


def dumped(value: Any, form: str) -> str:
    """YAML or JSON."""
    if form == "json":
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    found: str = yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=100)
    return found
