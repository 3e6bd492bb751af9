"""Which objects of the Kubernetes API make up each kind, and at which URLs they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

import msgspec

from api.kinds import CALICO, CORE, KINDS
from api.names import workload_endpoint_name
from api.pods import KUBERNETES, account_profile, namespace_profile
from datastore.interface import JSON, Entry, Key, part
from datastore.kubernetes_objects import UndecodableError, decode, identity
from datastore.kubernetes_translation import (
    ENDPOINT,
    account_profile_of,
    endpoint_of,
    namespace_profile_of,
    node_of,
    pod_of,
)
from datastore.unreadable import stand_in

# What code that reads an object meets in one that is not as the API says.
_ODD = (ValueError, LookupError, TypeError, AttributeError)

_log = logging.getLogger(__name__)


def itself(value: JSON) -> JSON:
    """An object that is kept as it is."""
    return value


@dataclass(frozen=True, slots=True)
class Source:
    """Objects of the API, by kind id, that ``convert`` turns into objects of a kind (or None)."""

    kind: str
    convert: Callable[[JSON], JSON | None] = itself

    def read(self, kind: str, data: bytes | msgspec.Raw) -> Entry | None:
        """The object of ``kind`` that the API's object is; None where it is none.

        For one that can't be read stands what says so. One without even a name, which nothing
        can stand for, is none: the log tells of it.
        """
        try:
            try:
                value, revision = decode(self.kind, data)
                view = self.convert(value)
                if view is None:
                    return None
                metadata = view["metadata"]
                key = Key(kind, metadata["name"], metadata.get("namespace") or "")
                return Entry(key, view, revision)
            except _ODD as error:
                return self._unread(kind, data, error)
        except UndecodableError as error:
            _log.error("an object that can't be read is left out: %s", error)
            return None

    def _unread(self, kind: str, data: bytes | msgspec.Raw, error: Exception) -> Entry | None:
        found, revision = identity(self.kind, data)
        metadata = part(found, "metadata")
        name, namespace = metadata["name"], metadata.get("namespace")
        of = Key(self.kind, name, namespace if isinstance(namespace, str) else "")
        match self.kind, kind:
            case "Pod", "WorkloadEndpoint":
                node = part(found, "spec").get("nodeName")
                if not node or not isinstance(node, str):
                    return None  # on no node yet
                endpoint = workload_endpoint_name(node, KUBERNETES, name, ENDPOINT)
                key = Key(kind, endpoint, of.namespace)
            case "Namespace", "Profile":
                key = Key(kind, namespace_profile(name))
            case "ServiceAccount", "Profile":
                key = Key(kind, account_profile(of.namespace, name))
            case _:
                key = Key(kind, name, of.namespace)
        told = error if isinstance(error, UndecodableError) else UndecodableError(repr(error))
        return Entry(key, stand_in(key, item(of), told), revision)


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
# Of a group that Kubernetes doesn't bring and few install, and what it has from 1.33 on: a server
# that doesn't know them has none of them.
OPTIONAL = frozenset(
    kind.id for kind in KINDS.values() if kind.group == KINDS["ClusterNetworkPolicy"].group
) | {"ServiceCIDR"}


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
