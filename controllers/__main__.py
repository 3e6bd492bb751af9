"""``manx-controllers``: the loops of a cluster. Run as many as you like: one leads.

Settings are environment variables: MANX_DATASTORE, MANX_RUN_DIR, MANX_LOG_LEVEL, MANX_NODENAME;
MANX_KUBERNETES, the URL of a Kubernetes API whose nodes and pods count, where the datastore is
another; MANX_LEASE_SECONDS, how long the others wait for a leader that is silent (15).
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import sys
from collections.abc import Mapping

from controllers.agent import Agent
from controllers.lease import Timing
from datastore.connect import connect
from datastore.environment import Environment, configure_logging

_log = logging.getLogger("controllers")


def main() -> int:
    """Run until SIGTERM or SIGINT. Exit code 1: it can't run, and says why."""
    parser = argparse.ArgumentParser(prog="manx-controllers", description=__doc__)
    parser.parse_args()
    try:
        environment = Environment.load()
        timing = _timing(os.environ)
        store = connect(environment.datastore)
        url = os.environ.get("MANX_KUBERNETES")
        kubernetes = connect(url) if url else None
        configure_logging(environment, "controllers")
        identity = f"{environment.node}_{os.getpid()}_{secrets.token_hex(4)}"
        agent = Agent(environment, store, identity, kubernetes=kubernetes, timing=timing)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stop())
        _log.info("%s, datastore %s", identity, environment.datastore)
        agent.run()
    except (ValueError, OSError) as error:
        print(f"manx-controllers: {error}", file=sys.stderr)
        return 1
    store.close()
    if kubernetes is not None:
        kubernetes.close()
    return 0


def _timing(env: Mapping[str, str]) -> Timing:
    """As client-go's proportions: 15 s, 10 s and 2 s."""
    text = env.get("MANX_LEASE_SECONDS") or "15"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise ValueError(f"MANX_LEASE_SECONDS: {text!r}: expected seconds, from 1 to 3600")
    return Timing(seconds, seconds * 2 / 3, seconds * 2 / 15)


if __name__ == "__main__":
    sys.exit(main())
