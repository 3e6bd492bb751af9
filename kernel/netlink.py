"""A netlink socket that sends many messages at once, and the bytes they are made of.

One kernel table's messages are built in that table's module; here is what they share:
attributes (encode, parse), batches and dumps. See netlink(7), rtnetlink(7).
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kernel.netns import in_namespace

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_ECHO = 0x8
NLM_F_DUMP_INTR = 0x10
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300

NLMSG_ERROR = 2
NLMSG_DONE = 3

NLA_F_NESTED = 0x8000
NLA_F_NET_BYTEORDER = 0x4000
_NLA_TYPE_MASK = 0x3FFF

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_SO_ATTACH_FILTER = 26

# linux/netlink.h: in the flags of an NLMSG_ERROR
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_INT = struct.Struct("=i")
_U32 = struct.Struct("=I")
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter

# Room in the receive buffer for an answer to every message of a window even if all fail.
_WINDOW_MESSAGES = 1000
_WINDOW_BYTES = 128 * 1024
_FEW_MESSAGES = 64
_BUFFER = 4 << 20
_RECEIVE = 1 << 16  # the kernel fills at most half of it with one datagram of a dump
# The kernel answers before send() returns; the limit only guards against a lost answer.
_ANSWER_SECONDS = 10
_ANSWER_TIME = struct.pack("@ll", _ANSWER_SECONDS, 0)
_DUMP_ATTEMPTS = 20
_SEQUENCE_RESTART = 1 << 31


# Receive buffers, of which each system call borrows one: one made anew would cost more than the
# call, and one for each thread would be memory for nothing.
_buffers: list[memoryview] = []


def _take_buffer() -> memoryview:
    try:
        return _buffers.pop()
    except IndexError:
        return memoryview(bytearray(_RECEIVE))


class Message(NamedTuple):
    """A request: type (``RTM_…``), flags (``NLM_F_…``, without REQUEST and ACK) and body."""

    type: int
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """The kernel refused message ``index`` of a batch, for this reason."""

    index: int
    errno: int
    message: str

    def error(self, what: object) -> OSError:
        """The failure as an exception that names the object it is about."""
        return OSError(self.errno, f"{what}: {self.message}")


@dataclass(frozen=True, slots=True)
class Reply:
    """What the kernel sent back for message ``index`` of a batch (``NLM_F_ECHO``)."""

    index: int
    type: int
    body: bytes


class DumpInterruptedError(OSError):
    """The table changed during every attempt to read it. Try again later."""


class MessagesLostError(OSError):
    """More was sent to a multicast group than the socket could hold.

    From now on it hears everything again, so read the table after this.
    """


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = 4 + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length & 3)


def attribute_u32(kind: int, value: int) -> bytes:
    """An attribute that holds an unsigned 32-bit number in host order."""
    return _ATTRIBUTE.pack(8, kind) + _U32.pack(value)


def attribute_text(kind: int, text: str) -> bytes:
    """An attribute that holds text, with the NUL the kernel wants."""
    return attribute(kind, text.encode(errors="surrogateescape") + b"\0")


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attribute_list(data: bytes, offset: int = 0) -> list[tuple[int, bytes]]:
    """The attributes in ``data`` from ``offset``, in order, as (type without flags, value).

    Raises ValueError where a length reaches outside of the data.
    """
    found = []
    end = len(data)
    unpack = _ATTRIBUTE.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(data, offset)
        if length < 4 or offset + length > end:
            raise ValueError(f"netlink attribute {kind} at byte {offset}: length {length} of {end}")
        found.append((kind & _NLA_TYPE_MASK, data[offset + 4 : offset + length]))
        offset += (length + 3) & ~3
    return found


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in ``data`` from ``offset`` by type; of equal types the last."""
    return dict(attribute_list(data, offset))


def u32(data: bytes) -> int:
    """The unsigned 32-bit number, in host order, that an attribute holds."""
    value: int = _U32.unpack(data)[0]
    return value


def text(data: bytes) -> str:
    """The text that an attribute holds."""
    return data.rstrip(b"\0").decode(errors="surrogateescape")


def mac_bytes(mac: str) -> bytes:
    """``ee:ee:ee:ee:ee:ee`` as six bytes. Raises ValueError."""
    raw = bytes.fromhex(mac.replace(":", ""))
    if len(raw) != 6:
        raise ValueError(f"MAC address {mac!r}: six bytes such as 02:00:00:00:00:01 are needed")
    return raw


