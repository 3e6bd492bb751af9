"""Names of the labels that say where an endpoint comes from."""

from __future__ import annotations

from api.pods import (
    NAME,
    NAMESPACE,
    NAMESPACE_PREFIX,
    ORCHESTRATOR,
    SERVICE_ACCOUNT,
    SERVICE_ACCOUNT_PREFIX,
)

__all__ = [
    "NAME",
    "NAMESPACE",
    "NAMESPACE_PREFIX",
    "ORCHESTRATOR",
    "SERVICE_ACCOUNT",
    "SERVICE_ACCOUNT_PREFIX",
]
