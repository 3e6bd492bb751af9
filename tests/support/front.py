"""An HTTP server in front of an API server: notes what is asked, and may answer in its place."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.daemon import HOST
from tests.support.kube import KubeApiserver

_HOPS_OWN = ("connection", "transfer-encoding", "content-length", "host")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request. ``query``: the first value of each parameter; ``at``: time.monotonic()."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    at: float

    @property
    def watches(self) -> bool:
        return "watch" in self.query


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of our own; the connection stays when the last part was sent, as after any."""

    code: int = 200
    parts: Iterable[bytes] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


def status(code: int, reason: str, message: str) -> bytes:
    """A metav1.Status, as the API server says what it does not do."""
    return json.dumps(
        {"kind": "Status", "code": code, "reason": reason, "message": message}
    ).encode()


def event(type_: str, value: Any) -> bytes:
    """A line of a watch."""
    return json.dumps({"type": type_, "object": value}).encode() + b"\n"


@dataclass
class Front:
    """Passes requests on to ``server``, but for those that ``instead`` answers."""

    server: KubeApiserver
    instead: Callable[[Asked], Reply | None] = lambda _: None
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"front": self})
        self._listener = ThreadingHTTPServer((HOST, 0), handler)
        self._listener.daemon_threads = True
        self._listener.block_on_close = False
        self._ends: set[socket.socket] = set()  # of connections under way, both sides
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,))
        self._thread.start()

    def kubeconfig(self, path: Path) -> Path:
        """A kubeconfig, at ``path``, of this server."""
        url = f"http://{HOST}:{self._listener.server_port}"
        path.write_text(self.server.kubeconfig.read_text().replace(self.server.url, url))
        return path

    def close(self) -> None:
        """End everything."""
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    front: Front
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        self.front._ends.add(self.connection)
        try:
            with suppress(OSError, HTTPException):
                super().handle()
        finally:
            self.front._ends.discard(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        """Nowhere."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        content = json.loads(body) if body else None
        asked = Asked(self.command, parts.path, query, content, time.monotonic())
        self.front.asked.append(asked)
        reply = self.front.instead(asked)
        if reply is not None:
            self._send(reply)
            return
        upstream = self.front.server.connection()
        try:
            self._send(self._forwarded(upstream, body))
        finally:
            if upstream.sock is not None:
                self.front._ends.discard(upstream.sock)
            upstream.close()

    def _forwarded(self, upstream: HTTPSConnection, body: bytes) -> Reply:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOPS_OWN}
        upstream.request(self.command, self.path, body or None, headers)
        assert upstream.sock is not None
        upstream.sock.settimeout(None)
        self.front._ends.add(upstream.sock)
        answer = upstream.getresponse()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in _HOPS_OWN}
        return Reply(answer.status, iter(lambda: answer.read1(1 << 16), b""), kept)

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.code)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in reply.parts:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815
