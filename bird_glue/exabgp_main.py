"""Runs as ``python -P exabgp_main.py FD CONFIGURATION``: ExaBGP, once it has said who it is.

The process writes its own id to the locked file before anything else, so that whoever finds
the lock taken also finds by whom, wherever the program that started it was killed.

Two of its ways are mended here, which it has no settings for. After a peer's outage it would
wait up to 60 s before it calls again. And it checks the TTL of packets (RFC 5082) only on
connections that it made.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
from typing import Any

# a large UPDATE makes more objects than the default lets be before it looks for garbage
_GC = 20_000, 20, 50
LONGEST_PAUSE = 4  # seconds between two calls


def call_again_soon() -> None:
    """Bound the pauses between ExaBGP's attempts to connect, which it has no setting for."""
    from exabgp.reactor.delay import Delay

    increase = Delay.increase

    def bounded(delay: Delay) -> None:
        increase(delay)
        delay._next = min(delay._next, LONGEST_PAUSE)

    Delay.increase = bounded


def check_callers() -> None:
    """Have the kernel drop packets of a peer that called, too, when they come from afar."""
    from exabgp.reactor import listener

    set_sending_ttl = listener.set_accepted_ttl

    def bounded(connection: Any, neighbor: Any) -> None:
        set_sending_ttl(connection, neighbor)
        if neighbor["incoming-ttl"] and connection.io is not None:
            listener.set_minimum_ttl(
                connection.io, connection.afi, connection.peer, neighbor["incoming-ttl"]
            )

    listener.set_accepted_ttl = bounded


if __name__ == "__main__":
    _, descriptor, configuration = sys.argv
    os.write(int(descriptor), f"{os.getpid()}\n".encode())
    call_again_soon()
    check_callers()
    gc.freeze()  # what was imported is here to stay
    gc.set_threshold(*_GC)
    sys.argv = ["exabgp", "server", configuration]
    runpy.run_module("exabgp", run_name="__main__", alter_sys=True)
