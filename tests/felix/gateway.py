"""A node that forwards between two hosts, with a pod; felix runs in this process."""

from __future__ import annotations

from contextlib import ExitStack

from api.net import parse_net
from api.registry import key_parts
from datastore.interface import JSON, Key
from kernel.netns import Namespace
from tests.felix.fabric import Brain
from tests.felix.world import Listener, cluster, is_dropped, reaches
from tests.support.netns import connect, eventually, fresh_namespace, run

NODE = {4: "172.31.0.1", 6: "fd31::1"}
NEAR = {4: "172.31.0.2", 6: "fd31::2"}  # behind eth0
NODE_FAR = {4: "172.32.0.1", 6: "fd32::1"}
FAR = {4: "172.32.0.2", 6: "fd32::2"}  # behind eth1
POD = {4: "10.0.0.1", 6: "fd10::1"}
PORTS = (80, 81, 22)


class Gateway:
    """A node between two hosts, which are on networks of their own."""

    def __init__(self, backend: str, stack: ExitStack) -> None:
        self.backend = backend
        (self.node,) = stack.enter_context(cluster("node1"))
        self.near = stack.enter_context(fresh_namespace())
        self.far = stack.enter_context(fresh_namespace())
        for name, other, here, there in (
            ("eth0", self.near, NODE, NEAR),
            ("eth1", self.far, NODE_FAR, FAR),
        ):
            ends = [
                f"{end[v]}/{length}" for v, length in ((4, 24), (6, 64)) for end in (here, there)
            ]
            connect(self.node.netns, name, other, "eth0", ends)
            for version in (4, 6):
                run(other, "ip", f"-{version}", "route", "add", "default", "via", here[version])
        for netns in (self.node.netns, self.near, self.far):
            eventually(lambda netns=netns: "tentative" not in run(netns, "ip", "-6", "a").stdout)  # type: ignore[misc]
        self.brain = Brain(self.node, backend, stack)
        self.pod = self.node.pod("pod", POD[4], endpoint=False)
        stack.callback(self.pod.netns.close)
        self.pod.add_address(POD[6])
        namespace = {"metadata": {"name": "default"}}
        self.brain.snapshot.update(Key("Namespace", "default"), namespace)
        networks = [str(parse_net(address)) for address in POD.values()]
        self.brain.snapshot.update(self.pod.key, self.pod.endpoint(ipNetworks=networks))
        self.brain.read()
        self.brain.enforce()
        for netns in (self.node.netns, self.near, self.far, self.pod.netns):
            for port in PORTS:
                stack.enter_context(Listener(netns, port, version=6))  # and IPv4, mapped
        self.put: dict[Key, None] = {}

    def enforce(self, *objects: JSON, readable: bool = True) -> None:
        """These are there from now on; not ``readable``: something of it can't be read."""
        for obj in objects:
            kind, namespace, name = key_parts(obj)
            key = Key(kind, name, namespace)
            self.put[key] = None
            self.brain.snapshot.update(key, obj)
        self.brain.enforce(readable=readable)

    def clean(self) -> None:
        """What was put goes."""
        for key in self.put:
            self.brain.snapshot.update(key, None)
        self.put.clear()
        self.brain.enforce()


def allowed(source: Namespace, target: dict[int, str], port: int = 80) -> bool:
    """In both IP versions."""
    return all(reaches(source, target[version], port) for version in (4, 6))


def dropped(source: Namespace, target: dict[int, str], port: int = 80) -> bool:
    """In both IP versions."""
    return all(is_dropped(source, target[version], port) for version in (4, 6))
