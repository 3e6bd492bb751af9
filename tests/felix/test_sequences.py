"""Changes, one after the other, under packets: nothing is lost, nothing slips through.

What is allowed before and after a change arrives all the while, what is forbidden before and after
never does; also while another enforcer takes over. At the end the kernel holds what it would hold
after a fresh start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datastore.interface import JSON, Key
from felix.backends import Backend
from tests.felix.crossroads import Crossroads
from tests.felix.enforcers import ENFORCERS
from tests.felix.fabric import Brain
from tests.felix.oracle import ENDS, NEAR, NODE, PROBES, TRANSLATED, Change
from tests.felix.world import Node, cluster, global_policy
from tests.policy import objects
from tests.support.netns import run
from tests.support.probes import TCP, UDP, Probe
from tests.support.streams import Course, Streams

pytestmark = pytest.mark.timeout(600)  # many examples, each with much to do for the kernel

# Some objects become others, or another enforcer takes over.
Step = dict[Key, JSON | None] | Backend
FLOWS = tuple(
    probe
    for probe in PROBES
    if probe.protocol in (UDP, TCP) and probe.port in (80, TRANSLATED)
    # Of TCP half: to each from those behind it.
    if probe.protocol == UDP or probe.source > probe.target
)
MARGIN = 10  # rounds whose packets may still be on their way
NAMES = {
    Backend.NFTABLES: "nftables",
    Backend.IPTABLES_NFT: "iptables",
    Backend.IPTABLES_LEGACY: "iptables-legacy",
}


class Traffic:
    """Crossroads, and packets on all courses."""

    def __init__(self, stack: ExitStack) -> None:
        self.place = Crossroads("nftables", stack)
        self.backend = Backend.NFTABLES
        self.world = {key: objects.POOLS[key][0] for key in objects.GIVEN}
        self.place.become(self.world)
        ends = self.place.ends
        courses = []
        for source, target, protocol, port, version in FLOWS:
            to = (0, 80) if port == TRANSLATED else (target, port)
            received_at = ENDS[to[0]][version], to[1]
            way = ends[source], ENDS[source][version], ENDS[target][version], port
            courses.append(Course(*way, ends[to[0]], received_at, protocol))
        self.streams = Streams(courses, stack)

    def take(self, step: Step, *, one_table: bool = False) -> None:
        """Do it, under packets. ``one_table``: it changes rules of one kernel table, no sets."""
        before, dropped = self.place.oracle.copy(), self.streams.machine_dropped()
        first = self.streams.start()
        begin = self.streams.rounds - MARGIN
        if isinstance(step, Backend):
            self.place.brain.switch(step)
        else:
            for key, obj in step.items():
                if obj is None:
                    self.world.pop(key, None)
                else:
                    self.world[key] = obj
            self.place.become(self.world)
        end = self.streams.rounds + MARGIN
        self.streams.wait_until(end + MARGIN)
        last = self.streams.stop()
        atomic = self.backend is Backend.NFTABLES or isinstance(step, Backend)
        change = Change(before, self.place.oracle.copy(), atomic=atomic)
        for number, probe in enumerate(FLOWS):
            verdicts = {
                range(first, begin): change.before.passes(probe),
                range(begin, end): change.lasting(probe) if one_table else change.steady(probe),
                range(end, last): change.after.passes(probe),
            }
            self._check(number, verdicts, dropped, f"{self.backend.value}, {step}")
        if isinstance(step, Backend):
            self.backend = step

    def _check(
        self, number: int, verdicts: dict[range, bool | None], dropped: int, where: str
    ) -> None:
        allowed = {r for rounds, verdict in verdicts.items() if verdict for r in rounds}
        forbidden = {r for rounds, verdict in verdicts.items() if verdict is False for r in rounds}
        arrived = self.streams.arrived(number, allowed)
        said = where, FLOWS[number], verdicts
        # What a full queue of this machine dropped can't be told from what policy did.
        lost = allowed - arrived if dropped == self.streams.machine_dropped() else set()
        assert not lost, (*said, "lost", sorted(lost))
        assert not forbidden & arrived, (*said, "slipped through", sorted(forbidden & arrived))

    def kernel(self) -> list[str]:
        """All that felix made there, once what it has to try again is done."""
        self.place.brain.settle()
        return made(self.place.node, self.backend)

    def fresh(self) -> list[str]:
        """What it would make on a node that has nothing yet."""
        with ExitStack() as stack:
            (node,) = stack.enter_context(cluster("node1"))
            brain = Brain(node, NAMES[self.backend], stack)
            brain.read()
            for key, obj in self.place.told.items():
                brain.snapshot.update(key, obj)
            brain.enforce()
            return made(node, self.backend)


def made(node: Node, backend: Backend) -> list[str]:
    """What an enforcer made, in an order of its own; tables and chains of others left out."""
    if backend is Backend.NFTABLES:
        return ENFORCERS["nftables"].kernel(node)
    lines = run(node.netns, "ipset", "save").stdout.splitlines()
    # A set's seed is drawn when it is made, and its size follows what it ever held.
    found = [line.split(" initval")[0].split(" hashsize")[0] for line in lines]
    variant = backend.value.removeprefix("iptables-")
    for command in (f"iptables-{variant}-save", f"ip6tables-{variant}-save"):
        table = ""
        positions: Counter[str] = Counter()
        for line in run(node.netns, command).stdout.splitlines():
            if line.startswith("*"):
                table = line
            elif line.startswith(("-A", ":cali")):
                chain = " ".join(line.split()[:2] if line[0] == "-" else line.split()[:1])
                positions[table + chain] += 1
                found.append(f"{command} {table} {chain} {positions[table + chain]:4} {line}")
    return sorted(found)


@pytest.fixture(scope="module")
def traffic() -> Iterator[Traffic]:
    with ExitStack() as stack:
        yield Traffic(stack)


@pytest.mark.parametrize("backend", Backend)
def test_addresses_move_from_set_to_set(traffic: Traffic, backend: Backend) -> None:
    """A pod becomes another's friend in another way, alone or together with the policy."""
    given = {key: objects.POOLS[key][0] for key in objects.GIVEN}
    pods = [Key("WorkloadEndpoint", name, namespace) for namespace, name in objects.PODS]
    friend = Probe(2, 1, UDP, 80)  # blue/a to red/b

    def become(label: str, *allowed: str) -> None:
        labels: tuple[dict[str, str], ...] = ({}, {"role": "x"}, {"app": label})
        world = given | {
            key: {"spec": {"labels": own, "account": None, "ports": []}}
            for key, own in zip(pods, labels, strict=True)
        }
        # The sets of all friends are in use anyway.
        for name, selector, apps in (("a", "!has(role)", "xyz"), ("p", "has(role)", allowed)):
            rules = [{"action": "Allow", "source": {"selector": f"app == '{a}'"}} for a in apps]
            spec = {"selector": selector, "types": ["Ingress"], "ingress": rules}
            world[Key("GlobalNetworkPolicy", name)] = global_policy(name, **spec)
        traffic.take(dict.fromkeys(traffic.world.keys() - world.keys()) | world)
        assert traffic.place.oracle.passes(friend)

    traffic.take(backend)
    become("x", *"xyz")
    for app in "yzx" * 3:
        become(app, *"xyz")
    for app in "xyz" * 3:
        become(app, app)


