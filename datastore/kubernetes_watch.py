"""A watch on a Kubernetes API server: a stream for each kind of object, resumed when cut."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import msgspec
import urllib3
from urllib3.exceptions import HTTPError

from datastore.event_buffer import EventBuffer
from datastore.interface import Event, RevisionGoneError, StoreError, UnavailableError
from datastore.kubernetes_client import ApiServer, RequestError, is_absent
from datastore.kubernetes_objects import (
    UndecodableError,
    decode_event,
    decode_list,
    decode_status,
    revision_of,
)
from datastore.kubernetes_views import OPTIONAL, Source, collection, sources

_OUTAGE_SECONDS = 10.0  # a shorter one is not worth a word
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
_SHORT = 1.0  # seconds; a stream that lasted no longer, and told nothing new, is no good one
_STREAM_SECONDS = (300, 600)  # how long a stream is asked for; spread out over the nodes
_SILENCE_SECONDS = 150.0  # bookmarks come about every minute
_READ_BYTES = 1 << 16
_SHOWN_BYTES = 80  # of what is no event
_GONE_PAUSE = 0.5
_ABSENT_PAUSE = 10.0  # between two looks for an optional kind that is not installed

# The revision of a list of an optional kind that is not installed.
BEGINNING = "0"

_random = Random()  # of its own: the global one belongs to programs
_log = logging.getLogger(__name__)


class KubernetesWatch:
    """See ``datastore.interface.Watch``. One stream for each kind of object of the API.

    A stream that is cut goes on after the last event or bookmark it brought. After 10 s without
    any that lasts or tells something, the watch is over with UnavailableError; ``resume`` of that
    error keeps what was reached.
    An optional kind that is not installed is looked for every 10 s; when it is found, the watch is
    over with RevisionGoneError, as from then on it is to be listed.
    """

    def __init__(
        self, server: ApiServer, kinds: Iterable[str], revision: str | Mapping[str, str]
    ) -> None:
        self._buffer = EventBuffer()
        self._positions: dict[str, list[str]] = {}
        feeds: dict[str, list[_Feed]] = {}
        for kind in dict.fromkeys(kinds):
            found = sources(kind)
            text = revision if isinstance(revision, str) else revision[kind]
            self._positions[kind] = positions = _positions(text, len(found))
            for place, source in enumerate(found):
                feeds.setdefault(source.kind, []).append(_Feed(kind, source, positions, place))
        self._streams = [
            _Stream(server, self._buffer, kind, tuple(of)) for kind, of in feeds.items()
        ]
        begin = self._reached()
        for stream in self._streams:
            stream.start()
        deadline = time.monotonic() + server.settings.timeout
        for stream in self._streams:
            if not stream.begun.wait(max(0, deadline - time.monotonic())):
                self._buffer.fail(UnavailableError(f"{server}: no answer to {stream.name}"))
        if error := self._buffer.error:
            self.close()
            self._note_resume(error, begin)  # nobody was told what came since
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
            self._note_resume(error, self._reached())
            raise

    def close(self) -> None:
        """End the watch and wake whoever waits in ``next``."""
        self._buffer.close()
        for stream in self._streams:
            stream.interrupt()
        for stream in self._streams:
            stream.join()

    def __enter__(self) -> KubernetesWatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _reached(self) -> dict[str, str]:
        """Each kind's position, as a revision."""
        return {kind: ",".join(positions) for kind, positions in self._positions.items()}

    def _note_resume(self, error: StoreError, positions: Mapping[str, str]) -> None:
        """Say what another watch can go on from: all but what the server forgot."""
        gone = {feed.kind for stream in self._streams if stream.gone for feed in stream.feeds}
        error.resume = {kind: text for kind, text in positions.items() if kind not in gone}


