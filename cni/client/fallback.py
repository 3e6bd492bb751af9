"""The CNI plugin that a container runtime executes, where no C compiler made ``manx.c`` one.

Run as ``python3 -IS``: without site packages, and with imports that are built into the
interpreter (``import socket`` alone would double the time). Same protocol, same answers as
``manx.c``, which explains them; one suite of tests holds both to it.
"""

import _socket
import errno
import posix
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # only for type checkers: importing typing takes longer than all the rest
    from typing import NoReturn

SOCKET = "/run/manx/cni.sock"
HEADER = 12
LIMIT = 1 << 20  # bytes of environment, stdin and answer
STDIN_SECONDS = 5
ANSWER_SECONDS = 90
RETRY_SECONDS = 0.05
RETRIES = 200
ERR_ENVIRONMENT, ERR_IO, ERR_TRY_AGAIN, ERR_NOT_AVAILABLE = 4, 5, 11, 50
VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")


def finish(output: bytes, code: int) -> "NoReturn":
    """Print and exit, without the interpreter's own farewell (a fifth of the run time)."""
    try:
        while output:
            output = output[posix.write(1, output) :]
    except OSError:
        code = 2
    posix._exit(code)


def finish_json(value: object, code: int) -> "NoReturn":
    """Print as JSON and exit: only for what the daemon does not answer."""
    import json

    finish(json.dumps(value, separators=(",", ":")).encode() + b"\n", code)


def fail(version: str, code: int, subject: str, wrong: str, remedy: str) -> "NoReturn":
    """Print a CNI error (section 5 of the spec) and exit."""
    msg = f"{subject}: {wrong}"
    finish_json({"cniVersion": version, "code": code, "msg": msg, "details": remedy}, 1)


def find_version(configuration: bytes) -> str:
    """The configuration's ``cniVersion`` if it is one that we speak, else the newest."""
    import json

    try:
        version = json.loads(configuration)["cniVersion"]
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    return version if version in VERSIONS else VERSIONS[-1]


def words(error: OSError) -> str:
    """What is wrong, without number and file name."""
    return error.strerror or posix.strerror(error.errno or errno.EIO)


def read_stdin() -> "tuple[bytes, str]":
    """What came, and what is wrong with it if anything is."""
    data = b""
    while select.select([0], [], [], STDIN_SECONDS)[0]:
        try:
            part = posix.read(0, 65536)
        except OSError as error:
            return data, words(error)
        if not part:
            return data, ""
        data += part
        if len(data) > LIMIT:
            return data, "longer than 1 MiB"
    return data, "not closed within 5 s"


def receive(connection: _socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes. Raises OSError, also at an early end."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise OSError(errno.ECONNRESET, posix.strerror(errno.ECONNRESET))
        data += part
    return data


def ask(path: bytes, request: bytes, descriptor: int) -> "tuple[bytes, int]":
    """One conversation with the daemon: its words and exit code. Raises OSError."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(path)
        rights = []
        if descriptor >= 0:
            number = descriptor.to_bytes(4, sys.byteorder)
            rights.append((_socket.SOL_SOCKET, _socket.SCM_RIGHTS, number))
        sent = connection.sendmsg([request], rights, _socket.MSG_NOSIGNAL)
        if sent < len(request):
            connection.sendall(request[sent:], _socket.MSG_NOSIGNAL)
        header = receive(connection, HEADER)
        size = int.from_bytes(header[8:12], "big")
        if header[:4] != b"MNX1" or size > LIMIT:
            raise OSError(errno.EPROTO, posix.strerror(errno.EPROTO))
        return receive(connection, size), int.from_bytes(header[4:8], "big") & 0x7F
    finally:
        connection.close()


def main() -> None:
    """Hand the request over, print the answer, exit."""
    environment = posix.environ
    command = environment.get(b"CNI_COMMAND")
    if not command:
        fail(
            VERSIONS[-1],
            ERR_ENVIRONMENT,
            "CNI_COMMAND",
            "not set",
            "this is a CNI plugin, to be run by a container runtime; expected ADD, DEL, CHECK,"
            " STATUS, GC or VERSION",
        )
    block = b""
    for name, value in environment.items():
        if name[:4] == b"CNI_":
            block += name + b"=" + value + b"\0"
    block += b"MANX_PLUGIN=" + sys.argv[0].rpartition("/")[2].encode(errors="replace") + b"\0"
    descriptor = -1
    netns = environment.get(b"CNI_NETNS")
    if netns:
        try:
            descriptor = posix.open(netns, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
        except OSError as error:
            block += b"MANX_NETNS_ERROR=" + words(error).encode() + b"\0"
    configuration, wrong = read_stdin()
    if command == b"VERSION":
        version = find_version(configuration)
        finish_json({"cniVersion": version, "supportedVersions": VERSIONS}, 0)
    if wrong:
        remedy = "expected the network configuration as JSON"
        fail(find_version(configuration), ERR_IO, "stdin", wrong, remedy)
    if len(block) > LIMIT:
        version = find_version(configuration)
        fail(version, ERR_ENVIRONMENT, "CNI_* variables", "longer than 1 MiB", "shorten CNI_ARGS")
    header = b"MNX1" + len(block).to_bytes(4, "big") + len(configuration).to_bytes(4, "big")
    converse(configuration, header + block + configuration, descriptor, command == b"STATUS")


def converse(configuration: bytes, request: bytes, descriptor: int, status: bool) -> None:
    """Ask until there is an answer or no hope; print one or the other and exit.

    ``status``: the question is about now, so there is no waiting for a restart.
    """
    path = posix.environ.get(b"MANX_CNI_SOCKET") or SOCKET.encode()
    text = path.decode(errors="replace")
    if len(path) > 107:
        remedy = "expected at most 107 bytes"
        fail(find_version(configuration), ERR_ENVIRONMENT, "MANX_CNI_SOCKET", text, remedy)
    tries = RETRIES if status else 0
    while True:
        try:
            finish(*ask(path, request, descriptor))
        except OSError as error:
            wrong = "no answer in time" if isinstance(error, TimeoutError) else words(error)
            if tries >= RETRIES or isinstance(error, TimeoutError) or error.errno == errno.EPROTO:
                break
        tries += 1
        time.sleep(RETRY_SECONDS)
    fail(
        find_version(configuration),
        ERR_NOT_AVAILABLE if status else ERR_TRY_AGAIN,
        "daemon at " + text,
        wrong,
        "start the service manx-cni on this node (the command is: manx-cni daemon), or set"
        " MANX_CNI_SOCKET to the socket it listens on; then try again",
    )


main()
