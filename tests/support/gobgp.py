"""GoBGP, built from its Go module (tests/gobgp/): one more router to speak BGP with.

``python -m tests.support.gobgp`` builds it, for those who don't want a test to wait for that.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.gomodule import build_module

PROGRAMS = ("gobgpd", "gobgp")


def build() -> Path:
    """The directory with gobgpd and gobgp, built in about a minute. See ``build_module``."""
    packages = [f"github.com/osrg/gobgp/v4/cmd/{program}" for program in PROGRAMS]
    return build_module("gobgp", packages)


if __name__ == "__main__":
    try:
        build()
    except RuntimeError as problem:
        sys.exit(str(problem))
