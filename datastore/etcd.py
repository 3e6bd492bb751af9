"""The store in an etcd cluster, beside Calico's programs: same keys, same JSON.

Revisions are etcd's: the number of the cluster's transaction, as text. Every operation is one
transaction; but a list of more than 1000 objects is read in parts, all of the same revision, and
more than 100 objects by their keys in parts of several.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from datastore import etcd_pb2 as pb
from datastore.etcd_client import RANGE, TXN, CompactedError, EtcdClient, EtcdSettings
from datastore.etcd_keys import HANDLES, Range, candidates, key_of, path_of, ranges
from datastore.etcd_values import decode, encode
from datastore.etcd_watch import EtcdWatch
from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Entry,
    Event,
    Key,
    Listing,
    NotFoundError,
    StoreError,
    UnavailableError,
)

_PART = 1000  # objects in one answer
_MOST = 100  # reads in one transaction: etcd takes 128 operations, unless --max-txn-ops says less
_LIST_ATTEMPTS = 5
_MANY_HANDLES = 10_000
_HANDLES_SECONDS = 1.0  # how old our knowledge of handles with capitals may be


class EtcdDatastore:
    """A ``Datastore`` in etcd. Nothing is opened before the first operation.

    Every operation may raise UnavailableError. After one from a write its outcome is unknown,
    unless the message says that no member answers.
    """

    def __init__(self, settings: EtcdSettings) -> None:
        self.settings = settings
        self._client = EtcdClient(settings)
        self._handles = _CapitalHandles(self._client)
        self._watches: weakref.WeakSet[EtcdWatch] = weakref.WeakSet()
        self._watches_lock = threading.Lock()

    @property
    def given(self) -> frozenset[str]:
        """None: all objects are made by those who use the store."""
        return frozenset()

    def get(self, key: Key) -> Entry:
        """The object. Raises NotFoundError."""
        return _entry(key, self._find(key))

    def get_all(self, keys: Sequence[Key]) -> Sequence[Entry | StoreError]:
        """Objects, of one moment where they are few; NotFoundError for one that is not there."""
        try:
            found = self._at([path for key in keys for path in candidates(key)])
        except UnavailableError as error:
            return [error] * len(keys)
        except StoreError:  # it takes fewer at once
            return [self._outcome(key) for key in keys]
        outcomes: list[Entry | StoreError] = []
        for key in keys:
            there = (found[path.encode()] for path in candidates(key) if path.encode() in found)
            try:
                kv = next(there, None) or self._find_handle(key)
                outcomes.append(_entry(key, kv))
            except StoreError as error:
                outcomes.append(error)
        return outcomes

    def list(self, kind: str, namespace: str | None = None, prefix: str = "") -> Listing:
        """The objects of a kind, sorted by key, in one namespace or (None) in all.

        ``prefix``: only those whose names begin with it.
        """
        wanted = ranges(kind, namespace, prefix)
        for attempt in range(_LIST_ATTEMPTS):
            try:
                found, revision = self._read(wanted)
                break
            except CompactedError as error:  # between two parts
                if attempt + 1 == _LIST_ATTEMPTS:
                    raise UnavailableError(str(error)) from error
        entries: dict[Key, Entry] = {}
        for kv in found:
            key = _key(kind, kv)
            if key is not None and key.name.startswith(prefix):
                entries[key] = _entry(key, kv)
        return Listing([entries[key] for key in sorted(entries)], str(revision))

    def create(self, key: Key, value: JSON) -> Entry:
        """Store a new object. Raises AlreadyExistsError."""
        path, data = _encoded(key, value)
        request = pb.TxnRequest()
        _condition(request, path.encode(), pb.Compare.CREATE).create_revision = 0
        answer = self._put(key, path, data, request)
        if not answer.succeeded:
            raise AlreadyExistsError(f"{key}: exists already", key)
        return self._written(key, path, data, answer)

    def update_with(
        self, key: Key, value: JSON, revision: str, objects: Sequence[tuple[Key, JSON]]
    ) -> tuple[Entry, Sequence[Entry]]:
        """Replace an object at ``revision`` and store new ones, in one transaction.

        Raises NotFoundError, ConflictError, AlreadyExistsError; then nothing has changed.
        """
        path, data = _encoded(key, value)
        request = _if_unchanged(path.encode(), revision)
        rows = [(new, *_encoded(new, value_)) for new, value_ in objects]
        for _, path_, data_ in rows:
            place = path_.encode()
            _condition(request, place, pb.Compare.CREATE).create_revision = 0
            _put(request, place, data_)
            found = request.failure.add().request_range
            found.key, found.keys_only = place, True
        answer = self._put(key, path, data, request)
        if not answer.succeeded:
            for (new, _, _), response in zip(rows, answer.responses[1:], strict=True):
                if response.response_range.kvs:
                    raise AlreadyExistsError(f"{new}: exists already", new)
            raise _refusal(key, revision, answer)
        entries = [self._written(new, path_, data_, answer) for new, path_, data_ in rows]
        return self._written(key, path, data, answer), entries

    def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
        """Replace an object, only at ``revision`` when one is given.

        Raises NotFoundError, ConflictError.
        """
        path, data = _encoded(key, value)
        answer = self._put(key, path, data, _if_unchanged(path.encode(), revision))
        if not answer.succeeded:
            raise _refusal(key, revision, answer)
        return self._written(key, path, data, answer)

    def delete(self, key: Key, revision: str | None = None) -> Entry:
        """Delete an object, only at ``revision`` when one is given; returns what it was.

        Raises NotFoundError, ConflictError.
        """
        paths = candidates(key)
        if len(paths) == 1 and key.kind != "IPAMHandle":
            path = paths[0].encode()
        else:
            path = self._find(key).key
        request = _if_unchanged(path, revision)
        remove = request.success.add().request_delete_range
        remove.key, remove.prev_kv = path, True
        answer = self._write(key, request)
        if not answer.succeeded:
            raise _refusal(key, revision, answer)
        return _entry(key, answer.responses[0].response_delete_range.prev_kvs[0])

    def watch(self, kinds: Iterable[str], revision: str | Mapping[str, str]) -> EtcdWatch:
        """Every change of these kinds after ``revision``, which a ``list`` or event gave."""
        watch = EtcdWatch(self._client, _event, kinds, revision)
        with self._watches_lock:
            self._watches.add(watch)
        return watch

    def close(self) -> None:
        """End all watches and close the connection."""
        with self._watches_lock:
            watches = list(self._watches)
        for watch in watches:
            watch.close()
        self._client.close()

    def _find(self, key: Key) -> pb.KeyValue:
        for kv in self._first(candidates(key)):
            return kv
        return self._find_handle(key)

    def _find_handle(self, key: Key) -> pb.KeyValue:
        """What is at no path that the name tells, as a handle may be."""
        if key.kind == "IPAMHandle" and (path := self._handles.path(key.name)):
            for kv in self._first([path]):
                return kv
        raise NotFoundError(f"{key}: does not exist", key)

    def _at(self, paths: Sequence[str]) -> dict[bytes, pb.KeyValue]:
        """What is at these paths, by them."""
        found: dict[bytes, pb.KeyValue] = {}
        for begin in range(0, len(paths), _MOST):
            found |= {kv.key: kv for kv in self._first(paths[begin : begin + _MOST])}
        return found

    def _outcome(self, key: Key) -> Entry | StoreError:
        try:
            return self.get(key)
        except StoreError as error:
            return error

    def _first(self, paths: Sequence[str]) -> Iterator[pb.KeyValue]:
        """What is at these paths, in their order, all of one moment."""
        if len(paths) == 1:
            yield from self._client.call(RANGE, pb.RangeRequest(key=paths[0].encode())).kvs
        elif paths:
            request = pb.TxnRequest(success=[_get(path.encode()) for path in paths])
            for response in self._client.call(TXN, request).responses:
                yield from response.response_range.kvs

    def _read(self, wanted: Sequence[Range]) -> tuple[Sequence[pb.KeyValue], int]:
        """All that is in some ranges at one revision, and the revision."""
        first = [pb.RangeRequest(key=r.begin, range_end=r.end, limit=_PART) for r in wanted]
        if len(first) == 1:
            parts = [self._client.call(RANGE, first[0])]
            revision = parts[0].header.revision
        else:
            operations = [pb.RequestOp(request_range=request) for request in first]
            answer = self._client.call(TXN, pb.TxnRequest(success=operations))
            parts = [response.response_range for response in answer.responses]
            revision = answer.header.revision
        found: deque[pb.KeyValue] = deque()
        for range_, part in zip(wanted, parts, strict=True):
            found.extend(part.kvs)
            while part.more:
                request = pb.RangeRequest(
                    key=part.kvs[-1].key + b"\0",
                    range_end=range_.end,
                    limit=_PART,
                    revision=revision,
                )
                part = self._client.call(RANGE, request)
                found.extend(part.kvs)
        return found, revision

    def _put(self, key: Key, path: str, data: bytes, request: pb.TxnRequest) -> pb.TxnResponse:
        _put(request, path.encode(), data)
        return self._write(key, request)

    def _write(self, key: Key, request: pb.TxnRequest) -> pb.TxnResponse:
        try:
            return self._client.call(TXN, request, writes=True)
        except StoreError as error:
            error.key = key
            raise

    def _written(self, key: Key, path: str, data: bytes, answer: pb.TxnResponse) -> Entry:
        if key.kind == "IPAMHandle":
            self._handles.note(path)
        return _Written(key, str(answer.header.revision), path, data)


class _Written(Entry):
    """What was written. Few who write read it again: its value is decoded when it is asked for."""

    __slots__ = ("_data", "_path")
    _data: bytes
    _path: str

    def __init__(self, key: Key, revision: str, path: str, data: bytes) -> None:
        set_ = object.__setattr__  # an Entry is frozen
        set_(self, "key", key)
        set_(self, "revision", revision)
        set_(self, "_path", path)
        set_(self, "_data", data)

    def __getattr__(self, name: str) -> JSON:
        """The value, as long as there is none."""
        if name != "value":
            raise AttributeError(name)
        value = decode(self.key, self._path, self._data)
        object.__setattr__(self, "value", value)
        return value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Entry):
            return NotImplemented
        return (self.key, self.value, self.revision) == (other.key, other.value, other.revision)

    __hash__ = Entry.__hash__

    def __reduce__(self) -> tuple[type[Entry], tuple[Key, JSON, str]]:
        return Entry, (self.key, self.value, self.revision)


class _CapitalHandles:
    """Paths of the handles whose ids have capitals, which their objects' names don't tell.

    Manx and Kubernetes' runtimes make ids without; Calico's may have any, from a network's name.
    """

    def __init__(self, client: EtcdClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._paths: dict[str, str] = {}
        self._read_at = float("-inf")
        self._revision = 0  # up to which all are known

    def path(self, name: str) -> str | None:
        """The path of the handle that an object's name means. May raise StoreError."""
        with self._lock:
            if time.monotonic() > self._read_at + _HANDLES_SECONDS:
                self._read()
                self._read_at = time.monotonic()
            return self._paths.get(name)

    def _read(self) -> None:
        """Hear of those that were made since; now and then of all, as many have gone."""
        if len(self._paths) > _MANY_HANDLES:
            self._paths, self._revision = {}, 0
        everything = Range.below(HANDLES)
        request = pb.RangeRequest(
            key=everything.begin,
            range_end=everything.end,
            keys_only=True,
            min_create_revision=self._revision + 1,
        )
        answer = self._client.call(RANGE, request)
        if answer.header.revision < self._revision:  # another cluster, or an older one's data
            self._paths, self._revision = {}, 0
            return self._read()
        for kv in answer.kvs:
            self._add(kv.key.decode(errors="replace"))
        self._revision = answer.header.revision
        return None

    def note(self, path: str) -> None:
        """A handle was written there."""
        with self._lock:
            self._add(path)

    def _add(self, path: str) -> None:
        handle = path.removeprefix(HANDLES)
        if handle != handle.lower():
            self._paths[handle.lower()] = path


