"""The process that speaks BFD for this node: small, and never busy with anything else.

It outlives the agent and ExaBGP, so that neither's restart looks like the node's death; and what
it knows is in a file, so that its own restart doesn't either. The agent connects to
``<run_dir>/bfd.sock`` and says, in lines of JSON, which sessions there should be; it is told of
each what holds, then every change (times in seconds of the epoch; ``NEWS``: it has just failed)::

    agent → {"sessions": [[PEER, LOCAL, MULTIHOP, LEAST_TTL, INTERVAL, MULTIPLIER, ACTIVE], …]}
    agent → {"end": true}           close all sessions by intention, and end
    agent → {"end": false}          end; the next process goes on with them
          ← {"hello": VERSION, "problem": TEXT}
          ← [PEER, STATE, SINCE, INDEPENDENT, FAILED_AT, WHY, DETECTION_SECONDS, NEWS]

One agent at a time: a new one replaces the old. Where none comes for two minutes nobody would
act on what is found: the sessions are closed by intention, and the process ends.

Run as ``python -I -S -c "…main(RUN_DIR, VERSION)"``, with a little of the standard library alone:
it runs on every node, beside all else, so each module it doesn't import counts.
"""

# ruff: noqa: PTH105, PTH108, PTH110, PTH123 - pathlib would be 1 MB

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NamedTuple

from bird_glue.bfd import (
    MULTIHOP_PORT,
    SINGLE_HOP_PORT,
    TTL,
    TURNS,
    MalformedError,
    Session,
    Settings,
    State,
    parse,
)

_LEAST_WAIT, _MOST_WAIT = 0.02, 0.1  # seconds between two turns; what is due in one goes together
_LATE_SECONDS = 0.3  # a turn that comes so much later was not ours to choose
_ALONE_SECONDS = 120.0
_PORTS = range(49152, 65536)  # to speak from (RFC 5881 4)
_TURN_PACKETS = 500  # a flood may not keep a turn from its end
_BUFFER = 1 << 20
_CLASS = 0xC0  # CS6, as BGP: network control
_IP_RECVTTL = 12
_SO_ATTACH_FILTER = 26
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF
_IPV6_HOPLIMIT, _IPV6_RECVHOPLIMIT, _IPV6_TCLASS = 52, 51, 67
_ADMIN_DOWN_PACKETS = 3

Json = Any


class Link(NamedTuple):
    """What is wanted of one session."""

    peer: str
    local: str
    multihop: bool
    least_ttl: int
    settings: Settings


class Watched:
    """A session, and the socket it is sent from."""

    def __init__(self, link: Link, session: Session) -> None:
        self.link = link
        self.session = session
        self.since = time.time()
        self.failed_at = 0.0
        # the last packet and whether it was for the multihop port, where all is as it should be
        self.usual: tuple[bytes, bool] | None = None
        self._socket: socket.socket | None = None

    def send(self, data: bytes) -> None:
        """Send, as far as it can be: that the peer hears nothing is what BFD is for."""
        with contextlib.suppress(OSError):
            if self._socket is None:
                self._socket = _sender(self.link)
            try:
                self._socket.send(data)
            except ConnectionRefusedError:  # what came back for the one before
                self._socket.send(data)
            except OSError:
                self.close()  # its address may have gone, and come again

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None


def _sender(link: Link) -> socket.socket:
    family = socket.AF_INET6 if ":" in link.peer else socket.AF_INET
    sender = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, TTL)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _CLASS)
        else:
            sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, TTL)
            sender.setsockopt(socket.IPPROTO_IPV6, _IPV6_TCLASS, _CLASS)
        for _ in range(16):
            with contextlib.suppress(OSError):
                sender.bind((link.local, _PORTS[int(_chance() * len(_PORTS))]))
                break
        sender.connect((link.peer, MULTIHOP_PORT if link.multihop else SINGLE_HOP_PORT))
        if sender.getsockname()[1] not in _PORTS:
            raise OSError(f"{link.local}: no port to speak from")
    except BaseException:
        sender.close()
        raise
    return sender


