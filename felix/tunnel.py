"""The VXLAN device, its address, and for every peer a neighbour and an FDB entry.

Ours are: the device of this name when it is of kind vxlan, and on it all IPv4 addresses, all
neighbours of protocol 80, and all FDB entries with a remote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from api.net import V4, Net
from felix import names
from felix.desired import Device
from felix.overlay import Peer
from felix.tables import K, Table, V
from kernel.addresses import Address, Addresses, AddressKey, address_add, address_delete
from kernel.fdb import Fdb, FdbEntry, FdbKey
from kernel.links import Link, delete_link, ensure_vxlan
from kernel.neighbours import Neighbour, NeighbourKey, Neighbours
from kernel.netlink import NetlinkSocket
from kernel.vxlan import Vxlan, parse_vxlan
from reconcile.plan import Plan

# Outer IPv4, UDP and VXLAN headers, inner Ethernet header (RFC 7348, 5)
OVERHEAD = 50


class Tunnel:
    """The overlay's part of the kernel, in the network namespace of ``socket``."""

    def __init__(self, socket: NetlinkSocket) -> None:
        self._socket = socket
        self._device: Device | None = None
        self._peers: dict[str, Peer] = {}
        self._devices: Table[str, Vxlan] = Table(self._apply_devices)
        self.index: int | None = None
        self._bind(None)

    def want_device(self, device: Device | None, uplink_mtu: int) -> None:
        """How the device should be; None: it should not be. ``uplink_mtu`` 0: not known yet."""
        if device is None:
            self._devices.want(names.VXLAN_DEVICE, None)
        elif device.mtu or uplink_mtu:
            mtu = device.mtu or uplink_mtu - OVERHEAD
            wanted = Vxlan(
                names.VXLAN_DEVICE, device.vni, device.port, device.local, device.mac, mtu
            )
            self._devices.want(wanted.name, wanted)
        if device != self._device:
            if self._device is not None:
                self._want_address(self._device, present=False)
            if device is not None:
                self._want_address(device, present=True)
            self._device = device

    def want_peer(self, node: str, peer: Peer | None) -> None:
        """Another node's tunnel end; None: it has none."""
        before = self._peers.pop(node, None)
        if before is not None:
            self._want_entries(before, present=False)
        if peer is not None:
            self._peers[node] = peer
            self._want_entries(peer, present=True)

    def read(self, links: Mapping[str, Link]) -> None:
        """See what is there, to compare it with what should be."""
        link = links.get(names.VXLAN_DEVICE)
        if link is not None and link.kind == "vxlan":
            self._devices.found({link.name: _vxlan(link)})
            self._bind(link.index)
        else:
            self._devices.found({})
            self._bind(None)

    def vanished(self, index: int) -> None:
        """An interface went down or is gone. If it was the device, it must be mended."""
        if index == self.index:
            self._devices.vanished([names.VXLAN_DEVICE])
            self._bind(None)

    def apply(self, now: float) -> int:
        """Do what is due; returns the number of steps."""
        return sum(table.apply(now) for table in self.tables())

    def tables(self) -> Iterator[Table[Any, Any]]:
        """What is applied, in this order."""
        yield self._devices
        # Applying the device may have put others in the place of these.
        yield self._addresses
        yield self._neighbours
        yield self._fdb

    def _bind(self, index: int | None) -> None:
        """The device is now this one: what belongs to it begins anew, from what it has."""
        self.index = index
        self._addresses: Table[AddressKey, Address] = Table(self._apply_addresses)
        self._neighbours: Table[NeighbourKey, Neighbour] = Table(Neighbours(self._socket).apply)
        self._fdb: Table[FdbKey, FdbEntry] = Table(Fdb(self._socket).apply)
        if index is None:
            return
        self._addresses.found(Addresses(self._socket).read(version=V4, ifindex=index))
        self._neighbours.found(Neighbours(self._socket).read(version=V4, ifindex=index))
        self._fdb.found(Fdb(self._socket).read(index))
        if self._device is not None:
            self._want_address(self._device, present=True)
        for peer in self._peers.values():
            self._want_entries(peer, present=True)

    def _want_address(self, device: Device, *, present: bool) -> None:
        if self.index is not None:
            address = Address(self.index, device.tunnel, device.tunnel.length)
            _want(self._addresses, address.key, address, present)

    def _want_entries(self, peer: Peer, *, present: bool) -> None:
        if self.index is not None:
            neighbour = Neighbour(self.index, peer.tunnel, peer.mac)
            _want(self._neighbours, neighbour.key, neighbour, present)
            entry = FdbEntry(self.index, peer.mac, peer.address)
            _want(self._fdb, entry.key, entry, present)

    def _apply_devices(self, plan: Plan[str, Vxlan]) -> dict[str, Exception]:
        try:
            for vxlan in (*plan.create.values(), *plan.update.values()):
                link = ensure_vxlan(self._socket, vxlan)
                if link.index != self.index:
                    self._bind(link.index)
            for name in plan.delete:
                for failure in self._socket.batch([delete_link(name)]):
                    raise failure.error(f"interface {name}")
                self._bind(None)
        except OSError as error:
            return {names.VXLAN_DEVICE: error}
        return {}

    def _apply_addresses(self, plan: Plan[AddressKey, Address]) -> dict[AddressKey, Exception]:
        steps = [(address, address_add(address)) for address in plan.create.values()]
        steps += [(address, address_delete(address)) for address in plan.delete.values()]
        failures = self._socket.batch([message for _, message in steps])
        return {
            steps[failure.index][0].key: failure.error(f"address {steps[failure.index][0]}")
            for failure in failures
        }


def _want(table: Table[K, V], key: K, value: V, present: bool) -> None:
    """Want it, or no longer; but not if the key means something else by now."""
    if present:
        table.want(key, value)
    elif table.desired.get(key) == value:
        table.want(key, None)


def _vxlan(link: Link) -> Vxlan:
    """What a device is. One that is down or learns differs from any that is wanted."""
    actual = parse_vxlan(link.data)
    usable = link.up and not actual.learning and not actual.external and actual.local
    return Vxlan(
        link.name,
        actual.vni,
        actual.port,
        actual.local or Net(V4, 0, 32),
        link.mac,
        link.mtu if usable else 0,
        actual.parent_index,
    )
