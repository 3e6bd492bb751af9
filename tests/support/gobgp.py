"""GoBGP, built from its Go module (tests/gobgp/): one more router to speak BGP with."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

from tests.support.kube import REPOSITORY, go_toolchain

SOURCE = REPOSITORY / "tests" / "gobgp"
# Shared by all checkouts of a user: it takes about a minute to build.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manx" / "gobgp"
PROGRAMS = ("gobgpd", "gobgp")
_FLAGS = ("-trimpath", "-buildvcs=false", "-mod=readonly", "-ldflags=-s -w")


def build() -> Path:
    """The directory with gobgpd and gobgp, built when it is missing; the others wait.

    Needs a Go toolchain and the Go module proxy, once. Raises RuntimeError.
    """
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for name in ("go.mod", "go.sum"):
        digest.update((SOURCE / name).read_bytes())
    target = CACHE / digest.hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        half = target.with_suffix(".new")
        half.mkdir(exist_ok=True)
        packages = [f"github.com/osrg/gobgp/v4/cmd/{program}" for program in PROGRAMS]
        done = subprocess.run(
            [go_toolchain(), "build", *_FLAGS, "-o", str(half), *packages],
            cwd=SOURCE,
            env={**os.environ, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"GoBGP can't be built: {done.stderr}")
        half.rename(target)
    return target
