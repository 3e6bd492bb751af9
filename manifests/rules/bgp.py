"""BGPConfiguration, BGPPeer, BGPFilter.

Not said: that a name in ``prefixAdvertisements[].communities`` is one of ``communities``, which
would be 12 million comparisons in the worst case.
"""

from __future__ import annotations

from pydantic import BaseModel

from api import bgp, bgpfilter
from manifests.cel import Rule, absent_beside, given, oneof_text

CONFIGURATION = (
    *(
        Rule(
            f"!has(self.{field}) || !has(self.nodeToNodeMeshEnabled) || self.nodeToNodeMeshEnabled",
            f"{field} must be absent while nodeToNodeMeshEnabled is false",
        )
        for field in ("nodeMeshPassword", "nodeMeshMaxRestartTime")
    ),
    Rule(
        f"!{given('communities')} || {given('prefixAdvertisements')}",
        "communities must be used by prefixAdvertisements, or absent",
    ),
    Rule(
        f"{given('communities')} || !has(self.prefixAdvertisements)"
        " || self.prefixAdvertisements.all(a, a.communities.all(c, c.contains(':')))",
        "prefixAdvertisements: no communities are named, so only aa:nn and aa:nn:mm can be used",
    ),
)

PEER = (
    *absent_beside("node", "nodeSelector"),
    *absent_beside("peerIP", "peerSelector"),
    *absent_beside("localWorkloadSelector", "peerIP", "peerSelector"),
    Rule(
        f"!{given('peerSelector')} || !has(self.asNumber) || {oneof_text('asNumber', 0)}",
        "asNumber must be absent, because peerSelector is set",
    ),
    Rule(
        f"!{given('localWorkloadSelector')}"
        f" || (has(self.asNumber) && !({oneof_text('asNumber', 0)}))",
        "asNumber is required, because localWorkloadSelector is set",
    ),
    Rule(
        "!has(self.keepOriginalNextHop) || !self.keepOriginalNextHop || !has(self.nextHopMode)",
        "keepOriginalNextHop (deprecated) must be absent, because nextHopMode is set",
    ),
    Rule(
        f"!{given('reachableBy')} || {given('peerIP')}",
        "reachableBy must be absent, because peerIP is",
    ),
    Rule(
        f"!{given('reachableBy')} || !{given('peerIP')}"
        " || self.reachableBy.contains(':') == self.peerIP.matches(':.*:')",
        "reachableBy: an address of the same IP version as peerIP",
    ),
)

FILTER_RULE = (
    Rule(f"{given('cidr')} == {given('matchOperator')}", "cidr and matchOperator go together"),
    Rule(f"!has(self.prefixLength) || {given('cidr')}", "prefixLength needs a cidr"),
    Rule(
        f"!{given('operations')} || self.action == 'Accept'",
        "operations must be absent, unless action is Accept",
    ),
)

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    bgp.BGPConfigurationSpec: CONFIGURATION,
    bgp.BGPPeerSpec: PEER,
    bgpfilter.BGPFilterRule: FILTER_RULE,
}
