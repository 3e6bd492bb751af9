"""The Kubernetes kinds Manx reads, with only the fields it reads.

Fields that Manx does not know are ignored. Those of a NetworkPolicy are refused: a condition
that is not understood would otherwise be a condition less, and the policy would allow more than
its author wrote.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from api.fields import PORT_NAME, is_label_value, is_port_name, is_qualified_name, refuse
from api.metadata import Checked, Fault, Model, ObjectMeta, Resource
from api.net import parse_net


class KubernetesModel(Model):
    """Base of what is inside: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class KubernetesMeta(ObjectMeta):
    """metadata of a Kubernetes object."""

    model_config = ConfigDict(extra="ignore")


class Namespace(Resource):
    """A namespace: its labels select it."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["v1"] = "v1"
    kind: Literal["Namespace"] = "Namespace"
    metadata: KubernetesMeta


class ServiceAccount(Resource):
    """A service account: its labels, and those of its pods' endpoints by way of its profile."""

    model_config = ConfigDict(extra="ignore")
    namespaced: ClassVar[bool] = True

    api_version: Literal["v1"] = "v1"
    kind: Literal["ServiceAccount"] = "ServiceAccount"
    metadata: KubernetesMeta


class KubernetesNodeAddress(KubernetesModel):
    """An address of a node: InternalIP, ExternalIP, Hostname, …"""

    type: str
    address: str


class KubernetesNodeSpec(KubernetesModel):
    """spec of a node. ``pod_cidrs``: ranges that the cluster's controller gave it."""

    pod_cidr: str | None = Field(default=None, alias="podCIDR")
    pod_cidrs: list[str] = Field(default_factory=list, alias="podCIDRs")
    unschedulable: bool = False


class NodeCondition(KubernetesModel):
    """One statement about a node: ``Ready``, ``NetworkUnavailable``, …"""

    type: str
    status: Literal["True", "False", "Unknown"]


class KubernetesNodeStatus(KubernetesModel):
    """status of a node."""

    addresses: list[KubernetesNodeAddress] = Field(default_factory=list)
    conditions: list[NodeCondition] = Field(default_factory=list)


class KubernetesNode(Resource):
    """A node as Kubernetes sees it; Calico keeps a node's BGP settings in its annotations."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["v1"] = "v1"
    kind: Literal["Node"] = "Node"
    metadata: KubernetesMeta
    spec: KubernetesNodeSpec = Field(default_factory=KubernetesNodeSpec)
    status: KubernetesNodeStatus = Field(default_factory=KubernetesNodeStatus)


class ContainerPort(KubernetesModel):
    """A port a container names."""

    name: str | None = None
    container_port: Annotated[int, Field(ge=1, le=65535)]
    protocol: Literal["TCP", "UDP", "SCTP"] = "TCP"
    host_port: Annotated[int, Field(ge=0, le=65535)] = 0
    host_ip: str | None = Field(default=None, alias="hostIP")


class Container(KubernetesModel):
    """A container: only its ports count."""

    name: str = ""
    ports: list[ContainerPort] = Field(default_factory=list)


class PodSpec(KubernetesModel):
    """spec of a Pod."""

    node_name: str | None = None
    host_network: bool = False
    service_account_name: str | None = None
    containers: list[Container] = Field(default_factory=list)
    init_containers: list[Container] = Field(default_factory=list)


class PodIP(KubernetesModel):
    """One of a pod's addresses."""

    ip: str | None = None


class PodStatus(KubernetesModel):
    """status of a Pod."""

    phase: str | None = None
    pod_ip: str | None = Field(default=None, alias="podIP")
    pod_ips: list[PodIP] = Field(default_factory=list, alias="podIPs")


class Pod(Resource):
    """A pod."""

    model_config = ConfigDict(extra="ignore")
    namespaced: ClassVar[bool] = True

    api_version: Literal["v1"] = "v1"
    kind: Literal["Pod"] = "Pod"
    metadata: KubernetesMeta
    spec: PodSpec = Field(default_factory=PodSpec)
    status: PodStatus = Field(default_factory=PodStatus)


