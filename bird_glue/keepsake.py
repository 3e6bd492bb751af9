"""What the next agent may need of this one, where the datastore doesn't say: in files for root.

The resources as they were when the datastore was locked: what is in force then stays in force,
whoever ends. The passwords of sessions, for while Secrets can't be read.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from bird_glue.secrets import SecretKey, SecretRead

_log = logging.getLogger(__name__)


class Keepsake:
    """One file. Without it, or where it can't be used, the end of the lock is waited for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(f"{path.name}.new")

    def save(self, objects: list[dict[str, Any]]) -> None:
        """Keep these, instead of what was kept. A failure is logged."""
        try:
            self._new.unlink(missing_ok=True)
            self._new.touch(mode=0o600)
            self._new.write_bytes(orjson.dumps(objects))
            self._new.replace(self._path)
        except OSError as error:
            _log.error("%s: the next agent can't do without the datastore: %s", self._path, error)

    def load(self) -> list[dict[str, Any]]:
        """What was kept; empty if nothing was."""
        try:
            objects = orjson.loads(self._path.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, orjson.JSONDecodeError) as error:
            _log.error("%s: %s; what the datastore says is waited for", self._path, error)
            return []
        return [found for found in objects if isinstance(found, dict)]

    def forget(self) -> None:
        """The datastore counts again."""
        for path in (self._path, self._new):  # also what a save that was cut short has left
            path.unlink(missing_ok=True)


class Passwords:
    """What was read of Secrets, and of those that can't be read what an earlier agent used.

    So a session that runs is not ended because nobody could say for a moment what its password is.
    """

    def __init__(self, keepsake: Keepsake) -> None:
        self._keepsake = keepsake
        self._kept: list[dict[str, Any]] | None = None  # None: not looked for yet
        self.known: dict[str, SecretRead] = {}

    def take(self, read: SecretRead) -> None:
        """A Secret was read, or could not be."""
        before = self.known.get(read.name)
        if read.problem and before is not None and not before.problem:
            return
        if read.problem and (values := self._used(read.name)):
            _log.warning("Secret %s not read, what was used stands: %s", read.name, read.problem)
            read = SecretRead(read.name, values)
        self.known[read.name] = read

    def keep(self, used: Iterable[SecretKey]) -> None:
        """These are those of sessions."""
        kept = [
            {"name": name, "key": key, "value": base64.b64encode(value).decode()}
            for name, key in sorted({(each.name, each.key) for each in used})
            if (value := (self.known[name].values or {}).get(key)) is not None
        ]
        if kept != self._kept:
            self._kept = kept
            if kept:
                self._keepsake.save(kept)
            else:
                self._keepsake.forget()

    def forget(self) -> None:
        """There are no sessions any more."""
        self._kept = None
        self._keepsake.forget()

    def _used(self, name: str) -> Mapping[str, bytes]:
        found = self._keepsake.load() if self._kept is None else self._kept
        return {
            each["key"]: base64.b64decode(each["value"]) for each in found if each["name"] == name
        }
