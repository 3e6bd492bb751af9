"""What established peers have been told, and the commands that bring them to what they should.

ExaBGP remembers what it was told about a peer, and tells it again when a session comes back
or the peer asks; but a peer it is newly configured with knows nothing. So with each session
that comes up everything is told (what ExaBGP knows already costs nothing), what it should not
know is withdrawn, and then the end is marked, so that a peer which kept our routes over a
restart forgets only what is not among them.

Only established peers are ever told anything: routes that wait for a peer make ExaBGP lose a
request to load its configuration. Peers that are to be told the same are told by one command;
one for each of 200 would take ExaBGP most of a second.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from api.net import V4, Net, format_address
from bird_glue.announcement import Announcement, Announcements
from bird_glue.dialogue import Dialogue, Result
from bird_glue.messages import (
    Down,
    EndOfRib,
    Hello,
    Opened,
    Segment,
    SessionEvent,
    Up,
    Updated,
)

_PER_LINE = 20
# ExaBGP compares each peer that a command names with each that it has
_PEERS_PER_LINE = 20
_ALL = "*"
_ORIGINS = ("igp", "egp", "incomplete")
_RETRY_SECONDS = 2.0
_AUDIT_SECONDS = 10.0  # between two comparisons of what was sent with what should have been

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Told:
    """What one peer was told. None: with attributes that are not remembered.

    ``on_wire``: prefixes that were sent to the peer and not withdrawn. ``stale``: it is to be
    found out what is missing. ``suspect``: prefixes that were not as they should be when that was
    compared last; ``adrift``, the time before as well; ``repair``, those of them that are to be
    told anew, which ``repaired`` have been in this session.
    """

    announced: dict[Net, Announcement | None] = field(default_factory=dict)
    on_wire: set[Net] = field(default_factory=set)
    up: bool = False
    pending: int = 0  # commands about it that are under way
    retry: float = 0.0
    stale: bool = True
    end_asked: float | None = None
    end_sent: set[int] = field(default_factory=set)  # IP versions
    suspect: frozenset[Net] = frozenset()
    adrift: frozenset[Net] = frozenset()
    repair: set[Net] = field(default_factory=set)
    repaired: set[Net] = field(default_factory=set)
    extended: bool = False  # it takes IPv4 routes with IPv6 next hops


@dataclass(slots=True)
class Command:
    """What peers are to be told by one line. ``announcement`` None: to withdraw ``nets``."""

    nets: tuple[Net, ...] = ()
    announcement: Announcement | None = None
    peers: list[Net] = field(default_factory=list)


class Announcer:
    """Tells peers. ``want`` says what; ``step`` finds out what is missing."""

    def __init__(self) -> None:
        self._told: dict[Net, Told] = {}
        self._wanted: Mapping[Net, Announcements] | None = None
        self._fronts: Mapping[Net, int | None] = {}
        self._extended: Mapping[Net, Net] = {}
        self._mark_end = False
        self._audit_at = 0.0

    def want(
        self,
        wanted: Mapping[Net, Announcements],
        fronts: Mapping[Net, int | None],
        extended: Mapping[Net, Net],
        *,
        mark_end: bool,
    ) -> None:
        """Per peer the prefixes and their attributes; peers that are not in it: nothing.

        ``fronts``: per peer the AS number that eBGP puts in front of a path. ``extended``: for
        peers over IPv6 that are told IPv4 routes, too, our address there (RFC 8950).
        """
        same: dict[tuple[int, int], bool] = {}  # most peers share what they are told
        for peer, told in self._told.items():
            if self._wanted is None or self._fronts.get(peer) != fronts.get(peer):
                told.stale = True
                continue
            old, new = self._wanted.get(peer), wanted.get(peer)
            pair = id(old), id(new)
            if pair not in same:
                same[pair] = old == new
            if not same[pair]:
                told.stale = True
        self._wanted = wanted
        self._fronts = fronts
        self._extended = extended
        self._mark_end = mark_end

    def forget(self) -> None:
        """ExaBGP is gone."""
        self._told.clear()

    def hello(self, hello: Hello) -> None:
        """ExaBGP was found running, and had been told this."""
        for peer, nets in hello.announced.items():
            self._told[peer] = Told(dict.fromkeys(nets), set(nets))

    def note(self, event: SessionEvent) -> None:
        """Something happened to a session."""
        told = self._told.setdefault(event.peer, Told())
        match event:
            case Up():
                told.up = told.stale = True
                told.announced = dict.fromkeys(told.announced)
                told.end_asked, told.end_sent = None, set()
                told.suspect, told.adrift, told.repaired = frozenset(), frozenset(), set()
            case Opened(extended_next_hop=extended):
                told.extended = extended
            case Down(removed=removed):
                told.up = False
                told.on_wire.clear()
                if removed:
                    del self._told[event.peer]
            case Updated(sent=True, withdrawn=withdrawn, announced=announced):
                told.on_wire.difference_update(withdrawn)
                told.on_wire.update(net for net, _ in announced)
            case EndOfRib(sent=True, version=version):
                told.end_sent.add(version)

    def sent(self, peer: Net) -> int:
        """How many prefixes a peer was sent."""
        told = self._told.get(peer)
        return len(told.on_wire) if told and told.up else 0

    def intended(self, peer: Net) -> int:
        """How many prefixes a peer should have been sent."""
        told = self._told.get(peer)
        return len(self._due(peer, told)) if told and told.up else 0

    def adrift(self, peer: Net) -> int:
        """How many prefixes a peer was sent, or not, otherwise than it should."""
        told = self._told.get(peer)
        return len(told.adrift) if told and told.up else 0

    def knowing(self) -> set[Net]:
        """The peers that were sent something."""
        return {peer for peer, told in self._told.items() if told.up and told.on_wire}

    def step(self, dialogue: Dialogue, now: float, everyone: Collection[Net] = ()) -> None:
        """Ask ExaBGP for what is missing. ``everyone``: the peers it has, where that is known."""
        if self._wanted is None:
            return
        if now >= self._audit_at:
            self._audit_at = now + _AUDIT_SECONDS
            self._audit()
        commands: dict[str, Command] = {}
        ends: dict[str, Command] = {}  # after the routes
        for peer, told in self._told.items():
            if told.up and not told.pending and told.retry <= now:
                versions = self._versions(peer, told)
                if told.stale or told.retry:
                    self._collect(peer, told, self._due(peer, told), commands)
                if peer in self._wanted and self._mark_end and not told.end_sent >= versions:
                    _collect_end(peer, told, versions, now, ends)
        for text, command in (commands | ends).items():
            for names, peers in _addressed(command.peers, everyone):
                self._ask(dialogue, f"{names} {text}", command, peers)

    def next_due(self) -> float | None:
        """When ``step`` has something to do though nothing happens."""
        due = []
        for peer, told in self._told.items():
            if told.up and not told.pending:
                if told.retry:
                    due.append(told.retry)
                if told.end_asked is not None and not told.end_sent >= self._versions(peer, told):
                    due.append(told.end_asked + _RETRY_SECONDS)
        return min(due, default=None)

    def _due(self, peer: Net, told: Told) -> Announcements:
        """What a peer should be told: of what is wanted, what its session can carry."""
        wanted = (self._wanted or {}).get(peer, {})
        if peer in self._extended and V4 not in self._versions(peer, told):
            return {net: way for net, way in wanted.items() if net.version != V4}
        return wanted

    def _audit(self) -> None:
        """Compare what was sent with what should have been. What differs twice in a row is told
        anew, once in a session: taken back first, as ExaBGP takes it for told.
        """
        for peer, told in self._told.items():
            busy = told.pending or told.retry or told.stale or not self._mark_end
            if busy or not told.up or not told.end_sent >= self._versions(peer, told):
                continue
            found = frozenset(self._due(peer, told).keys() ^ told.on_wire)
            told.suspect, told.adrift = found, found & told.suspect
            told.repair = set(told.adrift - told.repaired)
            if told.repair:
                told.stale = True
                nets = ", ".join(map(str, sorted(told.repair)[:_PER_LINE]))
                _log.warning("%s: not told as it should be, again: %s", peer, nets)

    def _versions(self, peer: Net, told: Told) -> frozenset[int]:
        """The IP versions of routes that a peer is told."""
        both = told.extended and peer in self._extended
        return frozenset((peer.version, V4) if both else (peer.version,))

    def _collect(
        self, peer: Net, told: Told, wanted: Announcements, commands: dict[str, Command]
    ) -> None:
        told.retry = 0.0
        told.stale = False
        if peer not in self._extended:  # ExaBGP forgot them with the family
            known = told.announced.items()
            told.announced = {net: way for net, way in known if net.version == peer.version}
        if told.repair:
            wanted = {net: way for net, way in wanted.items() if net not in told.repair}
            told.announced |= dict.fromkeys(told.repair)
            told.repaired |= told.repair
            told.repair = set()
            told.stale = True  # they come next
        for announcement, nets in _missing(wanted, told.announced):
            prefixes = " ".join(map(str, nets))
            # what ExaBGP would take for itself in an IPv4 route is its router ID
            own = self._extended.get(peer) if nets[0].version == V4 else None
            attributes = attribute_words(announcement, self._fronts.get(peer), own)
            text = f"announce attributes {attributes} nlri {prefixes}"
            commands.setdefault(text, Command(nets, announcement)).peers.append(peer)
        for nets in _batches([net for net in told.announced if net not in wanted]):
            prefixes = " ".join(map(str, nets))
            text = f"withdraw attributes next-hop self nlri {prefixes}"
            commands.setdefault(text, Command(nets)).peers.append(peer)

    def _ask(self, dialogue: Dialogue, line: str, command: Command, peers: list[Net]) -> None:
        asked = [self._told[peer] for peer in peers]

        def finish(result: Result) -> None:
            for told in asked:
                told.pending -= 1
                if not result.done:
                    told.retry = result.time + _RETRY_SECONDS
                elif command.announcement is not None:
                    told.announced.update(dict.fromkeys(command.nets, command.announcement))
                else:
                    for net in command.nets:
                        told.announced.pop(net, None)

        for told in asked:
            told.pending += 1
        dialogue.ask(line, finish)


def _collect_end(
    peer: Net, told: Told, versions: frozenset[int], now: float, ends: dict[str, Command]
) -> None:
    if told.end_asked is None or now >= told.end_asked + _RETRY_SECONDS:
        told.end_asked = now
        for version in sorted(versions - told.end_sent):
            text = f"announce eor ipv{version} unicast"
            ends.setdefault(text, Command()).peers.append(peer)


def _addressed(peers: list[Net], everyone: Collection[Net]) -> Iterator[tuple[str, list[Net]]]:
    """The peers in portions, each as the words by which a command names them."""
    if len(peers) > _PEERS_PER_LINE and set(peers) == set(everyone):
        yield f"neighbor {_ALL}", peers
        return
    for start in range(0, len(peers), _PEERS_PER_LINE):
        part = peers[start : start + _PEERS_PER_LINE]
        yield " , ".join(f"neighbor {format_address(*peer[:2])}" for peer in part), part


def _missing(
    wanted: Announcements, announced: Mapping[Net, Announcement | None]
) -> list[tuple[Announcement, tuple[Net, ...]]]:
    """(announcement, prefixes that share it) still to be told, in portions of an IP version."""
    groups: dict[tuple[Announcement, int], list[Net]] = {}
    for net, announcement in wanted.items():
        if announced.get(net) != announcement:
            groups.setdefault((announcement, net.version), []).append(net)
    return [(found, part) for (found, _), nets in groups.items() for part in _batches(nets)]


def attribute_words(announcement: Announcement, front: int | None, own: Net | None = None) -> str:
    """The attributes as ExaBGP's command line takes them; ``front``: our AS number, to eBGP;
    ``own``: our address, where ExaBGP wouldn't find it by itself.

    ExaBGP sends a path that is spelt out as it is; without one it puts our AS in by itself.
    """
    next_hop = announcement.next_hop or own
    attributes = announcement.attributes
    words = ["next-hop", "self" if next_hop is None else format_address(*next_hop[:2])]
    words += ["origin", _ORIGINS[attributes.origin]]
    if attributes.local_preference is not None:
        words += ["local-preference", str(attributes.local_preference)]
    if attributes.med is not None:
        words += ["med", str(attributes.med)]
    if attributes.as_path:
        first = () if front is None else (Segment("as-sequence", (front,)),)
        words += _as_path((*first, *attributes.as_path))
    for name, communities in (
        ("community", attributes.communities),
        ("large-community", attributes.large_communities),
        ("extended-community", attributes.extended_communities),
    ):
        if communities:
            words += [name, "[", *communities, "]"]
    if attributes.originator is not None:
        words += ["originator-id", format_address(V4, attributes.originator)]
    if attributes.clusters:
        words += ["cluster-list", "["]
        words += [format_address(V4, cluster) for cluster in attributes.clusters]
        words += ["]"]
    return " ".join(words)


def _as_path(segments: Iterable[Segment]) -> list[str]:
    words: list[str] = []
    for segment in segments:
        numbers = map(str, segment.asns)
        if segment.kind == "as-sequence":
            words += numbers
        elif segment.kind == "as-set":
            words += ["(", *numbers, ")"]
    return ["as-path", "[", *words, "]"]


def _batches(nets: list[Net]) -> list[tuple[Net, ...]]:
    return [tuple(nets[start : start + _PER_LINE]) for start in range(0, len(nets), _PER_LINE)]