@dataclass(frozen=True, slots=True)
class _Feed:
    """What a stream of ``source`` tells about a kind.

    ``positions`` are those reached in all sources of the kind; this is the one at ``place``.
    """

    kind: str
    source: Source
    positions: list[str]
    place: int

    @property
    def position(self) -> str:
        return self.positions[self.place]

    def event(self, type_: str, data: msgspec.Raw, revision: str) -> Event | None:
        """The change to ``revision``, None when it is none of the kind, or old."""
        if int(revision) <= int(self.position):
            return None
        entry = self.source.read(self.kind, data)
        if entry is None:
            return None
        reached = [*self.positions]
        reached[self.place] = revision
        return Event(entry.key, None if type_ == "DELETED" else entry, ",".join(reached))

    def advance(self, revision: str) -> bool:
        """Everything until ``revision`` is told; False: it was before."""
        if int(revision) <= int(self.position):
            return False
        self.positions[self.place] = revision
        return True


class _Stream(threading.Thread):
    """Follows the objects of one kind of the API, for all ``feeds``."""

    def __init__(
        self, server: ApiServer, buffer: EventBuffer, kind: str, feeds: tuple[_Feed, ...]
    ) -> None:
        super().__init__(name=f"watch-{kind}", daemon=True)
        self.feeds = feeds
        self.begun = threading.Event()  # the server has taken the watch on, or it has failed
        self.gone = False  # the server has forgotten where we were
        self._kind = kind
        self._server = server
        self._buffer = buffer
        self._lock = threading.Lock()
        self._response: urllib3.BaseHTTPResponse | None = None
        self._created = time.monotonic()
        self._taken_on = math.inf  # when the server took the present stream on
        self._heard = False  # the present stream told something new
        self._unknown = False  # the server's last answer was that it doesn't know us

    def interrupt(self) -> None:
        """Wake the thread, when it waits for the server, after the buffer was closed."""
        with self._lock:
            if self._response is not None:
                with contextlib.suppress(OSError, ValueError, RuntimeError):
                    self._response.shutdown()

    def run(self) -> None:
        """Follow until the buffer is over."""
        try:
            self._follow()
        except Exception as error:  # a bug: the consumer must not wait for ever
            _log.exception("unexpected error in the watch of %s", self._kind)
            self._buffer.fail(UnavailableError(f"watch of {self._kind}: {error!r}"))
        finally:
            self.begun.set()

    def _follow(self) -> None:
        pause, last_heard, check = _FIRST_PAUSE, -math.inf, True
        while not self._buffer.over:
            self._heard, self._taken_on = False, math.inf
            try:
                problem = self._attempt(check)
            except StoreError as error:
                self._fail(error)
                return
            check, now = problem is not None, time.monotonic()
            if self._heard or now > self._taken_on + _SHORT:
                pause, last_heard = _FIRST_PAUSE, now
                if problem is None:
                    continue
            elif self._taken_on < math.inf:  # not as bad as no answer at the very start
                last_heard = max(last_heard, self._created)
            if now > last_heard + _OUTAGE_SECONDS:
                why = f"watch of {self._kind}: ended as soon as it had begun, again and again"
                self._fail(problem or UnavailableError(f"{self._server}: {why}"))
                return
            self._buffer.pause(pause * _random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _attempt(self, check: bool) -> UnavailableError | None:
        """Follow one stream to its end, and say why it ended; None: in order.

        Raises StoreError for what does not pass by itself.
        """
        try:
            if check:
                self._check_history()
            self._stream()
        except _CutError as cut:
            return UnavailableError(f"{self._server}: watch of {self._kind}: {cut}")
        except UnavailableError as error:
            return error
        except RequestError as error:
            problem = self._server.explain(error, None, self._kind)
            if self._kind in OPTIONAL and is_absent(error):
                self.begun.set()
                self._buffer.pause(_ABSENT_PAUSE)
            elif error.status.code == 401 and not self._unknown:  # once may be an old token
                self._unknown = True
            else:
                raise problem from error
            self._heard = True
            return UnavailableError(str(problem))
        return None

    def _fail(self, problem: StoreError) -> None:
        if isinstance(problem, RevisionGoneError):
            self.gone = True
            # A server that was restarted has forgotten all kinds: let the other streams hear it
            # too, so that these kinds are listed together and not one after each other's failure.
            self._buffer.pause(_GONE_PAUSE)
        self._buffer.fail(problem)

    @property
    def _position(self) -> str:
        """From where on all feeds have heard everything."""
        return min((feed.position for feed in self.feeds), key=int)

    def _check_history(self) -> None:
        """Refuse a cluster that is behind our position: its data were restored from a backup."""
        answer = self._server.request("GET", collection(self._kind), query={"limit": "1"})
        try:
            _, _, revision = decode_list(self._kind, answer.body)
        except UndecodableError as error:
            raise UnavailableError(f"{self._server}: {error}") from error
        mine = max((feed.position for feed in self.feeds), key=int)
        if mine == BEGINNING:
            raise RevisionGoneError(f"{self._server}: {self._kind} is installed now; list it")
        if revision.isdecimal() and int(revision) < int(mine):
            raise RevisionGoneError(
                f"{self._server}: {self._kind} is at {revision}, before {mine}: it was"
                " restored from a backup; list again and watch from there"
            )

    def _stream(self) -> None:
        """Follow one stream until the server ends it in order."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._position,
            "timeoutSeconds": str(_random.randint(*_STREAM_SECONDS)),
        }
        path = collection(self._kind)
        response = self._server.stream(path, query, _SILENCE_SECONDS)
        self._taken_on, self._unknown = time.monotonic(), False
        try:
            with self._lock:
                self._response = response
            if self._buffer.over:
                return
            self.begun.set()
            lines = _lines(response)
            while (line := self._next(lines)) is not None and self._take(line):
                pass
        finally:
            with self._lock:
                self._response = None
            response.close()

    def _next(self, lines: Iterator[bytes]) -> bytes | None:
        """The next line; None at the end. Raises _CutError."""
        try:
            return next(lines, None)
        except (HTTPError, OSError, ValueError, AttributeError) as error:
            # also what reading a socket raises when another thread has shut it down
            if self._buffer.over:
                return None
            raise _CutError(str(error)) from error

    def _take(self, line: bytes) -> bool:
        """Pass on one line of the stream; False: nobody takes anything any more."""
        try:
            type_, data = decode_event(line)
        except UndecodableError as error:  # not of an API server, but of something in between
            raise _CutError(f"{error}, of {line[:_SHOWN_BYTES]!r}") from error
        if type_ == "ERROR":
            self._refused(data)
        try:
            revision = revision_of(self._kind, data)
        except UndecodableError as error:
            _log.error("%s: an object that can't be read is left out: %s", self._server, error)
            return True
        feeds = () if type_ == "BOOKMARK" else self.feeds
        told = [feed.event(type_, data, revision) for feed in feeds]
        if not self._buffer.put([event for event in told if event is not None]):
            return False
        # Only now: what another watch resumes from may be told twice, but not be skipped.
        for feed in self.feeds:
            self._heard |= feed.advance(revision)
        return True

    def _refused(self, data: msgspec.Raw) -> None:
        status = decode_status(data)
        if status.code == 410:
            raise RequestError(status)
        raise _CutError(f"{status.code} {status.message}")


class _CutError(Exception):
    """A stream ended before its time."""


def _lines(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    rest = b""
    for data in response.stream(_READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest.strip():
        raise UndecodableError("cut in the middle of an event")


def _positions(revision: str, count: int) -> list[str]:
    """A revision for each source; one for all when it is another kind's."""
    parts = revision.split(",")
    if not all(part.isdecimal() for part in parts) or len(parts) not in (1, count):
        raise RevisionGoneError(
            f"{revision!r} is no revision of Kubernetes; list again and watch from there"
        )
    return parts if len(parts) == count else parts * count
