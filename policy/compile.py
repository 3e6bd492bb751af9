"""One policy as users write it → neutral rules, and the sets they need.

What can't be understood or isn't supported never widens access. A rule with such a
condition is an ``Allow`` or ``Log`` less; ``Deny`` and ``Pass`` become ``Deny`` for everything
the rest of the rule matches. A policy whose own selector can't be parsed denies everything,
in its directions, at all the endpoints it might be about: those of its namespace, or, global,
those its other selectors leave. Each time a ``Problem`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from api.errors import Problem
from api.fields import PORT_PROTOCOLS, parse_port, protocol_number
from api.net import Net, parse_net
from api.policy import (
    ICMP_VERSIONS,
    EntityRule,
    GlobalNetworkPolicy,
    ICMPFields,
    NetworkPolicy,
    ServiceMatch,
)
from api.policy import Rule as ApiRule
from policy.effective import global_policy_selector, policy_selector, rule_selector
from policy.model import (
    Action,
    CompiledPolicy,
    Direction,
    Match,
    Part,
    PolicyId,
    PortRange,
    Rule,
    SetKind,
)
from policy.selector import (
    And,
    Compare,
    Everything,
    Not,
    Selector,
    SelectorError,
    parse,
    unique_id,
)

_DENY_ALL: tuple[Rule, ...] = (Rule(Action.DENY),)
_ANY = Selector(Everything("all"))
_NORMAL = frozenset((Part.NORMAL,))


@dataclass(frozen=True, slots=True)
class SetSpec:
    """What a set holds: addresses of matching endpoints, or those of one of their named ports.

    ``protocol`` 0 is any. The id is made as Calico makes it. ``of_service``: the selector is
    about ``ServiceSlice``s.
    """

    id: str
    selector: Selector
    port: str = ""
    protocol: int = 0
    of_service: bool = False

    @property
    def kind(self) -> SetKind:
        """What its members are."""
        return SetKind.NAMED_PORT if self.port else SetKind.NET


@dataclass(frozen=True, slots=True)
class CompiledRules:
    """The rules of a policy or profile, the sets they refer to, and what is wrong with it."""

    policy: CompiledPolicy
    sets: frozenset[SetSpec]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Compilation:
    """A policy ready for the engine. ``order`` is infinite where the policy gives none.

    ``parts``: which of a host's packets it is for; workloads know NORMAL only.
    """

    rules: CompiledRules
    selector: Selector
    tier: str
    order: float
    parts: frozenset[Part]

    def stands_like(self, other: Compilation) -> bool:
        """Whether the other, of the same policy, binds the same endpoints in the same way."""
        return (
            (self.selector, self.tier, self.order, self.parts)
            == (other.selector, other.tier, other.order, other.parts)
            and (self.rules.policy.ingress is None) is (other.rules.policy.ingress is None)
            and (self.rules.policy.egress is None) is (other.rules.policy.egress is None)
        )


def compile_policy(id: PolicyId, policy: NetworkPolicy | GlobalNetworkPolicy) -> Compilation:
    """Compile a policy. Never raises: what is wrong becomes ``problems``."""
    spec = policy.spec
    compiler = _Compiler(policy.namespace)
    selector = _selector_of(policy, compiler)
    parts = _parts(policy)
    if parts == _NORMAL:
        compiler.own = selector
    ingress = egress = _DENY_ALL
    if not compiler.problems:
        ingress = compiler.rules(spec.ingress if "Ingress" in spec.types else (), Direction.INGRESS)
        egress = compiler.rules(spec.egress if "Egress" in spec.types else (), Direction.EGRESS)
    rules = compiler.finish(
        CompiledPolicy(
            id,
            ingress if "Ingress" in spec.types else None,
            egress if "Egress" in spec.types else None,
            spec.tier,
        )
    )
    order = math.inf if spec.order is None else spec.order
    return Compilation(rules, selector, spec.tier, order, parts)


def compile_rules(
    id: PolicyId, ingress: Sequence[ApiRule], egress: Sequence[ApiRule]
) -> CompiledRules:
    """Compile the rules of a profile, which belongs to no namespace."""
    compiler = _Compiler("")
    return compiler.finish(
        CompiledPolicy(
            id,
            compiler.rules(ingress, Direction.INGRESS),
            compiler.rules(egress, Direction.EGRESS),
        )
    )


def _parts(policy: NetworkPolicy | GlobalNetworkPolicy) -> frozenset[Part]:
    if isinstance(policy, GlobalNetworkPolicy):
        if policy.spec.do_not_track:
            return frozenset((Part.UNTRACKED,))
        if policy.spec.pre_dnat:
            return frozenset((Part.PRE_DNAT,))
        if policy.spec.apply_on_forward:
            return frozenset((Part.NORMAL, Part.FORWARD))
    return _NORMAL


def _selector_of(policy: NetworkPolicy | GlobalNetworkPolicy, compiler: _Compiler) -> Selector:
    spec = policy.spec
    selector = compiler.selector(spec.selector, "spec.selector")
    accounts = compiler.selector(spec.service_account_selector, "spec.serviceAccountSelector")
    if isinstance(policy, GlobalNetworkPolicy):
        return global_policy_selector(
            selector=selector,
            namespace_selector=compiler.selector(
                policy.spec.namespace_selector, "spec.namespaceSelector"
            ),
            service_account_selector=accounts,
        )
    return policy_selector(policy.namespace, selector=selector, service_account_selector=accounts)


@dataclass(slots=True)
class _Compiler:
    """Compiles the rules of one policy; gathers the sets they need and what is wrong.

    A condition that is wrong is left out as a whole, so that what remains matches more.
    """

    namespace: str
    own: Selector = _ANY  # matches whatever is at the policy's own end of a connection
    sets: list[SetSpec] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def finish(self, policy: CompiledPolicy) -> CompiledRules:
        return CompiledRules(policy, frozenset(self.sets), tuple(self.problems))

    def problem(self, where: str, value: object, expected: str) -> None:
        self.problems.append(Problem(where, value, expected))

    def rules(self, rules: Iterable[ApiRule], direction: Direction) -> tuple[Rule, ...]:
        compiled: list[Rule] = []
        for index, rule in enumerate(rules):
            position = index if rule.position is None else rule.position
            compiled += self._rule(rule, position, direction)
        return tuple(compiled)

    def selector(self, text: str, where: str) -> Selector | None:
        """None when there is none, or (a problem) when it can't be parsed."""
        if not text:
            return None
        try:
            return parse(text)
        except SelectorError as error:
            self.problem(where, text, str(error))
            return None

    def _rule(self, rule: ApiRule, index: int, direction: Direction) -> list[Rule]:
        problems, sets = len(self.problems), len(self.sets)
        matches = self._matches(rule, direction, f"spec.{direction.value}[{index}]")
        action = Action(rule.action)
        if len(self.problems) > problems:
            if action in (Action.ALLOW, Action.LOG):
                matches = []
            action = Action.DENY
        if not matches:
            del self.sets[sets:]
        return [Rule(action, match, index) for match in matches]

    def _matches(self, rule: ApiRule, direction: Direction, where: str) -> list[Match]:
        protocol = None if rule.protocol is None else protocol_number(rule.protocol)
        if rule.http is not None:
            self.problem(f"{where}.http", "set", "absent: HTTP is not looked into")
        source_own, destination_own = (
            (_ANY, self.own) if direction is Direction.INGRESS else (self.own, _ANY)
        )
        source = self._side(rule.source, protocol, source_own, f"{where}.source")
        destination = self._side(
            rule.destination, protocol, destination_own, f"{where}.destination"
        )
        from_service = self._service(rule.source.services, f"{where}.source", with_ports=False)
        to_service = self._service(
            rule.destination.services, f"{where}.destination", with_ports=True
        )
        versions = _versions(rule, protocol, source.not_nets, destination.not_nets)
        if not versions:
            return []
        match = Match(
            version=None if len(versions) > 1 else min(versions),
            protocol=protocol,
            not_protocol=None if rule.not_protocol is None else protocol_number(rule.not_protocol),
            src_nets=source.nets,
            not_src_nets=source.not_nets,
            dst_nets=destination.nets,
            not_dst_nets=destination.not_nets,
            src_sets=source.sets + from_service,
            not_src_sets=source.not_sets,
            dst_sets=destination.sets,
            not_dst_sets=destination.not_sets,
            src_ports=source.ports,
            not_src_ports=source.not_ports,
            dst_ports=destination.ports,
            not_dst_ports=destination.not_ports,
            src_named_ports=source.named_ports,
            not_src_named_ports=source.not_named_ports,
            dst_named_ports=destination.named_ports + to_service,
            not_dst_named_ports=destination.not_named_ports,
        )
        for name, fields in (("icmp", rule.icmp), ("notICMP", rule.not_icmp)):
            if fields is not None and protocol not in ICMP_VERSIONS:
                self.problem(
                    f"{where}.protocol", rule.protocol, f"ICMP or ICMPv6, because {name} is set"
                )
                return [match]
        return _with_icmp(match, rule.icmp, rule.not_icmp)

    def _side(self, entity: EntityRule, protocol: int | None, own: Selector, where: str) -> _Side:
        negative = self.selector(entity.not_selector, f"{where}.notSelector")
        positive = self._positive_selector(entity, where)
        if positive and negative:
            # Both are about the same endpoints; alone, the negative one is about addresses.
            positive, negative = _both(positive, negative), None
        ports, names = self._ports(entity.ports, protocol, f"{where}.ports")
        not_ports, not_names = self._ports(entity.not_ports, protocol, f"{where}.notPorts")
        # A named port is looked for at the selected endpoints only (at the policy's own end,
        # its own): the set stays small, and beside named ports alone the selector's own set is
        # not needed.
        selected = positive or own
        return _Side(
            nets=self._nets(entity.nets, f"{where}.nets"),
            not_nets=self._nets(entity.not_nets, f"{where}.notNets"),
            sets=self._set(positive if ports or not names else None),
            not_sets=self._set(negative),
            ports=ports,
            not_ports=not_ports,
            named_ports=self._named(names, protocol, selected),
            not_named_ports=self._named(not_names, protocol, selected),
        )

    def _positive_selector(self, entity: EntityRule, where: str) -> Selector | None:
        before = len(self.problems)
        accounts = entity.service_accounts
        selector = rule_selector(
            self.namespace,
            selector=self.selector(entity.selector, f"{where}.selector"),
            namespace_selector=self.selector(
                entity.namespace_selector, f"{where}.namespaceSelector"
            ),
            service_account_selector=self.selector(
                accounts.selector if accounts else "", f"{where}.serviceAccounts.selector"
            ),
            service_account_names=accounts.names if accounts else (),
            has_not_selector=bool(entity.not_selector),
        )
        return selector if len(self.problems) == before else None

    def _nets(self, texts: Iterable[str], where: str) -> tuple[Net, ...]:
        nets: list[Net] = []
        for text in texts:
            try:
                nets.append(parse_net(text, strict=False))
            except ValueError:
                self.problem(where, text, "a CIDR such as 10.0.0.0/24")
                return ()
        return tuple(nets)

    def _ports(
        self, ports: Iterable[int | str], protocol: int | None, where: str
    ) -> tuple[tuple[PortRange, ...], tuple[str, ...]]:
        """Numbers and ranges, and names."""
        ranges: list[PortRange] = []
        names: list[str] = []
        for port in ports:
            try:
                numbers = parse_port(port)
            except ValueError:
                self.problem(where, port, "a port, a range such as 8000:8080, or a port's name")
                return (), ()
            if numbers is None:
                names.append(str(port))
            else:
                ranges.append(PortRange(*numbers))
        if ranges and protocol not in PORT_PROTOCOLS:
            self.problem(where, ranges[0].first, "a rule with protocol TCP, UDP or SCTP")
            return (), ()
        return tuple(ranges), tuple(names)

    def _set(self, selector: Selector | None) -> tuple[str, ...]:
        if selector is None:
            return ()
        self.sets.append(SetSpec(selector.id, selector))
        return (selector.id,)

    def _service(
        self, service: ServiceMatch | None, where: str, *, with_ports: bool
    ) -> tuple[str, ...]:
        """The set of a service's endpoints: where connections go to, with their ports."""
        if service is None:
            return ()
        namespace = service.namespace or self.namespace
        if not namespace:
            self.problem(f"{where}.services.namespace", None, "required in a global policy")
            return ()
        spec = service_set(namespace, service.name, with_ports=with_ports)
        self.sets.append(spec)
        return (spec.id,)

    def _named(
        self, names: Iterable[str], protocol: int | None, selector: Selector
    ) -> tuple[str, ...]:
        specs = [named_port_set(selector, name, protocol or 0) for name in names]
        self.sets += specs
        return tuple(spec.id for spec in specs)


