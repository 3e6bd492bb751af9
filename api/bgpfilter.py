"""BGPFilter: which routes are exported to and imported from a peer, and how they are changed.

The first rule whose conditions all hold decides. Where none does, imports are accepted and
exports go on to the rules of the pools.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from api.bgp import CommunityValue, RoutePriority
from api.fields import AsNumber, Cidr, refuse
from api.metadata import CalicoResource, Checked, Fault, Model, OneOf
from api.net import parse_net

_INTERFACE_RE = re.compile(r"[a-zA-Z0-9_.*-]{1,15}")
_NUMBER_RE = re.compile(r"0|[1-9][0-9]*")


def _interface(text: str) -> str:
    if not _INTERFACE_RE.fullmatch(text):
        raise refuse(
            "an interface name of 1 to 15 letters, digits, '_', '.', '-'; '*' stands for any text"
        )
    return text


def _plain_numbers(text: str) -> str:
    if not all(_NUMBER_RE.fullmatch(part) for part in text.split(":")):
        raise refuse("a community whose numbers have no leading zeros")
    return text


def _v4(text: str) -> str:
    if parse_net(text).version != 4:
        raise refuse("an IPv4 CIDR")
    return text


def _v6(text: str) -> str:
    if parse_net(text).version != 6:
        raise refuse("an IPv6 CIDR")
    return text


FilterInterface = Annotated[str, AfterValidator(_interface)]
PlainCommunity = Annotated[CommunityValue, AfterValidator(_plain_numbers)]
CidrV4 = Annotated[Cidr, AfterValidator(_v4)]
CidrV6 = Annotated[Cidr, AfterValidator(_v6)]


class PrefixLength(Model):
    """Lengths of prefixes, both ends included."""

    min: int | None = None
    max: int | None = None


class PrefixLengthV4(PrefixLength):
    """Lengths of IPv4 prefixes."""

    min: Annotated[int, Field(ge=0, le=32)] | None = None
    max: Annotated[int, Field(ge=0, le=32)] | None = None


class PrefixLengthV6(PrefixLength):
    """Lengths of IPv6 prefixes."""

    min: Annotated[int, Field(ge=0, le=128)] | None = None
    max: Annotated[int, Field(ge=0, le=128)] | None = None


class CommunityMatch(Model):
    """Routes that carry this community."""

    values: Annotated[list[PlainCommunity], Field(min_length=1, max_length=1)]


class AddCommunity(Model):
    """Add a community."""

    value: PlainCommunity


class PrependASPath(Model):
    """Put AS numbers before the path, the first one leftmost."""

    prefix: Annotated[list[AsNumber], Field(min_length=1, max_length=10)]


class SetPriority(Model):
    """Set the route's priority (metric), as FelixConfiguration's route priorities."""

    value: RoutePriority


class FilterOperation(OneOf):
    """One change to a route."""

    add_community: AddCommunity | None = None
    prepend_as_path: PrependASPath | None = Field(default=None, alias="prependASPath")
    set_priority: SetPriority | None = None


class BGPFilterRule(Checked):
    """A rule: everything that is present must match. Without conditions it matches every route."""

    cidr: str | None = None
    match_operator: Literal["Equal", "NotEqual", "In", "NotIn"] | None = None
    prefix_length: PrefixLength | None = None
    source: Literal["RemotePeers"] | None = None
    interface: FilterInterface | None = None
    peer_type: Literal["eBGP", "iBGP"] | None = None
    communities: CommunityMatch | None = None
    as_path_prefix: list[AsNumber] = Field(default_factory=list)
    priority: RoutePriority | None = None
    action: Literal["Accept", "Reject"]
    operations: list[FilterOperation] = Field(default_factory=list, max_length=10)

    def faults(self) -> Iterator[Fault]:
        """Half a condition on the prefix; changes to routes that are rejected."""
        if self.cidr is not None and self.match_operator is None:
            yield Fault(("matchOperator",), None, "required, because cidr is set")
        if self.cidr is None and self.match_operator is not None:
            yield Fault(("matchOperator",), self.match_operator, "absent, because cidr is")
        if self.cidr is None and self.prefix_length is not None:
            yield Fault(("prefixLength",), "set", "absent, because cidr is")
        if self.operations and self.action != "Accept":
            count = len(self.operations)
            yield Fault(("operations",), f"{count} operations", "absent, unless action is Accept")


class BGPFilterRuleV4(BGPFilterRule):
    """A rule for IPv4 routes."""

    cidr: CidrV4 | None = None
    prefix_length: PrefixLengthV4 | None = None


class BGPFilterRuleV6(BGPFilterRule):
    """A rule for IPv6 routes."""

    cidr: CidrV6 | None = None
    prefix_length: PrefixLengthV6 | None = None


class BGPFilterSpec(Model):
    """spec of a BGPFilter: rules in the order in which they are tried."""

    export_v4: list[BGPFilterRuleV4] = Field(default_factory=list)
    import_v4: list[BGPFilterRuleV4] = Field(default_factory=list)
    export_v6: list[BGPFilterRuleV6] = Field(default_factory=list)
    import_v6: list[BGPFilterRuleV6] = Field(default_factory=list)


class BGPFilter(CalicoResource):
    """Rules for routes, named by BGPPeers in ``filters``."""

    kind: Literal["BGPFilter"] = "BGPFilter"
    spec: BGPFilterSpec = Field(default_factory=BGPFilterSpec)
