"""Random policy worlds: endpoints, profiles, tiers and policies that meet each other often."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from api.net import Net, parse_net
from api.policy import GlobalNetworkPolicy, NetworkPolicy, Rule, Tier
from api.registry import parse_as
from api.staged import StagedGlobalNetworkPolicy, StagedNetworkPolicy
from policy import convert, labels
from policy.engine import UNPLACED, Profile
from policy.model import Endpoint, EndpointId, NamedPort, PolicyId, ServiceSlice

NAMESPACES = ("red", "blue")
ADDRESSES = tuple(map(parse_net, ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.1", "fd00::1")))
OUTSIDE = tuple(map(parse_net, ("192.0.2.1", "2001:db8::1")))
SELECTORS = ("", "app == 'web'", "app != 'web'", "has(app)", "app in {'db'} || tier == 'x'")
PORTS: tuple[int | str, ...] = (80, "8000:8010", "http")
TIERS = (*["default"] * 4, "kube-admin", "first", "second", "nowhere")
PROFILES = ("kns.red", "kns.blue", "ksa.red.robot", "ksa.blue.other")
NETWORKS = tuple(map(parse_net, ("10.0.0.0/30", "10.0.1.0/24", "192.0.2.1", "fd00::/16")))
HOSTS = tuple(EndpointId("HostEndpoint", "", name) for name in ("host", "other"))
NETWORK_SETS = (
    EndpointId("NetworkSet", "red", "nets"),
    EndpointId("GlobalNetworkSet", "", "nets"),
)
ENDPOINTS = (
    *(EndpointId("WorkloadEndpoint", space, name) for space in NAMESPACES for name in "abc"),
    *HOSTS,
    *NETWORK_SETS,
)
POLICIES = (
    *(PolicyId("NetworkPolicy", space, name) for space in NAMESPACES for name in "pq"),
    *(PolicyId("GlobalNetworkPolicy", "", name) for name in "pgh"),
    PolicyId("StagedNetworkPolicy", "red", "p"),
    PolicyId("StagedGlobalNetworkPolicy", "", "g"),
)
FOR_HOSTS: tuple[dict[str, bool], ...] = (
    {},
    {"applyOnForward": True},
    {"applyOnForward": True, "doNotTrack": True},
    {"applyOnForward": True, "preDNAT": True},
)
SERVICES = ({"name": "web", "namespace": "red"}, {"name": "db", "namespace": "red"})
SLICES = (("red", "web-1"), ("red", "web-2"))


@dataclass(frozen=True)
class Change:
    """One call of an engine's ``set_…``; value None: it is gone."""

    table: str
    key: Any
    value: Any


CONDITIONS: dict[str, tuple[Any, ...]] = {
    "selector": SELECTORS[1:],
    "notSelector": SELECTORS[1:],
    "namespaceSelector": ("all()", "global()", "team == 'red'", "team != 'red'"),
    "serviceAccounts": (
        {"names": ["robot"]},
        {"selector": "role == 'x'"},
        {"names": ["robot", "other"], "selector": "role != 'y'"},
    ),
    "ports": ([80], ["http"], ["http"], ["8000:8010", "http"]),
    "notPorts": tuple([port] for port in PORTS),
}


NETS: dict[int, dict[str, tuple[Any, ...]]] = {
    4: {
        "nets": (["10.0.0.0/30"], ["10.0.0.1/32", "192.0.2.0/24"]),
        "notNets": (["10.0.0.2/32"],),
    },
    6: {"nets": (["fd00::/16"],), "notNets": (["2001:db8::1/128"], ["fd00::1/128"])},
}


def some_entity(chance: random.Random, protocol: str | None, version: int) -> dict[str, Any]:
    """One side of a rule; most of its conditions are absent."""
    return {
        field: chance.choice(values)
        for field, values in (CONDITIONS | NETS[version]).items()
        if chance.random() < (0.4 if field == "ports" else 0.2)
        and (protocol in ("TCP", "UDP") or not field.lower().endswith("ports"))
    }


def some_rule(chance: random.Random, direction: str) -> Rule:
    pick = chance.choice
    protocol = pick((None, None, "TCP", "UDP", "ICMP"))
    version = pick((4, 4, 6))
    rule: dict[str, Any] = {
        "action": pick(("Allow", "Allow", "Allow", "Deny", "Deny", "Pass", "Log")),
        "protocol": protocol,
        "source": some_entity(chance, protocol, version),
        "destination": some_entity(chance, protocol, version),
    }
    if protocol == "ICMP":
        fields = (None, {"type": 8}, {"type": 8, "code": 0})
        rule |= {"icmp": pick(fields), "notICMP": pick(fields)}
    elif protocol is None:
        rule["notProtocol"] = pick((None, None, "TCP"))
        sides = rule["source"].keys() | rule["destination"].keys()
        rule["ipVersion"] = pick((None, None, version if sides & {"nets", "notNets"} else 6))
    if chance.random() < 0.1:
        rule["source" if direction == "ingress" else "destination"] = {"services": pick(SERVICES)}
    return Rule.model_validate(rule)


# Drawn once: to choose among many is cheaper than to draw every condition of every rule.
RULES = {
    direction: tuple(some_rule(random.Random(seed), direction) for seed in range(1000))
    for direction in ("ingress", "egress")
}


