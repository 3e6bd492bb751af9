"""A BGP speaker that says whatever a test wants: RFC 4271 by hand, and everything it forbids."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterable

from api.net import Net, parse_net
from kernel.netns import Namespace, inside

MARKER = b"\xff" * 16
OPEN, UPDATE, NOTIFICATION, KEEPALIVE = 1, 2, 3, 4
_ORIGIN, _AS_PATH, _NEXT_HOP = 1, 2, 3
_TRANSITIVE = 0x40
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
    return b"".join(
        bytes((net.length,)) + net.address.to_bytes(4, "big")[: (net.length + 7) // 8]
        for net in nets
    )


def update(
    announced: Iterable[Net] = (),
    withdrawn: Iterable[Net] = (),
    *,
    next_hop: str,
    path: tuple[int, ...],
    more: bytes = b"",
) -> bytes:
    """One UPDATE, which must not be longer than a message may be."""
    gone, told = encoded(withdrawn), encoded(announced)
    attributes = b""
    if told:
        segment = struct.pack("!BB", 2, len(path)) + b"".join(
            asn.to_bytes(4, "big") for asn in path
        )
        hop = parse_net(next_hop).address.to_bytes(4, "big")
        attributes = attribute(_ORIGIN, b"\0") + attribute(_AS_PATH, segment if path else b"")
        attributes += attribute(_NEXT_HOP, hop) + more
    body = struct.pack("!H", len(gone)) + gone + struct.pack("!H", len(attributes)) + attributes
    made = message(UPDATE, body + told)
    assert len(made) <= _MOST
    return made


class RawPeer:
    """A session that it opens by calling; ``ended`` when the other side has hung up."""

    def __init__(
        self, namespace: Namespace, own: str, target: str, asn: int, *, hold: int = 90
    ) -> None:
        self.own, self.asn = own, asn
        with inside(namespace.fd):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.settimeout(10)
        self._socket.bind((own, 0))
        self._socket.connect((target, 179))
        self.notifications: list[tuple[int, int]] = []
        self.established = threading.Event()
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        capabilities = bytes((1, 4, 0, 1, 0, 1)) + bytes((65, 4)) + asn.to_bytes(4, "big")
        parameters = bytes((2, len(capabilities))) + capabilities
        identifier = parse_net(own).address.to_bytes(4, "big")
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
        for start in range(0, max(len(nets), len(gone)), 600):
            part = slice(start, start + 600)
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
                    if self.established.is_set():
                        self.send(message(KEEPALIVE))
                    self.established.set()
                elif kind == NOTIFICATION:
                    self.notifications.append((body[0], body[1]))
        self.ended.set()
