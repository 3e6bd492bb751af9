"""What peers have told: their routes, and what becomes of these when a session ends.

Graceful restart (RFC 4724), as the helper of a peer that restarts, and for what was learned
before our own end of the sessions restarted: routes are kept as stale until they are told
again, the peer marks the end of its routes, or time is up. Pure: times are arguments,
seconds of any one clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from api.net import Net
from bird_glue.decision import Path, Session
from bird_glue.messages import Attributes, GracefulRestart, Opened, Updated

# How long a peer that is up again may take to tell all its routes, and how long one is
# waited for that doesn't mark the end of them (without graceful restart there is no mark).
END_OF_RIB_SECONDS = 120.0
UNMARKED_SECONDS = 5.0


@dataclass(slots=True)
class PeerState:
    """A peer and what it told. ``ended``: IP versions all of whose routes are here.

    ``session`` is None while the peer is not wanted but its session still stands: what it
    tells is kept, for the case that it is wanted again before ExaBGP has ended the session.
    """

    session: Session | None = None
    nets: set[Net] = field(default_factory=set)
    stale: set[Net] = field(default_factory=set)
    deadline: float | None = None  # when stale routes go
    ours: bool = False  # they are stale because our end was gone
    router_id: int = 0
    graceful: GracefulRestart | None = None
    up: bool = False
    ended: set[int] = field(default_factory=set)
    settles: float | None = None  # when a peer that marks no end counts as complete
    dead: bool = False  # as BFD saw it, since it was up
    unplugged: bool = False  # its link was down since it was up
    external: bool = False  # it was over eBGP when it was wanted last
    last: Path | None = None  # what its last UPDATE announced

    def complete(self, now: float) -> bool:
        """Whether it is up and has told all it has, or is dead and has nothing to tell."""
        waited = self.settles is not None and now >= self.settles
        return self.dead or (self.up and (waited or self._all_ended()))

    def _all_ended(self) -> bool:
        if self.session and self.session.extended and self.graceful:
            return self.ended >= self.graceful.families
        return bool(self.ended)


class AdjRibIn:
    """Routes by prefix and peer. Peers are known by their address.

    ``changed`` collects the prefixes whose paths changed, as keys, in the order in which they came:
    so memory is gone through in order, too, from here to the kernel. Whoever reads it empties it.
    """

    def __init__(self) -> None:
        self.peers: dict[Net, PeerState] = {}
        self.routes: dict[Net, dict[Net, Path]] = {}
        self.next_hops: Counter[Net] = Counter()  # how many paths have it
        self.changed: dict[Net, None] = {}

    def set_peers(self, sessions: Mapping[Net, Session]) -> None:
        """Who is wanted as a peer. Routes of the others are not used."""
        for address in sessions.keys() - self.peers.keys():
            self.peers[address] = PeerState()
        for address, known in tuple(self.peers.items()):
            session = sessions.get(address)
            if known.session != session:
                known.session = session
                self.changed |= dict.fromkeys(known.nets)
                if session is not None:
                    if not session.extended:
                        others = [net for net in known.nets if net.version != address.version]
                        self._forget(address, others)
                    if session.external and not known.external:
                        self._without_internal(address)
                    known.external = session.external
            self._drop_unwanted(address)

    def opened(self, event: Opened) -> None:
        """The peer's OPEN came."""
        peer = self.peers.setdefault(event.peer, PeerState())
        peer.graceful = event.graceful_restart
        if peer.router_id != event.router_id:
            peer.router_id = event.router_id
            self.changed |= dict.fromkeys(peer.nets)

    def up(self, address: Net, now: float) -> None:
        """The session is established; what was kept of the last one awaits confirmation.

        Routes of a family go at once if the peer has not kept forwarding them.
        """
        peer = self.peers.setdefault(address, PeerState())
        graceful = peer.graceful
        marks_end = bool(graceful and graceful.families)
        peer.up = True
        peer.dead = peer.unplugged = False
        peer.ended.clear()
        peer.settles = None if marks_end else now + UNMARKED_SECONDS
        if peer.stale and not peer.ours:
            kept = graceful.forwarding if graceful else frozenset()
            self._forget(address, [net for net in peer.stale if net.version not in kept])
        if peer.stale:
            peer.deadline = now + (END_OF_RIB_SECONDS if marks_end else UNMARKED_SECONDS)

    def down(self, address: Net, now: float, *, graceful: bool) -> None:
        """The peer's session is over, or an attempt.

        ``graceful``: it ended without a NOTIFICATION; then routes are kept for as long as the
        peer's capability asks.
        """
        peer = self.peers.get(address)
        if peer is None or not peer.up:
            return  # a failed attempt: what is stale stays until its time is up
        # what it had not told again since it restarted before (RFC 4724 4.2)
        self._forget(address, tuple(peer.stale))
        if peer.session is None:
            peer.up = False
            self._drop_unwanted(address)
            return
        kept: frozenset[int] = frozenset()
        if graceful and peer.graceful and not peer.unplugged:
            kept = peer.graceful.families
        self._forget(address, [net for net in peer.nets if net.version not in kept])
        seconds = peer.graceful.seconds if peer.graceful else 0
        self._grow_stale(peer, now + seconds, ours=False)

    def failed(self, address: Net, *, independent: bool) -> bool:
        """The peer was seen to be dead (RFC 5882 4.3): nothing of it is kept.

        ``independent``: its failure detection doesn't end with its control plane; else, while it
        restarts gracefully, the failure means no more than that. Returns whether it was up.
        """
        peer = self.peers.get(address)
        if peer is None:
            return False
        if peer.up or independent:
            self._forget(address, tuple(peer.nets))
            peer.deadline = None
            peer.dead = True
        return peer.up

    def unplugged(self, address: Net) -> None:
        """The link to the peer is down. When it is back the session may go on as if nothing had
        been; but one that ended then, or had before, may have done so because the whole machine
        went, with all that its kernel knew: packets are not sent there on an earlier word.
        """
        if peer := self.peers.get(address):
            peer.unplugged = True
            if not peer.up:
                self._forget(address, tuple(peer.stale))

    def restarted(self, now: float) -> None:
        """Our end of all sessions is gone and will come back: keep what was told."""
        for address, peer in tuple(self.peers.items()):
            if peer.up:
                self._grow_stale(peer, now + END_OF_RIB_SECONDS, ours=True)
            self._drop_unwanted(address)

    def _grow_stale(self, peer: PeerState, deadline: float, *, ours: bool) -> None:
        peer.up = False
        peer.settles = None
        peer.ended.clear()
        peer.stale = set(peer.nets)
        peer.ours = ours
        peer.deadline = deadline if peer.stale else None

    def updated(self, event: Updated, limit: int | None = None) -> bool:
        """An UPDATE came. Returns False, and takes no more of it, beyond ``limit`` prefixes."""
        address = event.peer
        peer = self.peers.get(address)
        if peer is None or peer.dead:
            return True
        self._forget(address, event.withdrawn)
        if limit is not None and len(peer.nets) + len(event.announced) > limit:
            new = {net for net, _ in event.announced} - peer.nets
            if len(peer.nets) + len(new) > limit:
                return False
        attributes = external(event.attributes) if peer.external else event.attributes
        shared: dict[Net, Path] = {}  # of one UPDATE, by next hop
        for net, next_hop in event.announced:
            path = shared.get(next_hop)
            if path is None:
                path = Path(address, next_hop, attributes)
                if path == peer.last:  # so that it is looked at once, whatever has it
                    path = peer.last
                peer.last = shared[next_hop] = path
            self.next_hops[next_hop] += 1
            paths = self.routes.get(net)
            if paths is None:
                self.routes[net] = {address: path}
                continue
            if (old := paths.get(address)) is not None:
                self._release(old.next_hop)
            paths[address] = path
        nets = dict.fromkeys([net for net, _ in event.announced])
        peer.nets.update(nets)
        peer.stale.difference_update(nets)
        self.changed |= nets
        return True

    def end_of_rib(self, address: Net, version: int) -> None:
        """The peer has told all its routes of an IP version: what is still stale is gone."""
        if peer := self.peers.get(address):
            peer.ended.add(version)
            self._forget(address, [net for net in peer.stale if net.version == version])
            if not peer.stale:
                peer.deadline = None

    def expire(self, now: float) -> None:
        """Forget what was stale for too long."""
        for address, peer in self.peers.items():
            if peer.deadline is not None and peer.deadline <= now:
                self._forget(address, tuple(peer.stale))
                peer.deadline = None

    def next_deadline(self) -> float | None:
        """When ``expire`` has something to do; None if never."""
        deadlines = (peer.deadline for peer in self.peers.values())
        return min((time for time in deadlines if time is not None), default=None)

    def complete(self, now: float) -> bool:
        """Whether every peer that is wanted has told all it has, or has been seen to be dead."""
        return all(peer.complete(now) for peer in self.peers.values() if peer.session)

    def next_settled(self, now: float) -> float | None:
        """When a peer that marks no end will count as complete; None if none is waited for."""
        times = (peer.settles for peer in self.peers.values())
        return min((time for time in times if time is not None and time > now), default=None)

    def _without_internal(self, address: Net) -> None:
        """It turns out to be a peer of another AS: take its routes as those of one."""
        for net in self.peers[address].nets:
            path = self.routes[net][address]
            self.routes[net][address] = path._replace(attributes=external(path.attributes))

    def _drop_unwanted(self, address: Net) -> None:
        peer = self.peers[address]
        if peer.session is None and not peer.up:
            self._forget(address, tuple(peer.nets))
            del self.peers[address]

    def _forget(self, address: Net, nets: Iterable[Net]) -> None:
        peer = self.peers[address]
        gone = dict.fromkeys([net for net in nets if net in peer.nets])
        for net in gone:
            paths = self.routes[net]
            self._release(paths.pop(address).next_hop)
            if not paths:
                del self.routes[net]
        peer.nets.difference_update(gone)
        peer.stale.difference_update(gone)
        self.changed |= gone

    def _release(self, next_hop: Net) -> None:
        self.next_hops[next_hop] -= 1
        if not self.next_hops[next_hop]:
            del self.next_hops[next_hop]


def external(attributes: Attributes) -> Attributes:
    """Attributes that came over eBGP, less those that mean something inside of an AS alone.

    RFC 4271 5.1.5, RFC 7606 7.9 and 7.10.
    """
    if (attributes.local_preference, attributes.originator, attributes.clusters) == (
        None,
        None,
        (),
    ):
        return attributes
    return replace(attributes, local_preference=None, originator=None, clusters=())
