"""All kinds of policy on their way from the store to the engine, in any order."""

from __future__ import annotations

import random
from typing import Any

import pytest

from api.kinds import KINDS
from api.net import Net, parse_net
from datastore.interface import JSON, Key
from felix.snapshot import KINDS as FOLLOWED
from felix.snapshot import Snapshot
from policy.evaluate import Flow, evaluate
from policy.model import Action, EndpointId, HostBinding, Part
from tests.felix.test_calculate import NODE, Run, Step, obj, replays, workload

A, B = (EndpointId("WorkloadEndpoint", "default", f"{NODE}-k8s-{pod}-eth0") for pod in "ab")
HOST = EndpointId("HostEndpoint", "", "host")
ALLOW: dict[str, Any] = {"action": "Allow"}
DENY: dict[str, Any] = {"action": "Deny"}


def of(kind: str, name: str, spec: JSON | None = None, namespace: str = "", **rest: Any) -> Step:
    """An object of any kind as stored."""
    key, value = obj(kind, name, spec, namespace, **rest.pop("metadata", {}))
    assert value is not None
    return key, {**value, "apiVersion": KINDS[kind].api_version, "kind": KINDS[kind].kind, **rest}


def endpoint_slice(name: str, service: str, address: str, port: int | None = 80) -> Step:
    return of(
        "EndpointSlice",
        name,
        namespace="default",
        metadata={"labels": {"kubernetes.io/service-name": service}},
        addressType="IPv4",
        endpoints=[{"addresses": [address], "conditions": {"ready": False}}],
        ports=[{"name": "http", "port": port}],
    )


BASE: list[Step] = [
    obj("Namespace", "default", None, labels={"team": "red"}),
    workload("a", "10.0.0.1"),
    workload("b", "10.0.0.2"),
]
ADMIN: JSON = {
    "tier": "Admin",
    "priority": 1,
    "subject": {"namespaces": {}},
    "ingress": [{"action": "Deny", "from": [{"namespaces": {"matchLabels": {"team": "blue"}}}]}],
}
SCENARIO: list[Step] = [
    *BASE,
    of("HostEndpoint", "host", {"node": NODE, "interfaceName": "eth0", "profiles": ["own"]}),
    of("HostEndpoint", "host", {"node": NODE, "interfaceName": "*", "profiles": ["own"]}),
    of("HostEndpoint", "far", {"node": "node2", "expectedIPs": ["172.31.2.2"]}),
    of("Profile", "own", {"ingress": [ALLOW], "labelsToApply": {"from": "profile"}}),
    of("Profile", "kns.default", {"labelsToApply": {"pcns.team": "overruled"}}),
    of("ServiceAccount", "robot", namespace="default", metadata={"labels": {"role": "x"}}),
    of("GlobalNetworkSet", "nets", {"nets": ["198.51.100.0/24", "2001:db8::/32"]}),
    of("NetworkSet", "nets", {"nets": ["203.0.113.7", "10.0.0.0/8"]}, "default"),
    of(
        "NetworkPolicy",
        "np",
        {
            "selector": "all()",
            "ingress": [{**ALLOW, "source": {"services": {"name": "web"}}}],
            "egress": [{**ALLOW, "destination": {"services": {"name": "web"}}}],
        },
        "default",
    ),
    endpoint_slice("web-1", "web", "10.0.0.2"),
    endpoint_slice("web-2", "web", "10.0.0.9", None),
    endpoint_slice("web-2", "other", "10.0.0.9"),
    of("StagedNetworkPolicy", "draft", {"selector": "all()", "ingress": [DENY]}, "default"),
    of("StagedGlobalNetworkPolicy", "draft", {"stagedAction": "Delete"}),
    of("StagedKubernetesNetworkPolicy", "draft", {"podSelector": {}}, "default"),
    of("ClusterNetworkPolicy", "admin", ADMIN),
    of("AdminNetworkPolicy", "admin", {"priority": 1, "subject": {"namespaces": {}}}),
    of("BaselineAdminNetworkPolicy", "default", {"subject": {"namespaces": {}}}),
    of(
        "GlobalNetworkPolicy",
        "hosts",
        {
            "selector": "from == 'profile'",
            "applyOnForward": True,
            "preDNAT": True,
            "ingress": [
                {**DENY, "source": {"namespaceSelector": "global()", "selector": "!has(x)"}}
            ],
        },
    ),
    of("GlobalNetworkPolicy", "broken", {"selector": "((", "doNotTrack": True}),
    (of("NetworkSet", "nets", {}, "default")[0], None),
]


