"""``manx-ipam``: addresses for containers that another main plugin wires, such as bridge or ptp.

CNI spec 1.1.0, section 4. The same executable as ``manx``, under another name. An address comes
with the mask of its block: to the main plugin the block is a subnet of this node, and the
block's first address but one its gateway. That one, and those that a subnet keeps for itself,
are held on behalf of the node as long as it has the block.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from api.errors import Problem
from api.names import cidr_name
from api.net import BITS, V4, Net, format_address, host_net, parse_interface
from cni.attachment import Attachment
from cni.cluster import Cluster
from cni.config import IPAM_TYPES, Call
from cni.errors import NOT_AS_ADDED, CniError, invalid_configuration
from cni.result import WITH_IP_VERSION
from ipam.allocator import AddressInUseError, Allocator, Assignment, PoolExhaustedError
from ipam.records import Records

NAME = "manx-ipam"

_ATTEMPTS = 8  # at an address that is none of those a subnet keeps
# Attributes of an address. They are not those of a pod that Manx wires, because what looks for
# addresses without a pod or an endpoint must leave these alone.
_ATTACHMENT, _POD = "ipamAttachment", "ipamPod"

_log = logging.getLogger(__name__)


class IpamPlugin:
    """Answers requests for addresses alone. All methods may raise StoreError, IpamError."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._allocator = Allocator(cluster.store, cluster.node)
        self._records = Records(cluster.store)
        # Of several that get a new block's first addresses, one makes it a subnet.
        self._lock = threading.Lock()

    def answer(self, call: Call) -> dict[str, Any] | None:
        """The result for the main plugin; None for all but ADD. Raises CniError."""
        ipam = call.configuration.ipam
        if ipam.delegated:
            expected = f"expected {' or '.join(IPAM_TYPES)}, as this is {NAME}"
            raise invalid_configuration([Problem("ipam.type", ipam.type, expected)])
        attachment = call.attachment
        if attachment is None:  # STATUS is answered as for the main plugin
            self._collect_garbage(call)
        elif call.command == "DEL":
            released = self._allocator.release(attachment.handle)
            _log.info("DEL %s: %s", attachment, ", ".join(map(str, released)) or "had no address")
        elif call.command == "CHECK":
            self._check(call, attachment)
        else:
            return self._add(call, attachment)
        return None

    def _add(self, call: Call, attachment: Attachment) -> dict[str, Any]:
        """What it holds already, and an address of every family of which it holds none.

        Where the runtime names addresses, those and no others.
        """
        ipam = call.configuration.ipam
        asked = call.asked.addresses
        try:
            subnets = self._held_by(attachment.handle)
            for address in asked:
                if address not in subnets:
                    subnets[address] = self._assign_specific(attachment, address)
            for version, pools in () if asked else ipam.families:
                if all(address.version != version for address in subnets):
                    assignment = self._assign(attachment, version, pools)
                    subnets[assignment.address] = assignment.block
        except BaseException:
            self._allocator.release(attachment.handle)
            raise
        _log.info("ADD %s: %s", attachment, ", ".join(map(str, sorted(subnets))))
        return {
            "cniVersion": call.configuration.cni_version,
            "ips": [
                _entry(address, subnets[address], call.configuration.cni_version)
                for address in sorted(subnets)
            ],
            "routes": [route.model_dump(exclude_none=True) for route in ipam.routes],
            "dns": call.dns.model_dump(exclude_none=True),
        }

    def _assign(self, attachment: Attachment, version: int, pools: tuple[str, ...]) -> Assignment:
        labels = self._cluster.namespace_labels(attachment)
        attributes = self._attributes_of(attachment)
        with self._lock:
            for _ in range(_ATTEMPTS):
                assignment = self._allocator.assign(
                    attachment.handle,
                    attributes,
                    version=version,
                    pools=pools,
                    namespace_labels=labels,
                )
                if self._make_subnet(assignment.address, assignment.block, attachment.handle):
                    return assignment
        raise PoolExhaustedError(f"block {assignment.block}: no address left beside a subnet's own")

    def _assign_specific(self, attachment: Attachment, address: Net) -> Net:
        """Take an address that was asked for; returns its block."""
        with self._lock:
            attributes = self._attributes_of(attachment)
            block = self._allocator.assign_specific(address, attachment.handle, attributes).block
            if self._make_subnet(address, block, attachment.handle):
                return block
        raise AddressInUseError(f"{address}: no container can have this address of block {block}")

    def _held_by(self, handle: str) -> dict[Net, Net]:
        """The addresses of an attachment since an earlier ADD, and their blocks.

        Where a daemon died before it had made the block a subnet, that is done now.
        """
        addresses = self._allocator.addresses(handle)
        held = {address: self._block_of(address, handle) for address in addresses}
        with self._lock:
            return {
                address: block
                for address, block in held.items()
                if self._make_subnet(address, block, handle)
            }

    def _make_subnet(self, address: Net, block: Net, handle: str) -> bool:
        """Hold the addresses of a block, of which ``address`` is given, that no container can have.

        False when it is one of them: it has been given back then.
        """
        if self._records.affinity(self._cluster.node, block) is None:
            raise PoolExhaustedError(
                f"node {self._cluster.node}: no free block is left, and an address of another"
                f" node's ({block}) is of no use to other plugins; create another IPPool"
            )
        own = _handle_of(block)
        missing = kept(block).difference(self._allocator.addresses(own))
        usable = address not in missing
        if not usable:
            self._allocator.release_addresses([address], handle=handle)
        for needed in sorted(missing):
            try:
                self._allocator.assign_specific(needed, own, self._attributes())
            except AddressInUseError as error:
                raise AddressInUseError(
                    f"{error}. It is needed for the subnet {block}: give containers that another"
                    " plugin wires an IPPool of their own, and name it in ipam.ipv4_pools or"
                    " ipam.ipv6_pools"
                ) from None
        return usable

    def _check(self, call: Call, attachment: Attachment) -> None:
        held = self._allocator.addresses(attachment.handle)
        if not held:
            raise CniError(NOT_AS_ADDED, f"IPAM: handle {attachment.handle} holds no address")
        assert call.previous is not None
        told = {parse_interface(entry.address)[0] for entry in call.previous.ips or []}
        if missing := [str(address) for address in held if address not in told]:
            raise CniError(NOT_AS_ADDED, f"prevResult: ips: no {', '.join(missing)}")

    def _collect_garbage(self, call: Call) -> None:
        """Release all of this network on this node that the runtime does not list."""
        network = call.configuration.name
        listed = call.configuration.valid_attachments or []
        valid = {f"{network}/{item.container_id}/{item.ifname}" for item in listed}
        for name, handle in list(self._held()):
            if name.partition("/")[0] == network and name not in valid:
                self._allocator.release(handle)
                _log.info("GC %s: released", name)

    def _held(self) -> Iterator[tuple[str, str]]:
        """The attachments of this node that hold addresses, and their handles."""
        for holder in self._records.holders():
            name = holder.attributes.get(_ATTACHMENT)
            if name and holder.attributes.get("node") == self._cluster.node:
                yield name, holder.handle

    def _block_of(self, address: Net, handle: str) -> Net:
        stored = self._records.handle(handle)
        blocks = stored.thing.counts if stored else ()
        return next(block for block in blocks if block.contains(address))

    def _attributes_of(self, attachment: Attachment) -> dict[str, str]:
        attributes = self._attributes() | {_ATTACHMENT: _name(attachment)}
        if attachment.pod:
            attributes[_POD] = f"{attachment.namespace}/{attachment.pod}"
        return attributes

    def _attributes(self) -> dict[str, str]:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f +0000 UTC")
        return {"node": self._cluster.node, "timestamp": now, "type": NAME}


