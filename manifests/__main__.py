"""``python -m manifests``: write the manifests that are generated, or check them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from manifests import admission, crds, files

CHECK = click.option("--check", is_flag=True, help="Write nothing; fail when a file is stale.")


@click.group()
def main() -> None:
    """Manifests generated from the code."""


@main.command("crds")
@CHECK
def crds_command(check: bool) -> None:
    """CustomResourceDefinitions, into manifests/crds/."""
    _make("crds", crds.DIRECTORY, crds.files, check)


@main.command("admission")
@CHECK
def admission_command(check: bool) -> None:
    """What the API server fills in and refuses beyond the CRDs, into manifests/admission/."""
    _make("admission", admission.DIRECTORY, admission.files, check)


def _make(name: str, directory: Path, wanted: Callable[[], dict[Path, str]], check: bool) -> None:
    if not check:
        files.write(directory, wanted())
        return
    stale = files.stale(directory, wanted())
    for path in stale:
        click.echo(f"{path}: not what the models say; run: python -m manifests {name}", err=True)
    if stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
