"""A node between two networks, with three pods: where every kind of policy meets packets.

Packets go between pods, from and to the node itself, and through it, from one network to the
other and to the pods; those for a port of the node are sent on to a pod by destination NAT.
felix runs in this process. ``expected`` is what the oracle says of each packet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from api.net import Net, parse_net
from datastore.interface import JSON, Key
from kernel.neighbours import Neighbour, neighbour_replace
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from policy.evaluate import Flow, Verdict, evaluate
from policy.model import Action, EndpointId, Part
from tests.felix.fabric import Brain
from tests.felix.world import Node, Pod, cluster
from tests.policy.objects import ADDRESSES, OUTSIDE, PODS, PORTS
from tests.support.netns import connect, fresh_namespace, run
from tests.support.probes import ICMP, ICMPV6, SCTP, TCP, UDP, Probe, Prober, Station

# Stations, besides the pods, which are the first.
NODE, NEAR, FAR = len(PODS), len(PODS) + 1, len(PODS) + 2
INTERFACES = {NEAR: "eth0", FAR: "eth1"}
# A port of the node which is the first pod's port 80 for everybody but that pod and the node.
TRANSLATED = 8006
VERSIONS = (4, 6)


class Crossroads:
    """The node, what is around it, and what it was told."""

    def __init__(self, backend: str, stack: ExitStack) -> None:
        (self.node,) = stack.enter_context(cluster("node1"))
        outside = {name: stack.enter_context(fresh_namespace()) for name in OUTSIDE}
        for name, netns in outside.items():
            _attach(self.node, name, netns)
        self.brain = Brain(self.node, backend, stack)
        self.told: dict[Key, JSON] = {}
        self.pods = [self._pod(*pod, stack) for pod in PODS]
        self.brain.read()
        _translate(self.node)
        ends: list[tuple[Namespace, Mapping[int, str]]] = [
            (pod.netns, ADDRESSES[pod.namespace, pod.name]) for pod in self.pods
        ]
        ends.append((self.node.netns, OUTSIDE["eth0"][0]))
        ends += ((outside[name], far) for name, (_, far) in OUTSIDE.items())
        self.stations = [Station(netns, own, PORTS, stack) for netns, own in ends]
        self._prober = Prober(self.stations, self.node.netns, stack)

    def _pod(self, namespace: str, name: str, stack: ExitStack) -> Pod:
        addresses = ADDRESSES[namespace, name]
        pod = self.node.pod(name, addresses[4], namespace=namespace, endpoint=False)
        stack.callback(pod.netns.close)
        pod.add_address(addresses[6])
        return pod

    def become(self, world: Mapping[Key, JSON]) -> None:
        """These are all the objects there are."""
        now = dict(self.objects(world))
        changes: dict[Key, JSON | None] = {
            key: obj for key, obj in now.items() if self.told.get(key) != obj
        }
        changes |= dict.fromkeys(self.told.keys() - now.keys())
        for key, obj in changes.items():
            self.brain.snapshot.update(key, obj)
        self.told = now
        self.brain.enforce()

    def objects(self, world: Mapping[Key, JSON]) -> Iterator[tuple[Key, JSON]]:
        """With endpoints in full."""
        for key, obj in world.items():
            if key.kind != "WorkloadEndpoint":
                yield key, obj
                continue
            pod = self.pods[PODS.index((key.namespace, key.name))]
            yield pod.key, _endpoint(pod, obj["spec"])

    def arrived(self, probes: Mapping[Probe, bool]) -> set[Probe]:
        """Which of the probes arrive; those said to, are waited for."""
        return self._prober.round(probes, {probe for probe, passes in probes.items() if passes})

    def expected(self) -> dict[Probe, bool]:
        """What the oracle says of every packet it can speak of alone.

        What has to be answered, and is untracked one way or the other, is left out: the oracle
        is about first packets.
        """
        verdicts: dict[Probe, bool] = {}
        for probe in PROBES:
            flow = self._flow(probe)
            verdict = self._verdict(flow)
            if probe.protocol in _ANSWERED and (
                _untracked(verdict) or _untracked(self._verdict(_answer(flow)))
            ):
                continue
            verdicts[probe] = self._passes(probe, verdict)
        return verdicts

    def _verdict(self, flow: Flow) -> Verdict:
        return evaluate(self.brain.calculator.engine, flow)

    def _passes(self, probe: Probe, verdict: Verdict) -> bool:
        if probe.source == NODE and probe.target < NODE:
            return True  # what the host sends to its workloads is its own affair
        if probe.port == TRANSLATED and _untracked(verdict):
            return False  # nothing is translated, and nobody listens
        if probe.source < NODE and probe.target == NODE and probe.port != TRANSLATED:
            spec: dict[str, Any] = self.told.get(Key("FelixConfiguration", "default"), {})
            action = spec.get("spec", {}).get("defaultEndpointToHostAction", "Drop")
            return verdict.action is Action.ALLOW and action != "Drop"
        return verdict.action is Action.ALLOW

    def _flow(self, probe: Probe) -> Flow:
        source, target = probe.source, probe.target
        translated = probe.port == TRANSLATED
        arrives_at = 0 if translated else target
        has_ports = probe.port > 0
        return Flow(
            self._address(source, probe.version),
            self._address(arrives_at, probe.version),
            probe.protocol,
            40000 if has_ports else None,
            (80 if translated else probe.port) if has_ports else None,
            None if has_ports else {4: 8, 6: 128}[probe.version],
            None if has_ports else 0,
            src_endpoint=self._end(source, arrives_at),
            dst_endpoint=self._end(arrives_at, source),
            entry=None if source == NODE else self._guard(source),
            exit=None if arrives_at == NODE else self._guard(arrives_at),
            original_dst=self._address(target, probe.version) if translated else None,
            original_dst_port=probe.port if translated else None,
        )

    def _address(self, station: int, version: int) -> Net:
        return parse_net(self.stations[station].addresses[version])

    def _end(self, station: int, other: int) -> EndpointId | None:
        """The endpoint that a station is to packets from or to another."""
        if station < NODE:
            pod = self.pods[station]
            return EndpointId("WorkloadEndpoint", pod.namespace, pod.key.name)
        return self._guard(other) if station == NODE else None

    def _guard(self, station: int) -> EndpointId | None:
        """The host endpoint of the interface towards a station."""
        found = {
            obj["spec"]["interfaceName"]: EndpointId("HostEndpoint", "", key.name)
            for key, obj in self.told.items()
            if key.kind == "HostEndpoint"
        }
        return found.get(INTERFACES.get(station, ""), found.get("*"))


def _answer(flow: Flow) -> Flow:
    """The first packet back."""
    return replace(
        flow,
        src=flow.dst,
        dst=flow.src,
        src_port=flow.dst_port,
        dst_port=flow.src_port,
        icmp_type={8: 0, 128: 129}.get(flow.icmp_type or 0),
        src_endpoint=flow.dst_endpoint,
        dst_endpoint=flow.src_endpoint,
        entry=flow.exit,
        exit=flow.entry,
        original_dst=None,
        original_dst_port=None,
    )


def _probes() -> Iterator[Probe]:
    for source, target in itertools.permutations(range(FAR + 1), 2):
        for version in VERSIONS:
            yield Probe(source, target, ICMP if version == 4 else ICMPV6, 0, version)
            yield Probe(source, target, SCTP, 80, version)
            for protocol, port in itertools.product((TCP, UDP), PORTS):
                yield Probe(source, target, protocol, port, version)
            if target == NODE and source != 0:
                yield Probe(source, target, TCP, TRANSLATED, version)
                yield Probe(source, target, UDP, TRANSLATED, version)


# Everything there is to try, and what of it needs an answer.
PROBES = tuple(_probes())
_ANSWERED = (TCP, ICMP, ICMPV6)


def _untracked(verdict: Verdict) -> bool:
    return any(step.part is Part.UNTRACKED and step.decides for step in verdict.trace)


def _endpoint(pod: Pod, drawn: dict[str, Any]) -> JSON:
    """A pod's endpoint as the CNI plugin writes it."""
    profiles = [f"kns.{pod.namespace}"]
    labels = dict(drawn["labels"])
    if drawn["account"]:
        labels["projectcalico.org/serviceaccount"] = drawn["account"]
        profiles.append(f"ksa.{pod.namespace}.{drawn['account']}")
    networks = [str(parse_net(text)) for text in ADDRESSES[pod.namespace, pod.name].values()]
    return pod.endpoint(labels=labels, profiles=profiles, ports=drawn["ports"], ipNetworks=networks)


