"""What policy does with a flow on its way through the cluster, and why, from the objects alone.

No node is asked. So what only a node knows is not told: which interface a packet passes, and the
rules of others. ``Leg.notes`` says where that could matter. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from api.errors import Problem
from api.net import Net, format_address, parse_net
from datastore.interface import JSON, Key
from felix import names
from felix.calculate import Calculator
from felix.rules import IPIP, UDP
from felix.settings import CLUSTER, EndpointToHost, LoopPrevention, Settings
from felix.snapshot import Snapshot
from felix.workloads import Workload
from policy.evaluate import Flow, Verdict, evaluate
from policy.model import Action, EndpointId


class UnknownEndError(Exception):
    """What was given as an end of a flow is nobody's."""


@dataclass(frozen=True, slots=True)
class End:
    """An end of a flow. ``workload`` None: a node itself, or (``node`` empty) somebody outside."""

    name: str
    address: Net
    node: str = ""
    workload: EndpointId | None = None

    def __str__(self) -> str:
        address = format_address(self.address.version, self.address.address)
        place = f", {self.node}" if self.node and self.node != self.name else ""
        return f"{self.name} ({address}{place})" if self.name else address


@dataclass(frozen=True, slots=True)
class Question:
    """The first packet of a flow. Ports None where the protocol has none."""

    source: End
    target: End
    protocol: int
    port: int | None = None
    source_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None


