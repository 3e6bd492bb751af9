"""``python -m bench NAME [--json]``: run one benchmark and print its figures.

A benchmark is a module of this package with ``run() -> dict``: figures by name, the unit at
the name's end (``_ms``, ``_per_s``, ``_ratio``). Both sides of a comparison are measured in
turn in one run, so that a busy machine slows them alike. A module with ``SECTIONS`` takes some of
them as argument of ``run``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType

import click
import orjson
from rich.console import Console
from rich.table import Table

import bench


def names() -> list[str]:
    """The benchmarks there are."""
    return sorted(
        module.name for module in pkgutil.iter_modules(bench.__path__) if module.name[0] != "_"
    )


@click.command()
@click.argument("name", type=click.Choice(names()))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--only", multiple=True, metavar="SECTION", help="Measure this part. Repeatable.")
def main(name: str, as_json: bool, only: tuple[str, ...]) -> None:
    """Run the benchmark NAME and print its figures."""
    figures, problems = measure(importlib.import_module(f"bench.{name}"), only)
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    show(name, figures, as_json)
    if problems:
        raise SystemExit(1)


def measure(
    benchmark: ModuleType, only: Sequence[str]
) -> tuple[Mapping[str, float], Sequence[str]]:
    """The figures of a benchmark, and of what parts there are none, with the reason."""
    sections: Sequence[str] = getattr(benchmark, "SECTIONS", ())
    if unknown := set(only) - set(sections):
        known = ", ".join(sections) or "nothing: it has no parts"
        raise click.UsageError(f"--only {', '.join(sorted(unknown))}: expected one of {known}")
    if not sections:
        return benchmark.run(), ()
    figures: dict[str, float] = {}
    problems = []
    for section in only or sections:
        try:
            figures |= benchmark.run((section,))
        except (OSError, RuntimeError) as error:  # a server that is not there
            problems.append(f"{section} was not measured: {error}")
    return figures, problems


def show(name: str, figures: Mapping[str, float], as_json: bool) -> None:
    """Print the figures."""
    if as_json:
        click.echo(orjson.dumps(figures).decode())
        return
    table = Table("figure", "value", title=name)
    for figure, value in figures.items():
        table.add_row(figure, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main(prog_name="python -m bench")