def _chance() -> float:
    """From 0 to 1, without 1; the random module would be 0.3 MB."""
    return int.from_bytes(os.urandom(2), "big") / 65536


class Listener:
    """A port on which packets come in. Raises OSError."""

    def __init__(self, family: int, port: int) -> None:
        self.multihop = port == MULTIHOP_PORT
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            if family == socket.AF_INET:
                self._socket.setsockopt(socket.IPPROTO_IP, _IP_RECVTTL, 1)
            else:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVHOPLIMIT, 1)
            if not self.multihop:
                _drop_from_afar(self._socket)
            self._socket.bind(("", port))
        except OSError:
            self._socket.close()
            raise

    def receive(self) -> tuple[bytes, str, int] | None:
        """The next packet, who sent it, its TTL; None: no more, for now."""
        try:
            data, control, _, address = self._socket.recvmsg(256, 64)
        except BlockingIOError:
            return None
        except OSError as error:
            print(f"BFD: receiving: {error}", file=sys.stderr)
            return None
        ttl = 0
        for level, kind, value in control:
            if (level, kind) in (
                (socket.IPPROTO_IP, socket.IP_TTL),
                (socket.IPPROTO_IPV6, _IPV6_HOPLIMIT),
            ):
                ttl = int.from_bytes(value, sys.byteorder)
        return data, address[0], ttl

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def _drop_from_afar(listener: socket.socket) -> None:
    """Have the kernel drop what came over a router: a flood from afar costs us nothing.

    Four instructions of BPF (socket(7), SO_ATTACH_FILTER) about the packet's TTL or hop limit.
    """
    ttl = _NETWORK_HEADER + (8 if listener.family == socket.AF_INET else 7)
    load, equal, leave = 0x30, 0x15, 0x06
    program = array.array(
        "B",
        struct.pack("=HBBI", load, 0, 0, ttl)
        + struct.pack("=HBBI", equal, 0, 1, TTL)
        + struct.pack("=HBBI", leave, 0, 0, 0xFFFFFFFF)
        + struct.pack("=HBBI", leave, 0, 0, 0),
    )
    location, length = program.buffer_info()
    listener.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", length // 8, location)
    )


