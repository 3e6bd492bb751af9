"""The recorded cases of all rooms, read from ``../shared/vectors`` beside the repository."""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from typing import Any

import pytest

from tests.support.kube import REPOSITORY

DIRECTORY = REPOSITORY.parent / "shared" / "vectors"


@cache
def find(name: str) -> dict[str, Any] | None:
    """One file's content; None when the folder is not there, which in CI is a failure."""
    if not DIRECTORY.is_dir():
        if os.environ.get("CI"):
            pytest.fail(absent())
        return None
    with gzip.open(DIRECTORY / f"{name}.json.gz") as file:
        content: dict[str, Any] = json.load(file)
    return content


def load(name: str) -> dict[str, Any]:
    """The same; skips the test when the folder is not there."""
    content = find(name)
    if content is None:
        pytest.skip(absent())
    return content


def absent() -> str:
    """Why a test is skipped."""
    return f"recorded cases not found: {DIRECTORY}"
