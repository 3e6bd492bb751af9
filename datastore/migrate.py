"""Moving all data from one store to another: lock, export, import, unlock.

An export is text, one JSON object a line: a header, every object, and at the end their number,
so that half a file is not taken for a whole one. An import creates what is absent, leaves what is
the same, and overwrites nothing: run again after any interruption, it goes on where it was.
What calicoctl exported can be imported, too.

A store is locked by ``ClusterInformation default``, ``spec.datastoreReady: false``, as Calico's
programs understand it: agents keep what is in force and change nothing until it is true again.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from api import clusterinformation
from api.errors import InvalidObjectError
from api.kinds import CALICO, KINDS, key_parts
from api.policy import TIER_LABEL
from api.registry import dump, parse
from datastore import calico_export
from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Datastore,
    Key,
    NotFoundError,
    StoreError,
    UnavailableError,
    part,
)
from datastore.ranges import Ranges

CLUSTER = Key("ClusterInformation", "default")
FORMAT = "manx-export-1"

_ATTEMPTS = 20
# Of the cluster an object was in: whom it belongs to there, and who waits for it to be deleted.
# Where those are not, Kubernetes deletes the object, or never does.
_CLUSTERS_OWN = frozenset(
    ("ownerReferences", "finalizers", "deletionTimestamp", "deletionGracePeriodSeconds")
)
_SERVERS_OWN = _CLUSTERS_OWN | {
    *("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "selfLink")
}
# What Kubernetes says of a node, in the view of it.
_DERIVED_NODE_FIELDS = ("orchRefs", "addresses")
# Those that others name come first; all others as api.kinds has them.
_FIRST = ("Namespace", "ServiceAccount", "Tier", "IPPool", "Node", "KubernetesNode", "Pod")
# Of the kinds that Kubernetes keeps itself, those that people write, as they write Calico's.
_WRITTEN = frozenset(
    (
        *("KubernetesNetworkPolicy", "ClusterNetworkPolicy", "Secret"),
        *("AdminNetworkPolicy", "BaselineAdminNetworkPolicy"),
    )
)
# What API servers and kubectl add to objects, and says nothing that the rest doesn't.
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_NAMESPACE_LABEL = "kubernetes.io/metadata.name"
# Who leads at the moment: nothing to move.
_TRANSIENT = frozenset(("Lease",))


class Outcome(StrEnum):
    """What became of an object."""

    CREATED = "created"  # dry run: would be
    UPDATED = "updated"  # dry run: would be; only with what was absent
    PRESENT = "present"  # the same was there
    CONFLICT = "conflict"  # another was there, which stays
    REFUSED = "refused"  # the store does not take it
    LEFT_OUT = "left out"  # Kubernetes makes such objects, and has none of that name or another


@dataclass(frozen=True, slots=True)
class Result:
    """One object, what became of it, and why."""

    key: Key
    outcome: Outcome
    reason: str = ""


class FormatError(Exception):
    """What was given is not a whole export."""


def is_locked(store: Datastore) -> bool:
    """Whether agents are told to change nothing."""
    return clusterinformation.is_locked(_found(store, CLUSTER))


def lock(store: Datastore) -> None:
    """Tell agents to change nothing, until ``unlock``."""
    _write_cluster(store, {"datastoreReady": False})


def unlock(store: Datastore) -> None:
    """Let agents go on."""
    _write_cluster(store, {"datastoreReady": True})


def export(store: Datastore) -> Iterator[bytes]:
    """The lines of an export. Raises StoreError.

    Lock the store before: the kinds are listed one after the other, and when something was
    written meanwhile (by a program that began before the lock), ConflictError says so and the
    export stays without its end, which no import takes.
    """
    yield orjson.dumps({"format": FORMAT}) + b"\n"
    count = 0
    revisions: dict[str, dict[Key, str]] = {}
    for kind in _in_order():
        if kind == "Secret" and kind in store.given:
            continue  # those of the whole cluster are nobody's to write down
        try:
            entries = store.list(kind).entries
        except UnavailableError:
            if KINDS[kind].api_version == CALICO or kind not in store.given:
                raise
            continue  # a kind of Kubernetes that this cluster does not have
        for entry in entries:
            yield orjson.dumps(entry.value) + b"\n"
        count += len(entries)
        if is_written(store, kind):
            revisions[kind] = {entry.key: entry.revision for entry in entries}
    for kind, before in revisions.items():
        now = {entry.key: entry.revision for entry in store.list(kind).entries}
        changed = sorted(key for key, _ in before.items() ^ now.items())
        if changed:
            key = changed[0]
            raise ConflictError(f"{key}: changed during the export; export again", key)
    yield orjson.dumps({"end": count}) + b"\n"


def is_written(store: Datastore, kind: str) -> bool:
    """Whether people write the objects of a kind there: others come and go with the cluster."""
    return kind not in store.given or kind in _WRITTEN


def read(file: Iterable[bytes]) -> list[JSON]:
    """The objects of an export, of ours or of calicoctl, from its lines. Raises FormatError."""
    lines = list(file)
    if any(line.rstrip() == calico_export.SEPARATOR for line in lines):
        try:
            return calico_export.objects(lines)
        except calico_export.CalicoExportError as error:
            raise FormatError(f"an export of calicoctl: {error}") from error
    objects: list[JSON] = []
    ended = False
    for number, line in enumerate(lines, start=1):
        try:
            value = orjson.loads(line)
        except ValueError as error:
            raise FormatError(f"line {number}: {error}") from error
        if number == 1:
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise FormatError(f"line 1: expected the header of an export, format {FORMAT!r}")
        elif ended or not isinstance(value, dict):
            raise FormatError(f"line {number}: expected an object, and nothing after the end")
        elif "end" in value:
            ended = True
            if value["end"] != len(objects):
                raise FormatError(f"{len(objects)} objects, expected {value['end']}: it is damaged")
        else:
            objects.append(value)
    if not ended:
        raise FormatError("it ends before its end was written: export again")
    return objects


def import_all(
    store: Datastore,
    objects: Iterable[JSON],
    *,
    dry_run: bool = False,
    tell: Callable[[Result], object] = lambda _: None,
) -> list[Result]:
    """Bring objects into a store, each on its own; ``tell`` hears of each at once.

    The store is locked first and stays so. Raises UnavailableError, and then can be called again.
    """
    if not dry_run:
        lock(store)
    named = [(_named(value), value) for value in objects]
    ranges = Ranges(store, {key: value for key, value in named if isinstance(key, Key)})
    results = []
    for key, value in named:
        if isinstance(key, Key):
            result = _bring(store, ranges, key, value, dry_run)
        else:
            result = Result(Key(str(value.get("kind")), ""), Outcome.REFUSED, str(key))
        results.append(result)
        tell(result)
    return results


def _named(value: JSON) -> Key | InvalidObjectError:
    """The key of an object, or why it has none."""
    try:
        kind, namespace, name = key_parts(value)
    except InvalidObjectError as error:
        return error
    return Key(kind, name, namespace)


def _bring(store: Datastore, ranges: Ranges, key: Key, value: JSON, dry_run: bool) -> Result:
    try:
        if key == CLUSTER:
            return _bring_cluster(store, value, dry_run)
        if not is_written(store, key.kind):
            return _bring_given(store, key, value, dry_run)
        value = _of_no_cluster(value)
        found = _found(store, key)
        if found is None and (other := ranges.obstacle(key, value)):
            return Result(key, Outcome.CONFLICT, f"shares addresses with {other}, which is there")
        if found is None and not dry_run:
            try:
                store.create(key, value)
            except AlreadyExistsError:
                found = _found(store, key)
        if found is None:
            return _planned(store, key, value) if dry_run else Result(key, Outcome.CREATED)
        different = differences(value, found)
        if different == {"status"} and not found.get("status"):
            return _bring_status(store, key, value, dry_run)
        if different:
            return Result(key, Outcome.CONFLICT, _told(different))
        return Result(key, Outcome.PRESENT)
    except UnavailableError:
        raise
    except StoreError as error:
        return Result(key, Outcome.REFUSED, str(error))


def _planned(store: Datastore, key: Key, value: JSON) -> Result:
    if key.namespace and "Namespace" in store.given:
        namespace = Key("Namespace", key.namespace)
        if _found(store, namespace) is None:
            return Result(key, Outcome.REFUSED, f"namespace {key.namespace} does not exist")
    try:
        parse(value)
    except InvalidObjectError as error:
        return Result(key, Outcome.CREATED, f"although it is not valid: {error}")
    return Result(key, Outcome.CREATED)


def _told(different: Iterable[str]) -> str:
    return f"differs in {', '.join(sorted(different))}"


def _bring_status(store: Datastore, key: Key, value: JSON, dry_run: bool) -> Result:
    """Where it is written apart, an import that was killed may have left an object without."""
    for _ in range(_ATTEMPTS):
        entry = store.get(key)
        if entry.value.get("status"):
            break
        try:
            if not dry_run:
                store.update(key, {**entry.value, "status": value["status"]}, entry.revision)
        except ConflictError:
            continue
        return Result(key, Outcome.UPDATED)
    return Result(key, Outcome.CONFLICT, _told(["status"]))


def _bring_cluster(store: Datastore, value: JSON, dry_run: bool) -> Result:
    """The cluster's identity, which stays locked."""
    wanted = {k: v for k, v in (value.get("spec") or {}).items() if k != "datastoreReady"}
    found = (_found(store, CLUSTER) or {}).get("spec") or {}
    different = [name for name in wanted if found.get(name, wanted[name]) != wanted[name]]
    if different:
        return Result(CLUSTER, Outcome.CONFLICT, f"differs in spec.{', spec.'.join(different)}")
    if wanted.items() <= found.items():
        return Result(CLUSTER, Outcome.PRESENT)
    if not dry_run:
        _write_cluster(store, wanted)
    return Result(CLUSTER, Outcome.UPDATED)


