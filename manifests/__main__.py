"""``python -m manifests``: write the manifests that are generated, or check them."""

from __future__ import annotations

import click

from manifests import crds


@click.group()
def main() -> None:
    """Manifests generated from the code."""


@main.command("crds")
@click.option("--check", is_flag=True, help="Write nothing; fail when a file is stale.")
def crds_command(check: bool) -> None:
    """CustomResourceDefinitions, into manifests/crds/."""
    if not check:
        crds.write()
        return
    stale = crds.stale()
    for path in stale:
        click.echo(f"{path}: not what the models say; run: python -m manifests crds", err=True)
    if stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
