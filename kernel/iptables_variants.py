"""The two variants of iptables: which are in use, and what they have. See iptables(8)."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from kernel.netns import in_namespace
from kernel.nftables import Nftables
from kernel.restore import find_program, has_program

COMMANDS = {4: "iptables", 6: "ip6tables"}
BACKENDS = ("nft", "legacy")
_SAVE_SECONDS = 60


class IptablesError(Exception):
    """iptables refused an update; the table is as it was.

    ``chain`` and ``rule`` are those at fault, empty where iptables does not say.
    """

    def __init__(self, message: str, chain: str = "", rule: str = "") -> None:
        super().__init__(message)
        self.chain = chain
        self.rule = rule


def detect_backend(netns_fd: int | None = None) -> str:
    """``nft`` or ``legacy``: what already holds more rules in the namespace.

    Where neither holds more, what the plain ``iptables`` command is; where only one is
    installed, that one. Raises FileNotFoundError, IptablesError.
    """
    installed = [name for name in BACKENDS if has_program(f"iptables-{name}-restore")]
    if len(installed) == 1:
        return installed[0]
    nft = sum(_count_rules(f"{command}-nft-save", netns_fd) for command in COMMANDS.values())
    legacy = sum(
        _count_rules(f"{command}-legacy-save", netns_fd)
        for command in COMMANDS.values()
        if _has_legacy_tables(command, netns_fd)
    )
    if nft != legacy:
        return "nft" if nft > legacy else "legacy"
    version = run_program([find_program("iptables"), "--version"], None)
    return "legacy" if "legacy" in version else "nft"


def _count_rules(program: str, netns_fd: int | None) -> int:
    output = run_program([find_program(program)], netns_fd)
    return sum(line.startswith("-A") for line in output.splitlines())


def _has_legacy_tables(command: str, netns_fd: int | None) -> bool:
    """Whether there are any: merely asking legacy iptables for one would make it."""
    kind = command.removesuffix("tables")
    with in_namespace(netns_fd):
        try:
            return bool(Path(f"/proc/thread-self/net/{kind}_tables_names").read_text())
        except FileNotFoundError:
            return False  # the kernel module is not loaded


def run_program(command: Sequence[str], netns_fd: int | None) -> str:
    """What a program prints. Raises IptablesError."""
    with in_namespace(netns_fd):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
        )
    with process:
        try:
            output, errors = process.communicate(timeout=_SAVE_SECONDS)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise IptablesError(f"{' '.join(command)}: exit {process.returncode}: {errors.strip()}")
    return output


def exists(family: int, table: str, backend: str) -> bool:
    """Whether a table is there, in the network namespace of the calling thread.

    Merely asking legacy iptables for one would make it, and have packets pass it.
    """
    if backend == "nft":
        with Nftables(family, table) as found:
            return found.exists()
    names = Path("/proc/thread-self/net", f"{COMMANDS[family].removesuffix('tables')}_tables_names")
    try:
        return table in names.read_text().split()
    except FileNotFoundError:
        return False  # the kernel module is not loaded
