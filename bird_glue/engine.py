"""What a BGP engine is: a daemon that outlives the agent, and is told what should be.

Two are there. **ExaBGP** speaks BGP and nothing else: routes come from it as events, what is
best is decided here, and the kernel's routes are ours to write. **BIRD** decides and writes by
itself, by the same rules, which it gets as configuration; of its routes it tells numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from api.net import V4, V6, Net
from bird_glue.advertise import Speaking
from bird_glue.announcement import Announcements
from bird_glue.channel import FromRelay
from bird_glue.config import Listen, Neighbor
from bird_glue.decision import Guard, Session
from bird_glue.messages import SessionEvent
from bird_glue.pools import Pools

EXABGP = "exabgp"
BIRD = "bird"


@dataclass(frozen=True, slots=True)
class Intent:
    """What should be, but for the routes of this node itself.

    By the peer's address: ``neighbors``, the sessions; ``sessions``, how routes that come
    are looked at; ``speaking``, how those that go are told. ``blocks``: those of this node;
    ``metrics``: of the kernel's routes, by IP version. ``ignored_interfaces``: whose subnets
    no next hop is looked for on, with wildcards. ``receive_limit``: prefixes that a peer may tell,
    0 for any number.
    """

    listen: Listen
    neighbors: Mapping[Net, Neighbor] = field(default_factory=dict)
    sessions: Mapping[Net, Session] = field(default_factory=dict)
    speaking: Mapping[Net, Speaking] = field(default_factory=dict)
    guard: Guard = field(default_factory=Guard)
    pools: Pools = field(default_factory=Pools)
    blocks: tuple[Net, ...] = ()
    metrics: Mapping[int, int] = field(default_factory=lambda: {V4: 0, V6: 0})
    ignored_interfaces: tuple[str, ...] = ()
    receive_limit: int = 0


@dataclass(frozen=True, slots=True)
class Restarted:
    """The engine has ended, and with it all sessions; it will be started again."""


@dataclass(frozen=True, slots=True)
class TooMany:
    """A peer told more than ``Intent.receive_limit``; the engine has ended the session."""

    peer: Net


EngineEvent = SessionEvent | Restarted | TooMany


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine that decides by itself says of a session; as in ``PeerStatus``.

    ``said``: the last error that either end put in words, since it was established last.
    """

    state: str
    since: float
    info: str
    said: str = ""
    received: int = 0
    used: int = 0
    installed: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)


class LearnedPath(NamedTuple):
    """A path that an engine knows. ``best``: the one it has chosen for its prefix."""

    net: Net
    peer: Net
    next_hop: Net
    best: bool


class Engine(Protocol):
    """One daemon, its files in the agent's directory.

    ``configure`` and ``advertise`` say what is wanted; ``step`` does what is due to get there,
    and is called whenever something happened or ``next_due`` has come. ``programs``: it puts
    what it learns into the kernel itself, and reflects by itself.
    """

    name: str
    programs: bool

    @property
    def pid(self) -> int | None:
        """The process id of the daemon; None while there is none."""

    @property
    def problem(self) -> str:
        """Why the daemon doesn't run as it should; else empty."""

    @property
    def rejected(self) -> Mapping[Net, str]:
        """Sessions that the daemon refuses to be configured with, and what it says."""

    @property
    def left(self) -> bool:
        """After ``leave``: whether no peer has anything of ours any more."""

    def adopt(self, now: float) -> None:
        """Find the daemon that an earlier agent started. Raises OSError."""

    def configure(self, intent: Intent) -> None:
        """What sessions there should be, and their rules."""

    def advertise(self, wanted: Mapping[Net, Announcements], *, mark_end: bool) -> None:
        """What each peer should be told; of an engine that ``programs``, of our own routes.

        ``mark_end``: whether that is all, so that peers may forget what isn't in it.
        """

    def handle(self, message: FromRelay, now: float) -> list[EngineEvent]:
        """Take in what came; returns what it says about sessions."""

    def step(self, now: float) -> list[EngineEvent]:
        """Do what is due. Returns what became of sessions by it."""

    def next_due(self, now: float) -> float | None:
        """When to call ``step`` though nothing happens; None: no need."""

    def sent(self, peer: Net) -> int:
        """How many prefixes a peer was sent and has not had withdrawn."""

    def intended(self, peer: Net) -> int:
        """How many prefixes a peer should be sent; of an engine that ``programs``, of our own."""

    def adrift(self, peer: Net) -> int:
        """How many prefixes a peer has not been sent as it should, when it was compared last."""

    def fail(self, peer: Net, why: str) -> None:
        """The peer is dead (BFD): end its session, keep nothing of what it told."""

    @property
    def recovering(self) -> bool:
        """Whether it keeps the routes of an earlier run until peers have told theirs."""

    def report(self) -> Mapping[Net, Report]:
        """Sessions as an engine that ``programs`` sees them; else empty: its events tell."""

    def learned(self) -> list[LearnedPath]:
        """All that peers told and may be used, of an engine that ``programs``; else empty."""

    def leave(self) -> None:
        """Take back all that was announced; see ``left``."""

    def abandon(self) -> None:
        """End the daemon as if it had crashed: peers keep what it told, the kernel its routes."""

    def stop(self) -> None:
        """End the daemon."""

    def close(self) -> None:
        """Let go of the daemon, which goes on."""
