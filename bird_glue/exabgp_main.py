"""Runs as ``python -P exabgp_main.py FD CONFIGURATION``: ExaBGP, once it has said who it is.

The process writes its own id to the locked file before anything else, so that whoever finds
the lock taken also finds by whom, wherever the program that started it was killed.

What it has no settings for is mended here. After a peer's outage it would wait up to 60 s before
it calls again. It checks the TTL of packets (RFC 5082) only on connections that it made.

Its listening sockets answer with the system's TTL, which a peer with TTL security drops: they get
255, which hurts nobody. Its calls to such a peer ignore a refusal, because it comes with the
system's TTL, and are repeated after 1, 2, 4 … 64 seconds: they give up after three, and ExaBGP
begins another one.

It doesn't load new settings while routes wait for a session that is being set up, and doesn't
use them on one that waits for a word of the peer, which may be for want of these very settings.

And a message whose header is wrong it would end with an exception of its own instead of the
NOTIFICATION that says so: the function that tells us of it can't be called as it calls it.

To make objects of thousands of prefixes, and JSON of these, takes it longer than all that the agent
has to do about them. So an UPDATE of a form that needs no judgement (``wire.plain``) is handed
over as it came, in JSON that differs from its own in this: attributes and prefixes are hexadecimal
text, the bytes of RFC 4271 4.3, where they would be objects and lists.

Each session had a turn in every round of its loop, and each peer a whole copy of every route: with
hundreds of peers that was most of what it computed while nothing happened, and memory.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bird_glue.wire import Plain

# a large UPDATE makes more objects than the default lets be before it looks for garbage
_GC = 20_000, 20, 50
_IDLE_TURNS = 2  # in the first it may end what it had begun
LONGEST_PAUSE = 4  # seconds between two calls
_TTL = 255
_CALLS_AGAIN = 1  # SYNs after the first
_IP_MINTTL, _IPV6_MINHOPCOUNT = 21, 73  # ip(7), ipv6(7)
# what a socket with nothing to protect any more sends with, and what it takes: for IPv4 and IPv6
_TTL_OPTIONS = (
    ((socket.IPPROTO_IP, socket.IP_TTL, _TTL), (socket.IPPROTO_IP, _IP_MINTTL, 0)),
    (
        (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, _TTL),
        (socket.IPPROTO_IPV6, _IPV6_MINHOPCOUNT, 0),
    ),
)


def secure_by_ttl() -> None:
    """Have this process's ExaBGP listen and call as TTL security needs it."""
    from exabgp.reactor import listener
    from exabgp.reactor.network import outgoing

    listen, call = listener.set_listener_options, outgoing.asynchronous

    def set_listener_options(listening: socket.socket, ipv6: bool) -> None:
        listen(listening, ipv6)
        if ipv6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, _TTL)
        else:
            listening.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, _TTL)

    def asynchronous(calling: socket.socket, peer: Any) -> None:
        calling.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, _CALLS_AGAIN)
        call(calling, peer)

    listener.set_listener_options = set_listener_options
    outgoing.asynchronous = asynchronous


def mend_notification() -> None:
    """Have a wrong header answered by a NOTIFICATION, which we hear of when it is sent."""
    from exabgp.reactor.api.processes import Processes

    def notification(*_: object) -> None:
        """What tells of the error itself, and fails."""

    Processes.notification = notification


def call_again_soon() -> None:
    """Bound the pauses between ExaBGP's attempts to connect, which it has no setting for."""
    from exabgp.reactor.delay import Delay

    increase = Delay.increase

    def bounded(delay: Delay) -> None:
        increase(delay)
        delay._next = min(delay._next, LONGEST_PAUSE)

    Delay.increase = bounded


def load_at_once() -> None:
    """Have a new configuration loaded whatever waits for peers that are not there.

    ExaBGP doesn't load one while routes wait to be sent, on any session. Those of a session that
    is being set up wait until it is up or given up: for minutes with a peer that doesn't answer,
    be it because only new settings will let it. They are kept, and sent when a session is up.
    """
    from exabgp.reactor.loop import Reactor

    def pending(reactor: Reactor) -> bool:
        peers = reactor._peers
        return any(
            peers[key].neighbor.rib.outgoing.pending() for key in reactor.established_peers()
        )

    Reactor._pending_adjribout = pending


