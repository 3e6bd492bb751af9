"""The pods of a lab: created and removed as kubelet and a container runtime would."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from datastore.interface import AlreadyExistsError, Datastore, StoreError
from kernel.links import link_up
from kernel.netlink import NetlinkSocket
from lab import objects
from lab.errors import LabError
from lab.fabric import Pod
from lab.namespaces import Namespaces, make_pod_namespace, remove_pod_namespace
from lab.runtime import Added, Attachment, Runtime

NETNS_DIR = Path("/run/netns")  # in the node
LOOPBACK = 1  # the interface index of lo, in every namespace


@dataclass(slots=True)
class RunningPod:
    """A pod with its network: ``net`` is a descriptor of its namespace."""

    pod: Pod
    attachment: Attachment
    net: int
    added: Added

    @property
    def addresses(self) -> list[str]:
        """Its addresses."""
        return self.added.addresses()


class Pods:
    """All pods of a lab. Safe to use from several threads; one pod is worked on at a time."""

    def __init__(
        self, store: Datastore, nodes: dict[str, Namespaces], runtimes: dict[str, Runtime]
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._runtimes = runtimes
        self._running: dict[str, RunningPod] = {}
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    def running(self) -> list[RunningPod]:
        """The pods there are, by key."""
        with self._lock:
            return [self._running[key] for key in sorted(self._running)]

    def find(self, name: str) -> RunningPod | None:
        """The pod ``NAMESPACE/NAME``, or ``NAME`` where only one namespace has such a pod.

        Raises LabError when several have.
        """
        with self._lock:
            if "/" in name:
                return self._running.get(name)
            found = [pod for pod in self._running.values() if pod.pod.name == name]
        if len(found) > 1:
            keys = ", ".join(sorted(pod.pod.key for pod in found))
            raise LabError(f"pod {name}: which one? {keys}")
        return found[0] if found else None

    def add(self, pod: Pod) -> RunningPod:
        """Create a pod and connect it. When that fails nothing of it remains. Raises LabError."""
        if pod.node not in self._nodes:
            known = ", ".join(sorted(self._nodes)) or "this lab has none"
            raise LabError(f"pod {pod.key}: node {pod.node!r}: expected one of {known}")
        self._claim(pod.key)
        try:
            running = self._create(pod)
            with self._lock:
                self._running[pod.key] = running
            return running
        finally:
            self._release(pod.key)

    def delete(self, name: str) -> None:
        """Disconnect and remove a pod. Raises LabError when there is none or DEL fails."""
        running = self.find(name)
        if running is None:
            raise LabError(f"there is no pod {name}")
        key = running.pod.key
        self._claim(key, must_exist=True)
        try:
            self._remove(running)
            with self._lock:
                del self._running[key]
        finally:
            self._release(key)

    def _claim(self, key: str, must_exist: bool = False) -> None:
        with self._lock:
            if key in self._busy or (key in self._running) != must_exist:
                state = "is being worked on" if key in self._busy else "exists already"
                if must_exist and key not in self._busy:
                    state = "is gone"
                raise LabError(f"pod {key} {state}")
            self._busy.add(key)

    def _release(self, key: str) -> None:
        with self._lock:
            self._busy.discard(key)

    def _create(self, pod: Pod) -> RunningPod:
        try:
            uid = objects.create_pod(self._store, pod)
        except AlreadyExistsError:
            raise LabError(f"pod {pod.key} exists already in the datastore") from None
        node = self._nodes[pod.node]
        attachment = _attachment(pod, uid)
        path = Path(attachment.netns)
        with ExitStack() as undo:
            undo.callback(objects.delete_pod, self._store, pod)
            with _said_of(pod):
                net = make_pod_namespace(node, path)
                undo.callback(remove_pod_namespace, node, path)
                undo.callback(os.close, net)
                _loopback_up(net)
                added = self._runtimes[pod.node].add(attachment)
                undo.callback(self._runtimes[pod.node].delete, attachment)
                objects.set_pod_running(self._store, pod, added.addresses())
            undo.pop_all()
        return RunningPod(pod, attachment, net, added)

    def _remove(self, running: RunningPod) -> None:
        pod = running.pod
        with _said_of(pod):
            self._runtimes[pod.node].delete(running.attachment)
            remove_pod_namespace(self._nodes[pod.node], Path(running.attachment.netns))
            objects.delete_pod(self._store, pod)
        os.close(running.net)


def _attachment(pod: Pod, uid: str) -> Attachment:
    container_id = secrets.token_hex(32)  # as container runtimes call their sandboxes
    args = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": pod.namespace,
        "K8S_POD_NAME": pod.name,
        "K8S_POD_INFRA_CONTAINER_ID": container_id,
        "K8S_POD_UID": uid,
    }
    return Attachment(container_id, str(NETNS_DIR / f"{pod.namespace}_{pod.name}"), args)


@contextmanager
def _said_of(pod: Pod) -> Iterator[None]:
    """Errors inside name the pod, and are LabErrors."""
    try:
        yield
    except LabError as error:
        error.message = f"pod {pod.key} on {pod.node}: {error.message}"
        raise
    except (OSError, StoreError) as error:
        raise LabError(f"pod {pod.key} on {pod.node}: {error}") from error


def _loopback_up(net: int) -> None:
    """``ip link set lo up``: what runtimes have the ``loopback`` plugin do. Raises OSError."""
    with NetlinkSocket(netns_fd=net) as netlink:
        for failure in netlink.batch([link_up(LOOPBACK)]):
            raise failure.error("lo")
