"""Why a lab could not do what it was asked."""

from __future__ import annotations


class LabError(Exception):
    """What failed, in words for the person who asked; ``log`` is the end of a log about it."""

    status = 1  # with which a program that gives up because of it ends

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.log = log

    def __str__(self) -> str:
        return f"{self.message}\n{self.log}" if self.log else self.message


class CommandError(LabError):
    """A command that could not be started; ``status`` is a shell's, 127: there is none such."""

    def __init__(self, message: str, error: OSError) -> None:
        super().__init__(message)
        self.status = 127 if isinstance(error, FileNotFoundError) else 126