def _attach(node: Node, name: str, netns: Namespace) -> None:
    """A network behind an interface of the node, on which nothing has to be resolved."""
    here, there = OUTSIDE[name]
    addresses = [
        f"{end[version]}/{length}"
        for version, length in ((4, 24), (6, 64))
        for end in (here, there)
    ]
    near, far = connect(node.netns, name, netns, "eth0", addresses)
    for own, link, other, to in ((node.netns, near, far, there), (netns, far, near, here)):
        with NetlinkSocket(netns_fd=own.fd) as netlink:
            messages = [
                neighbour_replace(Neighbour(link.index, parse_net(text), other.mac, protocol=0))
                for text in to.values()
            ]
            assert netlink.batch(messages) == []
    for version in VERSIONS:
        run(netns, "ip", f"-{version}", "route", "add", "default", "via", here[version])


def _translate(node: Node) -> None:
    """What kube-proxy does for a service, in a table of its own."""
    for version, family in ((4, "ip"), (6, "ip6")):
        own, target = OUTSIDE["eth0"][0][version], ADDRESSES[PODS[0]][version]
        to = f"{target}:80" if version == 4 else f"[{target}]:80"
        rules = "\n".join(
            f"{family} daddr {own} {protocol} dport {TRANSLATED} dnat to {to}"
            for protocol in ("tcp", "udp")
        )
        chain = f"chain c {{\ntype nat hook prerouting priority dstnat;\n{rules}\n}}"
        run(node.netns, "nft", "-f", "-", stdin=f"table {family} service {{\n{chain}\n}}")
