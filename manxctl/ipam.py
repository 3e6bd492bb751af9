"""``manxctl ipam show``: how addresses are used."""

from __future__ import annotations

from collections.abc import Sequence

import click

from api.net import format_address, parse_net
from datastore.interface import Datastore
from ipam.utilisation import BlockUse, PoolUse, holder, utilisation
from manxctl import table
from manxctl.options import open_store

TITLES = ("GROUPING", "CIDR", "IPS TOTAL", "IN USE", "FREE")


@click.group("ipam")
def command() -> None:
    """Show how addresses are used."""


@command.command("show")
@click.option("--show-blocks", is_flag=True, help="Each pool's blocks, too, and whose they are.")
@click.option("--ip", metavar="ADDRESS", help="Only who holds this address.")
def show(show_blocks: bool, ip: str | None) -> None:
    """Show how many addresses of each pool are in use, or who holds one."""
    with open_store() as store:
        text = table_of_use(store, show_blocks=show_blocks) if ip is None else _holder(store, ip)
    click.echo(text)


def table_of_use(store: Datastore, *, show_blocks: bool) -> str:
    """Every pool, perhaps with its blocks, and how much of it is in use."""
    rows: list[Sequence[str]] = []
    for pool in utilisation(store):
        if pool.net is not None:
            rows.append(_row(f"IP pool {pool.name}", pool))
        if show_blocks or pool.net is None:
            grouping = "Block" if pool.net is not None else "Block in no pool"
            rows += [[*_row(grouping, block), _owner(block)] for block in pool.blocks]
    titles = [*TITLES, "AFFINITY"] if any(len(row) > len(TITLES) for row in rows) else TITLES
    return table.render(titles, [[*row, ""] if len(row) < len(titles) else row for row in rows])


def _row(grouping: str, use: PoolUse | BlockUse) -> list[str]:
    total = use.used + use.free
    return [
        grouping,
        str(use.net),
        _number(total),
        f"{use.used} ({_percent(use.used, total)})",
        f"{_number(use.free)} ({_percent(use.free, total)})",
    ]


def _number(count: int) -> str:
    """IPv6 pools hold more than anybody reads: 1.8447e+19."""
    return str(count) if count < 10**10 else f"{count:.5g}"


def _percent(part: int, total: int) -> str:
    """Whole per cents, but never 0% of something or 100% of nearly all."""
    share = round(100 * part / total)
    if share == 0 and part:
        return "<1%"
    return ">99%" if share == 100 and part < total else f"{share}%"


def _owner(block: BlockUse) -> str:
    return block.affinity or "none"


def _holder(store: Datastore, text: str) -> str:
    try:
        net = parse_net(text)
    except ValueError:
        net = None
    if net is None or not net.is_host:
        raise click.BadParameter(f"{text!r}: expected an IP address", param_hint="--ip")
    address = format_address(net.version, net.address)
    found = holder(store, net)
    if found is None:
        return f"{address} is not in use"
    lines = [
        f"{address} is in use",
        f"block: {found.block}",
        f"handle: {found.handle or '-'}",
        *(f"{key}: {value}" for key, value in sorted(found.attributes.items())),
    ]
    return "\n".join(lines)
