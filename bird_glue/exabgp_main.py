"""Runs as ``python -P exabgp_main.py FD CONFIGURATION``: ExaBGP, once it has said who it is.

The process writes its own id to the locked file before anything else, so that whoever finds
the lock taken also finds by whom, wherever the program that started it was killed.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    _, descriptor, configuration = sys.argv
    os.write(int(descriptor), f"{os.getpid()}\n".encode())
    sys.argv = ["exabgp", "server", configuration]
    runpy.run_module("exabgp", run_name="__main__", alter_sys=True)
