"""What an implementation of ClusterNetworkPolicy (v1alpha2) has to do, by verdict and by packets.

The questions are those of the conformance suite of kubernetes-sigs/network-policy-api, asked
between all pods, on all its ports, in both IP versions: four namespaces with two pods each, on two
nodes. SCTP is asked with the first packet of an association.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from api.net import parse_net
from policy.evaluate import Flow, evaluate
from policy.model import Action, EndpointId
from tests.felix.fabric import MAKERS, Fabric
from tests.felix.world import Pod
from tests.support.probes import SCTP, TCP, UDP, Probe

pytestmark = pytest.mark.timeout(300)  # a busy machine needs minutes

HOUSES = ("own", "open", "partly", "closed")  # namespaces; policies are for the pods of the first
PROTOCOLS = {"tcp": TCP, "udp": UDP, "sctp": SCTP}
PORTS = {"tcp": (80, 8080), "udp": (53, 5353), "sctp": (9003, 9005)}
Port = tuple[str, int]
ALL_PORTS: tuple[Port, ...] = tuple((name, port) for name in PORTS for port in PORTS[name])


def addresses(house: str, number: int) -> dict[int, str]:
    """Those of a pod, by IP version."""
    subnet = HOUSES.index(house) + 1
    return {4: f"10.0.{subnet}.{number}", 6: f"fd10::{subnet}:{number}"}


class Packet(NamedTuple):
    """From a pod of a namespace to one of another, or of the same."""

    source: str
    target: str
    port: Port


class Place:
    """Eight pods, and what their nodes were told."""

    def __init__(self, backend: str, stack: ExitStack) -> None:
        self.fabric = Fabric(backend, (80, 8080, 53, 5353), stack)
        for house, number in itertools.product(HOUSES, (1, 2)):
            own = addresses(house, number).values()
            self.fabric.pod(number % 2, house, f"pod-{number}", *own)
        self.fabric.start()
        for name in HOUSES:
            self.label(name, house=name)
        for pod in self.fabric.pods:
            self.fabric.put(_endpoint(pod))

    def label(self, namespace: str, **labels: str) -> None:
        self.fabric.put({"apiVersion": "v1", "kind": "Namespace", **_named(namespace, labels)})

    def check(self, denied: set[Packet], spared: Collection[str] = ()) -> None:
        """Everything else passes, and all that is for one of the addresses ``spared``."""
        self.fabric.enforce()
        pods = list(enumerate(self.fabric.pods))
        verdicts: dict[Probe, bool] = {}
        for (s, source), (t, target) in itertools.permutations(pods, 2):
            for port, version in itertools.product(ALL_PORTS, (4, 6)):
                probe = Probe(s, t, PROTOCOLS[port[0]], port[1], version)
                packet = Packet(source.namespace, target.namespace, port)
                address = self.fabric.stations[t].addresses[version]
                verdicts[probe] = packet not in denied or address in spared
                assert self.passes(probe) is verdicts[probe], packet
        allowed = {probe for probe, passes in verdicts.items() if passes}
        assert self.fabric.arrived(verdicts, allowed) == allowed

    def passes(self, probe: Probe) -> bool:
        """Whether both nodes let it pass, by verdict."""
        (src, source), (dst, target) = (
            (
                parse_net(self.fabric.stations[end].addresses[probe.version]),
                EndpointId("WorkloadEndpoint", pod.namespace, pod.key.name),
            )
            for end in (probe.source, probe.target)
            for pod in (self.fabric.pods[end],)
        )
        flow = Flow(src, dst, probe.protocol, 40000, probe.port)
        flow = replace(flow, src_endpoint=source, dst_endpoint=target)
        return all(
            evaluate(brain.calculator.engine, flow).action is Action.ALLOW
            for brain in self.fabric.brains
        )


@pytest.fixture(params=MAKERS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(request.param, stack)


def _endpoint(pod: Pod) -> dict[str, Any]:
    own = addresses(pod.namespace, int(pod.name[-1]))
    networks = [str(parse_net(text)) for text in own.values()]
    return pod.endpoint(labels={"house": pod.namespace}, ipNetworks=networks)


def _named(name: str, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": dict(labels or {})}}


def all_of(house: str) -> dict[str, Any]:
    """A subject or peer: all pods of a namespace."""
    return {"namespaces": {"matchLabels": {"house": house}}}


def pods_of(house: str) -> dict[str, Any]:
    """The same, of pods by their labels."""
    selector = {"matchLabels": {"house": house}}
    return {"pods": {"namespaceSelector": selector, "podSelector": selector}}


def rules(direction: str, *rules: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Rules (action, peer, ports); no ports: every packet."""
    far = {"ingress": "from", "egress": "to"}[direction]
    made = []
    for action, peer, *ports in rules:
        rule = {"action": action, far: [peer]}
        if ports:
            rule["protocols"] = [
                {protocol: {"destinationPort": {"number": port}}} for protocol, port in ports
            ]
        made.append(rule)
    return made


def cluster_policy(
    name: str, tier: str = "Admin", priority: int = 10, **spec: Any
) -> dict[str, Any]:
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": {"tier": tier, "priority": priority, "subject": all_of("own"), **spec},
    }


def between(direction: str, house: str, ports: tuple[Port, ...] = ALL_PORTS) -> set[Packet]:
    """What comes from a namespace to the first, or goes there."""
    ends = ("own", house) if direction == "egress" else (house, "own")
    return {Packet(*ends, port) for port in ports}


class Ports(NamedTuple):
    """At which ports ``partly`` is denied, and at which ``closed`` is not."""

    partly: tuple[Port, ...]
    closed: tuple[Port, ...]


