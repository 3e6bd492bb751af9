"""Why a lab could not do what it was asked."""

from __future__ import annotations


class LabError(Exception):
    """What failed, in words for the person who asked; ``log`` is the end of a log about it."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.log = log

    def __str__(self) -> str:
        return f"{self.message}\n{self.log}" if self.log else self.message