@pytest.mark.parametrize("seed", range(2))
def test_all_ways_lead_to_the_same_policy(seed: int) -> None:
    states = {}
    for name, batches in replays(SCENARIO, random.Random(seed)).items():
        run_ = Run()
        for batch in batches:
            run_.feed(batch)
        engine = run_.calculator.engine
        states[name] = run_.state() | {
            "hosts": run_.calculator.hosts,
            "policies": dict(engine.policies),
            "endpoints": dict(engine.endpoints),
            "sets": dict(engine.sets),
        }
    expected = states.pop("squashed")
    assert len(expected["policies"]) > 5
    for name, state in states.items():
        assert state == expected, name


def fed(*steps: Step) -> Run:
    run_ = Run()
    run_.feed([*BASE, *steps])
    return run_


def allows(run_: Run, source: EndpointId | str, target: EndpointId | str) -> bool:
    ends: list[tuple[Net, EndpointId | None]] = []
    for end in (source, target):
        if isinstance(end, str):
            ends.append((parse_net(end), None))
        else:
            nets = {A: "10.0.0.1", B: "10.0.0.2", HOST: "172.31.1.1"}
            ends.append((parse_net(nets[end]), end))
    (src, src_id), (dst, dst_id) = ends
    flow = Flow(src, dst, 6, 40000, 80, src_endpoint=src_id, dst_endpoint=dst_id)
    return evaluate(run_.calculator.engine, flow).action is Action.ALLOW


def test_a_namespace_is_a_profile_before_a_profile_of_its_name() -> None:
    profile = of("Profile", "kns.default", {"ingress": [DENY], "egress": [DENY]})
    run_ = fed(profile)
    assert allows(run_, A, B)
    run_.feed([(Key("Namespace", "default"), None)])
    assert not allows(run_, A, B), "as in Calico's etcd, where namespaces are profiles"
    run_.feed([BASE[0]])
    assert allows(run_, A, B)


def test_labels_of_a_service_account_are_its_pods() -> None:
    pod = workload("c", "10.0.0.3", profiles=["kns.default", "ksa.default.robot"])
    rule = {**ALLOW, "source": {"serviceAccounts": {"selector": "role == 'x'"}}}
    run_ = fed(pod, of("NetworkPolicy", "np", {"ingress": [rule]}, "default"))
    assert not allows(run_, "10.0.0.3", B)
    account = of("ServiceAccount", "robot", namespace="default", metadata={"labels": {"role": "x"}})
    run_.feed([account])
    assert allows(run_, "10.0.0.3", B)
    assert not allows(run_, A, B)


