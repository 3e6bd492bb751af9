"""Directories of manifests that are generated: written, and compared with what they should be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Without anchors, which kubectl reads but people do not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render(documents: Iterable[Mapping[str, Any]], command: str) -> str:
    """A file of YAML documents. ``command``: of ``python -m manifests``, which writes it."""
    head = f"# Generated from the models in api/ by: python -m manifests {command}\n"
    return head + yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=True, width=100, allow_unicode=True
    )


def write(directory: Path, wanted: Mapping[Path, str]) -> None:
    """Make the directory's YAML files those, and no others."""
    directory.mkdir(exist_ok=True)
    for path in _present(directory) - wanted.keys():
        path.unlink()
    for path, content in wanted.items():
        path.write_text(content)


def stale(directory: Path, wanted: Mapping[Path, str]) -> list[Path]:
    """Files that are missing, superfluous or other than wanted."""
    differ = (p for p, content in wanted.items() if not p.exists() or p.read_text() != content)
    return sorted({*differ, *(_present(directory) - wanted.keys())})


def _present(directory: Path) -> set[Path]:
    return set(directory.glob("*.yaml"))