def gateway(block: Net) -> Net | None:
    """The address of the node in a block that serves as a subnet; None for one too small."""
    if BITS[block.version] - block.length < 2:
        return None
    return host_net(block.version, block.address + 1)


def kept(block: Net) -> frozenset[Net]:
    """The addresses of a block that no container can have when it serves as a subnet.

    The gateway's; the first (RFC 4291, 2.6.1: all routers of the subnet); of IPv4 the last
    (RFC 919: broadcast).
    """
    node = gateway(block)
    if node is None:
        return frozenset()
    addresses = {node, host_net(block.version, block.address)}
    if block.version == V4:
        addresses.add(host_net(V4, block.address + block.size - 1))
    return frozenset(addresses)


def _handle_of(block: Net) -> str:
    return f"{NAME}-subnet.{cidr_name(block)}"


def _name(attachment: Attachment) -> str:
    return f"{attachment.network}/{attachment.container_id}/{attachment.ifname}"


def _entry(address: Net, block: Net, version: str) -> dict[str, Any]:
    """One of ``ips``, as each version of the spec has it."""
    text = format_address(address.version, address.address)
    entry: dict[str, Any] = {"address": f"{text}/{block.length}"}
    if node := gateway(block):
        entry["gateway"] = format_address(node.version, node.address)
    if version in WITH_IP_VERSION:
        entry["version"] = str(address.version)
    return entry
