"""Telling the CNI plugin which endpoints' policy is enforced, the moment it is.

Whoever connects to the socket is told all endpoints that are enforced, and then of every one
as it comes and goes: JSON objects, one a line,

    {"all": true, "endpoints": {"red/node--1-k8s-web-eth0": "0a1b…"}}
    {"all": false, "endpoints": {"red/node--1-k8s-web-eth0": null}}

from an endpoint's namespace and name to its ``spec.containerID`` (empty where it has none),
null when it is no longer ours to enforce. By the container a pod is told apart from the one of
the same name before it. The first line comes once everything was applied for the first time.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import orjson

from felix import names
from felix.desired import Local
from policy.model import EndpointId

SOCKET = "felix-endpoints.sock"
# Room for the names of some 30,000 endpoints. A subscriber that leaves so much unread is let
# go, to come again and be told all anew: nobody waits for it.
_BUFFER = 4 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subscription:
    """Somebody wants to be told."""

    connection: socket.socket


class Announcer:
    """What was told, what is to be told, and to whom. Used by the loop alone; never waits."""

    def __init__(self) -> None:
        self._pending: dict[EndpointId, Local] = {}
        self._enforced: dict[str, str] = {}
        self._subscribers: list[socket.socket] = []
        self._new: list[socket.socket] = []
        self._gone: set[str] = set()

    def subscribe(self, subscription: Subscription) -> None:
        """One more to tell."""
        connection = subscription.connection
        with contextlib.suppress(OSError):  # without privileges: as large as the system allows
            connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        connection.setblocking(False)
        self._new.append(connection)

    def want(self, endpoints: Mapping[EndpointId, Local | None]) -> None:
        """Endpoints that came, changed or went, before any of it is applied."""
        for id, local in endpoints.items():
            name = names.endpoint_text(id)
            if local is not None:
                self._pending[id] = local
                continue
            self._pending.pop(id, None)
            if self._enforced.pop(name, None) is not None:
                self._gone.add(name)

    def tell(self, is_enforced: Callable[[EndpointId, str], bool]) -> None:
        """Tell what became different, after it was applied.

        ``is_enforced``: whether an endpoint holds its interface and policy stands there.
        """
        changes: dict[str, str | None] = dict.fromkeys(self._gone)
        self._gone.clear()
        for id, local in list(self._pending.items()):
            if is_enforced(id, local.interface):
                del self._pending[id]
                name = names.endpoint_text(id)
                if self._enforced.get(name) != local.container:
                    self._enforced[name] = changes[name] = local.container
        if changes:
            self._subscribers = self._send(self._subscribers, changes, everything=False)
        if self._new:
            self._subscribers += self._send(self._new, self._enforced, everything=True)
            self._new = []

    def close(self) -> None:
        """Let go of all."""
        for connection in (*self._subscribers, *self._new):
            connection.close()
        self._subscribers, self._new = [], []

    def _send(
        self,
        connections: Iterable[socket.socket],
        endpoints: Mapping[str, str | None],
        *,
        everything: bool,
    ) -> list[socket.socket]:
        """Those that took it."""
        line = orjson.dumps({"all": everything, "endpoints": endpoints}) + b"\n"
        taken = []
        for connection in connections:
            try:
                if connection.send(line, socket.MSG_NOSIGNAL) == len(line):
                    taken.append(connection)
                    continue
                _log.warning("a subscriber does not read: it is let go")
            except BlockingIOError:
                _log.warning("a subscriber does not read: it is let go")
            except OSError:
                pass  # it has gone
            connection.close()
        return taken


_SO_SNDBUFFORCE = 32  # socket(7)
