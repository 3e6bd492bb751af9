"""A TCP relay that can be cut: between a client and a server that both stay well."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.daemon import HOST


class Relay:
    """Passes on connections to ``target`` (``host:port``) from ``endpoint``."""

    def __init__(self, target: str) -> None:
        self.retarget(target)
        self._listener = socket.create_server((HOST, 0))
        self.endpoint = f"{HOST}:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._lock = threading.Lock()
        self._open = True
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def sever(self) -> None:
        """Reset all connections; new ones are accepted at once."""
        self._open = False
        self._tell()
        self._open = True
        self._tell()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Reset all connections, and accept none meanwhile."""
        self._open = False
        self._tell()
        try:
            yield
        finally:
            self._open = True
            self._tell()

    def retarget(self, target: str) -> None:
        """Pass new connections on to another server."""
        host, _, port = target.rpartition(":")
        self._target = host, int(port)

    def close(self) -> None:
        """End everything."""
        self._ended = True
        self._wake.send(b"x")
        self._thread.join()
        for one in (self._listener, self._wake, self._woken):
            one.close()

    def _tell(self) -> None:
        """Wait until the thread has seen how things are now."""
        self._wake.send(b"x")
        self._wake.recv(1)

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
                    self._woken.recv(1)
                    if not self._open:
                        for one in list(pairs):
                            self._drop(pairs, one)
                    self._woken.send(b"x")
                elif end in pairs and not _pass_on(end, pairs[end]):
                    self._drop(pairs, end)
        for one in list(pairs):
            self._drop(pairs, one)
        self._selector.close()

    def _accept(self, pairs: dict[socket.socket, socket.socket]) -> None:
        near, _ = self._listener.accept()
        if not self._open:
            _reset(near)
            return
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
