"""What a container is made of: a root file system of BusyBox, as a folder and as an image."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static
COMMANDS = ("cat", "httpd", "ip", "nc", "ping", "sh", "sleep", "sysctl", "wget")
FOLDERS = ("bin", "dev", "etc", "proc", "run", "sys", "tmp")
CGROUPS = Path("/sys/fs/cgroup")


def root_file_system(path: Path) -> Path:
    """Make one below ``path``."""
    for name in FOLDERS:
        (path / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(BUSYBOX, path / "bin" / "busybox")
    for command in COMMANDS:
        (path / "bin" / command).symlink_to("busybox")
    (path / "etc" / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    return path


def image(root: Path, name: str, command: list[str], path: Path) -> Path:
    """The image ``name`` of a root file system, as an archive such as ``docker save`` writes."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        archive.add(root, arcname=".")
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    configuration = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Entrypoint": command},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{}],
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as archive:
        for entry, data in (
            ("layer.tar", layer.getvalue()),
            ("config.json", json.dumps(configuration).encode()),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            info = tarfile.TarInfo(entry)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def remove_cgroups(name: str) -> None:
    """Remove the control groups ``name``, and those in them, of every hierarchy.

    The kernel keeps them when the processes in them are gone. One that is busy stays.
    """
    for top in (*CGROUPS.glob(f"*/{name}"), *CGROUPS.glob(name)):
        for folder in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            top.rmdir()
