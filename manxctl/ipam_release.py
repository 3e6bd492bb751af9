"""``manxctl ipam release``: give back addresses that nobody uses."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from api.errors import InvalidObjectError
from api.net import Net, format_address
from datastore.interface import Datastore
from ipam.allocator import Allocator, ReleaseError
from ipam.collector import release_unused
from ipam.errors import IpamError
from ipam.inventory import Allocation, Inventory
from ipam.reading import read
from manxctl import ipam_report
from manxctl.ipam_show import address_of
from manxctl.options import open_kubernetes, open_store

# An ADD that is under way has an address already that nobody uses yet.
_SETTLED = timedelta(minutes=1)


@click.command("release")
@click.option("--ip", "ips", multiple=True, metavar="ADDRESS", help="An address. Repeatable.")
@click.option(
    "--from-report",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What a report of manxctl ipam check -o FILE shows as leaked.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Though somebody seems to use it, or the report is not a minute old.",
)
def release(ips: tuple[str, ...], path: Path | None, force: bool) -> None:
    """Give back addresses; those that are in use, or were given anew, are refused.

    Exits with 1 when one was refused.
    """
    if bool(ips) == (path is not None):
        raise click.UsageError("one of --ip and --from-report is needed")
    wanted = [address_of(ip, "--ip") for ip in ips]
    with open_store() as store, open_kubernetes() as kubernetes:
        inventory = read(store, kubernetes)
        if path is None:
            leaks = [[each] for net in wanted if (each := _given(inventory, net))]
        else:
            leaks = list(_of_report(store, path, force=force).leaks)
        refused = [_release(store, kubernetes, inventory, leak, force=force) for leak in leaks]
    if any(refused):
        raise SystemExit(1)


def _given(inventory: Inventory, address: Net) -> Allocation | None:
    allocation = inventory.allocations.get(address)
    if allocation is None:
        click.echo(f"{_text(address)}: is not in use")
    return allocation


def _of_report(store: Datastore, path: Path, *, force: bool) -> ipam_report.Report:
    try:
        report = ipam_report.load(path)
    except (OSError, ipam_report.ReportError) as error:
        raise click.ClickException(str(error)) from error
    cluster = ipam_report.cluster_of(store)
    if report.cluster != cluster:
        raise click.ClickException(
            f"{path}: is of cluster {report.cluster or 'without GUID'}, and this is"
            f" {cluster or 'one without GUID'}"
        )
    if datetime.now(UTC) - report.made < _SETTLED and not force:
        raise click.ClickException(
            f"{path}: is not a minute old: what it shows as leaked may be of pods that start at"
            " this moment; wait, or --force"
        )
    return report


def _release(
    store: Datastore,
    kubernetes: Datastore | None,
    inventory: Inventory,
    leak: Sequence[Allocation],
    *,
    force: bool,
) -> bool:
    """Give back what one handle holds, all or nothing; whether that was refused."""
    texts = ", ".join(_text(each.address) for each in leak)
    if reason := _obstacle(inventory, leak, force=force):
        click.echo(f"{texts}: not released: {reason}", err=True)
        return True
    allocator = Allocator(store, "")
    try:
        if force:
            released = allocator.release_addresses(
                [each.address for each in leak],
                handle=leak[0].handle or None,
                sequences={a.address: a.sequence for a in leak if a.sequence is not None},
            )
        else:
            released = release_unused(store, allocator, list(leak), kubernetes)
    except (IpamError, InvalidObjectError, ReleaseError) as error:
        click.echo(f"{texts}: not released: {error}", err=True)
        return True
    if not released:
        click.echo(f"{texts}: not released: its holder came back", err=True)
        return True
    click.echo(f"{texts}: released; was held by {leak[0].holder}")
    return False


def _obstacle(inventory: Inventory, leak: Sequence[Allocation], *, force: bool) -> str | None:
    """Why it may not be released; None when it may."""
    for allocation in leak:
        now = inventory.allocations.get(allocation.address)
        if now is None:
            return "is free by now"
        if now != allocation:
            return f"was given anew since, to {now.holder}"
    if force:
        return None
    if inventory.blind:
        keys = ", ".join(str(each.key) for each in inventory.unreadable if each.user)
        return f"nobody can tell what {keys} uses: it makes no sense"
    for allocation in leak:
        if users := inventory.used.get(allocation.address):
            return f"is used by {' and '.join(str(user.key) for user in users)}"
        if not inventory.unused(allocation):
            return f"its holder may be there: {allocation.holder}; --force releases it all the same"
    return None


def _text(address: Net) -> str:
    return format_address(address.version, address.address)
