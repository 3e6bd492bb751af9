"""What a program of Manx is told by its environment variables, and how it logs."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

# RFC 1123 subdomain, as Kubernetes wants the names of its nodes.
_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


@dataclass(frozen=True, slots=True)
class Environment:
    """The settings all programs share.

    ``node``: this machine's node name (``MANX_NODENAME``, default: host name in lower case).
    ``datastore``: URL for ``datastore.connect`` (``MANX_DATASTORE``).
    ``run_dir``: sockets and other files of running programs (``MANX_RUN_DIR``).
    ``log_level``: one of ``LOG_LEVELS`` (``MANX_LOG_LEVEL``).
    """

    node: str
    datastore: str
    run_dir: Path
    log_level: str

    @classmethod
    def load(cls, env: Mapping[str, str] = os.environ) -> Environment:
        """Read the variables; an empty one counts as absent. Raises ValueError."""
        node = env.get("MANX_NODENAME") or socket.gethostname().lower()
        if len(node) > 253 or not _NODE_NAME.fullmatch(node):
            raise ValueError(
                f"MANX_NODENAME: {node!r}: expected a lower-case DNS name of at most 253"
                " characters, such as node-1"
            )
        run_dir = Path(env.get("MANX_RUN_DIR") or "/run/manx")
        if not run_dir.is_absolute():
            raise ValueError(f"MANX_RUN_DIR: {str(run_dir)!r}: expected an absolute path")
        level = (env.get("MANX_LOG_LEVEL") or "INFO").upper()
        if level not in LOG_LEVELS:
            raise ValueError(f"MANX_LOG_LEVEL: {level!r}: expected one of {', '.join(LOG_LEVELS)}")
        return cls(
            node=node,
            datastore=env.get("MANX_DATASTORE") or "sqlite:////var/lib/manx/datastore.db",
            run_dir=run_dir,
            log_level=level,
        )


def configure_logging(environment: Environment, program: str) -> None:
    """Log to standard error: time, level, ``program``, logger and message on one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s {program} %(name)s: %(message)s")
    )
    logging.basicConfig(level=environment.log_level, handlers=[handler], force=True)
