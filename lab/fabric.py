"""The fabric file as models: what stands in which rack, and how it is cabled.

The file is an interface: fields may be added, never silently change their meaning.
docs/lab.md describes each. Reading a file: ``lab.fabricfile``; what must hold between
objects: ``lab.contradictions``.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from api.fields import AsNumber as CalicoAsNumber
from api.fields import Name as PodName
from api.fields import PortName, is_label, is_label_value, is_qualified_name, refuse
from api.metadata import Checked, Fault, Model, Resource

API_VERSION = "lab.manx.dev/v1alpha1"
MAX_AS_NUMBER = 2**32 - 2  # 2**32 - 1 is reserved (RFC 7300)

# Names no interface of a router can have, as the kernel or the lab gives them a meaning.
_RESERVED = {"lo", "all", "default", "eth0"}
_NAME = "a DNS label: at most 63 lower-case letters, digits and '-', such as node-1"


def _label(text: str) -> str:
    if not is_label(text):
        raise refuse(_NAME)
    return text


def _name(text: str) -> str:
    _label(text)
    if text in _RESERVED:
        raise refuse(f"another name: {text} means something to the kernel")
    return text


def _as_number(number: int) -> int:
    if not 1 <= number <= MAX_AS_NUMBER:
        raise refuse(f"an AS number from 1 to {MAX_AS_NUMBER}, such as 65001")
    return number


def _address(value: object) -> IPv4Address:
    if isinstance(value, IPv4Address):
        return value
    if isinstance(value, str):
        try:
            return IPv4Address(value)
        except ValueError:
            pass
    raise refuse("an IPv4 address in quotes or plain, such as 172.31.1.11")


def _interface(value: object) -> IPv4Interface:
    if isinstance(value, IPv4Interface):
        return value
    if isinstance(value, str) and value.partition("/")[2].isdecimal():
        try:
            return IPv4Interface(value)
        except ValueError:
            pass
    raise refuse("an IPv4 address with prefix length, such as 198.51.100.10/24")


def _network(value: object) -> IPv4Network:
    if isinstance(value, IPv4Network):
        return value
    if isinstance(value, str) and value.partition("/")[2].isdecimal():
        try:
            return IPv4Network(value)
        except ValueError as error:
            if "host bits" in str(error):
                right = IPv4Interface(value).network
                raise refuse(f"a subnet without host bits: {right}") from None
    raise refuse("an IPv4 subnet, such as 172.31.1.0/24")


_text = PlainSerializer(str, return_type=str)

Label = Annotated[str, AfterValidator(_label)]
Name = Annotated[str, AfterValidator(_name)]
Address = Annotated[IPv4Address, BeforeValidator(_address), _text]
Interface = Annotated[IPv4Interface, BeforeValidator(_interface), _text]
Network = Annotated[IPv4Network, BeforeValidator(_network), _text]
AsNumber = Annotated[CalicoAsNumber, AfterValidator(_as_number)]
RouterKind = Literal["bird", "frr"]


class Labelled(Checked):
    """What carries labels."""

    labels: dict[str, str] = Field(default_factory=dict)

    def faults(self) -> Iterator[Fault]:
        """Labels that Kubernetes would refuse."""
        for key, value in self.labels.items():
            if not is_qualified_name(key):
                yield Fault(("labels", key), key, "a label key, such as example.com/role")
            if not is_label_value(value):
                yield Fault(("labels", key), value, "a label value of at most 63 characters")


class Router(Model):
    """A router that runs BIRD 2 or FRR: a spine, a border router."""

    name: Name
    as_number: AsNumber
    router: RouterKind = "bird"


class TopOfRack(Router):
    """The router of a rack, which is its switch too. ``address``: the rack's first by default."""

    address: Address | None = None


class Node(Labelled):
    """A machine of the cluster, on its rack's segment as ``eth0``.

    ``as_number`` goes to ``spec.bgp.asNumber`` of its Node object; without it the node has
    the AS number of the cluster's BGPConfiguration.
    """

    name: Name
    address: Address
    as_number: AsNumber | None = None


class Rack(Model):
    """A subnet, the router at its top, the nodes in it."""

    name: Name
    subnet: Network
    tor: TopOfRack
    nodes: list[Node] = Field(default_factory=list)

    @property
    def gateway(self) -> IPv4Address:
        """The address of the top-of-rack router in the rack."""
        return self.tor.address or self.subnet.network_address + 1


