"""The kinds: what they are called and where their models are. Cheap to import: no model is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from api.errors import InvalidObjectError, Problem

if TYPE_CHECKING:
    from api.metadata import Resource

CALICO = "projectcalico.org/v3"
CORE = "v1"
NETWORKING = "networking.k8s.io/v1"
DISCOVERY = "discovery.k8s.io/v1"
COORDINATION = "coordination.k8s.io/v1"
CLUSTER_POLICY = "policy.networking.k8s.io/v1alpha2"
ADMIN_POLICY = "policy.networking.k8s.io/v1alpha1"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of resource. ``id`` is unique where ``kind`` is not (two NetworkPolicies).

    ``plural`` is what people write, and unique too; ``resource`` is the plural in the API's URLs.
    """

    id: str
    api_version: str
    kind: str
    plural: str
    short_names: tuple[str, ...]
    namespaced: bool
    module: str
    resource: str

    @property
    def group(self) -> str:
        """The API group; empty for Kubernetes' core."""
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        """The API version without its group: ``v3``."""
        return self.api_version.rpartition("/")[2]

    @property
    def model(self) -> type[Resource]:
        """The model; its module is imported at the first use."""
        model: type[Resource] = getattr(import_module(self.module), self.id)
        return model


def _kind(
    module: str,
    id_: str,
    plural: str,
    *short_names: str,
    namespaced: bool = False,
    api_version: str = CALICO,
    kind: str | None = None,
    resource: str | None = None,
) -> Kind:
    module = f"{__package__}.{module}"
    return Kind(
        id_, api_version, kind or id_, plural, short_names, namespaced, module, resource or plural
    )


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.id: kind
        for kind in (
            _kind("ippool", "IPPool", "ippools", "ipp", "ipps", "pool", "pools"),
            _kind(
                "ipreservation", "IPReservation", "ipreservations", "reservation", "reservations"
            ),
            _kind("bgp", "BGPConfiguration", "bgpconfigurations", "bgpconfig", "bgpconfigs"),
            _kind("bgp", "BGPPeer", "bgppeers", "bgpp", "bgpps", "bp", "bps"),
            _kind("bgpfilter", "BGPFilter", "bgpfilters", "bgpf", "bgpfs", "bf", "bfs"),
            _kind("node", "Node", "nodes", "no", "nos"),
            _kind(
                "nodestatus",
                "CalicoNodeStatus",
                "caliconodestatuses",
                *("nodestatus", "nodestatuses"),
            ),
            _kind(
                "endpoint", "WorkloadEndpoint", "workloadendpoints", "wep", "weps", namespaced=True
            ),
            _kind("hostendpoint", "HostEndpoint", "hostendpoints", "hep", "heps"),
            _kind("profile", "Profile", "profiles", "pro", "pros"),
            _kind(
                "policy",
                "NetworkPolicy",
                "networkpolicies",
                *("np", "policy", "policies", "pol", "pols", "cnp", "caliconetworkpolicy"),
                namespaced=True,
            ),
            _kind("policy", "GlobalNetworkPolicy", "globalnetworkpolicies", "gnp", "gnps", "cgnp"),
            _kind("policy", "Tier", "tiers"),
            _kind(
                "staged",
                "StagedNetworkPolicy",
                "stagednetworkpolicies",
                *("snp", "scnp", "stagedpolicy", "stagedpolicies", "spol", "spols"),
                namespaced=True,
            ),
            _kind(
                "staged",
                "StagedGlobalNetworkPolicy",
                "stagedglobalnetworkpolicies",
                *("sgnp", "sgnps"),
            ),
            _kind(
                "staged",
                "StagedKubernetesNetworkPolicy",
                "stagedkubernetesnetworkpolicies",
                *("sknp", "stagedkubernetespolicy", "stagedkubernetespolicies", "skpol", "skpols"),
                namespaced=True,
            ),
            _kind("networkset", "NetworkSet", "networksets", "netset", "netsets", namespaced=True),
            _kind("networkset", "GlobalNetworkSet", "globalnetworksets", "gns", "gnetsets"),
            _kind(
                "felix", "FelixConfiguration", "felixconfigurations", "felixconfig", "felixconfigs"
            ),
            _kind(
                "controllers",
                "KubeControllersConfiguration",
                "kubecontrollersconfigurations",
                *("kubecontrollersconfig", "kubecontrollersconfigs", "kcc", "kccs"),
            ),
            _kind(
                "clusterinformation",
                "ClusterInformation",
                "clusterinformations",
                *("clusterinfo", "clusterinfos"),
            ),
            _kind("ipam", "IPAMBlock", "ipamblocks", "block", "blocks"),
            _kind("ipam", "BlockAffinity", "blockaffinities", "affinity", "affinities"),
            _kind("ipam", "IPAMHandle", "ipamhandles", "handle", "handles"),
            _kind("ipam", "IPAMConfiguration", "ipamconfigurations", "ipamconfig", "ipamconfigs"),
            _kind("kubernetes", "Namespace", "namespaces", "ns", api_version=CORE),
            _kind("kubernetes", "Pod", "pods", "po", namespaced=True, api_version=CORE),
            _kind(
                "kubernetes",
                "KubernetesNode",
                "kubernetesnodes",
                "knode",
                "knodes",
                api_version=CORE,
                kind="Node",
                resource="nodes",
            ),
            _kind(
                "kubernetes",
                "ServiceAccount",
                "serviceaccounts",
                "sa",
                namespaced=True,
                api_version=CORE,
            ),
            _kind("secret", "Secret", "secrets", namespaced=True, api_version=CORE),
            _kind("services", "Service", "services", "svc", namespaced=True, api_version=CORE),
            _kind(
                "services",
                "EndpointSlice",
                "endpointslices",
                namespaced=True,
                api_version=DISCOVERY,
            ),
            _kind("services", "ServiceCIDR", "servicecidrs", api_version=NETWORKING),
            _kind("lease", "Lease", "leases", namespaced=True, api_version=COORDINATION),
            _kind(
                "kubernetes",
                "KubernetesNetworkPolicy",
                "kubernetesnetworkpolicies",
                *("knp", "netpol"),
                namespaced=True,
                api_version=NETWORKING,
                kind="NetworkPolicy",
                resource="networkpolicies",
            ),
            _kind(
                "clusternetworkpolicy",
                "ClusterNetworkPolicy",
                "clusternetworkpolicies",
                api_version=CLUSTER_POLICY,
            ),
            _kind(
                "adminnetworkpolicy",
                "AdminNetworkPolicy",
                "adminnetworkpolicies",
                "anp",
                api_version=ADMIN_POLICY,
            ),
            _kind(
                "adminnetworkpolicy",
                "BaselineAdminNetworkPolicy",
                "baselineadminnetworkpolicies",
                "banp",
                api_version=ADMIN_POLICY,
            ),
        )
    }
)

