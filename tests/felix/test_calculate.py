"""The desired state depends on what is, not on how it came about; and so does the kernel's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.names import workload_endpoint_name
from api.net import parse_net
from datastore.interface import JSON, Key
from felix import names
from felix.calculate import Calculator
from felix.chains import Dispatch, Table
from felix.dataplane import Dataplane, Enforcer, Members
from felix.desired import ChainKey, Delta
from felix.iptables_dataplane import IptablesDataplane
from felix.nftables_dataplane import NftablesDataplane
from felix.settings import Settings
from felix.snapshot import Snapshot
from kernel.netns import Namespace, call_inside
from tests.felix.world import V3
from tests.support.netns import fresh_namespace, run

pytestmark = pytest.mark.timeout(600)  # many examples, each with much to do for the kernel

BACKENDS: dict[str, Callable[[Settings, Members], Enforcer]] = {
    "iptables": partial(IptablesDataplane, variant="nft"),
    "nftables": NftablesDataplane,
}
NODE = "node1"
Step = tuple[Key, JSON | None]


def obj(kind: str, name: str, spec: Any, namespace: str = "", **metadata: Any) -> Step:
    own = {"name": name, **({"namespace": namespace} if namespace else {}), **metadata}
    version = {"Namespace": "v1", "Pod": "v1", "KubernetesNetworkPolicy": "networking.k8s.io/v1"}
    value: JSON = {
        "apiVersion": version.get(kind, V3),
        "kind": kind.removeprefix("Kubernetes"),
        "metadata": own,
        "spec": spec,
    }
    if kind == "Namespace":
        del value["spec"]
    return Key(kind, name, namespace), value


def workload(
    pod: str, *addresses: str, node: str = NODE, namespace: str = "default", **more: Any
) -> Step:
    spec = {
        "node": node,
        "orchestrator": "k8s",
        "pod": pod,
        "endpoint": "eth0",
        "interfaceName": f"cali{pod}",
        "ipNetworks": [str(parse_net(address)) for address in addresses],
        "profiles": [f"kns.{namespace}"],
        **more,
    }
    name = workload_endpoint_name(node, "k8s", pod, "eth0")
    return obj("WorkloadEndpoint", name, spec, namespace, labels={"app": pod})


class Run:
    """A calculator, its snapshot, and the tables that its deltas make."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self.calculator = Calculator(NODE)
        self.chains: dict[Any, Any] = {}
        self.sets: dict[Any, set[Any]] = {}
        self.pods: dict[Any, Any] = {}

    def feed(self, steps: Iterable[Step]) -> Delta:
        for key, value in steps:
            self.snapshot.update(key, value)
        delta = self.calculator.calculate(self.snapshot)
        for table, parts in (
            (self.chains, (delta.chains, delta.hooks)),
            (self.pods, (delta.pods, delta.remotes, delta.peers)),
        ):
            for what, wanted in _joined(parts).items():
                if wanted is None:
                    del table[what]
                else:
                    table[what] = wanted
        for name, change in delta.sets.items():
            if change.created:
                self.sets[name] = set(change.added)
            elif change.deleted:
                del self.sets[name]
            else:
                assert not change.added & self.sets[name] and change.removed <= self.sets[name]
                self.sets[name] = (self.sets[name] - change.removed) | change.added
        return delta

    def state(self) -> dict[str, Any]:
        ruleset, overlay = self.calculator.ruleset, self.calculator.overlay
        tables = {
            "chains": _joined((ruleset.chains, ruleset.hooks)),
            "sets": {key: set(ruleset.members(key)) for key in ruleset.sets},
            "pods": _joined((self.calculator.pods, overlay.routes, overlay.peers)),
        }
        # the deltas say the same as the tables
        assert tables == {"chains": self.chains, "sets": self.sets, "pods": self.pods}
        return tables | {
            "registration": self.calculator.registration,
            "settings": self.calculator.settings,
            "problems": set(self.calculator.problems(self.snapshot)),
        }