def test_a_field_of_a_newer_calico_costs_itself_alone() -> None:
    """Pools, nodes and blocks: without them there would be no NAT, and no way to other nodes."""
    newer = {"newer": {"x": 1}}
    pool = {"cidr": "10.0.0.0/16", "natOutgoing": True, "vxlanMode": "Always", **newer}
    block = {"cidr": "10.0.9.0/26", "node": "node2", "state": "confirmed", "type": "host", **newer}
    other = {"bgp": {"ipv4Address": "172.31.1.2/24", **newer}, "ipv4VXLANTunnelAddr": "10.0.9.1"}
    own = {"bgp": {"ipv4Address": "172.31.1.1/24"}, "ipv4VXLANTunnelAddr": "10.0.0.1"}
    run_ = fed(
        of("IPPool", "p", pool),
        of("Node", "node2", other),
        of("Node", "node1", own),
        of("BlockAffinity", "node2-10-0-9-0-26", block),
    )
    routes = run_.calculator.overlay.routes
    assert [str(net) for net in routes] == ["10.0.9.0/26"]
    told = dict(run_.calculator.problems(run_.snapshot))
    assert all("newer" in told[what] for what in ("IPPool(p)", "Node(node2)"))


def test_a_policy_longer_than_what_may_be_written_now_is_in_force() -> None:
    """Calico's limits came with 3.34, long after most policies (``api/pkg/apis/projectcalico/v3``
    MaxItems); its agent has none.
    """
    many = [f"198.51.{number // 256}.{number % 256}/32" for number in range(300)]
    ports = [{**ALLOW, "protocol": "TCP", "destination": {"ports": [*range(1000, 1060), 80]}}]
    long = " || ".join(f"app == 'application-number-{number}'" for number in range(60))
    only = {"selector": f"{long} || all()", "types": ["Ingress"]}
    for spec in (
        {"ingress": [{**ALLOW, "source": {"nets": [*many, "10.0.0.1/32"]}}]},
        {"ingress": [{**DENY, "source": {"notNets": [*many, "10.0.0.1/32"]}}, ALLOW]},
        {"ingress": ports},
        {"ingress": [*[{**DENY, "source": {"nets": ["203.0.113.1/32"]}}] * 1100, ALLOW]},
        {"ingress": [{**ALLOW, "source": {"selector": f"{long} || all()"}}]},
    ):
        for kind, namespace in (("NetworkPolicy", "default"), ("GlobalNetworkPolicy", "")):
            run_ = fed(of(kind, "p", {**only, **spec}, namespace))
            assert allows(run_, A, B) and not run_.snapshot.problems
    profile = of("Profile", "kns.old", {"ingress": [ALLOW] * 1100})
    run_ = fed(profile, workload("b", "10.0.0.2", profiles=["kns.old"]))
    assert allows(run_, A, B)


def test_a_broken_network_set_keeps_what_can_be_read() -> None:
    nets = ["198.51.100.0/24", "nowhere", 7, "203.0.113.7/24"]
    broken = of("GlobalNetworkSet", "bad", {"nets": nets}, metadata={"labels": {"is": "bad"}})
    rule = {**DENY, "source": {"selector": "is == 'bad'"}}
    policy = of("GlobalNetworkPolicy", "gnp", {"ingress": [rule, ALLOW]})
    run_ = fed(broken, policy)
    assert not allows(run_, "198.51.100.1", B)
    assert not allows(run_, "203.0.113.1", B)
    assert allows(run_, "192.0.2.1", B)
    assert any(
        "GlobalNetworkSet(bad)" in text for text, _ in run_.calculator.problems(run_.snapshot)
    )


@pytest.mark.parametrize(
    ("wrong", "connected"),
    [
        ({"weather": "fine"}, True),
        ({"weather": "fine", "mac": 5, "qosControls": {"newer": 1}}, True),
        ({"qosControls": {"ingressBandwidth": "much"}}, True),
        ({"profiles": "kns.default"}, False),
        ({"profiles": [7]}, False),
        ({"ipNetworks": ["10.0.0.1/32", "10.1.0.0/16", 4]}, False),
        ({"ports": [{"name": "http", "protocol": "TCP", "port": 70000}]}, False),
        ({"interfaceName": "a b"}, False),
        ({"containerID": []}, False),
    ],
)
def test_an_endpoint_that_cannot_be_read_stays_known_to_others(
    wrong: JSON, connected: bool
) -> None:
    """What denies those that it selects goes on to; itself it is closed if it must be."""
    for selector in ({"selector": "app == 'a'"}, {"namespaceSelector": "team == 'red'"}):
        rule = {**DENY, "source": {"nets": ["10.0.0.1/32"], **selector}}
        policy = of(
            "GlobalNetworkPolicy", "g", {"ingress": [rule, ALLOW], "selector": "app == 'b'"}
        )
        run_ = fed(policy, workload("a", "10.0.0.1", **wrong))
        assert not allows(run_, "10.0.0.1", B)
        assert (A in run_.calculator.engine.endpoints) is connected
        assert (A in run_.calculator.places) is connected
        ((name, _),) = run_.calculator.problems(run_.snapshot)
        assert name == f"WorkloadEndpoint(default/{A.name})"


