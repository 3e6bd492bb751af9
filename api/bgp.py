"""BGPConfiguration and BGPPeer: who speaks BGP with whom, and what is announced."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from api.fields import (
    ANY_CASE,
    AsNumber,
    Cidr,
    Duration,
    IgnoredInterface,
    Ip,
    IPv4,
    IPv6,
    Name,
    PortNumber,
    Selector,
    is_subdomain,
    refuse,
)
from api.metadata import CalicoResource, Checked, Fault, Model

DEFAULT_AS_NUMBER = 64512
DEFAULT_LISTEN_PORT = 179
LogSeverity = Annotated[Literal["Trace", "Debug", "Info", "Warning", "Error", "Fatal"], ANY_CASE]
RoutePriority = Annotated[int, Field(ge=1, le=2**31 - 2)]


def split_peer_ip(text: str) -> tuple[str, int | None]:
    """``192.0.2.1``, ``192.0.2.1:1790`` or ``[2001:db8::1]:1790`` to address and port.

    Raises ValueError on anything else.
    """
    match = re.fullmatch(r"\[([0-9a-fA-F:.]+)\]:([0-9]{1,5})|([0-9.]+):([0-9]{1,5})", text)
    address, port = (match[1] or match[3], int(match[2] or match[4])) if match else (text, None)
    ipaddress.ip_address(address)
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not in 1 to 65535")
    return address, port


def _peer_ip(text: str) -> str:
    try:
        split_peer_ip(text)
    except ValueError:
        raise refuse("an IP address, IPv4:port or [IPv6]:port") from None
    return text


def zero_is_default(value: object) -> object:
    """A port of 0 is none given."""
    return value or None


PeerIp = Annotated[str, AfterValidator(_peer_ip)]


def community_expected(text: str) -> str | None:
    """What a community (RFC 1997, RFC 8092) should be, None when it is right."""
    match = re.fullmatch(r"([0-9]+):([0-9]+)(?::([0-9]+))?", text)
    bits = 32 if match and match[3] else 16
    if match and all(int(part) < 1 << bits for part in match.groups("0")):
        return None
    return "aa:nn with numbers of 16 bits, or aa:nn:mm with numbers of 32 bits"


def _community(text: str) -> str:
    if expected := community_expected(text):
        raise refuse(expected)
    return text


CommunityValue = Annotated[str, AfterValidator(_community)]


COMMUNITY_OR_NAME = (
    "aa:nn with numbers of 16 bits, or aa:nn:mm with numbers of 32 bits, or a name from communities"
)


def _community_or_name(text: str) -> str:
    if community_expected(text) and not is_subdomain(text):
        raise refuse(COMMUNITY_OR_NAME)
    return text


CommunityOrName = Annotated[str, AfterValidator(_community_or_name)]


class SecretKeySelector(Model):
    """One key of a Kubernetes Secret."""

    name: str = ""
    key: str
    optional: bool | None = None


class BGPPassword(Model):
    """Where the TCP-MD5 password (RFC 2385) of a session is kept."""

    secret_key_ref: SecretKeySelector | None = None


class ServiceBlock(Model):
    """A range of service addresses to announce."""

    cidr: Cidr | None = None


class Community(Model):
    """A name for a BGP community."""

    name: Name
    value: Annotated[CommunityValue, Field(max_length=40)]


class PrefixAdvertisement(Model):
    """Communities to attach to a prefix: values, or names from ``communities``."""

    cidr: Cidr
    communities: Annotated[list[CommunityOrName], Field(max_length=50)]


class BGPConfigurationSpec(Checked):
    """spec of a BGPConfiguration. None: Calico's default, or what ``default`` says."""

    verbatim: ClassVar[frozenset[str]] = frozenset(
        ("serviceLoadBalancerAggregation", "bindMode", "programClusterRoutes")
    )

    log_severity_screen: LogSeverity = "Info"
    node_to_node_mesh_enabled: bool | None = None
    as_number: AsNumber | None = None
    service_load_balancer_ips: list[ServiceBlock] = Field(
        default_factory=list, alias="serviceLoadBalancerIPs"
    )
    service_external_ips: list[ServiceBlock] = Field(
        default_factory=list, alias="serviceExternalIPs"
    )
    service_cluster_ips: list[ServiceBlock] = Field(default_factory=list, alias="serviceClusterIPs")
    service_load_balancer_aggregation: Literal["Enabled", "Disabled"] = "Enabled"
    communities: list[Community] = Field(default_factory=list, max_length=500)
    prefix_advertisements: list[PrefixAdvertisement] = Field(default_factory=list, max_length=500)
    listen_port: Annotated[PortNumber | None, BeforeValidator(zero_is_default)] = None
    node_mesh_password: BGPPassword | None = None
    node_mesh_max_restart_time: Duration | None = None
    bind_mode: Literal["None", "NodeIP"] | None = None
    ignored_interfaces: list[IgnoredInterface] = Field(default_factory=list)
    local_workload_peering_ipv4: IPv4 | None = Field(default=None, alias="localWorkloadPeeringIPV4")
    local_workload_peering_ipv6: IPv6 | None = Field(default=None, alias="localWorkloadPeeringIPV6")
    program_cluster_routes: (
        Literal["Enabled", "Disabled", "EnabledIPIPOnly", "EnabledNoEncapOnly"] | None
    ) = None
    ipv4_normal_route_priority: RoutePriority | None = None
    ipv6_normal_route_priority: RoutePriority | None = None

    def faults(self) -> Iterator[Fault]:
        """Mesh settings without a mesh, communities that are unused or unknown."""
        if self.node_to_node_mesh_enabled is False:
            for field, value in (
                ("nodeMeshPassword", self.node_mesh_password),
                ("nodeMeshMaxRestartTime", self.node_mesh_max_restart_time),
            ):
                if value is not None:
                    yield Fault((field,), value, "absent while nodeToNodeMeshEnabled is false")
        if self.communities and not self.prefix_advertisements:
            yield Fault(
                ("communities",),
                [community.name for community in self.communities],
                "used by prefixAdvertisements, or absent",
            )
        names = {community.name for community in self.communities}
        for index, advertisement in enumerate(self.prefix_advertisements):
            for position, text in enumerate(advertisement.communities):
                if community_expected(text) and text not in names:
                    yield Fault(
                        ("prefixAdvertisements", index, "communities", position),
                        text,
                        COMMUNITY_OR_NAME,
                    )