def _joined(parts: Iterable[Mapping[Any, Any]]) -> dict[Any, Any]:
    """An address may be a pod's here and a route to another node, for a while."""
    return {(n, key): value for n, part in enumerate(parts) for key, value in part.items()}


def final(steps: Sequence[Step]) -> list[Step]:
    """The last word on every object."""
    return [(key, value) for key, value in dict(steps).items() if value is not None]


def replays(steps: Sequence[Step], chance: random.Random) -> dict[str, list[list[Step]]]:
    """Ways to the same end, each a list of batches."""
    end = final(steps)
    shuffled = chance.sample(end, len(end))
    return {
        "as it came": [[step] for step in steps],
        "squashed": [end],
        "one by one": [[step] for step in end],
        "reversed": [[step] for step in reversed(end)],
        "duplicated": [[step, step] for step in steps] + [end],
        "shuffled in two": [shuffled[::2], shuffled[1::2]],
        "removed and back": [list(steps), [(key, None) for key, _ in end], end],
    }


ALLOW = [{"action": "Allow"}]
SCENARIO: list[Step] = [
    obj("Namespace", "default", None, labels={"team": "red"}),
    workload("a", "10.0.0.1", "2001:db8::1"),
    workload("b", "10.0.0.2", ports=[{"name": "http", "protocol": "TCP", "port": 80}]),
    workload("c", "10.0.1.3", node="node2"),
    workload("b", "10.0.0.9"),
    obj("IPPool", "p", {"cidr": "10.0.0.0/16", "vxlanMode": "Always", "natOutgoing": True}),
    obj("Node", NODE, {"bgp": {"ipv4Address": "172.31.1.1/24"}}),
    obj("Node", "node2", {"bgp": {"ipv4Address": "172.31.2.2/24"}}),
    obj(
        "Node",
        "node2",
        {"bgp": {"ipv4Address": "172.31.2.2/24"}, "ipv4VXLANTunnelAddr": "10.0.1.1"},
    ),
    obj(
        "Node",
        NODE,
        {"bgp": {"ipv4Address": "172.31.1.1/24"}, "ipv4VXLANTunnelAddr": "10.0.0.64"},
    ),
    obj(
        "BlockAffinity",
        "node2-10-0-1-0-26",
        {"state": "pending", "node": "node2", "cidr": "10.0.1.0/26", "deleted": False},
    ),
    obj(
        "BlockAffinity",
        "node2-10-0-1-0-26",
        {"state": "confirmed", "node": "node2", "cidr": "10.0.1.0/26", "deleted": False},
    ),
    obj(
        "NetworkPolicy",
        "np",
        {
            "selector": "app in {'a', 'b'}",
            "ingress": [{"action": "Allow", "source": {"selector": "app == 'c'"}}],
        },
        "default",
    ),
    obj(
        "GlobalNetworkPolicy",
        "gnp",
        {"types": ["Egress"], "egress": [{"action": "Maybe"}], "selector": "app == 'b'"},
    ),
    obj(
        "KubernetesNetworkPolicy",
        "knp",
        {
            "podSelector": {},
            "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": "http"}]}],
        },
        "default",
    ),
    obj("Tier", "broken", "no"),
    obj(
        "FelixConfiguration",
        "default",
        {"defaultEndpointToHostAction": "Accept", "floatingIPs": "Enabled"},
    ),
    obj("FelixConfiguration", f"node.{NODE}", {"logPrefix": "mine"}),
    workload("d", "10.0.0.1"),
    obj("Pod", "a", {"containers": []}, "default", labels={"app": "c"}),
    (workload("b", "10.0.0.9")[0], None),
    workload("e", "10.0.0.5", interfaceName="eth0"),
    workload("f", "10.0.0.7"),
    workload("f", "10.0.0.7", interfaceName="califf"),
    workload("b", "10.0.0.2", ports=[{"name": "http", "protocol": "TCP", "port": 81}]),
    workload("g", "10.0.0.8", ipNATs=[{"internalIP": "10.0.0.8", "externalIP": "192.0.2.8"}]),
    obj("HostEndpoint", "one", {"node": NODE, "interfaceName": "eth0"}, labels={"host": "1"}),
    obj("HostEndpoint", "two", {"node": NODE, "interfaceName": "eth0"}, labels={"host": "2"}),
    obj("HostEndpoint", "any", {"node": NODE, "interfaceName": "*"}, labels={"host": "3"}),
    obj(
        "GlobalNetworkPolicy",
        "early",
        {"selector": "has(host)", "preDNAT": True, "applyOnForward": True, "ingress": ALLOW},
    ),
    obj(
        "GlobalNetworkPolicy",
        "early",
        {"selector": "has(host)", "doNotTrack": True, "applyOnForward": True, "egress": ALLOW},
    ),
    obj("StagedGlobalNetworkPolicy", "draft", {"selector": "all()", "ingress": ALLOW}),
    obj("BGPConfiguration", "default", {"serviceClusterIPs": [{"cidr": "10.96.0.0/12"}]}),
]


