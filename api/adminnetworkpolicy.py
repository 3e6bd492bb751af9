"""AdminNetworkPolicy and BaselineAdminNetworkPolicy (policy.networking.k8s.io/v1alpha1).

What came before ClusterNetworkPolicy, which has both in one kind. Read as strictly as that one,
and for the same reason.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from api.clusternetworkpolicy import (
    ClusterNetworkPolicyStatus,
    EgressPeer,
    IngressPeer,
    PortRange,
    Subject,
)
from api.fields import PortNumber
from api.kubernetes import KubernetesMeta
from api.metadata import Model, OneOf, Resource

MAX = 100  # rules in a direction, peers and ports of a rule

Protocol = Literal["TCP", "UDP", "SCTP"]


class PortOfProtocol(Model):
    """A port."""

    protocol: Protocol = "TCP"
    port: PortNumber


class RangeOfProtocol(PortRange):
    """Ports, both ends included."""

    protocol: Protocol = "TCP"


class AdminPort(OneOf):
    """A port, a range of ports, or a pod's port by its name."""

    port_number: PortOfProtocol | None = None
    port_range: RangeOfProtocol | None = None
    named_port: str | None = None


class AdminRule(Model):
    """What all rules have: any of ``ports``, or every one when there are none."""

    name: Annotated[str, Field(max_length=100)] | None = None
    ports: list[AdminPort] = Field(default_factory=list, max_length=MAX)


class AdminIngressRule(AdminRule):
    """Connections from any of these peers."""

    action: Literal["Allow", "Deny", "Pass"]
    from_: Annotated[list[IngressPeer], Field(alias="from", min_length=1, max_length=MAX)]


class AdminEgressRule(AdminRule):
    """Connections to any of these peers."""

    action: Literal["Allow", "Deny", "Pass"]
    to: Annotated[list[EgressPeer], Field(min_length=1, max_length=MAX)]


class BaselineIngressRule(AdminIngressRule):
    """As an AdminNetworkPolicy's, but there is nothing to pass on to."""

    action: Literal["Allow", "Deny"]


class BaselineEgressRule(AdminEgressRule):
    """As an AdminNetworkPolicy's, but there is nothing to pass on to."""

    action: Literal["Allow", "Deny"]


class AdminNetworkPolicySpec(Model):
    """spec of an AdminNetworkPolicy. Lower ``priority`` comes first."""

    kept: ClassVar[frozenset[str]] = frozenset(("priority",))

    priority: Annotated[int, Field(ge=0, le=1000)]
    subject: Subject
    ingress: list[AdminIngressRule] = Field(default_factory=list, max_length=MAX)
    egress: list[AdminEgressRule] = Field(default_factory=list, max_length=MAX)


class BaselineAdminNetworkPolicySpec(Model):
    """spec of a BaselineAdminNetworkPolicy."""

    subject: Subject
    ingress: list[BaselineIngressRule] = Field(default_factory=list, max_length=MAX)
    egress: list[BaselineEgressRule] = Field(default_factory=list, max_length=MAX)


class AdminNetworkPolicy(Resource):
    """A policy before those of namespaces."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["policy.networking.k8s.io/v1alpha1"] = "policy.networking.k8s.io/v1alpha1"
    kind: Literal["AdminNetworkPolicy"] = "AdminNetworkPolicy"
    metadata: KubernetesMeta
    spec: AdminNetworkPolicySpec
    status: ClusterNetworkPolicyStatus | None = None


class BaselineAdminNetworkPolicy(Resource):
    """The policy after those of namespaces: a cluster has one, called ``default``."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["policy.networking.k8s.io/v1alpha1"] = "policy.networking.k8s.io/v1alpha1"
    kind: Literal["BaselineAdminNetworkPolicy"] = "BaselineAdminNetworkPolicy"
    metadata: KubernetesMeta
    spec: BaselineAdminNetworkPolicySpec
    status: ClusterNetworkPolicyStatus | None = None

    def name_expected(self) -> str | None:
        """There is one."""
        return None if self.name == "default" else "default"