class Daemon:
    """All sessions of the node."""

    def __init__(self, run_dir: str, version: str) -> None:
        """Raises OSError."""
        self._state_file = f"{run_dir}/bfd.state"
        self._version = version
        self._watched: dict[str, Watched] = {}
        self._by_discriminator: dict[int, Watched] = {}
        self._listeners: list[Listener] = []
        self._problem = ""
        self._rest = b""
        self._client: socket.socket | None = None
        self._alone_since = time.monotonic()
        self._unsaved = False
        self._wait = _LEAST_WAIT
        self.ending: bool | None = None
        path = f"{run_dir}/bfd.sock"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._control.bind(path)
        self._control.listen(8)
        self._listen()
        self._restore()
        self._set_pace()

    def run(self) -> None:
        """Until told to end."""
        planned = time.monotonic()
        while self.ending is None:
            now = time.monotonic()
            if now - planned > _LATE_SECONDS:
                for watched in self._watched.values():
                    watched.session.delay(now - planned)
            ready = self._ready()
            self._receive(ready, now)
            due = self._advance(now)
            self._serve(ready, now)
            if self._unsaved:
                self._save()
            wait = min(_MOST_WAIT, max(self._wait, due - time.monotonic()))
            planned = time.monotonic() + wait
            time.sleep(wait)
        self._finish(tell=self.ending)

    # what comes in, what goes out

    def _listen(self) -> None:
        """Listen on all ports, or none: half of them would look like half of the peers' death."""
        try:
            for family in (socket.AF_INET, socket.AF_INET6):
                for port in (SINGLE_HOP_PORT, MULTIHOP_PORT):
                    try:
                        self._listeners.append(Listener(family, port))
                    except OSError as error:
                        if family == socket.AF_INET6 and not _has_ipv6():
                            continue
                        raise OSError(f"UDP port {port}: {error}") from error
        except OSError as error:
            for listener in self._listeners:
                listener.close()
            self._listeners.clear()
            self._problem = str(error)
        else:
            self._problem = ""

    def _ready(self) -> set[int]:
        """What there is something to read from."""
        poll = select.poll()
        for end in (self._control, self._client, *self._listeners):
            if end is not None:
                poll.register(end, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(0)}

    def _receive(self, ready: set[int], now: float) -> None:
        for listener in self._listeners:
            if listener.fileno() not in ready:
                continue
            for _ in range(_TURN_PACKETS):
                found = listener.receive()
                if found is None:
                    break
                self._take(*found, multihop=listener.multihop, now=now)

    def _take(self, data: bytes, source: str, ttl: int, *, multihop: bool, now: float) -> None:
        """A packet. What is not for one of our sessions is not even counted."""
        watched = self._watched.get(source)
        if watched is None or ttl < (watched.link.least_ttl if multihop else TTL):
            return
        session = watched.session
        if session.state is State.UP and watched.usual == (data, multihop):
            session.receive_again(now)
            return
        try:
            packet = parse(data)
        except MalformedError:
            return
        if packet.yours:
            if packet.yours != session.discriminator:
                return
        elif multihop and session.state is State.UP:
            return  # anybody could say so in the peer's name; silence will tell
        link = watched.link
        if multihop != link.multihop and not link.settings.active:
            if session.state is State.UP:
                return
            watched.link = link._replace(multihop=multihop)  # one that answers follows
            watched.close()
        before = session.state, session.detection
        answer = session.receive(packet, now)
        if answer is not None:
            watched.send(answer)
        steady = packet.state is State.UP and not (packet.poll or packet.final)
        watched.usual = (data, multihop) if steady else None
        if (session.state, session.detection) != before:
            self._changed(watched, before[0])

    def _advance(self, now: float) -> float:
        """Send what is due, see who fell silent; returns when there is more to do."""
        early = self._wait / 2
        until, least = now + early, float("inf")
        for watched in self._watched.values():
            session = watched.session
            if session.due <= until:
                before = session.state
                data = session.advance(now, _chance(), early)
                if data is not None:
                    watched.send(data)
                if session.state is not before:
                    self._changed(watched, before)
            if session.due < least:
                least = session.due
        return least

    def _changed(self, watched: Watched, before: State) -> None:
        session = watched.session
        if session.state is not before:
            watched.since = time.time()
        failed = before is State.UP and session.state is State.DOWN and session.failed
        if failed:
            watched.failed_at = watched.since
        self._unsaved = True
        self._tell(_report(watched, news=failed))

    # the agent

    def _serve(self, ready: set[int], now: float) -> None:
        if self._client is not None and self._client.fileno() in ready:
            self._hear(now)
        if self._control.fileno() in ready:
            self._accept(now)
        if self._client is None and now - self._alone_since > _ALONE_SECONDS:
            self.ending = True

    def _accept(self, now: float) -> None:
        try:
            client, _ = self._control.accept()
        except OSError:
            return
        self._drop(now)
        client.setblocking(False)
        self._client = client
        self._greet()
        for watched in self._watched.values():
            self._tell(_report(watched, news=False))

    def _greet(self) -> None:
        self._tell({"hello": self._version, "problem": self._problem})

    def _hear(self, now: float) -> None:
        assert self._client is not None
        try:
            data = self._client.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(now)
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                self._command(json.loads(line), now)
            except (ValueError, KeyError, TypeError, OSError) as error:
                print(f"BFD: {error} in {line[:200]!r}", file=sys.stderr)

    def _command(self, document: Json, now: float) -> None:
        if "end" in document:
            self.ending = bool(document["end"])
            return
        self._configure([_link(entry) for entry in document["sessions"]], now)
        if self._problem:
            self._listen()
            self._greet()

    def _drop(self, now: float) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None
        self._rest = b""
        self._alone_since = now

    def _tell(self, document: Json) -> None:
        if self._client is None:
            return
        line = json.dumps(document, separators=(",", ":")).encode() + b"\n"
        try:
            sent = self._client.send(line)
        except OSError:
            sent = 0
        if sent != len(line):  # it doesn't read, or is gone
            self._drop(time.monotonic())

    # what there is

    def _configure(self, links: list[Link], now: float) -> None:
        wanted = {link.peer: link for link in links}
        for peer in self._watched.keys() - wanted.keys():
            self._close(self._watched.pop(peer))
        for peer, link in wanted.items():
            watched = self._watched.get(peer)
            if watched is None:
                self._add(Watched(link, Session(link.settings, self._discriminator(), now)))
            elif watched.link != link:
                if not link.settings.active:  # it follows its peer
                    link = link._replace(multihop=watched.link.multihop)
                watched.link = link
                watched.session.set(link.settings, now)
                watched.usual = None
                watched.close()
        self._set_pace()
        self._unsaved = True

    def _set_pace(self) -> None:
        """So many turns to an interval that half of one is within the jitter."""
        least = min((w.link.settings.interval for w in self._watched.values()), default=0)
        self._wait = min(_MOST_WAIT, max(_LEAST_WAIT, least / 1e6 / TURNS))

    def _add(self, watched: Watched) -> None:
        self._watched[watched.link.peer] = watched
        self._by_discriminator[watched.session.discriminator] = watched
        self._tell(_report(watched, news=False))

    def _close(self, watched: Watched) -> None:
        data = watched.session.end()
        if data is not None:
            for _ in range(_ADMIN_DOWN_PACKETS):
                watched.send(data)
        watched.close()
        del self._by_discriminator[watched.session.discriminator]

    def _discriminator(self) -> int:
        while True:
            number = int.from_bytes(os.urandom(4), "big")
            if number and number not in self._by_discriminator:
                return number

    def _save(self) -> None:
        """Keep what a successor needs; without it, peers take its start for a failure."""
        self._unsaved = False
        found = [
            [list(watched.link[:4]) + list(watched.link.settings), watched.session.snapshot()]
            for watched in self._watched.values()
            if watched.session.state is State.UP
        ]
        new = f"{self._state_file}.new"
        with open(new, "w") as file:
            file.write(json.dumps(found))
        os.replace(new, self._state_file)

    def _restore(self) -> None:
        now = time.monotonic()
        try:
            with open(self._state_file) as file:
                known = json.load(file)
            for entry, snapshot in known:
                link = _link(entry)
                session = Session(link.settings, 1, now)
                session.resume(snapshot, now)
                self._add(Watched(link, session))
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError, OSError) as error:
            print(f"BFD: {self._state_file}: {error}; starting anew", file=sys.stderr)

    def _finish(self, *, tell: bool) -> None:
        if tell:
            for watched in list(self._watched.values()):
                self._close(watched)
            self._watched.clear()
        self._save()
        self._drop(0.0)
        self._control.close()
        for listener in self._listeners:
            listener.close()