@pytest.mark.parametrize("seed", range(3))
def test_all_ways_lead_to_the_same_desired_state(seed: int) -> None:
    states = {}
    for name, batches in replays(SCENARIO, random.Random(seed)).items():
        run_ = Run()
        for batch in batches:
            run_.feed(batch)
        states[name] = run_.state()
    expected = states.pop("squashed")
    for name, state in states.items():
        assert state == expected, name


pod_names = st.sampled_from(["a", "b", "c", "d"])
address_lists = st.lists(
    st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.1.3", "2001:db8::1"]), max_size=2, unique=True
)
rule = st.fixed_dictionaries(
    {"action": st.sampled_from(["Allow", "Deny", "Pass", "Log", "Bad"])},
    optional={
        "source": st.sampled_from(
            [{"selector": "app == 'a'"}, {"nets": ["10.0.0.0/8", "192.0.2.0/24"]}, {}]
        ),
        "protocol": st.sampled_from(["TCP", "UDP", 132]),
    },
)
policy_spec = st.fixed_dictionaries(
    {"selector": st.sampled_from(["all()", "app == 'a'", "app != 'a'", "((("])},
    optional={
        "ingress": st.lists(rule, max_size=2),
        "egress": st.lists(rule, max_size=2),
        "order": st.sampled_from([1, 2, None]),
        "tier": st.sampled_from(["default", "t"]),
    },
)


def pod_in_phase(name: str, phase: str) -> Step:
    key, value = obj("Pod", name, {"containers": []}, "default")
    assert value is not None
    return key, {**value, "status": {"phase": phase}}


