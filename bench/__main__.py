"""``python -m bench NAME [--json]``: run one benchmark and print its figures.

A benchmark is a module of this package with ``run() -> dict``: figures by name, the unit at
the name's end (``_ms``, ``_per_s``, ``_ratio``). Both sides of a comparison are measured in
turn in one run, so that a busy machine slows them alike.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

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
def main(name: str, as_json: bool) -> None:
    """Run the benchmark NAME and print its figures."""
    figures: Mapping[str, float] = importlib.import_module(f"bench.{name}").run()
    if as_json:
        click.echo(orjson.dumps(figures).decode())
        return
    table = Table("figure", "value", title=name)
    for figure, value in figures.items():
        table.add_row(figure, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main(prog_name="python -m bench")
