"""The server by itself: who is served together or alone, and who waits for whom."""

from __future__ import annotations

import socket
import struct
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.protocol import ProtocolError, is_complete, receive
from cni.server import Conversation, Handler, Server
from cni.turns import Turns


@contextmanager
def listening(handler: Handler, turns: Turns) -> Iterator[Server]:
    """A server to be started by the block; those who ask before that wait together."""
    with tempfile.TemporaryDirectory(prefix="manx-") as directory:
        server = Server(Path(directory, "s"), handler, turns, most=8, joins=lambda _: True)
        try:
            yield server
        finally:
            server.stop()
            server.close()


def connected(server: Server, data: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(str(server.path))
    connection.sendall(data)
    return connection


def request(magic: bytes, environment: bytes, configuration: bytes = b"") -> bytes:
    sizes = struct.pack(">II", len(environment), len(configuration))
    return magic + sizes + environment + configuration


def ask(server: Server, name: str) -> socket.socket:
    return connected(server, request(b"MNX1", f"NAME={name}".encode()))


def name_of(conversation: Conversation) -> str:
    return conversation.request.environment["NAME"]


def test_who_waits_holds_up_none_of_those_who_came_with_him() -> None:
    """Nor does it when another thread has the turn by then, and waits for what comes next."""
    turns = Turns(1, alone=True)
    together, overtaken, answered = (threading.Event() for _ in range(3))

    def handle(asked: Sequence[Conversation]) -> Sequence[Conversation]:
        if len(asked) > 1:
            together.set()
            turns.give_up()  # as for a kernel that is slow
            overtaken.wait(60)
            return asked
        [only] = asked
        if name_of(only) == "first":
            turns.give_up()  # as for another plugin
            answered.wait(60)
        only.reply(0, b"")
        return []

    with (
        listening(handle, turns) as server,
        ask(server, "first") as first,
        ask(server, "second") as second,
    ):
        server.start()
        assert together.wait(20)
        with ask(server, "newcomer") as newcomer:
            assert newcomer.recv(4) == b"MNX1"
        try:
            overtaken.set()
            assert second.recv(4) == b"MNX1"
        finally:
            answered.set()
        assert first.recv(4) == b"MNX1"


def test_who_says_half_a_word_holds_up_nobody() -> None:
    def handle(asked: Sequence[Conversation]) -> Sequence[Conversation]:
        for each in asked:
            each.reply(0, b"")
        return []

    with (
        listening(handle, Turns(1, alone=True)) as server,
        ask(server, "one") as one,
        connected(server, b"hi\n") as half,
    ):
        server.start()
        assert one.recv(4) == b"MNX1"
        half.setblocking(False)
        with pytest.raises(BlockingIOError):  # it is waited for still
            half.recv(1)


class WaitsError(Exception):
    """All of it has not come yet."""


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"MNX1", b"MNX2", b"hi\n"]),
    st.binary(max_size=9),
    st.binary(max_size=9),
    st.integers(0, 30),
    st.booleans(),
)
def test_what_is_complete_is_not_waited_for(
    magic: bytes, environment: bytes, configuration: bytes, sent: int, ends: bool
) -> None:
    def waits() -> None:
        raise WaitsError

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(request(magic, environment, configuration)[:sent])
        if ends:
            theirs.shutdown(socket.SHUT_WR)
        complete = is_complete(ours)
        try:
            receive(ours, waits).close()
        except WaitsError:
            assert not complete
        except ProtocolError:
            pass
        else:
            assert complete
