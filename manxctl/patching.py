"""The three sorts of patches that the Kubernetes API and calicoctl know. Pure.

- merge: RFC 7386. Mappings are merged, null removes, everything else replaces.
- json: RFC 6902. A list of operations.
- strategic: as merge, with Kubernetes' directives ``$patch: replace``, ``$patch: delete`` and
  ``$retainKeys``. Lists of the resources known here have no merge keys, so they are replaced;
  ``metadata.finalizers`` and ``ownerReferences``, which have, are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

Patch = Callable[[Any, Any], Any]

_DIRECTIVE = "$patch"
_RETAIN = "$retainKeys"


class PatchError(ValueError):
    """A patch that is none, or does not fit the object. The text says where and why."""


def merge(target: Any, patch: Any) -> Any:
    """The object with a merge patch applied."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    merged = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge(merged.get(name), value)
    return merged


def strategic(target: Any, patch: Any) -> Any:
    """The object with a strategic merge patch applied. Raises PatchError."""
    return _strategic(target, patch, "")


def _strategic(target: Any, patch: Any, at: str) -> Any:
    if not isinstance(patch, Mapping):
        if at in ("metadata.finalizers", "metadata.ownerReferences"):
            raise PatchError(f"{at}: a strategic patch merges it by key: use -t merge or -t json")
        _refuse_directives(patch, at)
        return copy.deepcopy(patch)
    directive = patch.get(_DIRECTIVE, "merge")
    if directive not in ("merge", "replace", "delete"):
        raise PatchError(f"{at or 'patch'}: {_DIRECTIVE}: {directive!r}: expected replace, delete")
    wanted = {name: value for name, value in patch.items() if name not in (_DIRECTIVE, _RETAIN)}
    for name in wanted:
        if name.startswith("$"):
            raise PatchError(f"{at or 'patch'}: {name}: only lists with merge keys have that")
    if directive == "delete":
        return {}
    merged = dict(target) if isinstance(target, Mapping) and directive == "merge" else {}
    if _RETAIN in patch:
        kept = patch[_RETAIN]
        if not isinstance(kept, list):
            raise PatchError(f"{at or 'patch'}: {_RETAIN}: expected a list of names")
        merged = {name: value for name, value in merged.items() if name in kept}
    for name, value in wanted.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _strategic(merged.get(name), value, f"{at}.{name}".lstrip("."))
    return merged


def _refuse_directives(value: Any, at: str) -> None:
    """An element of a list that is replaced can have no directive."""
    for item in value if isinstance(value, list) else ():
        if isinstance(item, Mapping) and any(str(name).startswith("$") for name in item):
            raise PatchError(f"{at}: this list has no merge key, so it is replaced as a whole")


def json_patch(target: Any, patch: Any) -> Any:
    """The object with a JSON patch applied, all of it. Raises PatchError."""
    if not isinstance(patch, list):
        raise PatchError("expected a list of operations, each with op and path")
    document = copy.deepcopy(target)
    for number, operation in enumerate(patch):
        if not isinstance(operation, Mapping):
            raise PatchError(f"operation {number}: expected a mapping with op and path")
        try:
            document = _operate(document, operation)
        except PatchError as error:
            raise PatchError(f"operation {number}: {error}") from error
    return document


def _operate(document: Any, operation: Mapping[str, Any]) -> Any:
    path = _pointer(operation, "path")
    match operation.get("op"):
        case "add":
            return _add(document, path, _value(operation))
        case "replace":
            _at(document, path)
            return _add(_remove(document, path) if path else document, path, _value(operation))
        case "remove":
            _at(document, path)
            return _remove(document, path)
        case "test":
            if not _same(_at(document, path), operation.get("value")):
                raise PatchError(f"{operation['path']}: the test does not hold")
            return document
        case "copy":
            return _add(document, path, copy.deepcopy(_at(document, _pointer(operation, "from"))))
        case "move":
            source = _pointer(operation, "from")
            if path[: len(source)] == source and path != source:
                raise PatchError(f"{operation['from']}: can't be moved into itself")
            value = _at(document, source)
            return _add(_remove(document, source), path, value)
        case other:
            raise PatchError(
                f"op: {other!r}: expected add, remove, replace, move, copy or test (RFC 6902)"
            )


def _value(operation: Mapping[str, Any]) -> Any:
    if "value" not in operation:
        raise PatchError(f"op {operation['op']}: a value is missing")
    return copy.deepcopy(operation["value"])


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return bool(one == other)


def _pointer(operation: Mapping[str, Any], field: str) -> list[str]:
    """The steps of a JSON pointer; RFC 6901."""
    text = operation.get(field)
    if not isinstance(text, str) or (text and not text.startswith("/")):
        raise PatchError(f"{field}: {text!r}: expected a JSON pointer such as /spec/cidr")
    return [step.replace("~1", "/").replace("~0", "~") for step in text.split("/")[1:]]


def _at(document: Any, path: list[str]) -> Any:
    for depth, step in enumerate(path):
        if isinstance(document, Mapping) and step in document:
            document = document[step]
        elif isinstance(document, list) and (index := _index(step)) is not None:
            if index >= len(document):
                raise PatchError(f"/{'/'.join(path[: depth + 1])}: does not exist")
            document = document[index]
        else:
            raise PatchError(f"/{'/'.join(path[: depth + 1])}: does not exist")
    return document


def _index(step: str) -> int | None:
    plain = step.isascii() and step.isdecimal() and (step == "0" or step[0] != "0")
    return int(step) if plain else None


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent, last = _at(document, path[:-1]), path[-1]
    if isinstance(parent, dict):
        parent[last] = value
    elif isinstance(parent, list):
        index = len(parent) if last == "-" else _index(last)
        if index is None or index > len(parent):
            raise PatchError(f"/{'/'.join(path)}: expected a place in a list of {len(parent)}")
        parent.insert(index, value)
    else:
        raise PatchError(f"/{'/'.join(path)}: does not exist")
    return document


def _remove(document: Any, path: list[str]) -> Any:
    if not path:
        raise PatchError("the whole object can't be removed by a patch: manxctl delete")
    parent, last = _at(document, path[:-1]), path[-1]
    del parent[int(last) if isinstance(parent, list) else last]
    return document


PATCHES: Mapping[str, Patch] = {"strategic": strategic, "json": json_patch, "merge": merge}
