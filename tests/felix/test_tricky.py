"""Where reimplementations of policy go wrong, by packets: ``tests/policy/test_tricky.py`` on each
enforcer, wherever a point shows in who reaches whom.

12 is in ``test_hosts.py``, 13 in ``test_policy.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from api.registry import key_parts
from datastore.interface import JSON, Key
from tests.felix.crossroads import Crossroads
from tests.felix.fabric import MAKERS
from tests.felix.oracle import FAR, NEAR, VERSIONS
from tests.felix.world import V3, global_policy, policy
from tests.support.probes import TCP, UDP, Probe

A, B, C = range(3)  # pods: red/a and red/b, blue/a
PODS = (("red", "a"), ("red", "b"), ("blue", "a"))
EVERYBODY = (A, B, C, NEAR, FAR)
ALLOW: dict[str, Any] = {"action": "Allow"}
DENY: dict[str, Any] = {"action": "Deny"}
PASS: dict[str, Any] = {"action": "Pass"}
FOR_B = {"selector": "app == 'db'", "types": ["Ingress"]}
HTTP = {"name": "http", "protocol": "TCP", "port": 80}


class Place:
    """The crossroads: ``a`` is the web, ``b`` the database, ``c`` in another namespace."""

    def __init__(self, backend: str, stack: ExitStack) -> None:
        self._crossroads = Crossroads(backend, stack)
        self._prober = self._crossroads.prober(stack)

    def become(
        self,
        *objects: JSON,
        ports: dict[int, list[JSON]] | None = None,
        namespaces: tuple[str, ...] = ("red", "blue"),
        labels_of_c: JSON | None = None,
        account_of_c: str | None = None,
    ) -> None:
        """Beside the pods there are these."""
        world: dict[Key, JSON] = {}
        for number, (namespace, name) in enumerate(PODS):
            labels = ({"app": "web"}, {"app": "db"}, labels_of_c or {})[number]
            account = account_of_c if number == C else None
            spec = {"labels": labels, "account": account, "ports": (ports or {}).get(number, [])}
            world[Key("WorkloadEndpoint", name, namespace)] = {"spec": spec}
        for name in namespaces:
            labels = {"team": "red"} if name == "red" else {}
            world[Key("Namespace", name)] = {"metadata": {"name": name, "labels": labels}}
        for obj in objects:
            kind, namespace, name = key_parts(obj)
            world[Key(kind, name, namespace)] = obj
        self._crossroads.become(world)

    def reached(
        self,
        target: int,
        *by: int,
        protocol: int = TCP,
        port: int = 80,
        versions: tuple[int, ...] = VERSIONS,
    ) -> bool:
        """Whether exactly these reach it, in these IP versions, and nobody does in another."""
        probes = {
            Probe(source, target, protocol, port, version): source in by and version in versions
            for source in EVERYBODY
            if source != target
            for version in VERSIONS
        }
        allowed = {probe for probe, passes in probes.items() if passes}
        return self._prober.round(probes, allowed) == allowed


@pytest.fixture(scope="module", params=MAKERS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(request.param, stack)


def calico(kind: str, name: str, namespace: str = "", **spec: Any) -> JSON:
    metadata: dict[str, Any] = {"name": name, "labels": spec.pop("labels", {})}
    if namespace:
        metadata["namespace"] = namespace
    return {"apiVersion": V3, "kind": kind, "metadata": metadata, "spec": spec}


def from_(**source: Any) -> dict[str, Any]:
    return {**ALLOW, "source": source}


def kubernetes(name: str = "p", types: tuple[str, ...] = ("Ingress",), **spec: Any) -> JSON:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "red"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "db"}},
            "policyTypes": list(types),
            **spec,
        },
    }


def outside(name: str, namespace: str = "", **labels: str) -> JSON:
    """A set of the networks of ``NEAR`` (of a namespace) or ``FAR`` (of all)."""
    nets = (
        ["192.0.2.0/24", "2001:db8::/64"] if namespace else ["198.51.100.0/24", "2001:db8:1::/64"]
    )
    kind = "NetworkSet" if namespace else "GlobalNetworkSet"
    return calico(kind, name, namespace, nets=nets, labels=labels)


def test_1_a_negative_comparison_matches_who_has_no_such_label(place: Place) -> None:
    place.become(global_policy("p", **FOR_B, ingress=[from_(selector="app != 'web'")]))
    assert place.reached(B, C)


def test_4_all_is_every_namespace_and_global_is_outside(place: Place) -> None:
    for text, by in (("all()", (A, C, NEAR)), ("global()", (FAR,))):
        rule = from_(namespaceSelector=text)
        place.become(
            outside("in", "red"), outside("out"), policy("p", "red", **FOR_B, ingress=[rule])
        )
        assert place.reached(B, *by)


def test_5_a_negative_namespace_selector_matches_who_has_none(place: Place) -> None:
    rule = from_(namespaceSelector="team != 'red'")
    place.become(outside("in", "red"), outside("out"), policy("p", "red", **FOR_B, ingress=[rule]))
    assert place.reached(B, C, FAR)


def test_6_what_a_rule_without_namespace_selector_is_limited_to(place: Place) -> None:
    nets = (outside("in", "red", app="x"), outside("out", app="x"))
    for rule, by in (
        (from_(selector="has(app)"), (A, NEAR)),
        (from_(notSelector="app == 'web'"), (NEAR,)),
        (ALLOW, (A, C, NEAR, FAR)),
    ):
        place.become(*nets, policy("p", "red", **FOR_B, ingress=[rule]))
        assert place.reached(B, *by)
    place.become(*nets, global_policy("p", **FOR_B, ingress=[from_(selector="has(app)")]))
    assert place.reached(B, A, NEAR, FAR)


def test_7_missing_types_mean_in_the_store_what_they_mean_in_the_api(place: Place) -> None:
    """What Calico's API would have written, not both directions, as its Felix takes it.

    Without ``mutating.yaml`` this is how what ``kubectl apply`` was given is stored.
    """
    db = {"selector": "app == 'db'"}
    for spec, by, of in (
        ({}, (), (A, B, C, NEAR, FAR)),
        ({"egress": [DENY]}, (A, C, NEAR, FAR), (A, C, NEAR, FAR)),
        ({"ingress": [ALLOW], "egress": [DENY]}, (A, C, NEAR, FAR), (A, C, NEAR, FAR)),
    ):
        place.become(policy("p", "red", **db, **spec))
        assert place.reached(B, *by)
        assert place.reached(C, *(end for end in of if end != C))


def test_8_order_and_ties(place: Place) -> None:
    allow, deny = {**FOR_B, "ingress": [ALLOW]}, {**FOR_B, "ingress": [DENY]}
    place.become(policy("z", "red", **deny, order=1), policy("a", "red", **allow))
    assert place.reached(B)
    place.become(policy("a-b", "red", **allow), policy("a", "red", **deny))
    assert place.reached(B, A, C, NEAR, FAR)
    place.become(policy("a", "red", **deny), global_policy("a", **allow))
    assert place.reached(B, A, C, NEAR, FAR)


def test_9_the_end_of_a_tier(place: Place) -> None:
    first = {**FOR_B, "tier": "first"}
    place.become(calico("Tier", "first", order=1), policy("first.p", "red", **first))
    assert place.reached(B)
    assert place.reached(A, B, C, NEAR, FAR), "the other direction has no end"
    passes = calico("Tier", "first", order=1, defaultAction="Pass")
    place.become(passes, policy("first.p", "red", **first))
    assert place.reached(B, A, C, NEAR, FAR)
    place.become(calico("StagedNetworkPolicy", "s", "red", **FOR_B, ingress=[DENY]))
    assert place.reached(B, A, C, NEAR, FAR)


def test_10_pass_leaves_the_tier_and_log_goes_on(place: Place) -> None:
    tier = calico("Tier", "first", order=1)
    first = policy("first.p", "red", **FOR_B, tier="first", ingress=[PASS, DENY])
    place.become(tier, first)
    assert place.reached(B, A, C, NEAR, FAR)
    allow_a = policy("p", "red", **FOR_B, ingress=[from_(selector="app == 'web'")])
    place.become(tier, first, allow_a)
    assert place.reached(B, A)
    place.become(policy("p", "red", **FOR_B, ingress=[{"action": "Log"}, ALLOW]))
    assert place.reached(B, A, C, NEAR, FAR)


def test_11_the_default_comes_from_the_profile_of_the_namespace(place: Place) -> None:
    place.become(namespaces=("red",))
    assert place.reached(B, A, NEAR, FAR)
    assert place.reached(C)


def test_14_not_in_and_an_empty_value(place: Place) -> None:
    expression = {"key": "app", "operator": "NotIn", "values": ["web"]}
    for selector, by in (
        ({"matchExpressions": [expression]}, (C,)),
        ({"matchLabels": {"app": ""}}, ()),
    ):
        peer = {"podSelector": selector, "namespaceSelector": {}}
        place.become(kubernetes(ingress=[{"from": [peer]}]))
        assert place.reached(B, *by)


def test_15_no_rule_and_an_empty_rule(place: Place) -> None:
    for spec, by in (
        ({}, ()),
        ({"ingress": None}, ()),
        ({"ingress": []}, ()),
        ({"ingress": [{}]}, (A, C, NEAR, FAR)),
    ):
        place.become(kubernetes(**spec))
        assert place.reached(B, *by)


def test_16_an_empty_port_is_every_tcp_port(place: Place) -> None:
    place.become(kubernetes(ingress=[{"ports": [{}]}]))
    assert place.reached(B, A, C, NEAR, FAR, port=8005)
    assert place.reached(B, protocol=UDP, port=8005)
    place.become(kubernetes(ingress=[{}]))
    assert place.reached(B, A, C, NEAR, FAR, protocol=UDP, port=8005)


def test_17_except_belongs_to_its_peer(place: Place) -> None:
    blocks = [
        {"ipBlock": {"cidr": "10.0.0.0/23", "except": ["10.0.0.1/32"]}},
        {"ipBlock": {"cidr": "fd10::/64", "except": ["fd10::1/128"]}},
    ]
    place.become(kubernetes(ingress=[{"from": blocks}]))
    assert place.reached(B, C), "ipBlock matches pods, too"
    again = [{"ipBlock": {"cidr": text}} for text in ("10.0.0.1/32", "fd10::1/128")]
    place.become(kubernetes(ingress=[{"from": [*blocks, *again]}]))
    assert place.reached(B, A, C)
    place.become(kubernetes(ingress=[{"from": blocks}]), kubernetes("q", ingress=[{"from": again}]))
    assert place.reached(B, A, C)


def test_18_a_named_port_is_the_destinations(place: Place) -> None:
    ports = {A: [{**HTTP, "port": 81}], B: [HTTP, {**HTTP, "protocol": "UDP", "port": 81}]}
    rule = {"ports": [{"port": "http"}]}
    place.become(kubernetes(podSelector={}, ingress=[rule]), ports=ports)
    assert place.reached(A, B, C, NEAR, FAR, port=81) and place.reached(A, port=80)
    assert place.reached(B, A, C, NEAR, FAR, port=80) and place.reached(B, port=81)
    assert place.reached(B, protocol=UDP, port=81), "the name and the protocol together"
    place.become(kubernetes(types=("Egress",), egress=[rule]), ports=ports)
    assert place.reached(A, B, C, NEAR, FAR, port=81) and place.reached(A, C, NEAR, FAR, port=80)
    assert place.reached(C, A, NEAR, FAR), "who names no port is never matched"


def test_a_rule_with_nets_is_of_their_ip_version_whether_it_takes_them_in_or_out(
    place: Place,
) -> None:
    """``felix/rules/policy.go`` FilterRuleToIPVersion: who writes "all but 10.0.0.1" in IPv4 has
    not spoken of IPv6.
    """
    for but in ("10.0.0.1/32", "fd10::1/128"):
        versions = (6,) if ":" in but else (4,)
        allow = from_(notNets=[but])
        place.become(global_policy("p", **FOR_B, ingress=[allow]))
        assert place.reached(B, C, NEAR, FAR, versions=versions)
        one = {"action": "Deny", "source": {"notNets": [but]}}
        others = {"ipVersion": versions[0], **from_()}
        place.become(global_policy("p", **FOR_B, ingress=[one, others]))
        assert place.reached(B, A, versions=versions)


def pod_of_c(account: str | None = None, **labels: str) -> JSON:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a", "namespace": "blue", "labels": labels},
        "spec": {"nodeName": "node1", **({"serviceAccountName": account} if account else {})},
        "status": {"phase": "Running", "podIP": "10.0.1.1"},
    }


def test_19_a_finished_pod_has_no_address(place: Place) -> None:
    rule = from_(selector="projectcalico.org/namespace == 'blue'")
    allow_c = global_policy("p", **FOR_B, ingress=[rule])
    pod = pod_of_c()
    place.become(allow_c, pod)
    assert place.reached(B, C)
    place.become(allow_c, {**pod, "status": {"phase": "Succeeded"}})
    assert place.reached(B)


def test_20_no_pod_chooses_what_it_is_to_inherit(place: Place) -> None:
    """``updateprocessors/workloadendpointprocessor.go``: labels of its own would hide those of its
    namespace and its service account, and it would pass for a pod of another.
    """
    false = {"pcns.team": "red", "pcsa.team": "red"}
    of_team = {"podSelector": {}, "namespaceSelector": {"matchLabels": {"team": "red"}}}
    of_account = {"serviceAccounts": {"selector": "team == 'red'"}, "namespaceSelector": "all()"}
    for known, rule in (
        (kubernetes(ingress=[{"from": [of_team]}]), A),
        (policy("p", "red", **FOR_B, ingress=[from_(**of_account)]), None),
    ):
        by = () if rule is None else (rule,)
        place.become(known, labels_of_c=false)
        assert place.reached(B, *by)
        place.become(known, pod_of_c(**false))
        assert place.reached(B, *by)
    of_office = {"selector": "has(office)", "namespaceSelector": "team == 'red'"}
    near = outside("s", "blue", office="", **false)
    place.become(policy("p", "red", **FOR_B, ingress=[from_(**of_office)]), near)
    assert place.reached(B), "nor can a network set"


def test_20_a_service_account_is_known_by_its_name_whatever_its_length(place: Place) -> None:
    """As above: a name may be longer than the value of a label, and is not the pod's to choose."""
    account = "a" * 70
    rule = {"serviceAccounts": {"names": [account]}, "namespaceSelector": "all()"}
    known = policy("p", "red", **FOR_B, ingress=[{**DENY, "source": rule}, ALLOW])
    place.become(known, account_of_c=account)
    assert place.reached(B, A, NEAR, FAR)
    place.become(known, pod_of_c(account))
    assert place.reached(B, A, NEAR, FAR)
    false = {"projectcalico.org/serviceaccount": "admin"}
    rule = {"serviceAccounts": {"names": ["admin"]}, "namespaceSelector": "all()"}
    known = policy("p", "red", **FOR_B, ingress=[from_(**rule)])
    for named in (account, None):
        place.become(known, labels_of_c=false, account_of_c=named)
        assert place.reached(B)
    for pod in (pod_of_c(account, **false), pod_of_c(**false)):
        place.become(known, pod)
        assert place.reached(B)
