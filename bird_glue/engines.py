"""Both engines, of which one runs.

To change over, the daemon that runs is ended, once the other is known to take its
configuration, as if it had crashed: peers with graceful restart
keep our routes, the kernel keeps theirs, and the other daemon says that it has restarted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from bird_glue.bird_engine import BirdEngine
from bird_glue.channel import FromRelay
from bird_glue.engine import Engine, Intent
from bird_glue.speaker import Speaker

_log = logging.getLogger(__name__)


class Engines:
    """``current`` is the one that runs or is to run; it begins as the one that was found."""

    def __init__(self, run_dir: Path, sink: Callable[[FromRelay], object]) -> None:
        self._run_dir = run_dir
        self._bird = BirdEngine(run_dir)
        engines: tuple[Engine, ...] = (Speaker(run_dir, sink), self._bird)
        self._engines = {engine.name: engine for engine in engines}
        self.current = engines[0]

    @property
    def bird_was_here(self) -> bool:
        """Whether BIRD has run since the machine was started, and may have left routes."""
        return (self._run_dir / "bird.pid").exists()

    @property
    def former_metrics(self) -> tuple[tuple[int, int], ...]:
        """IP version and metric of the routes that BIRD wrote for an earlier agent."""
        return self._bird.former_metrics

    @property
    def times(self) -> tuple[float, float]:
        """When the current one was started, and when its configuration changed; 0.0: never.

        Seconds of the epoch.
        """
        found = (self._run_dir / f"{self.current.name}.{suffix}" for suffix in ("pid", "conf"))
        started, configured = (path.stat().st_mtime if path.exists() else 0.0 for path in found)
        return started, configured

    def adopt(self, now: float) -> None:
        """Find the daemon that an earlier agent started. Raises OSError."""
        for engine in self._engines.values():
            engine.adopt(now)
            if engine.pid is not None:
                self.current = engine

    def why_not_bird(self, intent: Intent) -> str:
        """What BIRD lacks to run on this; empty where it would, or runs."""
        runs = self.current is self._bird and self._bird.pid is not None
        return "" if runs and not self._bird.hopeless else self._bird.refusal(intent)

    @property
    def hopeless(self) -> bool:
        """Whether the current one was started again and again in vain."""
        return self.current is self._bird and self._bird.hopeless

    def forgive(self) -> None:
        """Nobody wants BIRD any more: who does so later may have mended it."""
        self._bird.forgive()

    def choose(self, name: str) -> bool:
        """Change over to an engine. Returns whether it was another one until now."""
        wanted = self._engines[name]
        changed = self.current is not wanted
        ran = [other for other in self._engines.values() if other is not wanted and other.pid]
        for other in ran:
            _log.info("changing over from %s to %s", other.name, name)
            other.abandon()
        self.current = wanted
        return changed or bool(ran)

    def forget(self) -> None:
        """Remove what they ran on, which has passwords in it; none runs any more."""
        for name in self._engines:
            for suffix in ("conf", "new", "check"):
                (self._run_dir / f"{name}.{suffix}").unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the daemon, which goes on."""
        for engine in self._engines.values():
            engine.close()