@dataclass(frozen=True, slots=True)
class Leg:
    """What a node does with it. ``why`` is told where something else than policy decides."""

    node: str
    verdict: Verdict
    why: str = ""
    notes: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether the packet goes on."""
        return self.verdict.action is Action.ALLOW


class Cluster:
    """All objects of a cluster, of the kinds in ``felix.snapshot.KINDS``."""

    def __init__(self, objects: Iterable[tuple[Key, JSON]]) -> None:
        self._snapshot = Snapshot()
        for key, value in objects:
            self._snapshot.update(key, value)
        self._calculators: dict[str, Calculator] = {}

    @property
    def problems(self) -> list[str]:
        """Objects that can't be read as they are written."""
        return [f"{key}: {problem}" for key, problem in self._snapshot.problems.items()]

    def ends(self, text: str, namespace: str) -> list[End]:
        """Who is meant: an address, a pod (``POD``, ``NAMESPACE/POD``), or a node by name.

        One for each address, IPv4 first. Raises UnknownEndError.
        """
        if (address := _address(text)) is not None:
            return [self._at(address)]
        found = sorted(self._of_pod(text, namespace), key=lambda end: end.address)
        if found:
            return found
        node = self._snapshot.nodes.get(Key("Node", text))
        if node is not None and node.addresses:
            first = {address.version: address for address in reversed(node.addresses)}
            return [End(text, address, text) for _, address in sorted(first.items())]
        expected = "an address, a pod that has one (POD or NAMESPACE/POD), or a node"
        raise UnknownEndError(str(Problem("end of the flow", text, expected)))

    def explain(self, question: Question) -> list[Leg]:
        """What the nodes it passes do, in order; ends at the first that denies."""
        legs = []
        for node in dict.fromkeys((question.source.node, question.target.node)):
            if node:
                legs.append(self._leg(node, question))
                if not legs[-1].allowed:
                    break
        return legs

    def _of_pod(self, text: str, namespace: str) -> Iterator[End]:
        space, slash, pod = text.rpartition("/")
        wanted = (space if slash else namespace, pod)
        for key, workload in self._snapshot.workloads.items():
            if (key.namespace, workload.pod) == wanted:
                for net in self._nets(key, workload):
                    yield self._pod_at(key, net)

    def _at(self, address: Net) -> End:
        """Whoever has the address."""
        for key, workload in self._snapshot.workloads.items():
            if address in self._nets(key, workload):
                return self._pod_at(key, address)
        for key, node in self._snapshot.nodes.items():
            if address in (*node.addresses, node.host.tunnel):
                return End(key.name, address, key.name)
        for host in self._snapshot.hosts.values():
            if address in host.place.addresses:
                return End(host.node, address, host.node)
        return End("", address)

    def _nets(self, key: Key, workload: Workload) -> tuple[Net, ...]:
        """Its addresses: of a pod that has finished none, as somebody else may have them."""
        pod = self._snapshot.pods.get(Key("Pod", workload.pod, key.namespace))
        finished = workload.orchestrator == "k8s" and pod is not None and pod.finished
        return () if finished else workload.nets

    def _pod_at(self, key: Key, address: Net) -> End:
        workload = self._snapshot.workloads[key]
        id = EndpointId(key.kind, key.namespace, key.name)
        return End(f"{key.namespace}/{workload.pod}", address, workload.node, id)

    def _calculator(self, node: str) -> Calculator:
        if node not in self._calculators:
            self._snapshot.touch()
            self._calculators[node] = Calculator(node)
            self._calculators[node].calculate(self._snapshot)
        return self._calculators[node]

    def _leg(self, node: str, question: Question) -> Leg:
        source, target = question.source, question.target
        calculator = self._calculator(node)
        for end in (source, target):
            if end.node == node and (why := _closed(calculator, end)):
                return Leg(node, Verdict(Action.DENY, "", None, None, ()), why)
        sends, receives = source.node == node, target.node == node
        from_host = sends and source.workload is None
        to_host = receives and target.workload is None
        guard = self._guard(calculator, target.address if to_host else source.address)
        passes = not (from_host or to_host)
        asked = not (from_host and receives)  # what a node sends to its own is its own affair
        flow = Flow(
            src=source.address,
            dst=target.address,
            protocol=question.protocol,
            src_port=question.source_port,
            dst_port=question.port,
            icmp_type=question.icmp_type,
            icmp_code=question.icmp_code,
            src_endpoint=(source.workload or guard) if sends and asked else None,
            dst_endpoint=(target.workload or guard) if receives and asked else None,
            entry=guard if passes else None,
            exit=guard if passes else None,
        )
        verdict = evaluate(calculator.engine, flow)
        settings = calculator.settings
        notes = tuple(self._notes(calculator, guard, question, node))
        if sends and source.workload and (setting := _refuses(settings, question)):
            return Leg(node, Verdict(Action.DENY, "", None, None, ()), setting, notes)
        if sends and source.workload and to_host and verdict.action is Action.ALLOW:
            after = settings.endpoint_to_host
            why = f"FelixConfiguration defaultEndpointToHostAction: {after.value}"
            if after is EndpointToHost.DROP:
                return Leg(node, Verdict(Action.DENY, "", None, None, verdict.trace), why, notes)
            return Leg(node, verdict, why, notes)
        failsafes, far = (
            (settings.failsafe_out, target.address)
            if from_host
            else (settings.failsafe_in, source.address)
        )
        ports = (question.port,)
        spared = any(each.spares(question.protocol, ports, far) for each in failsafes)
        if passes or guard is None or not spared:
            return Leg(node, verdict, "", notes)
        name = "Outbound" if from_host else "Inbound"
        why = f"FelixConfiguration failsafe{name}HostPorts: {question.port}"
        return Leg(node, Verdict(Action.ALLOW, "", None, None, ()), why, notes)

    def _guard(self, calculator: Calculator, address: Net) -> EndpointId | None:
        """The host endpoint that is known to be met: by the address, or of all interfaces."""
        everywhere = None
        for id, place in sorted(calculator.hosts.items()):
            if address in place.addresses:
                return id
            if place.interface == "*":
                everywhere = everywhere or id
        return everywhere

    def _notes(
        self, calculator: Calculator, guard: EndpointId | None, question: Question, node: str
    ) -> Iterator[str]:
        loops = calculator.settings.loop_prevention
        services = self._snapshot.services.get(Key("BGPConfiguration", CLUSTER), ())
        sends = question.source.node == node and question.source.workload
        if sends and any(net.contains(question.target.address) for net in services):
            dropped = ""
            if loops is not LoopPrevention.DISABLED:
                dropped = f"; if there is none, serviceLoopPrevention: {loops.value} stops it here"
            yield (
                "the target is an address of services (BGPConfiguration): of one that is there,"
                f" policy sees the pod behind it{dropped}"
            )
        if question.source.node == question.target.node and question.source.workload:
            return  # it passes no interface of the node but pods'
        for id, place in sorted(calculator.hosts.items()):
            if id != guard and place.interface != "*":
                where = f"interface {place.interface}" if place.interface else "its expectedIPs"
                yield (
                    f"HostEndpoint({id.name}) guards {where} of {node}: whether the packet"
                    " passes there is known on the node only"
                )


def _closed(calculator: Calculator, end: End) -> str:
    """Why a node lets nothing from and to one of its workloads; or nothing."""
    id = end.workload
    if id is None:
        return ""
    interface = calculator.places.get(id)
    if interface and calculator.holds(id, interface) and calculator.owner(end.address) == id:
        return ""
    return (
        f"WorkloadEndpoint({names.endpoint_text(id)}) is not in force: what is wrong with it, or"
        f" who has its address, manxctl node status says on {end.node}; its interface drops"
    )


def _refuses(settings: Settings, question: Question) -> str:
    """The setting for which what a workload sends is dropped before any policy; or nothing."""
    if question.protocol == IPIP and not settings.allow_ipip:
        return "FelixConfiguration allowIPIPPacketsFromWorkloads: false"
    vxlan = (UDP, settings.vxlan_port)
    if (question.protocol, question.port) == vxlan and not settings.allow_vxlan:
        return "FelixConfiguration allowVXLANPacketsFromWorkloads: false"
    return ""


def _address(text: str) -> Net | None:
    try:
        net = parse_net(text)
    except ValueError:
        return None
    return net if net.is_host else None
