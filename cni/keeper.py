"""Keeping the plugin installed: what others change is put right, settings are followed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from inotify_simple import INotify, flags

_CHANGES = (
    flags.CLOSE_WRITE
    | flags.ATTRIB
    | flags.CREATE
    | flags.DELETE
    | flags.MOVED_FROM
    | flags.MOVED_TO
    | flags.DELETE_SELF
    | flags.MOVE_SELF
)
_SETTLE_MS = 100  # several files of one change are one change
_LOOK_MS = 500  # how soon we notice that we shall stop
_AGAIN = 120  # looks without a change before we try again all the same: a minute

_log = logging.getLogger(__name__)


def keep(
    install: Callable[[], Iterable[str]],
    directories: Iterable[Path],
    stopping: Callable[[], bool],
) -> None:
    """Install, and again whenever anything in one of the directories changes.

    ``install`` returns warnings; each is logged when it is new. What it raises (OSError,
    ValueError) is logged, too, and what was installed before stays.
    """
    known: set[str] = set()
    directories = tuple(directories)
    while not stopping():
        with INotify() as inotify:
            for directory in directories:  # watched before they are looked at
                with contextlib.suppress(FileNotFoundError):
                    inotify.add_watch(directory, _CHANGES)
            try:
                said = set(install())
            except (OSError, ValueError) as error:
                said = {f"not installed as it should be: {error}"}
            for warning in sorted(said - known):
                _log.warning("%s", warning)
            known = said
            for _ in range(_AGAIN):
                if inotify.read(timeout=_LOOK_MS, read_delay=_SETTLE_MS) or stopping():
                    break
