"""What the oracle says of the packets that go over the crossroads of ``tests.felix.crossroads``."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from api.names import workload_endpoint_name
from api.net import Net, parse_net
from datastore.interface import JSON, Key
from policy.evaluate import EARLY, Flow, Tables, Verdict, evaluate
from policy.model import (
    Action,
    Binding,
    CompiledPolicy,
    EndpointId,
    Member,
    NamedPortMember,
    Part,
    PolicyId,
)
from tests.policy.objects import ADDRESSES, OUTSIDE, PODS, PORTS
from tests.support.probes import ICMP, ICMPV6, SCTP, TCP, UDP, Probe

# Where packets begin and end: the pods are first.
NODE, NEAR, FAR = len(PODS), len(PODS) + 1, len(PODS) + 2
INTERFACES = {NEAR: "eth0", FAR: "eth1"}
# A port of the node which is the first pod's port 80 for everybody but that pod and the node.
TRANSLATED = 8006
VERSIONS = (4, 6)

ENDS: tuple[Mapping[int, str], ...] = (
    *(ADDRESSES[pod] for pod in PODS),
    OUTSIDE["eth0"][0],
    *(far for _, far in OUTSIDE.values()),
)


def _probes() -> Iterator[Probe]:
    for source, target in itertools.permutations(range(len(ENDS)), 2):
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


@dataclass(frozen=True, slots=True)
class Copy:
    """Tables as they were."""

    sets: Mapping[str, Collection[Member]]
    policies: Mapping[PolicyId, CompiledPolicy]
    endpoints: Mapping[EndpointId, Binding]


@dataclass(frozen=True, slots=True)
class Oracle:
    """What happens to packets where these are the tables, and these objects were told."""

    tables: Tables
    told: Mapping[Key, JSON]

    def copy(self) -> Oracle:
        """What it says now, for ever."""
        sets = {id: frozenset(members) for id, members in self.tables.sets.items()}
        tables = Copy(sets, dict(self.tables.policies), dict(self.tables.endpoints))
        return Oracle(tables, dict(self.told))

    def with_sets(self, sets: Mapping[str, Collection[Member]]) -> Oracle:
        """The same chains with other members of sets."""
        return Oracle(Copy(sets, self.tables.policies, self.tables.endpoints), self.told)

    def expected(self) -> dict[Probe, bool]:
        """What is to happen to every packet of which it can speak.

        What has to be answered, and is untracked one way or the other, is left out: the oracle
        is about first packets.
        """
        verdicts: dict[Probe, bool] = {}
        for probe in PROBES:
            flow = self.flow(probe)
            verdict = evaluate(self.tables, flow)
            if probe.protocol in _ANSWERED and (
                _untracked(verdict) or _untracked(evaluate(self.tables, _answer(flow)))
            ):
                continue
            verdicts[probe] = self._passes(probe, verdict)
        return verdicts

    def passes(self, probe: Probe) -> bool:
        """Whether the first packet of a flow arrives."""
        return self._passes(probe, evaluate(self.tables, self.flow(probe)))

    def is_early(self, probe: Probe) -> bool:
        """Whether policy is asked before connection tracking or destination NAT."""
        trace = evaluate(self.tables, self.flow(probe)).trace
        return any(step.part in EARLY for step in trace)

    def _passes(self, probe: Probe, verdict: Verdict) -> bool:
        if not self._is_there(probe.source) or not self._is_there(_arrival(probe)):
            return False
        if probe.source == NODE and probe.target < NODE:
            return True  # what the host sends to its workloads is its own affair
        if probe.port == TRANSLATED and _untracked(verdict):
            return False  # nothing is translated, and nobody listens
        if probe.source < NODE and probe.target == NODE and probe.port != TRANSLATED:
            spec: dict[str, Any] = self.told.get(Key("FelixConfiguration", "default"), {})
            action = spec.get("spec", {}).get("defaultEndpointToHostAction", "Drop")
            return verdict.action is Action.ALLOW and action != "Drop"
        return verdict.action is Action.ALLOW

    def flow(self, probe: Probe) -> Flow:
        """A probe as the node sees it."""
        source, target = probe.source, probe.target
        translated, arrives_at = probe.port == TRANSLATED, _arrival(probe)
        has_ports = probe.port > 0
        return Flow(
            _address(source, probe.version),
            _address(arrives_at, probe.version),
            probe.protocol,
            40000 if has_ports else None,
            (80 if translated else probe.port) if has_ports else None,
            None if has_ports else {4: 8, 6: 128}[probe.version],
            None if has_ports else 0,
            src_endpoint=self._end(source, arrives_at),
            dst_endpoint=self._end(arrives_at, source),
            entry=None if source == NODE else self._guard(source),
            exit=None if arrives_at == NODE else self._guard(arrives_at),
            original_dst=_address(target, probe.version) if translated else None,
            original_dst_port=probe.port if translated else None,
        )

    def _end(self, end: int, other: int) -> EndpointId | None:
        """The endpoint that an end is to packets from or to another."""
        if end < NODE:
            return _workload(end)
        return self._guard(other) if end == NODE else None

    def _is_there(self, end: int) -> bool:
        """Whether the node knows of it: a pod without endpoint sends and gets nothing."""
        if end >= NODE:
            return True
        id = _workload(end)
        return Key(id.kind, id.name, id.namespace) in self.told

    def _guard(self, end: int) -> EndpointId | None:
        """The host endpoint of the interface towards an end."""
        found = {
            obj["spec"]["interfaceName"]: EndpointId("HostEndpoint", "", key.name)
            for key, obj in self.told.items()
            if key.kind == "HostEndpoint"
        }
        return found.get(INTERFACES.get(end, ""), found.get("*"))


_MOST = 100  # moments of a change: where there are more, the packet is not asked about


class Change:
    """What must not be seen of a change from one oracle's world to another's."""

    def __init__(self, before: Oracle, after: Oracle, *, atomic: bool) -> None:
        """``atomic``: sets and chains change at once."""
        self.before, self.after = before, after
        self._atomic = atomic

    def lasting(self, probe: Probe) -> bool | None:
        """What happens to a packet before and after; None: it differs."""
        verdict = self.before.passes(probe)
        return verdict if verdict == self.after.passes(probe) else None

    def steady(self, probe: Probe) -> bool | None:
        """What happens to a packet at any moment of the change; None: it may differ.

        Where sets are not changed at once with the chains, a packet may see some of the new
        members before the new chains, and some of the old ones after them: first of those that are
        kept out, and last of those. Where they are, one that is on its way through the old chains
        may look into the new sets. What is asked about in several tables may meet the old one here
        and the new one there.
        """
        verdict = self.lasting(probe)
        if verdict is None:
            return None
        if self.before.is_early(probe) or self.after.is_early(probe):
            return None
        for count, moment in enumerate(self._moments(probe)):
            if count > _MOST or moment.passes(probe) != verdict:
                return None
        return verdict

    def _moments(self, probe: Probe) -> Iterator[Oracle]:
        old, new = dict(self.before.tables.sets), dict(self.after.tables.sets)
        if self._atomic:
            yield self.before.with_sets(old | new)
            return
        roles = Roles(self.before.tables.policies.values(), self.after.tables.policies.values())
        both = {id: {*old[id], *new[id]} for id in old.keys() & new.keys()}
        for some in roles.prefixes(self._differences(probe, old, new)):
            yield self.before.with_sets(old | {id: both[id] for id in some})
        for some in roles.prefixes(self._differences(probe, new, old)):
            yield self.after.with_sets(new | {id: both[id] for id in some})

    @staticmethod
    def _differences(
        probe: Probe,
        old: Mapping[str, Collection[Member]],
        new: Mapping[str, Collection[Member]],
    ) -> list[str]:
        """Sets in both to which something is added that the packet could meet."""
        ends = (_address(probe.source, probe.version), _address(probe.target, probe.version))
        first_pod = _address(0, probe.version)  # to which some are translated
        found = []
        for id in old.keys() & new.keys():
            added = set(new[id]) - set(old[id])
            nets = [m.net if isinstance(m, NamedPortMember) else m for m in added]
            if any(net.contains(end) for net in nets for end in (*ends, first_pod)):
                found.append(id)
        return sorted(found)


class Roles:
    """Whether sets keep their members out, let them in, or both, by policies before and after."""

    def __init__(self, *policies: Iterable[CompiledPolicy]) -> None:
        self._kept_out: set[str] = set()
        self._let_in: set[str] = set()
        for policy in itertools.chain(*policies):
            for rule in (*(policy.ingress or ()), *(policy.egress or ())):
                if policy.id.is_staged or rule.action is Action.LOG:
                    continue
                match = rule.match
                wanted = {*match.src_sets, *match.dst_sets}
                wanted |= {*match.src_named_ports, *match.dst_named_ports}
                unwanted = {*match.not_src_sets, *match.not_dst_sets}
                unwanted |= {*match.not_src_named_ports, *match.not_dst_named_ports}
                if rule.action is Action.DENY:
                    wanted, unwanted = unwanted, wanted
                self._let_in |= wanted
                self._kept_out |= unwanted

    def prefixes(self, ids: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """Of those sets, which may have members already or still, as they come or go by role."""
        before: tuple[str, ...] = ()
        for role in range(3):
            own = tuple(id for id in ids if self._of(id) == role)
            yield from (before + some for some in _subsets(own))
            before += own

    def _of(self, id: str) -> int:
        return (id in self._let_in) + (id not in self._kept_out)


def _subsets(ids: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for size in range(len(ids) + 1):
        yield from itertools.combinations(ids, size)


def _address(end: int, version: int) -> Net:
    return parse_net(ENDS[end][version])


def _arrival(probe: Probe) -> int:
    """Where a packet goes in the end."""
    return 0 if probe.port == TRANSLATED else probe.target


def _workload(end: int) -> EndpointId:
    namespace, pod = PODS[end]
    name = workload_endpoint_name("node1", "k8s", pod, "eth0")
    return EndpointId("WorkloadEndpoint", namespace, name)


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


def _untracked(verdict: Verdict) -> bool:
    return any(step.part is Part.UNTRACKED and step.decides for step in verdict.trace)
