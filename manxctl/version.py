"""``manxctl version``."""

from __future__ import annotations

from importlib.metadata import version

import click

from datastore.interface import JSON, Key, NotFoundError, StoreError
from manxctl.options import environment, open_store

CLUSTER = Key("ClusterInformation", "default")


@click.command("version")
@click.option("--client", is_flag=True, help="Only that of manxctl; needs no datastore.")
def command(client: bool) -> None:
    """Show the version of Manx, and what the cluster says of itself."""
    click.echo(f"manxctl {version('manx')}")
    if client:
        return
    try:
        with open_store() as store:
            spec = store.get(CLUSTER).value.get("spec") or {}
    except NotFoundError:
        spec = {}
    except StoreError as error:
        click.echo(f"cluster unknown: {error}", err=True)
        return
    click.echo(f"datastore {environment().datastore}")
    for line in _cluster(spec):
        click.echo(line)


def _cluster(spec: JSON) -> list[str]:
    titles = {
        "clusterGUID": "cluster GUID",
        "clusterType": "cluster type",
        "calicoVersion": "Calico version",
    }
    lines = [f"{title} {spec[field]}" for field, title in titles.items() if spec.get(field)]
    if spec.get("datastoreReady") is False:
        lines.append("locked: manxctl datastore migrate unlock")
    return lines
