"""The line to the relay: events come in by a thread of their own, commands go out."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bird_glue.messages import Event, Malformed, parse

_log = logging.getLogger(__name__)

_CHUNK = 1 << 18
_SEND_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class FromRelay:
    """What came in at once on a channel; ``closed`` when nothing more will."""

    channel: Channel
    events: tuple[Event, ...] = ()
    closed: bool = False


class Channel:
    """A connection to the relay. ``sink`` gets FromRelay, in the channel's thread."""

    def __init__(self, path: Path, sink: Callable[[FromRelay], object]) -> None:
        """Raises OSError where no relay listens."""
        self._sink = sink
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._run, name="relay-channel", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def send(self, line: str) -> None:
        """Send a command. Raises OSError when the relay is gone or doesn't read."""
        self._socket.settimeout(_SEND_SECONDS)
        self._socket.sendall(line.encode("ascii") + b"\n")

    def close(self) -> None:
        """Hang up and wait for the thread. May be called again."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        rest = b""
        while data := self._receive():
            *lines, rest = (rest + data).split(b"\n")
            events = [event for line in lines if (event := parse(line)) is not None]
            for event in events:
                if isinstance(event, Malformed):
                    _log.warning("ExaBGP: %s in %s", event.why, event.line)
            if events:
                self._sink(FromRelay(self, tuple(events)))
        self._sink(FromRelay(self, closed=True))

    def _receive(self) -> bytes:
        while True:
            try:
                return self._socket.recv(_CHUNK)
            except TimeoutError:  # the limit is meant for send()
                continue
            except OSError:
                return b""
