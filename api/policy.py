"""NetworkPolicy, GlobalNetworkPolicy, their rules, and Tier."""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PrivateAttr

from api.fields import (
    PORT_PROTOCOLS,
    AtMost,
    Cidr,
    Name,
    Order,
    Port,
    Protocol,
    Selector,
    is_label,
    parse_port,
    protocol_number,
    refuse,
)
from api.metadata import CalicoResource, Checked, Fault, Model, OneOf, Status, annotation_faults
from api.net import parse_net

RuleAction = Literal["Allow", "Deny", "Log", "Pass"]
PolicyType = Literal["Ingress", "Egress"]
# A policy's tier once more, as a label, where an API server's admission adds it.
TIER_LABEL = "projectcalico.org/tier"
ICMP_VERSIONS = {1: 4, 58: 6}  # protocol number -> IP version
CATCH_ALL = frozenset((parse_net("0.0.0.0/0"), parse_net("::/0")))

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_POLICY_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})?")
_CONVERTED_NAME = re.compile(rf"(?:knp|ossg)\.default\.{_LABEL}(?:\.{_LABEL})*")
POLICY_NAME = "lower-case letters, digits and '-', with at most one '.' (tier.policy)"


class ICMPFields(Checked):
    """ICMP type and code."""

    type: Annotated[int, Field(ge=0, le=254)] | None = None
    code: Annotated[int, Field(ge=0, le=255)] | None = None

    def faults(self) -> Iterator[Fault]:
        """A code without a type."""
        if self.code is not None and self.type is None:
            yield Fault(("type",), None, "required, because code is set")


def _path(text: str) -> str:
    if not text.startswith("/") or set(text) & set("? #"):
        raise refuse("a path beginning with '/', without '?', '#' or space (RFC 3986)")
    return text


Path = Annotated[str, Field(max_length=1024), AfterValidator(_path)]


class HTTPPath(OneOf):
    """A path: exactly this, or beginning with this."""

    exact: Path | None = None
    prefix: Path | None = None


class HTTPMatch(Checked):
    """HTTP requests: any of the methods and any of the paths."""

    methods: Annotated[list[str], AtMost(20)] = Field(default_factory=list)
    paths: Annotated[list[HTTPPath], AtMost(20)] = Field(default_factory=list)

    def faults(self) -> Iterator[Fault]:
        """A method that stands there twice."""
        if len(set(self.methods)) != len(self.methods):
            yield Fault(("methods",), self.methods, "each method once")


class ServiceAccountMatch(Model):
    """Service accounts: one of the names and matching the selector."""

    names: list[str] = Field(default_factory=list)
    selector: Selector = ""


class ServiceMatch(Model):
    """A Kubernetes service, whose endpoints are meant."""

    name: Name
    namespace: Name | None = None


class EntityRule(Checked):
    """One side of a connection: everything that is present must match."""

    nets: Annotated[list[Cidr], AtMost(256)] = Field(default_factory=list)
    not_nets: Annotated[list[Cidr], AtMost(256)] = Field(default_factory=list)
    selector: Selector = ""
    not_selector: Selector = ""
    namespace_selector: Selector = ""
    ports: Annotated[list[Port], AtMost(50)] = Field(default_factory=list)
    not_ports: Annotated[list[Port], AtMost(50)] = Field(default_factory=list)
    services: ServiceMatch | None = None
    service_accounts: ServiceAccountMatch | None = None

    def faults(self) -> Iterator[Fault]:
        """``global()`` where it cannot be, and what cannot stand beside ``services``."""
        if "global(" in self.selector:
            yield Fault(("selector",), self.selector, "global() only in a namespaceSelector")
        namespaces = self.namespace_selector
        if "global(" in namespaces and not re.fullmatch(r"[ \t]*global\(\)[ \t]*", namespaces):
            yield Fault(("namespaceSelector",), namespaces, "global() alone, or without it")
        if self.services is None:
            return
        for field, value in (
            ("namespaceSelector", self.namespace_selector),
            ("serviceAccounts", self.service_accounts),
            ("selector", self.selector),
            ("notSelector", self.not_selector),
            ("nets", self.nets),
            ("notNets", self.not_nets),
        ):
            if value:
                yield Fault((field,), value, "absent, because services is set")


class RuleMetadata(Checked):
    """Annotations of a rule."""

    annotations: dict[str, str] = Field(default_factory=dict)

    def faults(self) -> Iterator[Fault]:
        """Annotation keys that Kubernetes would refuse."""
        yield from annotation_faults(self.annotations, ("annotations",))


