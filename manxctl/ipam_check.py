"""``manxctl ipam check``: does what was given agree with who uses it?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from api.net import format_address
from ipam.audit import Fault, Finding, leaks, shared_pools, standing
from ipam.audit_kernel import audit_kernel, interface_prefixes, learned_routes
from ipam.inventory import Inventory
from manxctl import ipam_report
from manxctl.options import environment, open_kubernetes, open_store


@click.command("check")
@click.option("--show-all-ips", is_flag=True, help="List every address that is in use.")
@click.option("--show-problem-ips", is_flag=True, help="List every disagreement, and notes, too.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a report, for manxctl ipam release --from-report.",
)
@click.option(
    "--kernel", is_flag=True, help="On a node: compare with its interfaces and routes, BGP's too."
)
def check(show_all_ips: bool, show_problem_ips: bool, output: Path | None, kernel: bool) -> None:
    """Compare blocks, handles, claims, endpoints, pods, nodes, pools, reservations and routes.

    What is found is looked at twice, so what is under way is no finding. Exits with 1 when
    something is wrong. Nothing is changed.
    """
    with open_store() as store, open_kubernetes() as kubernetes:
        inventory, findings = standing(store, kubernetes)
        if kernel:
            node = environment().node
            prefixes = interface_prefixes(store, node)
            of_kernel = [
                *audit_kernel(inventory.users, node, prefixes),
                *shared_pools(inventory.pools, inventory.blocks, learned_routes()),
            ]
            findings = sorted({*findings, *of_kernel})
        if output is not None:
            cluster = ipam_report.cluster_of(store)
            found = leaks(inventory, findings)
            ipam_report.write(output, cluster, inventory, findings, found)
    if show_all_ips:
        _list_addresses(inventory)
    _summary(inventory, findings, details=show_problem_ips)
    if output is not None:
        click.echo(f"report written to {output}")
    if any(finding.problem for finding in findings):
        raise SystemExit(1)


def _list_addresses(inventory: Inventory) -> None:
    for address in sorted(inventory.allocations.keys() | inventory.used.keys()):
        allocation = inventory.allocations.get(address)
        holder = f"held by {allocation.holder}" if allocation else "not allocated"
        users = " and ".join(str(user.key) for user in inventory.used.get(address, ()))
        text = format_address(address.version, address.address)
        click.echo(f"{text}: {holder}; {f'used by {users}' if users else 'not used'}")


def _summary(inventory: Inventory, findings: Sequence[Finding], *, details: bool) -> None:
    users = len(inventory.used)
    click.echo(
        f"{len(inventory.allocations)} addresses are held in {len(inventory.blocks)} blocks by"
        f" {len(inventory.handles)} handles; {users} are used; {len(inventory.nodes)} nodes"
    )
    for fault in Fault:
        found = [finding for finding in findings if finding.fault == fault]
        if found:
            note = "" if found[0].problem else " (a note)"
            click.echo(f"{fault.value}: {len(found)}{note}")
            if details:
                for finding in found:
                    click.echo(f"  {finding}")
    problems = sum(finding.problem for finding in findings)
    click.echo(f"{problems} problems" if problems else "no problems")
    if problems and not details:
        click.echo("each of them: manxctl ipam check --show-problem-ips")
