"""Objects as the Kubernetes API sends them, decoded with only what Manx reads.

Of Pods and Nodes, which are many and large, a typed decoder keeps the fields that api.kubernetes
names and skips the rest unread; other objects are kept whole, but for the API server's own
book-keeping.
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.kinds import KINDS
from datastore.interface import JSON, part


class _Slim(msgspec.Struct, omit_defaults=True, rename="camel", gc=False):
    """Base of the typed objects: fields that are absent or null stay absent."""


class _Owner(_Slim):
    api_version: str = ""
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool = False


class _Metadata(_Slim):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generate_name: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: list[_Owner] | None = None


class _Port(_Slim):
    name: str | None = None
    container_port: int = 0
    protocol: str | None = None
    host_port: int | None = None
    host_ip: str | None = msgspec.field(default=None, name="hostIP")


class _Container(_Slim):
    name: str = ""
    ports: list[_Port] | None = None


class _PodSpec(_Slim):
    node_name: str | None = None
    host_network: bool | None = None
    service_account_name: str | None = None
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = None


class _Address(_Slim):
    ip: str | None = None


class _PodStatus(_Slim):
    phase: str | None = None
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    pod_ips: list[_Address] | None = msgspec.field(default=None, name="podIPs")


class _Pod(_Slim):
    metadata: _Metadata
    spec: _PodSpec = msgspec.field(default_factory=_PodSpec)
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)


class _NodeSpec(_Slim):
    pod_cidr: str | None = msgspec.field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    unschedulable: bool | None = None


class _NodeAddress(_Slim):
    type: str = ""
    address: str = ""


class _NodeCondition(_Slim):
    type: str = ""
    status: str = ""


class _NodeStatus(_Slim):
    addresses: list[_NodeAddress] | None = None
    conditions: list[_NodeCondition] | None = None


class _Node(_Slim):
    metadata: _Metadata
    spec: _NodeSpec = msgspec.field(default_factory=_NodeSpec)
    status: _NodeStatus = msgspec.field(default_factory=_NodeStatus)


class _ListMeta(_Slim):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct, gc=False):
    metadata: _ListMeta
    items: list[msgspec.Raw] = []


class _Object(msgspec.Struct, gc=False):
    metadata: _ListMeta


class _Event(msgspec.Struct, gc=False):
    type: str
    object: msgspec.Raw


class Status(msgspec.Struct, rename="camel"):
    """metav1.Status: what the API server says of a request it did not carry out."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: dict[str, Any] | None = None


_LIST = msgspec.json.Decoder(_List)
_OBJECT = msgspec.json.Decoder(_Object)
_EVENT = msgspec.json.Decoder(_Event)
_STATUS = msgspec.json.Decoder(Status)
_WHOLE = msgspec.json.Decoder(dict[str, Any])
SLIM: dict[str, msgspec.json.Decoder[Any]] = {
    "Pod": msgspec.json.Decoder(_Pod),
    "KubernetesNode": msgspec.json.Decoder(_Node),
}
# Marks a write that changes nothing, which the API server would not count as one. Not shown.
REWRITTEN = "manx/rewritten"
_BOOK_KEEPING = ("managedFields", "selfLink")
# kubectl's copy of the whole object, which nobody here reads
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


class UndecodableError(ValueError):
    """An answer that is not what the API says it is."""


def decode(kind: str, data: bytes | msgspec.Raw) -> tuple[JSON, str]:
    """An object and its resource version, which the object does not hold any more.

    Raises UndecodableError.
    """
    try:
        slim = SLIM.get(kind)
        value: JSON = msgspec.to_builtins(slim.decode(data)) if slim else _WHOLE.decode(data)
        metadata = value["metadata"]
        for name in _BOOK_KEEPING:
            metadata.pop(name, None)
        revision = metadata.pop("resourceVersion")
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as error:
        raise UndecodableError(f"{kind}: {error}") from error
    if annotations := metadata.get("annotations"):
        annotations.pop(REWRITTEN, None)
        if slim:
            annotations.pop(_LAST_APPLIED, None)
        if not annotations:
            del metadata["annotations"]
    # items of lists of the built-in kinds do not say what they are
    value["apiVersion"] = KINDS[kind].api_version
    value["kind"] = KINDS[kind].kind
    return value, revision


def identity(kind: str, data: bytes | msgspec.Raw) -> tuple[JSON, str]:
    """Of an object that can't be read: all that can, and its resource version.

    Raises UndecodableError where not even the name can be told.
    """
    try:
        value = _WHOLE.decode(data)
    except msgspec.MsgspecError as error:
        raise UndecodableError(f"{kind}: {error}") from error
    metadata = part(value, "metadata")
    revision = metadata.get("resourceVersion")
    if not isinstance(revision, str) or not isinstance(metadata.get("name"), str):
        raise UndecodableError(f"{kind}: metadata: expected a name and a resourceVersion")
    return value, revision


def revision_of(kind: str, data: msgspec.Raw) -> str:
    """The resource version of an object, or of the bookmark it is. Raises UndecodableError."""
    try:
        revision = _OBJECT.decode(data).metadata.resource_version
    except msgspec.MsgspecError as error:
        raise UndecodableError(f"{kind}: {error}") from error
    if not revision.isdecimal():
        raise UndecodableError(f"{kind}: metadata.resourceVersion: {revision!r}: not a number")
    return revision


def decode_list(kind: str, data: bytes) -> tuple[list[msgspec.Raw], str, str]:
    """A list's objects (not decoded), where the next part begins, and its resource version.

    Raises UndecodableError.
    """
    try:
        found = _LIST.decode(data)
    except msgspec.MsgspecError as error:
        raise UndecodableError(f"list of {kind}: {error}") from error
    return found.items, found.metadata.continue_, found.metadata.resource_version


def decode_event(line: bytes) -> tuple[str, msgspec.Raw]:
    """The type and the object (not decoded) of a line of a watch. Raises UndecodableError."""
    try:
        event = _EVENT.decode(line)
    except msgspec.MsgspecError as error:
        raise UndecodableError(f"watch: {error}") from error
    return event.type, event.object


def decode_status(data: bytes | msgspec.Raw) -> Status:
    """What went wrong; the text itself where it is no Status."""
    try:
        return _STATUS.decode(data)
    except msgspec.MsgspecError:
        return Status(message=bytes(data).decode(errors="replace").strip()[:500])
