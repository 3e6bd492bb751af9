"""The command ``manxctl``: a group whose verbs are imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

import click

# verb -> module and one line of help, so that help and start-up import no verb
VERBS = {
    "apply": ("manxctl.apply", "Create or update resources from files."),
    "cluster": ("manxctl.cluster", "Collect what the cluster is, for a report."),
    "create": ("manxctl.create", "Create resources from files."),
    "datastore": ("manxctl.datastore", "Move the data to another datastore."),
    "delete": ("manxctl.delete", "Delete resources by file or by kind and name."),
    "explain": ("manxctl.explain", "Say whether policy lets a flow pass, and why."),
    "get": ("manxctl.get", "Show resources."),
    "ipam": ("manxctl.ipam", "Show, check and set how addresses are used."),
    "label": ("manxctl.label", "Set or remove labels of a resource."),
    "node": ("manxctl.node", "Show what this node's programs do, and collect it."),
    "patch": ("manxctl.patch", "Change some fields of a resource."),
    "replace": ("manxctl.replace", "Replace resources from files."),
    "validate": ("manxctl.validate", "Check files without a datastore."),
    "version": ("manxctl.version", "Show the versions of manxctl and of the cluster."),
}


class Verbs(click.Group):
    """Finds a verb's ``command`` in its module, and words errors for a terminal."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb; what it could not do becomes a message and exit code 1."""
        from api.errors import InvalidObjectError
        from datastore.interface import StoreError, UnavailableError
        from ipam.errors import IpamError
        from manxctl.documents import DocumentsError

        try:
            return super().invoke(ctx)
        except StoreError as error:
            text = str(error)
            if error.key and not isinstance(error, UnavailableError) and str(error.key) not in text:
                text = f"{error.key}: {text}"  # which of many was refused
            raise click.ClickException(text) from error
        except (DocumentsError, InvalidObjectError, IpamError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look at and change what Manx knows.

    The datastore is the one MANX_DATASTORE names (default
    sqlite:////var/lib/manx/datastore.db).
    """
