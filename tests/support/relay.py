"""A TCP relay that can be cut: between a client and a server that both stay well."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kernel.netns import Namespace, in_namespace
from tests.support.daemon import HOST, PortReservation


class Relay:
    """Passes on connections to ``target`` (``host:port``) from ``endpoint``.

    ``endpoint`` is a port of 127.0.0.1, in ``namespace`` where one is given: then the target
    can be reached from inside. ``connections`` counts those that were made.
    """

    def __init__(self, target: str, namespace: Namespace | None = None) -> None:
        self.retarget(target)
        self.connections = 0
        self._netns_fd = namespace.fd if namespace else None
        with in_namespace(self._netns_fd):
            self._reservation = PortReservation()
        self._listener = self._listen()
        self.endpoint = f"{HOST}:{self._reservation.port}"
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def sever(self) -> None:
        """Reset all connections; new ones are accepted at once."""
        self._tell(b"reset")

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Reset all connections, and refuse new ones meanwhile."""
        self._tell(b"close")
        try:
            yield
        finally:
            self._tell(b"open!")

    def retarget(self, target: str) -> None:
        """Pass new connections on to another server."""
        host, _, port = target.rpartition(":")
        self._target = host, int(port)

    def close(self) -> None:
        """End everything."""
        self._tell(b"close")
        self._ended = True
        self._wake.send(b"close")
        self._thread.join()
        for one in (self._wake, self._woken):
            one.close()
        self._reservation.close()

    def _listen(self) -> socket.socket:
        with in_namespace(self._netns_fd):
            return socket.create_server((HOST, self._reservation.port))

    def _tell(self, what: bytes) -> None:
        """Have the thread do something, and wait until it is done. Commands have five bytes."""
        self._wake.send(what)
        self._wake.recv(5)

    def _run(self) -> None:
        pairs: dict[socket.socket, socket.socket] = {}
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        while not self._ended:
            for ready, _ in self._selector.select():
                end = ready.fileobj
                assert isinstance(end, socket.socket)
                if end is self._listener:
                    self._accept(pairs)
                elif end is self._woken:
                    self._obey(self._woken.recv(5), pairs)
                elif end in pairs and not _pass_on(end, pairs[end]):
                    self._drop(pairs, end)
        for one in list(pairs):
            self._drop(pairs, one)
        self._selector.close()

    def _obey(self, command: bytes, pairs: dict[socket.socket, socket.socket]) -> None:
        listening = self._listener.fileno() >= 0
        if command == b"open!" and not listening:
            self._listener = self._listen()
            self._selector.register(self._listener, selectors.EVENT_READ)
        if command == b"close" and listening:
            self._selector.unregister(self._listener)
            self._listener.close()
        if command in (b"close", b"reset"):
            for one in list(pairs):
                self._drop(pairs, one)
        self._woken.send(command)

    def _accept(self, pairs: dict[socket.socket, socket.socket]) -> None:
        near, _ = self._listener.accept()
        self.connections += 1
        try:
            far = socket.create_connection(self._target, timeout=5)
        except OSError:
            _reset(near)
            return
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _drop(self, pairs: dict[socket.socket, socket.socket], end: socket.socket) -> None:
        other = pairs.pop(end, None)
        if other is not None:
            pairs.pop(other)
            for one in (end, other):
                self._selector.unregister(one)
                _reset(one)


def _pass_on(end: socket.socket, other: socket.socket) -> bool:
    try:
        data = end.recv(1 << 16)
        other.sendall(data)
    except OSError:
        return False
    return bool(data)


def _reset(end: socket.socket) -> None:
    """Close with a RST, as when the machine behind it is gone."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    end.close()
