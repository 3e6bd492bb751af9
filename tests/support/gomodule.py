"""Programs that tests build from Go modules of ours, once for all checkouts of a user."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.kube import REPOSITORY, go_toolchain

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manx"
_FLAGS = ("-trimpath", "-buildvcs=false", "-mod=readonly", "-ldflags=-s -w")


def build_module(name: str, packages: Sequence[str] = (".",)) -> Path:
    """The directory with the executables of tests/NAME, each called as its package is.

    Made when it is missing: one process builds, the others wait.

    Needs a Go toolchain and the Go module proxy, once. Raises RuntimeError.
    """
    source = REPOSITORY / "tests" / name
    digest = hashlib.sha256(" ".join((*_FLAGS, *packages)).encode())
    for file in ("main.go", "go.mod", "go.sum"):
        if (source / file).exists():
            digest.update((source / file).read_bytes())
    cache = _CACHE / name
    target = cache / digest.hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        print(f"building tests/{name}, once", file=sys.stderr, flush=True)
        half = target.with_suffix(".new")
        half.mkdir(exist_ok=True)
        done = subprocess.run(
            [go_toolchain(), "build", *_FLAGS, "-o", str(half), *packages],
            cwd=source,
            env={**os.environ, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"tests/{name} can't be built: {done.stderr}")
        half.rename(target)
    return target
