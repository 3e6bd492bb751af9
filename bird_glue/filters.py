"""BGPFilter, compiled to what both engines understand, and what it decides about a route.

The rules of a peer's filters are tried in order, filter after filter. The first whose
conditions all hold decides; where none does, nothing is decided: an import is then accepted,
an export goes on to the rules of the blocks and pools. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import NamedTuple

from api.bgpfilter import BGPFilter, BGPFilterRule, FilterOperation
from api.net import BITS, V4, Net, parse_net
from bird_glue.messages import Attributes, Segment

# A route's priority (kernel metric) is carried as this less the priority, as Calico does.
HIGHEST_PREFERENCE = 2**31 - 1
DEFAULT_LOCAL_PREFERENCE = 100


class Direction(Enum):
    """What a peer tells, or what it is told."""

    IMPORT = "import"
    EXPORT = "export"


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Prefixes inside of ``net`` with ``shortest`` to ``longest`` bits; or all others.

    ``shortest`` is never less than the length of ``net``; where it is greater than
    ``longest``, nothing is inside.
    """

    net: Net
    shortest: int
    longest: int
    negated: bool = False

    def matches(self, net: Net) -> bool:
        """Whether the prefix is one of them."""
        inside = self.net.contains(net) and self.shortest <= net.length <= self.longest
        return inside != self.negated


@dataclass(frozen=True, slots=True)
class AddCommunity:
    """Add ``65001:7`` or ``65001:7:8``, unless the route carries it."""

    value: str

    @property
    def large(self) -> bool:
        """RFC 8092?"""
        return self.value.count(":") == 2


@dataclass(frozen=True, slots=True)
class PrependAsPath:
    """Put AS numbers in front of the path, the first one leftmost."""

    asns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetLocalPreference:
    """Set the local preference."""

    value: int


Operation = AddCommunity | PrependAsPath | SetLocalPreference


@dataclass(frozen=True, slots=True)
class Rule:
    """What must hold, and what then becomes of the route. None and empty: whatever it is.

    ``remote``: it was learned from a BGP peer. ``interface``: that its traffic leaves by;
    ``*`` stands for any text. ``external``: the session is eBGP. ``community``: it carries
    this. ``as_path``: the path begins so. ``operations`` are applied in order.
    """

    accept: bool
    prefix: PrefixMatch | None = None
    remote: bool = False
    interface: str = ""
    external: bool | None = None
    community: str = ""
    as_path: tuple[int, ...] = ()
    local_preference: int | None = None
    operations: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class Filter:
    """A BGPFilter. One that is ``missing`` rejects everything: what it should let pass is
    not known.
    """

    name: str
    import_v4: tuple[Rule, ...] = ()
    import_v6: tuple[Rule, ...] = ()
    export_v4: tuple[Rule, ...] = ()
    export_v6: tuple[Rule, ...] = ()
    missing: bool = False

    def rules(self, direction: Direction, version: int) -> tuple[Rule, ...]:
        """The rules for routes of an IP version; those of a missing filter reject all."""
        if self.missing:
            return (Rule(accept=False),)
        if direction is Direction.IMPORT:
            return self.import_v4 if version == V4 else self.import_v6
        return self.export_v4 if version == V4 else self.export_v6


@dataclass(frozen=True, slots=True)
class RouteFacts:
    """What filters look at. ``interface``: that traffic leaves by, None if that isn't known.

    ``external``: the session it came by, or is told by, is eBGP.
    """

    net: Net
    attributes: Attributes
    external: bool
    remote: bool = True
    interface: str | None = None


class Decision(NamedTuple):
    """What filters say. ``accept`` None: nothing. ``why`` names the filter and the rule."""

    accept: bool | None
    attributes: Attributes
    why: str = ""


def compile_filter(resource: BGPFilter) -> Filter:
    """The rules of a BGPFilter."""
    spec = resource.spec
    return Filter(
        resource.name,
        _rules(spec.import_v4),
        _rules(spec.import_v6),
        _rules(spec.export_v4),
        _rules(spec.export_v6),
    )


def evaluate(filters: Sequence[Filter], direction: Direction, facts: RouteFacts) -> Decision:
    """What the filters of a peer decide about a route, and its attributes after that."""
    version = facts.net.version
    for found in filters:
        for index, rule in enumerate(found.rules(direction, version)):
            if _matches(rule, facts):
                attributes = facts.attributes
                for operation in rule.operations if rule.accept else ():
                    attributes = _apply(operation, attributes)
                where = f"{direction.value}V{version}[{index}]"
                why = "it does not exist, or is not valid" if found.missing else where
                return Decision(rule.accept, attributes, f"BGPFilter {found.name}: {why}")
    return Decision(None, facts.attributes)


