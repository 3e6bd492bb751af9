"""All kinds: find one by what people write, parse an object into its model and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from api.errors import UNREADABLE, InvalidObjectError, Problem
from api.fields import SELECTOR, stored
from api.kinds import KINDS, Kind, find_kind, key_parts, kind_of, name_of, nearest
from api.metadata import Resource

__all__ = [
    "KINDS",
    "Kind",
    "check_update",
    "dump",
    "find_kind",
    "key_parts",
    "kind_of",
    "known_part",
    "parse",
    "parse_as",
    "parse_stored",
    "selectors",
    "validate",
]

R = TypeVar("R", bound=Resource)
Check = Callable[[str], object]


def parse(obj: object, *, selector: Check | None = None) -> Resource:
    """The model of an object, validated, defaults filled in.

    ``selector`` checks the syntax of a selector (``policy.selector.parse``): it raises
    ValueError. Raises InvalidObjectError, which holds everything that is wrong.
    """
    return validate(kind_of(obj).model, obj, selector=selector)


def parse_as(kind_id: str, obj: object) -> Resource:
    """As ``parse``, for an object whose kind is known (apiVersion and kind may be absent)."""
    return validate(KINDS[kind_id].model, obj)


def parse_stored(kind_id: str, obj: object) -> Resource:
    """As ``parse_as``, for an object that may be older than the limits of what is written now."""
    return validate(KINDS[kind_id].model, obj, selector=stored)


def known_part(kind_id: str, obj: Mapping[str, Any]) -> Mapping[str, Any]:
    """An object without the fields that are not known here: a newer Calico may have written them.

    Of a list's element such a field could be a condition: the element goes as a whole. Only for
    kinds in which it can't be one elsewhere. Of an object that nobody can read nothing is known: it
    stays as it is.
    """
    spec = obj.get("spec")
    if isinstance(spec, Mapping) and UNREADABLE in spec:
        return obj
    try:
        KINDS[kind_id].model.model_validate(obj, by_alias=True, by_name=False)
    except ValidationError as error:
        details = error.errors(include_url=False)
        unknown = (each["loc"] for each in details if each["type"] == "extra_forbidden")
        known = copy.deepcopy(dict(obj))
        # the last first, so that elements before it keep their places
        for location in reversed(dict.fromkeys(map(_element, unknown))):
            _remove(known, location)
        return known
    return obj


def dump(resource: Resource) -> dict[str, Any]:
    """The object as JSON values, by JSON names, without what is absent or empty."""
    data: dict[str, Any] = resource.model_dump(mode="json", by_alias=True)
    return data


def check_update(old: Resource, new: Resource) -> None:
    """Raises InvalidObjectError where ``new`` changes what must stay as it was in ``old``."""
    faults = list(new.update_faults(old))
    if faults:
        raise InvalidObjectError(
            new.kind,
            new.name,
            [Problem(_path(fault.where), fault.value, fault.expected) for fault in faults],
        )


def selectors(model: BaseModel, at: str = "") -> Iterator[tuple[str, str]]:
    """Every selector in a resource, as (path, text). ``policy.selector`` knows the syntax."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        path = f"{at}.{field.alias or name}".removeprefix(".")
        if SELECTOR in field.metadata:
            if value:
                yield path, value
        elif isinstance(value, BaseModel):
            yield from selectors(value, path)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from selectors(item, f"{path}[{index}]")


def validate(model: type[R], obj: object, *, selector: Check | None = None) -> R:
    """As ``parse``, for an object whose model is known, also one that is none of ``KINDS``."""
    try:
        spec = obj.get("spec") if isinstance(obj, Mapping) else None
        # Also where the model reads only what it needs, and would find nothing wrong.
        if not isinstance(spec, Mapping) or UNREADABLE not in spec:
            return model.model_validate(obj, by_alias=True, by_name=False, context=selector)
        path, expected = f"spec.{UNREADABLE}", "no such field: an object that can be read"
        found = [Problem(path, spec[UNREADABLE], expected)]
    except ValidationError as error:
        found = problems(model, error)
    (kind,) = get_args(model.model_fields["kind"].annotation)
    raise InvalidObjectError(kind, name_of(obj), found)


def problems(model: type[BaseModel], error: ValidationError) -> list[Problem]:
    """What a model refused, each with its field, the value and what would be right."""
    return [_problem(model, detail) for detail in error.errors(include_url=False)]


def _problem(model: type[BaseModel], detail: Any) -> Problem:
    location = detail["loc"]
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        value, expected = None, "required"
    elif kind == "extra_forbidden":
        expected = nearest("no such field", str(location[-1]), _fields_at(model, location[:-1]))
    elif kind in ("model_type", "dict_type"):
        expected = "a mapping"
    else:
        expected = detail["msg"].removeprefix("Input should be ")
    return Problem(_path(location), value, expected)


def _element(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The element of a list that a field is in, or the field where it is in none."""
    indices = (end for end, step in enumerate(location, 1) if isinstance(step, int))
    return location[: next(indices, None)]


def _remove(at: Any, location: tuple[int | str, ...]) -> None:
    """Take out what is there, by names in whatever case; one that isn't found stays."""
    first, *rest = location
    if isinstance(first, int):
        del at[first]
        return
    for name in [name for name in at if str(name).lower() == first.lower()]:
        if not rest:
            del at[name]
        elif isinstance(at[name], Mapping | list):
            _remove(at[name], tuple(rest))


def _path(location: tuple[int | str, ...]) -> str:
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """JSON names of the fields that the object at ``location`` may have."""
    at: Any = model
    for step in location:
        if isinstance(step, str) and isinstance(at, type) and issubclass(at, BaseModel):
            fields = (f for n, f in at.model_fields.items() if step in (f.alias, n))
            at = _model_in(next(fields).annotation)
    return [f.alias or n for n, f in at.model_fields.items()] if at else []


def _model_in(annotation: Any) -> Any:
    """The model inside ``X | None``, ``list[X]``, ``Annotated[X, …]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for inner in get_args(annotation) if (m := _model_in(inner))), None)
