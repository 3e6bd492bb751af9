"""``manxctl cluster diags``: all that the datastore holds, for a report."""

from __future__ import annotations

from pathlib import Path

import click

from manxctl.diags import cluster_parts, output_option, write_archive
from manxctl.options import open_store


@click.group("cluster")
def command() -> None:
    """Collect what the cluster is."""


@command.command("diags")
@output_option
def diags(output: Path | None) -> None:
    """Collect all resources, the use of addresses and versions in a tar file.

    Nothing secret is in it: of pods and the like it holds what Manx reads of them. What a node
    does is collected there: manxctl node diags.
    """
    with open_store() as store:
        click.echo(f"wrote {write_archive(output, 'manx-cluster', cluster_parts(store))}")