def _link(entry: Json) -> Link:
    peer, local, multihop, least_ttl, interval, multiplier, active = entry
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    for address in (peer, local):
        socket.inet_pton(family, address)
    settings = Settings(int(interval), int(multiplier), bool(active))
    return Link(peer, local, bool(multihop), int(least_ttl), settings)


def _report(watched: Watched, *, news: bool) -> Json:
    session = watched.session
    return [
        watched.link.peer, int(session.state), watched.since, session.remote_independent,
        watched.failed_at, int(session.diagnostic), session.detection, news,
    ]  # fmt: skip


def _has_ipv6() -> bool:
    return os.path.exists("/proc/sys/net/ipv6")


def _hurry() -> None:
    """Come before everything else: who waits behind a build job looks dead to all peers."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)


def main(run_dir: str, version: str) -> None:
    """Run, if no other one does with this directory."""
    os.umask(0o177)
    lock = open(f"{run_dir}/bfd.pid", "a")  # noqa: SIM115 - held for as long as we live
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    lock.truncate(0)
    print(os.getpid(), file=lock, flush=True)
    daemon = Daemon(run_dir, version)

    def end(*_: object) -> None:
        daemon.ending = False

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _hurry()
    gc.collect()
    gc.freeze()
    gc.disable()  # nothing here is circular
    daemon.run()
