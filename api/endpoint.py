"""WorkloadEndpoint: a pod's interface on a node, as the CNI plugin wrote it."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from api.fields import (
    DSCP,
    PORT_PROTOCOLS,
    AnyCidr,
    ContainerId,
    InterfaceName,
    Ip,
    IPv4,
    IPv6,
    Mac,
    Name,
    NetText,
    PortName,
    PortNumber,
    Protocol,
    protocol_number,
)
from api.metadata import CalicoResource, Checked, Fault, Model
from api.net import Net, parse_net

Limit = Annotated[int, Field(ge=0, lt=2**63)]


class WorkloadEndpointPort(Checked):
    """A named or mapped port of a workload."""

    name: PortName | None = None
    protocol: Protocol
    port: PortNumber
    host_port: Annotated[int, Field(ge=0, le=65535)] = 0
    host_ip: Ip | None = Field(default=None, alias="hostIP")

    def faults(self) -> Iterator[Fault]:
        """A protocol without ports; a port with neither name nor host port."""
        if protocol_number(self.protocol) not in PORT_PROTOCOLS:
            yield Fault(("protocol",), self.protocol, "TCP, UDP or SCTP, which have ports")
        if not self.name and not self.host_port:
            yield Fault(("name",), "", "required when there is no hostPort")


class IPNAT(Checked):
    """One-to-one NAT of an external address to one of the workload's."""

    internal_ip: Ip = Field(alias="internalIP")
    external_ip: Ip = Field(alias="externalIP")

    def faults(self) -> Iterator[Fault]:
        """Addresses of different IP versions."""
        internal, external = parse_net(self.internal_ip), parse_net(self.external_ip)
        if internal.version != external.version:
            yield Fault(
                ("externalIP",),
                self.external_ip,
                f"an IPv{internal.version} address, as internalIP",
            )


class QoSControls(Model):
    """Limits of a workload's traffic: bits/s, bits, packets/s, packets, connections. 0: none."""

    ingress_bandwidth: Limit = 0
    ingress_burst: Limit = 0
    ingress_peakrate: Limit = 0
    ingress_minburst: Limit = 0
    egress_bandwidth: Limit = 0
    egress_burst: Limit = 0
    egress_peakrate: Limit = 0
    egress_minburst: Limit = 0
    ingress_packet_rate: Limit = 0
    ingress_packet_burst: Limit = 0
    egress_packet_rate: Limit = 0
    egress_packet_burst: Limit = 0
    ingress_max_connections: Limit = 0
    egress_max_connections: Limit = 0
    dscp: DSCP | None = None


class WorkloadEndpointSpec(Checked):
    """spec of a WorkloadEndpoint. ``ip_networks`` are /32 and /128."""

    orchestrator: Name | None = None
    workload: Name | None = None
    node: Name | None = None
    container_id: ContainerId | None = Field(default=None, alias="containerID")
    pod: Name | None = None
    endpoint: Name | None = None
    service_account_name: Name | None = None
    ip_networks: list[NetText] = Field(default_factory=list)
    ip_nats: list[IPNAT] = Field(default_factory=list, alias="ipNATs")
    ipv4_gateway: IPv4 | None = None
    ipv6_gateway: IPv6 | None = None
    profiles: list[Name] = Field(default_factory=list)
    interface_name: InterfaceName
    mac: Mac | None = None
    ports: list[WorkloadEndpointPort] = Field(default_factory=list)
    allow_spoofed_source_prefixes: list[AnyCidr] = Field(default_factory=list)
    qos_controls: QoSControls | None = Field(default=None, alias="qosControls")

    @property
    def nets(self) -> tuple[Net, ...]:
        """``ip_networks`` as Nets."""
        return tuple(parse_net(text) for text in self.ip_networks)

    def faults(self) -> Iterator[Fault]:
        """Networks larger than one address; NAT of an address that is not the workload's."""
        for index, text in enumerate(self.ip_networks):
            if not parse_net(text).is_host:
                yield Fault(("ipNetworks", index), text, "a single address (/32 or /128)")
        for index, nat in enumerate(self.ip_nats):
            if parse_net(nat.internal_ip) not in self.nets:
                yield Fault(
                    ("ipNATs", index, "internalIP"), nat.internal_ip, "an address in ipNetworks"
                )


class WorkloadEndpoint(CalicoResource):
    """A pod's (or other workload's) interface."""

    namespaced: ClassVar[bool] = True

    kind: Literal["WorkloadEndpoint"] = "WorkloadEndpoint"
    spec: WorkloadEndpointSpec
