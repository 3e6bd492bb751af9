"""Requests to a Kubernetes API server: where it is, who we are, and what its refusals mean.

The ``kubernetes`` package reads the configuration (a pod's own, or a kubeconfig with all its ways
of authentication) and makes the TLS connections; answers are left as bytes. Token files are read
again when they rotate, and everything when the server no longer knows us.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import orjson
import urllib3
from urllib3.exceptions import (
    ClosedPoolError,
    EmptyPoolError,
    HTTPError,
    NewConnectionError,
    ProxyError,
)
from urllib3.exceptions import TimeoutError as TimedOutError

from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Key,
    NotFoundError,
    RevisionGoneError,
    StoreError,
    UnavailableError,
)
from datastore.kubernetes_objects import Status, decode_status

if TYPE_CHECKING:
    from kubernetes.client import Configuration

MERGE_PATCH = "application/merge-patch+json"

_random = Random()  # of its own: the global one belongs to programs
_CONNECT_SECONDS = 3.0
_LAST_SECONDS = 0.5  # a try that has less is not begun: of a write nobody would know what became
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 1.0
_CONNECTIONS = 8  # at most, for requests; more at a time wait for a free one
_STREAMS = 64  # kept for the next stream; each that is open has a connection of its own
_ASK_LATER = (429, 500, 502, 503, 504)
_NOT_DONE = (429,)  # the server turned the request away
_NOT_SENT = (NewConnectionError, ProxyError)
_BUSY_SECONDS = 1.0  # waits for a free connection no longer, for it may have been replaced


@dataclass(frozen=True, slots=True)
class KubernetesSettings:
    """Which cluster: a kubeconfig and a context in it; empty: what the package finds by itself.

    That is the cluster this pod runs in, else the kubeconfig of ``KUBECONFIG`` or
    ``~/.kube/config``. ``timeout``: seconds for one operation.
    """

    kubeconfig: str = ""
    context: str = ""
    timeout: float = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is no error: status code and body."""

    code: int
    body: bytes


