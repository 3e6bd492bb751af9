"""Runs as ``python -I -S /…/bird_glue/relay_main.py SOCKET``: the relay.

A program of its own so that the interpreter need not compile it each time it is started: what it
compiles for that stays in its memory, half a megabyte of it.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/", 2)[0])

    from bird_glue.relay import Relay

    Relay(sys.argv[1]).run()