class NetlinkSocket:
    """A persistent netlink socket, for one thread at a time.

    ``groups`` is the bit mask of multicast groups to hear. ``netns_fd`` is the network
    namespace to speak to, that of the calling thread by default; the socket keeps its
    namespace wherever its user goes. ``home_fd``: see ``kernel.netns.inside``.
    ``send_buffer`` bounds the bytes of one datagram. ``brief``: for a few messages and answers and
    no dump, with buffers as the system has them; it is made in less time.
    """

    def __init__(
        self,
        protocol: int = NETLINK_ROUTE,
        *,
        groups: int = 0,
        netns_fd: int | None = None,
        home_fd: int | None = None,
        send_buffer: int = _BUFFER,
        brief: bool = False,
    ) -> None:
        with in_namespace(netns_fd, home_fd):
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
            )
        try:
            self._set_up(groups, send_buffer, brief=brief)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0

    def _set_up(self, groups: int, send_buffer: int, *, brief: bool) -> None:
        own = self._socket
        if not brief:
            own.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, send_buffer)
            own.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            own.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        own.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        own.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _ANSWER_TIME)
        own.bind((0, groups))

    def __enter__(self) -> NetlinkSocket:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The file descriptor, for poll and select."""
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """The number by which the kernel names this socket to those who hear of its changes."""
        own: tuple[int, int] = self._socket.getsockname()
        return own[0]

    def set_filter(self, program: Sequence[tuple[int, int, int, int]]) -> None:
        """Have the kernel drop what this socket need not hear, before it wakes anybody.

        ``program``: classic BPF, (code, jump if true, jump if false, k), from the message's
        header on. Socket(7), SO_ATTACH_FILTER.
        """
        code = array.array("B", b"".join(_INSTRUCTION.pack(*step) for step in program))
        location, _ = code.buffer_info()
        self._socket.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), location)
        )

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def batch(self, messages: Sequence[Message]) -> list[Failure]:
        """Send the messages, in order; every one is tried, whatever became of the others.

        Returns those that failed, in order. Raises OSError when the conversation with the
        kernel itself breaks.
        """
        return self.transact(messages)[0]

    def transact(self, messages: Sequence[Message]) -> tuple[list[Failure], list[Reply]]:
        """``batch``, which also returns what the kernel sent back for ``NLM_F_ECHO``."""
        failures: list[Failure] = []
        replies: list[Reply] = []
        for start, window in _windows(messages):
            sent = self._send(window)
            for sequence, kind, flags, body in self._answers(sent):
                index = start + sequence - sent.start
                if kind != NLMSG_ERROR:
                    replies.append(Reply(index, kind, body))
                elif code := -_INT.unpack_from(body)[0]:
                    failures.append(Failure(index, code, _error_text(code, body, flags)))
        return failures, replies

    def atomic(self, messages: Sequence[Message]) -> list[Failure]:
        """Send the messages in one datagram, which the kernel takes as one transaction.

        For nfnetlink's batches, whose first and last messages are the batch's begin and end.
        Returns what the kernel refused, in order; if that is anything, it did nothing.
        """
        sent = self._send(messages, acknowledged=len(messages) - 2)
        failures: list[Failure] = []
        answers = self._read()
        # All answers are there when send() returns; how many cannot be known.
        while answers:
            for sequence, kind, flags, body in answers:
                if sequence in sent and kind == NLMSG_ERROR:
                    code = -_INT.unpack_from(body)[0]
                    if code:
                        index = sequence - sent.start
                        failures.append(Failure(index, code, _error_text(code, body, flags)))
            answers = self._read(socket.MSG_DONTWAIT)
        return failures

    def request(self, message: Message) -> bytes:
        """Send one message and return the body of the answer. Raises OSError if refused."""
        failures, replies = self.transact([message])
        if failures:
            raise OSError(failures[0].errno, failures[0].message)
        if not replies:
            raise OSError(errno.EPROTO, f"netlink message {message.type}: no answer")
        return replies[0].body

    def dump(self, message: Message) -> list[bytes]:
        """The bodies that answer a dump request. Raises OSError, DumpInterruptedError.

        A dump during which the table changed is thrown away and read again.
        """
        for _ in range(_DUMP_ATTEMPTS):
            bodies, interrupted = self._dump_once(message)
            if not interrupted:
                return bodies
        raise DumpInterruptedError(
            errno.EAGAIN, f"netlink dump {message.type}: interrupted {_DUMP_ATTEMPTS} times"
        )

    def receive(self) -> list[Message]:
        """Wait for one datagram of a multicast group. Raises OSError, MessagesLostError."""
        return [Message(kind, 0, body) for _, kind, _, body in _messages(self.receive_raw())]

    def receive_raw(self) -> bytes:
        """As ``receive``, but for who looks into few of many datagrams."""
        try:
            return self._read_raw()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._drain()
            raise MessagesLostError(errno.ENOBUFS, "netlink: messages were lost") from error

    def _drain(self) -> None:
        """Throw away all that waits.

        Until its queue has been empty a congested socket loses messages without saying so
        again.
        """
        while True:
            try:
                self._socket.recv(1, socket.MSG_DONTWAIT)  # the rest of each is thrown away
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def _send(self, messages: Sequence[Message], acknowledged: int | None = None) -> range:
        """Send in one datagram; only one message, the last, asks for an acknowledgement.

        The kernel reports a failure unasked, and answers in order. Returns the sequence
        numbers.
        """
        first = self._sequence + 1
        parts: list[bytes] = []
        sequence = self._sequence
        final = len(messages) - 1 if acknowledged is None else acknowledged
        for index, (kind, flags, body) in enumerate(messages):
            sequence += 1
            flags |= NLM_F_REQUEST | NLM_F_ACK if index == final else NLM_F_REQUEST
            length = 16 + len(body)
            parts += (_HEADER.pack(length, kind, flags, sequence, 0), body)
            if length & 3:
                parts.append(bytes(-length & 3))
        self._sequence = sequence if sequence < _SEQUENCE_RESTART else 0
        self._socket.send(b"".join(parts))
        return range(first, sequence + 1)

    def _answers(self, sent: range) -> Iterator[tuple[int, int, int, bytes]]:
        """(sequence, type, flags, body) of all answers, up to the one to the last message."""
        first, last = sent.start, sent.stop - 1
        while True:
            for answer in _messages(self._read_raw()):
                if first <= answer[0] <= last:
                    yield answer
                    if answer[0] == last and answer[1] == NLMSG_ERROR:
                        return

    def stream(self, message: Message) -> Iterator[bytes]:
        """As ``dump``, but each body as it comes, and of a table that may change meanwhile.

        For tables too large to be held. To be read to its end before anything else is asked.
        """
        return (body for _, body in self._dump_messages(message) if body is not None)

    def _dump_once(self, message: Message) -> tuple[list[bytes], bool]:
        bodies: list[bytes] = []
        interrupted = False
        for flags, body in self._dump_messages(message):
            interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
            if body is not None:
                bodies.append(body)
        return bodies, interrupted

    def _dump_messages(self, message: Message) -> Iterator[tuple[int, bytes | None]]:
        """(flags, body) of all messages that answer; the last one has no body."""
        self._sequence += 1
        own = self._sequence
        flags = message.flags | NLM_F_REQUEST | NLM_F_DUMP
        length = 16 + len(message.body)
        self._socket.send(_HEADER.pack(length, message.type, flags, own, 0) + message.body)
        while True:
            for sequence, kind, flags, body in self._read():
                if sequence != own:
                    continue
                if kind not in (NLMSG_DONE, NLMSG_ERROR):
                    yield flags, body
                    continue
                code = -_INT.unpack_from(body)[0] if len(body) >= 4 else 0
                if code:
                    raise OSError(code, _error_text(code, body, flags, kind))
                yield flags, None
                return

    def _read(self, flags: int = 0) -> list[tuple[int, int, int, bytes]]:
        """One datagram's messages as (sequence, type, flags, body).

        With MSG_DONTWAIT none where nothing waits.
        """
        return _messages(self._read_raw(flags))

    def _read_raw(self, flags: int = 0) -> bytes:
        buffer = _take_buffer()
        try:
            size = self._socket.recv_into(buffer, 0, flags)
            return bytes(buffer[:size])
        except BlockingIOError as error:
            if flags & socket.MSG_DONTWAIT:
                return b""
            raise TimeoutError(
                errno.ETIMEDOUT, f"netlink: no answer within {_ANSWER_SECONDS} s"
            ) from error
        finally:
            _buffers.append(buffer)


def _messages(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    offset = 0
    while offset + 16 <= len(data):
        length, kind, header_flags, sequence, _ = _HEADER.unpack_from(data, offset)
        found.append((sequence, kind, header_flags, data[offset + 16 : offset + length]))
        offset += (length + 3) & ~3
    return found


def _windows(messages: Sequence[Message]) -> Iterator[tuple[int, Sequence[Message]]]:
    """What goes into one datagram, and the index of its first message."""
    if len(messages) <= _FEW_MESSAGES and sum(len(m.body) for m in messages) < _WINDOW_BYTES // 2:
        if messages:
            yield 0, messages
        return
    start = size = 0
    for index, message in enumerate(messages):
        length = 16 + len(message.body) + 3
        if index - start == _WINDOW_MESSAGES or (index > start and size + length > _WINDOW_BYTES):
            yield start, messages[start:index]
            start, size = index, 0
        size += length
    if start < len(messages):
        yield start, messages[start:]


def _error_text(code: int, body: bytes, flags: int, kind: int = NLMSG_ERROR) -> str:
    """What the kernel says is wrong: errno's text and, if there is one, the extended ACK's."""
    plain = os.strerror(code)
    if not flags & _NLM_F_ACK_TLVS:
        return plain
    # An int and, in an NLMSG_ERROR, the refused message: its header or (not capped) all of it
    offset = 4
    if kind == NLMSG_ERROR:
        offset += 16 if flags & _NLM_F_CAPPED else (_U32.unpack_from(body, 4)[0] + 3) & ~3
    found = attributes(body, offset).get(_NLMSGERR_ATTR_MSG)
    return f"{plain}: {text(found)}" if found else plain
