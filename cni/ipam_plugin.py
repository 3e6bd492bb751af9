"""``manx-ipam``: addresses for containers that another main plugin wires, such as bridge or ptp.

CNI spec 1.1.0, section 4. The same executable as ``manx``, under another name. An address comes
with the mask of its block: see ``cni.subnets``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from api.errors import Problem
from api.net import Net, format_address, parse_interface
from cni.attachment import Attachment
from cni.call import Call
from cni.cluster import Cluster
from cni.config import IPAM_TYPES
from cni.errors import NOT_AS_ADDED, CniError, invalid_configuration
from cni.result import WITH_IP_VERSION, as_of
from cni.subnets import Subnets, gateway
from ipam.allocator import Allocator
from ipam.locks import KeyedLocks
from ipam.records import Records

NAME = "manx-ipam"

# Attributes of an address. They are not those of a pod that Manx wires, because what looks for
# addresses without a pod or an endpoint must leave these alone.
_ATTACHMENT, _POD = "ipamAttachment", "ipamPod"

_log = logging.getLogger(__name__)


class IpamPlugin:
    """Answers requests for addresses alone. All methods may raise StoreError, IpamError.

    ``allocator``: that of the node, which remembers what every assign looks at. What concerns one
    handle happens one after the other.
    """

    def __init__(self, cluster: Cluster, allocator: Allocator) -> None:
        self._cluster = cluster
        self._allocator = allocator
        self._records = Records(cluster.store)
        self._subnets = Subnets(self._records, allocator, NAME)
        self._locks = KeyedLocks()

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
            with self._locks.hold(attachment.handle):
                released = self._allocator.release(attachment.handle)
            _log.info("DEL %s: %s", attachment, ", ".join(map(str, released)) or "had no address")
        elif call.command == "CHECK":
            self._check(call, attachment)
        else:
            with self._locks.hold(attachment.handle):
                return self._add(call, attachment)
        return None

    def _add(self, call: Call, attachment: Attachment) -> dict[str, Any]:
        """What it holds already, and an address of every family of which it holds none.

        Where the runtime names addresses, those and no others. A failure takes back what this
        call took, and leaves what the container may be using since an earlier one.
        """
        ipam = call.configuration.ipam
        before = self._allocator.addresses(attachment.handle)
        try:
            subnets = self._addresses(call, attachment, before)
        except BaseException:
            self._take_back(attachment.handle, before)
            raise
        _log.info("ADD %s: %s", attachment, ", ".join(map(str, sorted(subnets))))
        version = call.configuration.cni_version
        document = {
            "cniVersion": version,
            "ips": [_entry(address, subnets[address], version) for address in sorted(subnets)],
            "routes": [route.model_dump(exclude_none=True) for route in ipam.routes],
            "dns": call.dns.model_dump(exclude_none=True),
        }
        return as_of(version, document)

    def _addresses(self, call: Call, attachment: Attachment, held: list[Net]) -> dict[Net, Net]:
        """The addresses of the container, each with its block."""
        handle, attributes = attachment.handle, self._attributes(attachment)
        subnets = self._subnets.of(handle, held)
        asked = call.asked.addresses
        for address in asked:
            if address not in subnets:
                subnets[address] = self._subnets.assign_specific(handle, attributes, address)
        if asked:
            return subnets
        labels = self._cluster.namespace_labels(attachment)
        for version, pools in call.configuration.ipam.families:
            if all(address.version != version for address in subnets):
                assignment = self._subnets.assign(handle, attributes, version, pools, labels)
                subnets[assignment.address] = assignment.block
        return subnets

    def _take_back(self, handle: str, before: list[Net]) -> None:
        if not before:
            self._allocator.release(handle)
        elif taken := set(self._allocator.addresses(handle)).difference(before):
            self._allocator.release_addresses(taken, handle=handle)

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
                with self._locks.hold(handle):
                    self._allocator.release(handle)
                _log.info("GC %s: released", name)

    def _held(self) -> Iterator[tuple[str, str]]:
        """The attachments of this node that hold addresses, and their handles."""
        for holder in self._records.holders():
            name = holder.attributes.get(_ATTACHMENT)
            if name and holder.attributes.get("node") == self._cluster.node:
                yield name, holder.handle

    def _attributes(self, attachment: Attachment) -> dict[str, str]:
        found = {**self._subnets.attributes(), _ATTACHMENT: _name(attachment)}
        if attachment.pod:
            found[_POD] = f"{attachment.namespace}/{attachment.pod}"
        return found


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