def _encoded(key: Key, value: JSON) -> tuple[str, bytes]:
    try:
        return path_of(key, value), encode(key, value)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{key}: can't be stored in etcd: {error}", key) from error


def _entry(key: Key, kv: pb.KeyValue) -> Entry:
    return Entry(key, decode(key, kv.key.decode(), kv.value), str(kv.mod_revision))


def _key(kind: str, kv: pb.KeyValue) -> Key | None:
    try:
        return key_of(kind, kv.key.decode())
    except UnicodeDecodeError:
        return None  # no name of an object


def _event(kind: str, kv: pb.KeyValue, deleted: bool) -> Event | None:
    key = _key(kind, kv)
    if key is None:
        return None
    return Event(key, None if deleted else _entry(key, kv), str(kv.mod_revision))


def _get(path: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_range=pb.RangeRequest(key=path))


def _put(request: pb.TxnRequest, path: bytes, data: bytes) -> None:
    """What ``request`` does if its conditions hold."""
    put = request.success.add().request_put
    put.key, put.value = path, data


def _condition(request: pb.TxnRequest, path: bytes, target: pb.Compare.CompareTarget) -> pb.Compare:
    """A condition that ``request`` is under; the caller says what the target must be."""
    # Attribute by attribute is a third of the time that messages of messages take to make.
    condition = request.compare.add()
    condition.target, condition.key = target, path
    return condition


def _if_unchanged(path: bytes, revision: str | None) -> pb.TxnRequest:
    """A request for the case that the object is there, at ``revision`` when one is given.

    In the other case the answer tells what is there instead, of the same moment.
    """
    request = pb.TxnRequest()
    if revision is None:
        existing = _condition(request, path, pb.Compare.CREATE)
        existing.result, existing.create_revision = pb.Compare.GREATER, 0
    else:
        _condition(request, path, pb.Compare.MOD).mod_revision = _number(revision)
    found = request.failure.add().request_range
    found.key, found.keys_only = path, True
    return request


def _number(revision: str) -> int:
    """One that no object has for a revision of another store: 0 is that of what is absent."""
    number = int(revision) if revision.isdecimal() else 0
    return number if 0 < number < 1 << 63 else -1


def _refusal(key: Key, revision: str | None, answer: pb.TxnResponse) -> StoreError:
    """Why the write of an object that had to be unchanged was not carried out."""
    for kv in answer.responses[0].response_range.kvs:
        return ConflictError(
            f"{key}: is at revision {kv.mod_revision}, not {revision}; read it again and retry",
            key,
        )
    return NotFoundError(f"{key}: does not exist", key)