def test_a_broken_host_endpoint_still_guards_its_host() -> None:
    spec = {"node": NODE, "interfaceName": "eth0", "ports": "none", "profiles": ["kns.default"]}
    run_ = fed(of("HostEndpoint", "host", spec))
    assert not allows(run_, "192.0.2.1", HOST)
    assert run_.calculator.hosts[HOST].interface == "eth0"


def test_a_broken_policy_of_administrators_denies_in_its_place() -> None:
    unknown = [{"action": "Deny", "from": [{"namespaces": {}, "weather": "fine"}]}]
    subject = {"pods": {"podSelector": {"matchLabels": {"app": "b"}}}}
    newer = {**ADMIN, "subject": subject, "ingress": unknown}
    run_ = fed(of("ClusterNetworkPolicy", "admin", newer))
    b = Key("WorkloadEndpoint", B.name, "default")
    assert run_.snapshot.workloads[b].labels
    assert not allows(run_, A, B)
    assert allows(run_, B, A), "only in the directions it has rules for, at its subject"
    (problem,) = [text for text, _ in run_.calculator.problems(run_.snapshot)]
    assert problem == "ClusterNetworkPolicy(admin)"


@pytest.mark.parametrize("kind", ["NetworkPolicy", "GlobalNetworkPolicy"])
def test_a_rule_that_cannot_be_read_fails_closed_alone(kind: str) -> None:
    from_a = {**ALLOW, "source": {"selector": "app == 'a'"}}
    newer = {"source": {"weather": "fine"}}

    def reach(*rules: JSON, **spec: Any) -> tuple[bool, bool]:
        fields = {"selector": "app == 'b'", "types": ["Ingress"], "ingress": list(rules), **spec}
        run_ = fed(of(kind, "p", fields, "default" if kind == "NetworkPolicy" else ""))
        assert list(run_.snapshot.problems)
        return allows(run_, A, B), allows(run_, "10.0.0.3", B)

    assert reach({**ALLOW, **newer}, from_a) == (True, False)
    assert reach({"Action": "Allow", **newer}, from_a) == (True, False)
    assert reach({"action": "Allow", "Action": "Deny"}, from_a) == (False, False)
    assert reach({"action": "Log", **newer}, from_a, ALLOW) == (True, True)
    assert reach(from_a, {**DENY, **newer}, ALLOW) == (True, False)
    for action in ("Deny", "Pass", "Maybe"):
        assert reach({"action": action, **newer}, from_a) == (False, False)
    for wrong in ({"order": "x"}, {"tier": 7}, {"selector": 7}, {"weather": "fine"}):
        assert reach(from_a, {**DENY, **newer}, **wrong) == (False, False)


