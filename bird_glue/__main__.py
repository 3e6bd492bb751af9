"""``manx-bird-glue [run]``: the BGP agent. ``manx-bird-glue leave``: take the node out of BGP.

SIGTERM ends the agent and leaves the engine and the routes in place, for the next one to take
over; only ``leave`` withdraws them. Settings are environment variables: MANX_NODENAME,
MANX_DATASTORE, MANX_RUN_DIR, MANX_LOG_LEVEL, and MANX_ROUTER_ID (an IPv4 address, or ``hash``;
by default the node's IPv4 address), MANX_BFD (``on``, ``off``, or milliseconds between packets
and how many may be missing, by default ``500x5``), MANX_BGP_ENGINE (``auto``, ``exabgp`` or
``bird``, unless the annotation ``projectcalico.org/BGPEngine`` of a BGPConfiguration says which),
MANX_USE_POD_CIDR (``true``: pods' addresses are host-local's, out of the ``podCIDRs`` that
Kubernetes gave the node, which are announced as blocks are), MANX_NAMESPACE (where the Secrets of
BGP passwords are; by default the pod's own namespace, else kube-system).
"""

from __future__ import annotations

import logging
import os
import signal
import sys

import bird_glue.lean  # noqa: F401 - what follows imports what it keeps out
from bird_glue.agent import Agent, AlreadyRunningError
from bird_glue.choice import AUTO
from bird_glue.detector import Timing
from bird_glue.limits import parse_limit
from bird_glue.settings import parse_router_id
from bird_glue.status import StatusError, leave
from datastore.connect import connect
from datastore.environment import Environment, configure_logging

_log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Run a command of the program; exits with 1 when it fails, 2 when it isn't one."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        environment = Environment.load()
        if words in ([], ["run"]):
            _run(environment)
        elif words == ["leave"]:
            leave(environment.run_dir)
        else:
            print(__doc__, file=sys.stderr)
            sys.exit(0 if words in (["-h"], ["--help"]) else 2)
    except (ValueError, OSError, AlreadyRunningError, StatusError) as error:
        sys.exit(f"manx-bird-glue: {error}")


def _run(environment: Environment) -> None:
    configure_logging(environment, "manx-bird-glue")
    agent = Agent(
        environment.node,
        environment.run_dir,
        connect(environment.datastore),
        router_id=parse_router_id(os.environ.get("MANX_ROUTER_ID", "")),
        bfd=Timing.parse(os.environ.get("MANX_BFD", "")),
        receive_limit=parse_limit(os.environ.get("MANX_RECEIVE_LIMIT", "")),
        engine=os.environ.get("MANX_BGP_ENGINE", "") or AUTO,
        pod_cidrs=os.environ.get("MANX_USE_POD_CIDR", "").lower() == "true",
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()


if __name__ == "__main__":
    main()
