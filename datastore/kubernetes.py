"""The store in a Kubernetes API server: Calico's CRDs, and the cluster's own objects.

WorkloadEndpoint, v3 Node and Profile are views of Pods, Nodes, Namespaces and ServiceAccounts
(``datastore.kubernetes_translation``): they come and go with those, and writing one changes
annotations. Revisions are resource versions. A write that changes nothing still gives the object
a new one, by an annotation that is not shown. Unknown fields are refused, never dropped.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Entry,
    Key,
    Listing,
    NotFoundError,
    RevisionGoneError,
    StoreError,
    UnavailableError,
)
from datastore.kubernetes_client import (
    MERGE_PATCH,
    ApiServer,
    KubernetesSettings,
    RequestError,
    is_absent,
)
from datastore.kubernetes_objects import REWRITTEN, SLIM, UndecodableError, decode, decode_list
from datastore.kubernetes_translation import (
    RELEASED,
    difference,
    node_annotations,
    pod_annotations,
)
from datastore.kubernetes_views import (
    GIVEN,
    OPTIONAL,
    Source,
    collection,
    is_derived,
    item,
    origin,
    sources,
)
from datastore.kubernetes_watch import BEGINNING, KubernetesWatch

_PART = 500  # objects in one answer
_ATTEMPTS = 20  # at what others change meanwhile, or forget
_STRICT = {"fieldValidation": "Strict"}
_SERVERS_OWN = ("resourceVersion", "uid", "creationTimestamp", "generation")

# of a view, where there is nothing to view
_MADE_BY = {
    "Node": "Kubernetes has no Node of that name; its kubelet registers it: make sure that it runs,"
    " and that MANX_NODENAME is the name it uses",
    "WorkloadEndpoint": "Kubernetes has no such Pod on that node",
}

_log = logging.getLogger(__name__)


class UnselectableError(Exception):
    """The API server can't select by that field."""


