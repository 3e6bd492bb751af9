"""ExaBGP's configuration file: kept as wanted, and ExaBGP made to run on it.

ExaBGP loads a changed file without touching the sessions that are the same in it, but: a file
that is wrong makes it refuse all later ones, so each is validated first; and it loses the
request when routes wait at that moment on a session that is up, without saying so. So it is
asked what it runs on, by the mark in the file, until that is what it should be.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from api.net import Net, format_address
from bird_glue.config import Neighbor, password_word, render
from bird_glue.dialogue import Dialogue, Result

_log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.3  # between two files; what changes meanwhile is loaded together
_AGAIN_SECONDS = 0.3
# Routes may wait for as long as a peer reads nothing, which is bounded by its hold time
_LOAD_SECONDS = 180.0
_VALIDATE_SECONDS = 30.0


class NotLoadedError(Exception):
    """ExaBGP doesn't load its file; only a new start helps."""


class ConfigurationFile:
    """``exabgp.conf`` in ``run_dir``. ``rejected``: sessions ExaBGP refuses, and why."""

    def __init__(self, run_dir: Path, socket: Path) -> None:
        self.path = run_dir / "exabgp.conf"
        self.rejected: dict[Net, str] = {}
        self._socket = socket
        self._wanted: dict[Net, Neighbor] = {}
        self._text, self._mark = render((), socket)
        self._validated = False
        self._running: str | None = None  # the mark ExaBGP runs on; None: to be asked
        self._loading: float | None = None  # since when
        self._target = ""  # the mark of the file that is being loaded
        self._again: float | None = None
        self._next = 0.0

    @property
    def neighbors(self) -> Mapping[Net, Neighbor]:
        """The sessions that are wanted."""
        return self._wanted

    @property
    def accepted(self) -> Collection[Net]:
        """The peers among them that ExaBGP accepts."""
        return self._wanted.keys() - self.rejected.keys()

    @property
    def settled(self) -> bool:
        """Whether ExaBGP runs on what is wanted."""
        return self._running == self._mark

    def want(self, neighbors: Mapping[Net, Neighbor]) -> None:
        """The sessions that there should be."""
        if neighbors != self._wanted:
            self._wanted = dict(neighbors)
            self.rejected = {}
            self._text, self._mark = render(self._wanted.values(), self._socket)
            self._validated = False

    def write(self, *, check: bool) -> None:
        """Put it in place, for an ExaBGP that will be started. Raises OSError.

        ``check``: leave out what ExaBGP would refuse. It takes as long as starting ExaBGP,
        which refuses it just the same, so it is for when that has happened.
        """
        if check and not self._validated:
            self._leave_out_refused()
        self._replace()
        self._running = self._mark
        self._loading = self._again = None

    def found(self) -> None:
        """ExaBGP runs, on a file that may be another."""
        self._running = None
        self._loading = self._again = None

    def stale(self, now: float) -> bool:
        """Whether it is time to load another file."""
        return self._loading is None and not self.settled and now >= self._next

    def load(self, dialogue: Dialogue, now: float) -> None:
        """Have ExaBGP run on what is wanted. Raises OSError."""
        self._loading = now
        if self._running is not None:
            self._validate()
            self._replace()
            dialogue.ask("reload")
        self._target = self._mark
        self._ask(dialogue)

    def step(self, dialogue: Dialogue, now: float) -> None:
        """Go on with what ``load`` began. Raises NotLoadedError."""
        if self._loading is not None and now - self._loading > _LOAD_SECONDS:
            raise NotLoadedError("it does not load its new configuration")
        if self._again is not None and now >= self._again:
            self._again = None
            if self._target == self._mark:
                dialogue.ask("reload")
                self._ask(dialogue)
            else:
                self._loading = None  # something else is wanted by now

    def next_due(self) -> float | None:
        """When ``step`` or ``load`` has something to do though nothing happens."""
        if self._loading is None:
            return None if self.settled else self._next
        return self._again

    def _ask(self, dialogue: Dialogue) -> None:
        expected = self._target
        accepted = [address for address in self._wanted if address not in self.rejected]
        some = f" {format_address(*accepted[0][:2])}" if accepted else ""

        def finish(result: Result) -> None:
            shown = any(expected in line for line in result.output)
            empty = not any(line.startswith("neighbor ") for line in result.output)
            if shown or (not accepted and empty):
                self._running = expected
            elif self._running is not None:
                self._again = result.time + _AGAIN_SECONDS
                return
            else:
                self._running = ""  # it runs on something else
            self._loading = None
            self._next = result.time + _PAUSE_SECONDS if self._running else 0.0

        dialogue.ask(f"show neighbor configuration{some}", finish)

    def _validate(self) -> None:
        """Leave out what ExaBGP would refuse; what is in place already, it runs on."""
        if not self._validated and not (self.path.exists() and self.path.read_text() == self._text):
            self._leave_out_refused()

    def _leave_out_refused(self) -> None:
        if error := self._error_in(self._text):
            _log.error("ExaBGP refuses its configuration: %s", error)
            for address, neighbor in self._wanted.items():
                if error := self._error_in(render((neighbor,), self._socket)[0]):
                    self.rejected[address] = error
            accepted = [n for address, n in self._wanted.items() if address not in self.rejected]
            self._text, self._mark = render(accepted, self._socket)
        self._validated = True

    def _error_in(self, text: str) -> str:
        """What ``exabgp validate`` says; empty if all is well."""
        path = self.path.with_suffix(".new")
        _write_private(path, text)
        try:
            result = subprocess.run(
                [sys.executable, "-m", "exabgp", "validate", str(path)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_VALIDATE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"exabgp validate {path}: {error}") from error
        if result.returncode == 0:
            return ""
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        shown = "; ".join(lines[-3:]) or f"exit code {result.returncode}"
        for neighbor in self._wanted.values():
            if neighbor.password:
                shown = shown.replace(password_word(neighbor), "(password)")
        return shown

    def _replace(self) -> None:
        path = self.path.with_suffix(".new")
        _write_private(path, self._text)
        path.replace(self.path)


def _write_private(path: Path, text: str) -> None:
    """Write a file that may hold passwords."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(text)
