"""What is wrong with an object, said so that its author can mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 200  # characters of a value in a message
# In the spec of what stands for an object that a store holds and nobody can read: why.
UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it stands, what stands there, what would be right."""

    field: str  # path from the object's root, as in the user's YAML: spec.ingress[0].action
    value: object
    expected: str

    def __str__(self) -> str:
        parts = [self.field] if self.field else []
        if self.value is not None:
            text = repr(self.value)
            parts.append(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
        return ": ".join([*parts, self.expected])


class InvalidObjectError(ValueError):
    """An object that was refused. ``problems`` is never empty; nothing of it was applied."""

    def __init__(self, kind: str, name: str, problems: Sequence[Problem]) -> None:
        self.kind = kind
        self.name = name
        self.problems = tuple(problems)
        super().__init__(f"{self.title}: " + "; ".join(str(problem) for problem in self.problems))

    @property
    def title(self) -> str:
        """Kind and, where there is one, name: ``IPPool pods``."""
        return f"{self.kind} {self.name}".rstrip()
