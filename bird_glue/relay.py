"""The child that ExaBGP talks to: keeps what it said, for whoever connects to a socket.

ExaBGP writes events to its child's stdin and stops, all sessions with it, when nobody reads
them; it also ends the sessions of a child that dies. So the child is this small program,
which does nothing but read and remember, and the agent, which may be restarted at any time,
connects to it::

    exabgp ──stdin/stdout── relay ──Unix socket── agent

Towards the agent it speaks lines: first ``{"relay": "hello", …}``, then all that holds at
this moment as ExaBGP would have told it (per peer its OPEN, its last error and state, its
routes, the end-of-RIB markers), then ``{"relay": "live"}``, then every line of ExaBGP as it
comes. What the agent writes goes to ExaBGP unchanged, whole lines only. One client at a
time: a new one replaces the old. A client that doesn't read is dropped; what it missed it
gets when it connects again.

That a message was sent is not news: a route goes to hundreds of peers one after the other, and
a client that is woken for each takes from ExaBGP the time to send. Such lines wait a little for
more, or for news.

It is run by ``relay_main`` and needs nothing but a little of the standard library: it runs on every
node, beside all else, so each module it doesn't import counts.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import select
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Json = dict[str, Any]

MAX_BACKLOG = 64 << 20  # bytes a client may leave unread
# Beyond it no more of a peer's routes are remembered until its session ends: what there is is
# more than any agent takes, so the next one ends the session.
MAX_ROUTES = 250_000
_CHUNK = 1 << 16
_PIPE = 1 << 20
_NLRI_PER_LINE = 500
# digits that a prefix has, by its first two, which are its length in bits
_DIGITS = {f"{bits:02x}": 2 + (bits + 7) // 8 * 2 for bits in range(129)}
_PATIENCE = 0.01  # seconds that what was sent is kept back
# quotes in what a peer said are escaped, so nothing but ExaBGP's own field looks like this
_UPDATE, _SENT = b'"type": "update"', b'"direction": "send"'


Route = tuple[str, tuple[str, ...]]  # attributes as JSON, next hops


class Peer:
    """What holds of one peer: its last words, and its routes by family and prefix.

    Prefixes are as in an UPDATE (RFC 4271 4.3), in hexadecimal digits.
    """

    def __init__(self) -> None:
        self.lines: dict[str, bytes] = {}  # the last line of a type
        self.routes: dict[str, dict[str, Route]] = {}
        self.ends: dict[str, bytes] = {}  # end-of-RIB by family

    def forget_routes(self) -> None:
        """A session began or ended."""
        self.routes.clear()
        self.ends.clear()


class Memory:
    """What ExaBGP has said and been told, reduced to what holds now."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.announced: dict[str, set[str]] = {}
        self.commands: collections.deque[list[str]] = collections.deque()
        self._parent = os.getppid()

    def command(self, line: bytes) -> None:
        """The agent's command; it counts once ExaBGP has answered ``done``."""
        self.commands.append(line.decode("ascii", "replace").split())

    def said(self, line: bytes) -> None:
        """A line of ExaBGP. One that can't be understood is not remembered."""
        if line in (b"done", b"error"):
            words = self.commands.popleft() if self.commands else []
            if line == b"done":
                self._commanded(words)
        elif line.startswith(b"{") and not _is_echo(line):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError):
                self._event(line)

    def _commanded(self, words: list[str]) -> None:
        # neighbor PEER , neighbor PEER … announce|withdraw attributes … nlri PREFIX …
        peers: list[str] = []
        while words[:1] in (["neighbor"], [","]):
            if words[0] == "neighbor" and len(words) > 1:
                peers.append(words[1])
            words = words[2 if words[0] == "neighbor" else 1 :]
        if not words or "nlri" not in words:
            return
        nets = words[words.index("nlri") + 1 :]
        for peer in self.peers if peers == ["*"] else peers:
            known = self.announced.setdefault(peer, set())
            if words[0] == "announce":
                known.update(nets)
            elif words[0] == "withdraw":
                known.difference_update(nets)

    def _event(self, line: bytes) -> None:
        document = json.loads(line)
        neighbor = document["neighbor"]
        address = neighbor["address"]["peer"]
        peer = self.peers.setdefault(address, Peer())
        kind = document["type"]
        if kind == "state" and "[removed]" in neighbor.get("reason", ""):
            # not configured any more: ExaBGP itself remembers nothing
            del self.peers[address]
            self.announced.pop(address, None)
        elif kind == "state":
            _state(peer, neighbor["state"], line)
        elif kind == "notification" or (kind == "open" and neighbor["direction"] == "receive"):
            peer.lines[kind] = line
        elif kind == "update":
            _update(peer, neighbor["message"], line)

    def snapshot(self) -> Iterator[bytes]:
        """All that holds, as lines."""
        yield _json(
            {
                "relay": "hello",
                "pid": self._parent,
                "unanswered": len(self.commands),
                "announced": {peer: sorted(nets) for peer, nets in self.announced.items() if nets},
            }
        )
        for address, peer in self.peers.items():
            for kind in ("open", "notification", "state"):
                if kind in peer.lines:
                    yield peer.lines[kind]
            yield from _routes(address, peer)
            yield from peer.ends.values()
        yield _json({"relay": "live"})