class KubernetesDatastore:
    """A ``Datastore`` in a Kubernetes API server. Nothing is opened before the first operation.

    Every operation may raise UnavailableError. After one from a write its outcome is unknown
    where the message says so.
    """

    def __init__(self, settings: KubernetesSettings) -> None:
        self.settings = settings
        self._server = ApiServer(settings)
        self._watches: weakref.WeakSet[KubernetesWatch] = weakref.WeakSet()
        self._watches_lock = threading.Lock()
        self._unselectable: set[tuple[str, str]] = set()  # kinds and fields

    @property
    def given(self) -> frozenset[str]:
        """Kubernetes' own kinds, and the views of them."""
        return GIVEN

    def get(self, key: Key) -> Entry:
        """The object. Raises NotFoundError."""
        return self._origin(key)[1]

    def list(self, kind: str, namespace: str | None = None, prefix: str = "") -> Listing:
        """The objects of a kind, sorted by key, in one namespace or (None) in all.

        ``prefix``: only those whose names begin with it; the API server reads and sends all.
        Of an optional kind that is not installed there are none.
        """
        entries: dict[Key, Entry] = {}
        revisions = []
        for source in sources(kind):
            found, revision = self._list(kind, source, namespace)
            entries |= {key: entry for key, entry in found.items() if key.name.startswith(prefix)}
            revisions.append(revision)
        return Listing([entries[key] for key in sorted(entries)], ",".join(revisions))

    def list_by_field(self, kind: str, path: str, value: str) -> Listing:
        """The objects of a cluster-scoped kind with that value at ``path``: ``spec.node``.

        The API server sends these alone, where the CRD has the field among its selectableFields.
        Calico's CRDs don't: then it sends all.
        """
        (source,) = sources(kind)
        if (kind, path) not in self._unselectable:
            try:
                found, revision = self._list(kind, source, None, f"{path}={value}")
                return Listing([found[key] for key in sorted(found)], revision)
            except UnselectableError:
                _log.info("%s: the CRD of %s can't be selected by %s", self._server, kind, path)
                self._unselectable.add((kind, path))
        listing = self.list(kind)
        of_value = [entry for entry in listing.entries if _at(entry.value, path) == value]
        return Listing(of_value, listing.revision)

    def create(self, key: Key, value: JSON) -> Entry:
        """Store a new object. Raises AlreadyExistsError; NotFoundError: a view of nothing."""
        if is_derived(key.kind):
            self._refuse_profile(key)
            try:
                self.get(key)
            except NotFoundError as error:
                raise NotFoundError(f"{key}: {_MADE_BY[key.kind]}", key) from error
            raise AlreadyExistsError(f"{key}: exists already", key)
        metadata = {k: v for k, v in _metadata(value).items() if k not in _SERVERS_OWN}
        path = collection(key.kind, key.namespace)
        created = self._send("POST", path, key, value | {"metadata": metadata})
        try:
            return self._with_status(key, value, created)
        except (ConflictError, NotFoundError):  # others have changed it already
            return self._with_first_status(key, value, created)

    def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
        """Replace an object, only at ``revision`` when one is given.

        Raises NotFoundError, ConflictError.
        """
        if revision is not None and not revision.isdecimal():
            self.get(key)
            raise _conflict(key, revision)
        for _ in range(_ATTEMPTS):
            try:
                return self._update(key, value, revision)
            except ConflictError:
                if revision is not None:
                    raise
        raise ConflictError(f"{key}: changed by others {_ATTEMPTS} times in a row", key)

    def delete(self, key: Key, revision: str | None = None) -> Entry:
        """Delete an object, only at ``revision`` when one is given; returns what it was.

        A WorkloadEndpoint loses its addresses, and goes when its pod goes. Raises NotFoundError,
        ConflictError.
        """
        for _ in range(_ATTEMPTS):
            origin_key, entry = self._origin(key)
            if revision is not None and revision != entry.revision:
                raise _conflict(key, revision)
            try:
                if key.kind == "WorkloadEndpoint":
                    patch = _patch({"metadata": {"annotations": RELEASED}}, entry.revision)
                    self._send("PATCH", f"{item(origin_key)}/status", origin_key, patch)
                    return entry
                if is_derived(key.kind):
                    raise StoreError(
                        f"{key}: is Kubernetes' {origin_key}, and goes when that is deleted", key
                    )
                body = {"preconditions": _preconditions(entry)}
                self._request("DELETE", item(key), key, body)
                return entry
            except ConflictError as error:
                if revision is not None:
                    raise ConflictError(str(error), key) from error
        raise ConflictError(f"{key}: changed by others {_ATTEMPTS} times in a row", key)

    def watch(self, kinds: Iterable[str], revision: str | Mapping[str, str]) -> KubernetesWatch:
        """Every change of these kinds after ``revision``, which a ``list`` or event gave."""
        watch = KubernetesWatch(self._server, kinds, revision)
        with self._watches_lock:
            self._watches.add(watch)
        return watch

    def close(self) -> None:
        """End all watches and close all connections."""
        with self._watches_lock:
            watches = list(self._watches)
        for watch in watches:
            watch.close()
        self._server.close()

    def _origin(self, key: Key) -> tuple[Key, Entry]:
        """What an object comes from, and the object."""
        found = origin(key)
        if found is None:
            raise NotFoundError(f"{key}: does not exist", key)
        source, origin_key = found
        try:
            body = self._request("GET", item(origin_key), origin_key)
        except NotFoundError as error:
            raise NotFoundError(f"{key}: does not exist", key) from error
        entry = source.read(key.kind, body)
        if entry is None or entry.key != key:
            raise NotFoundError(f"{key}: does not exist", key)
        return origin_key, entry

    def _list(
        self, kind: str, source: Source, namespace: str | None, selector: str = ""
    ) -> tuple[dict[Key, Entry], str]:
        """``selector``: of fields; raises UnselectableError where there is no such choice."""
        fixed = {"limit": str(_PART)} | ({"fieldSelector": selector} if selector else {})
        for _ in range(_ATTEMPTS):
            entries: dict[Key, Entry] = {}
            revision = ""
            try:
                for items, reached in self._parts(source.kind, namespace, fixed):
                    revision = reached
                    for data in items:
                        entry = source.read(kind, data)
                        if entry is not None:
                            entries[entry.key] = entry
                return entries, revision
            except RequestError as error:
                if selector and error.status.code == 400:
                    raise UnselectableError(selector) from error
                if is_absent(error) and source.kind in OPTIONAL:
                    return {}, BEGINNING
                explained = self._server.explain(error, None, kind)
                if not isinstance(explained, RevisionGoneError):  # between two parts
                    raise explained from error
            except UndecodableError as error:
                raise UnavailableError(f"{self._server}: {error}") from error
        raise UnavailableError(f"{self._server}: forgot {kind} while it was listed")

    def _parts(
        self, kind: str, namespace: str | None, query: Mapping[str, str]
    ) -> Iterator[tuple[Iterable[msgspec.Raw], str]]:
        """The objects of each part of a list, and its revision; the next is fetched meanwhile."""
        path = collection(kind, namespace)
        answer = self._server.request("GET", path, query=query)
        with ThreadPoolExecutor(1, "list") as ahead:
            while True:
                items, after, revision = decode_list(kind, answer.body)
                if not after:
                    yield items, revision
                    return
                more = {**query, "continue": after}
                coming = ahead.submit(self._server.request, "GET", path, query=more)
                yield items, revision
                answer = coming.result()

    def _update(self, key: Key, value: JSON, revision: str | None) -> Entry:
        if is_derived(key.kind):
            return self._update_view(key, value, revision)
        if key.kind in SLIM:
            return self._update_slim(key, value, revision)
        if revision is None:
            revision = self.get(key).revision
        metadata = _metadata(value) | {"resourceVersion": revision}
        metadata.pop("uid", None)  # of an object of that name in another store
        updated = self._send("PUT", item(key), key, value | {"metadata": metadata})
        if updated.revision == revision and updated.value.get("status") == value.get("status"):
            marked = (metadata.get("annotations") or {}) | {REWRITTEN: revision}
            again = value | {"metadata": metadata | {"annotations": marked}}
            updated = self._send("PUT", item(key), key, again)
        return self._with_status(key, value, updated)

    def _with_status(self, key: Key, value: JSON, written: Entry) -> Entry:
        """Write the status by itself where the kind has it apart."""
        if "status" not in value or written.value.get("status") == value["status"]:
            return written
        whole = written.value | {"status": value["status"]}
        whole["metadata"] = whole["metadata"] | {"resourceVersion": written.revision}
        return self._send("PUT", f"{item(key)}/status", key, whole)

    def _with_first_status(self, key: Key, value: JSON, created: Entry) -> Entry:
        """Write the status of an object that was just made, unless somebody did meanwhile."""
        for _ in range(_ATTEMPTS):
            try:
                found = self.get(key)
                same = _metadata(found.value).get("uid") == _metadata(created.value).get("uid")
                if found.value.get("status") or not same:
                    return found
                return self._with_status(key, value, found)
            except ConflictError:
                continue
            except NotFoundError:
                return created
        times = f"changed by others {_ATTEMPTS} times in a row"
        raise UnavailableError(f"{key}: was made, but for its status: {times}", key)

    def _update_slim(self, key: Key, value: JSON, revision: str | None) -> Entry:
        """Change only what differs: the rest of the object is not known here."""
        entry = self.get(key)
        if revision is not None and revision != entry.revision:
            raise _conflict(key, revision)
        patch = difference(entry.value, value)
        patch.pop("apiVersion", None)
        patch.pop("kind", None)
        status = {"status": patch.pop("status")} if "status" in patch else None
        if not patch and not status:
            patch = {"metadata": {"annotations": {REWRITTEN: entry.revision}}}
        if patch:
            entry = self._send("PATCH", item(key), key, _patch(patch, entry.revision))
        if status:
            path = f"{item(key)}/status"
            entry = self._send("PATCH", path, key, _patch(status, entry.revision))
        return entry

    def _update_view(self, key: Key, value: JSON, revision: str | None) -> Entry:
        self._refuse_profile(key)
        origin_key, entry = self._origin(key)
        if revision is not None and revision != entry.revision:
            raise _conflict(key, revision)
        if key.kind == "WorkloadEndpoint":
            annotations: Mapping[str, str | None] = pod_annotations(value)
        else:
            kubernetes_node = self.get(origin_key).value
            try:
                annotations = node_annotations(value, kubernetes_node)
            except ValueError as error:
                raise StoreError(f"{key}: {error}", key) from error
        metadata = {"annotations": {**annotations, REWRITTEN: entry.revision}}
        patch = _patch({"metadata": metadata}, entry.revision)
        try:
            written = self._send("PATCH", f"{item(origin_key)}/status", origin_key, patch)
        except ConflictError as error:
            raise ConflictError(str(error), key) from error
        view = sources(key.kind)[0].convert(written.value)
        if view is None:
            raise NotFoundError(f"{key}: does not exist any more", key)
        return Entry(key, view, written.revision)

    def _refuse_profile(self, key: Key) -> None:
        if key.kind == "Profile":
            raise StoreError(
                f"{key}: with Kubernetes, profiles are made of Namespaces and ServiceAccounts:"
                " change those",
                key,
            )

    def _send(self, method: str, path: str, key: Key, body: JSON) -> Entry:
        value, revision = self._decode(key.kind, self._request(method, path, key, body))
        return Entry(key, value, revision)

    def _request(self, method: str, path: str, key: Key, body: JSON | None = None) -> bytes:
        try:
            answer = self._server.request(
                method,
                path,
                query=_STRICT if method in ("POST", "PUT", "PATCH") else None,
                body=body,
                media_type=MERGE_PATCH if method == "PATCH" else "application/json",
            )
        except RequestError as error:
            raise self._server.explain(error, key) from error
        except TypeError as error:
            raise StoreError(f"{key}: can't be written as JSON: {error}", key) from error
        return answer.body

    def _decode(self, kind: str, body: bytes) -> tuple[JSON, str]:
        try:
            return decode(kind, body)
        except UndecodableError as error:
            raise UnavailableError(f"{self._server}: {error}") from error


def _at(value: JSON, path: str) -> object:
    found: object = value
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _metadata(value: JSON) -> JSON:
    return dict(value.get("metadata") or {})


def _preconditions(entry: Entry) -> JSON:
    """Of a deletion: that it is this very object, as it was read."""
    uid = (entry.value.get("metadata") or {}).get("uid")
    return {"resourceVersion": entry.revision} | ({"uid": uid} if uid else {})


def _patch(patch: JSON, revision: str) -> JSON:
    """A patch that succeeds only at a revision."""
    metadata = (patch.get("metadata") or {}) | {"resourceVersion": revision}
    return patch | {"metadata": metadata}


def _conflict(key: Key, revision: str) -> ConflictError:
    return ConflictError(f"{key}: is no longer at {revision}; read it again and retry", key)