class RequestError(Exception):
    """The server said no."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.message)
        self.status = status


class ApiServer:
    """Requests to one API server. Safe to use from several threads."""

    def __init__(self, settings: KubernetesSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._closed = False
        self._host = settings.kubeconfig

    def __str__(self) -> str:
        return f"Kubernetes {self._host}".rstrip()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: JSON | None = None,
        media_type: str = "application/json",
    ) -> Answer:
        """Ask, again where that is harmless, until ``timeout``.

        Raises RequestError with what the server refused, UnavailableError.
        """
        deadline = time.monotonic() + self.settings.timeout
        least = min(_LAST_SECONDS, self.settings.timeout / 4)
        turned_away = ""
        data = None if body is None else orjson.dumps(body)
        pause, renewed = _FIRST_PAUSE, False
        while True:
            left = max(0.1, deadline - time.monotonic())
            headers: Mapping[str, str] = {}
            connection = self._connected()
            try:
                response = connection.open(method, path, query, data, media_type, left)
                code, answer, headers = response.status, response.data, response.headers
            except (ClosedPoolError, EmptyPoolError):
                problem = f"its {_CONNECTIONS} connections are busy"
            except HTTPError as error:
                problem = _reason(error)
                if turned_away and isinstance(error, TimedOutError):
                    problem = turned_away  # which explains it
                self.renew(connection)  # perhaps it moved, or our certificate was replaced
                if method != "GET" and not isinstance(error, _NOT_SENT):
                    raise self._down(
                        f"{problem}; whether it carried out the {method} is not known: read again"
                    ) from error
            else:
                if not renewed and connection.unknown(code):
                    renewed = True
                    self.renew(connection)
                    continue
                if code not in _ASK_LATER:
                    return _checked(code, answer)
                problem = turned_away = f"{code} {decode_status(answer).message}"
                if method != "GET" and code not in _NOT_DONE:
                    raise self._down(
                        f"{problem}; whether it carried out the {method} is not known: read again"
                    )
            wait = max(pause * _random.uniform(0.5, 1.0), _retry_after(headers))
            pause = min(2 * pause, _LONGEST_PAUSE)
            if time.monotonic() + wait + least >= deadline:
                raise self._down(problem)
            time.sleep(wait)

    def stream(
        self, path: str, query: Mapping[str, str], silence: float
    ) -> urllib3.BaseHTTPResponse:
        """A response to be read bit by bit; ``silence``: seconds without any that are too many.

        Raises RequestError, UnavailableError.
        """
        connection = self._connected()
        try:
            seconds = self.settings.timeout
            response = connection.open("GET", path, query, None, "", seconds, stream=True)
        except HTTPError as error:
            self.renew(connection)
            raise self._down(_reason(error)) from error
        if response.status == 200:
            socket = getattr(response.connection, "sock", None)
            if socket is not None:
                socket.settimeout(silence)
            return response
        try:
            status = decode_status(response.data)
        except HTTPError as error:
            raise self._down(_reason(error)) from error
        finally:
            response.release_conn()
        status.code = response.status
        if connection.unknown(response.status):
            self.renew(connection)
        if response.status in _ASK_LATER:
            raise self._down(f"{response.status} {status.message}")
        raise RequestError(status)

    def renew(self, connection: _Connection) -> None:
        """Read the configuration again next time, unless that was done already."""
        with self._lock:
            if self._connection is connection:
                self._connection = None
        connection.retire()

    def close(self) -> None:
        """Let go of all connections; every later request fails."""
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.retire()

    def explain(self, error: RequestError, key: Key | None, what: str = "") -> StoreError:
        """A refusal as an error of stores: object, field, value and what would be right."""
        connection = self._connection
        if error.status.code in (401, 403) and connection is not None and connection.anonymous:
            return UnavailableError(
                f"{self}: {error.status.message}; the configuration gives no credentials (when it"
                " names an exec plugin, the log says what went wrong with that)",
                key,
            )
        return explain(str(self), error.status, key, what)

    def _connected(self) -> _Connection:
        with self._lock:
            if self._closed:
                raise UnavailableError(f"{self}: closed by this program")
            if self._connection is None:
                self._connection = _Connection(_configuration(self.settings))
                self._host = self._connection.host
            return self._connection

    def _down(self, problem: str) -> UnavailableError:
        return UnavailableError(
            f"{self}: no answer ({problem}); make sure that the API server runs and that"
            " MANX_DATASTORE names the right cluster"
        )


class _Connection:
    """A configuration, and the connections it makes: a few for requests, one for each stream."""

    def __init__(self, configuration: Configuration) -> None:
        self.host: str = configuration.host
        self._configuration = configuration
        self._lock = threading.Lock()
        self._requests = _pool(configuration, _CONNECTIONS, block=True)
        self._streams = _pool(configuration, _STREAMS, block=False)

    def open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        data: bytes | None,
        media_type: str,
        seconds: float,
        *,
        stream: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": "application/json", "User-Agent": "manx"}
        if data is not None:
            headers["Content-Type"] = media_type
        for setting in self._credentials().values():
            if setting["value"]:
                headers[setting["key"]] = setting["value"]
        return (self._streams if stream else self._requests).request(
            method,
            f"{self.host}{path}{'?' + urlencode(query) if query else ''}",
            body=data,
            headers=headers,
            preload_content=not stream,
            retries=False,
            redirect=False,
            timeout=urllib3.Timeout(connect=min(_CONNECT_SECONDS, seconds), read=seconds),
            pool_timeout=min(_BUSY_SECONDS, seconds),
        )

    def retire(self) -> None:
        """Close the connections that are idle; the others when their requests are done."""
        self._requests.clear()
        self._streams.clear()

    @property
    def anonymous(self) -> bool:
        """Whether nothing says who we are."""
        known = self._configuration
        return not (known.api_key or known.cert_file or known.username)

    def unknown(self, code: int) -> bool:
        """Whether that answer may be for want of credentials, or of newer ones."""
        return code == 401 or (code == 403 and self.anonymous)

    def _credentials(self) -> Mapping[str, Any]:
        from kubernetes.config import ConfigException

        try:
            with self._lock:  # the hook that reads token files again is not made for threads
                settings: Mapping[str, Any] = self._configuration.auth_settings()
        except (ConfigException, OSError, ValueError) as error:
            raise UnavailableError(
                f"Kubernetes {self.host}: credentials can't be read: {error}"
            ) from error
        return settings


def _pool(configuration: Configuration, size: int, *, block: bool) -> urllib3.PoolManager:
    from kubernetes.client.rest import RESTClientObject

    configuration.connection_pool_maxsize = size
    pool: urllib3.PoolManager = RESTClientObject(configuration).pool_manager
    pool.connection_pool_kw["block"] = block
    return pool


def _configuration(settings: KubernetesSettings) -> Configuration:
    from kubernetes import config
    from kubernetes.client import Configuration

    configuration = Configuration()
    try:
        if not settings.kubeconfig and os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        else:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                settings.kubeconfig or None,
                settings.context or None,
                configuration,
                persist_config=False,
            )
    except (config.ConfigException, OSError, TypeError, ValueError) as error:
        where = settings.kubeconfig or "neither a pod's service account nor a kubeconfig"
        raise UnavailableError(
            f"Kubernetes: {where}: {error}; set KUBECONFIG, or kubernetes://?kubeconfig=FILE"
        ) from error
    configuration.retries = False
    return configuration


def _checked(code: int, body: bytes) -> Answer:
    if code < 300:
        return Answer(code, body)
    status = decode_status(body)
    status.code = code
    raise RequestError(status)


def _reason(error: HTTPError) -> str:
    return str(error.__cause__ or error)


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0


def is_absent(error: RequestError) -> bool:
    """Whether the API server doesn't know the kind that it was asked to list or watch."""
    return error.status.code == 404 and not (error.status.details or {}).get("name")


