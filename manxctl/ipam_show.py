"""``manxctl ipam show``: how addresses are used."""

from __future__ import annotations

from collections.abc import Sequence

import click

from api.net import Net, format_address, parse_net
from datastore.interface import Datastore
from ipam.assigner import MAX_BLOCKS
from ipam.inventory import host_of
from ipam.reading import read
from ipam.records import Records
from ipam.utilisation import BlockUse, PoolUse, holder, utilisation
from manxctl import table
from manxctl.options import open_store

TITLES = ("GROUPING", "CIDR", "IPS TOTAL", "IN USE", "RESERVED", "FREE")
BORROWED_TITLES = ("IP", "BORROWING-NODE", "BLOCK", "BLOCK OWNER", "ALLOCATED-TO")


@click.command("show")
@click.option("--show-blocks", is_flag=True, help="Each pool's blocks, too, and whose they are.")
@click.option("--show-borrowed", is_flag=True, help="Only addresses out of others' blocks.")
@click.option("--show-configuration", is_flag=True, help="Only how addresses are given.")
@click.option("--ip", metavar="ADDRESS", help="Only who holds this address.")
def show(show_blocks: bool, show_borrowed: bool, show_configuration: bool, ip: str | None) -> None:
    """Show how many addresses of each pool are in use, or who holds one."""
    if show_borrowed + show_configuration + (ip is not None) > 1:
        raise click.UsageError("one of --ip, --show-borrowed, --show-configuration at a time")
    with open_store() as store:
        if ip is not None:
            text = _holder(store, address_of(ip, "--ip"))
        elif show_borrowed:
            text = _borrowed(store)
        elif show_configuration:
            text = _configuration(store)
        else:
            text = table_of_use(store, show_blocks=show_blocks)
    click.echo(text)


def address_of(text: str, option: str) -> Net:
    """The address an option names. Raises click.BadParameter."""
    try:
        net = parse_net(text)
    except ValueError:
        net = None
    if net is None or not net.is_host:
        raise click.BadParameter(f"{text!r}: expected an IP address", param_hint=option)
    return net


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
    total = use.used + use.free + use.reserved
    return [
        grouping,
        str(use.net),
        _number(total),
        *(
            f"{_number(part)} ({_percent(part, total)})"
            for part in (use.used, use.reserved, use.free)
        ),
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


def _holder(store: Datastore, net: Net) -> str:
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


def _borrowed(store: Datastore) -> str:
    inventory = read(store)
    rows = []
    for address, allocation in sorted(inventory.allocations.items()):
        block = inventory.blocks[allocation.block].thing
        node, owner = allocation.attribute("node"), host_of(block)
        if node and node != owner and (owner or block.affinity is None):
            pod = allocation.attribute("pod")
            holder = f"{allocation.attribute('namespace')}/{pod}" if pod else allocation.handle
            text = format_address(address.version, address.address)
            rows.append((text, node, str(block.net), owner or "none", holder))
    return table.render(BORROWED_TITLES, rows)


def _configuration(store: Datastore) -> str:
    found = Records(store).configuration()
    rows = [
        ("strictAffinity", str(found.strict_affinity).lower()),
        ("autoAllocateBlocks", str(found.auto_allocate_blocks).lower()),
        ("maxBlocksPerHost", str(found.max_blocks_per_host or MAX_BLOCKS)),
        ("ipCooldownSeconds", str(found.ip_cooldown_seconds)),
    ]
    return table.render(("PROPERTY", "VALUE"), rows)
