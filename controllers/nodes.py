"""What is left of nodes that are gone, beside their addresses: endpoints, and Nodes themselves.

Where the store is Kubernetes' API both are views of its own objects, and go with those. In the
other stores nobody else takes them away. A Node is gone when its Kubernetes Node is (if there is
a cluster to ask, and the Node says which it is); an endpoint is when its Node is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from datastore.interface import ConflictError, Datastore, Entry, Key, NotFoundError
from ipam.collector import HaltedError, Standing
from ipam.inventory import Inventory

_ORCHESTRATOR = "k8s"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Removed:
    """What a run removed, and how many objects wait for their grace period to end."""

    endpoints: list[Key] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    waiting: int = 0


class NodeCleaner:
    """Remembers what it observed. Parameters as ``ipam.collector.Collector``'s."""

    def __init__(
        self,
        store: Datastore,
        kubernetes: Datastore | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        proceed: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._kubernetes = kubernetes
        self._clock = clock
        self._proceed = proceed
        self._orphaned: Standing[tuple[Key, str]] = Standing()
        self._left: Standing[tuple[str, str]] = Standing()

    def run(self, inventory: Inventory, grace: float) -> Removed:
        """Observe, and remove what has been gone for ``grace`` seconds at two observations.

        Raises StoreError, HaltedError.
        """
        now = self._clock()
        removed = Removed()
        if "Node" not in self._store.given:
            self._remove_nodes(now, grace, removed)
        if "WorkloadEndpoint" not in self._store.given:
            self._remove_endpoints(inventory, now, grace, removed)
        return removed

    def _remove_nodes(self, now: float, grace: float, removed: Removed) -> None:
        if self._kubernetes is None:
            return
        references = {
            (entry.key.name, name)
            for entry in self._store.list("Node").entries
            for name in _references(entry)
        }
        there = {entry.key.name for entry in self._kubernetes.list("KubernetesNode").entries}
        gone = {pair for pair in references if pair[1] not in there} if there else set()
        self._left.observe(gone, now)
        for node, name in gone:
            if not self._left.lasted((node, name), now, grace):
                removed.waiting += 1
            elif not _exists(self._kubernetes, Key("KubernetesNode", name)):
                entry = _get(self._store, Key("Node", node))
                if entry is not None and name in _references(entry) and self._delete(entry):
                    _log.info("%s: deleted: Kubernetes' node %s is gone", entry.key, name)
                    removed.nodes.append(node)

    def _remove_endpoints(
        self, inventory: Inventory, now: float, grace: float, removed: Removed
    ) -> None:
        endpoints = [user for user in inventory.users if user.key.kind == "WorkloadEndpoint"]
        gone = inventory.gone({user.node for user in endpoints})
        orphaned = [(user.key, user.node) for user in endpoints if user.node in gone]
        self._orphaned.observe(orphaned, now)
        for key, node in orphaned:
            if not self._orphaned.lasted((key, node), now, grace):
                removed.waiting += 1
            elif not _exists(self._store, Key("Node", node)):
                entry = _get(self._store, key)
                spec = (entry.value.get("spec") or {}) if entry else {}
                if entry is not None and spec.get("node") == node and self._delete(entry):
                    _log.info("%s: deleted: node %s is gone", key, node)
                    removed.endpoints.append(key)

    def _delete(self, entry: Entry) -> bool:
        if not self._proceed():
            raise HaltedError
        try:
            self._store.delete(entry.key, entry.revision)
        except (NotFoundError, ConflictError):
            return False
        return True


def _references(entry: Entry) -> list[str]:
    """The names a Node has in Kubernetes."""
    references = (entry.value.get("spec") or {}).get("orchRefs") or []
    return [
        reference.get("nodeName") or entry.key.name
        for reference in references
        if reference.get("orchestrator") == _ORCHESTRATOR
    ]


def _get(store: Datastore, key: Key) -> Entry | None:
    try:
        return store.get(key)
    except NotFoundError:
        return None


def _exists(store: Datastore, key: Key) -> bool:
    return _get(store, key) is not None