def _bring_given(store: Datastore, key: Key, value: JSON, dry_run: bool) -> Result:
    """Into what Kubernetes made: addresses of its nodes and pods, as far as it has none."""
    for _ in range(_ATTEMPTS):
        try:
            entry = store.get(key)
        except NotFoundError:
            return Result(key, Outcome.LEFT_OUT, "Kubernetes has no such object")
        if key.kind not in ("Node", "WorkloadEndpoint"):
            others = differences(value, entry.value) - {"status"}
            if not others:
                return Result(key, Outcome.PRESENT)
            return Result(key, Outcome.LEFT_OUT, f"Kubernetes' own stays; it {_told(others)}")
        merged, different = _merged(key, value, entry.value)
        if different:
            return Result(key, Outcome.CONFLICT, _told(different))
        if merged == entry.value:
            return Result(key, Outcome.PRESENT)
        try:
            if not dry_run:
                store.update(key, merged, entry.revision)
        except (ConflictError, NotFoundError):
            continue
        return Result(key, Outcome.UPDATED)
    return Result(key, Outcome.REFUSED, "changed by others again and again")


def _merged(key: Key, value: JSON, view: JSON) -> tuple[JSON, list[str]]:
    """The view with what it lacks, and where it has something else."""
    different: list[str] = []

    def fill(there: Any, wanted: Any, path: str) -> Any:
        if isinstance(there, dict) and isinstance(wanted, dict):
            missing = {name: item for name, item in wanted.items() if name not in there}
            both = {
                name: fill(item, wanted[name], f"{path}.{name}") if name in wanted else item
                for name, item in there.items()
            }
            return both | missing
        if there != wanted:
            different.append(path)
        return there

    spec = dict(value.get("spec") or {})
    if key.kind == "Node":
        for name in _DERIVED_NODE_FIELDS:
            spec.pop(name, None)
        wanted = {"metadata": _own_metadata(value), "spec": spec}
        status = {k: v for k, v in (value.get("status") or {}).items() if k != "podCIDRs"}
        if status:
            wanted["status"] = status
    else:
        names = ("ipNetworks", "containerID")
        wanted = {"spec": {name: spec[name] for name in names if spec.get(name)}}
    return fill(view, wanted, ""), [path.removeprefix(".") for path in different]


