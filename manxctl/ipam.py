"""``manxctl ipam``: how addresses are used, what is wrong with them, and how they are given."""

from __future__ import annotations

import click

from manxctl.ipam_check import check
from manxctl.ipam_configure import configure, split
from manxctl.ipam_release import release
from manxctl.ipam_show import show, table_of_use
from manxctl.ipam_status import status

__all__ = ["command", "table_of_use"]


@click.group("ipam")
def command() -> None:
    """Show how addresses are used, check them, and set how they are given."""


for _verb in (check, configure, release, show, split, status):
    command.add_command(_verb)
