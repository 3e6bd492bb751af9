"""The daemon: datastore, node and server put together, until a signal ends it."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
import time

from api.errors import InvalidObjectError
from cni.enforcement import Enforcement
from cni.node import Node
from cni.plugin import Plugin
from cni.repair import repair
from cni.server import WORKERS, Server, socket_path
from cni.turns import Turns
from datastore.connect import connect
from datastore.environment import Environment
from datastore.interface import StoreError
from reconcile.backoff import Backoff

# A thread that computes gives way to one that has an answer from the kernel or the datastore
# after this time, seconds; Python's default of 5 ms is five times a whole ADD.
_SWITCH_INTERVAL = 0.0005

# On a file of this machine a request is hardly anything but work, and some are enough to have one
# compute while the others wait for the kernel's lock. (Measured, 50 ADDs at once: 3 are too few
# beside others who change interfaces, 6 to 12 alike, 64 take twice as long.) Other stores are what
# most wait for most of the time.
_LOCAL = "sqlite:"
_TURNS = 12

_END = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)


def run(environment: Environment) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError, RuntimeError, ValueError at the start."""
    sys.setswitchinterval(_SWITCH_INTERVAL)
    # Blocked, here and in every thread to come, and waited for: a handler of Python's may be
    # missed by a main thread that is just about to sleep.
    signal.pthread_sigmask(signal.SIG_BLOCK, _END)
    stop = threading.Event()
    store = connect(environment.datastore)
    local = environment.datastore.startswith(_LOCAL)
    turns = Turns(_TURNS if local else WORKERS)
    node = Node(store, environment.node, follow=not local, before_waiting=turns.give_up)
    enforcement = Enforcement(environment.run_dir)
    plugin = Plugin(node, enforcement, turns.give_up)
    server = Server(socket_path(environment), plugin.handle, turns)
    node.start()
    enforcement.start()
    repairs = threading.Thread(target=_repair, args=(node, stop), name="cni-repair", daemon=True)
    repairs.start()
    gc.collect()
    gc.freeze()  # what is loaded now stays for ever, so the collector need not look at it
    server.start()
    _log.info("node %s: serving on %s", environment.node, server.path)
    signal.sigwait(_END)
    stop.set()
    server.stop()
    plugin.close()
    repairs.join()
    enforcement.stop()
    node.stop()
    store.close()
    _log.info("stopped")


def _repair(node: Node, stop: threading.Event) -> None:
    """Repair what the daemon before left, as soon as the datastore can be reached."""
    backoff: Backoff[None] = Backoff()
    while not stop.is_set():
        try:
            repair(node)
        except (StoreError, InvalidObjectError, OSError) as error:
            now = time.monotonic()
            due = backoff.failed(None, now)
            _log.warning("repair at the start, next in %.1f s: %s", due - now, error)
            stop.wait(due - now)
        else:
            return
