"""Writing resources by compare-and-swap: what create, apply and replace share."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from api.errors import InvalidObjectError
from api.ippool import IPPool
from api.kinds import CALICO
from api.metadata import Resource
from api.policy import TIER_LABEL
from api.registry import check_update, dump, parse, parse_stored
from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Datastore,
    Entry,
    NotFoundError,
    part,
)
from manxctl.documents import Document, DocumentsError, check
from manxctl.doubts import doubts
from manxctl.outputs import LAST_APPLIED
from manxctl.overlaps import overlaps

# What a node's agent writes into the spec; to leave it out of a document is not to remove it.
AGENT_FIELDS = {
    "Node": (
        "ipv4VXLANTunnelAddr",
        "vxlanTunnelMACAddr",
        "ipv6VXLANTunnelAddr",
        "vxlanTunnelMACAddrV6",
    )
}
# The metadata that documents are about. The rest is the stored object's: a document's is that of
# another one, in another cluster, whose owners and finalizers are not here. (Kubernetes deletes
# what has an owner that does not exist.)
WRITTEN_METADATA = ("name", "namespace", "labels", "annotations")
# Kinds of Kubernetes' own in which there is nothing that Manx does not know. Of the others it
# knows what it reads: to write one back would remove the rest of it.
WHOLE_KINDS = frozenset(
    (
        *("KubernetesNetworkPolicy", "ClusterNetworkPolicy", "Secret"),
        *("AdminNetworkPolicy", "BaselineAdminNetworkPolicy"),
    )
)
ATTEMPTS = 20  # how often a write that met another's is done again
CREATED, CONFIGURED, UNCHANGED, SKIPPED = "created", "configured", "unchanged", "skipped"

Write = Callable[[Datastore, Document, Resource], str]
Objection = Callable[[Document, Resource, Entry | None], str | None]


def write_all(
    store: Datastore,
    found: Sequence[Document],
    objection: Objection,
    write: Write,
    report: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Check every document, alone and against what is stored; then write one after the other.

    ``report`` gets a line for each, ``warn`` what is allowed and hardly meant. Raises
    DocumentsError; when it does before the first report, nothing was written.
    """
    resources = check(found)
    complaints = []
    new: list[tuple[Document, Resource]] = []
    for document, resource in zip(found, resources, strict=True):
        if reason := kept_by_kubernetes(store, document):
            complaints.append(reason)
            continue
        stored = find(store, document)
        if stored is None:
            new.append((document, resource))
        complaint = objection(document, resource, stored)
        if complaint:
            complaints.append(document.complain(complaint))
        elif stored is not None:
            complaints += _update_complaints(document, resource, stored)
    complaints += _new_pool_complaints(store, new)
    if complaints:
        raise DocumentsError(complaints)
    for warning in doubts(store, found, resources):
        warn(warning)
    for document, resource in zip(found, resources, strict=True):
        report(f"{document.title} {write(store, document, resource)}")


def kept_by_kubernetes(store: Datastore, document: Document) -> str | None:
    """The complaint about an object that is Kubernetes' own in this store; views of one are ours.

    In other stores we are the only ones who read it.
    """
    kind = document.kind
    if kind.id not in store.given or kind.id in WHOLE_KINDS or kind.api_version == CALICO:
        return None
    return document.complain(
        f"kind: {kind.kind!r}: written with kubectl: Kubernetes keeps it, and Manx knows only the"
        " fields that it reads"
    )


def find(store: Datastore, document: Document) -> Entry | None:
    """What the store has under the document's key."""
    try:
        return store.get(document.key)
    except NotFoundError:
        return None


def create(store: Datastore, document: Document, resource: Resource) -> str:
    """Store a new object."""
    try:
        store.create(document.key, _new(resource))
    except AlreadyExistsError as error:
        raise DocumentsError([document.complain("exists already")]) from error
    return CREATED


def update(store: Datastore, document: Document, resource: Resource) -> str:
    """Replace the stored object; when another writer was faster, look again and retry.

    A metadata.resourceVersion in the document must be the stored object's, and is not
    retried. Raises DocumentsError, NotFoundError.
    """
    for _ in range(ATTEMPTS):
        outcome = swap(store, document, resource, store.get(document.key))
        if outcome is not None:
            return outcome
    raise DocumentsError([document.complain(f"changed by others {ATTEMPTS} times; try again")])