def test_a_rule_that_cannot_be_read_is_nothing_to_the_other_direction() -> None:
    """Which the policy may not be for, or in which another allows, or its tier passes on."""
    of_b = {"selector": "app == 'b'", "egress": [ALLOW, {**ALLOW, "weather": "fine"}]}
    both = {"types": ["Ingress", "Egress"]}
    gate = of("Tier", "gate", {"order": 1, "defaultAction": "Pass"})
    for steps in (
        [of("NetworkPolicy", "p", of_b, "default")],
        [of("GlobalNetworkPolicy", "p", of_b)],
        [gate, of("GlobalNetworkPolicy", "gate.p", {"tier": "gate", **both, **of_b})],
    ):
        run_ = fed(*steps)
        assert run_.snapshot.problems
        assert allows(run_, A, B) and allows(run_, B, A)
    for spec in (both, {"types": ["Ingress"]}, {"ingress": 7}):
        assert not allows(fed(of("GlobalNetworkPolicy", "p", {**of_b, **spec})), A, B), spec

    pods = {"podSelector": {"matchLabels": {"app": "b"}}}
    peer = {"podSelector": {"matchLabels": {"app": "a"}}}
    only = {"policyTypes": ["Ingress", "Egress"], "egress": [{}, {"weather": "fine"}]}
    run_ = fed(
        of("KubernetesNetworkPolicy", "p", {**pods, **only}, "default"),
        of("KubernetesNetworkPolicy", "q", {**pods, "ingress": [{"from": [peer]}]}, "default"),
    )
    assert run_.snapshot.problems
    assert allows(run_, A, B) and allows(run_, B, A) and not allows(run_, "10.0.0.3", B)


def test_of_a_kubernetes_policy_a_rule_that_cannot_be_read_allows_nothing() -> None:
    peer = {"podSelector": {"matchLabels": {"app": "a"}}}
    spec: JSON = {"podSelector": {"matchLabels": {"app": "b"}}, "policyTypes": ["Ingress"]}
    rules = [{"from": [{}], "weather": "fine"}, {"from": [peer]}]
    run_ = fed(of("KubernetesNetworkPolicy", "p", {**spec, "ingress": rules}, "default"))
    assert list(run_.snapshot.problems)
    assert allows(run_, A, B) and not allows(run_, "10.0.0.3", B)


@pytest.mark.parametrize("kind", ["ClusterNetworkPolicy", "AdminNetworkPolicy"])
def test_of_a_policy_of_administrators_a_rule_that_cannot_be_read_fails_closed_alone(
    kind: str,
) -> None:
    """``apis/v1alpha2`` ClusterNetworkPolicyIngressPeer: what accepts matches nothing, what denies
    or passes denies all. The rules before it are asked before it, and those behind it behind.
    """
    accept, frame = "Accept", {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}}
    if kind == "AdminNetworkPolicy":
        accept = "Allow"
        del frame["tier"]
    pods = {"podSelector": {"matchLabels": {"app": "c"}}, "namespaceSelector": {}}
    from_c = {"action": accept, "from": [{"pods": pods}]}
    c = workload("c", "10.0.0.3")

    def unknown(action: str) -> JSON:
        return {"action": action, "from": [{"namespaces": {}, "weather": "fine"}]}

    def reach(*rules: JSON, **spec: Any) -> tuple[bool, bool]:
        run_ = fed(c, of(kind, "p", {**frame, "ingress": list(rules), **spec}))
        assert f"{kind}(p)" in dict(run_.calculator.problems(run_.snapshot))
        return allows(run_, "10.0.0.3", B), allows(run_, A, B)

    deny = {"action": "Deny", "from": [{"namespaces": {}}]}
    assert reach(from_c, unknown("Deny")) == (True, False)
    assert reach(unknown("Pass"), from_c) == (False, False)
    assert reach(unknown(accept), from_c, deny) == (True, False)
    assert reach(unknown(accept)) == (True, True), "as if it weren't there"
    assert reach(unknown(accept), egress=[{**deny, "to": 7}]) == (True, False), "A's egress"
    assert reach(from_c, unknown("Deny"), subject=7) == (False, False), "it could be anybody's"
    assert reach(from_c, unknown("Deny"), priority="x") == (False, False)
    assert reach(from_c, unknown("Deny"), weather="fine") == (False, False)