CROWD = [f"100.64.{number >> 8}.{number & 255}/32" for number in range(2000)]


@pytest.mark.parametrize("backend", Backend)
def test_who_is_kept_out_as_soon_as_let_in_never_passes(traffic: Traffic, backend: Backend) -> None:
    """Nor who is let in no more as soon as kept out no more. Many come along, so that it takes."""
    given = {key: objects.POOLS[key][0] for key in objects.GIVEN}
    pods = [Key("WorkloadEndpoint", name, namespace) for namespace, name in objects.PODS]
    rules = [
        {"action": "Deny", "source": {"selector": "kept == 'out'"}},
        {"action": "Allow", "source": {"selector": "let == 'in'"}},
    ]
    spec = {"selector": "has(role)", "types": ["Ingress"], "ingress": rules}
    stranger = Probe(2, 1, UDP, 80)  # blue/a to red/b

    def become(labels: dict[str, str]) -> None:
        world = given | {
            key: {"spec": {"labels": own, "account": None, "ports": []}}
            for key, own in zip(pods, ({}, {"role": "x"}, labels), strict=True)
        }
        world[Key("GlobalNetworkPolicy", "p")] = global_policy("p", **spec)
        world[Key("GlobalNetworkSet", "crowd")] = {
            "kind": "GlobalNetworkSet",
            "metadata": {"name": "crowd", "labels": labels},
            "spec": {"nets": CROWD},
        }
        traffic.take(dict.fromkeys(traffic.world.keys() - world.keys()) | world)
        assert not traffic.place.oracle.passes(stranger)

    traffic.take(backend)
    for _ in range(2):
        become({"kept": "no"})
        become({"kept": "out", "let": "in"})


