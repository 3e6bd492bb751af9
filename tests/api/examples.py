"""One object of every kind with every field it can have (choices: several objects)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from api.kinds import (
    ADMIN_POLICY,
    CALICO,
    CLUSTER_POLICY,
    COORDINATION,
    CORE,
    DISCOVERY,
    NETWORKING,
)

JSON = dict[str, Any]

META: JSON = {
    "labels": {"a": "b"},
    "annotations": {"example.com/note": "text"},
    "uid": "5c3c5a3e-0000-0000-0000-000000000000",
    "generation": 1,
    "creationTimestamp": "2030-01-31T12:00:00Z",
}


def v3(kind: str, spec: JSON, *, name: str = "x", namespace: str = "", **rest: Any) -> JSON:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {}) | META
    return {"apiVersion": CALICO, "kind": kind, "metadata": metadata, "spec": spec, **rest}


def kubernetes(version: str, kind: str, namespace: str = "", **rest: Any) -> JSON:
    metadata = {"name": "x"} | ({"namespace": namespace} if namespace else {}) | META
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest}


ENTITY: JSON = {
    "nets": ["10.0.0.0/8"],
    "notNets": ["10.1.0.0/16"],
    "selector": "app == 'web'",
    "notSelector": "has(old)",
    "namespaceSelector": "all()",
    "ports": [80, "8000:8080", "http"],
    "notPorts": [8079],
    "serviceAccounts": {"names": ["robot"], "selector": "has(role)"},
}
SERVICES: JSON = {"services": {"name": "web", "namespace": "shop"}}
RULE: JSON = {
    "action": "Allow",
    "ipVersion": 4,
    "protocol": "TCP",
    "notProtocol": 17,
    "source": ENTITY,
    "destination": ENTITY,
    "http": {"methods": ["GET"], "paths": [{"exact": "/a"}, {"prefix": "/b"}]},
    "metadata": {"annotations": {"example.com/why": "because"}},
}
PING: JSON = {
    "action": "Log",
    "protocol": "ICMP",
    "icmp": {"type": 8, "code": 0},
    "notICMP": {"type": 3},
}
POLICY: JSON = {
    "tier": "security",
    "order": 10.5,
    "selector": "app == 'web'",
    "serviceAccountSelector": "has(role)",
    "types": ["Ingress", "Egress"],
    "ingress": [RULE, PING, {"action": "Deny", "source": SERVICES}],
    "egress": [{"action": "Pass", "destination": SERVICES}],
    "performanceHints": ["AssumeNeededOnEveryNode"],
}
HOSTS: JSON = {"namespaceSelector": "has(team)", "applyOnForward": True}
BEFORE_NAT: JSON = HOSTS | {"preDNAT": True, "types": ["Ingress"], "egress": []}

POD_SELECTOR: JSON = {
    "matchLabels": {"app": "web"},
    "matchExpressions": [{"key": "tier", "operator": "In", "values": ["a"]}],
}
KUBERNETES_POLICY: JSON = {
    "podSelector": POD_SELECTOR,
    "policyTypes": ["Ingress", "Egress"],
    "ingress": [
        {
            "from": [
                {"podSelector": POD_SELECTOR, "namespaceSelector": {}},
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
            ],
            "ports": [{"protocol": "TCP", "port": 80, "endPort": 90}],
        }
    ],
    "egress": [{"to": [{"namespaceSelector": {}}], "ports": [{"protocol": "UDP", "port": "dns"}]}],
}

CONDITION: JSON = {
    "type": "Ready",
    "status": "True",
    "reason": "Made",
    "message": "",
    "lastTransitionTime": "2030-01-31T12:00:00Z",
    "observedGeneration": 1,
}
PASSWORD: JSON = {"secretKeyRef": {"name": "bgp", "key": "password", "optional": True}}
DAEMON: JSON = {
    "state": "Ready",
    "version": "2.0.12",
    "routerID": "192.0.2.1",
    "lastBootTime": "2030-01-31 12:00:00",
    "lastReconfigurationTime": "2030-01-31 12:00:00",
}
SESSION: JSON = {
    "peerIP": "192.0.2.1",
    "type": "NodeMesh",
    "state": "Established",
    "since": "12:00",
}
ROUTE: JSON = {
    "type": "FIB",
    "destination": "10.0.0.0/26",
    "gateway": "192.0.2.1",
    "interface": "eth0",
    "learnedFrom": {"sourceType": "BGPPeer", "peerIP": "192.0.2.1"},
}


def filter_rule(cidr: str, longest: int) -> JSON:
    return {
        "cidr": cidr,
        "matchOperator": "In",
        "prefixLength": {"min": 16, "max": longest},
        "source": "RemotePeers",
        "interface": "eth*",
        "peerType": "eBGP",
        "communities": {"values": ["64512:120"]},
        "asPathPrefix": [64512],
        "priority": 100,
        "action": "Accept",
        "operations": [
            {"addCommunity": {"value": "64512:1:2"}},
            {"prependASPath": {"prefix": [64513, 64514]}},
            {"setPriority": {"value": 5}},
        ],
    }


CONTROLLERS: JSON = {
    "node": {
        "reconcilerPeriod": "5m0s",
        "syncLabels": "Enabled",
        "leakGracePeriod": "15m0s",
        "hostEndpoint": {
            "autoCreate": "Enabled",
            "createDefaultHostEndpoint": "Disabled",
            "templates": [
                {
                    "generateName": "uplink",
                    "interfaceCIDRs": ["10.0.0.0/8"],
                    "interfacePattern": "eth.*",
                    "labels": {"role": "uplink"},
                    "annotations": {"example.com/note": "text"},
                    "nodeSelector": "has(rack)",
                }
            ],
        },
    },
    "policy": {"reconcilerPeriod": "5m0s"},
    "workloadEndpoint": {"reconcilerPeriod": "5m0s"},
    "serviceAccount": {"reconcilerPeriod": "5m0s"},
    "namespace": {"reconcilerPeriod": "5m0s"},
    "loadBalancer": {"assignIPs": "RequestedServicesOnly"},
    "migration": {"policyNameMigrator": "Disabled"},
    "policyMigration": {"enabled": "Disabled"},
}
CONTROLLERS_SPEC: JSON = {
    "logSeverityScreen": "Info",
    "healthChecks": "Enabled",
    "etcdV3CompactionPeriod": "10m0s",
    "prometheusMetricsPort": 9094,
    "debugProfilePort": 6060,
    "controllers": CONTROLLERS,
}
CLUSTER_RULE: JSON = {
    "name": "rule",
    "action": "Pass",
    "protocols": [
        {"tcp": {"destinationPort": {"number": 80}}},
        {"udp": {"destinationPort": {"range": {"start": 1, "end": 9}}}},
        {"sctp": {"destinationPort": {"number": 80}}},
    ],
}
ADMIN_RULE: JSON = {
    "name": "rule",
    "action": "Deny",
    "ports": [
        {"portNumber": {"protocol": "UDP", "port": 53}},
        {"portRange": {"protocol": "SCTP", "start": 80, "end": 90}},
        {"namedPort": "http"},
    ],
}
PODS: JSON = {"pods": {"namespaceSelector": {}, "podSelector": POD_SELECTOR}}

CALICO_EXAMPLES: list[JSON] = [
    v3(
        "IPPool",
        {
            "cidr": "10.0.0.0/16",
            "blockSize": 27,
            "ipipMode": "Never",
            "vxlanMode": "CrossSubnet",
            "natOutgoing": True,
            "disabled": True,
            "disableBGPExport": True,
            "nodeSelector": "rack == 'a'",
            "namespaceSelector": "has(team)",
            "allowedUses": ["Workload"],
            "assignmentMode": "Manual",
        },
        status={"conditions": [CONDITION]},
    ),
    v3("IPReservation", {"reservedCIDRs": ["10.0.0.0/30", "10.0.0.7/31"]}),
    v3(
        "BGPConfiguration",
        {
            "logSeverityScreen": "Debug",
            "nodeToNodeMeshEnabled": True,
            "asNumber": 64512,
            "serviceLoadBalancerIPs": [{"cidr": "192.0.2.0/24"}],
            "serviceExternalIPs": [{"cidr": "192.0.2.0/24"}],
            "serviceClusterIPs": [{"cidr": "10.96.0.0/12"}],
            "serviceLoadBalancerAggregation": "Disabled",
            "communities": [{"name": "mine", "value": "64512:120"}],
            "prefixAdvertisements": [
                {"cidr": "10.0.0.0/8", "communities": ["mine", "64512:1:2"]},
            ],
            "listenPort": 1790,
            "nodeMeshPassword": PASSWORD,
            "nodeMeshMaxRestartTime": "2m0s",
            "bindMode": "NodeIP",
            "ignoredInterfaces": ["docker*"],
            "localWorkloadPeeringIPV4": "192.0.2.9",
            "localWorkloadPeeringIPV6": "2001:db8::9",
            "programClusterRoutes": "Enabled",
            "ipv4NormalRoutePriority": 1000,
            "ipv6NormalRoutePriority": 1000,
        },
    ),
    v3(
        "BGPPeer",
        {
            "node": "node-1",
            "peerIP": "192.0.2.1:1790",
            "asNumber": 65001,
            "localASNumber": 64999,
            "nextHopMode": "Self",
            "password": PASSWORD,
            "sourceAddress": "None",
            "maxRestartTime": "2m0s",
            "keepaliveTime": "20s",
            "numAllowedLocalASNumbers": 2,
            "ttlSecurity": 1,
            "reachableBy": "192.0.2.254",
            "filters": ["only-pods"],
            "reversePeering": "Manual",
        },
    ),
    v3(
        "BGPPeer",
        {
            "nodeSelector": "rack == 'a'",
            "peerSelector": "has(rr)",
            "keepOriginalNextHop": True,
            "sourceAddress": "UseNodeIP",
        },
    ),
    v3(
        "BGPPeer",
        {
            "localWorkloadSelector": "app == 'router'",
            "asNumber": 65001,
            "sourceAddress": "UseNodeIP",
        },
    ),
    v3(
        "BGPFilter",
        {
            "exportV4": [filter_rule("10.0.0.0/8", 26), {"action": "Reject"}],
            "importV4": [filter_rule("10.0.0.0/8", 32)],
            "exportV6": [filter_rule("fd00::/8", 122)],
            "importV6": [{"action": "Reject"}],
        },
    ),
    v3(
        "Node",
        {
            "bgp": {
                "asNumber": 64512,
                "ipv4Address": "172.31.1.11/24",
                "ipv6Address": "fd00:1::11/64",
                "ipv4IPIPTunnelAddr": "10.0.0.1",
                "routeReflectorClusterID": "1.0.0.1",
            },
            "ipv4VXLANTunnelAddr": "10.0.0.2",
            "vxlanTunnelMACAddr": "66:00:00:00:00:01",
            "ipv6VXLANTunnelAddr": "fd00::2",
            "vxlanTunnelMACAddrV6": "66:00:00:00:00:02",
            "orchRefs": [{"nodeName": "node-1", "orchestrator": "k8s"}],
            "wireguard": {"interfaceIPv4Address": "10.0.0.3", "interfaceIPv6Address": "fd00::3"},
            "addresses": [
                {"address": "172.31.1.11/24", "type": "CalicoNodeIP"},
                {"address": "172.31.1.11", "type": "InternalIP"},
            ],
            "interfaces": [{"name": "enP2p1s0", "addresses": ["172.31.1.11"]}],
        },
        status={
            "wireguardPublicKey": "jlkVyQYooZYzI2wFfNhSZez5eWh44yfq1wKVjLvSXgY=",
            "wireguardPublicKeyV6": "jlkVyQYooZYzI2wFfNhSZez5eWh44yfq1wKVjLvSXgY=",
            "podCIDRs": ["10.244.0.0/24"],
        },
    ),
    v3(
        "CalicoNodeStatus",
        {"node": "node-1", "classes": ["Agent", "BGP", "Routes"], "updatePeriodSeconds": 10},
        status={
            "lastUpdated": "2030-01-31T12:00:00Z",
            "agent": {"birdV4": DAEMON, "birdV6": DAEMON},
            "bgp": {
                "numberEstablishedV4": 1,
                "numberNotEstablishedV4": 0,
                "numberEstablishedV6": 1,
                "numberNotEstablishedV6": 0,
                "peersV4": [SESSION],
                "peersV6": [SESSION],
            },
            "routes": {"routesV4": [ROUTE], "routesV6": [ROUTE]},
        },
    ),
    v3(
        "WorkloadEndpoint",
        {
            "orchestrator": "k8s",
            "workload": "web",
            "node": "node-1",
            "containerID": "c0ffee",
            "pod": "web",
            "endpoint": "eth0",
            "serviceAccountName": "robot",
            "ipNetworks": ["10.0.0.5/32", "fd00::5/128"],
            "ipNATs": [{"internalIP": "10.0.0.5", "externalIP": "192.0.2.5"}],
            "ipv4Gateway": "169.254.1.1",
            "ipv6Gateway": "fe80::1",
            "profiles": ["kns.shop"],
            "interfaceName": "cali12d4a061371",
            "mac": "ee:ee:ee:ee:ee:ee",
            "ports": [
                {
                    "name": "http",
                    "protocol": "TCP",
                    "port": 80,
                    "hostPort": 8080,
                    "hostIP": "192.0.2.1",
                }
            ],
            "allowSpoofedSourcePrefixes": ["192.0.2.0/24"],
            "qosControls": {
                "ingressBandwidth": 1000,
                "ingressBurst": 1000,
                "ingressPeakrate": 1000,
                "ingressMinburst": 1000,
                "egressBandwidth": 1000,
                "egressBurst": 1000,
                "egressPeakrate": 1000,
                "egressMinburst": 1000,
                "ingressPacketRate": 10,
                "ingressPacketBurst": 10,
                "egressPacketRate": 10,
                "egressPacketBurst": 10,
                "ingressMaxConnections": 5,
                "egressMaxConnections": 5,
                "dscp": "EF",
            },
        },
        namespace="shop",
    ),
    v3(
        "HostEndpoint",
        {
            "node": "node-1",
            "interfaceName": "eth0",
            "expectedIPs": ["172.31.1.11", "fd00:1::11"],
            "profiles": ["hosts"],
            "ports": [{"name": "ssh", "protocol": "TCP", "port": 22}],
        },
    ),
    v3(
        "Profile",
        {
            "ingress": [RULE],
            "egress": [{"action": "Allow"}],
            "labelsToApply": {"pcns.team": "red"},
        },
    ),
    v3("NetworkPolicy", POLICY, namespace="shop"),
    v3("GlobalNetworkPolicy", POLICY | HOSTS | {"doNotTrack": True}),
    v3("GlobalNetworkPolicy", POLICY | BEFORE_NAT),
    v3("Tier", {"order": 500, "defaultAction": "Pass"}, status={"conditions": [CONDITION]}),
    v3("StagedNetworkPolicy", POLICY | {"stagedAction": "Set"}, namespace="shop"),
    v3("StagedNetworkPolicy", {"stagedAction": "Delete", "tier": "default"}, namespace="shop"),
    v3("StagedGlobalNetworkPolicy", POLICY | HOSTS | {"stagedAction": "Learn", "doNotTrack": True}),
    v3("StagedGlobalNetworkPolicy", POLICY | BEFORE_NAT | {"stagedAction": "Ignore"}),
    v3(
        "StagedKubernetesNetworkPolicy",
        KUBERNETES_POLICY | {"stagedAction": "Set"},
        namespace="shop",
    ),
    v3("NetworkSet", {"nets": ["192.0.2.0/24", "192.0.2.1", "2001:db8::1/64"]}, namespace="shop"),
    v3("GlobalNetworkSet", {"nets": ["192.0.2.0/24"]}),
    v3(
        "KubeControllersConfiguration",
        CONTROLLERS_SPEC,
        status={
            "runningConfig": CONTROLLERS_SPEC,
            "environmentVars": {"LOG_LEVEL": "info"},
        },
    ),
    v3(
        "ClusterInformation",
        {
            "clusterGUID": "0123456789abcdef",
            "clusterType": "k8s,bgp",
            "calicoVersion": "v3.33.0",
            "datastoreReady": True,
            "variant": "Calico",
        },
        name="default",
    ),
    v3(
        "IPAMBlock",
        {
            "cidr": "10.0.0.0/30",
            "affinity": "host:node-1",
            "affinityClaimTime": "2030-01-31T12:00:00Z",
            "allocations": [0, None, None, None],
            "unallocated": [1, 2, 3],
            "attributes": [
                {
                    "handle_id": "k8s-pod-network.c0ffee",
                    "secondary": {"pod": "web"},
                    "alternateOwnerAttrs": {"pod": "other"},
                    "releasedAt": "2030-01-31T12:00:00Z",
                }
            ],
            "sequenceNumber": 7,
            "sequenceNumberForAllocation": {"0": 6},
            "deleted": False,
            "strictAffinity": False,
        },
        name="10-0-0-0-30",
    ),
    v3(
        "BlockAffinity",
        {
            "state": "confirmed",
            "node": "node-1",
            "type": "host",
            "cidr": "10.0.0.0/30",
            "deleted": False,
        },
        name="node-1-10-0-0-0-30",
    ),
    v3(
        "IPAMHandle",
        {
            "handleID": "k8s-pod-network.C0FFEE",
            "block": {"10.0.0.0/30": 1},
            "deleted": False,
        },
        name="k8s-pod-network.c0ffee",
    ),
    v3(
        "IPAMConfiguration",
        {
            "strictAffinity": True,
            "autoAllocateBlocks": True,
            "maxBlocksPerHost": 4,
            "kubeVirtVMAddressPersistence": "Disabled",
            "ipCooldownSeconds": 60,
        },
        name="default",
    ),
]

KUBERNETES_EXAMPLES: list[JSON] = [
    kubernetes(CORE, "Namespace"),
    kubernetes(CORE, "ServiceAccount", "shop"),
    kubernetes(
        CORE,
        "Node",
        spec={"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"], "unschedulable": True},
        status={
            "addresses": [{"type": "InternalIP", "address": "172.31.1.11"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    ),
    kubernetes(
        CORE,
        "Pod",
        "shop",
        spec={
            "nodeName": "node-1",
            "hostNetwork": True,
            "serviceAccountName": "robot",
            "containers": [
                {
                    "name": "web",
                    "ports": [
                        {
                            "name": "http",
                            "containerPort": 80,
                            "protocol": "TCP",
                            "hostPort": 80,
                            "hostIP": "192.0.2.1",
                        }
                    ],
                }
            ],
            "initContainers": [{"name": "first"}],
        },
        status={"phase": "Running", "podIP": "10.0.0.5", "podIPs": [{"ip": "10.0.0.5"}]},
    ),
    kubernetes(
        CORE,
        "Service",
        "shop",
        spec={
            "type": "LoadBalancer",
            "selector": {"app": "web"},
            "ports": [
                {
                    "name": "http",
                    "protocol": "TCP",
                    "port": 80,
                    "targetPort": "http",
                    "nodePort": 30080,
                }
            ],
            "clusterIP": "10.96.0.7",
            "clusterIPs": ["10.96.0.7"],
            "externalIPs": ["192.0.2.7"],
            "loadBalancerIP": "192.0.2.8",
            "loadBalancerClass": "example.com/manx",
            "loadBalancerSourceRanges": ["198.51.100.0/24"],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "externalTrafficPolicy": "Local",
            "internalTrafficPolicy": "Cluster",
            "healthCheckNodePort": 30081,
            "publishNotReadyAddresses": True,
        },
        status={
            "loadBalancer": {"ingress": [{"ip": "192.0.2.8", "hostname": "lb", "ipMode": "VIP"}]}
        },
    ),
    kubernetes(NETWORKING, "ServiceCIDR", spec={"cidrs": ["10.96.0.0/16", "fd00:96::/112"]}),
    kubernetes(
        DISCOVERY,
        "EndpointSlice",
        "shop",
        addressType="IPv4",
        endpoints=[
            {
                "addresses": ["10.0.0.5"],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "hostname": "web",
                "nodeName": "node-1",
                "zone": "a",
                "targetRef": {"kind": "Pod", "namespace": "shop", "name": "web"},
            }
        ],
        ports=[{"name": "http", "protocol": "TCP", "port": 80}],
    ),
    kubernetes(
        CORE,
        "Secret",
        "kube-system",
        type="Opaque",
        immutable=False,
        data={"password": "c2VjcmV0"},
        stringData={"other": "text"},
    ),
    kubernetes(
        COORDINATION,
        "Lease",
        "kube-system",
        spec={
            "holderIdentity": "controllers-1",
            "leaseDurationSeconds": 15,
            "acquireTime": "2030-01-31T12:00:00.000000Z",
            "renewTime": "2030-01-31T12:00:02.000000Z",
            "leaseTransitions": 3,
        },
    ),
    kubernetes(NETWORKING, "NetworkPolicy", "shop", spec=KUBERNETES_POLICY),
    kubernetes(
        CLUSTER_POLICY,
        "ClusterNetworkPolicy",
        spec={
            "tier": "Admin",
            "priority": 10,
            "subject": PODS,
            "ingress": [CLUSTER_RULE | {"from": [{"namespaces": POD_SELECTOR}, PODS]}],
            "egress": [
                CLUSTER_RULE
                | {
                    "to": [
                        {"namespaces": {}},
                        PODS,
                        {"nodes": POD_SELECTOR},
                        {"networks": ["192.0.2.0/24"]},
                        {"domainNames": ["*.example.com"]},
                    ]
                },
                {
                    "action": "Deny",
                    "to": [{"namespaces": {}}],
                    "protocols": [{"destinationNamedPort": "http"}],
                },
            ],
        },
        status={"conditions": [CONDITION]},
    ),
    kubernetes(
        CLUSTER_POLICY,
        "ClusterNetworkPolicy",
        spec={"tier": "Baseline", "priority": 0, "subject": {"namespaces": {}}},
    ),
    kubernetes(
        ADMIN_POLICY,
        "AdminNetworkPolicy",
        spec={
            "priority": 10,
            "subject": PODS,
            "ingress": [ADMIN_RULE | {"from": [{"namespaces": POD_SELECTOR}, PODS]}],
            "egress": [ADMIN_RULE | {"action": "Pass", "to": [{"networks": ["192.0.2.0/24"]}]}],
        },
        status={"conditions": [CONDITION]},
    ),
    kubernetes(
        ADMIN_POLICY,
        "BaselineAdminNetworkPolicy",
        spec={
            "subject": {"namespaces": {}},
            "ingress": [ADMIN_RULE | {"from": [PODS]}],
            "egress": [ADMIN_RULE | {"to": [{"nodes": POD_SELECTOR}]}],
        },
        status={"conditions": [CONDITION]},
    )
    | {"metadata": META | {"name": "default"}},
]

EXAMPLES = CALICO_EXAMPLES + KUBERNETES_EXAMPLES


def fields_used(model: BaseModel) -> Iterator[tuple[type[BaseModel], str]]:
    """Every field of an object, and of the objects in it, that is set."""
    for name in model.model_fields_set:
        yield type(model), name
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                yield from fields_used(item)
