"""From a fabric file to a ``Fabric``, or to everything that is wrong with the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api import registry
from api.errors import InvalidObjectError, Problem
from api.syntax import SyntaxProblemError, documents
from lab.contradictions import contradictions
from lab.fabric import Fabric

MAX_SIZE = 1 << 20  # bytes; a fabric of a thousand nodes has a tenth of that


class FabricFileError(ValueError):
    """A file that can't be read as YAML at all: the message says where and why."""


def read_documents(path: Path) -> list[Any]:
    """The YAML documents of a file, empty ones left out. Raises FabricFileError."""
    try:
        if path.stat().st_size > MAX_SIZE:
            raise FabricFileError(f"{path}: larger than {MAX_SIZE} bytes")
        text = path.read_text(encoding="utf-8")
        return [document for _, document in documents(text)]
    except OSError as error:
        raise FabricFileError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FabricFileError(f"{path}: not UTF-8 text: {error}") from error
    except SyntaxProblemError as error:
        raise FabricFileError(f"{path}: not YAML: {error}") from error


def load(path: Path) -> Fabric:
    """The fabric of a file, checked as a whole.

    Files named under ``spec.resources`` are read relative to it. Raises FabricFileError
    when there is no YAML to speak of, else InvalidObjectError with all problems.
    """
    found = read_documents(path)
    if len(found) != 1:
        raise FabricFileError(f"{path}: {len(found)} YAML documents, expected one Fabric")
    return parse(found[0], path.parent)


def parse(document: object, folder: Path) -> Fabric:
    """The fabric of a YAML document. ``folder``: where the files it names are looked for.

    Raises InvalidObjectError, which holds everything that is wrong.
    """
    fabric = registry.validate(Fabric, document)
    resources, problems = _resources(fabric.spec.resources, folder)
    fabric.spec.resources = list(resources.values())
    problems = problems or contradictions(fabric, list(resources))
    if problems:
        raise InvalidObjectError("Fabric", fabric.name, problems)
    return fabric


def _resources(
    items: list[dict[str, Any]], folder: Path
) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The resources of all items by where they stand, and what is wrong with them.

    Defaults are filled in.
    """
    resources: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for i, item in enumerate(items):
        field = f"spec.resources[{i}]"
        if item.keys() != {"file"}:
            _add(item, field, resources, problems)
            continue
        try:
            found = read_documents(folder / str(item["file"]))
        except FabricFileError as error:
            problems.append(Problem(f"{field}.file", item["file"], f"a readable file: {error}"))
            continue
        for n, document in enumerate(found):
            _add(document, f"{field}.file({item['file']})[{n}]", resources, problems)
    return resources, problems


def _add(
    item: object, field: str, resources: dict[str, dict[str, Any]], problems: list[Problem]
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
    resources[field] = resource
