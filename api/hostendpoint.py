"""HostEndpoint: an interface of a node, so that policy applies to the node itself."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from api.fields import (
    PORT_PROTOCOLS,
    InterfaceName,
    Ip,
    Name,
    PortName,
    PortNumber,
    Protocol,
    protocol_number,
)
from api.metadata import CalicoResource, Checked, Fault


class EndpointPort(Checked):
    """A name for a port of the host."""

    name: PortName
    protocol: Protocol
    port: PortNumber

    def faults(self) -> Iterator[Fault]:
        """A protocol without ports."""
        if protocol_number(self.protocol) not in PORT_PROTOCOLS:
            yield Fault(("protocol",), self.protocol, "TCP, UDP or SCTP, which have ports")


class HostEndpointSpec(Checked):
    """spec of a HostEndpoint. ``interface_name`` ``*``: all interfaces of the node."""

    node: Name
    interface_name: InterfaceName | None = None
    expected_ips: list[Ip] = Field(default_factory=list, alias="expectedIPs")
    profiles: list[Name] = Field(default_factory=list)
    ports: list[EndpointPort] = Field(default_factory=list)

    def faults(self) -> Iterator[Fault]:
        """Nothing by which the interface could be found."""
        if self.interface_name is None and not self.expected_ips:
            yield Fault(("interfaceName",), None, "required, unless expectedIPs is set")


class HostEndpoint(CalicoResource):
    """An interface of a node. Its labels are what policies select."""

    kind: Literal["HostEndpoint"] = "HostEndpoint"
    spec: HostEndpointSpec
