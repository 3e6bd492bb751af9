"""ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2): policy of cluster administrators.

As in a Kubernetes NetworkPolicy, a field that is not known in ``spec`` is refused: a condition less
would allow more than its author wrote. Who enforces the rest has the rule with it fail closed.
An API server with our CRD stores no such field; one with a newer CRD may. ``status`` is what
others say about the policy and changes nothing.
"""

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field

from api.fields import PortNumber, refuse
from api.kubernetes import Block, KubernetesMeta, LabelSelector
from api.metadata import Checked, Condition, Fault, Model, OneOf, Resource

MAX = 25  # rules in a direction, peers and protocols of a rule, networks of a peer

_LABEL = r"[a-zA-Z0-9](?:[-a-zA-Z0-9_]*[a-zA-Z0-9])?"
_DOMAIN_RE = re.compile(rf"(?:\*\.)?(?:{_LABEL}\.)+{_LABEL}\.?")


def _domain(text: str) -> str:
    if not _DOMAIN_RE.fullmatch(text):
        raise refuse("a domain name such as example.com, or *.example.com")
    return text


DomainName = Annotated[str, AfterValidator(_domain)]


class NamespacedPod(Model):
    """Pods by their labels, in namespaces by theirs. An empty selector selects all."""

    kept: ClassVar[frozenset[str]] = frozenset(("namespaceSelector",))

    namespace_selector: LabelSelector = Field(default_factory=LabelSelector)
    pod_selector: LabelSelector


class PortRange(Checked):
    """Ports, both ends included."""

    start: PortNumber
    end: PortNumber

    def faults(self) -> Iterator[Fault]:
        """A range of one port, or backwards."""
        if self.start >= self.end:
            yield Fault(("end",), self.end, f"greater than start ({self.start})")


class DestinationPort(OneOf):
    """A port or a range of ports."""

    number: PortNumber | None = None
    range: PortRange | None = None


class PortMatch(Model):
    """Connections of one protocol to these ports."""

    destination_port: DestinationPort


class ProtocolMatch(OneOf):
    """A protocol and its ports, or a pod's port by its name."""

    tcp: PortMatch | None = None
    udp: PortMatch | None = None
    sctp: PortMatch | None = None
    destination_named_port: str | None = None


class Subject(OneOf):
    """The pods a policy is for: all in some namespaces, or some of them."""

    namespaces: LabelSelector | None = None
    pods: NamespacedPod | None = None


class IngressPeer(OneOf):
    """Who connects."""

    namespaces: LabelSelector | None = None
    pods: NamespacedPod | None = None


class EgressPeer(OneOf):
    """Who is connected to."""

    namespaces: LabelSelector | None = None
    pods: NamespacedPod | None = None
    nodes: LabelSelector | None = None
    networks: Annotated[list[Block], Field(min_length=1, max_length=MAX)] | None = None
    domain_names: Annotated[list[DomainName], Field(min_length=1, max_length=MAX)] | None = None

    def faults(self) -> Iterator[Fault]:
        """Not one kind of peer; a network or name that stands there twice."""
        yield from super().faults()
        for field, values in (("networks", self.networks), ("domainNames", self.domain_names)):
            if values is not None and len(set(values)) != len(values):
                yield Fault((field,), values, "each value once")


class ClusterNetworkPolicyRule(Checked):
    """What both directions have: any of ``protocols``, or every one when there are none."""

    name: Annotated[str, Field(max_length=100)] | None = None
    action: Literal["Accept", "Deny", "Pass"]
    protocols: list[ProtocolMatch] = Field(default_factory=list, min_length=1, max_length=MAX)


class ClusterNetworkPolicyIngressRule(ClusterNetworkPolicyRule):
    """Connections from any of these peers."""

    from_: Annotated[list[IngressPeer], Field(alias="from", min_length=1, max_length=MAX)]


class ClusterNetworkPolicyEgressRule(ClusterNetworkPolicyRule):
    """Connections to any of these peers."""

    to: Annotated[list[EgressPeer], Field(min_length=1, max_length=MAX)]

    def faults(self) -> Iterator[Fault]:
        """Names of ports where nobody names ports."""
        outside = any(
            peer.networks is not None or peer.nodes is not None or peer.domain_names is not None
            for peer in self.to
        )
        for index, protocol in enumerate(self.protocols):
            if outside and protocol.destination_named_port is not None:
                yield Fault(
                    ("protocols", index, "destinationNamedPort"),
                    protocol.destination_named_port,
                    "absent beside networks, nodes and domainNames, which name no ports",
                )


class ClusterNetworkPolicySpec(Model):
    """spec of a ClusterNetworkPolicy. Lower ``priority`` comes first within its tier."""

    kept: ClassVar[frozenset[str]] = frozenset(("priority",))

    tier: Literal["Admin", "Baseline"]
    priority: Annotated[int, Field(ge=0, le=1000)]
    subject: Subject
    ingress: list[ClusterNetworkPolicyIngressRule] = Field(default_factory=list, max_length=MAX)
    egress: list[ClusterNetworkPolicyEgressRule] = Field(default_factory=list, max_length=MAX)


class ClusterNetworkPolicyStatus(Model):
    """status of a ClusterNetworkPolicy."""

    model_config = ConfigDict(extra="ignore")

    kept: ClassVar[frozenset[str]] = frozenset(("conditions",))

    conditions: list[Condition] = Field(default_factory=list)


class ClusterNetworkPolicy(Resource):
    """A policy before (Admin) or after (Baseline) those of namespaces."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["policy.networking.k8s.io/v1alpha2"] = "policy.networking.k8s.io/v1alpha2"
    kind: Literal["ClusterNetworkPolicy"] = "ClusterNetworkPolicy"
    metadata: KubernetesMeta
    spec: ClusterNetworkPolicySpec
    status: ClusterNetworkPolicyStatus | None = None
