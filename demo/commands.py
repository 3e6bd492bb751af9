"""The command ``./dev demo``: runs the steps, and says at the end what was not so."""

from __future__ import annotations

import itertools
import sys

import click

from demo import steps
from demo.report import Report
from lab import control
from lab.client import Lab
from lab.errors import LabError
from lab.fabricfile import load

NAME = "demo"

PICTURE = """
                       outside
                    198.51.100.10
                          |
         tor-1 (BIRD) ----+---- 172.31.255.0/31 ---- tor-2 (FRR)
         AS 65001, rack-1                            AS 65002, rack-2
         172.31.1.0/24                               172.31.2.0/24
         |             |                             |             |
      node-1a       node-1b                       node-2a       node-2b
"""

TRY = (
    ("lab status", "everything in it"),
    ("lab pod add node-1b shop --label app=web", "another pod"),
    ("lab exec shop ping -c 3 outside", "from inside a pod"),
    ("lab exec node-1a manxctl get ippools", "what is configured"),
    ("lab exec node-1a manxctl node status", "BGP as the node sees it"),
    ("lab exec tor-1 birdc show route", "and as its router does"),
    ("lab exec tor-2 vtysh -c 'show ip bgp'", "the other router"),
    ("lab exec node-2a iptables-save", "the rules of a node"),
    ("lab logs node-1a manx-felix -f", "what its agent says"),
    (f"lab down {NAME}", "take it down; nothing is left"),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--keep", is_flag=True, help="Leave the lab up and print what to try.")
def main(keep: bool) -> None:
    """Bring up a cluster in network namespaces and check everything Manx promises.

    Exits with 1 when anything is not as it says.
    """
    report = Report()
    try:
        sys.exit(_run(report, keep))
    except LabError as error:
        report.check(error.message, False)
        report.console.print(error.log, style="dim", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        report.console.print("\ninterrupted; the lab is taken down")
        sys.exit(130)


def _run(report: Report, keep: bool) -> int:
    report.console.print(PICTURE)
    report.step("A fabric of network namespaces, real routers, and Manx on every node")
    fabric = load(steps.FOLDER / "fabric.yaml")
    lab = Lab.up(fabric, name=NAME if keep else _free_name(), keep=keep, say=report.note)
    try:
        demo = steps.Demo(lab, fabric, report)
        steps.programs(demo)
        for step in steps.STEPS:
            step(demo)
        if not keep:
            steps.removal(demo)
    finally:
        if not keep:
            lab.down()
    _conclude(report, keep)
    return 1 if report.failures else 0


def _free_name() -> str:
    """A demo that somebody kept may be running."""
    taken = control.running_labs()
    return next(name for i in itertools.count(1) if (name := f"{NAME}-{i}") not in taken)


def _conclude(report: Report, keep: bool) -> None:
    report.console.print()
    if report.failures:
        report.console.print(f"[bold red]{len(report.failures)} of {report.checks} were not so:[/]")
        for sentence in report.failures:
            report.console.print(f"  {sentence}", markup=False)
    else:
        report.console.print(
            f"[bold green]All {report.checks} sentences were checked and are so[/], "
            f"in {report.elapsed():.0f} s."
        )
    if keep:
        report.console.print("The lab is still up. Try:")
        for command, what in TRY:
            report.console.print(f"  ./dev {command:<48} [dim]# {what}[/]")
