"""``manxctl ipam status``: what the controllers of this machine say of themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from felix.status import query
from manxctl.options import environment

SOCKET = "controllers.sock"


@click.command("status")
@click.option(
    "-o", "--output", type=click.Choice(("text", "json")), default="text", show_default=True
)
def status(output: str) -> None:
    """Show what manx-controllers on this machine found and gave back.

    Exits with 1 when it does not run here, or is not well.
    """
    run_dir = environment().run_dir
    try:
        found = query(run_dir, name=SOCKET)
    except (OSError, ValueError) as error:
        raise click.ClickException(
            f"{run_dir}/{SOCKET}: {error}; does manx-controllers run here?"
        ) from error
    if output == "json":
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(found)))
    if not found.get("ready"):
        raise SystemExit(1)


def _lines(status: dict[str, Any]) -> Iterator[str]:
    state = "leads" if status.get("leading") else f"waits; {status.get('holder') or 'nobody'} leads"
    yield f"controllers: {'ready' if status.get('ready') else 'not ready'}, {state}"
    for error in status.get("errors", []):
        yield f"  {error['object']}: {error['message']}"
    if last := status.get("last_round"):
        yield f"last round: {last['at']}, {last['seconds']} s"
        if last["idle"]:
            yield f"  idle: {last['idle']}"
        for title in ("counts", "findings", "waiting"):
            if last[title]:
                parts = ", ".join(f"{number} {name}" for name, number in last[title].items())
                yield f"  {title}: {parts}"
        for problem in last["problems"]:
            yield f"  problem: {problem}"
    if collected := {name: n for name, n in status.get("collected", {}).items() if n}:
        yield "given back: " + ", ".join(f"{number} {name}" for name, number in collected.items())