FORWARD: JSON = {"applyOnForward": True}
TO_HOST = Flow(parse_net("192.0.2.1"), parse_net("172.31.1.1"), 6, 40000, 80, dst_endpoint=HOST)
THROUGH = Flow(parse_net("192.0.2.1"), parse_net("198.51.100.1"), 6, 40000, 80, entry=HOST)
TO_POD = Flow(parse_net("192.0.2.1"), parse_net("10.0.0.1"), 6, 40000, 80, dst_endpoint=A)


@pytest.mark.parametrize(
    ("flags", "part", "denied"),
    [
        ({}, {Part.NORMAL}, [TO_HOST, TO_POD]),
        (FORWARD, {Part.NORMAL, Part.FORWARD}, [TO_HOST, THROUGH, TO_POD]),
        ({"APPLYONFORWARD": True}, {Part.NORMAL, Part.FORWARD}, [TO_HOST, THROUGH, TO_POD]),
        ({**FORWARD, "preDNAT": True}, {Part.PRE_DNAT}, [TO_HOST, THROUGH]),
        ({**FORWARD, "doNotTrack": True}, {Part.UNTRACKED}, [TO_HOST, THROUGH]),
        ({"doNotTrack": True, "preDNAT": True}, {Part.UNTRACKED}, [TO_HOST, THROUGH]),
        ({"preDNAT": "yes"}, {Part.NORMAL, Part.FORWARD}, [TO_HOST, THROUGH, TO_POD]),
        ({"applyOnForward": 1}, {Part.NORMAL, Part.FORWARD}, [TO_HOST, THROUGH, TO_POD]),
    ],
)
def test_an_unreadable_policy_denies_those_packets_that_it_is_for(
    flags: JSON, part: set[Part], denied: list[Flow]
) -> None:
    host = of("HostEndpoint", "host", {"node": NODE, "interfaceName": "eth0", "profiles": ["own"]})
    profile = of("Profile", "own", {"ingress": [ALLOW]})
    unknown = [{**DENY, "weather": "fine"}]
    run_ = fed(host, profile, of("GlobalNetworkPolicy", "new", {**flags, "ingress": unknown}))
    binding = run_.calculator.engine.endpoints[HOST]
    assert isinstance(binding, HostBinding)
    assert {each for each in Part if binding.part(each).tiers} == part
    for flow in (TO_HOST, THROUGH, TO_POD):
        verdict = evaluate(run_.calculator.engine, flow)
        assert (verdict.action is Action.DENY) is (flow in denied), flow


def test_a_rule_that_cannot_be_converted_is_told() -> None:
    rules = [{"action": "Deny", "to": [{"nodes": {}}]}]
    spec = {"tier": "Baseline", "priority": 1, "subject": {"namespaces": {}}, "egress": rules}
    run_ = fed(of("ClusterNetworkPolicy", "nodes", spec))
    ((name, text),) = run_.calculator.problems(run_.snapshot)
    assert name == "ClusterNetworkPolicy(nodes)"
    assert "spec.egress[0].to[0].nodes" in text
    assert not allows(run_, A, "192.0.2.1")
    beside: JSON = {"action": "Accept", "to": [{"namespaces": {}}], "weather": "fine"}
    run_.feed([of("ClusterNetworkPolicy", "nodes", {**spec, "egress": [beside, *rules]})])
    ((_, text),) = run_.calculator.problems(run_.snapshot)
    assert "spec.egress[0].weather" in text and "spec.egress[1].to[0].nodes" in text
    run_.feed([(Key("ClusterNetworkPolicy", "nodes"), None)])
    assert not list(run_.calculator.problems(run_.snapshot))