AT_ALL = (("tcp", 80), ("udp", 53), ("sctp", 9003))
# By direction: one protocol at a time, then both directions with all.
CASES: tuple[dict[str, Ports], ...] = (
    *(
        {direction: Ports(((name, port),), ((name, other),))}
        for direction, name, port, other in (
            ("ingress", "tcp", 80, 80),
            ("egress", "tcp", 80, 8080),
            ("ingress", "udp", 5353, 53),
            ("egress", "udp", 5353, 53),
            ("ingress", "sctp", 9003, 9003),
            ("egress", "sctp", 9003, 9003),
        )
    ),
    {
        "ingress": Ports(AT_ALL, (("tcp", 80), ("udp", 5353), ("sctp", 9003))),
        "egress": Ports(AT_ALL, (("tcp", 8080), ("udp", 5353), ("sctp", 9003))),
    },
)


def ordered(ports: dict[str, Ports], open: tuple[str, ...], partly: tuple[str, ...]) -> Any:
    """Rules for ``open`` with these actions, and so on; the first that matches counts."""
    return {
        direction: rules(
            direction,
            *((action, all_of("open")) for action in open),
            *((action, all_of("partly"), *own.partly) for action in partly),
            ("Accept", all_of("closed"), *own.closed),
            ("Deny", all_of("closed")),
        )
        for direction, own in ports.items()
    }


def test_rules_in_order(place: Place) -> None:
    """The first that matches counts; in a case, ``Pass`` goes on to what comes after the tier."""
    for tier, ports in itertools.product(("Admin", "Baseline"), CASES):
        at_ports = set().union(*(between(d, "partly", own.partly) for d, own in ports.items()))
        nothing_else = set().union(
            *(between(d, "closed") - between(d, "closed", own.closed) for d, own in ports.items())
        )
        everything = set().union(*(between(d, "open") for d in ports))
        passes = ("Pass",) if tier == "Admin" else ()
        for open, partly, denied in (
            (("Accept", "Deny", *passes), ("Deny", *passes), at_ports),
            (("Deny", "Accept", *passes), ("Deny", *passes), at_ports | everything),
            *([(("Pass", "Deny", "Accept"), ("Pass", "Deny"), set())] if tier == "Admin" else []),
        ):
            place.fabric.put(cluster_policy("x", tier, **ordered(ports, open, partly)))
            place.check(denied | nothing_else)


def test_lower_priorities_come_first(place: Place) -> None:
    both = ("ingress", "egress")

    def policy(name: str, action: str, **more: Any) -> None:
        for direction in both:
            more[direction] = rules(direction, (action, pods_of("partly")))
        place.fabric.put(cluster_policy(name, subject=pods_of("own"), **more))

    denied = between("ingress", "partly") | between("egress", "partly")
    policy("denies", "Deny", priority=50)
    policy("passes", "Pass", priority=60)
    policy("default", "Accept", tier="Baseline")
    place.check(denied)
    policy("passes", "Pass", priority=40)
    place.check(set())
    policy("default", "Deny", tier="Baseline")
    place.check(denied)


def test_policies_of_namespaces_stand_between_the_tiers(place: Place) -> None:
    """Admin denies; or passes to a NetworkPolicy, if there is one; or else to Baseline."""
    both = ("ingress", "egress")

    def policy(name: str, tier: str, *actions: str) -> None:
        ingress, egress = (
            rules(direction, (action, all_of("partly")))
            for direction, action in zip(both, actions, strict=True)
        )
        place.fabric.put(cluster_policy(name, tier, ingress=ingress, egress=egress))

    peer = {"namespaceSelector": {"matchLabels": {"house": "partly"}}}
    key = place.fabric.put(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "np", "namespace": "own"},
            "spec": {
                "podSelector": {},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": [peer]}],
                "egress": [{"to": [peer]}],
            },
        }
    )
    policy("default", "Baseline", "Deny", "Deny")
    ours = {
        d: set().union(*(between(d, house) for house in ("own", "open", "closed"))) for d in both
    }
    others = ours["ingress"] | ours["egress"]  # the NetworkPolicy allows nobody else
    of = {d: between(d, "partly") for d in both}
    policy("admin", "Admin", "Deny", "Deny")
    place.check(others | of["ingress"] | of["egress"])
    policy("admin", "Admin", "Pass", "Deny")
    place.check(others | of["egress"])
    policy("admin", "Admin", "Pass", "Pass")
    place.check(others)
    place.fabric.update({key: None})
    place.check(of["ingress"] | of["egress"])


@pytest.mark.parametrize("tier", ["Admin", "Baseline"])
def test_networks(place: Place, tier: str) -> None:
    """The whole world is denied, but for pods by label, then for those by address."""
    world = {"networks": ["0.0.0.0/0", "::/0"]}

    def policy(*first: tuple[Any, ...]) -> None:
        listed = rules("egress", *first, ("Accept", pods_of("partly")), ("Deny", world))
        place.fabric.put(cluster_policy("x", tier, subject=pods_of("own"), egress=listed))

    everybody = set().union(*(between("egress", house) for house in HOUSES))
    policy()
    place.check(everybody - between("egress", "partly"))
    place.label("partly", house="another")
    place.check(everybody)
    place.label("partly", house="partly")
    place.check(everybody - between("egress", "partly"))
    spared = [*addresses("open", 1).values(), *addresses("closed", 1).values()]
    policy(("Accept", {"networks": [str(parse_net(text)) for text in spared]}))
    place.check(everybody - between("egress", "partly"), spared)
