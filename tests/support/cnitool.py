"""libcni as a command, built from tests/cnitool/: the library that runtimes call plugins with."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.kube import REPOSITORY, go_toolchain

SOURCE = REPOSITORY / "tests" / "cnitool"
# Shared by all checkouts of a user.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manx" / "cnitool"
_FLAGS = ("-trimpath", "-buildvcs=false", "-ldflags=-s -w")


def build() -> Path:
    """The executable, built when it is missing; one process builds, the others wait.

    Needs a Go toolchain and the Go module proxy, once. Raises RuntimeError.
    """
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for name in ("main.go", "go.mod", "go.sum"):
        digest.update((SOURCE / name).read_bytes())
    target = CACHE / digest.hexdigest()[:16] / "cnitool"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            return target
        half = target.with_suffix(".new")
        done = subprocess.run(
            [go_toolchain(), "build", *_FLAGS, "-o", str(half), "."],
            cwd=SOURCE,
            env={**os.environ, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"cnitool can't be built: {done.stderr}")
        half.rename(target)
    return target


@pytest.fixture(scope="session")
def cnitool() -> Path:
    """The executable; its use: tests/cnitool/main.go."""
    return build()
