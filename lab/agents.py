"""What runs on the nodes of a lab: Manx's programs, or another CNI plugin to compare with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bird_glue.status import StatusError
from bird_glue.status import query as bgp_status
from felix.status import query as felix_status
from lab.errors import LabError
from lab.fabric import OtherPlugin
from lab.routers import Program
from lab.runtime import BIN_DIR, CONF_DIR
from lab.supervisor import listens
from lab.world import Member

RUN_DIR = "/run/manx"
CNI, FELIX, BIRD_GLUE = "manx-cni", "manx-felix", "manx-bird-glue"
_STATUS_SECONDS = 2.0

# ``manx-felix`` and the others, by the interpreter the lab itself runs on.
PROGRAMS = (
    Program(CNI, (sys.executable, "-m", "cni", "daemon"), f"{RUN_DIR}/cni.sock"),
    Program(FELIX, (sys.executable, "-m", "felix"), f"{RUN_DIR}/felix.sock"),
    Program(BIRD_GLUE, (sys.executable, "-m", "bird_glue"), f"{RUN_DIR}/bgp.sock"),
)


def is_ready(program: Program, member: Member) -> bool:
    """Whether a program that runs in a member serves; Manx's agents say themselves."""
    run_dir = member.seen_by_keeper(RUN_DIR)
    try:
        if program.name == FELIX:
            return bool(felix_status(run_dir, timeout=_STATUS_SECONDS)["ready"])
        if program.name == BIRD_GLUE:
            return bgp_status(run_dir).in_sync
    except (OSError, ValueError, StatusError):
        return False
    return listens(member.seen_by_keeper(program.socket))


def environment(member: Member) -> dict[str, str]:
    """The environment of everything that runs in a member, by the lab or through ``exec``."""
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TERM") if name in os.environ}
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin:/sbin"]
    env = kept | {
        "HOME": "/root",
        "PATH": ":".join(part for part in path if part),
        "TMPDIR": "/run/tmp",
    }
    if member.role == "node":
        env |= {
            "MANX_NODENAME": member.name,
            "MANX_RUN_DIR": RUN_DIR,
            "MANX_DATASTORE": "sqlite:////var/lib/manx/datastore.db",
            "MANX_LOG_LEVEL": os.environ.get("MANX_LOG_LEVEL", "INFO"),
        }
    return env


def install_manx(member: Member, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start ``manx-cni install`` in a node. Raises LabError."""
    argv = [sys.executable, "-m", "cni", "install"]
    argv += ["--bin-dir", str(BIN_DIR), "--conf-dir", str(CONF_DIR)]
    with member.log("manx-cni-install").open("ab") as log:
        try:
            return member.namespaces.popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            raise LabError(f"node {member.name}: can't run manx-cni install: {error}") from error


def install_other(member: Member, plugin: OtherPlugin) -> None:
    """Copy another plugin's executables and its configuration into a node. Raises LabError."""
    bin_dir = member.seen_by_keeper(str(BIN_DIR))
    conf_dir = member.seen_by_keeper(str(CONF_DIR))
    try:
        shutil.copytree(plugin.bin_dir, bin_dir, dirs_exist_ok=True)
        conf_dir.mkdir(parents=True, exist_ok=True)
        (conf_dir / "10-lab.conflist").write_text(json.dumps(plugin.conflist))
    except (OSError, shutil.Error) as error:
        raise LabError(f"node {member.name}: can't install {plugin.bin_dir}: {error}") from error
