"""What a pod's endpoint and its profiles carry, from plain values of Kubernetes' objects.

For those who have models of the objects and for those who only have their JSON. Source:
libcalico-go/lib/backend/k8s/conversion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from api.names import interface_name

# On the endpoint itself; a pod can't choose them.
NAMESPACE = "projectcalico.org/namespace"
ORCHESTRATOR = "projectcalico.org/orchestrator"
SERVICE_ACCOUNT = "projectcalico.org/serviceaccount"
KUBERNETES = "k8s"

# Before the labels inherited from its namespace and its service account, by profile.
NAMESPACE_PREFIX = "pcns."
SERVICE_ACCOUNT_PREFIX = "pcsa."
NAME = "projectcalico.org/name"  # behind either prefix: the name of the namespace or account

# Annotations by which the CNI plugin tells of addresses before the kubelet does.
POD_IP = "cni.projectcalico.org/podIP"
POD_IPS = "cni.projectcalico.org/podIPs"

# How the name of the node's interface begins, where it is not DEFAULT_PREFIX. Only the beginning:
# the rest is the pod's own, so that no pod can name the interface of another.
INTERFACE_PREFIX = "cni.manx.dev/interfacePrefix"
DEFAULT_PREFIX = "cali"
_PREFIX = re.compile(r"[a-zA-Z0-9_.-]{1,4}")  # 11 hex digits follow, 15 is the kernel's limit

_FINISHED_PHASES = frozenset(("Succeeded", "Failed", "Completed"))
_LONGEST_ACCOUNT_LABEL = 62  # a longer service account name is in the profile's label only


def is_prefix(text: str) -> bool:
    """Whether names of interfaces may begin so: 1 to 4 letters, digits, '_', '.', '-'."""
    return bool(_PREFIX.fullmatch(text))


def interface(namespace: str, name: str, annotations: Mapping[str, str]) -> str:
    """The node's end of a pod's wire."""
    prefix = annotations.get(INTERFACE_PREFIX) or DEFAULT_PREFIX
    return interface_name(prefix if is_prefix(prefix) else DEFAULT_PREFIX, namespace, name)


def labels(own: Mapping[str, str], namespace: str, account: str | None) -> dict[str, str]:
    """A pod's labels and those that say where it comes from."""
    result = dict(own)
    result[NAMESPACE] = namespace
    result[ORCHESTRATOR] = KUBERNETES
    if account and len(account) <= _LONGEST_ACCOUNT_LABEL:
        result[SERVICE_ACCOUNT] = account
    return result


def own_labels(found: Mapping[str, str]) -> dict[str, str]:
    """Those that an endpoint can have of itself: none that would hide what its profiles say.

    Else a pod could pass for one of another namespace or service account. Source:
    libcalico-go/lib/backend/syncersv1/updateprocessors/workloadendpointprocessor.go.
    """
    inherited = (NAMESPACE_PREFIX, SERVICE_ACCOUNT_PREFIX)
    return {name: value for name, value in found.items() if not name.startswith(inherited)}


def profiles(namespace: str, account: str | None) -> tuple[str, ...]:
    """Names of the profiles a pod has: that of its namespace and that of its service account."""
    own = namespace_profile(namespace)
    return (own, account_profile(namespace, account)) if account else (own,)


def namespace_profile(name: str) -> str:
    """The profile of all pods in a namespace."""
    return f"kns.{name}"


def account_profile(namespace: str, account: str) -> str:
    """The profile of all pods of a service account."""
    return f"ksa.{namespace or 'default'}.{account}"


def inherited_labels(prefix: str, name: str, own: Mapping[str, str]) -> dict[str, str]:
    """The labels of a namespace or account as pods inherit them; the name can't be chosen."""
    inherited = {prefix + key: value for key, value in own.items()}
    inherited[prefix + NAME] = name
    return inherited


def finished(phase: str | None, deleting: bool, annotations: Mapping[str, str]) -> bool:
    """Whether a pod is over and its addresses may already be another's.

    While a pod is being deleted it still runs, until the CNI plugin empties its annotation.
    """
    return (deleting and annotations.get(POD_IP) == "") or phase in _FINISHED_PHASES


def addresses(
    pod_ip: str | None, pod_ips: Sequence[str], annotations: Mapping[str, str]
) -> list[str]:
    """A pod's addresses, as text. The status wins over the annotations."""
    if pod_ips:
        return list(pod_ips)
    if pod_ip:
        return [pod_ip]
    annotated = annotations.get(POD_IPS) or annotations.get(POD_IP) or ""
    return [text for text in annotated.split(",") if text]