def change_at_once() -> None:
    """Have new settings of a session count while it is being set up, too.

    ExaBGP looks for them where it calls and where a session is up, but not between: where an OPEN
    or the first KEEPALIVE of the peer is missing it goes on with the old settings, for up to 60 s
    or the hold time, and connections that come meanwhile get the old ones as well. That is where
    new settings are needed most: with TTL security on one end only, one doesn't hear the other.

    So that the peer hears of the end, too, the socket may send to it and hear it from then on:
    otherwise it would keep the connection, and refuse others, until its own hold timer expires.
    """
    from exabgp.bgp.fsm import FSM
    from exabgp.protocol.family import AFI
    from exabgp.reactor.peer import Peer

    reestablish = Peer.reestablish

    def at_once(peer: Peer, neighbor: Any = None) -> None:
        reestablish(peer, neighbor)
        if peer.fsm != FSM.ESTABLISHED:
            connection = peer.proto.connection if peer.proto else None
            if connection is not None and connection.fd() != -1:
                for option in _TTL_OPTIONS[connection.afi == AFI.ipv6]:
                    connection.io.setsockopt(*option)
            peer._reset("its settings changed")
            peer._delay.reset()

    Peer.reestablish = at_once


def check_callers() -> None:
    """Have the kernel drop packets of a peer that called, too, when they come from afar."""
    from exabgp.reactor import listener

    set_sending_ttl = listener.set_accepted_ttl

    def bounded(connection: Any, neighbor: Any) -> None:
        set_sending_ttl(connection, neighbor)
        if neighbor["incoming-ttl"] and connection.io is not None:
            listener.set_minimum_ttl(
                connection.io, connection.afi, connection.peer, neighbor["incoming-ttl"]
            )

    listener.set_accepted_ttl = bounded


def hand_over_what_is_plain() -> None:
    """Have UPDATEs told as they came, where their form leaves nothing to decide."""
    from exabgp.bgp.message.direction import Direction
    from exabgp.bgp.message.update import Update
    from exabgp.bgp.message.update.attribute import Attributes
    from exabgp.protocol.family import AFI, SAFI
    from exabgp.reactor.api.response.json import JSON

    from bird_glue.wire import NotPlainError, plain

    decode, describe, nothing = Update.unpack_message, JSON._update, Attributes()
    unicast = ((AFI.ipv4, SAFI.unicast), (AFI.ipv6, SAFI.unicast))

    class Packed(Update):  # type: ignore[misc]
        """An UPDATE of which ExaBGP knows nothing but how to tell it."""

        def __init__(self, text: str) -> None:
            super().__init__([], nothing)
            self.text = text

    def unpack_message(_: type, data: bytes, direction: Direction, negotiated: Any) -> Any:
        identified = any(negotiated.addpath.receive(*family) for family in unicast)
        if direction == Direction.IN and negotiated.asn4 and not identified:
            with contextlib.suppress(NotPlainError):
                extended = bool(negotiated.nexthop)
                return Packed(packed_json(plain(data, negotiated.families, extended=extended)))
        return decode(data, direction, negotiated)

    def _update(encoder: JSON, update: Update) -> dict[str, str]:
        if isinstance(update, Packed):
            return {"message": encoder._json(update.text)}
        told: dict[str, str] = describe(encoder, update)
        return told

    Update.unpack_message = classmethod(unpack_message)
    JSON._update = _update


