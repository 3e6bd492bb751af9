"""How ``lab.client`` and ``lab.keeper`` talk: requests and replies over a Unix socket.

The keeper listens on the abstract address ``@manx-lab/NAME``, which leaves no file behind.
A message is its length (4 bytes, network order) and a JSON object; file descriptors travel
with its first byte. One request, one reply, on one connection.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JSON = dict[str, Any]

_PREFIX = "manx-lab/"
_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid; unix(7)
_MAX_LENGTH = 64 << 20
_MAX_FDS = 8


def address(lab: str) -> str:
    """The socket address of a lab."""
    return f"\0{_PREFIX}{lab}"


def running_labs() -> list[str]:
    """Names of the labs that run on this machine, from /proc/net/unix."""
    names = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, path = line.partition(f" @{_PREFIX}")
        if path:
            names.add(path)
    return sorted(names)


def peer_is_trusted(connection: socket.socket) -> bool:
    """Whether root or the own user is at the other end: names of sockets are free for all."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return uid in (0, os.geteuid())


def send(connection: socket.socket, message: JSON, fds: Sequence[int] = ()) -> None:
    """Send one message. Raises OSError."""
    body = json.dumps(message).encode()
    header = _LENGTH.pack(len(body))
    if fds:
        socket.send_fds(connection, [header], list(fds))
    else:
        connection.sendall(header)
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[JSON, list[int]]:
    """The next message and the descriptors with it.

    Raises EOFError at the end, OSError (TimeoutError), ValueError for what is no message.
    """
    header, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    try:
        if not header:
            raise EOFError("the other end has closed")
        header += _exactly(connection, _LENGTH.size - len(header))
        (length,) = _LENGTH.unpack(header)
        if length > _MAX_LENGTH:
            raise ValueError(f"message of {length} bytes")
        message = json.loads(_exactly(connection, length))
        if not isinstance(message, dict):
            raise ValueError(f"message {message!r}: expected an object")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError("the other end has closed in the middle of a message")
        data += part
    return bytes(data)
