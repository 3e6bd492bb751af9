"""The resources as they were when the datastore was locked, for an agent that starts meanwhile.

What is in force then stays in force, whoever ends: the next agent finds them in a file, and
works with them until the lock is gone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import orjson

_log = logging.getLogger(__name__)


class Keepsake:
    """One file. Without it, or where it can't be used, the end of the lock is waited for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, objects: list[dict[str, Any]]) -> None:
        """Keep these, instead of what was kept. A failure is logged."""
        new = self._path.with_suffix(".new")
        try:
            new.unlink(missing_ok=True)
            new.touch(mode=0o600)
            new.write_bytes(orjson.dumps(objects))
            new.replace(self._path)
        except OSError as error:
            _log.error("an agent that starts while the datastore is locked must wait: %s", error)

    def load(self) -> list[dict[str, Any]]:
        """What was kept; empty if nothing was."""
        try:
            objects = orjson.loads(self._path.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, orjson.JSONDecodeError) as error:
            _log.error("%s: %s; waiting for the end of the lock", self._path, error)
            return []
        return [found for found in objects if isinstance(found, dict)]

    def forget(self) -> None:
        """The datastore counts again."""
        self._path.unlink(missing_ok=True)
