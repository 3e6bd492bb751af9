"""The daemon's end of the conversation with the client; ``client/manx.c`` describes the bytes."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from dataclasses import dataclass

MAGIC = b"MNX1"
LIMIT = 1 << 20  # bytes of environment, configuration and answer
REQUEST_SECONDS = 10.0  # the client has everything at hand before it connects

_HEADER = struct.Struct(">4sII")
_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid; socket(7) SO_PEERCRED
_CHUNK = 1 << 16
_RIGHTS = 4  # descriptors to take at most; any but the first are closed


class ProtocolError(Exception):
    """What arrived is not a request."""


@dataclass(slots=True)
class Request:
    """``netns_fd`` is the container's namespace, or -1; ``close`` lets go of it."""

    environment: dict[str, str]
    configuration: bytes
    netns_fd: int

    def close(self) -> None:
        """Close the namespace's descriptor. May be called again."""
        if self.netns_fd >= 0:
            os.close(self.netns_fd)
            self.netns_fd = -1


def peer_uid(connection: socket.socket) -> int:
    """The user who connected, as the kernel vouches for."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(data)[1]
    return uid


def receive(connection: socket.socket) -> Request:
    """Read one request. Raises ProtocolError, OSError (also TimeoutError)."""
    descriptors: list[int] = []
    try:
        data = _read(connection, descriptors)
        _, size, _ = _HEADER.unpack_from(data)
        configuration = _HEADER.size + size
        environment = _environment(data[_HEADER.size : configuration])
        netns_fd = descriptors.pop(0) if descriptors else -1
        return Request(environment, data[configuration:], netns_fd)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _read(connection: socket.socket, descriptors: list[int]) -> bytes:
    """The bytes of one request; the descriptors that came along are added to the list."""
    data = b""
    size = _HEADER.size
    deadline = time.monotonic() + REQUEST_SECONDS
    while len(data) < size:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part, received, _, _ = socket.recv_fds(connection, _CHUNK, _RIGHTS, socket.MSG_CMSG_CLOEXEC)
        descriptors.extend(received)
        if not part:
            raise ProtocolError(f"ends {size - len(data)} bytes early")
        starts = len(data) < _HEADER.size
        data += part
        if starts and len(data) >= _HEADER.size:
            size += _announced(data)
    if len(data) > size:
        raise ProtocolError(f"is {len(data) - size} bytes longer than it says")
    return data


def _announced(data: bytes) -> int:
    """The sizes in the header, together."""
    magic, environment, configuration = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError(f"starts with {magic!r}: expected {MAGIC!r}")
    if environment > LIMIT or configuration > LIMIT:
        raise ProtocolError(
            f"environment of {environment} and configuration of {configuration} bytes:"
            f" expected at most {LIMIT} each"
        )
    return int(environment + configuration)


def answer(connection: socket.socket, exit_code: int, output: bytes) -> None:
    """Send the answer. A client that has gone in the meantime is no error."""
    connection.settimeout(REQUEST_SECONDS)
    with contextlib.suppress(ConnectionError, TimeoutError):
        connection.sendall(_HEADER.pack(MAGIC, exit_code, len(output)) + output)


def _environment(data: bytes) -> dict[str, str]:
    variables = {}
    for entry in filter(None, data.split(b"\0")):
        name, _, value = entry.decode(errors="backslashreplace").partition("=")
        variables[name] = value
    return variables
