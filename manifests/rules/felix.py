"""FelixConfiguration."""

from __future__ import annotations

from pydantic import BaseModel

from api import felix
from manifests.cel import Rule

MAX_TABLES = felix.MAX_ROUTE_TABLES

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    felix.RouteTableRange: (
        Rule("self.min >= 1 && self.max >= self.min && self.max <= 250", "a range within 1 to 250"),
    ),
    felix.RouteTableIDRange: (
        Rule(
            "self.min >= 1 && self.max >= self.min && self.max <= 4294967295",
            "a range within 1 to 4294967295",
        ),
    ),
    felix.FelixConfigurationSpec: (
        Rule(
            "!has(self.routeTableRange) || !has(self.routeTableRanges)",
            "routeTableRange must be absent, because routeTableRanges is set",
        ),
        Rule(
            "!has(self.routeTableRanges)"
            f" || self.routeTableRanges.map(r, r.max - r.min + 1).sum() <= {MAX_TABLES}",
            f"routeTableRanges: at most {MAX_TABLES} tables in all",
        ),
    ),
    felix.FelixConfiguration: (
        Rule(
            "!(self.metadata.name == 'default' || self.metadata.name.startsWith('node.'))"
            " || !has(self.spec) || !has(self.spec.nodeSelector)"
            " || size(self.spec.nodeSelector) == 0",
            "nodeSelector must be absent in default and node.*",
        ),
    ),
}
