"""The world of a lab: its own file system view, and in it a furnished place for each member.

Everything lies on a tmpfs that only the lab's mount namespaces show, so nothing is left of
it when their last process is gone. Folders that members need and the machine may lack
(/etc/cni, /var/lib/cni, …) are made on overlays, never on the machine's disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from kernel import netns, sysctl
from lab import namespaces
from lab.errors import LabError
from lab.fabric import Fabric
from lab.namespaces import Namespaces
from lab.wiring import Wiring, hosts_file, wiring

BASE = Path("/run/lab")  # in the keeper's mount namespace
DATASTORE = BASE / "datastore"
NETNS = Path("/run/netns")  # where ip(8) looks for namespaces by name

Role = Literal["router", "node", "host"]

# Mount point in the member → folder below BASE/members/NAME.
_EVERYWHERE = {"/run": "run"}
_BINDS: dict[Role, dict[str, str]] = {
    "router": {"/etc/bird": "etc-bird", "/etc/frr": "etc-frr"},
    "node": {"/etc/cni": "etc-cni", "/opt/cni": "opt-cni", "/var/lib/cni": "var-lib-cni"},
    "host": {},
}
_STORE = Path("/var/lib/manx")  # one datastore, the same in all nodes
_OVERLAYS = (Path("/etc"), Path("/opt"), Path("/var/lib"), Path("/var/tmp"))


@dataclass(slots=True)
class Member:
    """A router, node or host. ``folder``: where its own folders lie, as the keeper sees it."""

    name: str
    role: Role
    namespaces: Namespaces
    folder: Path

    @property
    def run(self) -> Path:
        """Its /run as the keeper sees it."""
        return self.folder / "run"

    def seen_by_keeper(self, path: str) -> Path:
        """Where the keeper finds a path below one of the member's own folders."""
        for point, folder in (*_EVERYWHERE.items(), *_BINDS[self.role].items()):
            if path == point or path.startswith(point + "/"):
                return self.folder / folder / path[len(point) :].lstrip("/")
        raise ValueError(f"{path} is not in a folder of {self.name} alone")

    def log(self, program: str) -> Path:
        """The log file of a program; in the member it is /run/log/PROGRAM.log."""
        return self.run / "log" / f"{program}.log"


def prepare() -> None:
    """Turn the calling process's new mount namespace into the lab's. Raises LabError."""
    here = Path(__file__)
    try:
        namespaces.make_private()
        namespaces.mount("proc", Path("/proc"), "proc")
        namespaces.mount("tmpfs", Path("/run"), "tmpfs", "mode=755")
        for folder in _OVERLAYS:
            _overlay(folder)
        for point in {*_BINDS["router"], *_BINDS["node"], os.fspath(_STORE)}:
            Path(point).mkdir(parents=True, exist_ok=True)
        DATASTORE.mkdir(parents=True)
    except OSError as error:
        raise LabError(f"can't make the lab's file system view: {error}") from error
    for path in (here, Path(sys.executable)):
        if not path.exists():
            raise LabError(f"{path} can't be seen from inside a lab; keep Manx outside /run")


def _overlay(folder: Path) -> None:
    """Cover a folder with a writable copy of itself that goes away with the lab."""
    upper, work = (BASE / "overlay" / folder.relative_to("/") / part for part in ("upper", "work"))
    for path in (upper, work):
        path.mkdir(parents=True)
    options = f"lowerdir={folder},upperdir={upper},workdir={work}"
    namespaces.mount_keeping_below(
        folder, lambda: namespaces.mount("overlay", folder, "overlay", options)
    )


def build(fabric: Fabric, pid_namespace: int) -> dict[str, Member]:
    """Make all members of the fabric and cable them. Raises LabError."""
    hosts = BASE / "hosts"
    hosts.write_text(hosts_file(fabric))
    members = {name: _member(name, role, hosts, pid_namespace) for name, role in _roles(fabric)}
    plan = wiring(fabric)
    for name, member in members.items():
        netns.call_inside(member.namespaces.net, partial(_set_sysctls, plan[name]))
    for name in members:
        _ip(name, plan[name].cables)
    for name in members:
        _ip(name, plan[name].configuration)
    return members


def _roles(fabric: Fabric) -> Iterator[tuple[str, Role]]:
    for router in fabric.all_routers():
        yield router.name, "router"
    for _, node in fabric.all_nodes():
        yield node.name, "node"
    for host in fabric.spec.hosts:
        yield host.name, "host"


def _member(name: str, role: Role, hosts: Path, pid_namespace: int) -> Member:
    folder = BASE / "members" / name
    binds = {Path("/etc/hosts"): hosts}
    for point, part in (_EVERYWHERE | _BINDS[role]).items():
        (folder / part).mkdir(parents=True)
        binds[Path(point)] = folder / part
    if role == "node":
        binds[_STORE] = DATASTORE
    for part in ("log", "lock", "tmp", "netns"):
        (folder / "run" / part).mkdir()
    try:
        made = namespaces.make_namespaces(name, binds, pid_namespace, NETNS / name)
    except OSError as error:
        raise LabError(f"{role} {name}: can't make its namespaces: {error}") from error
    return Member(name, role, made, folder)


def _set_sysctls(wires: Wiring) -> None:
    for path, value in wires.sysctls.items():
        sysctl.write(tuple(path.split("/")), value)


def _ip(member: str, commands: tuple[str, ...]) -> None:
    """``ip -n MEMBER -batch -``: all commands or an error that names the one that failed."""
    if not commands:
        return
    result = subprocess.run(
        ["ip", "-n", member, "-batch", "-"],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        last = result.stderr.strip().rpartition(":")[2]
        failed = commands[int(last) - 1] if last.isdecimal() else "; ".join(commands)
        raise LabError(f"{member}: ip {failed}: {result.stderr.strip()}")


def install_files(member: Member, files: dict[str, str], owner: str) -> None:
    """Write configuration files into a router and give its folders to ``owner``."""
    for name, text in files.items():
        target = member.seen_by_keeper(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for folder in (member.run / "bird", member.run / "frr"):
        folder.mkdir(exist_ok=True)
    if owner != "root":
        for point in ("/run/frr", "/etc/frr"):
            folder = member.seen_by_keeper(point)
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, owner, owner)