@pytest.mark.parametrize(
    ("tier", "denied"),
    [
        ({"order": 7, "defaultAction": "Maybe"}, {A, B}),
        ({"Order": 7, "surprise": 1}, {A, B}),
        ({"order": 7, "defaultAction": "Pass", "surprise": 1}, {A}),
        ({"order": "7"}, {A, B}),
        ({"order": 10**400, "defaultAction": "Pass"}, {A}),
        ({"order": [], "defaultAction": "pass"}, {A, B}),
        ({"surprise": 1}, set()),  # without an order it is the last, and says so
        ([], {A, B}),
        (None, {A, B}),
    ],
)
def test_a_tier_that_cannot_be_read_still_denies_before_others(
    tier: Any, denied: set[EndpointId]
) -> None:
    """What its policy denies is ``a``; ``b`` is what its end would deny."""
    deny = {**DENY, "source": {"selector": "app == 'a'"}}
    spec = {"tier": "strict", "order": 1, "selector": "all()", "ingress": [deny]}
    everybody = of("GlobalNetworkPolicy", "open", {"selector": "all()", "ingress": [ALLOW]})
    steps = [of("GlobalNetworkPolicy", "strict.p", spec), everybody]
    if tier is not None:
        steps.append(of("Tier", "strict", tier))
    run_ = fed(*steps)
    assert {id for id in (A, B) if not allows(run_, id, {A: B, B: A}[id])} == denied
    assert len(list(run_.calculator.problems(run_.snapshot))) >= 1


def test_a_mistake_of_ours_in_reading_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("felix.policies.parse_stored", mistaken)
    monkeypatch.setattr("felix.closed.parse_as", mistaken)
    admin = {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}}
    accept = {"action": "Accept", "from": [{"namespaces": {}}]}
    for step in (
        of("NetworkPolicy", "p", {"ingress": [ALLOW]}, "default"),
        of("GlobalNetworkPolicy", "p", {"ingress": [ALLOW]}),
        of("KubernetesNetworkPolicy", "p", {"podSelector": {}, "ingress": [{}]}, "default"),
        of("ClusterNetworkPolicy", "p", {**admin, "ingress": [accept]}),
    ):
        profile = of("Profile", "open", {})
        run_ = fed(workload("b", "10.0.0.2", profiles=["projectcalico-default-allow"]), profile)
        assert allows(run_, "10.0.0.3", B)
        run_.feed([step])
        assert not allows(run_, "10.0.0.3", B), step
        assert "ours" in run_.snapshot.problems[step[0]]


def _deep(levels: int) -> JSON:
    value: JSON = {}
    for _ in range(levels):
        value = {"x": value}
    return value


_ODD: JSON = {"ports": [[], {"name": [], "port": 1e400}], "profiles": {}, "labels": {1: 2}}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"spec": 5},
        {"spec": []},
        {"metadata": [], "spec": {}},
        {"metadata": _ODD, "spec": _ODD},
        *({"metadata": {"name": "x"}, "spec": {"newer": _deep(depth)}} for depth in (600, 5000)),
        {"metadata": {"name": "x"}, "spec": {"nets": [_deep(5000)], "selector": _deep(5000)}},
    ],
)
@pytest.mark.parametrize("kind", FOLLOWED)
def test_anything_may_be_stored(kind: str, value: JSON) -> None:
    snapshot, key = Snapshot(), Key(kind, "x", "default" if KINDS[kind].namespaced else "")
    snapshot.update(key, value)
    Run().calculator.calculate(snapshot)
    snapshot.update(key, None)
    assert not snapshot.problems


def test_a_host_endpoint_stands_however_its_addresses_are_written() -> None:
    """Of two, one is no text: the other's interface is guarded all the same."""
    spec: JSON = {"node": "node1", "expectedIPs": [_deep(5000), "172.31.1.1"]}
    snapshot = Snapshot()
    snapshot.update(Key("HostEndpoint", "x"), {"metadata": {"name": "x"}, "spec": spec})
    [view] = snapshot.hosts.values()
    assert [str(net) for net in view.place.addresses] == ["172.31.1.1/32"]