class Rule(Checked):
    """A rule: what to do with connections that match."""

    action: RuleAction
    ip_version: Literal[4, 6] | None = Field(default=None, alias="ipVersion")
    protocol: Protocol | None = None
    not_protocol: Protocol | None = None
    icmp: ICMPFields | None = None
    not_icmp: ICMPFields | None = Field(default=None, alias="notICMP")
    source: EntityRule = Field(default_factory=EntityRule)
    destination: EntityRule = Field(default_factory=EntityRule)
    http: HTTPMatch | None = None
    metadata: RuleMetadata | None = None
    # Of a rule made from one of another kind of policy: which one that was. Not part of the object.
    _position: int | None = PrivateAttr(default=None)

    @property
    def position(self) -> int | None:
        """Which of its author's rules this was made from, where it isn't as its author wrote it."""
        return self._position

    def made_from(self, position: int) -> "Rule":
        """The same rule, which remembers which of its author's rules it was made from."""
        self._position = position
        return self

    def faults(self) -> Iterator[Fault]:
        """Conditions that can never hold together."""
        yield from self._port_faults()
        yield from self._icmp_faults()
        yield from self._net_faults()
        if self.http is not None:
            if self.protocol is not None and protocol_number(self.protocol) != 6:
                yield Fault(("protocol",), self.protocol, "TCP or absent, because http is set")
            if self.action != "Allow":
                yield Fault(("action",), self.action, "Allow, because http is set")
        if self.destination.services is not None:
            for field, ports in (
                ("ports", self.destination.ports),
                ("notPorts", self.destination.not_ports),
            ):
                if ports:
                    yield Fault(("destination", field), ports, "absent, because services is set")

    def _port_faults(self) -> Iterator[Fault]:
        if self.protocol is not None and protocol_number(self.protocol) in PORT_PROTOCOLS:
            return
        for side, entity in (("source", self.source), ("destination", self.destination)):
            for field, ports in (("ports", entity.ports), ("notPorts", entity.not_ports)):
                if self.protocol is not None and ports:
                    yield Fault(
                        (side, field), ports, f"absent: protocol {self.protocol} has no ports"
                    )
                elif any(parse_port(port) for port in ports):
                    yield Fault(
                        (side, field), ports, "protocol TCP, UDP or SCTP beside numeric ports"
                    )

    def _icmp_faults(self) -> Iterator[Fault]:
        number = None if self.protocol is None else protocol_number(self.protocol)
        if self.icmp is not None and number not in ICMP_VERSIONS:
            yield Fault(("protocol",), self.protocol, "ICMP or ICMPv6, because icmp is set")
        for field, protocol in (("protocol", self.protocol), ("notProtocol", self.not_protocol)):
            if protocol is None:
                continue
            version = ICMP_VERSIONS.get(protocol_number(protocol))
            if version and self.ip_version and self.ip_version != version:
                yield Fault(
                    ("ipVersion",), self.ip_version, f"{version}, because {field} is {protocol}"
                )

    def _net_faults(self) -> Iterator[Fault]:
        seen: set[int] = set()
        for side, entity in (("source", self.source), ("destination", self.destination)):
            for field, texts in (("nets", entity.nets), ("notNets", entity.not_nets)):
                nets = [parse_net(text) for text in texts]
                versions = {net.version for net in nets}
                if self.ip_version and versions - {self.ip_version}:
                    yield Fault(
                        (side, field), texts, f"IPv{self.ip_version} only, because of ipVersion"
                    )
                if len(seen | versions) > 1:
                    yield Fault((side, field), texts, "nets of one IP version in a rule")
                seen |= versions
                if field == "notNets" and CATCH_ALL & set(nets):
                    yield Fault((side, field), texts, "not everything: the rule would never match")


class NetworkPolicySpec(Checked):
    """spec of a NetworkPolicy. After parsing ``types`` is never empty."""

    tier: Name = "default"
    order: Order | None = None
    selector: Selector = ""
    service_account_selector: Selector = ""
    types: list[PolicyType] = Field(default_factory=list)
    ingress: Annotated[list[Rule], AtMost(1024)] = Field(default_factory=list)
    egress: Annotated[list[Rule], AtMost(1024)] = Field(default_factory=list)
    performance_hints: list[Literal["AssumeNeededOnEveryNode"]] = Field(default_factory=list)

    def model_post_init(self, context: Any, /) -> None:
        """Fill ``types`` from the rules that are there."""
        if not self.types:
            if self.ingress or not self.egress:
                self.types.append("Ingress")
            if self.egress:
                self.types.append("Egress")

    def faults(self) -> Iterator[Fault]:
        """Repetitions, misplaced ``global()`` and services."""
        for field, values in (
            ("types", self.types),
            ("performanceHints", self.performance_hints),
        ):
            if len(set(values)) != len(values):
                yield Fault((field,), values, "each value once")
        for field, text in self._selectors():
            if "global(" in text:
                yield Fault((field,), text, "global() only in a rule's namespaceSelector")
        yield from _direction_faults("ingress", self.ingress, "destination")
        yield from _direction_faults("egress", self.egress, "source")

    def _selectors(self) -> Iterator[tuple[str, str]]:
        yield "selector", self.selector
        yield "serviceAccountSelector", self.service_account_selector


