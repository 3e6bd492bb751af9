"""YAML and JSON text to plain values, with nothing guessed.

YAML as of version 1.2: only ``true`` and ``false`` are booleans, ``80:90`` is no number in
base 60, dates are text. What JSON can't carry, a key that stands twice and an alias that
makes a huge or endless value are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import yaml

MAX_VALUES = 1_000_000  # in one document, every use of an alias counted
MAX_DEPTH = 100

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class SyntaxProblemError(ValueError):
    """Text that is neither YAML nor JSON, or holds what neither should."""


class _Loader(_Base):  # type: ignore[misc]
    """The safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys all differ."""
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
                if key_node.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {key_node.value!r} stands here twice",
                        problem_mark=key_node.start_mark,
                    )
                seen.add(key_node.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), _first
    )


def documents(text: str) -> Iterator[tuple[int, Any]]:
    """The documents of a text, numbered from 1; empty ones are left out.

    Raises SyntaxProblemError, whose text says where.
    """
    if text.lstrip()[:1] in ("{", "["):
        try:
            yield 1, _checked(_json(text))
        except json.JSONDecodeError:
            pass  # YAML may begin with a bracket, too
        else:
            return
    try:
        for number, value in enumerate(yaml.load_all(text, Loader=_Loader), start=1):
            if value is not None:
                yield number, _checked(value)
    except yaml.YAMLError as error:
        raise SyntaxProblemError(_where(error)) from error
    except RecursionError as error:
        raise SyntaxProblemError("nested too deeply") from error


def _where(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _json(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(items)
        if len(mapping) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise SyntaxProblemError(f"key {twice!r} stands in one object twice")
        return mapping

    def constant(word: str) -> NoReturn:
        raise SyntaxProblemError(f"{word} is no JSON number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise SyntaxProblemError("nested too deeply") from error


def _checked(document: Any) -> Any:
    """Refuse what JSON can't carry, and aliases that multiply without bound."""
    known: dict[int, tuple[int, int]] = {}  # by identity: values within, levels within

    def measure(value: Any, depth: int) -> tuple[int, int]:
        if not isinstance(value, dict | list):
            _check_scalar(value)
            return 1, 0
        if id(value) not in known:
            if depth > MAX_DEPTH:
                raise SyntaxProblemError(f"more than {MAX_DEPTH} levels, or an alias within itself")
            if isinstance(value, dict):
                _check_keys(value)
            inner = value.values() if isinstance(value, dict) else value
            sizes = [measure(item, depth + 1) for item in inner]
            weight = 1 + sum(weight for weight, _ in sizes)
            if weight > MAX_VALUES:
                raise SyntaxProblemError(f"more than {MAX_VALUES} values in one document")
            known[id(value)] = weight, 1 + max((levels for _, levels in sizes), default=0)
        weight, levels = known[id(value)]
        if depth + levels > MAX_DEPTH:
            raise SyntaxProblemError(f"more than {MAX_DEPTH} levels")
        return weight, levels

    measure(document, 0)
    return document


def _check_keys(mapping: dict[Any, Any]) -> None:
    for key in mapping:
        if not isinstance(key, str):
            raise SyntaxProblemError(f"key {key!r}: expected text; put it in quotes")
        _check_scalar(key)


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise SyntaxProblemError(f"{value!r} is not valid Unicode") from None
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise SyntaxProblemError(f"{value} does not fit into 64 bits")
    elif not isinstance(value, int | float | None):
        raise SyntaxProblemError(f"{value!r}: a {type(value).__name__} is no JSON value")
