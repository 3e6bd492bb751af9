"""The interface every store offers, and the nouns and errors it speaks in.

A store keeps JSON objects (resources as users write them, with ``apiVersion``, ``kind``,
``metadata`` and ``spec``) under a ``Key``. Every write gives the object a new revision;
a write that names a revision succeeds only while the object still has it
(compare-and-swap). Revisions are opaque text: compare them for equality, never by order.

Objects go in and come out as plain ``dict``; ``api.parse`` turns them into models. A value
handed out belongs to the caller, who may change it; what a write returns may hold the very value
that it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Which object. ``kind`` is an id of ``api.registry``: ``IPPool``, ``KubernetesNetworkPolicy``.

    ``namespace`` is empty for cluster-scoped kinds.
    """

    kind: str
    name: str
    namespace: str = ""

    def __str__(self) -> str:
        return f"{self.kind}({self.namespace + '/' if self.namespace else ''}{self.name})"


def part(value: JSON | None, name: str) -> JSON:
    """A mapping inside of an object, such as ``spec``; empty where there is none.

    A store may hold whatever somebody wrote: what reads objects without a model reads them so.
    """
    found = (value or {}).get(name)
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Entry:
    """An object as the store has it."""

    key: Key
    value: JSON
    revision: str


@dataclass(frozen=True, slots=True)
class Listing:
    """All objects of a kind at one moment; a watch from ``revision`` misses nothing after it."""

    entries: list[Entry]
    revision: str


@dataclass(frozen=True, slots=True)
class Event:
    """One change: ``entry`` is the object as it is now, None when it was deleted."""

    key: Key
    entry: Entry | None
    revision: str


class StoreError(Exception):
    """What a store reports. ``key`` is the object concerned, where there is one.

    ``resume``: of an error that ended a watch, by kind, from where another watch goes on after
    all that this one has told. Kinds that are not in it must be listed again.
    """

    resume: Mapping[str, str] = MappingProxyType({})

    def __init__(self, message: str, key: Key | None = None) -> None:
        super().__init__(message)
        self.key = key


class NotFoundError(StoreError):
    """No such object."""


class AlreadyExistsError(StoreError):
    """``create`` of an object that is there."""


class ConflictError(StoreError):
    """Compare-and-swap failed: the object has another revision. Read it again and retry."""


class RevisionGoneError(StoreError):
    """The store no longer has the history a watch asked for. List again, watch from there."""


class UnavailableError(StoreError):
    """The store can't be reached or can't answer now. Retry with back-off."""


class Watch(Protocol):
    """A running watch. Also a context manager; ``close`` may come from another thread."""

    def next(self, timeout: float | None = None) -> Sequence[Event]:
        """Wait for changes, at most ``timeout`` seconds (None: for ever), in commit order.

        Returns all that are ready, or an empty sequence at the timeout or after ``close``.
        Raises RevisionGoneError or UnavailableError; the watch is then over. Where the store
        can tell, the error's ``resume`` says how another one goes on.
        """

    def close(self) -> None:
        """End the watch and wake whoever waits in ``next``."""

    def __enter__(self) -> Watch: ...

    def __exit__(self, *exc: object) -> None: ...


class Datastore(Protocol):
    """One store. Safe to use from several threads and, where that is its nature, processes."""

    @property
    def given(self) -> frozenset[str]:
        """The kinds whose objects others make and delete: here they can, at most, be updated."""

    def get(self, key: Key) -> Entry:
        """The object. Raises NotFoundError."""

    def list(self, kind: str, namespace: str | None = None, prefix: str = "") -> Listing:
        """The objects of a kind, sorted by key, in one namespace or (None) in all.

        ``prefix``: only those whose names begin with it; the cost is then that of these alone.
        """

    def create(self, key: Key, value: JSON) -> Entry:
        """Store a new object. Raises AlreadyExistsError."""

    def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
        """Replace an object, only at ``revision`` when one is given.

        Raises NotFoundError, ConflictError.
        """

    def delete(self, key: Key, revision: str | None = None) -> Entry:
        """Delete an object, only at ``revision`` when one is given; returns what it was.

        Raises NotFoundError, ConflictError.
        """

    def watch(self, kinds: Iterable[str], revision: str | Mapping[str, str]) -> Watch:
        """Every change of these kinds after ``revision``, which a ``list`` or event gave.

        Several may have one revision: of what was written together, those are told that come
        after all of it. With a mapping, each kind's changes begin after its own revision: lists of
        several kinds are taken one after the other, and their revisions can't be compared. What
        the watch's ``next`` raises may be raised here already.
        """

    def close(self) -> None:
        """Let go of what the store holds open."""


@runtime_checkable
class PromptDatastore(Protocol):
    """A ``Datastore`` whose watches tell, at ``next(0)``, of every write that was done before."""

    prompt: bool


@runtime_checkable
class GroupingDatastore(Protocol):
    """A ``Datastore`` that asks for or writes several objects in one transaction."""

    def get_all(self, keys: Sequence[Key]) -> Sequence[Entry | StoreError]:
        """Objects, in the order of their keys; NotFoundError for one that is not there."""

    def update_with(
        self, key: Key, value: JSON, revision: str, objects: Sequence[tuple[Key, JSON]]
    ) -> tuple[Entry, Sequence[Entry]]:
        """Replace an object at ``revision`` and store new ones, all of it or nothing.

        Raises NotFoundError, ConflictError, AlreadyExistsError, whose ``key`` is the object that
        is there.
        """


@runtime_checkable
class BulkDatastore(Protocol):
    """A ``Datastore`` to which many new objects are hardly more than one."""

    def create_all(self, objects: Sequence[tuple[Key, JSON]]) -> Sequence[Entry | StoreError]:
        """Store new objects in one transaction, with its outcome for each, in their order.

        One that exists already (AlreadyExistsError) does not keep the others from being stored.
        """


def get_all(store: Datastore, keys: Sequence[Key]) -> Sequence[Entry | StoreError]:
    """As ``GroupingDatastore``; one after the other where the store is none."""
    if len(keys) > 1 and isinstance(store, GroupingDatastore):
        return store.get_all(keys)
    outcomes: list[Entry | StoreError] = []
    for key in keys:
        try:
            outcomes.append(store.get(key))
        except UnavailableError as error:  # it is waited for once
            return outcomes + [error] * (len(keys) - len(outcomes))
        except StoreError as error:
            outcomes.append(error)
    return outcomes


def create_all(
    store: Datastore, objects: Sequence[tuple[Key, JSON]]
) -> Sequence[Entry | StoreError]:
    """As ``BulkDatastore``; one after the other where the store is none."""
    if len(objects) > 1 and isinstance(store, BulkDatastore):
        return store.create_all(objects)
    outcomes: list[Entry | StoreError] = []
    for key, value in objects:
        try:
            outcomes.append(store.create(key, value))
        except StoreError as error:
            outcomes.append(error)
    return outcomes


@runtime_checkable
class SelectingDatastore(Protocol):
    """A ``Datastore`` that lists by a field at less cost than by the beginning of names."""

    def list_by_field(self, kind: str, path: str, value: str) -> Listing:
        """The objects of a cluster-scoped kind with that value at ``path``: ``spec.node``.

        The cost is that of these alone.
        """
