"""Workloads that speak BGP with their node: which there are, and the address they call.

A BGPPeer with ``localWorkloadSelector`` is a session with each workload of the node that it
selects. The workload calls BGPConfiguration's ``localWorkloadPeeringIPV4`` (or ``…IPV6``), which
is the same on every node: an address of the node's end of its link (``ip address add A/32 dev
caliX scope link``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from api.endpoint import WorkloadEndpoint
from api.errors import InvalidObjectError
from api.net import BITS, V4, V6, Net
from api.registry import parse_as
from bird_glue.messages import is_link_local
from bird_glue.settings import ObjectProblem
from datastore.interface import JSON, Key, part
from kernel.addresses import (
    SCOPE_GLOBAL,
    SCOPE_LINK,
    Address,
    Addresses,
    address_add,
    address_delete,
)
from kernel.links import Links
from kernel.netlink import NetlinkSocket

WORKLOAD_KINDS = ("WorkloadEndpoint",)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload of this node. ``hosts``: its first address of each IP version."""

    labels: Mapping[str, str]
    hosts: Mapping[int, Net]
    interface: str


class Workloads:
    """The workloads of this node, by key. One that is not valid keeps its last valid version."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._problems: dict[Key, list[ObjectProblem]] = {}
        self.known: dict[Key, Workload] = {}

    @property
    def problems(self) -> list[ObjectProblem]:
        """What is wrong with objects that are not valid."""
        return [problem for found in self._problems.values() for problem in found]

    def update(self, key: Key, value: JSON | None) -> bool:
        """Take in a WorkloadEndpoint; returns whether it may matter."""
        if value is not None and part(value, "spec").get("node") != self._node:
            value = None
        had_problem = bool(self._problems.pop(key, None))
        before = self.known.get(key)
        try:
            after = None if value is None else _workload(value)
        except InvalidObjectError as error:
            name = f"{key.namespace}/{key.name}"
            self._problems[key] = [ObjectProblem(key.kind, name, p) for p in error.problems]
            return True
        if after is None:
            self.known.pop(key, None)
        else:
            self.known[key] = after
        return before != after or had_problem


def _workload(value: JSON) -> Workload:
    parsed = parse_as("WorkloadEndpoint", value)
    assert isinstance(parsed, WorkloadEndpoint)
    hosts: dict[int, Net] = {}
    for host in parsed.spec.nets:
        hosts.setdefault(host.version, host)
    return Workload(parsed.metadata.labels, hosts, parsed.spec.interface_name)


class PeeringAddresses:
    """The addresses that workloads call, on the node's end of their links.

    Ours are single addresses with scope link on links of pods, by which those of an earlier agent
    are known; and of IPv6, where the kernel says which scope it is, any that were wanted once.
    """

    def __init__(self, netlink: NetlinkSocket) -> None:
        self._netlink = netlink
        self._ours: set[Net] = set()
        self._done: Mapping[str, frozenset[Net]] | None = None

    def apply(self, wanted: Mapping[str, frozenset[Net]], *, look: bool) -> None:
        """Addresses by the name of the interface. ``look``: see what the kernel has anyway.

        What can't be done is logged, and tried again at the next look. Raises OSError.
        """
        if wanted == self._done and not (look and self._ours):
            return
        self._ours.update(*wanted.values())
        links = Links(self._netlink).read()
        indexes = {link.index for name, link in links.items() if name.startswith("cali")}
        needed = {
            address.key: address
            for name, hosts in wanted.items()
            if name in links
            for address in (_address(links[name].index, host) for host in hosts)
        }
        there = {
            key: address
            for version in (V4, V6)
            for key, address in Addresses(self._netlink).read(version=version).items()
            if key.ifindex in indexes
            and address == _address(key.ifindex, key.host)
            and (address.scope == SCOPE_LINK or key.host in self._ours)
        }
        messages = [address_add(needed[key]) for key in needed.keys() - there.keys()]
        messages += [address_delete(there[key]) for key in there.keys() - needed.keys()]
        for failure in self._netlink.batch(messages) if messages else ():
            _log.warning("an address for local workloads can't be set: %s", failure.message)
        self._done = wanted

    def clear(self) -> None:
        """Remove all that are ours. Raises OSError."""
        self.apply({}, look=True)


def _address(ifindex: int, host: Net) -> Address:
    scope = SCOPE_LINK if host.version == V4 or is_link_local(host) else SCOPE_GLOBAL
    return Address(ifindex, host, BITS[host.version], scope)
