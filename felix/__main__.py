"""``manx-felix``: the agent of this node. Settings: docs/felix.md."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path

from datastore.connect import connect
from datastore.environment import Environment, configure_logging
from felix.agent import Agent
from felix.removal import remove_everything

# The loop must not wait 5 ms (the default) for a watcher's thread to let go of the interpreter.
_SWITCH_SECONDS = 0.0005

_log = logging.getLogger("felix")


def main() -> int:
    """Run until SIGTERM or SIGINT. Exit code 1: it can't run, and says why."""
    parser = argparse.ArgumentParser(prog="manx-felix", description=main.__doc__)
    parser.add_argument(
        "--remove",
        action="store_true",
        help="remove all that it put into the kernel: policy is enforced no more",
    )
    if parser.parse_args().remove:
        return _remove()
    try:
        environment = Environment.load()
        store = connect(environment.datastore)
        configure_logging(environment, "felix")
        agent = Agent(environment, store)
        lock = _lock(environment.run_dir)
    except (ValueError, OSError) as error:
        print(f"manx-felix: {error}", file=sys.stderr)
        return 1
    sys.setswitchinterval(_SWITCH_SECONDS)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    _log.info("node %s, pid %d, datastore %s", environment.node, os.getpid(), environment.datastore)
    try:
        agent.run()
    finally:
        store.close()
        os.close(lock)
    return 0


def _remove() -> int:
    try:
        environment = Environment.load()
        configure_logging(environment, "felix")
        lock = _lock(environment.run_dir)
        problems = remove_everything()
    except (ValueError, OSError) as error:
        print(f"manx-felix: {error}", file=sys.stderr)
        return 1
    os.close(lock)
    for problem in problems:
        print(f"manx-felix: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _lock(run_dir: Path) -> int:
    """Two agents on one node would undo each other's work."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "felix.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"another agent of this node is running (it holds {path})") from None
    return lock


if __name__ == "__main__":
    sys.exit(main())