def _both(positive: Selector, negative: Selector) -> Selector:
    """What one selects and the other doesn't."""
    unwanted = negative.root
    excluding = unwanted.operand if isinstance(unwanted, Not) else Not(unwanted)
    return Selector(And((positive.root, excluding)))


def _versions(rule: ApiRule, protocol: int | None, *not_nets: Iterable[Net]) -> set[int]:
    """The IP versions a rule is about; none, where what it says is never true together.

    Who writes "all but these", of IPv4, has not spoken of IPv6: like ``nets``, ``notNets`` make it
    a rule of their version, as they do in Calico (``felix/rules/policy.go`` FilterRuleToIPVersion).
    """
    said: list[set[int | None]] = [{rule.ip_version}, {ICMP_VERSIONS.get(protocol or 0)}]
    said += [{net.version for net in nets} for nets in not_nets]
    return {version for version in (4, 6) if all(version in each for each in said if any(each))}


@dataclass(frozen=True, slots=True)
class _Side:
    """The conditions on the source or the destination."""

    nets: tuple[Net, ...]
    not_nets: tuple[Net, ...]
    sets: tuple[str, ...]
    not_sets: tuple[str, ...]
    ports: tuple[PortRange, ...]
    not_ports: tuple[PortRange, ...]
    named_ports: tuple[str, ...]
    not_named_ports: tuple[str, ...]