class BGPConfiguration(CalicoResource):
    """BGP of the cluster (``default``) or of one node (``node.<name>``)."""

    kind: Literal["BGPConfiguration"] = "BGPConfiguration"
    spec: BGPConfigurationSpec = Field(default_factory=BGPConfigurationSpec)


class BGPPeerSpec(Checked):
    """spec of a BGPPeer: which nodes (``node``, ``node_selector``, else all), which peers."""

    verbatim: ClassVar[frozenset[str]] = frozenset(("nextHopMode", "reversePeering"))

    node: Name | None = None
    node_selector: Selector = ""
    peer_ip: PeerIp | None = Field(default=None, alias="peerIP")
    as_number: AsNumber = 0
    local_as_number: AsNumber | None = Field(default=None, alias="localASNumber")
    peer_selector: Selector = ""
    local_workload_selector: Selector = ""
    keep_original_next_hop: bool = False
    next_hop_mode: Literal["Auto", "Self", "Keep"] | None = None
    password: BGPPassword | None = None
    source_address: Literal["UseNodeIP", "None"] = "UseNodeIP"
    max_restart_time: Duration | None = None
    keepalive_time: Duration | None = None
    num_allowed_local_as_numbers: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(
        default=None, alias="numAllowedLocalASNumbers"
    )
    ttl_security: Annotated[int, Field(ge=0, le=255)] | None = None
    reachable_by: Ip | None = None
    filters: list[Name] = Field(default_factory=list)
    reverse_peering: Literal["Auto", "Manual"] | None = None

    def faults(self) -> Iterator[Fault]:
        """Fields that exclude or require each other."""
        if self.node and self.node_selector:
            yield Fault(("nodeSelector",), self.node_selector, "absent, because node is set")
        if self.peer_ip and self.peer_selector:
            yield Fault(("peerSelector",), self.peer_selector, "absent, because peerIP is set")
        if self.peer_selector and self.as_number:
            yield Fault(("asNumber",), self.as_number, "absent, because peerSelector is set")
        if self.local_workload_selector:
            for field, value in (("peerIP", self.peer_ip), ("peerSelector", self.peer_selector)):
                if value:
                    yield Fault((field,), value, "absent, because localWorkloadSelector is set")
            if not self.as_number:
                yield Fault(("asNumber",), 0, "required, because localWorkloadSelector is set")
        if self.keep_original_next_hop and self.next_hop_mode:
            yield Fault(
                ("keepOriginalNextHop",), True, "absent (deprecated), because nextHopMode is set"
            )
        if self.reachable_by and not self.peer_ip:
            yield Fault(("reachableBy",), self.reachable_by, "absent, because peerIP is")
        elif self.reachable_by and self.peer_ip:
            version = ipaddress.ip_address(split_peer_ip(self.peer_ip)[0]).version
            if ipaddress.ip_address(self.reachable_by).version != version:
                yield Fault(
                    ("reachableBy",), self.reachable_by, f"an IPv{version} address, as peerIP"
                )


class BGPPeer(CalicoResource):
    """A BGP session, or many of them."""

    kind: Literal["BGPPeer"] = "BGPPeer"
    spec: BGPPeerSpec = Field(default_factory=BGPPeerSpec)
