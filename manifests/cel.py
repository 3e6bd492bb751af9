"""Rules in CEL, the language in which the API server is told what a schema cannot say.

``self`` is the object a rule stands on, ``oldSelf`` the one it replaces; a rule with ``oldSelf``
is asked on updates only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """An expression that must be true, and what to say when it is not."""

    rule: str
    message: str

    def as_schema(self) -> dict[str, str]:
        """One element of ``x-kubernetes-validations``."""
        return {"rule": self.rule, "message": self.message}


def given(field: str) -> str:
    """A text or list that is there and not empty. ``field`` is a path below ``self``."""
    *parents, _ = parts = field.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parents) + 1)]
    present = " && ".join(f"has(self.{path})" for path in paths)
    return f"({present} && size(self.{field}) > 0)"


def true(field: str, of: str = "self") -> str:
    """A boolean that is there and true."""
    return f"(has({of}.{field}) && {of}.{field})"


def absent_beside(field: str, *others: str) -> tuple[Rule, ...]:
    """Texts and lists that must not stand beside ``field``, a text or list."""
    return tuple(
        Rule(
            f"!{given(field)} || !{given(other)}", f"{other} must be absent, because {field} is set"
        )
        for other in others
    )


def without_global(*selectors: str) -> tuple[Rule, ...]:
    """Selectors in which ``global()`` has no meaning."""
    return tuple(
        Rule(
            f"!has(self.{name}) || !self.{name}.contains('global(')",
            f"{name}: a selector without global()",
        )
        for name in selectors
    )


def oneof_text(field: str, *values: object) -> str:
    """A field that is a number or text has one of these values, written either way."""
    listed = ", ".join(f"'{value}'" for value in values)
    return f"string(self.{field}) in [{listed}]"