drawn_steps = st.lists(
    st.one_of(
        st.builds(
            lambda pod, addresses, node, interface: workload(
                pod, *addresses, node=node, interfaceName=interface or f"cali{pod}"
            ),
            pod_names,
            address_lists,
            st.sampled_from([NODE, "node2"]),
            st.sampled_from(["", "", "cali1", "cali2"]),
        ),
        st.builds(
            lambda name, spec: obj("NetworkPolicy", name, spec, "default"), pod_names, policy_spec
        ),
        st.builds(
            lambda name, spec, part: obj("GlobalNetworkPolicy", name, {**spec, **part}),
            pod_names,
            policy_spec,
            st.sampled_from(
                [
                    {},
                    {"applyOnForward": True},
                    {"preDNAT": True, "applyOnForward": True},
                    {"doNotTrack": True, "applyOnForward": True},
                ]
            ),
        ),
        st.builds(
            lambda name, spec: obj("StagedGlobalNetworkPolicy", name, spec), pod_names, policy_spec
        ),
        st.builds(
            lambda name, interface, node: obj(
                "HostEndpoint",
                name,
                {"node": node, "interfaceName": interface},
                labels={"app": name},
            ),
            pod_names,
            st.sampled_from(["eth0", "eth1", "*", "cali1"]),
            st.sampled_from([NODE, NODE, "node2"]),
        ),
        st.builds(
            lambda pod, external: workload(
                pod, "10.0.0.1", ipNATs=[{"internalIP": "10.0.0.1", "externalIP": external}]
            ),
            pod_names,
            st.sampled_from(["192.0.2.1", "192.0.2.2"]),
        ),
        st.builds(
            lambda cidr: obj(
                "BGPConfiguration", "default", {"serviceClusterIPs": [{"cidr": cidr}]}
            ),
            st.sampled_from(["10.96.0.0/12", "fd96::/108"]),
        ),
        st.builds(lambda order: obj("Tier", "t", {"order": order}), st.sampled_from([1, 5])),
        st.just(obj("Namespace", "default", None, labels={})),
        st.builds(
            lambda pod, phase: (
                Key("Pod", pod, "default"),
                {
                    **(obj("Pod", pod, {"containers": []}, "default")[1] or {}),
                    "status": {"phase": phase},
                },
            ),
            pod_names,
            st.sampled_from(["Running", "Failed"]),
        ),
        st.builds(
            lambda nat, mode: obj(
                "IPPool", "p", {"cidr": "10.0.0.0/16", "natOutgoing": nat, "vxlanMode": mode}
            ),
            st.booleans(),
            st.sampled_from(["Never", "Always", "Wrong"]),
        ),
        st.builds(
            lambda node, tunnel: obj(
                "Node",
                node,
                {"bgp": {"ipv4Address": "172.31.1.1/24"}, "ipv4VXLANTunnelAddr": tunnel},
            ),
            st.sampled_from([NODE, "node2"]),
            st.sampled_from(["10.0.5.1", "10.0.5.2"]),
        ),
        st.builds(
            lambda prefix, floating: obj(
                "FelixConfiguration",
                "default",
                {"interfacePrefix": prefix, "floatingIPs": floating},
            ),
            st.sampled_from(["cali", "tap", "cali,tap", "!!"]),
            st.sampled_from(["Enabled", "Disabled"]),
        ),
    ),
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(drawn_steps, st.randoms(use_true_random=False))
def test_all_ways_lead_to_the_same_desired_state_whatever_is_drawn(
    steps: list[Step], chance: random.Random
) -> None:
    states = []
    for batches in replays(steps, chance).values():
        run_ = Run()
        run_.feed([])
        for batch in batches:
            run_.feed(batch)
        states.append(run_.state())
    assert all(state == states[0] for state in states)


def test_work_is_proportional_to_what_changed() -> None:
    run_ = Run()
    run_.feed(SCENARIO)
    # a remote pod that no set of ours holds changes nothing
    delta = run_.feed([workload("far", "10.9.9.9", node="node9", namespace="elsewhere")])
    assert (delta.chains, delta.sets, delta.pods, delta.remotes) == ({}, {}, {}, {})
    # a new pod: its chains and the dispatches, and nothing of the others'
    delta = run_.feed([workload("new", "10.0.0.77", namespace="elsewhere")])
    names_ = {key.name for key in delta.chains}
    assert names_ == {
        names.FROM_WORKLOAD,
        names.TO_WORKLOAD,
        "cali-fw-calinew",
        "cali-tw-calinew",
    }


def test_endpoints_that_changed_their_interface_keep_following_policy() -> None:
    policy = obj("NetworkPolicy", "np", {"selector": "all()", "ingress": []}, "default")

    def pods(letter: str) -> list[Step]:
        return [
            workload(f"p{n}", f"10.0.0.{n}", interfaceName=f"cali{letter}{n}") for n in range(1, 13)
        ]

    moved, fresh = Run(), Run()
    for step in (pods("a"), pods("b"), [policy]):
        moved.feed(step)
    fresh.feed([*pods("b"), policy])
    assert moved.state() == fresh.state()


def test_a_version_without_addresses_has_no_policy_and_drops() -> None:
    run_ = Run()
    run_.feed([obj("Namespace", "default", None), workload("a", "10.0.0.1")])
    chains = run_.calculator.ruleset.chains
    assert ChainKey(4, Table.FILTER, "cali-tw-calia") in chains
    dispatch = chains[ChainKey(6, Table.FILTER, names.FROM_WORKLOAD)]
    assert isinstance(dispatch, Dispatch) and dispatch.targets == ()
    run_.feed([workload("a", "10.0.0.1", "2001:db8::1")])
    assert ChainKey(6, Table.FILTER, "cali-tw-calia") in run_.calculator.ruleset.chains


def _kernel_after(namespace: Namespace, backend: str, batches: list[list[Step]]) -> str:
    """What stands in a fresh namespace when the batches were applied one after the other."""
    for pod in ("a", "b", "d", "e", "f", "ff"):
        run(namespace, "ip", "link", "add", f"cali{pod}", "type", "veth", "peer", f"peer{pod}")
        run(namespace, "ip", "link", "set", f"cali{pod}", "up")
    run(namespace, "ip", "address", "add", "172.31.1.1/24", "dev", "peera")

    def work() -> None:
        snapshot, calculator = Snapshot(), Calculator(NODE)
        delta = calculator.calculate(snapshot)
        enforcer = BACKENDS[backend](calculator.settings, calculator.ruleset.members)
        dataplane = Dataplane(enforcer)
        try:
            dataplane.want(delta)
            dataplane.read()
            for now, batch in enumerate(batches):
                for key, value in batch:
                    snapshot.update(key, value)
                dataplane.want(calculator.calculate(snapshot))
                dataplane.apply(float(1000 * now))
            # what was in use a moment ago
            for now in range(5):
                dataplane.apply(float(1000 * (len(batches) + now)))
            assert list(dataplane.problems()) == []
            dataplane.read()
            assert dataplane.apply(1e6) == 0
        finally:
            dataplane.close()

    call_inside(namespace.fd, work)
    commands = (
        ("iptables-save",),
        ("ip6tables-save",),
        ("ip", "route"),
        ("ip", "-6", "route", "show", "proto", "80"),
        ("ip", "neighbour", "show", "nud", "permanent"),
        ("bridge", "fdb"),
        ("ipset", "list"),
    )
    lines = [line for command in commands for line in run(namespace, *command).stdout.splitlines()]
    # comments hold the time, set headers a random number
    if backend == "nftables":
        lines.extend(_nftables_listing(namespace))
    return "\n".join(
        sorted(line.split(" bucketsize")[0] for line in lines if not line.startswith(("#", "Size")))
    )


def _nftables_listing(namespace: Namespace) -> Iterator[str]:
    """Each object of nftables, without its handle; a hash has its elements in any order."""
    for item in json.loads(run(namespace, "nft", "-j", "-s", "list", "ruleset").stdout)["nftables"]:
        for found in item.values():
            found.pop("handle", None)
            if "elem" in found:
                found["elem"].sort(key=json.dumps)
        yield json.dumps(item)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ways_lead_to_the_same_kernel(backend: str) -> None:
    ways = replays(SCENARIO, random.Random(0))
    kernels = {}
    for name in ("squashed", "as it came", "reversed", "shuffled in two", "removed and back"):
        with fresh_namespace() as namespace:
            kernels[name] = _kernel_after(namespace, backend, ways[name])
    expected = kernels.pop("squashed")
    assert "cali-tw-calia" in expected and "vxlan.calico" in expected
    for name, kernel in kernels.items():
        assert kernel == expected, name


def test_an_unreadable_prefix_leaves_no_workload_outside() -> None:
    pods = [
        workload(pod, f"10.0.0.{number}", interfaceName=f"{prefix}0123456789{number}")
        for number, (pod, prefix) in enumerate((("a", "eni"), ("b", "tap"), ("c", "en")))
    ]
    elsewhere = workload("d", "10.0.0.9", node="node2", interfaceName="wlp0123456789a")
    steps = [obj("FelixConfiguration", "default", {"interfacePrefix": "eni,"}), *pods, elsewhere]
    for batches in replays(steps, random.Random(1)).values():
        run_ = Run()
        for batch in batches:
            run_.feed(batch)
        assert run_.calculator.settings.interface_prefixes == ("en", "eni", "tap")
        assert len(run_.calculator.places) == 3
    run_.feed([obj("FelixConfiguration", f"node.{NODE}", {"interfacePrefix": "eni"})])
    assert run_.calculator.settings.interface_prefixes == ("eni",), "the node's says it"
