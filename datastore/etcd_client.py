"""Calls to an etcd cluster over gRPC: endpoints and fail-over, TLS, user and password, errors.

One connection at a time, to one member; when that fails, the next member. A read is repeated on
other members. A write is repeated only when it certainly was not carried out; otherwise the
caller learns that its outcome is unknown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from datastore import etcd_pb2 as pb
from datastore.interface import StoreError, UnavailableError

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(frozen=True, slots=True, eq=False)
class Method(Generic[Q, A]):
    """A method of etcd's API, and how its messages become bytes and back."""

    path: str
    write: Callable[[Q], bytes]
    read: Callable[[bytes], A]


RANGE = Method(
    "/etcdserverpb.KV/Range", pb.RangeRequest.SerializeToString, pb.RangeResponse.FromString
)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest.SerializeToString, pb.TxnResponse.FromString)
WATCH = Method(
    "/etcdserverpb.Watch/Watch", pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
)
AUTHENTICATE = Method(
    "/etcdserverpb.Auth/Authenticate",
    pb.AuthenticateRequest.SerializeToString,
    pb.AuthenticateResponse.FromString,
)

_TURN_PAUSE = 0.1  # after all members failed
_MEMBER_SECONDS = 3.0  # how long one member may take before the next is asked
_LAST_SECONDS = 0.5  # a try that has less is not begun: of a write nobody would know what became
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    # Of what gRPC does around every call only what is needed here: a fourteenth of a swap less.
    # Retries are those of calls that never reached the server; deadlines, of versions that check
    # them in a part of their own.
    ("grpc.minimal_stack", 1),
    ("grpc.enable_retries", 1),
    ("grpc.enable_deadline_checking", 1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of our own, not one that was given up
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A member that vanished without a word is found out in 15 s. etcd refuses pings more often
    # than every 5 s, and pings without a call under way. The second limit is that of a ping
    # which was on its way for another purpose (a minute, if not told): then none is sent besides.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
# Fail at once on a member that has no leader (rpctypes.MetadataRequireLeaderKey). Asked of each
# member at first, and of watches always; of every swap it would cost a fifteenth of them. A member
# that loses the others later is found out by its watches, or by the time-out.
_REQUIRE_LEADER = (("hasleader", "true"),)
# What passes, and has no status code of its own: etcd's, and gRPC's for a connection that ended.
_UNSAID = ("context ", "raft proposal dropped", "Stream removed")
_NOT_SENT = ("failed to connect to all addresses", "connections to all backends failing")
_TOO_LARGE = "message larger than max"  # so will it be at another member, and later
_OVERLOADED = "etcdserver: too many requests"
_NOT_DONE = ("etcdserver: no leader", _OVERLOADED, "raft proposal dropped")
_BAD_TOKEN = ("invalid auth token", "auth store is old", "revision in header is old")
_COMPACTED = "required revision has been compacted"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: who is trusted (None: what the system trusts), and our own identity."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """How to reach a cluster. ``timeout``: seconds for one operation, over all members."""

    endpoints: tuple[str, ...]
    tls: TlsFiles | None = None
    user: str = ""
    password: str = ""
    timeout: float = 5.0

    def __str__(self) -> str:
        return f"etcd {','.join(self.endpoints)}"


class CompactedError(StoreError):
    """The revision asked for is no longer kept."""


class RefusedError(UnavailableError):
    """The cluster answers, and does not let us: not a thing that passes by itself."""


class _Member:
    """One endpoint and the connection to it."""

    def __init__(self, settings: EtcdSettings, endpoint: str) -> None:
        self.endpoint = endpoint
        self.led = False  # it had a leader when it was asked
        if settings.tls is None:
            self._channel = grpc.insecure_channel(endpoint, _OPTIONS)
        else:
            self._channel = grpc.secure_channel(endpoint, _credentials(settings.tls), _OPTIONS)
        self._calls: dict[Method[Any, Any], Callable[..., Any]] = {}

    def unary(self, method: Method[Q, A]) -> Callable[..., A]:
        """The method as a function."""
        call = self._calls.get(method)
        if call is None:
            call = self._channel.unary_unary(
                method.path, request_serializer=method.write, response_deserializer=method.read
            )
            self._calls[method] = call
        return call

    def stream(self, method: Method[Q, A]) -> Callable[..., Any]:
        """The method as a function of an iterator of requests, returning one of responses."""
        stream: Callable[..., Any] = self._channel.stream_stream(
            method.path, request_serializer=method.write, response_deserializer=method.read
        )
        return stream

    def close(self) -> None:
        """End every call under way."""
        self._channel.close()


class EtcdClient:
    """Calls to a cluster. Safe to use from several threads; nothing is opened before the first."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._turn = 0
        self._member: _Member | None = None
        self._token = ""
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether this program has closed it."""
        return self._closed

    def call(self, method: Method[Q, A], request: Q, *, writes: bool = False) -> A:
        """The answer of the first member that gives one. Raises StoreError and its kinds."""
        deadline = time.monotonic() + self.settings.timeout
        least = min(_LAST_SECONDS, self.settings.timeout / 4)
        tries, token_tries = 0, 0
        turned_away: grpc.RpcError | None = None
        while True:
            left = deadline - time.monotonic()
            member = self._member or self._connected()
            token = self._token
            try:
                if not token and self.settings.user:
                    token = self._authenticate(member, left)
                answer = member.unary(method)(
                    request,
                    timeout=min(left, _MEMBER_SECONDS),
                    metadata=_metadata(token, member.led) if token or not member.led else None,
                )
                member.led = True
                return answer
            except grpc.RpcError as error:
                if self._closed:
                    raise self._explained(error) from error
                if _is_bad_token(error) and token_tries < 2:
                    token_tries += 1
                    self.forget(token)
                    continue
                if not _is_passing(error):
                    raise self._explained(error) from error
                self.avoid(member)
                tries += 1
                asked = token or not self.settings.user  # else it failed before, at the token
                if writes and asked and not _certainly_not_done(error):
                    raise UnavailableError(
                        f"{self.settings}: {member.endpoint} failed while it was asked to write"
                        f" ({error.details()}); whether it did is not known: read again"
                    ) from error
                if _OVERLOADED in (error.details() or ""):
                    turned_away = error
                around = tries % len(self.settings.endpoints) == 0
                if time.monotonic() + (_TURN_PAUSE if around else 0) + least >= deadline:
                    raise self._explained(turned_away or error) from error
                if around:
                    time.sleep(_TURN_PAUSE)

    def watch(self, requests: Iterator[pb.WatchRequest]) -> tuple[Any, Callable[[], None]]:
        """A stream of WatchResponses (also a grpc.Call), and what to do when it failed.

        Raises grpc.RpcError, as iterating over it does, and UnavailableError.
        """
        member = self._connected()
        token = self._token
        if not token and self.settings.user:
            token = self._authenticate(member, self.settings.timeout)
        responses = member.stream(WATCH)(requests, metadata=_metadata(token))

        def failed() -> None:
            self.forget(token)
            self.avoid(member)

        return responses, failed

    def avoid(self, failed: object) -> None:
        """Use the next member from now on, unless another is in use already."""
        with self._lock:
            if self._member is failed:
                # Not closed: other threads may have calls on it, whose end would be unknown.
                self._member = None
                self._turn += 1

    def forget(self, token: str) -> None:
        """Ask for a new token next time, unless there is a newer one."""
        with self._lock:
            if self._token == token:
                self._token = ""

    def close(self) -> None:
        """End all calls; every later one fails."""
        with self._lock:
            self._closed = True
            member, self._member = self._member, None
        if member is not None:
            member.close()

    def _connected(self) -> _Member:
        with self._lock:
            if self._closed:
                raise UnavailableError(f"{self.settings}: closed by this program")
            if self._member is None:
                endpoints = self.settings.endpoints
                self._member = _Member(self.settings, endpoints[self._turn % len(endpoints)])
            return self._member

    def _authenticate(self, member: _Member, timeout: float) -> str:
        request = pb.AuthenticateRequest(name=self.settings.user, password=self.settings.password)
        token: str = member.unary(AUTHENTICATE)(
            request, timeout=min(timeout, _MEMBER_SECONDS), metadata=_REQUIRE_LEADER
        ).token
        with self._lock:
            self._token = token
        return token

    def _explained(self, error: grpc.RpcError) -> StoreError:
        return explain(self.settings, error, closed=self._closed)


_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,  # a stream reset half-way
)


def explain(settings: EtcdSettings, error: grpc.RpcError, *, closed: bool = False) -> StoreError:
    """What went wrong, and what to do about it."""
    code, details = error.code(), error.details() or ""
    if closed:
        return UnavailableError(f"{settings}: closed by this program")
    if _COMPACTED in details:
        return CompactedError(f"{settings}: {details}")
    if code == grpc.StatusCode.PERMISSION_DENIED or "permission denied" in details:
        who = f"user {settings.user}" if settings.user else "the client certificate's user"
        return RefusedError(
            f"{settings}: {who} may not do that ({details}); grant it: etcdctl role"
            " grant-permission ROLE --prefix=true readwrite /calico/"
        )
    if "user name is empty" in details or code == grpc.StatusCode.UNAUTHENTICATED:
        return RefusedError(
            f"{settings}: it wants to know who we are ({details}); set MANX_ETCD_USER and"
            " MANX_ETCD_PASSWORD, or a client certificate"
        )
    if "authentication failed" in details:
        return RefusedError(
            f"{settings}: user {settings.user}: wrong user or password ({details}); correct"
            " MANX_ETCD_USER and MANX_ETCD_PASSWORD"
        )
    if "database space exceeded" in details:
        return UnavailableError(
            f"{settings}: its disk quota is used up; compact and defragment it, then:"
            " etcdctl alarm disarm"
        )
    if _OVERLOADED in details:
        return UnavailableError(
            f"{settings}: turns us away ({details}): more is asked of it than it can do; see what"
            " its disk and its other users are at"
        )
    exhausted = code == grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE not in details
    if _is_passing(error) or exhausted:
        return UnavailableError(
            f"{settings}: no member answers ({details}); make sure that etcd runs, and that the"
            " endpoints, certificates and time-out in MANX_DATASTORE and MANX_ETCD_* are right"
        )
    return StoreError(f"{settings}: refused: {details} ({code.name})")


def _metadata(token: str, led: bool = False) -> tuple[tuple[str, str], ...]:
    """Headers of a request. One without any is the cheapest."""
    require = () if led else _REQUIRE_LEADER
    return (*require, ("token", token)) if token else require


def _is_passing(error: grpc.RpcError) -> bool:
    """Whether another member, or this one later, may do better."""
    code, details = error.code(), error.details() or ""
    unsaid = code == grpc.StatusCode.UNKNOWN and any(text in details for text in _UNSAID)
    return code in _PASSING or unsaid or _OVERLOADED in details


def _is_bad_token(error: grpc.RpcError) -> bool:
    return any(text in (error.details() or "") for text in _BAD_TOKEN)


def _certainly_not_done(error: grpc.RpcError) -> bool:
    details = error.details() or ""
    return any(text in details for text in (*_NOT_SENT, *_NOT_DONE))


def _credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=_read(files.ca, "MANX_ETCD_CA"),
        private_key=_read(files.key, "MANX_ETCD_KEY"),
        certificate_chain=_read(files.cert, "MANX_ETCD_CERT"),
    )


def _read(path: Path | None, variable: str) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise UnavailableError(f"{variable}: {path}: {error.strerror}") from error
