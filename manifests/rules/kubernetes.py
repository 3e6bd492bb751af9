"""What ClusterNetworkPolicy and StagedKubernetesNetworkPolicy have from Kubernetes.

Not said: which keys and values of labels are possible. That exceptions lie within their network
would take too long in a policy as long as it may be: an admission policy says it.
"""

from __future__ import annotations

from pydantic import BaseModel

from api import kubernetes
from manifests.cel import Rule, given

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    kubernetes.LabelSelector: (),
    kubernetes.LabelSelectorRequirement: (
        Rule(
            f"(self.operator in ['In', 'NotIn']) == {given('values')}",
            "values go with the operators In and NotIn, and must be absent for others",
        ),
    ),
    kubernetes.IPBlock: (),
    kubernetes.NetworkPolicyPeer: (
        Rule(
            "has(self.ipBlock) != (has(self.podSelector) || has(self.namespaceSelector))",
            "either ipBlock, or podSelector and namespaceSelector",
        ),
    ),
    kubernetes.NetworkPolicyPort: (
        Rule(
            "!has(self.endPort) || (has(self.port) && self.endPort >= self.port)",
            "endPort must not be less than port, which must be a number",
        ),
    ),
}
