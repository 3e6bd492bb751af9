"""Random policy worlds as users write them: objects of every kind that policy is made of.

The endpoints are given: pods ``red/a``, ``red/b`` and ``blue/a``, and the interfaces of one node.
Each object is one of many drawn beforehand, the shortest first, so that drawing a world is cheap
and what fails shrinks to a few short objects.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from datastore.interface import JSON, Key

Spec = dict[str, Any]
Chance = random.Random

NAMESPACES = ("red", "blue")
PODS = (("red", "a"), ("red", "b"), ("blue", "a"))
ADDRESSES = {
    ("red", "a"): {4: "10.0.0.1", 6: "fd10::1"},
    ("red", "b"): {4: "10.0.0.2", 6: "fd10::2"},
    ("blue", "a"): {4: "10.0.1.1", 6: "fd10::101"},
}
# Of networks outside, behind an interface of the node each: where it is, and another host.
OUTSIDE = {
    "eth0": ({4: "192.0.2.1", 6: "2001:db8::1"}, {4: "192.0.2.2", 6: "2001:db8::2"}),
    "eth1": ({4: "198.51.100.1", 6: "2001:db8:1::1"}, {4: "198.51.100.2", 6: "2001:db8:1::2"}),
}
PORTS = (80, 81, 8005)

NETS = {
    4: ("10.0.0.0/30", "10.0.0.1/32", "10.0.0.0/23", "192.0.2.0/24", "198.51.100.2/32"),
    6: ("fd10::/126", "fd10::2/128", "fd10::/64", "2001:db8::/64", "2001:db8:1::2/128"),
}
SELECTORS = ("app == 'web'", "app != 'web'", "has(app)", "app in {'db', 'x'} || role == 'host'")
NAMESPACE_SELECTORS = ("all()", "global()", "team == 'red'", "team != 'red'")
ACCOUNTS = (
    {"names": ["robot"]},
    {"selector": "role == 'x'"},
    {"names": ["robot", "other"], "selector": "role != 'y'"},
)
SERVICES = ({"name": "web", "namespace": "red"}, {"name": "db", "namespace": "red"})
NUMBERS: tuple[int | str, ...] = (80, 81, "8000:8010", "80:81")
LABELS: tuple[Spec, ...] = ({}, {"app": "web"}, {"app": "db"}, {"app": "x", "role": "host"})


def some(chance: Chance, values: Mapping[str, tuple[Any, ...]], often: float) -> Spec:
    """Some of the fields."""
    return {
        field: chance.choice(choices)
        for field, choices in values.items()
        if chance.random() < often
    }


# --- Calico's rules ---


def some_entity(chance: Chance, protocol: Any, version: int) -> Spec:
    nets = tuple([net] for net in NETS[version])
    entity = some(
        chance,
        {
            "selector": SELECTORS,
            "notSelector": SELECTORS,
            "namespaceSelector": NAMESPACE_SELECTORS,
            "serviceAccounts": ACCOUNTS,
            "nets": (*nets, [*NETS[version][1:4]]),
            "notNets": nets,
        },
        0.13,
    )
    if protocol in ("TCP", "UDP", "SCTP", 6):
        ports = tuple([port] for port in (*NUMBERS, "http", "dns"))
        more = {"ports": (*ports, [80, "8000:8010", "http"]), "notPorts": ports}
        entity |= some(chance, more, 0.3)
    return entity


def some_rule(chance: Chance, direction: str) -> Spec:
    protocol = chance.choice((None, None, "TCP", "TCP", "UDP", "SCTP", "ICMP", "ICMPv6", 6))
    version = {"ICMP": 4, "ICMPv6": 6}.get(str(protocol), chance.choice((4, 6)))
    rule: Spec = {
        "action": chance.choice(("Allow", "Allow", "Allow", "Deny", "Deny", "Pass", "Log")),
        "source": some_entity(chance, None if chance.random() < 0.9 else protocol, version),
        "destination": some_entity(chance, protocol, version),
    }
    if protocol is None:
        rule |= some(chance, {"notProtocol": ("TCP", "UDP", 58), "ipVersion": (version,)}, 0.2)
        if rule.get("notProtocol") == 58 and rule.get("ipVersion") == 4:
            del rule["ipVersion"]
    else:
        rule["protocol"] = protocol
    if protocol in ("ICMP", "ICMPv6"):
        echo = 8 if protocol == "ICMP" else 128
        fields = ({"type": echo}, {"type": echo, "code": 0}, {"type": echo, "code": 1})
        rule |= some(chance, {"icmp": fields, "notICMP": (*fields, {"type": 3})}, 0.4)
    if chance.random() < 0.1:
        far = "source" if direction == "ingress" else "destination"
        rule[far] = {"services": chance.choice(SERVICES)}
    return {field: value for field, value in rule.items() if value != {}}


def some_rules(chance: Chance, direction: str) -> list[Spec]:
    return [some_rule(chance, direction) for _ in range(chance.choice((0, 1, 1, 2, 3)))]


def some_policy(chance: Chance) -> Spec:
    spec: Spec = {
        "types": chance.choice((["Ingress"], ["Egress"], ["Ingress", "Egress"])),
        **some(
            chance,
            {
                "tier": ("first", "second", "kube-admin", "kube-baseline", "nowhere"),
                "order": (1, 2, 3),
                "selector": SELECTORS,
                "serviceAccountSelector": ("role == 'x'",),
            },
            0.3,
        ),
    }
    for direction in ("ingress", "egress"):
        if direction.capitalize() in spec["types"]:
            spec[direction] = some_rules(chance, direction)
    return spec


def some_global_policy(chance: Chance) -> Spec:
    """One in three is for hosts' interfaces."""
    spec = some_policy(chance)
    spec |= some(chance, {"namespaceSelector": NAMESPACE_SELECTORS[2:]}, 0.2)
    if chance.random() < 0.4:
        spec["selector"] = chance.choice(("role == 'host'", "has(role)", "all()"))
        spec.pop("serviceAccountSelector", None)
        spec.pop("namespaceSelector", None)
        spec["applyOnForward"] = True
        early = chance.choice((None, "doNotTrack", "preDNAT"))
        if early:
            spec[early] = True
        if early == "preDNAT":
            spec["types"] = ["Ingress"]
            spec.pop("egress", None)
            spec.setdefault("ingress", some_rules(chance, "ingress"))
    return spec


