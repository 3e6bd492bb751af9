"""The executable by itself: what it does without a daemon, and with one that misbehaves."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni import protocol
from tests.cni.rig import Answer, build_client

NEWEST = "1.1.0"
VERSIONS = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
Behaviour = Callable[[socket.socket], None]


def run(client: Path, command: str, stdin: bytes = b"", **variables: str) -> Answer:
    # what the process still holds when it ends is no leak
    environment = {"CNI_COMMAND": command, "ASAN_OPTIONS": "detect_leaks=0", **variables}
    done = subprocess.run(
        [client], env=environment, input=stdin, stdout=subprocess.PIPE, timeout=100, check=False
    )
    return Answer(done.returncode, done.stdout)


@pytest.fixture
def path() -> Iterator[Path]:
    """A place for a socket, with a short name."""
    with tempfile.TemporaryDirectory(prefix="manx-") as directory:
        yield Path(directory) / "s"


@pytest.fixture
def serve(path: Path) -> Iterator[Callable[..., Path]]:
    """Start a daemon that treats one connection after the other as it is told."""
    listener = socket.socket(socket.AF_UNIX)
    threads = []

    def start(*behaviours: Behaviour) -> Path:
        listener.bind(str(path))
        listener.listen()

        def work() -> None:
            for behaviour in behaviours:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(20)
                    behaviour(connection)

        threads.append(threading.Thread(target=work))
        threads[0].start()
        return path

    yield start
    for thread in threads:
        thread.join()
    listener.close()


def header(code: int, size: int) -> bytes:
    return struct.pack(">4sII", b"MNX1", code, size)


def answers(output: bytes, code: int = 0) -> Behaviour:
    def behave(connection: socket.socket) -> None:
        protocol.receive(connection).close()
        connection.sendall(header(code, len(output)) + output)

    return behave


@pytest.mark.parametrize("version", VERSIONS)
def test_version_is_answered_without_a_daemon(client: Path, version: str) -> None:
    stdin = json.dumps({"cniVersion": version}).encode()
    answer = run(client, "VERSION", stdin).ok()
    assert answer == {"cniVersion": version, "supportedVersions": VERSIONS}


def test_version_of_nothing_we_speak(client: Path) -> None:
    for stdin in (b"", b"{", b"[]", b'{"cniVersion":7}', b'{"cniVersion":"9.9.9"}'):
        assert run(client, "VERSION", stdin).ok()["cniVersion"] == NEWEST


def test_daemon_absent(client: Path, path: Path) -> None:
    stdin = b'{"name":"cniVersion","x":{"cniVersion":"0.4.0"},"cniVersion" : "1.0.0"}'
    answer = run(client, "ADD", stdin, MANX_CNI_SOCKET=str(path))
    assert answer.error == 11
    assert answer.json["cniVersion"] == "1.0.0"
    assert str(path) in answer.json["msg"]
    assert "manx-cni" in answer.json["details"]


def test_status_of_an_absent_daemon(client: Path, path: Path) -> None:
    assert run(client, "STATUS", MANX_CNI_SOCKET=str(path)).error == 50


def test_no_command(client: Path) -> None:
    assert run(client, "").error == 4


def test_socket_path_too_long(client: Path) -> None:
    answer = run(client, "ADD", MANX_CNI_SOCKET="/" + 'ä"\\\n' * 40)
    assert answer.error == 4
    assert "MANX_CNI_SOCKET" in answer.json["msg"]


def test_stdin_too_long(client: Path, path: Path) -> None:
    answer = run(client, "ADD", b" " * ((1 << 20) + 1), MANX_CNI_SOCKET=str(path))
    assert answer.error == 5


def test_everything_arrives(client: Path, serve: Callable[..., Path], tmp_path: Path) -> None:
    seen: list[Any] = []

    def behave(connection: socket.socket) -> None:
        request = protocol.receive(connection)
        seen.extend((request.environment, request.configuration, os.fstat(request.netns_fd)))
        request.close()
        connection.sendall(header(0, 0))

    netns = tmp_path / "netns"
    netns.touch()
    stdin = b"\0\xff" * 500_000
    environment = {"CNI_NETNS": str(netns), "CNI_ARGS": "a=b;c==", "CNI_X": "", "OTHER": "x"}
    answer = run(client, "ADD", stdin, MANX_CNI_SOCKET=str(serve(behave)), **environment)
    assert answer.ok() is None
    variables, configuration, status = seen
    assert variables == {"CNI_COMMAND": "ADD", "CNI_NETNS": str(netns), "CNI_ARGS": "a=b;c==",
                         "CNI_X": "", "MANX_PLUGIN": client.name}  # fmt: skip
    assert configuration == stdin
    assert os.path.samestat(status, netns.stat())


def test_a_namespace_that_is_not_there(client: Path, serve: Callable[..., Path]) -> None:
    seen: list[protocol.Request] = []

    def behave(connection: socket.socket) -> None:
        seen.append(protocol.receive(connection))
        connection.sendall(header(0, 0))

    run(client, "DEL", MANX_CNI_SOCKET=str(serve(behave)), CNI_NETNS="/no/such/file")
    assert seen[0].netns_fd == -1
    assert seen[0].environment["MANX_NETNS_ERROR"] == "No such file or directory"


def test_a_long_answer_in_pieces(client: Path, serve: Callable[..., Path]) -> None:
    output = bytes(range(256)) * 1000

    def behave(connection: socket.socket) -> None:
        protocol.receive(connection).close()
        data = header(7, len(output)) + output
        for start in range(0, len(data), 9_999):
            connection.sendall(data[start : start + 9_999])

    answer = run(client, "CHECK", MANX_CNI_SOCKET=str(serve(behave)))
    assert answer == Answer(7, output)


def test_asks_again_when_a_restart_cuts_it_off(client: Path, serve: Callable[..., Path]) -> None:
    def cut_at_once(connection: socket.socket) -> None:
        pass

    def cut_before_the_answer(connection: socket.socket) -> None:
        protocol.receive(connection).close()

    def cut_in_the_answer(connection: socket.socket) -> None:
        protocol.receive(connection).close()
        connection.sendall(header(0, 100) + b'{"ips":')

    path = serve(cut_at_once, cut_before_the_answer, cut_in_the_answer, answers(b"{}\n"))
    answer = run(client, "ADD", b"x" * 300_000, MANX_CNI_SOCKET=str(path))
    assert answer == Answer(0, b"{}\n")


def test_something_else_listens(client: Path, serve: Callable[..., Path]) -> None:
    def behave(connection: socket.socket) -> None:
        protocol.receive(connection).close()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

    answer = run(client, "ADD", MANX_CNI_SOCKET=str(serve(behave)))
    assert answer.error == 11
    assert "Protocol error" in answer.json["msg"]


def test_nobody_reads_the_answer(client: Path, serve: Callable[..., Path]) -> None:
    environment = {"CNI_COMMAND": "ADD", "MANX_CNI_SOCKET": str(serve(answers(b"{}")))}
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [client], env=environment, stdin=subprocess.DEVNULL, stdout=write_end, check=False
        )
    finally:
        os.close(write_end)
    assert done.returncode == 2


KEYS = st.sampled_from(["cniVersion", "name", "a\\", 'q"', "", "\n"])
VALUES = st.recursive(
    st.sampled_from([*VERSIONS, "cniVersion", '","cniVersion":"0.3.0"', None, 1, "\\", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(document=st.dictionaries(KEYS, VALUES, max_size=4), indent=st.sampled_from([None, 1]))
def test_version_is_found_in_any_document(
    client: Path, document: dict[str, Any], indent: int | None
) -> None:
    stdin = json.dumps(document, indent=indent).encode()
    version = document.get("cniVersion")
    expected = version if version in VERSIONS else NEWEST
    assert run(client, "VERSION", stdin).ok()["cniVersion"] == expected


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C client with the address and undefined-behaviour sanitizers."""
    directory = tmp_path_factory.mktemp("sanitized")
    return build_client(
        "c", directory, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"
    )


@settings(max_examples=30, deadline=None)
@given(stdin=st.binary(max_size=300) | st.text(alphabet='{}[]":\\ cniVersion01.\0').map(str.encode))
def test_any_bytes_are_safe(sanitized: Path, stdin: bytes) -> None:
    answer = run(sanitized, "VERSION", stdin)
    assert answer.ok()["cniVersion"] in VERSIONS


def test_a_whole_conversation_is_safe(sanitized: Path, serve: Callable[..., Path]) -> None:
    path = serve(lambda _: None, answers(b"x" * 100_000, 1))
    variables = {"MANX_CNI_SOCKET": str(path), "CNI_NETNS": "/dev/null", "CNI_ARGS": "x" * 100_000}
    assert run(sanitized, "ADD", b"y" * 100_000, **variables) == Answer(1, b"x" * 100_000)
    assert run(sanitized, "STATUS", MANX_CNI_SOCKET="/nowhere").error == 50
