"""CustomResourceDefinitions, generated from the models of ``api``.

One file a kind in ``manifests/crds/``. The result depends on nothing but the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api.kinds import ADMIN_POLICY, CALICO, CLUSTER_POLICY, KINDS, Kind
from manifests.files import render
from manifests.schema import resource_schema

DIRECTORY = Path(__file__).parent / "crds"

# With Kubernetes, these are read from Nodes, Pods, Namespaces and ServiceAccounts.
DERIVED = frozenset(("Node", "WorkloadEndpoint", "Profile"))

# title, type, path, and (where it is not obvious) what the column says
COLUMNS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "BGPPeer": (
        ("Node", "string", ".spec.node"),
        ("Node Selector", "string", ".spec.nodeSelector"),
        ("Peer IP", "string", ".spec.peerIP"),
        ("Peer Selector", "string", ".spec.peerSelector"),
        ("Peer ASN", "string", ".spec.asNumber"),
    ),
    "BGPConfiguration": (
        ("Mesh", "boolean", ".spec.nodeToNodeMeshEnabled"),
        ("ASN", "string", ".spec.asNumber"),
    ),
    "BlockAffinity": (
        ("CIDR", "string", ".spec.cidr"),
        ("Node", "string", ".spec.node"),
        ("Type", "string", ".spec.type"),
        ("State", "string", ".spec.state"),
    ),
    "CalicoNodeStatus": (
        ("Node", "string", ".spec.node"),
        ("Classes", "string", ".spec.classes"),
        ("Updated", "date", ".status.lastUpdated"),
    ),
    "ClusterInformation": (
        ("Version", "string", ".spec.calicoVersion"),
        ("Ready", "boolean", ".spec.datastoreReady"),
        ("Types", "string", ".spec.clusterType"),
    ),
    "HostEndpoint": (
        ("Node", "string", ".spec.node"),
        ("Interface", "string", ".spec.interfaceName"),
    ),
    "IPAMBlock": (
        ("CIDR", "string", ".spec.cidr"),
        ("Affinity", "string", ".spec.affinity"),
        ("ClaimTime", "date", ".spec.affinityClaimTime"),
    ),
    "IPAMConfiguration": (
        ("StrictAffinity", "boolean", ".spec.strictAffinity"),
        ("MaxBlocksPerHost", "integer", ".spec.maxBlocksPerHost"),
        ("AutoAllocateBlocks", "boolean", ".spec.autoAllocateBlocks"),
    ),
    "IPAMHandle": (("ID", "string", ".spec.handleID"),),
    "IPPool": (
        ("CIDR", "string", ".spec.cidr"),
        ("VXLAN", "string", ".spec.vxlanMode"),
        ("IPIP", "string", ".spec.ipipMode"),
        ("NAT", "boolean", ".spec.natOutgoing"),
        ("Allocatable", "string", ".status.conditions[?(@.type=='Allocatable')].status"),
    ),
    "Tier": (
        ("Order", "number", ".spec.order"),
        ("DefaultAction", "string", ".spec.defaultAction"),
        ("Status", "string", ".status.conditions[?(@.type=='Ready')].reason"),
    ),
    "ClusterNetworkPolicy": (
        ("Tier", "string", ".spec.tier"),
        ("Priority", "string", ".spec.priority"),
    ),
    "AdminNetworkPolicy": (("Priority", "string", ".spec.priority"),),
} | dict.fromkeys(
    (
        *("NetworkPolicy", "GlobalNetworkPolicy"),
        *("StagedNetworkPolicy", "StagedGlobalNetworkPolicy"),
    ),
    (("Tier", "string", ".spec.tier"), ("Order", "number", ".spec.order")),
)
AGE = ("Age", "date", ".metadata.creationTimestamp")

# ``kubectl get --field-selector``
SELECTABLE: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    (
        *("NetworkPolicy", "GlobalNetworkPolicy"),
        *("StagedNetworkPolicy", "StagedGlobalNetworkPolicy"),
    ),
    (".spec.tier",),
) | {
    "BlockAffinity": (".spec.node",)  # of which every node lists its own
}

# Short names beyond those of Calico's CRDs are for manxctl: in a cluster they would be others'.
SHORT_NAMES: Mapping[str, tuple[str, ...]] = {
    "AdminNetworkPolicy": ("anp",),
    "BaselineAdminNetworkPolicy": ("banp",),
    "BGPConfiguration": ("bgpconfig", "bgpconfigs"),
    "BlockAffinity": ("affinity", "affinities"),
    "ClusterInformation": ("clusterinfo", "clusterinfos"),
    "FelixConfiguration": ("felixconfig", "felixconfigs"),
    "GlobalNetworkPolicy": ("gnp", "cgnp"),
    "GlobalNetworkSet": ("gns",),
    "HostEndpoint": ("hep", "heps"),
    "IPAMConfiguration": ("ipamconfig", "ipamconfigs"),
    "KubeControllersConfiguration": ("kcc", "kccs"),
    "NetworkPolicy": ("cnp", "caliconetworkpolicy"),
    "StagedGlobalNetworkPolicy": ("sgnp",),
    "StagedKubernetesNetworkPolicy": ("sknp",),
    "StagedNetworkPolicy": ("snp", "scnp"),
}

# The group belongs to Kubernetes, which asks for the place where the API was agreed on.
APPROVED = "https://github.com/kubernetes-sigs/network-policy-api/pull/347"


def kinds() -> list[Kind]:
    """The kinds that are custom resources in a Kubernetes cluster, by name."""
    versions = (CALICO, CLUSTER_POLICY, ADMIN_POLICY)
    stored = (kind for kind in KINDS.values() if kind.api_version in versions)
    return sorted((k for k in stored if k.id not in DERIVED), key=lambda kind: kind.id)


def definition(kind: Kind) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind."""
    names: dict[str, Any] = {
        "kind": kind.kind,
        "listKind": f"{kind.kind}List",
        "plural": kind.resource,
        "singular": kind.kind.lower(),
    }
    if kind.id in SHORT_NAMES:
        names["shortNames"] = list(SHORT_NAMES[kind.id])
    version: dict[str, Any] = {
        "name": kind.version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": resource_schema(kind.model)},
        "additionalPrinterColumns": [
            {"name": title, "type": type_, "jsonPath": path}
            for title, type_, path in (*COLUMNS.get(kind.id, ()), AGE)
        ],
    }
    if "status" in kind.model.model_fields:
        version["subresources"] = {"status": {}}
    if kind.id in SELECTABLE:
        version["selectableFields"] = [{"jsonPath": path} for path in SELECTABLE[kind.id]]
    metadata: dict[str, Any] = {"name": f"{kind.resource}.{kind.group}"}
    if kind.group.endswith(".k8s.io"):
        metadata["annotations"] = {"api-approved.kubernetes.io": APPROVED}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata,
        "spec": {
            "group": kind.group,
            "names": names,
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "versions": [version],
        },
    }


def files() -> dict[Path, str]:
    """Every file and its content."""
    return {
        DIRECTORY / f"{kind.group}_{kind.resource}.yaml": render([definition(kind)], "crds")
        for kind in kinds()
    }
