"""Resources in files: read them, say of each where it stands, check them all at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from api.errors import InvalidObjectError, Problem
from api.kinds import CALICO, KINDS, Kind, key_parts, kind_of, name_of
from api.syntax import SyntaxProblemError, documents
from datastore.interface import JSON, Key, part

if TYPE_CHECKING:
    from api.metadata import Resource

SUFFIXES = (".yaml", ".yml", ".json")
DEFAULT_NAMESPACE = "default"

# Written by programs alone, and by which: IPAM keeps its objects consistent with each other, and
# whoever writes ClusterInformation unlocks a datastore that is being moved.
KEEPERS = {
    **dict.fromkeys(("IPAMBlock", "BlockAffinity", "IPAMHandle"), "IPAM keeps it"),
    "ClusterInformation": (
        "programs keep it; manxctl datastore migrate lock and unlock change its datastoreReady"
    ),
}
# The policies of tiers.
TIERED = (
    *("NetworkPolicy", "GlobalNetworkPolicy"),
    *("StagedNetworkPolicy", "StagedGlobalNetworkPolicy"),
)
IN_DEFAULT_TIER = "default."  # how names of policies in it may begin
# As Calico keeps its kinds in a Kubernetes without its API server: an object's own metadata is in
# an annotation, and not, or not all of it, where it belongs.
_CALICO_CRDS = "crd.projectcalico.org/v1"
_CALICO_CRD_METADATA = "projectcalico.org/metadata"
CONVERTED_PREFIX = "knp.default."


class DocumentsError(Exception):
    """Input that was refused: one complaint a line. Nothing of it was applied."""

    def __init__(self, complaints: Sequence[str]) -> None:
        self.complaints = tuple(complaints)
        super().__init__("\n".join(self.complaints))


@dataclass(frozen=True, slots=True)
class Document:
    """An object in a file. ``place`` names file and document: ``pools.yaml, document 2``."""

    place: str
    kind: Kind
    key: Key
    value: dict[str, Any]

    def complain(self, problem: Problem | str) -> str:
        """A complaint about this object."""
        return f"{self.place}: {self.title}: {problem}"

    @property
    def title(self) -> str:
        """What the object is called."""
        return title(self.key)


def title(key: Key) -> str:
    """An object as people call it: ``NetworkPolicy shop/web``, ``IPPool pods``."""
    return f"{KINDS[key.kind].kind} {key.namespace}/{key.name}".replace(" /", " ")


def read(sources: Sequence[str], namespace: str | None, *, recursive: bool) -> list[Document]:
    """The objects in files, directories and (``-``) standard input, lists taken apart.

    ``namespace`` is for namespaced objects that name none. Raises DocumentsError with
    everything that is wrong, also with the objects that could be read.
    """
    found: list[Document] = []
    complaints: list[str] = []
    for source, text in _texts(sources, recursive, complaints):
        try:
            for number, value in documents(text):
                place = f"{source}, document {number}"
                for where, item in _items(place, value):
                    try:
                        found.append(_document(where, item, namespace or DEFAULT_NAMESPACE))
                    except InvalidObjectError as error:
                        complaints += [
                            f"{where}: {error.title}: {problem}" for problem in error.problems
                        ]
        except SyntaxProblemError as error:
            complaints.append(f"{source}: {error}")
    places: dict[Key, str] = {}
    for document in found:
        if document.key in places:
            complaints.append(document.complain(f"stands in {places[document.key]}, too"))
        places[document.key] = document.place
    if complaints:
        raise DocumentsError(complaints + _checked(found)[1])
    return found


def check(found: Sequence[Document], *, limits: bool = True) -> list[Resource]:
    """The resources of the documents, in their order, valid every one.

    Without ``limits`` lists and selectors may be as long as those of stored objects. Raises
    DocumentsError with everything that is wrong with any of them.
    """
    resources, complaints = _checked(found, limits=limits)
    if complaints:
        raise DocumentsError(complaints)
    return resources


def _checked(found: Sequence[Document], *, limits: bool = True) -> tuple[list[Resource], list[str]]:
    """The resources of those documents that are right, the complaints about the others."""
    from api.fields import Stored
    from api.registry import validate
    from policy.selector import parse

    resources: list[Resource] = []
    complaints: list[str] = []
    for document in found:
        try:
            resource = validate(
                document.kind.model, document.value, selector=parse if limits else Stored(parse)
            )
        except InvalidObjectError as error:
            complaints += [document.complain(problem) for problem in error.problems]
        else:
            resources.append(resource)
            if (resource.namespace, resource.name) != (document.key.namespace, document.key.name):
                complaints.append(document.complain("metadata, name: expected in lower case"))
        complaints += [document.complain(problem) for problem in _not_by_hand(document)]
    return resources, complaints


def _not_by_hand(document: Document) -> Iterator[Problem]:
    """What is right, but written by others."""
    if keeper := KEEPERS.get(document.kind.id):
        yield Problem("kind", document.kind.kind, f"not written by hand: {keeper}")
    if document.kind.id == "NetworkPolicy" and document.key.name.startswith(CONVERTED_PREFIX):
        yield Problem(
            "metadata.name",
            document.key.name,
            f"not beginning with {CONVERTED_PREFIX}, which Kubernetes policies become:"
            f" write apiVersion {KINDS['KubernetesNetworkPolicy'].api_version} instead",
        )


def _texts(
    sources: Sequence[str], recursive: bool, complaints: list[str]
) -> Iterator[tuple[str, str]]:
    """Each file's name and text; what can't be read is added to ``complaints``."""
    for source in sources:
        if source == "-":
            yield from _text("standard input", sys.stdin.buffer.read, complaints)
            continue
        try:
            files = _files(Path(source), recursive)
        except OSError as error:
            complaints.append(f"{error.filename}: {error.strerror}")
            continue
        for file in files:
            yield from _text(str(file), file.read_bytes, complaints)


def _text(
    name: str, contents: Callable[[], bytes], complaints: list[str]
) -> Iterator[tuple[str, str]]:
    try:
        text = contents().decode("utf-8-sig")
    except OSError as error:
        complaints.append(f"{name}: {error.strerror}")
    except UnicodeDecodeError as error:
        complaints.append(f"{name}: byte {error.start}: expected UTF-8 text")
    else:
        yield name, text


def _files(path: Path, recursive: bool) -> list[Path]:
    """The file itself, or those in a directory. Raises OSError."""
    if not path.is_dir():
        return [path]
    inside = sorted(path.rglob("*") if recursive else path.iterdir())
    return [file for file in inside if file.suffix in SUFFIXES and file.is_file()]


def _items(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The object itself, or the items of a list, of ``kind: List``, ``IPPoolList`` and the like."""
    if isinstance(value, list):
        value = {"kind": "List", "items": value}
    kind = value.get("kind") if isinstance(value, dict) else None
    items = value.get("items") if isinstance(value, dict) else None
    if not (isinstance(kind, str) and kind.endswith("List") and isinstance(items, list)):
        yield place, value
        return
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict) and kind != "List":
            item = {"apiVersion": value.get("apiVersion"), "kind": kind[:-4]} | item
        yield f"{place}, item {number}", item