def named_port_set(selector: Selector, name: str, protocol: int) -> SetSpec:
    """The set of (address, protocol, port) of a named port at the endpoints of a selector."""
    word = {0: "any", 6: "tcp", 17: "udp", 132: "sctp"}.get(protocol, str(protocol))
    return SetSpec(unique_id("n", f"{selector.id},{word},{name}"), selector, name, protocol)


# How the endpoints of services are kept: by the name of their service and of their only port.
SERVICE_LABEL = "service"
SERVICE_PORT = "*"


def service_set(namespace: str, name: str, *, with_ports: bool) -> SetSpec:
    """The set of the addresses, or of (address, protocol, port), of a service's endpoints."""
    service = f"{namespace}/{name}"
    selector = Selector(Compare(SERVICE_LABEL, "==", service))
    if with_ports:
        return SetSpec(unique_id("svc", service), selector, SERVICE_PORT, of_service=True)
    return SetSpec(unique_id("svcnoport", service), selector, of_service=True)


def _with_icmp(match: Match, icmp: ICMPFields | None, not_icmp: ICMPFields | None) -> list[Match]:
    """The ICMP conditions added.

    ``notICMP`` with a type and a code means "not both"; of a ``Match`` all conditions hold,
    so it takes two: another type, or this type with another code.
    """
    if icmp is not None:
        match = replace(match, icmp_type=icmp.type, icmp_code=icmp.code)
    if not_icmp is None or not_icmp.type is None:
        return [match]
    if match.icmp_type is None:
        other_type = replace(match, not_icmp_type=not_icmp.type)
        if not_icmp.code is None:
            return [other_type]
        same_type = replace(match, icmp_type=not_icmp.type, not_icmp_code=not_icmp.code)
        return [other_type, same_type]
    if match.icmp_type != not_icmp.type:
        return [match]
    if not_icmp.code is None or match.icmp_code == not_icmp.code:
        return []
    return [match if match.icmp_code is not None else replace(match, not_icmp_code=not_icmp.code)]