def _is_echo(line: bytes) -> bool:
    """Whether a line tells of an UPDATE that was sent."""
    return _UPDATE in line and _SENT in line


def _state(peer: Peer, state: str, line: bytes) -> None:
    peer.lines["state"] = line
    if state == "up":
        peer.forget_routes()
        peer.lines.pop("notification", None)
    elif state == "connected":
        peer.lines.pop("open", None)
    elif state == "down":
        peer.forget_routes()


def _update(peer: Peer, message: Json, line: bytes) -> None:
    if "eor" in message:
        peer.ends[f"{message['eor']['afi']} {message['eor']['safi']}"] = line
        return
    if sum(map(len, peer.routes.values())) > MAX_ROUTES:
        return
    update = message["update"]
    attributes = sys.intern(json.dumps(update.get("attribute", {})))
    for family, entries in update.get("withdraw", {}).items():
        known = peer.routes.get(family, {})
        for prefix in _prefixes(entries):
            known.pop(prefix, None)
    for family, by_next_hop in update.get("announce", {}).items():
        announced: dict[str, Route] = {}
        for next_hop, entries in by_next_hop.items():
            route = attributes, (next_hop,)
            for prefix in _prefixes(entries):
                if prefix in announced:
                    announced[prefix] = attributes, (*announced[prefix][1], next_hop)
                else:
                    announced[prefix] = route
        peer.routes.setdefault(family, {}).update(announced)


def _prefixes(entries: str | list[Json]) -> Iterator[str]:
    """The prefixes, which are given as they came, or as ExaBGP spells them."""
    if not isinstance(entries, str):
        yield from (_packed(entry["nlri"]) for entry in entries)
        return
    start = 0
    while start < len(entries):
        stop = start + _DIGITS[entries[start : start + 2]]
        yield entries[start:stop]
        start = stop


