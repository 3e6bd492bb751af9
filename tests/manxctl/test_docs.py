"""The YAML in the documentation is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.manxctl.conftest import Run

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = re.findall(r"```yaml\n(.*?)```", (DOCS / "resources.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_valid(run: Run, example: str) -> None:
    result = run("validate", "-f", "-", stdin=example)
    assert result.exit_code == 0, result.stderr


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 5
