"""The sender of ``tests.support.streams``, a program: ``sender.py STATE FD,ADDRESS,PORT …``.

STATE is the descriptor of shared memory: the number of rounds done, and whether to send. In each
round every socket sends the round's number. It ends with the process that began it.
"""

import contextlib
import mmap
import os
import socket
import sys
import time

ROUNDS = slice(0, 8)
SENDING = 8
_PAUSE = 0.0002


def main(state: str, *courses: str) -> None:
    """Send for ever."""
    memory = mmap.mmap(int(state), mmap.PAGESIZE)
    parent = os.getppid()
    senders = []
    for course in courses:
        fd, address, port = course.split(",")
        senders.append((socket.socket(fileno=int(fd)), (address, int(port))))
    number = 0
    while os.getppid() == parent:
        if memory[SENDING]:
            packet = number.to_bytes(8, "big")
            for sender, target in senders:
                # What the sender's own system refuses has not arrived.
                with contextlib.suppress(OSError):
                    sender.sendto(packet, target)
            number += 1
            memory[ROUNDS] = number.to_bytes(8, "big")
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main(*sys.argv[1:])
