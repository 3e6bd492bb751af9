"""Runs as ``python -P exabgp_main.py FD CONFIGURATION``: ExaBGP, once it has said who it is.

The process writes its own id to the locked file before anything else, so that whoever finds
the lock taken also finds by whom, wherever the program that started it was killed.

After a peer's outage ExaBGP would wait up to 60 s before it calls again; here a few at most.
"""

from __future__ import annotations

import os
import runpy
import sys

LONGEST_PAUSE = 4  # seconds between two calls


def call_again_soon() -> None:
    """Bound the pauses between ExaBGP's attempts to connect, which it has no setting for."""
    from exabgp.reactor.delay import Delay

    increase = Delay.increase

    def bounded(delay: Delay) -> None:
        increase(delay)
        delay._next = min(delay._next, LONGEST_PAUSE)

    Delay.increase = bounded


if __name__ == "__main__":
    _, descriptor, configuration = sys.argv
    os.write(int(descriptor), f"{os.getpid()}\n".encode())
    call_again_soon()
    sys.argv = ["exabgp", "server", configuration]
    runpy.run_module("exabgp", run_name="__main__", alter_sys=True)
