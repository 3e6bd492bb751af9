"""Service, EndpointSlice and ServiceCIDR of Kubernetes, with only the fields Manx reads."""

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from api.fields import PortNumber
from api.kubernetes import KubernetesMeta, KubernetesModel
from api.metadata import Resource

SERVICE_NAME = "kubernetes.io/service-name"  # the label of an EndpointSlice that names its Service

OptionalPort = Annotated[int, Field(ge=0, le=65535)]
PortProtocol = Literal["TCP", "UDP", "SCTP"]
TrafficPolicy = Literal["Cluster", "Local"]


class ServicePort(KubernetesModel):
    """A port of a service; ``target_port`` is a number or the name of a container's port."""

    name: str | None = None
    protocol: PortProtocol = "TCP"
    port: PortNumber
    target_port: int | str | None = None
    node_port: OptionalPort = 0


class ServiceSpec(KubernetesModel):
    """spec of a Service. ``cluster_ips`` of a headless service is ``["None"]``."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    selector: dict[str, str] = Field(default_factory=dict)
    ports: list[ServicePort] = Field(default_factory=list)
    cluster_ip: str | None = Field(default=None, alias="clusterIP")
    cluster_ips: list[str] = Field(default_factory=list, alias="clusterIPs")
    external_ips: list[str] = Field(default_factory=list, alias="externalIPs")
    load_balancer_ip: str | None = Field(default=None, alias="loadBalancerIP")
    load_balancer_class: str | None = None
    load_balancer_source_ranges: list[str] = Field(default_factory=list)
    ip_families: list[Literal["IPv4", "IPv6"]] = Field(default_factory=list)
    ip_family_policy: str | None = None
    external_traffic_policy: TrafficPolicy | None = None
    internal_traffic_policy: TrafficPolicy | None = None
    health_check_node_port: OptionalPort = 0
    publish_not_ready_addresses: bool = False


class LoadBalancerIngress(KubernetesModel):
    """An address, or a host name, of a service's load balancer."""

    ip: str | None = None
    hostname: str | None = None
    ip_mode: Literal["VIP", "Proxy"] | None = None


class LoadBalancerStatus(KubernetesModel):
    """Addresses of a service's load balancer."""

    ingress: list[LoadBalancerIngress] = Field(default_factory=list)


class ServiceStatus(KubernetesModel):
    """status of a Service."""

    load_balancer: LoadBalancerStatus = Field(default_factory=LoadBalancerStatus)


class Service(Resource):
    """A service: addresses under which some pods are reached."""

    model_config = ConfigDict(extra="ignore")
    namespaced: ClassVar[bool] = True

    api_version: Literal["v1"] = "v1"
    kind: Literal["Service"] = "Service"
    metadata: KubernetesMeta
    spec: ServiceSpec = Field(default_factory=ServiceSpec)
    status: ServiceStatus = Field(default_factory=ServiceStatus)


class EndpointConditions(KubernetesModel):
    """State of an endpoint. None: unknown; ``ready`` None counts as true."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class TargetRef(KubernetesModel):
    """The object behind an endpoint, mostly a Pod."""

    kind: str | None = None
    namespace: str | None = None
    name: str | None = None


class Endpoint(KubernetesModel):
    """Addresses of one endpoint: all the same, any of them will do."""

    addresses: list[str] = Field(default_factory=list)
    conditions: EndpointConditions = Field(default_factory=EndpointConditions)
    hostname: str | None = None
    node_name: str | None = None
    zone: str | None = None
    target_ref: TargetRef | None = None


class EndpointSlicePort(KubernetesModel):
    """A port of all endpoints of a slice. No ``port``: every port."""

    name: str | None = None
    protocol: PortProtocol = "TCP"
    port: OptionalPort | None = None


class EndpointSlice(Resource):
    """Some endpoints of a service. ``address_type`` FQDN: names, not addresses."""

    model_config = ConfigDict(extra="ignore")
    namespaced: ClassVar[bool] = True

    api_version: Literal["discovery.k8s.io/v1"] = "discovery.k8s.io/v1"
    kind: Literal["EndpointSlice"] = "EndpointSlice"
    metadata: KubernetesMeta
    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: list[Endpoint] = Field(default_factory=list)
    ports: list[EndpointSlicePort] = Field(default_factory=list)

    @property
    def service(self) -> str:
        """The name of its Service, in the same namespace; empty if it has none."""
        return self.metadata.labels.get(SERVICE_NAME, "")


class ServiceCIDRSpec(KubernetesModel):
    """spec of a ServiceCIDR: at most one range of each IP version."""

    cidrs: list[str] = Field(default_factory=list)


class ServiceCIDR(Resource):
    """Where services get their addresses from."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["networking.k8s.io/v1"] = "networking.k8s.io/v1"
    kind: Literal["ServiceCIDR"] = "ServiceCIDR"
    metadata: KubernetesMeta
    spec: ServiceCIDRSpec = Field(default_factory=ServiceCIDRSpec)