def let_idle_sessions_rest() -> None:
    """Have a session that has nothing to do left alone until it has.

    In every round ExaBGP gives each session a turn, which asks its socket, its timers and its
    queues; with 200 that takes it more than all that peers say. One that is established, and had
    nothing to do in two turns, gets the next when something has come in, is to go out, or is due.
    Whether that is so is looked at after each command, and every second, when timers are due.
    """
    from exabgp.bgp.fsm import FSM
    from exabgp.reactor import peer as sessions
    from exabgp.reactor.api import API
    from exabgp.reactor.loop import Reactor

    run, process, wait = sessions.Peer.run, API.process, Reactor._wait_for_io

    class Keepalives(sessions.KA):  # type: ignore[misc]
        """Those of a session, which knows them by this; ``going``: one is being sent."""

        def __init__(self, session: Any, proto: Any) -> None:
            super().__init__(session, proto)
            self.going = False
            proto.peer.keepalives = self

        def __call__(self) -> Any:
            self.going = super().__call__()
            return self.going

    def take_turn(peer: Any) -> Any:
        action = run(peer)
        later = action == sessions.ACTION.LATER and peer.fsm == FSM.ESTABLISHED
        peer.idle = peer.idle + 1 if later and not peer.keepalives.going else 0
        if peer.idle:
            peer.descriptor = peer.socket()
            peer.due = due(peer.recv_timer, peer.keepalives.send_timer)
        return action

    def rests(peer: Any, now: float, woken: set[int]) -> bool:
        if peer.idle < _IDLE_TURNS or peer.due <= now or peer.descriptor in woken or peer._teardown:
            return False
        told = peer.neighbor
        return not (told.eor or told.refresh or told.messages or told.rib.outgoing.pending())

    def active_peers(reactor: Reactor) -> set[str]:
        now, peers = time.time(), reactor._peers
        if int(now) == reactor.looked:
            called = {reactor.asleep[fd] for fd in reactor.woken if fd in reactor.asleep}
            candidates = (reactor.awake | called) & peers.keys()
        else:
            candidates = peers.keys()
        # what is scheduled is run after the turns, and may change any session
        reactor.looked = int(now) if reactor.asynchronous.ready() else 0
        reactor.awake = set()
        for key in candidates:
            if rests(peers[key], now, reactor.woken) and not reactor.processes._broken:
                reactor.asleep[peers[key].descriptor] = key
            else:
                reactor.awake.add(key)
        return {
            key
            for key in reactor.awake
            if (peer := peers[key]).proto or peer.stopping() or not peer.neighbor["passive"]
        }

    def process_command(api: API, reactor: Reactor, service: str, command: str) -> Any:
        reactor.looked = 0
        return process(api, reactor, service, command)

    def wait_for_io(reactor: Reactor, milliseconds: int) -> Iterator[int]:
        reactor.woken = set()
        for descriptor in wait(reactor, milliseconds):
            reactor.woken.add(descriptor)
            yield descriptor

    sessions.KA = Keepalives
    sessions.Peer.idle, Reactor.looked = 0, 0
    Reactor.asleep, Reactor.woken = {}, set()
    sessions.Peer.run = take_turn
    API.process = process_command
    Reactor.active_peers = active_peers
    Reactor._wait_for_io = wait_for_io


def copy_less() -> None:
    """Have each peer's copy of a route share what nobody changes with those of the others.

    ExaBGP copies all that a route consists of, for each peer that is told, before it puts our
    address in place of ``next-hop self``: 200 peers that know five routes are 1.3 MB of copies.
    """
    from exabgp.bgp.message.update.attribute import Attribute, NextHop
    from exabgp.bgp.neighbor import Neighbor
    from exabgp.rib.change import Change

    def remove_self(neighbor: Neighbor, told: Change) -> Change:
        nlri, attributes = copy.copy(told.nlri), told.attributes
        if nlri.nexthop.SELF:
            nlri.nexthop = own = neighbor.ip_self(nlri.afi)
            if Attribute.CODE.NEXT_HOP in attributes:
                attributes = copy.copy(attributes)
                attributes[Attribute.CODE.NEXT_HOP] = NextHop(str(own), own.pack())
        return Change(nlri, attributes)

    Neighbor.remove_self = remove_self


def due(heard: Any, sent: Any) -> float:
    """When a session's ReceiveTimer or SendTimer has something to do, seconds of the epoch."""
    expires = heard.last_read + heard.holdtime + 1 if heard.holdtime else float("inf")
    return min(expires, sent.last_sent + sent.keepalive if sent.keepalive else float("inf"))


def packed_json(found: Plain) -> str:
    """A plain UPDATE as ExaBGP would tell it, with its bytes for attributes and prefixes."""
    parts = [f'"attribute": "{found.attributes.hex()}"']
    if found.announced:
        inet = socket.AF_INET if len(found.next_hop) == 4 else socket.AF_INET6
        hop = socket.inet_ntop(inet, found.next_hop)
        by_hop = f'{{ "{hop}": "{found.announced.hex()}" }}'
        parts.append(f'"announce": {{ "ipv{found.version} unicast": {by_hop} }}')
    if found.withdrawn:
        gone = (f'"ipv{version} unicast": "{n.hex()}"' for version, n in found.withdrawn.items())
        parts.append(f'"withdraw": {{ {", ".join(gone)} }}')
    return f'{{ "update": {{ {", ".join(parts)} }} }}'


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    _, descriptor, configuration = sys.argv
    os.write(int(descriptor), f"{os.getpid()}\n".encode())
    sys.modules["ssl"] = None  # type: ignore[assignment] # 4 MB that asyncio can do without
    call_again_soon()
    load_at_once()
    change_at_once()
    check_callers()
    secure_by_ttl()
    mend_notification()
    hand_over_what_is_plain()
    let_idle_sessions_rest()
    copy_less()
    gc.freeze()  # what was imported is here to stay
    gc.set_threshold(*_GC)
    sys.argv = ["exabgp", "server", configuration]
    runpy.run_module("exabgp", run_name="__main__", alter_sys=True)