def explain(server: str, status: Status, key: Key | None, what: str = "") -> StoreError:
    """A refusal as an error of stores."""
    subject = f"{key}" if key else what
    details = status.details or {}
    match status.code:
        case 404 if key is not None and details.get("name") == key.name:
            return NotFoundError(f"{subject}: does not exist", key)
        case 404 if details.get("kind") == "namespaces":
            return StoreError(
                f"{subject}: metadata.namespace: {details.get('name')!r}: expected a namespace"
                " that exists; create it first",
                key,
            )
        case 404 if not details.get("name"):
            return UnavailableError(
                f"{server}: does not know the kind of {subject}; install the CRDs:"
                " kubectl apply -f manifests/crds/",
                key,
            )
        case 404:
            return NotFoundError(f"{subject}: {status.message}", key)
        case 409 if status.reason == "AlreadyExists":
            return AlreadyExistsError(f"{subject}: exists already", key)
        case 409:
            return ConflictError(f"{subject}: {status.message}", key)
        case 410:
            return RevisionGoneError(
                f"{server}: {subject}: {status.message}; list again and watch from there", key
            )
        case 401:
            return UnavailableError(
                f"{server}: does not know us ({status.message}); renew the token or certificate",
                key,
            )
        case 403:
            return UnavailableError(
                f"{server}: {status.message}; grant it with a ClusterRole (docs/datastore.md)", key
            )
    return StoreError(f"{subject}: {_invalid(status)}", key)


def _invalid(status: Status) -> str:
    """Every field that is wrong, where the server tells; else its message."""
    causes = (status.details or {}).get("causes") or []
    told = [cause for cause in causes if isinstance(cause, dict)]
    about_fields = [cause for cause in told if cause.get("field") not in (None, "", "<nil>")]
    texts = [_cause(cause) for cause in about_fields or told]
    return "; ".join(texts) or f"refused: {status.message} ({status.code} {status.reason})"


def _cause(cause: Mapping[str, Any]) -> str:
    field, message = cause.get("field") or "", cause.get("message") or ""
    message = message.removeprefix("Invalid value: ").removeprefix("Unsupported value: ")
    return f"{field}: {message}" if field and field != "<nil>" else message
