"""Fabric documents the tests start from."""

from __future__ import annotations

import copy
import uuid
from typing import Any

JSON = dict[str, Any]

# Two racks, one with each kind of router, and the reference plugins instead of Manx.
SMALL: JSON = {
    "apiVersion": "lab.manx.dev/v1alpha1",
    "kind": "Fabric",
    "metadata": {"name": "small"},
    "spec": {
        "racks": [
            {
                "name": "rack-1",
                "subnet": "172.31.1.0/24",
                "tor": {"name": "tor-1", "asNumber": 65001, "router": "bird"},
                "nodes": [
                    {"name": "node-1a", "address": "172.31.1.11", "asNumber": 65001},
                    {"name": "node-1b", "address": "172.31.1.12", "asNumber": 65001},
                ],
            },
            {
                "name": "rack-2",
                "subnet": "172.31.2.0/24",
                "tor": {"name": "tor-2", "asNumber": 65002, "router": "frr"},
                "nodes": [{"name": "node-2a", "address": "172.31.2.11", "asNumber": 65002}],
            },
        ],
        "links": [{"between": ["tor-1", "tor-2"], "subnet": "172.31.255.0/31"}],
        "hosts": [{"name": "outside", "router": "tor-2", "address": "198.51.100.10/24"}],
        "resources": [
            {
                "apiVersion": "projectcalico.org/v3",
                "kind": "IPPool",
                "metadata": {"name": "pods"},
                "spec": {"cidr": "10.65.0.0/16"},
            },
            {
                "apiVersion": "projectcalico.org/v3",
                "kind": "BGPPeer",
                "metadata": {"name": "tor-1"},
                "spec": {"peerIP": "172.31.1.1", "asNumber": 65001},
            },
        ],
        "pods": [
            {"name": "a", "node": "node-1a", "labels": {"app": "a"}},
            {"name": "b", "node": "node-1a"},
        ],
        "cni": {
            "binDir": "/usr/lib/cni",
            "conflist": {
                "cniVersion": "1.0.0",
                "name": "reference",
                "plugins": [
                    {
                        "type": "ptp",
                        "ipam": {
                            "type": "host-local",
                            "ranges": [[{"subnet": "10.65.0.0/24"}]],
                            "routes": [{"dst": "0.0.0.0/0"}],
                        },
                    }
                ],
            },
        },
    },
}


def small() -> JSON:
    """A copy of ``SMALL`` to change."""
    return copy.deepcopy(SMALL)


def lab_name() -> str:
    """A name no other test or lab on the machine uses."""
    return f"test-{uuid.uuid4().hex[:10]}"
