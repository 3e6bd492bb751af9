"""The daemon's end of the conversation with the client; ``client/manx.c`` describes the bytes."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MAGIC = b"MNX1"
LIMIT = 1 << 20  # bytes of environment, configuration and answer
REQUEST_SECONDS = 10.0  # the client has everything at hand before it connects

_HEADER = struct.Struct(">4sII")
_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid; socket(7) SO_PEERCRED
_CHUNK = 1 << 16
# Room for four descriptors; any but the first are closed. (socket.recv_fds ignores its flags.)
_CONTROL = socket.CMSG_SPACE(4 * 4)


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


def is_complete(connection: socket.socket) -> bool:
    """Whether ``receive`` would not wait."""
    try:
        header = connection.recv(_HEADER.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True  # as ``receive`` will say
    if not header:
        return True  # it is at its end
    if len(header) < _HEADER.size:
        return False
    _, environment, configuration = _HEADER.unpack(header)
    there = array.array("i", [0])
    fcntl.ioctl(connection, termios.FIONREAD, there)
    return bool(there[0] >= _HEADER.size + environment + configuration)


def receive(
    connection: socket.socket, before_waiting: Callable[[], object] = lambda: None
) -> Request:
    """Read one request. Raises ProtocolError, OSError (also TimeoutError).

    ``before_waiting`` is called where not all of it has arrived yet.
    """
    descriptors: list[int] = []
    try:
        data = _read(connection, descriptors, before_waiting)
        _, size, _ = _HEADER.unpack_from(data)
        configuration = _HEADER.size + size
        environment = _environment(data[_HEADER.size : configuration])
        netns_fd = descriptors.pop(0) if descriptors else -1
        return Request(environment, data[configuration:], netns_fd)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _read(
    connection: socket.socket, descriptors: list[int], before_waiting: Callable[[], object]
) -> bytes:
    """The bytes of one request; the descriptors that came along are added to the list."""
    data = b""
    size = _HEADER.size
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    deadline = time.monotonic() + REQUEST_SECONDS
    while len(data) < size:
        try:
            part, ancillary, _, _ = connection.recvmsg(_CHUNK, _CONTROL, flags)
        except BlockingIOError:
            before_waiting()
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            flags = socket.MSG_CMSG_CLOEXEC
            continue
        descriptors.extend(_rights(ancillary))
        if not part:
            raise ProtocolError(f"ends {size - len(data)} bytes early")
        starts = len(data) < _HEADER.size
        data += part
        if starts and len(data) >= _HEADER.size:
            size += _announced(data)
    if len(data) > size:
        raise ProtocolError(f"is {len(data) - size} bytes longer than it says")
    return data


def _rights(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came along; see unix(7), SCM_RIGHTS."""
    descriptors: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors += struct.unpack(f"={len(data) // 4}i", data[: len(data) & ~3])
    return descriptors


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
    data = _HEADER.pack(MAGIC, exit_code, len(output)) + output
    with contextlib.suppress(ConnectionError, TimeoutError):
        try:
            sent = connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(data):  # hardly ever: it fits into the socket's buffer
            connection.settimeout(REQUEST_SECONDS)
            connection.sendall(data[sent:])


def _environment(data: bytes) -> dict[str, str]:
    variables = {}
    for entry in filter(None, data.split(b"\0")):
        name, _, value = entry.decode(errors="backslashreplace").partition("=")
        variables[name] = value
    return variables
