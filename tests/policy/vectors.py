"""The recorded cases, read from ``../shared/vectors`` beside the repository."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

DIRECTORY = Path(__file__).resolve().parents[3] / "shared" / "vectors"


@cache
def load(name: str) -> dict[str, Any]:
    """One file's content; skips the test when the folder is not there."""
    if not DIRECTORY.is_dir():
        pytest.skip(f"recorded cases not found: {DIRECTORY}")
    with gzip.open(DIRECTORY / f"{name}.json.gz") as file:
        content: dict[str, Any] = json.load(file)
    return content
