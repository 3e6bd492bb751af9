"""A watch on etcd: one stream for all kinds, begun again wherever it was cut."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc

from datastore import etcd_pb2 as pb
from datastore.etcd_client import RANGE, EtcdClient, RefusedError, explain
from datastore.etcd_keys import CONFIGURATION, Range, ranges
from datastore.event_buffer import EventBuffer
from datastore.interface import Event, RevisionGoneError, StoreError, UnavailableError

_OUTAGE_SECONDS = 10.0  # a shorter one is not worth a word
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0

_log = logging.getLogger(__name__)

Decode = Callable[[str, pb.KeyValue, bool], Event | None]


@dataclass(slots=True)
class _Place:
    """A range under watch, and the revision up to which all its events are in the buffer."""

    kind: str
    range: Range
    after: int

    def request(self, number: int) -> pb.WatchRequest:
        return pb.WatchRequest(
            create_request=pb.WatchCreateRequest(
                key=self.range.begin,
                range_end=self.range.end,
                start_revision=self.after + 1,
                progress_notify=True,
                watch_id=number,
            )
        )


@dataclass(slots=True)
class _Requests:
    """The requests of one stream, which stays open until ``end``; gRPC reads them in a thread."""

    queue: queue.SimpleQueue[pb.WatchRequest | None] = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[pb.WatchRequest]:
        while (request := self.queue.get()) is not None:
            yield request

    def end(self) -> None:
        self.queue.put(None)


class EtcdWatch:
    """See ``datastore.interface.Watch``. Each kind's revision is counted on its own.

    A revision counts as seen once all its events are in the buffer: etcd never splits the events
    of one revision. So a new stream, to whichever member, goes on exactly where the last ended.
    After 10 s without any, the watch is over with UnavailableError, whose ``resume`` another
    watch goes on from.
    """

    def __init__(
        self,
        client: EtcdClient,
        decode: Decode,
        kinds: Iterable[str],
        revision: str | Mapping[str, str],
    ) -> None:
        self._client = client
        self._decode = decode
        begins = {
            kind: _parsed(revision if isinstance(revision, str) else revision[kind])
            for kind in dict.fromkeys(kinds)
        }
        clusters = {cluster for _, cluster in begins.values() if cluster is not None}
        if len(clusters) > 1:
            raise RevisionGoneError(f"{client.settings}: revisions of several clusters; list again")
        self._cluster = clusters.pop() if clusters else None
        self._places = [
            _Place(kind, range_, after)
            for kind, (after, _) in begins.items()
            for range_ in ranges(kind)
        ]
        begin = [place.after for place in self._places]
        self._buffer = EventBuffer()
        self._oldest: int | None = 0  # revision to go on from; None: from none
        self._heard = False  # anything, on the present stream
        self._lock = threading.Lock()
        self._responses: Any = None
        self._begun = threading.Event()  # etcd has taken the watch on, or it is over
        self._problem: StoreError | None = None  # the last one, while there is no stream
        self._thread = threading.Thread(target=self._run, name="etcd-watch", daemon=True)
        self._thread.start()
        # What etcd forgets once it knows of the watch no longer matters.
        if self._places and not self._begun.wait(client.settings.timeout):
            problem = UnavailableError(f"{client.settings}: no answer to a watch")
            self._buffer.fail(self._problem or problem)
        if error := self._buffer.error:
            self.close()
            for place, after in zip(self._places, begin, strict=True):
                place.after = after  # nobody was told what came since
            error.resume = self._resume()
            raise error

    def next(self, timeout: float | None = None) -> Sequence[Event]:
        """Wait for changes, at most ``timeout`` seconds (None: for ever).

        Returns all that are ready (at most 1000), or an empty sequence at the timeout or
        after ``close``. Raises RevisionGoneError or UnavailableError; the watch is then over
        and goes on raising it.
        """
        try:
            return self._buffer.next(timeout)
        except StoreError as error:
            error.resume = self._resume()
            raise

    def close(self) -> None:
        """End the watch and wake whoever waits in ``next``."""
        self._buffer.close()
        with self._lock:
            responses = self._responses
        if responses is not None:
            responses.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> EtcdWatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._follow()
        except Exception as error:  # a bug: the consumer must not wait for ever
            _log.exception("unexpected error in a watch of %s", self._client.settings)
            self._oldest = None  # it might meet the same again for ever
            self._buffer.fail(UnavailableError(f"{self._client.settings}: watch: {error!r}"))
        finally:
            self._begun.set()

    def _follow(self) -> None:
        pause, last_heard, refused = _FIRST_PAUSE, time.monotonic(), False
        while not self._buffer.over:
            problem: StoreError
            self._heard = False
            try:
                self._check_history()
                self._stream()
                problem = UnavailableError(f"{self._client.settings}: a watch was ended")
            except grpc.RpcError as error:
                problem = explain(self._client.settings, error)
            except UnavailableError as error:
                problem = error
            except StoreError as error:
                self._buffer.fail(error)
                return
            self._problem = problem
            if self._heard:
                pause, last_heard, refused = _FIRST_PAUSE, time.monotonic(), False
            refused_again = refused and isinstance(problem, RefusedError)
            refused = isinstance(problem, RefusedError)  # once may be an old token
            over = time.monotonic() > last_heard + _OUTAGE_SECONDS
            if refused_again or over or self._client.closed:
                self._buffer.fail(problem)
                return
            self._buffer.pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _resume(self) -> dict[str, str]:
        """From where another watch goes on, for kinds that need nothing which etcd forgot."""
        oldest = self._oldest
        if oldest is None:
            return {}
        reached: dict[str, int] = {}
        for place in self._places:
            reached[place.kind] = min(place.after, reached.get(place.kind, place.after))
        return {
            kind: _position(after, self._cluster)
            for kind, after in reached.items()
            if after + 1 >= oldest
        }

    def _check_history(self) -> None:
        """Refuse a cluster that is not the one our revisions are of, or was restored since.

        Asked of the whole cluster, not of a member that may be behind.
        """
        request = pb.RangeRequest(key=CONFIGURATION.encode(), count_only=True)
        header = self._client.call(RANGE, request).header
        cluster, self._cluster = self._cluster or header.cluster_id, header.cluster_id
        newest = max((place.after for place in self._places), default=0)
        if header.cluster_id != cluster or header.revision < newest:
            self._oldest = None
            raise RevisionGoneError(
                f"{self._client.settings}: is at revision {header.revision}, before {newest}, or"
                " is another cluster than before; list again and watch from there"
            )

    def _stream(self) -> None:
        """Follow one stream until it ends: returns or raises grpc.RpcError, StoreError."""
        requests = _Requests()
        for number, place in enumerate(self._places, start=1):
            requests.queue.put(place.request(number))
        responses, failed = self._client.watch(iter(requests))
        with self._lock:
            self._responses = responses
        try:
            if self._buffer.over:
                return
            for response in responses:
                self._take(response)
            failed()
        except (grpc.RpcError, UnavailableError):
            failed()
            raise
        finally:
            with self._lock:
                self._responses = None
            responses.cancel()
            requests.end()

    def _take(self, response: pb.WatchResponse) -> None:
        if response.canceled:
            self._refused(response)
        self._heard = True
        if response.created:
            if response.watch_id == len(self._places):
                self._begun.set()
            return
        place = self._places[response.watch_id - 1]
        if not response.events:  # progress: all events up to here have been sent
            place.after = max(place.after, response.header.revision)
            return
        decoded = (
            self._decode(place.kind, event.kv, event.type == pb.Event.DELETE)
            for event in response.events
        )
        if self._buffer.put([event for event in decoded if event is not None]):
            place.after = response.events[-1].kv.mod_revision

    def _refused(self, response: pb.WatchResponse) -> NoReturn:
        settings = self._client.settings
        if response.compact_revision:
            self._oldest = response.compact_revision
            raise RevisionGoneError(
                f"{settings}: has forgotten the changes before {response.compact_revision};"
                " list again and watch from there"
            )
        reason = response.cancel_reason or "no reason given"
        raise RefusedError(
            f"{settings}: the watch was refused ({reason}); the user needs to read below /calico/"
        )


def _position(revision: int, cluster: int | None) -> str:
    """With the cluster, as far as it is known: another one's revisions may look alike."""
    return str(revision) if cluster is None else f"{revision}@{cluster:x}"


def _parsed(text: str) -> tuple[int, int | None]:
    """Revision and, where it is said, cluster."""
    revision, _, cluster = text.partition("@")
    try:
        return int(revision), int(cluster, 16) if cluster else None
    except ValueError as error:
        raise RevisionGoneError(
            f"{text!r} is no revision of etcd; list again and watch from there"
        ) from error
