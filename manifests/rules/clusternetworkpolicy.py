"""ClusterNetworkPolicy."""

from __future__ import annotations

from pydantic import BaseModel

from api import clusternetworkpolicy as cnp
from manifests.cel import Rule

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    cnp.PortRange: (Rule("self.start < self.end", "end must be greater than start"),),
    cnp.EgressPeer: (),  # sets
    cnp.ClusterNetworkPolicyEgressRule: (
        Rule(
            "!self.to.exists(p, has(p.networks) || has(p.nodes) || has(p.domainNames))"
            " || !has(self.protocols)"
            " || !self.protocols.exists(p, has(p.destinationNamedPort))",
            "destinationNamedPort must be absent beside networks, nodes and domainNames",
        ),
    ),
}
