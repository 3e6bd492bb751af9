"""Calico's own client library as a command, built from tests/calico/: what its programs write."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.gomodule import build_module

BUILD_S = 900


def build() -> Path:
    """The executable, which takes a minute to build, or a few. See ``build_module``."""
    return build_module("calico") / "calico"


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