# --- policies of Kubernetes ---


def some_labels(chance: Chance, key: str, values: tuple[str, ...]) -> Spec:
    """A label selector."""
    kind = chance.randrange(4)
    if kind == 0:
        return {}
    if kind == 1:
        return {"matchLabels": {key: chance.choice(values)}}
    operator = chance.choice(("In", "NotIn", "Exists", "DoesNotExist"))
    expression: Spec = {"key": key, "operator": operator}
    if operator in ("In", "NotIn"):
        expression["values"] = [chance.choice(values)]
    return {"matchExpressions": [expression]}


def pod_labels(chance: Chance) -> Spec:
    return some_labels(chance, "app", ("web", "db"))


def namespace_labels(chance: Chance) -> Spec:
    return some_labels(chance, "team", ("red", "blue"))


def some_block(chance: Chance) -> Spec:
    version = chance.choice((4, 6))
    if chance.random() < 0.5:
        return {"cidr": chance.choice(NETS[version])}
    return {"cidr": NETS[version][2], "except": [chance.choice(NETS[version][:2])]}


def some_kubernetes_peer(chance: Chance) -> Spec:
    if chance.random() < 0.3:
        return {"ipBlock": some_block(chance)}
    peer = {"podSelector": pod_labels(chance), "namespaceSelector": namespace_labels(chance)}
    left_out = chance.choice((None, *peer))
    return {field: value for field, value in peer.items() if field != left_out}


