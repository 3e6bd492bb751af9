"""Policies of all kinds, profiles and the endpoints of services, as the engine takes them."""

from __future__ import annotations

from api import staged
from api.adminnetworkpolicy import AdminNetworkPolicy, BaselineAdminNetworkPolicy
from api.clusternetworkpolicy import ClusterNetworkPolicy
from api.errors import Problem
from api.kubernetes import KubernetesNetworkPolicy, Namespace, ServiceAccount
from api.pods import account_profile, namespace_profile
from api.policy import GlobalNetworkPolicy, NetworkPolicy
from api.profile import Profile as ProfileResource
from api.registry import parse_as, parse_stored
from api.services import EndpointSlice
from datastore.interface import JSON, Key
from policy import cluster, convert
from policy.engine import Profile
from policy.model import ServiceSlice

AnyPolicy = NetworkPolicy | GlobalNetworkPolicy

# Staged kinds. One that can't be read is left out, as it would decide nothing.
DRAFTS = frozenset(
    ("StagedNetworkPolicy", "StagedGlobalNetworkPolicy", "StagedKubernetesNetworkPolicy")
)
POLICIES = frozenset(
    (
        "NetworkPolicy",
        "GlobalNetworkPolicy",
        "KubernetesNetworkPolicy",
        "ClusterNetworkPolicy",
        "AdminNetworkPolicy",
        "BaselineAdminNetworkPolicy",
    )
)


def read_policy(key: Key, value: JSON) -> tuple[AnyPolicy | None, tuple[Problem, ...]]:
    """A policy and what of it couldn't be converted; None: it applies to nothing.

    Raises InvalidObjectError.
    """
    match parse_stored(key.kind, value):
        case NetworkPolicy() | GlobalNetworkPolicy() as policy:
            return policy, ()
        case KubernetesNetworkPolicy() as policy:
            return convert.network_policy(policy), ()
        case ClusterNetworkPolicy() | AdminNetworkPolicy() | BaselineAdminNetworkPolicy() as policy:
            return cluster.global_policy(policy)
        case (
            staged.StagedNetworkPolicy()
            | staged.StagedGlobalNetworkPolicy()
            | staged.StagedKubernetesNetworkPolicy() as draft
        ):
            return convert.staged_policy(draft), ()
    raise AssertionError(f"{key}: not a policy")


def profile_keys(key: Key) -> tuple[str, tuple[Key, ...]]:
    """The name of the profile that an object is, and the objects that may be it, best first.

    With Kubernetes, namespaces and service accounts are profiles; elsewhere (Calico in etcd)
    profiles of these names stand for them.
    """
    if key.kind == "Namespace":
        name = namespace_profile(key.name)
    elif key.kind == "ServiceAccount":
        name = account_profile(key.namespace, key.name)
    else:
        name = key.name
    profile = Key("Profile", name)
    scope, _, rest = name.partition(".")
    if scope == "kns" and rest:
        return name, (Key("Namespace", rest), profile)
    namespace, _, account = rest.partition(".")
    if scope == "ksa" and account:
        return name, (Key("ServiceAccount", account, namespace), profile)
    return name, (profile,)


def read_profile(key: Key, value: JSON) -> Profile:
    """Raises InvalidObjectError."""
    match parse_stored(key.kind, value):
        case Namespace() as namespace:
            return convert.namespace_profile(namespace)[1]
        case ServiceAccount() as account:
            own = account.metadata.labels
            return convert.service_account_profile(account.namespace, account.name, own)[1]
        case ProfileResource() as profile:
            spec = profile.spec
            return Profile(
                tuple(sorted(spec.labels_to_apply.items())), tuple(spec.ingress), tuple(spec.egress)
            )
    raise AssertionError(f"{key}: not a profile")


def read_slice(key: Key, value: JSON) -> ServiceSlice | None:
    """None for a slice of no service, or of names. Raises InvalidObjectError."""
    found = parse_as(key.kind, value)
    assert isinstance(found, EndpointSlice)
    return convert.service_slice(found)
