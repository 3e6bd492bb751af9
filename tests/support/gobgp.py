"""GoBGP, built from its Go module (tests/gobgp/): one more router to speak BGP with."""

from __future__ import annotations

from pathlib import Path

from tests.support.gomodule import build_module

PROGRAMS = ("gobgpd", "gobgp")


def build() -> Path:
    """The directory with gobgpd and gobgp, built in about a minute. See ``build_module``."""
    packages = [f"github.com/osrg/gobgp/v4/cmd/{program}" for program in PROGRAMS]
    return build_module("gobgp", packages)