def swap(
    store: Datastore, document: Document, resource: Resource, stored: Entry, *, whole: bool = False
) -> str | None:
    """Replace the stored object; None when another writer was faster.

    ``whole``: what the document leaves out goes, also where an agent or the store wrote it.
    Raises DocumentsError, NotFoundError.
    """
    complaint = stale(resource, stored)
    complaints = [document.complain(complaint)] if complaint else []
    complaints += _update_complaints(document, resource, stored)
    if complaints:
        raise DocumentsError(complaints)
    value = _merged(resource, stored, whole=whole)
    if value == _bare(stored.value):
        return UNCHANGED
    # Of what is absent another program may think otherwise: what the document states is stored.
    if (
        not whole
        and value == _canonical(stored.value)
        and not _lacks(stored.value, value, document.value)
    ):
        return UNCHANGED
    try:
        store.update(document.key, value, stored.revision)
    except ConflictError:
        return None
    return CONFIGURED


def stale(resource: Resource, stored: Entry) -> str | None:
    """The complaint when the document was written for another state than the stored one."""
    wanted = resource.metadata.resource_version
    if wanted is None or wanted == stored.revision:
        return None
    now = f"{stored.revision} now"
    return f"metadata.resourceVersion: {wanted!r}: it is {now}; get the object and edit that"


def _update_complaints(document: Document, resource: Resource, stored: Entry) -> list[str]:
    try:
        old = parse_stored(stored.key.kind, stored.value)
    except InvalidObjectError:
        return []  # what is stored is broken: any valid object is better
    try:
        check_update(old, resource)
    except InvalidObjectError as error:
        return [document.complain(problem) for problem in error.problems]
    return []


def _new_pool_complaints(
    store: Datastore, new: Sequence[tuple[Document, Resource]]
) -> Iterator[str]:
    """About new pools that overlap each other or one that is stored.

    Of a stored one the range cannot change, so it can be written however it came to overlap.
    """
    pools = [(document, pool) for document, pool in new if document.key.kind == "IPPool"]
    if not pools:
        return
    stored = []
    for entry in store.list("IPPool").entries:
        with suppress(InvalidObjectError):  # broken, so nobody takes addresses from it
            pool = parse(entry.value)
            assert isinstance(pool, IPPool)
            stored.append((pool.name, pool.spec.net))
    yield from overlaps([each for each, _ in pools], [each for _, each in pools], stored)


def _new(resource: Resource) -> JSON:
    value = dump(resource)
    value["metadata"] = _written(part(value, "metadata")) | {
        "uid": str(uuid.uuid4()),
        "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return value


def _merged(resource: Resource, stored: Entry, *, whole: bool) -> JSON:
    """The document, with what belongs to the stored object: identity, status, an agent's fields."""
    value = _bare(dump(resource))
    old = part(_bare(stored.value), "metadata")
    if whole:
        value["metadata"] = _without(value["metadata"], "uid", "creationTimestamp") | {
            field: old[field] for field in ("uid", "creationTimestamp") if field in old
        }
        return value
    tier = part(value, "spec").get("tier")
    value["metadata"] = _without(old, *WRITTEN_METADATA) | _written(value["metadata"])
    for field, name in (("annotations", LAST_APPLIED), ("labels", TIER_LABEL)):
        added = part(old, field).get(name)  # by kubectl; by an API server
        if added is not None and (name != TIER_LABEL or added == tier):
            value["metadata"][field] = part(value["metadata"], field) | {name: added}
    if "status" in stored.value:
        value.setdefault("status", stored.value["status"])
    for field, kept in (stored.value.get("spec") or {}).items():
        if field in AGENT_FIELDS.get(stored.key.kind, ()):
            value.setdefault("spec", {}).setdefault(field, kept)
    return value


def _written(metadata: JSON) -> JSON:
    return {field: metadata[field] for field in WRITTEN_METADATA if field in metadata}


def _without(metadata: JSON, *fields: str) -> JSON:
    return {field: item for field, item in metadata.items() if field not in fields}


def _canonical(stored: JSON) -> JSON | None:
    """A stored object as we would have written it; None when it is broken."""
    try:
        return _bare(dump(parse(stored)))
    except InvalidObjectError:
        return None


def _lacks(stored: Any, value: Any, stated: Any) -> bool:
    """Whether a field of ``value`` that the document states, in whatever case, is not stored."""
    if isinstance(value, dict) and isinstance(stated, dict):
        said = {str(name).lower(): item for name, item in stated.items() if item is not None}
        return not isinstance(stored, dict) or any(
            name not in stored or _lacks(stored[name], item, said[name.lower()])
            for name, item in value.items()
            if name.lower() in said
        )
    if isinstance(value, list) and isinstance(stated, list):
        return not isinstance(stored, list) or any(map(_lacks, stored, value, stated))
    return False


def _bare(value: JSON) -> JSON:
    """Without what the store, or another API server, added to metadata."""
    dropped = ("resourceVersion", "managedFields", "selfLink")
    metadata = {k: v for k, v in (value.get("metadata") or {}).items() if k not in dropped}
    return value | {"metadata": metadata}
