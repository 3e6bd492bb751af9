"""What is left of nodes and pods that are gone, beside addresses: endpoints, Nodes themselves.

Where the store is Kubernetes' API both are views of its own objects, and go with those. In the
other stores nobody else takes them away. A Node is gone when its Kubernetes Node is (if there is
a cluster to ask, and the Node says which it is); an endpoint is when its Node is, or its Pod (if
there is a cluster to ask). What vanished from a node that lives its CNI daemon takes back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from datastore.interface import (
    ConflictError,
    Datastore,
    Entry,
    Key,
    NotFoundError,
    part,
)
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


@dataclass(frozen=True, slots=True, order=True)
class _Orphan:
    """An endpoint, of which container, and the Node or Pod that is gone."""

    endpoint: Key
    container: str
    owner: Key


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
        self._orphaned: Standing[_Orphan] = Standing()
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
        orphans = {
            _Orphan(user.key, user.container, Key("Node", user.node))
            for user in endpoints
            if user.node in gone
        }
        for user in inventory.without_pod():
            assert user.pod is not None
            orphans.add(_Orphan(user.key, user.container, Key("Pod", user.pod[1], user.pod[0])))
        self._orphaned.observe(orphans, now)
        for orphan in sorted(orphans):
            if not self._orphaned.lasted(orphan, now, grace):
                removed.waiting += 1
            elif self._remove(orphan):
                _log.info("%s: deleted: %s is gone", orphan.endpoint, orphan.owner)
                removed.endpoints.append(orphan.endpoint)

    def _remove(self, orphan: _Orphan) -> bool:
        """Delete the endpoint, unless its owner is there, or somebody wrote it meanwhile."""
        entry = _get(self._store, orphan.endpoint)
        if entry is None or _orphan_of(entry, orphan.owner) != orphan:
            return False
        owners = self._store if orphan.owner.kind == "Node" else self._kubernetes
        assert owners is not None  # or no pod would be missed
        return not _exists(owners, orphan.owner) and self._delete(entry)

    def _delete(self, entry: Entry) -> bool:
        if not self._proceed():
            raise HaltedError
        try:
            self._store.delete(entry.key, entry.revision)
        except (NotFoundError, ConflictError):
            return False
        return True


def _orphan_of(entry: Entry, owner: Key) -> _Orphan | None:
    """The endpoint as it is now, if it still names that owner."""
    spec = part(entry.value, "spec")
    named = (
        (spec.get("node"), "") if owner.kind == "Node" else (spec.get("pod"), entry.key.namespace)
    )
    if named != (owner.name, owner.namespace):
        return None
    return _Orphan(entry.key, str(spec.get("containerID") or ""), owner)


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
