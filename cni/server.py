"""The daemon's socket: who may ask, and which thread answers.

All workers wait in ``accept`` on one socket, so the kernel hands a request straight to the
thread that serves it: an event loop that hands over to a pool of threads takes eight times as
long for an empty request (measured: 28 against 230 microseconds). All are there from the start:
to start one while others work takes as long as half an ADD. Only those with a turn accept, so that
what can't be worked on yet waits in the kernel; and where there is one turn, who has it takes more
of what has come by then, to work on it together.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from cni.protocol import ProtocolError, Request, answer, is_complete, peer_uid, receive
from cni.turns import Turns
from datastore.environment import Environment

WORKERS = 64  # most of them wait: for the store, for other plugins, for the kernel
_BACKLOG = 1024
_PAUSE = 0.1  # seconds, after an error such as too many open files
_STACK = 1 << 20  # bytes; the default of 8 MiB is address space for nothing

_SOCKET = "cni.sock"

# The answer to a request: exit code and output for the client. To be called once, from any thread.
# Without an output there is no answer: the client asks again.
Reply = Callable[[int, bytes | None], None]
# Answers requests, at once or, having returned, later. Returns those that it can't but one at a
# time, if they were several.
Handler = Callable[[Sequence["Conversation"]], Sequence["Conversation"]]

_log = logging.getLogger(__name__)


def socket_path(environment: Environment) -> Path:
    """Where the daemon listens."""
    return environment.run_dir / _SOCKET


class Server:
    """Serves ``handler`` on the Unix socket ``path``, to root alone.

    ``turns``: who may work; a handler that waits for something should give its turn up.
    ``most``: so many requests are handed over together if they are there at the same moment, and
    ``joins`` says so of each. With more than 1 there must be one turn only.
    One server per path: a lock file beside it keeps a second one away. Raises
    RuntimeError where one is running, OSError where the path can't be used.
    """

    def __init__(
        self,
        path: Path,
        handler: Handler,
        turns: Turns,
        *,
        most: int = 1,
        joins: Callable[[Request], bool] = lambda _: False,
    ) -> None:
        self.path = path
        self._handler = handler
        self._turns = turns
        self._most = most
        self._joins = joins
        self._left: deque[Conversation] = deque()  # came with others, and is to be served alone
        self._unanswered = 0
        self._receiving: set[socket.socket] = set()
        self._answered = threading.Condition()
        self._closing = False
        self._silent_until = 0.0
        self._workers = [
            threading.Thread(target=self._work, name="cni-worker", daemon=True)
            for _ in range(WORKERS)
        ]
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock_fd = _take_lock(path.with_name(path.name + ".lock"))
        try:
            self._socket = _listen(path)
        except BaseException:
            os.close(self._lock_fd)
            raise
        self._arrivals = select.poll()
        self._arrivals.register(self._socket, select.POLLIN)

    def start(self) -> None:
        """Start serving; returns at once."""
        threading.stack_size(_STACK)
        for worker in self._workers:
            worker.start()

    def stop(self) -> None:
        """Take no more requests; returns when the handler has had all that were there.

        Some may be without an answer yet: see ``close``.
        """
        self._closing = True
        self.path.unlink(missing_ok=True)
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes all who wait in accept
        for connection in tuple(self._receiving):  # who is silent holds up nobody
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        for worker in self._workers:
            if worker.ident is not None:
                worker.join()

    def close(self) -> None:
        """After ``stop``: see to it that all are answered, free the path."""
        with self._answered:
            self._answered.wait_for(lambda: not self._unanswered)
        self._socket.close()
        os.close(self._lock_fd)

    def _work(self) -> None:
        try:
            while not self._closing:
                if self._turns.take() and not self._left:
                    try:
                        conversation = self._accept()
                    except OSError as error:
                        if not self._closing:
                            self._complain(error)
                            time.sleep(_PAUSE)
                        continue
                    self._serve(conversation, alone=False)
                with contextlib.suppress(IndexError):
                    while True:
                        self._serve(self._left.popleft(), alone=True)
        finally:
            self._turns.give_up()

    def _accept(self) -> Conversation:
        connection = self._socket.accept()[0]
        with self._answered:
            self._unanswered += 1
        return Conversation(connection, self._ended)

    def _complain(self, error: OSError) -> None:
        """Log once a second what meets all workers at once."""
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + 1
            _log.error("accepting a request: %s", error)

    def _serve(self, first: Conversation, *, alone: bool) -> None:
        group = [first]
        try:
            if self._understand(first):
                self._turns.compute()
                if not alone:
                    self._gather(group)
                self._handle(group)
        except Exception:
            _log.exception("request failed; its client is left without an answer")
            for conversation in group:
                conversation.end()
        finally:
            self._turns.rest()

    def _gather(self, group: list[Conversation]) -> None:
        """Add requests that are there at this moment.

        Those that are to be served alone, or are not complete yet, are left.
        """
        room = self._most - 1 if self._joins(group[0].request) else 0
        while room and self._turns.held and not self._left and self._arrivals.poll(0):
            try:
                conversation = self._accept()
            except OSError:
                return  # the server stops; if it is something else, the next worker will say it
            room -= 1
            if not is_complete(conversation.connection):
                self._left.append(conversation)
            elif self._understand(conversation):
                joins = self._joins(conversation.request)
                (group if joins else self._left).append(conversation)

    def _handle(self, group: Sequence[Conversation]) -> None:
        left: Sequence[Conversation] = ()
        try:
            left = self._handler(group)
        finally:
            for conversation in group:
                if conversation not in left:
                    conversation.request.close()
        self._left.extend(left)
        if not self._turns.held:  # who has it now looks no more at these, but waits in accept
            for _ in left:
                self._turns.call()

    def _understand(self, conversation: Conversation) -> bool:
        """Whether it has a request; else it has ended."""
        if not conversation.understood:
            if request := self._receive(conversation.connection):
                conversation.request = request
                conversation.understood = True
            else:
                conversation.end()
        return conversation.understood

    def _receive(self, connection: socket.socket) -> Request | None:
        uid = peer_uid(connection)
        if uid != 0:
            _log.warning("refused a request of user %d: only root may ask", uid)
            return None
        self._receiving.add(connection)
        try:
            if self._closing:
                return None
            return receive(connection, self._turns.give_up)
        except (ProtocolError, OSError) as error:
            _log.warning("request dropped: %s", error)
            return None
        finally:
            self._receiving.discard(connection)

    def _ended(self) -> None:
        with self._answered:
            self._unanswered -= 1
            self._answered.notify_all()


class Conversation:
    """A client's connection, until it has its answer. ``ended`` is called once, then.

    ``request``: what it asks, when that is ``understood``.
    """

    request: Request

    def __init__(self, connection: socket.socket, ended: Callable[[], None]) -> None:
        self.connection = connection
        self._ended = ended
        self._lock = threading.Lock()
        self._open = True
        self.understood = False

    def reply(self, exit_code: int, output: bytes | None) -> None:
        """Send the answer, if there is one. A second one is a fault, and is not sent."""
        try:
            if self._open and output is not None:
                answer(self.connection, exit_code, output)
        finally:
            self.end()

    def end(self) -> None:
        """Let go of the client. May be called again."""
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            self.connection.close()
            self._ended()


def _take_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RuntimeError(
            f"{path}: locked: another daemon serves this socket; stop it first"
        ) from None
    return descriptor


def _listen(path: Path) -> socket.socket:
    """Listen on a fresh socket and move it into place, so that no moment is without one."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.unlink(missing_ok=True)
        listener.bind(str(temporary))
        temporary.chmod(0o600)
        listener.listen(_BACKLOG)
        temporary.replace(path)
    except BaseException:
        listener.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return listener
