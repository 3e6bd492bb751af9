"""From an ``api`` model to the structural schema of a CustomResourceDefinition.

What pydantic's own constraints say (types, enumerations, bounds, patterns) is translated; what
validators written in Python check is looked up in ``manifests.values`` (single values) and
``manifests.rules`` (values that depend on each other). A validator that stands in neither table
is an error: nothing is left out by forgetting.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterable
from datetime import timedelta
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, BaseModel, BeforeValidator, PlainSerializer
from pydantic.fields import FieldInfo

from api.fields import ANY_CASE, SelectorMark
from api.metadata import Model, OneOf, Resource
from manifests.rules import rules_of
from manifests.values import CHEAP, INT_OR_STRING, SETS, VALUES, Schema

SCALARS: dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer", "format": "int64"},
    float: {"type": "number"},
    str: {"type": "string"},
    timedelta: {"type": "string"},
    Any: {"x-kubernetes-preserve-unknown-fields": True},
}
INT64 = 1 << 63
CEL = "x-kubernetes-validations"


def resource_schema(model: type[Resource]) -> Schema:
    """The schema of a whole object: metadata is the API server's business."""
    schema = _object(model, 1)
    properties = schema["properties"]
    for name in ("apiVersion", "kind"):
        properties[name] = {"type": "string"}
    properties["metadata"] = {"type": "object"}
    schema["required"] = sorted({"metadata", *schema.get("required", [])})
    if "spec" not in schema["required"]:
        properties["spec"]["default"] = {}
    return schema


def _object(model: type[BaseModel], many: float) -> Schema:
    """A model of which an object holds ``many``."""
    schema: Schema = {"type": "object", "description": _description(model), "properties": {}}
    required = []
    for name, field in model.model_fields.items():
        alias = field.alias or name
        if field.exclude:
            continue
        schema["properties"][alias] = _field(model, name, field, many)
        if field.is_required():
            required.append(alias)
    if required:
        schema["required"] = sorted(required)
    if issubclass(model, OneOf):
        schema |= {"minProperties": 1, "maxProperties": 1}
    if rules := rules_of(model):
        schema[CEL] = [rule.as_schema() for rule in rules]
    return schema


def _description(model: type[BaseModel]) -> str:
    """A model's docstring, for readers of JSON."""
    text = inspect.cleandoc(model.__doc__ or "")
    for name, field in model.model_fields.items():
        text = text.replace(f"``{name}``", field.alias or name)
    return " ".join(text.replace("``", "").split())


def _field(model: type[BaseModel], name: str, field: FieldInfo, many: float) -> Schema:
    alias = field.alias or name
    if (model.__name__, alias) in CHEAP:
        many = math.inf
    schema = type_schema(field.annotation, field.metadata, many)
    if issubclass(model, Model) and alias in model.blank:
        schema = _or_blank(schema)
    kept = issubclass(model, Model) and alias in model.kept
    default = field.default
    if isinstance(default, bool | int | float | str) and (default or kept):
        schema["default"] = default
    elif kept and field.default_factory is not None and schema["type"] == "object":
        schema["default"] = {}
    if schema.get("type") == "array":
        schema |= _list_type(model, name, alias)
    return schema


def _or_blank(schema: Schema) -> Schema:
    """Empty text, which some write for an absent field, is let through."""
    schema = dict(schema)
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], ""]
    if "pattern" in schema:
        schema["pattern"] = f"^$|{schema['pattern']}"
    if "format" in schema and schema["type"] == "string":
        schema["anyOf"] = [{"format": schema.pop("format")}]
    if "anyOf" in schema and "x-kubernetes-int-or-string" not in schema:
        schema["anyOf"] = [*schema["anyOf"], {"maxLength": 0}]
    if CEL in schema:
        schema[CEL] = [rule | {"rule": f"self == '' || ({rule['rule']})"} for rule in schema[CEL]]
    return schema


def _list_type(model: type[BaseModel], name: str, alias: str) -> Schema:
    """How the API server merges a list, and whether it refuses repetitions."""
    if name == "conditions":
        return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    single = any(alias in SETS.get(base.__name__, ()) for base in model.__mro__)
    return {"x-kubernetes-list-type": "set" if single else "atomic"}


def type_schema(annotation: Any, marks: Iterable[Any], many: float) -> Schema:
    """The schema of a type with its constraints."""
    base, inner = _bare(annotation)
    marks = [*inner, *marks]
    if get_origin(base) is list:
        most = next((mark.max_length for mark in marks if isinstance(mark, MaxLen)), math.inf)
        (item,) = get_args(base)
        items = type_schema(item, (), many * most)
        if type(None) in get_args(item):
            items["nullable"] = True
        schema: Schema = {"type": "array", "items": items}
    elif get_origin(base) is dict:
        value = get_args(base)[1]
        schema = {"type": "object", "additionalProperties": type_schema(value, (), math.inf)}
    else:
        schema = _scalar(base, many)
    for mark in marks:
        schema = _apply(schema, mark, many)
    return schema


def _bare(annotation: Any) -> tuple[Any, list[Any]]:
    """A type without ``Annotated`` and ``| None``, and the constraints that stood there."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        base, inner = _bare(arguments[0])
        expanded = [m for mark in arguments[1:] for m in getattr(mark, "metadata", [mark])]
        return base, [*inner, *expanded]
    if origin in (Union, types.UnionType) and type(None) in arguments:
        (only,) = (argument for argument in arguments if argument is not type(None))
        return _bare(only)
    return annotation, []


def _scalar(base: Any, many: float) -> Schema:
    if base in SCALARS:
        return dict(SCALARS[base])
    if isinstance(base, type) and issubclass(base, BaseModel):
        return _object(base, many)
    values = get_args(base)
    if get_origin(base) is Literal:
        return {"type": "integer" if isinstance(values[0], int) else "string", "enum": [*values]}
    if set(values) == {int, str}:
        return dict(INT_OR_STRING)
    raise TypeError(f"{base!r} has no schema")


def _apply(schema: Schema, mark: Any, many: float) -> Schema:
    bounds = "Items" if schema.get("type") == "array" else "Length"
    match mark:
        case Ge(ge=int(bound)):
            return schema if bound == -INT64 else schema | {"minimum": bound}
        case Gt(gt=int(bound)):
            return schema | {"minimum": bound + 1}
        case Le(le=int(bound)):
            return schema | {"maximum": bound}
        case Lt(lt=int(bound)):  # what does not fit into 64 bits cannot be said
            return schema if bound >= INT64 else schema | {"maximum": bound - 1}
        case MinLen(min_length=length):
            return schema | {f"min{bounds}": length}
        case MaxLen(max_length=length):
            return schema | {f"max{bounds}": length}
        case AfterValidator() | BeforeValidator():
            value = VALUES[mark.func]
            return _merged(schema, value.exact if many <= value.most else value.cheap)
        case SelectorMark() | PlainSerializer():
            return schema
    if mark is ANY_CASE:
        words = "|".join(schema["enum"])
        return {"type": "string", "pattern": f"^(?i:{words})$"}
    if (pattern := getattr(mark, "pattern", None)) is not None:
        return schema | {"pattern": pattern}
    raise TypeError(f"{mark!r} has no schema")


def _merged(schema: Schema, more: Schema) -> Schema:
    """The values of ``more`` win; of CEL rules, all hold."""
    rules = [*schema.get(CEL, []), *more.get(CEL, [])]
    merged = schema | more
    if INT_OR_STRING.items() <= more.items():
        merged.pop("type", None)
        merged.pop("format", None)
    return merged | ({CEL: rules} if rules else {})
