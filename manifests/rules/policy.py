"""NetworkPolicy, GlobalNetworkPolicy, their rules, and Tier.

Not said: annotations of a rule.
"""

from __future__ import annotations

from pydantic import BaseModel

from api import policy
from api.fields import PROTOCOLS
from manifests.cel import (
    Rule,
    given,
    oneof_text,
    true,
    without_global,
)
from manifests.rules.others import HAS_PORTS

# A DNS subdomain, says the API server itself.
PARTS = "self.metadata.name.split('.').size()"
GLOBAL_NAME = Rule(f"{PARTS} <= 2", f"metadata.name: {policy.POLICY_NAME}")
NAME = Rule(
    f"{PARTS} <= 2 || self.metadata.name.startsWith('knp.default.')"
    " || self.metadata.name.startsWith('ossg.default.')",
    f"metadata.name: {policy.POLICY_NAME}",
)


def _icmp_version(field: str, name: str) -> Rule:
    number = PROTOCOLS[name]
    version = policy.ICMP_VERSIONS[number]
    return Rule(
        f"!has(self.{field}) || !({oneof_text(field, name, number)})"
        f" || !has(self.ipVersion) || self.ipVersion == {version}",
        f"ipVersion must be {version}, because {field} is {name}",
    )


PORTS = tuple(
    Rule(
        f"!{given(f'{side}.{field}')} || (has(self.protocol) ? {HAS_PORTS}"
        f" : self.{side}.{field}.all(p, type(p) == string && p.matches('[a-z]')))",
        f"{side}.{field} need protocol TCP, UDP or SCTP; names of ports may do without",
    )
    for side in ("source", "destination")
    for field in ("ports", "notPorts")
)

PROTOCOL = (
    Rule(
        "!has(self.icmp) || (has(self.protocol)"
        f" && {oneof_text('protocol', 'ICMP', 'ICMPv6', 1, 58)})",
        "protocol must be ICMP or ICMPv6, because icmp is set",
    ),
    *(
        _icmp_version(field, name)
        for field in ("protocol", "notProtocol")
        for name in ("ICMP", "ICMPv6")
    ),
)

# The first of each list stands for all.
FIRST_NETS = tuple(
    f"(!{given(f'{side}.{field}')} || self.{side}.{field}[0].contains(':') == {{}})"
    for side in ("source", "destination")
    for field in ("nets", "notNets")
)

NETS = (
    Rule(
        "!has(self.ipVersion) || ("
        + " && ".join(first.format("(self.ipVersion == 6)") for first in FIRST_NETS)
        + ")",
        "nets of ipVersion only",
    ),
    Rule(
        "[true, false].exists(v6, " + " && ".join(first.format("v6") for first in FIRST_NETS) + ")",
        "nets of one IP version in a rule",
    ),
)

HTTP = (
    Rule(
        f"!has(self.http) || !has(self.protocol) || {oneof_text('protocol', 'TCP', 6)}",
        "protocol must be TCP or absent, because http is set",
    ),
    Rule("!has(self.http) || self.action == 'Allow'", "action must be Allow, because http is set"),
)

SERVICE_PORTS = tuple(
    Rule(
        "!has(self.destination) || !has(self.destination.services)"
        f" || !{given(f'destination.{field}')}",
        f"destination.{field} must be absent, because services is set",
    )
    for field in ("ports", "notPorts")
)

ENTITY = (
    *without_global("selector"),
    Rule(
        "!has(self.namespaceSelector) || !self.namespaceSelector.contains('global(')"
        " || self.namespaceSelector.trim() == 'global()'",
        "namespaceSelector: global() alone, or without it",
    ),
    *(
        Rule(
            f"!has(self.services) || !{given(other)}",
            f"{other} must be absent, because services is set",
        )
        for other in ("namespaceSelector", "selector", "notSelector", "nets", "notNets")
    ),
    Rule(
        "!has(self.services) || !has(self.serviceAccounts)",
        "serviceAccounts must be absent, because services is set",
    ),
    Rule(
        f"!{given('nets')} || [self.nets[0].contains(':')]"
        ".all(v6, self.nets.all(n, n.contains(':') == v6))",
        "nets of one IP version",
    ),
    Rule(
        "!has(self.notNets) || self.notNets.all(n, !n.endsWith('/0'))",
        "notNets: not everything, for the rule would never match",
    ),
)


def _no_services(direction: str, side: str) -> Rule:
    return Rule(
        f"!has(self.{direction})"
        f" || self.{direction}.all(r, !has(r.{side}) || !has(r.{side}.services))",
        f"services must be absent in the {side} of an {direction} rule",
    )


def _with_namespace(direction: str, side: str) -> Rule:
    return Rule(
        f"!has(self.{direction}) || self.{direction}.all(r, !has(r.{side})"
        f" || !has(r.{side}.services) || (has(r.{side}.services.__namespace__)"
        f" && size(r.{side}.services.__namespace__) > 0))",
        f"services need a namespace in the {side} of a global policy's {direction} rule",
    )


SPEC = (
    *without_global("selector", "serviceAccountSelector"),
    _no_services("ingress", "destination"),
    _no_services("egress", "source"),
    Rule(
        "!has(self.egress) || self.egress.all(r, !has(r.http))",
        "http must be absent in an egress rule",
    ),
)

GLOBAL_SPEC = (
    *without_global("namespaceSelector"),
    Rule(
        f"!{true('doNotTrack')} || !{true('preDNAT')}",
        "preDNAT must be false, because doNotTrack is true",
    ),
    Rule(
        f"!{true('preDNAT')} || !{given('egress')}",
        "egress must be absent, because preDNAT is true",
    ),
    Rule(
        f"!{true('preDNAT')} || !has(self.types) || !('Egress' in self.types)",
        "types must be without Egress, because preDNAT is true",
    ),
    Rule(
        f"!({true('preDNAT')} || {true('doNotTrack')}) || {true('applyOnForward')}",
        "applyOnForward must be true, because preDNAT or doNotTrack is",
    ),
    _with_namespace("ingress", "source"),
    _with_namespace("egress", "destination"),
)

TIER = (
    Rule(
        "!self.metadata.name.contains('.') && size(self.metadata.name) <= 63",
        "metadata.name: at most 63 lower-case letters, digits and '-'",
    ),
    *(
        Rule(
            f"self.metadata.name != '{name}' || (has(self.spec) && has(self.spec.order)"
            f" && self.spec.order == {order} && self.spec.defaultAction == '{action}')",
            f"the tier {name} has order {order:.0f} and defaultAction {action}",
        )
        for name, (order, action) in policy.BUILT_IN_TIERS.items()
    ),
)

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    policy.ICMPFields: (
        Rule("!has(self.code) || has(self.type)", "type is required, because code is set"),
    ),
    policy.HTTPMatch: (),  # a set
    policy.RuleMetadata: (),
    policy.EntityRule: ENTITY,
    policy.Rule: (*PORTS, *PROTOCOL, *NETS, *HTTP, *SERVICE_PORTS),
    policy.NetworkPolicySpec: SPEC,
    policy.GlobalNetworkPolicySpec: GLOBAL_SPEC,
    policy.NetworkPolicy: (NAME,),
    policy.GlobalNetworkPolicy: (GLOBAL_NAME,),
    policy.Tier: TIER,
}
