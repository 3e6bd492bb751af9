"""BIRD's control socket: commands as lines, answers as lines with a code of four digits.

A line is ``1006-text``, or ``1006 text`` if it is the last; a line that begins with a space
goes on with the code before. 0xxx: it worked; 1xxx: tables and details; 8xxx: it failed; 9xxx:
it was not understood (BIRD's ``doc/reply_codes``).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 10.0
_CHUNK = 1 << 16
_CODE = 4  # characters
_FAILED = 8000


class BirdError(Exception):
    """BIRD doesn't answer; after that the conversation is over."""


class RefusedError(BirdError):
    """BIRD says no."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an answer."""

    code: int
    text: str


class Birdc:
    """A conversation with a BIRD, one command after another."""

    def __init__(self, path: Path) -> None:
        """Raises BirdError where none answers at the socket."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._rest = b""
        self._code = 0
        try:
            self._socket.settimeout(_SECONDS)
            self._socket.connect(str(path))
            self._answer()  # 0001 BIRD 2.0.12 ready.
        except BaseException as error:
            self._socket.close()
            if isinstance(error, OSError):
                raise BirdError(f"{path}: {error}") from error
            raise

    def __enter__(self) -> Birdc:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def ask(self, command: str) -> list[Line]:
        """Its answer. Raises RefusedError where that is that it failed, and BirdError."""
        try:
            self._socket.sendall(command.encode() + b"\n")
            lines = self._answer()
        except OSError as error:
            raise BirdError(f"{self._path}: {command}: {error}") from error
        failed = [line.text for line in lines if line.code >= _FAILED]
        if failed:
            raise RefusedError(f"{command}: {'; '.join(failed)}")
        return lines

    def _answer(self) -> list[Line]:
        lines: list[Line] = []
        while True:
            *complete, self._rest = self._rest.split(b"\n")
            for raw in complete:
                line, last = self._parse(raw.decode("utf-8", "replace"))
                lines.append(line)
                if last:
                    return lines
            data = self._socket.recv(_CHUNK)
            if not data:
                raise BirdError(f"{self._path}: BIRD closed the connection")
            self._rest += data

    def _parse(self, text: str) -> tuple[Line, bool]:
        if text.startswith(" "):
            return Line(self._code, text[1:]), False
        if not (text[:_CODE].isdigit() and text[_CODE : _CODE + 1] in ("-", " ")):
            raise BirdError(f"{self._path}: not an answer of BIRD: {text!r}")
        self._code = int(text[:_CODE])
        return Line(self._code, text[_CODE + 1 :]), text[_CODE] == " "