class Link(Model):
    """A cable between two routers; the first named has the lower address of ``subnet``."""

    between: Annotated[list[Name], Field(min_length=2, max_length=2)]
    subnet: Network

    def addresses(self) -> tuple[IPv4Interface, IPv4Interface]:
        """The addresses of the two ends, in the order of ``between``; RFC 3021 for a /31."""
        first = int(self.subnet.network_address) + (self.subnet.prefixlen < 31)
        length = self.subnet.prefixlen
        return IPv4Interface((first, length)), IPv4Interface((first + 1, length))


class Host(Model):
    """A machine outside the cluster, on a port of a router, which is its default gateway."""

    name: Name
    router: Name
    address: Interface
    gateway: Address | None = None

    @property
    def gateway_interface(self) -> IPv4Interface:
        """The router's address towards the host: the subnet's first by default."""
        subnet = self.address.network
        gateway = self.gateway or subnet.network_address + 1
        return IPv4Interface((int(gateway), subnet.prefixlen))


class ContainerPort(Model):
    """A port a pod's container names, for policies that speak of ports by name."""

    name: PortName
    container_port: Annotated[int, Field(ge=1, le=65535)]
    protocol: Literal["TCP", "UDP", "SCTP"] = "TCP"


class Pod(Labelled):
    """A pod to create. Nothing runs in it but what ``exec`` or a probe starts there."""

    name: PodName
    node: Name
    namespace: Label = "default"
    service_account_name: PodName = "default"
    annotations: dict[str, str] = Field(default_factory=dict)
    ports: list[ContainerPort] = Field(default_factory=list)

    @property
    def key(self) -> str:
        """``namespace/name``, as commands and reports call the pod."""
        return f"{self.namespace}/{self.name}"


class OtherPlugin(Model):
    """A CNI plugin to use instead of Manx, to compare with: no agent of Manx runs then."""

    bin_dir: str
    conflist: dict[str, Any]


class FabricSpec(Model):
    """The fabric. ``resources`` are objects as ``manxctl apply`` takes them."""

    mtu: Annotated[int, Field(ge=1280, le=65535)] = 1500
    racks: Annotated[list[Rack], Field(min_length=1)]
    routers: list[Router] = Field(default_factory=list)
    links: list[Link] = Field(default_factory=list)
    hosts: list[Host] = Field(default_factory=list)
    resources: list[dict[str, Any]] = Field(default_factory=list)
    pods: list[Pod] = Field(default_factory=list)
    cni: OtherPlugin | None = None


class Fabric(Resource):
    """A whole fabric file. Its name is the lab's, unless ``up --name`` says otherwise."""

    api_version: Literal["lab.manx.dev/v1alpha1"]
    kind: Literal["Fabric"]
    spec: FabricSpec

    def name_expected(self) -> str | None:
        """A DNS label."""
        return None if is_label(self.name) else _NAME

    def all_routers(self) -> Iterator[Router]:
        """Top-of-rack routers, then the others."""
        for rack in self.spec.racks:
            yield rack.tor
        yield from self.spec.routers

    def all_nodes(self) -> Iterator[tuple[Rack, Node]]:
        """Each node with the rack it stands in."""
        for rack in self.spec.racks:
            for node in rack.nodes:
                yield rack, node

    def rack_of(self, router: str) -> Rack | None:
        """The rack on whose top the router sits, None for the others."""
        return next((rack for rack in self.spec.racks if rack.tor.name == router), None)

    def links_of(self, router: str) -> Iterator[tuple[str, IPv4Interface, IPv4Interface]]:
        """Each cable of a router: the neighbour, the own address, the neighbour's."""
        for link in self.spec.links:
            own, other = link.addresses()
            if link.between[0] == router:
                yield link.between[1], own, other
            elif link.between[1] == router:
                yield link.between[0], other, own

    def hosts_of(self, router: str) -> Iterator[Host]:
        """The hosts on ports of a router."""
        return (host for host in self.spec.hosts if host.router == router)

    def addresses_of(self, router: str) -> list[IPv4Interface]:
        """All addresses of a router: rack first, then links, then ports of hosts."""
        rack = self.rack_of(router)
        found = []
        if rack is not None:
            found.append(IPv4Interface((int(rack.gateway), rack.subnet.prefixlen)))
        found.extend(own for _, own, _ in self.links_of(router))
        found.extend(host.gateway_interface for host in self.hosts_of(router))
        return found
