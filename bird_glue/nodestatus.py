"""CalicoNodeStatus: what BGP does on this node, written where a resource asks for it.

A thread of its own, so that a slow store delays no route: it follows the resources, asks the
agent's loop when one is due, and writes ``status``. A resource whose ``updatePeriodSeconds`` is 0
is left as it is.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from api.errors import InvalidObjectError
from api.nodestatus import CalicoNodeStatus
from api.registry import parse_as
from bird_glue.status import Answer, Request
from datastore.follower import Follower, InSync, Update
from datastore.interface import JSON, ConflictError, Datastore, Key, NotFoundError, StoreError

_log = logging.getLogger(__name__)

KIND = "CalicoNodeStatus"
MOST_ROUTES = 4000  # of an IP version: a store takes about a megabyte an object
_ASK_SECONDS = 10.0
_ATTEMPTS = 3
_TYPES = {"node-to-node mesh": "NodeMesh", "global": "GlobalPeer"}


class Stop:
    """Put on the queue: end."""


class NodeStatusWriter:
    """Keeps the statuses of ``node``. ``ask`` gets Requests ``status`` and ``routes``."""

    def __init__(self, store: Datastore, node: str, ask: Callable[[Request], object]) -> None:
        self._store = store
        self._node = node
        self._ask = ask
        self._queue: queue.SimpleQueue[Update | InSync | Stop] = queue.SimpleQueue()
        self._follower = Follower(store, (KIND,), self._queue.put)
        self._wanted: dict[Key, CalicoNodeStatus] = {}
        self._due: dict[Key, float] = {}
        self._thread = threading.Thread(target=self._run, name="node-status", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._follower.start()
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        self._queue.put(Stop())
        if self._thread.ident is not None:
            self._thread.join()
        self._follower.stop()

    def _run(self) -> None:
        while True:
            first = min(self._due.values(), default=None)
            wait = None if first is None else max(0.0, first - time.monotonic())
            try:
                item = self._queue.get(timeout=wait)
            except queue.Empty:
                self._write_due(time.monotonic())
                continue
            if isinstance(item, Stop):
                return
            if isinstance(item, Update):
                self._take(item)

    def _take(self, update: Update) -> None:
        key = update.key
        found = None if update.value is None else _parsed(key, update.value)
        if found is None or found.spec.node != self._node or not found.spec.update_period_seconds:
            self._wanted.pop(key, None)
            self._due.pop(key, None)
            return
        known = self._wanted.get(key)
        self._wanted[key] = found
        if known is None or known.spec != found.spec:
            self._due[key] = time.monotonic()  # else it is our own word that came back

    def _write_due(self, now: float) -> None:
        due = [key for key, time in self._due.items() if time <= now]
        if not due:
            return
        status = self._answer("status")
        routes = self._answer("routes") if self._want_routes(due) else {}
        for key in due:
            wanted = self._wanted[key]
            self._due[key] = now + wanted.spec.update_period_seconds
            if "error" in status or "error" in routes:
                _log.warning("%s: not written: %s", key, status.get("error", routes.get("error")))
                continue
            try:
                self._write(key, report(wanted.spec.classes, status, routes))
            except StoreError as error:
                _log.warning("%s: not written: %s", key, error)

    def _want_routes(self, keys: list[Key]) -> bool:
        return any("Routes" in self._wanted[key].spec.classes for key in keys)

    def _answer(self, command: str) -> Answer:
        request = Request(command)
        self._ask(request)
        return request.wait(_ASK_SECONDS)

    def _write(self, key: Key, status: JSON) -> None:
        for _ in range(_ATTEMPTS):
            try:
                entry = self._store.get(key)
                self._store.update(key, entry.value | {"status": status}, entry.revision)
                return
            except ConflictError:
                continue
            except NotFoundError:
                return
        raise ConflictError(f"{key} changed {_ATTEMPTS} times while it was written", key)


def _parsed(key: Key, value: JSON) -> CalicoNodeStatus | None:
    try:
        found = parse_as(KIND, {name: part for name, part in value.items() if name != "status"})
    except InvalidObjectError as error:
        _log.error("%s: %s", key, error)
        return None
    assert isinstance(found, CalicoNodeStatus)
    return found


def report(classes: list[Any], status: Mapping[str, Any], routes: Mapping[str, Any]) -> JSON:
    """``status`` of a CalicoNodeStatus, from the agent's answers to ``status`` and ``routes``."""
    made: JSON = {"lastUpdated": _moment(time.time())}
    if "Agent" in classes:
        made["agent"] = {"birdV4": _daemon(status), "birdV6": _daemon(status)}
    if "BGP" in classes:
        made["bgp"] = _sessions(status["peers"])
    if "Routes" in classes:
        made["routes"] = {
            f"routesV{version}": [
                route
                for route in routes["routes"]
                if (":" in route["destination"]) == (version == 6)
            ][:MOST_ROUTES]
            for version in (4, 6)
        }
    return made


def _daemon(status: Mapping[str, Any]) -> JSON:
    """One daemon speaks for both IP versions. Without a peer there is none, and no need of one."""
    running = status["pid"] is not None or not status["peers"]
    made: JSON = {
        "state": "Ready" if running and status["in_sync"] else "NotReady",
        "version": str(status["engine"]),
        "routerID": status["router_id"],
    }
    if status["pid"] is not None:
        made["lastBootTime"] = _moment(status["started"])
        made["lastReconfigurationTime"] = _moment(status["configured"])
    return made


def _sessions(peers: list[Mapping[str, Any]]) -> JSON:
    made: JSON = {}
    for version in (4, 6):
        found = [peer for peer in peers if (":" in peer["address"]) == (version == 6)]
        up = sum(peer["state"] == "Established" for peer in found)
        made[f"numberEstablishedV{version}"] = up
        made[f"numberNotEstablishedV{version}"] = len(found) - up
        made[f"peersV{version}"] = [
            {
                "peerIP": peer["address"],
                "type": _TYPES.get(peer["type"], "NodePeer"),
                "state": peer["state"],
                "since": _moment(peer["since"]),
            }
            for peer in found
        ]
    return made


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
