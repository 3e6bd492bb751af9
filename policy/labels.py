"""Names of the labels that say where an endpoint comes from."""

from __future__ import annotations

# On the endpoint itself.
NAMESPACE = "projectcalico.org/namespace"
ORCHESTRATOR = "projectcalico.org/orchestrator"
SERVICE_ACCOUNT = "projectcalico.org/serviceaccount"

# Before the labels inherited from its namespace and its service account, by profile.
NAMESPACE_PREFIX = "pcns."
SERVICE_ACCOUNT_PREFIX = "pcsa."
NAME = "projectcalico.org/name"  # behind either prefix: the name of the namespace or account
