"""AdminNetworkPolicy and BaselineAdminNetworkPolicy."""

from __future__ import annotations

from pydantic import BaseModel

from api import adminnetworkpolicy as anp
from manifests.cel import Rule

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    anp.BaselineAdminNetworkPolicy: (
        Rule("self.metadata.name == 'default'", "a cluster has one, called default"),
    ),
}
