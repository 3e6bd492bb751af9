"""What every resource has: the strict base model, object metadata, the resource itself.

Attributes are snake_case, JSON names are Calico's and Kubernetes' camelCase. As Go's
decoder does for calicoctl and kubectl, field names are matched without regard to case, and
null, or an empty text in an optional field that holds text, means that the field is absent
(where Calico tells the empty text from the absent one, a model names the field in ``verbatim``).
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails

from api.fields import (
    QUALIFIED_NAME,
    SUBDOMAIN,
    Name,
    Number,
    Timestamp,
    is_label_value,
    is_qualified_name,
    is_subdomain,
    refuse,
)

MAX_ANNOTATIONS = 256 * 1024  # bytes, as the Kubernetes API server


class Fault(NamedTuple):
    """A contradiction in a model: where (JSON names), what stands there, what would be right."""

    where: tuple[str | int, ...]
    value: object
    expected: str


def _may_be_text(annotation: Any) -> bool:
    """Whether a field of this type can hold text: ``str``, ``Literal["a"] | None``, …"""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return any(isinstance(value, str) for value in arguments)
    if origin in (list, dict):
        return False
    return annotation is str or any(map(_may_be_text, arguments))


class Model(BaseModel):
    """Base of everything inside a resource. Unknown fields are refused."""

    model_config = ConfigDict(
        strict=True,
        allow_inf_nan=False,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        defer_build=True,  # a program pays only for the kinds it uses
    )

    kept: ClassVar[frozenset[str]] = frozenset()  # JSON names to write even when false or empty
    verbatim: ClassVar[frozenset[str]] = frozenset()  # JSON names whose empty text is not "absent"
    _names: ClassVar[dict[str, str]]  # lower-case JSON name -> JSON name
    _known: ClassVar[frozenset[str]]  # JSON names and attribute names
    blank: ClassVar[frozenset[str]]  # JSON names whose empty text means absent
    _omitted: ClassVar[frozenset[str]]  # JSON names not written when false or empty (not: None)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        cls._names = {alias.lower(): alias for alias in fields}
        cls._known = frozenset(fields) | frozenset(cls.model_fields)
        cls.blank = (
            frozenset(
                name
                for name, field in fields.items()
                if not field.is_required() and _may_be_text(field.annotation)
            )
            - cls.verbatim
        )
        cls._omitted = (
            frozenset(
                name
                for name, field in fields.items()
                if field.default_factory or field.default in (False, 0, "")
            )
            - cls.kept
        )

    @model_validator(mode="before")
    @classmethod
    def _as_go_decodes(cls, data: object) -> object:
        """Field names in any case; null and empty text in optional fields are absent."""
        if not isinstance(data, dict):
            return data
        if data.keys() <= cls._known and all(v is not None and v != "" for v in data.values()):
            return data
        result: dict[object, object] = {}
        for key, value in data.items():
            name = key
            if key not in cls._known and isinstance(key, str):
                name = cls._names.get(key.lower(), key)
            if value is None or (value == "" and name in cls.blank):
                continue
            if name in result:
                raise refuse(f"{name!r} must be given only once")
            result[name] = value
        return result

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        omitted = self._omitted
        return {
            name: value
            for name, value in handler(self).items()
            if value is not None and (value or name not in omitted)
        }


class Checked(Model):
    """A model whose fields can contradict each other: it names every contradiction at once."""

    def faults(self) -> Iterable[Fault]:
        """What is wrong although each field by itself is right."""
        return ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = list(self.faults())
        if faults:
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(
                        type=refuse(fault.expected), loc=fault.where, input=fault.value
                    )
                    for fault in faults
                ],
            )
        return self


class OneOf(Checked):
    """A choice: exactly one field is set."""

    def faults(self) -> Iterable[Fault]:
        """None, or more than one."""
        fields = type(self).model_fields
        present = [f.alias or n for n, f in fields.items() if getattr(self, n) is not None]
        if len(present) != 1:
            names = ", ".join(field.alias or name for name, field in fields.items())
            yield Fault((), present, f"exactly one of {names}")


class OwnerReference(Model):
    """Who owns an object (metadata.ownerReferences[])."""

    model_config = ConfigDict(extra="ignore")

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool | None = None
    block_owner_deletion: bool | None = None


class ObjectMeta(Checked):
    """metadata of every resource. ``name`` is empty only in objects that were never stored."""

    name: str = ""
    namespace: Name | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    uid: str | None = None
    resource_version: str | None = None
    generation: Number | None = None
    generate_name: str | None = None
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    deletion_grace_period_seconds: Number | None = None
    finalizers: list[str] = Field(default_factory=list)
    owner_references: list[OwnerReference] = Field(default_factory=list)
    managed_fields: Any = Field(default=None, exclude=True)  # the API server's book-keeping
    self_link: Any = Field(default=None, exclude=True)

    def faults(self) -> Iterator[Fault]:
        """Labels and annotations that Kubernetes would refuse."""
        yield from label_faults(self.labels, ("labels",))
        yield from annotation_faults(self.annotations, ("annotations",))


def label_faults(labels: dict[str, str], where: tuple[str | int, ...]) -> Iterator[Fault]:
    """Labels that Kubernetes would refuse; ``where`` is where they stand."""
    for key, value in labels.items():
        if not is_qualified_name(key):
            yield Fault((*where, key), key, f"a label key: {QUALIFIED_NAME}")
        if not is_label_value(value):
            yield Fault(
                (*where, key),
                value,
                "a label value: at most 63 letters, digits, '-', '_', '.', "
                "the first and last a letter or digit",
            )


def annotation_faults(annotations: dict[str, str], where: tuple[str | int, ...]) -> Iterator[Fault]:
    """Annotations that Kubernetes would refuse; ``where`` is where they stand."""
    for key in annotations:
        if not is_qualified_name(key.lower()):
            yield Fault((*where, key), key, f"an annotation key: {QUALIFIED_NAME}")
    size = sum(len(k.encode()) + len(v.encode()) for k, v in annotations.items())
    if size > MAX_ANNOTATIONS:
        yield Fault(where, f"{size} bytes", f"at most {MAX_ANNOTATIONS} bytes in all")


CONDITION_TYPE = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]$"
)
CONDITION_REASON = r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"


class Condition(Model):
    """One statement about an object (status.conditions[]), as in all of Kubernetes."""

    type: Annotated[str, Field(max_length=316, pattern=CONDITION_TYPE)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(max_length=1024, pattern=CONDITION_REASON)]
    message: Annotated[str, Field(max_length=32768)]
    last_transition_time: Timestamp
    observed_generation: Number | None = None


class Status(Model):
    """status of resources that have conditions only."""

    conditions: list[Condition] = Field(default_factory=list)


class Resource(Checked):
    """An object users write or read: apiVersion, kind, metadata and, in subclasses, spec."""

    namespaced: ClassVar[bool] = False

    api_version: str
    kind: str
    metadata: ObjectMeta

    @property
    def name(self) -> str:
        """metadata.name."""
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """metadata.namespace, empty for cluster-scoped kinds."""
        return self.metadata.namespace or ""

    def name_expected(self) -> str | None:
        """What the name should be, None when it is right. Subclasses narrow it."""
        return None if is_subdomain(self.name) else SUBDOMAIN

    def update_faults(self, old: Self) -> Iterator[Fault]:
        """What must not change from ``old`` to this object, and did."""
        return iter(())

    def faults(self) -> Iterator[Fault]:
        """A wrong name, or a namespace where there is none."""
        if not self.name:
            yield Fault(("metadata", "name"), "", "required")
        elif expected := self.name_expected():
            yield Fault(("metadata", "name"), self.name, expected)
        if self.namespace and not self.namespaced:
            yield Fault(
                ("metadata", "namespace"), self.namespace, f"absent: {self.kind} has no namespace"
            )


class CalicoResource(Resource):
    """A projectcalico.org/v3 resource."""

    api_version: Literal["projectcalico.org/v3"] = "projectcalico.org/v3"
