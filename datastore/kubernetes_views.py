"""Which objects of the Kubernetes API make up each kind, and at which URLs they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from api.kinds import CALICO, CORE, KINDS
from api.pods import account_profile, namespace_profile
from datastore.interface import JSON, Key
from datastore.kubernetes_translation import (
    account_profile_of,
    endpoint_of,
    namespace_profile_of,
    node_of,
    pod_of,
)


def itself(value: JSON) -> JSON:
    """An object that is kept as it is."""
    return value


@dataclass(frozen=True, slots=True)
class Source:
    """Objects of the API, by kind id, that ``convert`` turns into objects of a kind (or None)."""

    kind: str
    convert: Callable[[JSON], JSON | None] = itself

    def key(self, kind: str, value: JSON) -> Key:
        """The key of what ``convert`` made."""
        metadata = value["metadata"]
        return Key(kind, metadata["name"], metadata.get("namespace") or "")


_DERIVED: Mapping[str, tuple[Source, ...]] = {
    "WorkloadEndpoint": (Source("Pod", endpoint_of),),
    "Node": (Source("KubernetesNode", node_of),),
    "Profile": (
        Source("Namespace", namespace_profile_of),
        Source("ServiceAccount", account_profile_of),
    ),
}
# Kubernetes' own kinds, and the views of them.
GIVEN = frozenset(_DERIVED) | {kind.id for kind in KINDS.values() if kind.api_version != CALICO}
# Of a group that Kubernetes doesn't bring and few install: a server without it has none of them.
OPTIONAL = frozenset(
    kind.id for kind in KINDS.values() if kind.group == KINDS["ClusterNetworkPolicy"].group
)


def sources(kind: str) -> tuple[Source, ...]:
    """Where the objects of a kind come from."""
    return _DERIVED.get(kind) or (Source(kind),)


def is_derived(kind: str) -> bool:
    """Whether the objects of a kind are others in the API."""
    return kind in _DERIVED


def origin(key: Key) -> tuple[Source, Key] | None:
    """What an object comes from; None when no object can have that name."""
    found = sources(key.kind)
    match key.kind:
        case "WorkloadEndpoint":
            parts = pod_of(key)
            return parts and (found[0], Key("Pod", parts[1], key.namespace))
        case "Node":
            return found[0], Key("KubernetesNode", key.name)
        case "Profile":
            prefix, rest = key.name[:4], key.name[4:]
            if prefix == namespace_profile("") and rest:
                return found[0], Key("Namespace", rest)
            namespace, _, account = rest.partition(".")
            if account and key.name == account_profile(namespace, account):
                return found[1], Key("ServiceAccount", account, namespace)
            return None
    return found[0], key


def collection(kind: str, namespace: str | None = None) -> str:
    """The path of all objects of a kind, in one namespace or (None) in all."""
    known = KINDS[kind]
    root = "/api/v1" if known.api_version == CORE else f"/apis/{known.api_version}"
    space = f"/namespaces/{quote(namespace, safe='')}" if namespace and known.namespaced else ""
    return f"{root}{space}/{known.resource}"


def item(key: Key) -> str:
    """The path of one object."""
    return f"{collection(key.kind, key.namespace)}/{quote(key.name, safe='')}"