def differences(one: JSON, other: JSON) -> set[str]:
    """The top-level parts in which two objects mean something different."""
    first, second = _comparable(one), _comparable(other)
    return {name for name in first | second if first.get(name) != second.get(name)}


def _comparable(value: JSON) -> JSON:
    """Without what each store adds, defaults filled in where the object is valid."""
    try:
        value = dump(parse(value))
    except InvalidObjectError:
        value = dict(value)
    metadata = _own_metadata(value)
    labels, annotations = part(metadata, "labels"), part(metadata, "annotations")
    tier = part(value, "spec").get("tier") or "default"
    added = {(TIER_LABEL, tier), (_NAMESPACE_LABEL, metadata.get("name"))}
    metadata |= {
        "labels": {name: text for name, text in labels.items() if (name, text) not in added},
        "annotations": {k: text for k, text in annotations.items() if k != _LAST_APPLIED},
    }
    value |= {"metadata": {name: item for name, item in metadata.items() if item}}
    if plain := part(value, "stringData"):  # of a Secret: what the API server makes of it
        coded = {name: b64encode(str(text).encode()).decode() for name, text in plain.items()}
        value |= {"data": part(value, "data") | coded, "stringData": None}
    return {name: item for name, item in value.items() if item}


def _of_no_cluster(value: JSON) -> JSON:
    metadata = part(value, "metadata")
    if _CLUSTERS_OWN.isdisjoint(metadata):
        return value
    kept = {name: item for name, item in metadata.items() if name not in _CLUSTERS_OWN}
    return value | {"metadata": kept}


def _own_metadata(value: JSON) -> JSON:
    metadata = value.get("metadata") or {}
    return {name: item for name, item in metadata.items() if item and name not in _SERVERS_OWN}


def _in_order() -> list[str]:
    kinds = [kind for kind in _FIRST if kind in KINDS]
    return kinds + [kind for kind in KINDS if kind not in kinds and kind not in _TRANSIENT]


def _found(store: Datastore, key: Key) -> JSON | None:
    try:
        return store.get(key).value
    except NotFoundError:
        return None


def _write_cluster(store: Datastore, fields: JSON) -> None:
    for _ in range(_ATTEMPTS):
        try:
            entry = store.get(CLUSTER)
        except NotFoundError:
            value = {
                "apiVersion": CALICO,
                "kind": CLUSTER.kind,
                "metadata": {"name": CLUSTER.name},
                "spec": fields,
            }
            try:
                store.create(CLUSTER, value)
            except AlreadyExistsError:
                continue
            return
        spec = entry.value.get("spec") or {}
        if spec.items() >= fields.items():
            return
        try:
            store.update(CLUSTER, {**entry.value, "spec": spec | fields}, entry.revision)
        except (ConflictError, NotFoundError):
            continue
        return
    raise ConflictError(f"{CLUSTER}: changed by others {_ATTEMPTS} times in a row", CLUSTER)
