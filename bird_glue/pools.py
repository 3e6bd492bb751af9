"""What IP pools and service ranges say about routes: which are told, which are programmed."""

from __future__ import annotations

from dataclasses import dataclass

from api.ippool import IPPoolSpec
from api.net import Net


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """What holds for routes inside a pool.

    ``exported``: they may be told to peers. ``programmed``: learned ones go to the kernel.
    """

    net: Net
    exported: bool
    programmed: bool


@dataclass(frozen=True, slots=True)
class Pools:
    """The pools of the cluster, and the ranges of its services.

    ``services``: ranges that every node announces; ``told_on``: ranges of services whose
    routes a reflector tells on. Routes outside of all of them are none of their business.
    """

    policies: tuple[PoolPolicy, ...] = ()
    services: tuple[Net, ...] = ()
    told_on: tuple[Net, ...] = ()

    def of(self, net: Net) -> PoolPolicy | None:
        """The pool that contains the prefix."""
        for policy in self.policies:
            if policy.net.contains(net):
                return policy
        return None

    def exports_own(self, block: Net) -> bool:
        """Whether a block of this node is announced: unless its pool forbids it."""
        policy = self.of(block)
        return policy is None or policy.exported

    def exports_address(self, host: Net) -> bool:
        """Whether an address outside of this node's blocks is announced: if its pool allows it."""
        policy = self.of(host)
        return policy is not None and policy.exported

    def exports_learned(self, net: Net) -> bool:
        """Whether a learned prefix may be told on: inside of a pool that allows it, or service."""
        policy = self.of(net)
        if policy is not None:
            return policy.exported
        return any(services.contains(net) for services in self.told_on)

    def programs(self, net: Net) -> bool:
        """Whether a learned prefix goes to the kernel: unless its pool leaves it to felix.

        What is inside of a range of service addresses that every node announces is found on
        this node as well as elsewhere.
        """
        policy = self.of(net)
        if policy is not None:
            return policy.programmed
        return all(not services.contains(net) for services in self.services)


def pool_policy(spec: IPPoolSpec, program_unencapsulated: bool) -> PoolPolicy:
    """What a pool says. ``disabled`` stops new addresses, not routes to those in use.

    Encapsulated pools are felix's to program; so are the others where BGPConfiguration's
    ``programClusterRoutes`` says so.
    """
    plain = spec.vxlan_mode == "Never" and spec.ipip_mode == "Never"
    return PoolPolicy(spec.net, not spec.disable_bgp_export, plain and program_unencapsulated)