def some_kubernetes_port(chance: Chance) -> Spec:
    port = chance.choice(
        ({}, {"port": 80}, {"port": 80, "endPort": 81}, {"port": "http"}, {"port": 8005})
    )
    return port | some(chance, {"protocol": ("TCP", "UDP", "SCTP")}, 0.6)


def some_kubernetes_policy(chance: Chance) -> Spec:
    types = chance.choice((["Ingress"], ["Egress"], ["Ingress", "Egress"]))
    spec: Spec = {"podSelector": pod_labels(chance), "policyTypes": types}
    for direction, far in (("ingress", "from"), ("egress", "to")):
        if direction.capitalize() in types:
            spec[direction] = [
                {
                    field: [make(chance) for _ in range(chance.randrange(1, 3))]
                    for field, make in (
                        (far, some_kubernetes_peer),
                        ("ports", some_kubernetes_port),
                    )
                    if chance.random() < 0.6
                }
                for _ in range(chance.randrange(3))
            ]
    return spec


def some_subject(chance: Chance) -> Spec:
    if chance.random() < 0.5:
        return {"namespaces": namespace_labels(chance)}
    return {
        "pods": {"podSelector": pod_labels(chance), "namespaceSelector": namespace_labels(chance)}
    }


def some_cluster_peer(chance: Chance, far: str) -> Spec:
    if far == "to" and chance.random() < 0.3:
        return {"networks": chance.sample(NETS[chance.choice((4, 6))], 2)}
    return some_subject(chance)


def some_protocol(chance: Chance) -> Spec:
    numbers = ({"number": 80}, {"number": 8005}, {"range": {"start": 80, "end": 81}})
    port = {"destinationPort": chance.choice(numbers)}
    kinds = ({"tcp": port}, {"udp": port}, {"sctp": port}, {"destinationNamedPort": "http"})
    return chance.choice(kinds)


def some_admin_port(chance: Chance) -> Spec:
    protocol = chance.choice(("TCP", "UDP", "SCTP"))
    ports = (
        {"portNumber": {"protocol": protocol, "port": 80}},
        {"portRange": {"protocol": protocol, "start": 80, "end": 81}},
        {"namedPort": "http"},
    )
    return chance.choice(ports)


def some_admin_rules(chance: Chance, far: str, actions: tuple[str, ...], ports: str) -> list[Spec]:
    some_port = some_protocol if ports == "protocols" else some_admin_port
    rules = []
    for _ in range(chance.randrange(3)):
        peers = [some_cluster_peer(chance, far) for _ in range(chance.randrange(1, 3))]
        rule: Spec = {"action": chance.choice(actions), far: peers}
        if chance.random() < 0.5:
            found = [some_port(chance) for _ in range(chance.randrange(1, 3))]
            if any("networks" in peer for peer in peers):
                found = [port for port in found if port.keys() & _NUMBERED]
            rule |= {ports: found} if found else {}
        rules.append(rule)
    return rules


_NUMBERED = {"tcp", "udp", "sctp", "portNumber", "portRange"}


def some_admin_policy(actions: tuple[str, ...], ports: str, **more: Any) -> Callable[..., Spec]:
    def some_spec(chance: Chance) -> Spec:
        return {
            "subject": some_subject(chance),
            "ingress": some_admin_rules(chance, "from", actions, ports),
            "egress": some_admin_rules(chance, "to", actions, ports),
            **{field: chance.choice(values) for field, values in more.items()},
        }

    return some_spec


# --- all else ---


def some_nets(chance: Chance) -> Spec:
    return {"nets": chance.sample((*NETS[4], *NETS[6]), chance.randrange(4))}


def some_host(interface: str) -> Callable[[Chance], Spec]:
    def some_spec(chance: Chance) -> Spec:
        profiles = chance.choice(([], ["kns.red"], ["projectcalico-default-allow"]))
        ports = chance.choice(([], [{"name": "http", "protocol": "TCP", "port": 80}]))
        return {
            "node": "node1",
            "interfaceName": interface,
            "profiles": profiles,
            "ports": ports,
            "expectedIPs": list(OUTSIDE[interface][0].values()) if interface != "*" else [],
        }

    return some_spec