def pick(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def endpoints(draw: st.DrawFn, id: EndpointId) -> Endpoint:
    own = draw(st.dictionaries(pick("app", "tier"), pick("web", "db", "x"), max_size=2))
    profiles: tuple[str, ...] = ()
    if id in NETWORK_SETS:
        if id.namespace:
            own[labels.NAMESPACE] = id.namespace
            profiles = (f"kns.{id.namespace}",)
        nets = tuple(draw(st.lists(pick(*NETWORKS), max_size=3, unique=True)))
        return Endpoint(id, tuple(sorted(own.items())), profiles, nets)
    if id in HOSTS:
        profiles = draw(pick((), ("kns.red",)))
    if id.namespace:
        own |= {labels.NAMESPACE: id.namespace, labels.ORCHESTRATOR: "k8s"}
        profiles = (f"kns.{id.namespace}",)
        account = draw(pick(None, "robot", "other"))
        if account:
            own[labels.SERVICE_ACCOUNT] = account
            profiles += (f"ksa.{id.namespace}.{account}",)
    return Endpoint(
        id,
        tuple(sorted(own.items())),
        profiles,
        tuple(draw(st.lists(pick(*ADDRESSES), max_size=2))),
        draw(pick((), (NamedPort("http", 6, 80),), (NamedPort("http", 17, 81),))),
        local=draw(pick(True, True, False)),
    )


@st.composite
def policies(draw: st.DrawFn, id: PolicyId) -> NetworkPolicy | GlobalNetworkPolicy:
    spec: dict[str, Any] = {
        "tier": draw(pick(*TIERS)),
        "order": draw(pick(None, None, 1.0, 2.0)),
        "selector": draw(pick("", "", "", *SELECTORS)),
        "serviceAccountSelector": draw(pick("", "", "", "role == 'x'")),
        "ingress": draw(st.lists(pick(*RULES["ingress"]), min_size=1, max_size=3)),
        "egress": draw(st.lists(pick(*RULES["egress"]), min_size=1, max_size=3)),
        "types": draw(pick([], ["Ingress"], ["Ingress", "Egress"])),
    }
    metadata = {"name": id.name}
    if id.namespace:
        metadata["namespace"] = id.namespace
    else:
        spec["namespaceSelector"] = draw(pick("", "", "all()", "team == 'red'", "team != 'red'"))
        spec |= draw(pick({}, *FOR_HOSTS))
    for direction in ("ingress", "egress"):
        if not draw(st.integers(0, 3)):
            spec[direction] = []
    if spec.get("preDNAT"):
        spec |= {"egress": [], "types": ["Ingress"]}
    parsed = parse_as(id.kind, {"metadata": metadata, "spec": spec})
    if isinstance(parsed, StagedNetworkPolicy | StagedGlobalNetworkPolicy):
        converted = convert.staged_policy(parsed)
        assert converted is not None
        return converted
    assert isinstance(parsed, NetworkPolicy | GlobalNetworkPolicy)
    return parsed


@st.composite
def slices(draw: st.DrawFn, key: tuple[str, str]) -> ServiceSlice:
    ports = st.lists(pick((6, 80), (17, 81)), max_size=2, unique=True)
    return ServiceSlice(
        draw(pick("red/web", "red/web", "red/db")),
        tuple(draw(st.lists(pick(*ADDRESSES, *OUTSIDE), max_size=3, unique=True))),
        tuple(draw(ports)),
    )


@st.composite
def profiles(draw: st.DrawFn, name: str) -> Profile:
    allow, deny = Rule(action="Allow"), Rule(action="Deny")
    rules = pick((), (allow,), (allow,), (deny, allow))
    if name.startswith("kns."):
        inherited = {
            "pcns.projectcalico.org/name": name.removeprefix("kns."),
            "pcns.team": draw(pick("red", "blue")),
        }
        return Profile(tuple(inherited.items()), draw(rules), draw(rules))
    inherited = {"pcsa.projectcalico.org/name": name.rpartition(".")[2]}
    role = draw(pick(None, "x", "y"))
    if role:
        inherited["pcsa.role"] = role
    return Profile(tuple(inherited.items()))


@st.composite
def tiers(draw: st.DrawFn, name: str) -> Tier:
    order = draw(pick(None, 10.0, 20.0, UNPLACED))
    return tier(name, order, draw(pick("Deny", "Pass")))


def tier(name: str, order: float | None, action: str) -> Tier:
    """A tier; its order may be one that can't be written."""
    spec = {"order": None if order == UNPLACED else order, "defaultAction": action}
    parsed = parse_as("Tier", {"metadata": {"name": name}, "spec": spec})
    assert isinstance(parsed, Tier)
    if order == UNPLACED:
        parsed.spec.order = order
    return parsed


TABLES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "endpoint": (ENDPOINTS, endpoints),
    "policy": (POLICIES, policies),
    "profile": (PROFILES, profiles),
    "tier": (("first", "second"), tiers),
    "slice": (SLICES, slices),
}


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Something is set or, once in four times, goes."""
    tables = ("endpoint", "endpoint", "policy", "policy", "profile", "tier", "slice")
    table = draw(pick(*tables))
    keys, values = TABLES[table]
    key = draw(pick(*keys))
    gone = draw(st.integers(0, 3)) == 0
    return Change(table, key, None if gone else draw(values(key)))


@st.composite
def worlds(draw: st.DrawFn) -> list[Change]:
    """Most of all there can be."""
    return [
        Change(table, key, draw(values(key)))
        for table, (keys, values) in TABLES.items()
        for key in keys
        if draw(st.integers(0, 7))
    ]


def any_address() -> st.SearchStrategy[Net]:
    return st.sampled_from((*ADDRESSES, *OUTSIDE))
