"""From the peers that are wanted to the sessions that can be run, and what is in the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from api.errors import Problem
from api.net import V4, V6, Net, format_address
from bird_glue.config import (
    DEFAULT_HOLD_SECONDS,
    DEFAULT_PORT,
    DEFAULT_RESTART_SECONDS,
    MAX_HOLD_SECONDS,
    MAX_RESTART_SECONDS,
    MIN_HOLD_SECONDS,
    Listen,
    Neighbor,
)
from bird_glue.filters import Filter
from bird_glue.peers import Peer, PeerType, greater
from bird_glue.secrets import PasswordError, SecretRead, password_of
from bird_glue.settings import Local, ObjectProblem

# which of several sessions with one address is made
_PRECEDENCE = {PeerType.GLOBAL: 0, PeerType.NODE: 1, PeerType.WORKLOAD: 2, PeerType.MESH: 3}
_KEEPALIVES = 3  # in a hold time (RFC 4271 10)
_ANY = {V4: "0.0.0.0", V6: "::"}


@dataclass(slots=True)
class Sessions:
    """What to run, keyed by the peer's address, and why the rest is not run.

    ``ways``: the gateways that alone lead to peers.
    """

    neighbors: dict[Net, Neighbor] = field(default_factory=dict)
    peers: dict[Net, Peer] = field(default_factory=dict)
    filters: dict[Net, tuple[Filter, ...]] = field(default_factory=dict)
    ways: dict[Net, Net] = field(default_factory=dict)
    problems: list[ObjectProblem] = field(default_factory=list)

    def refuse(self, peer: Peer, where: str, value: object, expected: str) -> None:
        """Note why there is no session with the peer."""
        self.problems.append(ObjectProblem(*peer.owner, Problem(where, value, expected)))


def plan_sessions(
    peers: Iterable[Peer],
    local: Local,
    hosts: frozenset[Net],
    source_of: Callable[[Net], Net | None],
    filters: Mapping[str, Filter] | None = None,
    secrets: Mapping[str, SecretRead] | None = None,
) -> Sessions:
    """The sessions. ``hosts``: addresses this machine has; ``source_of``: the one that the
    kernel would speak from. ``filters``: the BGPFilters there are, by name;
    ``secrets``: what was read of Secrets.
    """
    sessions = Sessions()
    for peer in sorted(peers, key=lambda peer: (peer.address, _PRECEDENCE[peer.type])):
        if peer.address in sessions.peers:
            _note_second(sessions, peer)
        elif (password := _find_password(sessions, peer, secrets or {})) is not None:
            source = peer.source or source_of(peer.reachable_by or peer.address)
            if source is None:
                text = format_address(*peer.address[:2])
                sessions.refuse(peer, "spec.peerIP", text, "an address there is a route to")
            elif source not in hosts and peer.type is PeerType.WORKLOAD:
                text = format_address(*source[:2])
                expected = f"an address of {peer.interface}, where it is yet to be put"
                sessions.refuse(peer, "spec.localWorkloadSelector", text, expected)
            elif source not in hosts:
                _note_source(sessions, local, source)
            else:
                sessions.peers[peer.address] = peer
                sessions.filters[peer.address] = _filters(sessions, peer, filters or {})
                if peer.reachable_by is not None:
                    sessions.ways[peer.address] = peer.reachable_by
                sessions.neighbors[peer.address] = _neighbor(peer, local, source, password)
    return sessions


def listen(local: Local, hosts: frozenset[Net]) -> Listen:
    """Where to accept connections: everywhere, or (bindMode NodeIP) at the node's addresses."""
    versions = sorted(local.node.hosts)
    if local.bind_node_address:
        own = [local.node.hosts[version] for version in versions]
        addresses = [format_address(*host[:2]) for host in own if host in hosts]
    else:
        addresses = [_ANY[version] for version in versions]
    return Listen(tuple(addresses), local.port or DEFAULT_PORT)


def _neighbor(peer: Peer, local: Local, source: Net, password: bytes) -> Neighbor:
    hold = DEFAULT_HOLD_SECONDS
    if peer.keepalive_seconds is not None:
        hold = max(MIN_HOLD_SECONDS, min(MAX_HOLD_SECONDS, _KEEPALIVES * peer.keepalive_seconds))
    restart = DEFAULT_RESTART_SECONDS
    if peer.restart_seconds is not None:
        restart = max(1, min(MAX_RESTART_SECONDS, peer.restart_seconds))
    own = local.node.hosts.get(peer.address.version, source)
    return Neighbor(
        address=peer.address,
        local=source,
        remote_as=peer.remote_as,
        local_as=peer.local_as or local.asn,
        router_id=local.router_id,
        port=peer.port or DEFAULT_PORT,
        # between two nodes one end calls and the other waits, whoever asked for the session
        passive=peer.passive or (peer.is_node and greater(peer.address, own)),
        hold_seconds=hold,
        restart_seconds=restart,
        ttl_security=peer.ttl_security,
        password=password,
        reachable_by=peer.reachable_by,
        extended_next_hop=peer.extended_next_hop,
    )


def _find_password(
    sessions: Sessions, peer: Peer, secrets: Mapping[str, SecretRead]
) -> bytes | None:
    """The password, empty if there is to be none. None: it is missing, so no session is made,
    rather than one without.
    """
    if peer.password is None:
        return b""
    mesh = peer.type is PeerType.MESH
    where = "spec.nodeMeshPassword" if mesh else "spec.password"
    found = peer.password
    try:
        if not found.name:
            raise PasswordError("the name of a Secret, in secretKeyRef")
        return password_of(found, secrets)
    except PasswordError as error:
        owner = ("BGPConfiguration", "default") if mesh else peer.owner
        value = f"{found.name}/{found.key}" if found.name else None
        problem = ObjectProblem(*owner, Problem(where, value, str(error)))
        if problem not in sessions.problems:
            sessions.problems.append(problem)
    return None


def _filters(sessions: Sessions, peer: Peer, known: Mapping[str, Filter]) -> tuple[Filter, ...]:
    for name in peer.filters:
        if name not in known:
            expected = "the name of a BGPFilter; until there is one no route passes"
            sessions.refuse(peer, "spec.filters", name, expected)
    return tuple(known.get(name) or Filter(name, missing=True) for name in peer.filters)


def _note_second(sessions: Sessions, peer: Peer) -> None:
    """A second session with one address. Over the mesh's, what a BGPPeer says wins silently."""
    first = sessions.peers[peer.address]
    if peer.type is not PeerType.MESH:
        text = format_address(*peer.address[:2])
        owner = " ".join(first.owner)
        sessions.refuse(
            peer, "spec.peerIP", text, f"another address: {owner} has a session with it"
        )


def _note_source(sessions: Sessions, local: Local, source: Net) -> None:
    field_name = "ipv4Address" if source.version == V4 else "ipv6Address"
    problem = Problem(
        f"spec.bgp.{field_name}",
        format_address(*source[:2]),
        "an address of an interface of this machine",
    )
    found = ObjectProblem("Node", local.node.name, problem)
    if found not in sessions.problems:
        sessions.problems.append(found)