def some_tier(chance: Chance) -> Spec:
    return {"order": chance.choice((10, 20)), "defaultAction": chance.choice(("Deny", "Pass"))}


def some_slice(chance: Chance) -> Spec:
    version = chance.choice((4, 6))
    addresses = [own[version] for own in ADDRESSES.values()]
    addresses += [far[version] for _, far in OUTSIDE.values()]
    ports = ({"port": 80, "protocol": "TCP"}, {"port": 81, "protocol": "UDP"})
    return {
        "addressType": f"IPv{version}",
        "endpoints": [{"addresses": [a]} for a in chance.sample(addresses, chance.randrange(4))],
        "ports": chance.sample(ports, chance.randrange(3)),
    }


def some_settings(chance: Chance) -> Spec:
    spec: Spec = {"defaultEndpointToHostAction": chance.choice(("Drop", "Accept", "Return"))}
    for enforcer in ("iptables", "nftables"):
        spec |= some(
            chance,
            {
                f"{enforcer}FilterAllowAction": ("Accept", "Return"),
                f"{enforcer}MangleAllowAction": ("Accept", "Return"),
                f"{enforcer}FilterDenyAction": ("Drop", "Reject"),
                f"{enforcer}MarkMask": (0xFFFF0000, 0xFF00),
            },
            0.3,
        )
    return spec | some(chance, {"chainInsertMode": ("Insert", "Append")}, 0.3)


def some_pod(chance: Chance) -> Spec:
    """Not an endpoint yet, but what is drawn of one."""
    ports = [
        {"name": "http", "protocol": "TCP", "port": chance.choice((80, 81))},
        {"name": "dns", "protocol": "UDP", "port": 81},
    ]
    return {
        "labels": chance.choice(LABELS[:3]),
        "ports": chance.choice(([], ports[:1], ports)),
        "account": chance.choice((None, "robot", "other")),
    }


def some_labels_of(name: str) -> Callable[[Chance], Spec]:
    key, values = ("team", NAMESPACES) if name in NAMESPACES else ("role", ("x", "y"))
    return lambda chance: chance.choice(({}, *({key: value} for value in values)))


API_VERSIONS = {
    "KubernetesNetworkPolicy": "networking.k8s.io/v1",
    "ClusterNetworkPolicy": "policy.networking.k8s.io/v1alpha2",
    "AdminNetworkPolicy": "policy.networking.k8s.io/v1alpha1",
    "BaselineAdminNetworkPolicy": "policy.networking.k8s.io/v1alpha1",
    "Namespace": "v1",
    "ServiceAccount": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
}
_CLUSTER = some_admin_policy(
    ("Accept", "Deny", "Pass"), "protocols", tier=("Admin", "Baseline"), priority=(1, 2)
)
_ADMIN = some_admin_policy(("Allow", "Deny", "Pass"), "ports", priority=(1, 2))
_BASELINE = some_admin_policy(("Allow", "Deny"), "ports")
_STAGED = {"StagedNetworkPolicy": some_policy, "StagedGlobalNetworkPolicy": some_global_policy}

