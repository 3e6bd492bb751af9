"""The sender of ``tests.support.streams``, a program: ``sender.py STATE COURSE …``.

STATE is the descriptor of shared memory: the number of rounds done, and whether to send. In each
round every socket sends the round's number: a COURSE of UDP is FD,ADDRESS,PORT; one of TCP, whose
socket is raw, has the source's address and port behind, and sends SYNs with the number as theirs.
It ends with the process that began it.
"""

import contextlib
import mmap
import os
import socket
import struct
import sys
import time

ROUNDS = slice(0, 8)
SENDING = 8
_PAUSE = 0.0002
_TCP = 6
_SYN = struct.Struct(">HHIIBBHHH")  # ports, numbers, length, flags, window, checksum, urgent


class Syn:
    """The first packets of connections from one port to another."""

    def __init__(self, address: str, port: int, source: str, source_port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._ports = source_port, port
        ends = socket.inet_pton(family, source) + socket.inet_pton(family, address)
        self._pseudo = _sum(ends) + _TCP + _SYN.size

    def packet(self, number: int) -> bytes:
        """With this sequence number."""
        fields = (*self._ports, number, 0, _SYN.size // 4 << 4, 2, 65535)
        total = self._pseudo + _sum(_SYN.pack(*fields, 0, 0))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        return _SYN.pack(*fields, total ^ 0xFFFF, 0)


def _sum(data: bytes) -> int:
    return sum(struct.unpack(f">{len(data) // 2}H", data))


def main(state: str, *courses: str) -> None:
    """Send for ever."""
    memory = mmap.mmap(int(state), mmap.PAGESIZE)
    parent = os.getppid()
    senders: list[tuple[socket.socket, tuple[str, int], Syn | None]] = []
    for course in courses:
        fd, address, port, *source = course.split(",")
        own = socket.socket(fileno=int(fd))
        syn = Syn(address, int(port), source[0], int(source[1])) if source else None
        senders.append((own, (address, 0 if syn else int(port)), syn))
    number = 0
    while os.getppid() == parent:
        if memory[SENDING]:
            packet = number.to_bytes(8, "big")
            for sender, target, syn in senders:
                # What the sender's own system refuses has not arrived.
                with contextlib.suppress(OSError):
                    sender.sendto(syn.packet(number) if syn else packet, target)
            number += 1
            memory[ROUNDS] = number.to_bytes(8, "big")
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main(*sys.argv[1:])
