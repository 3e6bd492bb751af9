"""The demo itself: everything it says is so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lab import control


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_demo_holds_what_it_says() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "demo"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sentences were checked and are so" in result.stdout
    assert "✘" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 140
    assert not [name for name in control.running_labs() if name.startswith("demo-")]
