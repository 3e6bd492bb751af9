"""Routes as BIRD shows them (``show route all``), and why it has filtered one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from api.net import Net, parse_net
from bird_glue.birdc import Line
from bird_glue.decision import Guard, Path, Session, refusal
from bird_glue.filters import Direction, RouteFacts, evaluate
from bird_glue.messages import Attributes, Segment

_ROUTE = re.compile(r"([0-9a-f.:]+/\d+)\s")
_LEARNED = re.compile(r"(?:[0-9a-f.:]+/\d+)?\s+unicast \[(\S+) [^]]*\](\s\*)?")
_WAY = re.compile(r"(?:via \S+|dev) (?:on )?(\S+)")
_COMMUNITY = re.compile(r"\(([^)]*)\)")
_NUMBER = re.compile(r"\d+")
_PATH = re.compile(r"\{([\d ]*)\}|([\d ]+)")
_ORIGINS = {"IGP": 0, "EGP": 1, "Incomplete": 2}
_BGP, _NEXT_HOP = "BGP.", "BGP.next_hop:"


@dataclass(slots=True)
class ShownRoute:
    """A route. ``interface``: that it leaves by; ``values``: BGP attributes as BIRD's text."""

    net: Net
    interface: str | None = None
    values: dict[str, str] = field(default_factory=dict)

    @property
    def next_hop(self) -> Net | None:
        """The BGP next hop, the global one of two."""
        words = self.values.get("next_hop", "").split()
        return parse_net(words[0]) if words else None

    @property
    def attributes(self) -> Attributes:
        """The attributes that decide about it."""
        values = self.values
        clusters = values.get("cluster_list", "").split()
        originator = values.get("originator_id", "")
        return Attributes(
            origin=_ORIGINS.get(values.get("origin", ""), 2),
            as_path=_as_path(values.get("as_path", "")),
            med=_number(values.get("med")),
            local_preference=_number(values.get("local_pref")),
            communities=_communities(values.get("community", "")),
            large_communities=_communities(values.get("large_community", "")),
            originator=parse_net(originator).address if originator else None,
            clusters=tuple(parse_net(text).address for text in clusters),
        )


def parse_routes(lines: Iterable[Line]) -> list[ShownRoute]:
    """The answer to ``show route … all``; of each prefix the first route."""
    found: list[ShownRoute] = []
    for line in lines:
        text = line.text.strip()
        if text.startswith(_BGP):
            name, _, value = text.removeprefix(_BGP).partition(":")
            if found:
                found[-1].values.setdefault(name, value.strip())
        elif match := _ROUTE.match(text):
            found.append(ShownRoute(parse_net(match[1])))
        elif found and found[-1].interface is None and (way := _WAY.match(text)):
            found[-1].interface = way[1]
    return found


@dataclass(frozen=True, slots=True)
class LearnedWay:
    """A path of a protocol to a prefix. ``best``: it is the one that BIRD has chosen."""

    net: Net
    protocol: str
    best: bool
    next_hop: Net


def parse_learned(lines: Iterable[Line]) -> list[LearnedWay]:
    """The answer to ``show route all``: all paths of BGP that lead somewhere."""
    found: list[LearnedWay] = []
    net: Net | None = None
    way: re.Match[str] | None = None
    for line in lines:
        text = line.text
        if match := _ROUTE.match(text.lstrip()):
            net = parse_net(match[1])
        if "[" in text and "]" in text:
            way = _LEARNED.match(text.lstrip() if match else text)
        elif net and way and text.strip().startswith(_NEXT_HOP):
            words = text.split(":", 1)[1].split()
            found.append(LearnedWay(net, way[1], bool(way[2]), parse_net(words[0])))
            way = None
    return found


def why_filtered(route: ShownRoute, peer: Net, session: Session, guard: Guard) -> str:
    """The words for a route that was refused; empty if no rule is known to refuse it."""
    next_hop, attributes = route.next_hop, route.attributes
    if next_hop is None:
        return ""
    if why := refusal(route.net, Path(peer, next_hop, attributes), session, guard):
        return why
    facts = RouteFacts(route.net, attributes, session.external, True, route.interface)
    decision = evaluate(session.filters, Direction.IMPORT, facts)
    return f"rejected by {decision.why}" if decision.accept is False else ""


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _communities(text: str) -> tuple[str, ...]:
    return tuple(":".join(_NUMBER.findall(part)) for part in _COMMUNITY.findall(text))


def _as_path(text: str) -> tuple[Segment, ...]:
    """``65001 65002 {1 2}``."""
    segments = []
    for match in _PATH.finditer(text):
        numbers = tuple(map(int, _NUMBER.findall(match[0])))
        if numbers:
            kind = "as-set" if match[1] is not None else "as-sequence"
            segments.append(Segment(kind, numbers))
    return tuple(segments)