MAKERS: dict[Key, Callable[[Chance], Spec]] = {
    **{Key("WorkloadEndpoint", name, space): some_pod for space, name in PODS},
    **{Key("Namespace", name): some_labels_of(name) for name in NAMESPACES},
    **{
        Key("ServiceAccount", name, space): some_labels_of(name)
        for space in NAMESPACES
        for name in ("robot", "other")
    },
    Key("FelixConfiguration", "default"): some_settings,
    **{Key("Tier", name): some_tier for name in ("first", "second")},
    **{Key("NetworkPolicy", name, "red"): some_policy for name in "pq"},
    Key("NetworkPolicy", "p", "blue"): some_policy,
    **{Key("GlobalNetworkPolicy", name): some_global_policy for name in "ghi"},
    **{Key("KubernetesNetworkPolicy", name, "red"): some_kubernetes_policy for name in "kl"},
    Key("KubernetesNetworkPolicy", "k", "blue"): some_kubernetes_policy,
    **{Key("ClusterNetworkPolicy", name): _CLUSTER for name in "cd"},
    Key("AdminNetworkPolicy", "a"): _ADMIN,
    Key("BaselineAdminNetworkPolicy", "default"): _BASELINE,
    **{
        Key(kind, "s", "" if "Global" in kind else "red"): some_spec
        for kind, some_spec in _STAGED.items()
    },
    Key("StagedKubernetesNetworkPolicy", "s", "red"): some_kubernetes_policy,
    Key("NetworkSet", "nets", "red"): some_nets,
    Key("GlobalNetworkSet", "nets"): some_nets,
    **{
        Key("HostEndpoint", name): some_host(interface)
        for name, interface in (("near", "eth0"), ("far", "eth1"), ("all", "*"))
    },
    **{Key("EndpointSlice", name, "red"): some_slice for name in ("web-1", "db-1")},
}
# Those that there always are: namespaces, and the first pod.
GIVEN = frozenset(
    (Key("WorkloadEndpoint", "a", "red"), *(Key("Namespace", name) for name in NAMESPACES))
)
_LABELLED = {
    "HostEndpoint": ({"role": "host"}, {"role": "host", "app": "web"}, {}),
    "NetworkSet": LABELS,
    "GlobalNetworkSet": LABELS,
}


def some_object(key: Key, chance: Chance) -> JSON:
    metadata: Spec = {"name": key.name}
    if key.namespace:
        metadata["namespace"] = key.namespace
    obj: JSON = {
        "apiVersion": API_VERSIONS.get(key.kind, "projectcalico.org/v3"),
        "kind": key.kind.removeprefix("Kubernetes"),
        "metadata": metadata,
    }
    spec = MAKERS[key](chance)
    if key.kind in ("Namespace", "ServiceAccount"):
        metadata["labels"] = spec
    elif key.kind == "EndpointSlice":
        metadata["labels"] = {"kubernetes.io/service-name": key.name.removesuffix("-1")}
        obj |= spec
    else:
        metadata["labels"] = chance.choice(_LABELLED.get(key.kind, ({},)))
        obj["spec"] = spec
    return obj


def pool(key: Key) -> tuple[JSON, ...]:
    """Much of what an object may be, the shortest first."""
    made = {json.dumps(some_object(key, random.Random(f"{key} {n}"))) for n in range(200)}
    return tuple(json.loads(text) for text in sorted(made, key=lambda text: (len(text), text)))


POOLS: dict[Key, tuple[JSON, ...]] = {key: pool(key) for key in MAKERS}
_SELDOM: tuple[None, ...] = (None,) * 300


def choices(key: Key) -> st.SearchStrategy[JSON | None]:
    """An object as it may be; None: there is none."""
    if key in GIVEN:
        return st.sampled_from(POOLS[key])
    if key.kind == "WorkloadEndpoint":
        return st.sampled_from((*POOLS[key], *_SELDOM[: len(POOLS[key]) // 6]))
    return st.sampled_from((*_SELDOM[: len(POOLS[key]) * 3 // 2], *POOLS[key]))


CHOICES = {key: choices(key) for key in MAKERS}


@st.composite
def worlds(draw: st.DrawFn) -> dict[Key, JSON]:
    """All objects there are."""
    drawn = ((key, draw(choice)) for key, choice in CHOICES.items())
    return {key: obj for key, obj in drawn if obj is not None}


@st.composite
def changes(draw: st.DrawFn) -> tuple[Key, JSON | None]:
    """One object becomes another, or goes."""
    key = draw(st.sampled_from(tuple(MAKERS)))
    return key, draw(CHOICES[key])