def _rules(rules: Iterable[BGPFilterRule]) -> tuple[Rule, ...]:
    return tuple(map(_rule, rules))


def _rule(rule: BGPFilterRule) -> Rule:
    priority = rule.priority
    return Rule(
        accept=rule.action == "Accept",
        prefix=_prefix(rule),
        remote=rule.source == "RemotePeers",
        interface=rule.interface or "",
        external=None if rule.peer_type is None else rule.peer_type == "eBGP",
        community=rule.communities.values[0] if rule.communities else "",
        as_path=tuple(rule.as_path_prefix),
        local_preference=None if priority is None else HIGHEST_PREFERENCE - priority,
        operations=tuple(map(_operation, rule.operations)),
    )


def _prefix(rule: BGPFilterRule) -> PrefixMatch | None:
    if rule.cidr is None:
        return None
    net = parse_net(rule.cidr)
    shortest, longest = net.length, BITS[net.version]
    if rule.match_operator in ("Equal", "NotEqual"):
        longest = net.length
    if rule.prefix_length:
        if rule.prefix_length.min is not None:
            shortest = max(shortest, rule.prefix_length.min)
        if rule.prefix_length.max is not None:
            longest = min(longest, rule.prefix_length.max)
    return PrefixMatch(net, shortest, longest, rule.match_operator in ("NotEqual", "NotIn"))


def _operation(operation: FilterOperation) -> Operation:
    if operation.add_community:
        return AddCommunity(operation.add_community.value)
    if operation.prepend_as_path:
        return PrependAsPath(tuple(operation.prepend_as_path.prefix))
    if operation.set_priority:
        return SetLocalPreference(HIGHEST_PREFERENCE - operation.set_priority.value)
    raise AssertionError(operation)  # the model has exactly one of them


def _matches(rule: Rule, facts: RouteFacts) -> bool:
    attributes = facts.attributes
    if rule.prefix and not rule.prefix.matches(facts.net):
        return False
    if rule.remote and not facts.remote:
        return False
    if rule.interface and not (facts.interface and fnmatchcase(facts.interface, rule.interface)):
        return False
    if rule.external is not None and rule.external != facts.external:
        return False
    carried = (*attributes.communities, *attributes.large_communities)
    if rule.community and rule.community not in carried:
        return False
    if rule.as_path and not _begins(attributes.as_path, rule.as_path):
        return False
    return rule.local_preference in (None, preference_of(attributes))


def preference_of(attributes: Attributes) -> int:
    """The local preference, which is 100 where a route has none."""
    preference = attributes.local_preference
    return DEFAULT_LOCAL_PREFERENCE if preference is None else preference


def _begins(path: Iterable[Segment], prefix: Sequence[int]) -> bool:
    """Whether a path begins with AS numbers. A set stands for its members in any order.

    As BIRD's ``bgp_path ~ [= 65001 65002 * =]``.
    """
    steps = [step for segment in path for step in _steps(segment)]
    here = {0}
    for asn in prefix:
        here = {
            following
            for position in here
            if position < len(steps) and asn in steps[position].asns
            for following in _following(steps, position)
        }
    return bool(here)


class _Step(NamedTuple):
    """What stands for one AS number of a path."""

    asns: tuple[int, ...]
    is_set: bool


def _steps(segment: Segment) -> list[_Step]:
    if segment.kind.endswith("-set"):
        return [_Step(segment.asns, True)]
    return [_Step((asn,), False) for asn in segment.asns]


def _following(steps: Sequence[_Step], position: int) -> Iterator[int]:
    """Where the next number may stand: a set may stand for it too, however often."""
    if not steps[position].is_set:
        yield position + 1
        return
    while position < len(steps) and steps[position].is_set:
        yield position
        position += 1
    yield position


def _apply(operation: Operation, attributes: Attributes) -> Attributes:
    match operation:
        case AddCommunity(value=value):
            return add_community(attributes, value)
        case PrependAsPath(asns=asns):
            return replace(attributes, as_path=_prepend(asns, attributes.as_path))
        case SetLocalPreference(value=value):
            return replace(attributes, local_preference=value)


def add_community(attributes: Attributes, value: str) -> Attributes:
    """The attributes with ``65001:7`` or ``65001:7:8``, once."""
    large = AddCommunity(value).large
    carried = attributes.large_communities if large else attributes.communities
    if value in carried:
        return attributes
    if large:
        return replace(attributes, large_communities=(*carried, value))
    return replace(attributes, communities=(*carried, value))


def _prepend(asns: tuple[int, ...], path: tuple[Segment, ...]) -> tuple[Segment, ...]:
    if path and path[0].kind == "as-sequence":
        return (Segment("as-sequence", asns + path[0].asns), *path[1:])
    return (Segment("as-sequence", asns), *path)
