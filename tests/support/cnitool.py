"""libcni as a command, built from tests/cnitool/: the library that runtimes call plugins with.

``python -m tests.support.cnitool`` builds it, for those who don't want a test to wait for that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.gomodule import build_module


@pytest.fixture(scope="session")
def cnitool() -> Path:
    """The executable; its use: tests/cnitool/main.go."""
    return build()


def build() -> Path:
    """The same, built in about a minute. See ``build_module``."""
    return build_module("cnitool") / "cnitool"


if __name__ == "__main__":
    try:
        build()
    except RuntimeError as problem:
        sys.exit(str(problem))