def _from_calico_crd(value: Any) -> Any:
    """The object as ``projectcalico.org/v3`` has it, where it is one of Calico's own CRDs.

    Raises InvalidObjectError. Source: libcalico-go/lib/backend/k8s/resources/resources.go.
    """
    if not isinstance(value, dict) or value.get("apiVersion") != _CALICO_CRDS:
        return value
    kind = value.get("kind")
    changed = {"apiVersion": CALICO, "kind": "IPAMConfiguration" if kind == "IPAMConfig" else kind}
    if not isinstance(value.get("metadata"), dict):
        return value | changed
    own = _own_metadata(value)
    metadata = value["metadata"] | {"name": own.get("name") or _name_in_tier(value)}
    for field in ("labels", "annotations"):
        if isinstance(metadata.get(field), dict | None):
            metadata[field] = (metadata.get(field) or {}) | (own.get(field) or {})
            metadata[field].pop(_CALICO_CRD_METADATA, None)
    return value | changed | {"metadata": metadata}


def _own_metadata(value: JSON) -> JSON:
    """What stands of an object's own metadata in the annotation of its CRD."""
    text = part(part(value, "metadata"), "annotations").get(_CALICO_CRD_METADATA, "{}")
    try:
        own = orjson.loads(text)
        types = {"name": str, "labels": dict, "annotations": dict}
        if isinstance(own, dict) and all(
            isinstance(own.get(field), type_ | None) for field, type_ in types.items()
        ):
            return own
    except ValueError:
        pass
    field = f"metadata.annotations.{_CALICO_CRD_METADATA}"
    problem = Problem(field, text, "JSON, an object's metadata as Calico keeps it there")
    raise InvalidObjectError(str(value.get("kind")), name_of(value), [problem])


def _name_in_tier(value: JSON) -> str:
    """The name of an object without that of the default tier, with which CRDs begin."""
    name = name_of(value)
    return name.removeprefix(IN_DEFAULT_TIER) if in_default_tier(value) else name


def in_default_tier(value: JSON) -> bool:
    """Whether it is a policy, in the tier of those that name none."""
    tier = part(value, "spec").get("tier")
    return value.get("kind") in TIERED and tier in (None, "", "default")


def _document(place: str, value: Any, namespace: str) -> Document:
    value = _from_calico_crd(value)
    kind = kind_of(value)
    metadata = value.get("metadata")
    if kind.namespaced and isinstance(metadata, dict) and not metadata.get("namespace"):
        value = value | {"metadata": metadata | {"namespace": namespace}}
    kind_id, space, name = key_parts(value)
    return Document(place, kind, Key(kind_id, name, space), value)
