"""A BGP speaker that says whatever a test wants: RFC 4271 by hand, and everything it forbids."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterable

from api.net import V4, Net, parse_net
from kernel.netns import Namespace, inside

MARKER = b"\xff" * 16
OPEN, UPDATE, NOTIFICATION, KEEPALIVE = 1, 2, 3, 4
MED, _LOCAL_PREF = 4, 5
_ORIGIN, _AS_PATH, _NEXT_HOP = 1, 2, 3
_MP_REACH, _MP_UNREACH = 14, 15
_TRANSITIVE, _OPTIONAL = 0x40, 0x80
_V6_UNICAST = bytes((0, 2, 1))
_MOST = 4096


def message(kind: int, body: bytes = b"", length: int | None = None) -> bytes:
    """A whole message; ``length`` to lie about it."""
    return MARKER + struct.pack("!HB", 19 + len(body) if length is None else length, kind) + body


def attribute(code: int, value: bytes, flags: int = _TRANSITIVE) -> bytes:
    """A path attribute; a long one says so in its flags."""
    if len(value) > 255:
        return struct.pack("!BBH", flags | 0x10, code, len(value)) + value
    return struct.pack("!BBB", flags, code, len(value)) + value


def encoded(nets: Iterable[Net]) -> bytes:
    """Prefixes as in UPDATE."""
    return b"".join(bytes((net.length,)) + net.packed()[: (net.length + 7) // 8] for net in nets)


def number(code: int, value: int) -> bytes:
    """MED or LOCAL_PREF."""
    flags = _OPTIONAL if code == MED else _TRANSITIVE
    return attribute(code, value.to_bytes(4, "big"), flags)


def preference(value: int) -> bytes:
    """LOCAL_PREF, which eBGP must not carry."""
    return number(_LOCAL_PREF, value)


def update(
    announced: Iterable[Net] = (),
    withdrawn: Iterable[Net] = (),
    *,
    next_hop: str,
    path: tuple[int, ...],
    more: bytes = b"",
) -> bytes:
    """One UPDATE, which must not be longer than a message may be. IPv6 as RFC 4760 says."""
    gone, told = encoded(withdrawn), encoded(announced)
    hop = parse_net(next_hop)
    attributes = b""
    if told:
        segment = struct.pack("!BB", 2, len(path)) + b"".join(
            asn.to_bytes(4, "big") for asn in path
        )
        attributes = attribute(_ORIGIN, b"\0") + attribute(_AS_PATH, segment if path else b"")
        if hop.version == V4:
            attributes += attribute(_NEXT_HOP, hop.packed())
        else:
            reached = _V6_UNICAST + b"\x10" + hop.packed() + b"\0" + told
            attributes += attribute(_MP_REACH, reached, _OPTIONAL)
        attributes += more
    if hop.version != V4:
        if gone:
            attributes += attribute(_MP_UNREACH, _V6_UNICAST + gone, _OPTIONAL)
        gone = told = b""
    body = struct.pack("!H", len(gone)) + gone + struct.pack("!H", len(attributes)) + attributes
    made = message(UPDATE, body + told)
    assert len(made) <= _MOST
    return made


class RawPeer:
    """A session that it opens by calling; ``ended`` when the other side has hung up.

    It answers each KEEPALIVE by one, and counts them; ``silent``: it only counts.
    """

    def __init__(
        self, namespace: Namespace, own: str, target: str, asn: int, *, hold: int = 90
    ) -> None:
        self.own, self.asn = own, asn
        version = parse_net(own).version
        family = socket.AF_INET if version == V4 else socket.AF_INET6
        with inside(namespace.fd):
            self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.settimeout(10)
        try:
            self._socket.bind((own, 0))
            self._socket.connect((target, 179))
        except BaseException:
            self._socket.close()
            raise
        self.keepalives = 0
        self.silent = False
        self.notifications: list[tuple[int, int]] = []
        self.established = threading.Event()
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        unicast = bytes((1, 4, 0, 1 if version == V4 else 2, 0, 1))
        # route refresh (RFC 2918): without it BIRD ends the session when an import filter changes
        capabilities = unicast + bytes((2, 0)) + bytes((65, 4)) + asn.to_bytes(4, "big")
        parameters = bytes((2, len(capabilities))) + capabilities
        identifier = parse_net(own).packed()[-4:]
        head = struct.pack("!BHH", 4, asn, hold) + identifier + bytes((len(parameters),))
        self._socket.sendall(message(OPEN, head + parameters))
        self._socket.settimeout(None)
        self._thread.start()

    def send(self, data: bytes) -> None:
        """Say it, unless the other side has hung up."""
        with contextlib.suppress(OSError):
            self._socket.sendall(data)

    def tell(self, *nets: Net, withdrawn: Iterable[Net] = ()) -> None:
        """Announce prefixes, as many to a message as fit."""
        gone = list(withdrawn)
        most = 600 if parse_net(self.own).version == V4 else 200
        for start in range(0, max(len(nets), len(gone)), most):
            part = slice(start, start + most)
            self.send(update(nets[part], gone[part], next_hop=self.own, path=(self.asn,)))

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as reader:
            while head := reader.read(19):
                length, kind = struct.unpack("!HB", head[16:])
                body = reader.read(length - 19)
                if kind == OPEN:
                    self.send(message(KEEPALIVE))
                elif kind == KEEPALIVE:
                    self.keepalives += 1
                    if self.established.is_set() and not self.silent:
                        self.send(message(KEEPALIVE))
                    self.established.set()
                elif kind == NOTIFICATION:
                    self.notifications.append((body[0], body[1]))
        self.ended.set()
