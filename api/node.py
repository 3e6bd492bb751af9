"""Node: a machine of the cluster, its addresses and tunnels."""

import base64
import binascii
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from api.fields import (
    AnyCidr,
    AsNumber,
    InterfaceName,
    InterfaceV4,
    InterfaceV6,
    IPv4,
    IPv6,
    Mac,
    refuse,
)
from api.metadata import CalicoResource, Checked, Fault, Model


def _wireguard_key(text: str) -> str:
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise refuse("a WireGuard key: 32 bytes in base64")
    return text


WireguardKey = Annotated[str, AfterValidator(_wireguard_key)]


class NodeBGPSpec(Model):
    """BGP of a node: its address with the length of its network, AS number, reflector's cluster."""

    as_number: AsNumber | None = None
    ipv4_address: InterfaceV4 | None = None
    ipv6_address: InterfaceV6 | None = None
    ipv4_ipip_tunnel_addr: IPv4 | None = Field(default=None, alias="ipv4IPIPTunnelAddr")
    route_reflector_cluster_id: IPv4 | None = Field(default=None, alias="routeReflectorClusterID")


class OrchRef(Model):
    """The node's name in an orchestrator such as ``k8s``."""

    node_name: str = ""
    orchestrator: str


class NodeAddress(Model):
    """An address of the node, with or without the length of its network."""

    address: AnyCidr
    type: Literal["CalicoNodeIP", "InternalIP", "ExternalIP"] | None = None


class NodeInterface(Model):
    """An interface of the node and its addresses."""

    name: InterfaceName | None = None
    addresses: list[str] = Field(default_factory=list)


class NodeWireguardSpec(Model):
    """Addresses of the node's WireGuard interfaces."""

    interface_ipv4_address: IPv4 | None = Field(default=None, alias="interfaceIPv4Address")
    interface_ipv6_address: IPv6 | None = Field(default=None, alias="interfaceIPv6Address")


class NodeSpec(Checked):
    """spec of a Node."""

    bgp: NodeBGPSpec | None = None
    ipv4_vxlan_tunnel_addr: IPv4 | None = Field(default=None, alias="ipv4VXLANTunnelAddr")
    vxlan_tunnel_mac_addr: Mac | None = Field(default=None, alias="vxlanTunnelMACAddr")
    ipv6_vxlan_tunnel_addr: IPv6 | None = Field(default=None, alias="ipv6VXLANTunnelAddr")
    vxlan_tunnel_mac_addr_v6: Mac | None = Field(default=None, alias="vxlanTunnelMACAddrV6")
    orch_refs: list[OrchRef] = Field(default_factory=list)
    wireguard: NodeWireguardSpec | None = None
    addresses: list[NodeAddress] = Field(default_factory=list)
    interfaces: list[NodeInterface] = Field(default_factory=list)

    def faults(self) -> Iterator[Fault]:
        """``bgp`` that says nothing."""
        if self.bgp is not None and self.bgp == NodeBGPSpec():
            yield Fault(("bgp",), {}, "at least one field, or absent")


class NodeStatus(Model):
    """status of a Node."""

    wireguard_public_key: WireguardKey | None = None
    wireguard_public_key_v6: WireguardKey | None = Field(default=None, alias="wireguardPublicKeyV6")
    pod_cidrs: list[str] = Field(default_factory=list, alias="podCIDRs")


class Node(CalicoResource):
    """A machine that runs pods or reflects routes."""

    kind: Literal["Node"] = "Node"
    spec: NodeSpec = Field(default_factory=NodeSpec)
    status: NodeStatus | None = None
