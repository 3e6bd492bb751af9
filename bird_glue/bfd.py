"""Bidirectional Forwarding Detection (RFC 5880): its packet, and one session as a state machine.

Asynchronous mode, without authentication and echo. Pure: times are arguments, seconds of a
monotonic clock, and so is chance. Intervals are microseconds, as in the packet. Imports little,
because the process that runs it should be small.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

SINGLE_HOP_PORT = 3784  # RFC 5881
MULTIHOP_PORT = 4784  # RFC 5883
TTL = 255  # of what is sent; on a single hop nothing less is accepted (RFC 5881 5)

_PACKET = struct.Struct("!BBBBIIIII")
_VERSION = 1
_POLL, _FINAL, _INDEPENDENT, _AUTHENTICATED, _DEMAND, _MULTIPOINT = 32, 16, 8, 4, 2, 1
_SLOW = 1_000_000  # no session that isn't up may send more often (RFC 5880 6.8.3)
_IDLE = 10_000_000  # and who never answers is asked now and then only
_IDLE_AFTER = 30.0  # seconds of silence
TURNS = 10  # of the process that runs it to an interval
# RFC 5880 6.8.7 says 0.75 to 1, and to 0.9 where a single lost packet ends the session; half a turn
# earlier or later than planned it is still that
_LEAST_JITTER, _MOST_JITTER, _JITTER_OF_ONE = 0.8, 0.95, 0.85
_NEVER = float("inf")


class State(IntEnum):
    """bfd.SessionState."""

    ADMIN_DOWN = 0
    DOWN = 1
    INIT = 2
    UP = 3


class Diagnostic(IntEnum):
    """Why a session went down, of those we give."""

    NONE = 0
    EXPIRED = 1
    NEIGHBOR_SAID_DOWN = 3
    ADMINISTRATIVE = 7


class MalformedError(ValueError):
    """A packet that RFC 5880 6.8.6 discards."""


class Packet(NamedTuple):
    """A control packet (RFC 5880 4.1). ``independent``: the C bit, of the control plane."""

    state: State
    diagnostic: int
    multiplier: int
    mine: int
    yours: int
    desired_tx: int
    required_rx: int
    required_echo: int = 0
    poll: bool = False
    final: bool = False
    independent: bool = False
    demand: bool = False

    def pack(self) -> bytes:
        """24 bytes."""
        flags = (
            (_POLL if self.poll else 0)
            | (_FINAL if self.final else 0)
            | (_INDEPENDENT if self.independent else 0)
            | (_DEMAND if self.demand else 0)
        )
        return _PACKET.pack(
            _VERSION << 5 | self.diagnostic,
            self.state << 6 | flags,
            self.multiplier,
            _PACKET.size,
            self.mine,
            self.yours,
            self.desired_tx,
            self.required_rx,
            self.required_echo,
        )


def parse(data: bytes) -> Packet:
    """A packet from the payload of UDP. Raises MalformedError."""
    if len(data) < _PACKET.size:
        raise MalformedError(f"{len(data)} bytes: a packet has {_PACKET.size}")
    first, flags, multiplier, length, mine, yours, tx, rx, echo = _PACKET.unpack_from(data)
    state = State(flags >> 6)
    if first >> 5 != _VERSION:
        raise MalformedError(f"version {first >> 5}, expected {_VERSION}")
    if not _PACKET.size <= length <= len(data):
        raise MalformedError(f"length {length} in a packet of {len(data)} bytes")
    if flags & _AUTHENTICATED:
        raise MalformedError("authenticated: not agreed on")
    if not multiplier:
        raise MalformedError("detection multiplier 0")
    if flags & _MULTIPOINT:
        raise MalformedError("multipoint bit")
    if not mine:
        raise MalformedError("my discriminator 0")
    if not yours and state > State.DOWN:
        raise MalformedError(f"your discriminator 0 in state {state.name}")
    return Packet(
        state, first & 31, multiplier, mine, yours, tx, rx, echo,
        bool(flags & _POLL), bool(flags & _FINAL), bool(flags & _INDEPENDENT),
        bool(flags & _DEMAND),
    )  # fmt: skip


class Settings(NamedTuple):
    """How one end of a session is set.

    ``interval``: between two packets, sent and expected, at least. ``multiplier``: how many may
    be lost. ``active``: calls; the other kind only answers, so that a peer without BFD never
    gets a packet.
    """

    interval: int
    multiplier: int
    active: bool


class Session:
    """One end of a session.

    ``receive`` takes in a packet, ``advance`` the time; ``due`` is when ``advance`` has
    something to do. ``failed`` says whether the last time it went from UP to DOWN was a failure:
    silence, or the peer's word; not the peer's administrator's.
    """

    __slots__ = (
        "_expires", "_heard", "_packed", "_packed_for", "_polling", "_remote_demand",
        "_remote_multiplier", "_remote_required_rx", "_remote_tx", "_send_at", "diagnostic",
        "discriminator", "due", "failed", "remote_discriminator", "remote_independent",
        "remote_state", "settings", "state",
    )  # fmt: skip

    def __init__(self, settings: Settings, discriminator: int, now: float) -> None:
        self.settings = settings
        self.discriminator = discriminator
        self.state = State.DOWN
        self.diagnostic = Diagnostic.NONE
        self.failed = False
        self.remote_state = State.DOWN
        self.remote_discriminator = 0
        self.remote_independent = False
        self._remote_demand = False
        self._remote_required_rx = 1
        self._remote_tx = 0
        self._remote_multiplier = 1
        self._polling = False
        self._packed = b""
        self._packed_for: tuple[object, ...] = ()
        self._heard = now if settings.active else -_NEVER
        self._expires = _NEVER
        self._send_at = now if settings.active else _NEVER
        self.due = self._send_at

    @property
    def detection(self) -> float:
        """Seconds of silence that end the session (RFC 5880 6.8.4)."""
        interval = max(self.settings.interval, self._remote_tx)
        return self._remote_multiplier * interval / 1e6

    def set(self, settings: Settings, now: float) -> None:
        """Other settings; the peer is told by a poll sequence, the session stays."""
        if settings != self.settings:
            self.settings = settings
            self._polling = self.state is State.UP
            self._plan(now)

    def receive(self, packet: Packet, now: float) -> bytes | None:
        """Take in a packet for this session (RFC 5880 6.8.6); returns an answer to a poll."""
        if self.state is State.ADMIN_DOWN:
            return None
        before = self._pace()
        self.remote_discriminator = packet.mine
        self.remote_state = packet.state
        self.remote_independent = packet.independent
        self._remote_demand = packet.demand
        self._remote_required_rx = packet.required_rx
        self._remote_tx = packet.desired_tx
        self._remote_multiplier = packet.multiplier
        if packet.final:
            self._polling = False
        self._heard = now
        if self._pace() != before:
            self._plan(now)
        self._transit(packet.state, now)
        self._expires = now + self.detection
        self.due = min(self._send_at, self._expires)
        return self._packet(final=True).pack() if packet.poll else None

    def receive_again(self, now: float) -> None:
        """Take in the packet that came last once more: both ends are up, and it polls nothing."""
        self._heard = now
        self._expires = now + self.detection
        self.due = min(self._send_at, self._expires)

    def advance(self, now: float, chance: float, early: float = 0.0) -> bytes | None:
        """What is due. Returns the packet to send, if it is time for one.

        ``chance``: 0 to 1, for jitter, so that many sessions don't fall into step. ``early``: a
        packet that is due within so many seconds may be sent now.
        """
        if now >= self._expires:
            self._expires = _NEVER
            self.remote_discriminator = 0
            if self.state in (State.INIT, State.UP):
                self._go(State.DOWN, Diagnostic.EXPIRED, now)
            self._plan(now)
        sent = None
        if now + early >= self._send_at:
            sent = self._next_packet()
            self._plan(now, chance)
        self.due = min(self._send_at, self._expires)
        return sent

    def delay(self, seconds: float) -> None:
        """We were not running for so long: what came meanwhile was not ours to hear."""
        self._expires += seconds
        self.due = min(self._send_at, self._expires)

    def end(self) -> bytes | None:
        """Close it by intention: the packet that tells the peer, if there is one."""
        known = self.remote_discriminator
        self._go(State.ADMIN_DOWN, Diagnostic.ADMINISTRATIVE, 0.0)
        self._expires = self._send_at = self.due = _NEVER
        return self._packet().pack() if known else None

    def snapshot(self) -> list[int]:
        """What ``resume`` needs."""
        return [
            self.discriminator, int(self.state), int(self.remote_state), self.remote_discriminator,
            int(self.remote_independent), self._remote_required_rx, self._remote_tx,
            self._remote_multiplier,
        ]  # fmt: skip

    def resume(self, snapshot: list[int], now: float) -> None:
        """Go on where another process stopped. Raises ValueError, also where that wasn't up.

        The peer doesn't notice if it was not for longer than its detection time.
        """
        discriminator, state, remote_state, remote, independent, rx, tx, multiplier = snapshot
        if State(state) is not State.UP or not discriminator or not remote or not multiplier:
            raise ValueError(f"nothing to go on with in {snapshot}")
        self.discriminator = discriminator
        self.state = State.UP
        self.remote_state = State(remote_state)
        self.remote_discriminator = remote
        self.remote_independent = bool(independent)
        self._remote_required_rx, self._remote_tx, self._remote_multiplier = rx, tx, multiplier
        self._heard = now
        self._expires = now + self.detection
        self._send_at = now
        self.due = now

    def _transit(self, remote: State, now: float) -> None:
        if remote is State.ADMIN_DOWN:
            if self.state is not State.DOWN:
                self._go(State.DOWN, Diagnostic.NEIGHBOR_SAID_DOWN, now, failed=False)
        elif self.state is State.DOWN:
            if remote is State.DOWN:
                self._go(State.INIT, Diagnostic.NONE, now)
            elif remote is State.INIT:
                self._go(State.UP, Diagnostic.NONE, now)
        elif self.state is State.INIT:
            if remote >= State.INIT:
                self._go(State.UP, Diagnostic.NONE, now)
        elif remote is State.DOWN:
            self._go(State.DOWN, Diagnostic.NEIGHBOR_SAID_DOWN, now)

    def _go(self, state: State, why: Diagnostic, now: float, *, failed: bool = True) -> None:
        if self.state is State.UP:
            self.failed = failed and state is State.DOWN
        self.state = state
        if state in (State.DOWN, State.ADMIN_DOWN):  # else why it ended last is still told
            self.diagnostic = why
        # from the slow interval to the agreed one, which the peer must confirm
        self._polling = state is State.UP
        self._send_at = now  # the news does not wait for the next turn

    def _desired_tx(self) -> int:
        if self.state is State.UP:
            return self.settings.interval
        return max(_SLOW, self.settings.interval)

    def _pace(self) -> tuple[bool, bool, int]:
        """What of the peer decides when to send."""
        return not self.remote_discriminator, self._remote_demand, self._remote_required_rx

    def _plan(self, now: float, chance: float = 1.0) -> None:
        """When to send next."""
        silenced = not self._remote_required_rx or (
            self._remote_demand and self.state is State.UP and self.remote_state is State.UP
        )
        # one that only answers goes on for a while: its peer should hear that it heard nothing
        idle = not self.remote_discriminator and now - self._heard > _IDLE_AFTER
        if (idle and not self.settings.active) or (silenced and not self._polling):
            self._send_at = _NEVER
        else:
            interval = max(self._desired_tx(), self._remote_required_rx)
            most = _JITTER_OF_ONE if self.settings.multiplier == 1 else _MOST_JITTER
            jitter = _LEAST_JITTER + (most - _LEAST_JITTER) * chance
            self._send_at = now + (_IDLE if idle else interval) * jitter / 1e6
        self.due = min(self._send_at, self._expires)

    def _next_packet(self) -> bytes:
        """The packet to send, which is the same again for as long as nothing changes."""
        says = (
            self.state, self.diagnostic, self.discriminator, self.remote_discriminator,
            self._polling, self.settings,
        )  # fmt: skip
        if says != self._packed_for:
            self._packed, self._packed_for = self._packet().pack(), says
        return self._packed

    def _packet(self, *, final: bool = False) -> Packet:
        return Packet(
            self.state,
            self.diagnostic,
            self.settings.multiplier,
            self.discriminator,
            self.remote_discriminator,
            self._desired_tx(),
            self.settings.interval,
            poll=self._polling and not final,
            final=final,
            independent=True,  # this process lives on while BGP and the agent restart
        )
