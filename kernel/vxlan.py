"""What a VXLAN device is made of, as netlink attributes. See ip-link(8), RFC 7348."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from api.net import V4, V6, Net, format_address, host_net
from kernel.netlink import attribute, attribute_u32, attributes, u32

_IFLA_VXLAN_ID = 1
_IFLA_VXLAN_LINK = 3
_IFLA_VXLAN_LOCAL = 4
_IFLA_VXLAN_LEARNING = 7
_IFLA_VXLAN_PORT = 15
_IFLA_VXLAN_LOCAL6 = 17
_IFLA_VXLAN_COLLECT_METADATA = 25

_PORT = struct.Struct(">H")


@dataclass(frozen=True, slots=True)
class VxlanSettings:
    """What the VXLAN driver is told. ``local`` is a /32 or /128, ``parent_index`` 0 is any."""

    vni: int
    port: int
    local: Net | None
    parent_index: int
    learning: bool = False
    external: bool = False  # controlled packet by packet, as eBPF dataplanes do


@dataclass(frozen=True, slots=True)
class Vxlan:
    """A VXLAN device as it should be; it never learns, its FDB is programmed.

    ``local`` is this machine's tunnel end, a /32 or /128. ``parent_index`` is the interface
    the tunnel's packets leave by; 0 leaves that to the routes. ``mtu`` 0 leaves the MTU
    as it is.
    """

    name: str
    vni: int
    port: int
    local: Net
    mac: str
    mtu: int = 0
    parent_index: int = 0

    @property
    def settings(self) -> VxlanSettings:
        """The part that is the driver's."""
        return VxlanSettings(self.vni, self.port, self.local, self.parent_index)

    def __str__(self) -> str:
        local = format_address(self.local.version, self.local.address)
        words = f"vxlan device {self.name} id {self.vni} dstport {self.port} local {local}"
        words += f" address {self.mac}"
        words += f" mtu {self.mtu}" if self.mtu else ""
        return words + (f" dev #{self.parent_index}" if self.parent_index else "")


def encode_vxlan(settings: VxlanSettings, *, change: bool = False) -> bytes:
    """The attributes that make a device, or ``change`` one."""
    data = attribute_u32(_IFLA_VXLAN_ID, settings.vni)
    if not change:  # the kernel refuses to be told the port again
        data += attribute(_IFLA_VXLAN_PORT, _PORT.pack(settings.port))
    data += attribute(_IFLA_VXLAN_LEARNING, bytes((settings.learning,)))
    data += attribute_u32(_IFLA_VXLAN_LINK, settings.parent_index)
    if settings.local is not None:
        kind = _IFLA_VXLAN_LOCAL if settings.local.version == V4 else _IFLA_VXLAN_LOCAL6
        data += attribute(kind, settings.local.packed())
    return data


def changeable(actual: VxlanSettings, wanted: VxlanSettings) -> bool:
    """Whether the kernel can give an existing device the wanted settings.

    It refuses another VNI, port or address family, and ignores that there be no parent.
    """
    fixed = wanted.vni, wanted.port, wanted.external
    if fixed != (actual.vni, actual.port, actual.external):
        return False
    if wanted.parent_index == 0 != actual.parent_index:
        return False
    families = {local.version for local in (actual.local, wanted.local) if local}
    return len(families) == 1


def parse_vxlan(data: bytes) -> VxlanSettings:
    """The settings a device has, from ``Link.data``."""
    found = attributes(data)
    local = None
    for version, kind in ((V4, _IFLA_VXLAN_LOCAL), (V6, _IFLA_VXLAN_LOCAL6)):
        address = int.from_bytes(found.get(kind, b""), "big")
        if address:
            local = host_net(version, address)
    return VxlanSettings(
        vni=u32(found[_IFLA_VXLAN_ID]) if _IFLA_VXLAN_ID in found else 0,
        port=_PORT.unpack(found[_IFLA_VXLAN_PORT])[0] if _IFLA_VXLAN_PORT in found else 0,
        local=local,
        parent_index=u32(found[_IFLA_VXLAN_LINK]) if _IFLA_VXLAN_LINK in found else 0,
        learning=any(found.get(_IFLA_VXLAN_LEARNING, b"")),
        external=any(found.get(_IFLA_VXLAN_COLLECT_METADATA, b"")),
    )