def _direction_faults(direction: str, rules: Sequence[Rule], own_side: str) -> Iterator[Fault]:
    for index, rule in enumerate(rules):
        if getattr(rule, own_side).services is not None:
            yield Fault(
                (direction, index, own_side, "services"),
                "set",
                f"absent in the {own_side} of an {direction} rule",
            )
        if direction == "egress" and rule.http is not None:
            yield Fault((direction, index, "http"), "set", "absent in an egress rule")


class GlobalNetworkPolicySpec(NetworkPolicySpec):
    """spec of a GlobalNetworkPolicy."""

    namespace_selector: Selector = ""
    do_not_track: bool = False
    pre_dnat: bool = Field(default=False, alias="preDNAT")
    apply_on_forward: bool = False

    def _selectors(self) -> Iterator[tuple[str, str]]:
        yield from super()._selectors()
        yield "namespaceSelector", self.namespace_selector

    def faults(self) -> Iterator[Fault]:
        """What host policies exclude, and services without a namespace."""
        yield from super().faults()
        if self.pre_dnat and self.do_not_track:
            yield Fault(("preDNAT",), True, "false, because doNotTrack is true")
        if self.pre_dnat and self.egress:
            yield Fault(("egress",), f"{len(self.egress)} rules", "absent, because preDNAT is true")
        if self.pre_dnat and "Egress" in self.types:
            yield Fault(("types",), self.types, "without Egress, because preDNAT is true")
        if (self.pre_dnat or self.do_not_track) and not self.apply_on_forward:
            field = "preDNAT" if self.pre_dnat else "doNotTrack"
            yield Fault(("applyOnForward",), False, f"true, because {field} is")
        for direction, rules, side in (
            ("ingress", self.ingress, "source"),
            ("egress", self.egress, "destination"),
        ):
            for index, rule in enumerate(rules):
                services = getattr(rule, side).services
                if services is not None and services.namespace is None:
                    yield Fault(
                        (direction, index, side, "services", "namespace"),
                        None,
                        "required in a global policy",
                    )


def is_policy_name(name: str) -> bool:
    """Whether a policy of a namespace can be called so."""
    right = _POLICY_NAME.fullmatch(name) or _CONVERTED_NAME.fullmatch(name)
    return len(name) <= 253 and right is not None


def is_global_policy_name(name: str) -> bool:
    """Whether a policy of all namespaces can be called so."""
    return len(name) <= 253 and _POLICY_NAME.fullmatch(name) is not None


class NetworkPolicy(CalicoResource):
    """A policy for the endpoints of one namespace."""

    namespaced: ClassVar[bool] = True

    kind: Literal["NetworkPolicy"] = "NetworkPolicy"
    spec: NetworkPolicySpec = Field(default_factory=NetworkPolicySpec)

    def name_expected(self) -> str | None:
        """A label, tier.label, or the name of a converted Kubernetes policy."""
        return None if is_policy_name(self.name) else POLICY_NAME


class GlobalNetworkPolicy(CalicoResource):
    """A policy for endpoints of all namespaces, and for hosts."""

    kind: Literal["GlobalNetworkPolicy"] = "GlobalNetworkPolicy"
    spec: GlobalNetworkPolicySpec = Field(default_factory=GlobalNetworkPolicySpec)

    def name_expected(self) -> str | None:
        """A label or tier.label."""
        return None if is_global_policy_name(self.name) else POLICY_NAME


BUILT_IN_TIERS: dict[str, tuple[float, Literal["Deny", "Pass"]]] = {
    "default": (1_000_000.0, "Deny"),
    "kube-admin": (1_000.0, "Pass"),
    "kube-baseline": (10_000_000.0, "Pass"),
}


class TierSpec(Model):
    """spec of a Tier. ``order`` None is last."""

    verbatim: ClassVar[frozenset[str]] = frozenset(("defaultAction",))

    order: Order | None = None
    default_action: Literal["Deny", "Pass"] = "Deny"


class Tier(CalicoResource):
    """A group of policies that are looked at together."""

    kind: Literal["Tier"] = "Tier"
    spec: TierSpec = Field(default_factory=TierSpec)
    status: Status | None = None

    def name_expected(self) -> str | None:
        """A label without dots: it is part of other names."""
        if is_label(self.name):
            return None
        return "at most 63 lower-case letters, digits and '-'"

    def faults(self) -> Iterator[Fault]:
        """Built-in tiers whose order or action was changed."""
        yield from super().faults()
        if self.name in BUILT_IN_TIERS:
            order, action = BUILT_IN_TIERS[self.name]
            if self.spec.order != order:
                yield Fault(
                    ("spec", "order"), self.spec.order, f"{order:.0f} for the tier {self.name}"
                )
            if self.spec.default_action != action:
                yield Fault(
                    ("spec", "defaultAction"),
                    self.spec.default_action,
                    f"{action} for the tier {self.name}",
                )