@pytest.mark.parametrize("part", ["preDNAT", "doNotTrack"])
@pytest.mark.parametrize("backend", Backend)
def test_what_is_asked_early_changes_without_a_gap(
    traffic: Traffic, backend: Backend, part: str
) -> None:
    """Before destination NAT and connection tracking: rules and policies come and go."""
    world = {key: objects.POOLS[key][0] for key in objects.GIVEN}
    world[Key("HostEndpoint", "near")] = {
        "kind": "HostEndpoint",
        "metadata": {"name": "near", "labels": {"role": "host"}},
        "spec": {"node": "node1", "interfaceName": "eth0"},
    }

    def ports(action: str, protocol: str, *ports: int, **source: Any) -> JSON:
        return {
            "action": action,
            "protocol": protocol,
            "destination": {"ports": [*ports]},
            "source": source,
        }

    deny, allow = ports("Deny", "UDP", TRANSLATED), ports("Allow", "TCP", 80, TRANSLATED)
    other = ports("Deny", "TCP", 81, nets=["192.0.2.0/24", "198.51.100.0/24"])
    own = {"action": "Allow", "protocol": "UDP", "source": {"nets": ["198.51.100.0/24"]}}
    rows: tuple[dict[str, list[JSON]], ...] = (
        {"m": [deny, allow]},
        {"m": [other, deny, own, allow]},
        {"a": [other], "m": [deny, allow], "z": [own]},
        {"a": [deny], "z": [other, allow]},
        {"m": [deny, allow]},
    )
    traffic.take(backend)
    for number, row in enumerate(rows):
        policies = {
            Key("GlobalNetworkPolicy", name): global_policy(
                name,
                selector="role == 'host'",
                types=["Ingress"],
                ingress=rules,
                applyOnForward=True,
                order=float(ord(name)),
                **{part: True},
            )
            for name, rules in row.items()
        }
        step = {**dict.fromkeys(traffic.world.keys() - world.keys()), **world, **policies}
        traffic.take(step, one_table=number > 0)
        oracle = traffic.place.oracle
        assert not oracle.passes(Probe(NEAR, NODE, UDP, TRANSLATED))
        assert oracle.passes(Probe(NEAR, NODE, TCP, 80))


steps = st.one_of(
    st.lists(objects.changes(), min_size=1, max_size=3).map(dict),
    st.lists(objects.changes(), min_size=1, max_size=1).map(dict),
    st.sampled_from(tuple(Backend)),
)


@pytest.mark.slow
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.sampled_from(tuple(Backend)),
    objects.worlds(),
    st.lists(steps, min_size=1, max_size=6),
)
def test_no_packet_sees_a_change_that_is_not_about_it(
    traffic: Traffic, backend: Backend, world: dict[Key, JSON], changes: list[Step]
) -> None:
    start: Step = {**dict.fromkeys(traffic.world.keys() - world.keys()), **world}
    for step in (backend, start, *changes):
        traffic.take(step)
    assert traffic.kernel() == traffic.fresh()
