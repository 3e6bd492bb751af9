"""The daemon: datastore, node and server put together, until a signal ends it."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time

from api.errors import InvalidObjectError
from cni import findings
from cni.enforcement import Enforcement
from cni.errors import CniError
from cni.node import Node
from cni.plugin import Plugin, is_add
from cni.repair import Patrol, repair
from cni.server import WORKERS, Server, socket_path
from cni.turns import Turns
from datastore.connect import connect
from datastore.environment import Environment
from datastore.interface import StoreError
from ipam.errors import IpamError
from reconcile.backoff import Backoff

# A thread that computes gives way to one that has an answer from the kernel or the datastore
# after this time, seconds; Python's default of 5 ms is five times a whole ADD.
_SWITCH_INTERVAL = 0.0005

# On a file of this machine a request is hardly anything but work: one thread does it, and ADDs that
# wait go together, as many as cost together hardly more; with more, half of fifty would not be done
# sooner. Other stores are what most wait for most of the time, side by side.
_LOCAL = "sqlite:"
_TOGETHER = 8

# Seconds between two looks at what vanished, and at what kernel and datastore disagree on.
_PATROL = "MANX_PATROL_SECONDS"

# By so much the daemon comes before other programs, above all before the pods and clients that wait
# for it: it works for a millisecond at a time, and who was first is to be done first.
_NICE = -8

_M_ARENA_MAX = -8  # malloc.h

_END = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)


def run(environment: Environment) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError, RuntimeError, ValueError at the start."""
    period = _period(os.environ.get(_PATROL) or "60")
    sys.setswitchinterval(_SWITCH_INTERVAL)
    _come_first()
    _have_one_heap()
    # Blocked, here and in every thread to come, and waited for: a handler of Python's may be
    # missed by a main thread that is just about to sleep.
    signal.pthread_sigmask(signal.SIG_BLOCK, _END)
    stop = threading.Event()
    store = connect(environment.datastore)
    local = environment.datastore.startswith(_LOCAL)
    turns = Turns(1, alone=True) if local else Turns(WORKERS)
    node = Node(store, environment.node, follow=not local, turns=turns)
    enforcement = Enforcement(environment.run_dir)
    plugin = Plugin(node, enforcement, turns.give_up)
    most = _TOGETHER if local else 1
    server = Server(socket_path(environment), plugin.handle, turns, most=most, joins=is_add)
    node.start()
    enforcement.start()
    teller = findings.Teller(environment.run_dir)
    repairs = threading.Thread(
        target=_repair, args=(node, stop, period, teller), name="cni-repair", daemon=True
    )
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


def _have_one_heap() -> None:
    """With a heap for each of its threads, as glibc has it, the daemon would be 2.5 MB larger."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def _come_first() -> None:
    """``renice``, of this thread and all to come. Not permitted where CAP_SYS_NICE is missing."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, own + _NICE)
    except PermissionError:
        _log.info("stays at nice %d: CAP_SYS_NICE is missing", own)


def _repair(node: Node, stop: threading.Event, period: float, teller: findings.Teller) -> None:
    """Repair what the daemon before left, as soon as the datastore can be reached; then patrol."""
    backoff: Backoff[None] = Backoff()
    patrol = Patrol(node)
    begun = False
    while not stop.is_set():
        try:
            if not begun:
                repair(node)
                begun = True
            teller.tell(patrol.look())
        except (StoreError, IpamError, InvalidObjectError, CniError, OSError) as error:
            now = time.monotonic()
            pause = max(backoff.failed(None, now) - now, period if begun else 0.0)
            _log.warning("repair, next in %.1f s: %s", pause, error)
        else:
            backoff.succeeded(None)
            pause = period
        stop.wait(pause)


def _period(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise ValueError(f"{_PATROL}: {text!r}: expected seconds, from 0.1 to 3600")
    return seconds
