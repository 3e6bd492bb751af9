"""What IP pools say about routes: which are told to peers, and which are ours to program."""

from __future__ import annotations

from collections.abc import Iterable
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


class Pools:
    """The pools of the cluster. Routes outside of all of them are none of their business."""

    def __init__(self, policies: Iterable[PoolPolicy] = ()) -> None:
        self._policies = tuple(policies)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pools) and self._policies == other._policies

    def __hash__(self) -> int:
        return hash(self._policies)

    def of(self, net: Net) -> PoolPolicy | None:
        """The pool that contains the prefix."""
        return next((policy for policy in self._policies if policy.net.contains(net)), None)

    def exports_own(self, block: Net) -> bool:
        """Whether a block of this node is announced: unless its pool forbids it."""
        policy = self.of(block)
        return policy is None or policy.exported

    def exports_learned(self, net: Net) -> bool:
        """Whether a learned prefix may be told on: only inside of a pool that allows it."""
        policy = self.of(net)
        return policy is not None and policy.exported

    def programs(self, net: Net) -> bool:
        """Whether a learned prefix goes to the kernel: unless its pool leaves it to felix."""
        policy = self.of(net)
        return policy is None or policy.programmed


def pool_policy(spec: IPPoolSpec, program_unencapsulated: bool) -> PoolPolicy:
    """What a pool says. ``disabled`` stops new addresses, not routes to those in use.

    Encapsulated pools are felix's to program; so are the others where BGPConfiguration's
    ``programClusterRoutes`` says so.
    """
    plain = spec.vxlan_mode == "Never" and spec.ipip_mode == "Never"
    return PoolPolicy(spec.net, not spec.disable_bgp_export, plain and program_unencapsulated)
