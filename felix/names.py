"""Names of what felix makes in the kernel. Everything begins with ``cali``: that is how it is ours.

Limits: a chain name has at most 28 characters (iptables-extensions(8)), a set name 31
(ipset(8)), an interface name 15.
"""

from __future__ import annotations

import base64
import hashlib
import re

from policy.model import Direction, EndpointId, PolicyId

FORWARD = "cali-FORWARD"
INPUT = "cali-INPUT"
OUTPUT = "cali-OUTPUT"
PREROUTING = "cali-PREROUTING"
ALLOWED_SOURCES = "cali-rpf-skip"
POSTROUTING = "cali-POSTROUTING"
WORKLOAD_TO_HOST = "cali-wl-to-host"
FROM_WORKLOAD = "cali-from-wl-dispatch"
TO_WORKLOAD = "cali-to-wl-dispatch"
FROM_HOST = "cali-from-host-endpoint"
TO_HOST = "cali-to-host-endpoint"
FROM_HOST_FORWARD = "cali-from-hep-forward"
TO_HOST_FORWARD = "cali-to-hep-forward"
FAILSAFE_IN = "cali-failsafe-in"
FAILSAFE_OUT = "cali-failsafe-out"
SERVICE_LOOPS = "cali-cidr-block"
IPVS_INPUT = "cali-ipvs-input"
IPVS_OUTPUT = "cali-ipvs-output"
IPVS_WORKLOAD = "cali-ipvs-wl"
IPVS_ENTRY = "cali-ipvs-hep"
FROM_IPVS_WORKLOAD = "cali-ipvs-wl-dispatch"
FROM_IPVS_ENTRY = "cali-ipvs-hep-forward"
FROM_WORKLOAD_ADDRESS = "cali-from-wl-address"
NAT_OUTGOING = "cali-nat-outgoing"
FLOATING_DNAT = "cali-fip-dnat"
FLOATING_SNAT = "cali-fip-snat"

# Stands for a host endpoint of all interfaces in chains' names: longer than any interface's.
ANY_INTERFACE = "any-interface-here"

VXLAN_DEVICE = "vxlan.calico"
IPVS_DEVICE = "kube-ipvs0"  # kube-proxy's: it has the addresses of services

# Sets of felix's own, beside the engine's. A colon keeps them apart from no one: engine ids
# begin with "s:" or "n:", constant lists with "c:".
ALL_POOLS = "all-ipam-pools"
MASQUERADE_POOLS = "masq-ipam-pools"
VXLAN_NODES = "all-vxlan-net"
ALL_HOSTS = "all-hosts-net"
SERVICE_ADDRESSES = "kube-ipvs-addresses"

MAX_CHAIN = 28
MAX_SET = 31

_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")

_POLICY_PREFIX = {Direction.INGRESS: "cali-pi-", Direction.EGRESS: "cali-po-"}
_PROFILE_PREFIX = {Direction.INGRESS: "cali-pri-", Direction.EGRESS: "cali-pro-"}


def digest(text: str, length: int) -> str:
    """``length`` characters that stand for ``text``: URL-safe base64 of its SHA-224."""
    return base64.urlsafe_b64encode(hashlib.sha224(text.encode()).digest()).decode()[:length]


def is_interface(name: str) -> bool:
    """Whether ``name`` can be an interface's name and part of a chain's."""
    return _INTERFACE.fullmatch(name) is not None and name not in (".", "..")


def endpoint_chain(direction: Direction, interface: str) -> str:
    """``cali-tw-<interface>``: to the workload; ``cali-fw-<interface>``: from it."""
    return f"cali-{'tw' if direction is Direction.INGRESS else 'fw'}-{interface}"


def host_chain(direction: Direction, interface: str, *, forward: bool) -> str:
    """``cali-fh-<interface>``: into the host; ``cali-th-…``: out of it.

    For what is forwarded through the interface ``cali-fhfw-…`` and ``cali-thfw-…``.
    """
    way = "fh" if direction is Direction.INGRESS else "th"
    return f"cali-{way}{'fw' if forward else ''}-{interface}"


def policy_chain(direction: Direction, policy: PolicyId) -> str:
    """The chain of a policy (``cali-pi-…``, ``cali-po-…``) or profile (``cali-pri-…``)."""
    prefix = (_PROFILE_PREFIX if policy.kind == "Profile" else _POLICY_PREFIX)[direction]
    return prefix + digest("/".join(policy), MAX_CHAIN - len(prefix))


def index_chain(direction: Direction, place: str) -> str:
    """The chain of an index (``cali-xi-…``, ``cali-xo-…``), by where it is used first."""
    prefix = f"cali-x{'i' if direction is Direction.INGRESS else 'o'}-"
    return prefix + digest(place, MAX_CHAIN - len(prefix))


def set_name(set_id: str, version: int) -> str:
    """The kernel's name of a set in one IP version: ``cali40…`` for IPv4, ``cali60…`` for IPv6."""
    prefix = f"cali{version}0"
    room = MAX_SET - len(prefix)
    if len(set_id) <= room:
        return prefix + set_id
    # The engine's ids are hashes already, so their head is as good as a hash of them.
    if set_id[1:2] == ":":
        return prefix + set_id[:room]
    return prefix + digest(set_id, room)


def endpoint_text(endpoint: EndpointId) -> str:
    """How people write it: ``default/node1-k8s-web-eth0``."""
    return f"{endpoint.namespace}/{endpoint.name}" if endpoint.namespace else endpoint.name
