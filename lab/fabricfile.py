"""From a fabric file to a ``Fabric``, or to everything that is wrong with the file."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from api import registry
from api.errors import InvalidObjectError, Problem
from lab.contradictions import contradictions
from lab.fabric import Fabric

MAX_SIZE = 1 << 20  # bytes; a fabric of a thousand nodes has a tenth of that


class FabricFileError(ValueError):
    """A file that can't be read as YAML at all: the message says where and why."""


_Base: Any = yaml.SafeLoader  # its types say less than is so


class _Loader(_Base):  # type: ignore[misc]
    """YAML 1.2 without surprises: a key given twice is an error, not the last one's; there
    are no aliases, so nothing is endless; ``80:90``, ``on`` and dates are text.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r}: expected text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


# The core schema of YAML 1.2 (section 10.3), but 010 is text: it means 8 to some and 10 to others.
for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|", "~nN"),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""]
    )


def read_documents(path: Path) -> list[Any]:
    """The YAML documents of a file, empty ones left out. Raises FabricFileError."""
    try:
        if path.stat().st_size > MAX_SIZE:
            raise FabricFileError(f"{path}: larger than {MAX_SIZE} bytes")
        text = path.read_text(encoding="utf-8")
        return [doc for doc in yaml.load_all(text, Loader=_Loader) if doc is not None]
    except OSError as error:
        raise FabricFileError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FabricFileError(f"{path}: not UTF-8 text: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise FabricFileError(f"{path}: not YAML: {error}") from error


def load(path: Path) -> Fabric:
    """The fabric of a file, checked as a whole.

    Files named under ``spec.resources`` are read relative to it. Raises FabricFileError
    when there is no YAML to speak of, else InvalidObjectError with all problems.
    """
    documents = read_documents(path)
    if len(documents) != 1:
        raise FabricFileError(f"{path}: {len(documents)} YAML documents, expected one Fabric")
    return parse(documents[0], path.parent)


def parse(document: object, folder: Path) -> Fabric:
    """The fabric of a YAML document. ``folder``: where the files it names are looked for.

    Raises InvalidObjectError, which holds everything that is wrong.
    """
    fabric = registry.validate(Fabric, document)
    fabric.spec.resources, problems = _resources(fabric.spec.resources, folder)
    problems = problems or contradictions(fabric)
    if problems:
        raise InvalidObjectError("Fabric", fabric.name, problems)
    return fabric


def _resources(
    items: list[dict[str, Any]], folder: Path
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The resources of all items, defaults filled in, and what is wrong with them."""
    resources: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for i, item in enumerate(items):
        field = f"spec.resources[{i}]"
        if item.keys() != {"file"}:
            _add(item, field, resources, problems)
            continue
        try:
            documents = read_documents(folder / str(item["file"]))
        except FabricFileError as error:
            problems.append(Problem(f"{field}.file", item["file"], f"a readable file: {error}"))
            continue
        for n, document in enumerate(documents):
            _add(document, f"{field}.file({item['file']})[{n}]", resources, problems)
    return resources, problems


def _add(
    item: object, field: str, resources: list[dict[str, Any]], problems: list[Problem]
) -> None:
    """One object; the items of a List one by one."""
    if isinstance(item, Mapping) and item.get("kind") == "List":
        inner = item.get("items")
        if not isinstance(inner, list):
            problems.append(Problem(f"{field}.items", inner, "a list of objects"))
            return
        for n, each in enumerate(inner):
            _add(each, f"{field}.items[{n}]", resources, problems)
        return
    try:
        resource = registry.dump(registry.parse(item))
    except InvalidObjectError as error:
        who = f"{error.kind} {error.name}".strip()
        problems.extend(
            Problem(
                ".".join(part for part in (field, problem.field) if part),
                problem.value,
                f"{problem.expected} ({who})",
            )
            for problem in error.problems
        )
        return
    if registry.kind_of(resource).namespaced:
        resource["metadata"].setdefault("namespace", "default")
    resources.append(resource)