_BY_TYPE = {(kind.api_version, kind.kind): kind for kind in KINDS.values()}
_BY_WORD = {
    word: kind
    for kind in KINDS.values()
    for word in (kind.id.lower(), kind.plural, *kind.short_names)
}


def kind_of(obj: object) -> Kind:
    """The kind an object says it is. Raises InvalidObjectError."""
    if not isinstance(obj, Mapping):
        raise InvalidObjectError("object", "", [Problem("", obj, "a mapping with a kind")])
    api_version, word = obj.get("apiVersion"), obj.get("kind")
    try:
        return _BY_TYPE[api_version, word]  # type: ignore[index]
    except (KeyError, TypeError):
        pass
    versions = [kind.api_version for kind in KINDS.values() if kind.kind == word]
    if versions:
        problem = Problem("apiVersion", api_version, " or ".join(versions))
    else:
        kinds = [kind.kind for kind in KINDS.values()] if isinstance(word, str) else []
        problem = Problem("kind", word, nearest("a kind Manx knows", word, kinds))
    raise InvalidObjectError(str(word or "object"), name_of(obj), [problem])


def find_kind(word: str) -> Kind:
    """The kind a command line means: plural, singular or short name, in any case.

    Raises LookupError, which suggests the nearest.
    """
    try:
        return _BY_WORD[word.lower()]
    except KeyError:
        expected = nearest("no such kind", word.lower(), list(_BY_WORD))
        raise LookupError(f"{word!r}: {expected}") from None


def key_parts(obj: Mapping[str, Any]) -> tuple[str, str, str]:
    """Kind id, namespace (empty if there is none) and name. Raises InvalidObjectError."""
    kind = kind_of(obj)
    metadata = obj.get("metadata")
    namespace = metadata.get("namespace") if isinstance(metadata, Mapping) else None
    return kind.id, str(namespace or ""), name_of(obj)


def name_of(obj: object) -> str:
    """metadata.name; empty when there is none."""
    metadata = obj.get("metadata") if isinstance(obj, Mapping) else None
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    return name if isinstance(name, str) else ""


def nearest(complaint: str, word: object, words: Sequence[str]) -> str:
    """The complaint, and the most similar of ``words`` where one is similar at all, in any case."""
    by_letters = {other.lower(): other for other in reversed(words)}
    close = difflib.get_close_matches(str(word).lower(), by_letters, n=1)
    return f"{complaint}; did you mean {by_letters[close[0]]}?" if close else complaint