def _packed(text: str) -> str:
    address, _, length = text.partition("/")
    packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    bits = int(length)
    shift = 8 * len(packed) - bits
    value = int.from_bytes(packed, "big") >> shift << shift
    return (bytes((bits,)) + value.to_bytes(len(packed), "big")).hex()[: 2 + (bits + 7) // 8 * 2]


def _routes(address: str, peer: Peer) -> Iterator[bytes]:
    """The peer's routes as UPDATE events: those with equal attributes and next hops together.

    Both next hops of an IPv6 route stay in one event: of two, the second would replace the first.
    """
    groups: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for family, routes in peer.routes.items():
        for prefix, (attributes, next_hops) in routes.items():
            groups.setdefault((family, attributes, next_hops), []).append(prefix)
    for (family, attributes, ways), prefixes in groups.items():
        for start in range(0, len(prefixes), _NLRI_PER_LINE):
            packed = "".join(prefixes[start : start + _NLRI_PER_LINE])
            update = {
                "attribute": json.loads(attributes),
                "announce": {family: dict.fromkeys(ways, packed)},
            }
            neighbor = {
                "address": {"peer": address},
                "direction": "receive",
                "message": {"update": update},
            }
            yield _json({"type": "update", "time": 0, "neighbor": neighbor})


def _json(document: Json) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


class Relay:
    """The loop: three streams, none of which may make another one wait."""

    def __init__(self, path: str) -> None:
        self._memory = Memory()
        self._from_exabgp = b""
        self._to_exabgp = bytearray()
        self._from_client = b""
        self._to_client = bytearray()
        self._allowed = 0  # bytes the client may leave unread
        self._not_before = 0.0  # all there is for the client may wait until then
        self._client: socket.socket | None = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 - see above
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.umask(0o177)
        self._listener.bind(path)
        self._listener.listen(8)
        self._listener.setblocking(False)
        with contextlib.suppress(OSError):  # a courtesy the kernel may refuse
            fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, _PIPE)
        os.set_blocking(0, False)
        os.set_blocking(1, False)

    def run(self) -> None:
        """Until ExaBGP is gone."""
        while True:
            ready = self._wait()
            if 0 in ready and not self._read_exabgp():
                return
            if self._listener.fileno() in ready:
                self._accept()
            if self._client is not None and self._client.fileno() in ready:
                self._read_client()
            self._write_client()
            self._write_exabgp()

    def _wait(self) -> set[int]:
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(self._listener, select.POLLIN)
        patience = self._patience()
        if self._to_exabgp:
            poll.register(1, select.POLLOUT)
        if self._client is not None:
            wanted = select.POLLIN | (select.POLLOUT if self._to_client and not patience else 0)
            poll.register(self._client, wanted)
        return {fd for fd, _ in poll.poll(1000 * patience if patience else None)}

    def _patience(self) -> float:
        """Seconds for which the client may go without what there is for it."""
        return max(0.0, self._not_before - time.monotonic())

    def _read_exabgp(self) -> bool:
        try:
            data = os.read(0, _PIPE)
        except BlockingIOError:
            return True
        *lines, self._from_exabgp = (self._from_exabgp + data).split(b"\n")
        for line in lines:
            line = line.strip()
            self._memory.said(line)
            if self._client is not None and line:
                if not _is_echo(line):
                    self._not_before = 0.0
                elif not self._to_client:
                    self._not_before = time.monotonic() + _PATIENCE
                self._to_client += line + b"\n"
        return bool(data)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        self._drop_client()
        client.setblocking(False)
        self._client = client
        self._not_before = 0.0
        for line in self._memory.snapshot():
            self._to_client += line + b"\n"
        self._allowed = MAX_BACKLOG + len(self._to_client)

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None
        self._from_client = b""
        self._to_client.clear()

    def _read_client(self) -> None:
        assert self._client is not None
        try:
            data = self._client.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop_client()
            return
        *lines, self._from_client = (self._from_client + data).split(b"\n")
        for line in lines:
            if line and line.isascii():  # ExaBGP gives up a child that writes anything else
                self._memory.command(line)
                self._to_exabgp += line + b"\n"

    def _write_client(self) -> None:
        if self._client is None or not self._to_client or self._patience():
            return
        try:
            sent = self._client.send(self._to_client[:_PIPE])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop_client()
            return
        del self._to_client[:sent]
        if len(self._to_client) > self._allowed:
            self._drop_client()

    def _write_exabgp(self) -> None:
        while self._to_exabgp:
            try:
                sent = os.write(1, self._to_exabgp[:_CHUNK])
            except BlockingIOError:
                return
            except BrokenPipeError:  # stdin is at its end too, or will be
                self._to_exabgp.clear()
                return
            del self._to_exabgp[:sent]


# Agents of version 0.1.0 run it so; one that has not been started anew since the files were
# replaced would have an ExaBGP without a relay.
if __name__ == "__main__":
    Relay(sys.argv[1]).run()
