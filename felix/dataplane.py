"""The one place that knows in which order things are applied, so that no packet sees half of it.

1. Sets are made, and members added: nothing refers to a new set yet, and an address that moves
   from one set to another is in both for a moment rather than in none.
2. The tunnel, interface settings and routes. A new pod is reachable now but still unknown to
   the chains, which drop what they don't know.
3. Chains, each table in one transaction.
4. Members are removed, and sets destroyed that no chain refers to any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from felix.desired import Delta, SetKey
from felix.network import Network
from kernel.links import LinkEvent
from policy.model import Member

Members = Callable[[SetKey], frozenset[Member]]


class Enforcer(Protocol):
    """What enforces policy. iptables is one; the contract tests say what any must do."""

    def want(self, delta: Delta) -> None:
        """Take what became different: settings, sets, chains and hooks."""

    def read(self) -> None:
        """See what is in the kernel, to adopt what is right and mend the rest."""

    def untouched(self) -> bool:
        """Whether it is certain that nobody else has changed anything since ``read``."""

    def fill_sets(self, now: float) -> int:
        """Step 1. Returns the number of changes, as the others do."""

    def apply_chains(self, now: float) -> int:
        """Step 3."""

    def trim_sets(self, now: float) -> int:
        """Step 4."""

    def enforces(self, interface: str) -> bool:
        """Whether the chains of a workload's interface stand, and packets are sent there."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """(object, what the kernel said) of everything that is not as it should be."""

    def next_retry(self) -> float | None:
        """When something that failed is due again, in monotonic seconds."""

    def close(self) -> None:
        """Let go of processes and sockets. What is in the kernel stays."""


class Dataplane:
    """Everything felix does to the kernel, in the calling thread's network namespace."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._enforcer = enforcer
        self._network = Network()

    def close(self) -> None:
        """Let go of processes and sockets. What is in the kernel stays."""
        self._enforcer.close()
        self._network.close()

    def switch(self, enforcer: Enforcer) -> None:
        """From now on it is this one that is told what is wanted. What the other did stays."""
        self._enforcer.close()
        self._enforcer = enforcer

    @property
    def enforcer(self) -> Enforcer:
        """What enforces policy now."""
        return self._enforcer

    def want(self, delta: Delta) -> None:
        """Take what became different. Nothing is written before ``apply``."""
        self._enforcer.want(delta)
        self._network.want_forwarding(delta.forwarding)
        if delta.tunnel is not None:
            self._network.want_tunnel(*delta.tunnel)
        for node, peer in delta.peers.items():
            self._network.want_peer(node, peer)
        for net, remote in delta.remotes.items():
            self._network.want_remote(net, remote)
        for interface, loose in delta.loose.items():
            self._network.want_loose(interface, loose)
        for interface, limits in delta.limits.items():
            self._network.want_limits(interface, limits)
        for address, behind in delta.pods.items():
            self._network.want_pod(address, behind)

    def read(self) -> None:
        """See what is in the kernel, to adopt what is right and mend the rest."""
        self._enforcer.read()
        self._network.read()

    def read_network(self) -> None:
        """Of routes, interfaces and their settings."""
        self._network.read()

    def read_policy(self) -> None:
        """Of what enforces policy, unless it is certain that nobody touched it."""
        if not self._enforcer.untouched():
            self._enforcer.read()

    def link_changed(self, event: LinkEvent) -> None:
        """The kernel told of an interface."""
        self._network.link_changed(event)

    def apply(self, now: float) -> int:
        """Do all that is due, in order; returns the number of changes."""
        return (
            self._enforcer.fill_sets(now)
            + self._network.apply(now)
            + self._enforcer.apply_chains(now)
            + self._enforcer.trim_sets(now)
        )

    def waiting(self, interface: str) -> bool:
        """Whether a pod's interface is missing or down."""
        return self._network.waiting(interface)

    def enforces(self, interface: str) -> bool:
        """Whether a pod's interface is there and its policy stands."""
        return not self.waiting(interface) and self._enforcer.enforces(interface)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(object, what is wrong) of everything that is not as it should be."""
        yield from self._enforcer.problems()
        yield from self._network.problems()

    def next_retry(self) -> float | None:
        """When something that failed is due again, in monotonic seconds."""
        times = [self._enforcer.next_retry(), self._network.next_retry()]
        return min((time for time in times if time is not None), default=None)
