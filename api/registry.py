"""All kinds: find one by what people write, parse an object into its model and back."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from api.bgp import BGPConfiguration, BGPPeer
from api.endpoint import WorkloadEndpoint
from api.errors import InvalidObjectError, Problem
from api.felix import FelixConfiguration
from api.fields import SELECTOR
from api.ipam import BlockAffinity, IPAMBlock, IPAMConfiguration, IPAMHandle
from api.ippool import IPPool
from api.kubernetes import KubernetesNetworkPolicy, Namespace, Pod
from api.metadata import Resource
from api.node import Node
from api.policy import GlobalNetworkPolicy, NetworkPolicy, Tier

CALICO = "projectcalico.org/v3"
R = TypeVar("R", bound=Resource)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of resource. ``id`` is unique where ``kind`` is not (two NetworkPolicies)."""

    id: str
    api_version: str
    kind: str
    plural: str
    short_names: tuple[str, ...]
    namespaced: bool
    model: type[Resource]


def _kind(model: type[Resource], plural: str, *short_names: str, api_version: str = CALICO) -> Kind:
    (kind,) = get_args(model.model_fields["kind"].annotation)
    return Kind(model.__name__, api_version, kind, plural, short_names, model.namespaced, model)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.id: kind
        for kind in (
            _kind(IPPool, "ippools", "pool", "pools"),
            _kind(BGPConfiguration, "bgpconfigurations", "bgpconfig", "bgpconfigs"),
            _kind(BGPPeer, "bgppeers"),
            _kind(Node, "nodes", "no"),
            _kind(WorkloadEndpoint, "workloadendpoints", "wep", "weps"),
            _kind(NetworkPolicy, "networkpolicies", "np", "policy", "policies"),
            _kind(GlobalNetworkPolicy, "globalnetworkpolicies", "gnp", "gnps"),
            _kind(Tier, "tiers"),
            _kind(FelixConfiguration, "felixconfigurations", "felixconfig", "felixconfigs"),
            _kind(IPAMBlock, "ipamblocks", "block", "blocks"),
            _kind(BlockAffinity, "blockaffinities", "affinity", "affinities"),
            _kind(IPAMHandle, "ipamhandles", "handle", "handles"),
            _kind(IPAMConfiguration, "ipamconfigurations", "ipamconfig", "ipamconfigs"),
            _kind(Namespace, "namespaces", "ns", api_version="v1"),
            _kind(Pod, "pods", "po", api_version="v1"),
            _kind(
                KubernetesNetworkPolicy,
                "kubernetesnetworkpolicies",
                "knp",
                "netpol",
                api_version="networking.k8s.io/v1",
            ),
        )
    }
)

_BY_TYPE = {(kind.api_version, kind.kind): kind for kind in KINDS.values()}
_BY_WORD = {
    word: kind
    for kind in KINDS.values()
    for word in (kind.id.lower(), kind.plural, *kind.short_names)
}


def kind_of(obj: object) -> Kind:
    """The kind an object says it is. Raises InvalidObjectError."""
    if not isinstance(obj, Mapping):
        raise InvalidObjectError("object", "", [Problem("", obj, "a mapping with a kind")])
    api_version, word = obj.get("apiVersion"), obj.get("kind")
    name = _name(obj)
    try:
        return _BY_TYPE[api_version, word]  # type: ignore[index]
    except (KeyError, TypeError):
        pass
    versions = [kind.api_version for kind in KINDS.values() if kind.kind == word]
    if versions:
        problem = Problem("apiVersion", api_version, " or ".join(versions))
    else:
        problem = Problem(
            "kind", word, _nearest("a kind Manx knows", word, [k.kind for k in KINDS.values()])
        )
    raise InvalidObjectError(str(word or "object"), name, [problem])


def find_kind(word: str) -> Kind:
    """The kind a command line means: plural, singular or short name, in any case.

    Raises LookupError, which suggests the nearest.
    """
    try:
        return _BY_WORD[word.lower()]
    except KeyError:
        expected = _nearest("no such kind", word.lower(), list(_BY_WORD))
        raise LookupError(f"{word!r}: {expected}") from None


def parse(obj: object) -> Resource:
    """The model of an object, validated, defaults filled in.

    Raises InvalidObjectError, which holds everything that is wrong.
    """
    return validate(kind_of(obj).model, obj)


def parse_as(kind_id: str, obj: object) -> Resource:
    """As ``parse``, for an object whose kind is known (apiVersion and kind may be absent)."""
    return validate(KINDS[kind_id].model, obj)


def dump(resource: Resource) -> dict[str, Any]:
    """The object as JSON values, by JSON names, without what is absent or empty."""
    data: dict[str, Any] = resource.model_dump(mode="json", by_alias=True)
    return data


def key_parts(obj: Mapping[str, Any]) -> tuple[str, str, str]:
    """Kind id, namespace (empty if there is none) and name. Raises InvalidObjectError."""
    kind = kind_of(obj)
    metadata = obj.get("metadata")
    namespace = metadata.get("namespace") if isinstance(metadata, Mapping) else None
    return kind.id, str(namespace or ""), _name(obj)


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


def validate(model: type[R], obj: object) -> R:
    """As ``parse``, for a model that is stored nowhere and so is none of ``KINDS``."""
    try:
        return model.model_validate(obj, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = [_problem(model, detail) for detail in error.errors(include_url=False)]
    (kind,) = get_args(model.model_fields["kind"].annotation)
    raise InvalidObjectError(kind, _name(obj), problems)


def _name(obj: object) -> str:
    metadata = obj.get("metadata") if isinstance(obj, Mapping) else None
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    return name if isinstance(name, str) else ""


def _problem(model: type[BaseModel], detail: Any) -> Problem:
    location = detail["loc"]
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        value, expected = None, "required"
    elif kind == "extra_forbidden":
        expected = _nearest("no such field", str(location[-1]), _fields_at(model, location[:-1]))
    else:
        expected = detail["msg"].removeprefix("Input should be ")
    return Problem(_path(location), value, expected)


def _path(location: tuple[int | str, ...]) -> str:
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


def _nearest(complaint: str, word: object, words: list[str]) -> str:
    close = difflib.get_close_matches(str(word), words, n=1)
    return f"{complaint}; did you mean {close[0]}?" if close else complaint


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