class LabelSelectorRequirement(Checked):
    """One condition on labels."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = Field(default_factory=list)

    def faults(self) -> Iterator[Fault]:
        """A wrong key, or values that do not go with the operator."""
        if not is_qualified_name(self.key):
            yield Fault(("key",), self.key, "a label key")
        if self.operator in ("In", "NotIn") and not self.values:
            yield Fault(("values",), self.values, f"at least one for operator {self.operator}")
        if self.operator in ("Exists", "DoesNotExist") and self.values:
            yield Fault(("values",), self.values, f"absent for operator {self.operator}")
        for index, value in enumerate(self.values):
            if not is_label_value(value):
                yield Fault(("values", index), value, "a label value")


class LabelSelector(Checked):
    """Labels that must hold, all of them. Empty: everything."""

    match_labels: dict[str, str] = Field(default_factory=dict)
    match_expressions: list[LabelSelectorRequirement] = Field(default_factory=list)

    def faults(self) -> Iterator[Fault]:
        """Keys or values that no label can have."""
        for key, value in self.match_labels.items():
            if not is_qualified_name(key):
                yield Fault(("matchLabels", key), key, "a label key")
            if not is_label_value(value):
                yield Fault(("matchLabels", key), value, "a label value")


def _block(text: str) -> str:
    try:
        parse_net(text, strict=False)
    except ValueError:
        text = ""
    if "/" not in text:
        raise refuse("a CIDR such as 10.0.0.0/24")
    return text


# Kubernetes accepts bits beyond the prefix length, and ignores them.
Block = Annotated[str, AfterValidator(_block)]


class IPBlock(Checked):
    """A network without some of its parts."""

    cidr: Block
    except_: list[Block] = Field(default_factory=list, alias="except")

    def faults(self) -> Iterator[Fault]:
        """Exceptions that are not strictly inside."""
        net = parse_net(self.cidr, strict=False)
        for index, text in enumerate(self.except_):
            inner = parse_net(text, strict=False)
            if not net.contains(inner) or inner == net:
                yield Fault(("except", index), text, f"a network inside {self.cidr}, not all of it")


class NetworkPolicyPeer(Checked):
    """Who: pods by labels, or a network."""

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None

    def faults(self) -> Iterator[Fault]:
        """Nobody, or a network beside a selector."""
        selectors = self.pod_selector is not None or self.namespace_selector is not None
        if self.ip_block is not None and selectors:
            yield Fault(("ipBlock",), self.ip_block.cidr, "absent beside a selector")
        if self.ip_block is None and not selectors:
            yield Fault((), {}, "podSelector, namespaceSelector or ipBlock")


def _port(value: object) -> int | str:
    if isinstance(value, str) and is_port_name(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535:
        return value
    raise refuse(f"a port from 1 to 65535, or a port's name ({PORT_NAME})")


NetworkPolicyPortValue = Annotated[int | str, BeforeValidator(_port)]


class NetworkPolicyPort(Checked):
    """Which ports. No port: all of the protocol."""

    protocol: Literal["TCP", "UDP", "SCTP"] = "TCP"
    port: NetworkPolicyPortValue | None = None
    end_port: Annotated[int, Field(ge=1, le=65535)] | None = None

    def faults(self) -> Iterator[Fault]:
        """A range without a numeric beginning, or backwards."""
        if self.end_port is None:
            return
        if not isinstance(self.port, int):
            yield Fault(("endPort",), self.end_port, "absent, because port is not a number")
        elif self.end_port < self.port:
            yield Fault(("endPort",), self.end_port, f"not less than port ({self.port})")


class NetworkPolicyIngressRule(Model):
    """Who may connect to which ports. Empty lists: everybody, everything."""

    from_: list[NetworkPolicyPeer] = Field(default_factory=list, alias="from")
    ports: list[NetworkPolicyPort] = Field(default_factory=list)


class NetworkPolicyEgressRule(Model):
    """To whom and which ports one may connect. Empty lists: everybody, everything."""

    to: list[NetworkPolicyPeer] = Field(default_factory=list)
    ports: list[NetworkPolicyPort] = Field(default_factory=list)


class KubernetesNetworkPolicySpec(Model):
    """spec of a networking.k8s.io/v1 NetworkPolicy. ``policy_types`` is never empty."""

    pod_selector: LabelSelector = Field(default_factory=LabelSelector)
    policy_types: list[Literal["Ingress", "Egress"]] = Field(default_factory=list)
    ingress: list[NetworkPolicyIngressRule] = Field(default_factory=list)
    egress: list[NetworkPolicyEgressRule] = Field(default_factory=list)

    def model_post_init(self, context: Any, /) -> None:
        """Fill ``policy_types`` as the Kubernetes API server does."""
        if not self.policy_types:
            self.policy_types += ["Ingress", "Egress"] if self.egress else ["Ingress"]


class KubernetesNetworkPolicy(Resource):
    """A networking.k8s.io/v1 NetworkPolicy."""

    model_config = ConfigDict(extra="ignore")
    namespaced: ClassVar[bool] = True

    api_version: Literal["networking.k8s.io/v1"] = "networking.k8s.io/v1"
    kind: Literal["NetworkPolicy"] = "NetworkPolicy"
    metadata: KubernetesMeta
    spec: KubernetesNetworkPolicySpec = Field(default_factory=KubernetesNetworkPolicySpec)
