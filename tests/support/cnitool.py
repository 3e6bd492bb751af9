"""libcni as a command, built from tests/cnitool/: the library that runtimes call plugins with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.gomodule import build_module


@pytest.fixture(scope="session")
def cnitool() -> Path:
    """The executable; its use: tests/cnitool/main.go."""
    return build_module("cnitool") / "cnitool"
