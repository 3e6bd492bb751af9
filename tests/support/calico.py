"""Calico's own client library as a command, built from tests/calico/: what its programs write."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.kube import REPOSITORY, go_toolchain

SOURCE = REPOSITORY / "tests" / "calico"
# Shared by all checkouts of a user: it takes a minute to build, or a few.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manx" / "calico"
BUILD_S = 900
_FLAGS = ("-trimpath", "-buildvcs=false", "-mod=readonly", "-ldflags=-s -w")


def build() -> Path:
    """The executable, built when it is missing; one process builds, the others wait.

    Needs a Go toolchain and the Go module proxy, once. Raises RuntimeError.
    """
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for name in ("main.go", "go.mod", "go.sum"):
        digest.update((SOURCE / name).read_bytes())
    target = CACHE / digest.hexdigest()[:16] / "calico-client"
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
            raise RuntimeError(f"Calico's client can't be built: {done.stderr}")
        half.rename(target)
    return target


@dataclass(frozen=True, slots=True)
class CalicoClient:
    """The command, at work on an etcd."""

    process: subprocess.Popen[str]

    def ask(self, do: str, **request: Any) -> Any:
        """Its answer; the requests are in tests/calico/main.go. Raises RuntimeError."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        if "error" in told:
            raise RuntimeError(told["error"])
        return told["answer"]


@contextmanager
def calico_client(url: str) -> Iterator[CalicoClient]:
    """Calico's client of the etcd at a URL."""
    command = [str(build()), url]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield CalicoClient(process)
        finally:
            process.kill()


if __name__ == "__main__":
    try:
        build()
    except RuntimeError as problem:
        sys.exit(str(problem))
