"""Long lists of policies: what is looked up at once does what walking it would have done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.net import Net, parse_net
from datastore.interface import JSON, Key
from felix import names, runs
from felix.chains import Index, MarkAndReturn, Peer, Ticket
from felix.index_keys import Keys
from felix.nftables_index import keys_of
from felix.policy_rules import UNIFORM, Step
from felix.runs import LEAST, MOST_MEMBERS, MOST_PORTS, MOST_PORTS_EACH, Runs
from kernel.netns import inside
from policy.engine import SetDelta
from policy.model import (
    Action,
    CompiledPolicy,
    Direction,
    EndpointBinding,
    Match,
    Member,
    PolicyId,
    PortRange,
    Rule,
    SetKind,
    TierBinding,
)
from tests.felix.crossroads import Crossroads
from tests.felix.test_differential import Enforcers, check
from tests.policy import objects

pytestmark = pytest.mark.timeout(600)  # many examples, each with much to do for the kernel

HTTP = (PortRange(80, 80),)
NONE: frozenset[Member] = frozenset()


def policy(number: int, *rules: Rule, kind: str = "GlobalNetworkPolicy") -> CompiledPolicy:
    return CompiledPolicy(PolicyId(kind, "", f"p{number:03}"), rules, None)


def allow(number: int, **match: object) -> CompiledPolicy:
    conditions = {"protocol": 6, "dst_ports": HTTP, **match}
    return policy(number, Rule(Action.ALLOW, Match(**conditions)))  # type: ignore[arg-type]


def deny(number: int) -> CompiledPolicy:
    return policy(number, Rule(Action.DENY, Match(src_sets=("s:bad",))))


def bind(policies: list[CompiledPolicy], *interfaces: str) -> Runs:
    """Endpoints that these policies apply to, in this order."""
    found = Runs()
    found.change_policies({each.id: each for each in policies})
    for interface in interfaces or ("cali1",):
        found.bind(interface, EndpointBinding((tier(policies),), ()))
    found.flush()
    return found


def tier(policies: list[CompiledPolicy]) -> TierBinding:
    return TierBinding("default", Action.DENY, tuple(each.id for each in policies), ())


def shape(found: Runs, policies: list[CompiledPolicy]) -> list[int | str]:
    """The steps of the tier: how many policies an index holds, or a policy's name."""
    by_chain = {names.policy_chain(Direction.INGRESS, each.id): each.id for each in policies}
    return [
        len(found.indexes[step.chain].entries)
        if step.chain in found.indexes
        else by_chain[step.chain].name
        for step in found.steps(tier(policies), Direction.INGRESS)
    ]


def grown(size: int, by: int) -> SetDelta:
    members = frozenset(Net(4, number, 32) for number in range(size, size + abs(by)))
    added, removed = (members, NONE) if by > 0 else (NONE, members)
    return SetDelta(SetKind.NET, added, removed, size == 0, False)


def test_few_policies_are_walked_one_by_one() -> None:
    policies = [allow(number) for number in range(LEAST - 1)]
    found = bind(policies)
    assert not found.indexes
    assert shape(found, policies) == [each.id.name for each in policies]


def test_many_that_allow_are_one_lookup() -> None:
    policies = [allow(number, src_sets=(f"s:{number}",)) for number in range(LEAST)]
    found = bind(policies)
    assert shape(found, policies) == [LEAST]
    (index,) = found.indexes.values()
    assert index.side is Peer.SOURCE
    assert isinstance(index.action, MarkAndReturn)
    assert index.entries[3][1] == (Ticket(6, (80,), "s:3"),)


@pytest.mark.parametrize(
    "other",
    [
        deny(500),
        policy(500, Rule(Action.LOG)),
        policy(500, Rule(Action.ALLOW), Rule(Action.DENY)),
    ],
    ids=["denies", "logs", "both"],
)
def test_order_is_kept_where_it_matters(other: CompiledPolicy) -> None:
    policies = [allow(number) for number in range(2 * LEAST)]
    policies.insert(LEAST, other)
    assert shape(bind(policies), policies) == [LEAST, "p500", LEAST]


def test_a_staged_policy_stays_where_it_stands() -> None:
    staged = policy(500, Rule(Action.ALLOW), kind="StagedGlobalNetworkPolicy")
    policies = [*(allow(number) for number in range(LEAST)), staged, deny(501)]
    found = bind(policies)
    assert shape(found, policies) == [LEAST, "p500", "p501"]
    steps = list(found.steps(tier(policies), Direction.INGRESS))
    assert steps[1] == Step(names.policy_chain(Direction.INGRESS, staged.id), decides=False)


@pytest.mark.parametrize(
    "match",
    [
        Match(protocol=6, dst_ports=(PortRange(1, MOST_PORTS + 1),)),
        Match(protocol=6, dst_ports=(PortRange(1, MOST_PORTS_EACH + 1),), src_sets=("s:a",)),
        Match(protocol=6, src_sets=("s:a", "s:b")),
        Match(protocol=6, not_src_sets=("s:a",)),
        Match(protocol=6, dst_nets=(parse_net("10.0.0.0/8"),)),
        Match(protocol=6, dst_named_ports=("n:http",)),
        Match(protocol=1, icmp_type=8),
        Match(dst_ports=HTTP),
        Match(version=4),
    ],
)
def test_what_a_ticket_can_not_say_is_walked_behind_the_rest(match: Match) -> None:
    """All of the row allow: it doesn't matter which is asked first."""
    odd = policy(3, Rule(Action.ALLOW, match))
    policies = [odd if number == 3 else allow(number) for number in range(LEAST + 1)]
    assert shape(bind(policies), policies) == [LEAST, "p003"]


def test_a_policy_without_rules_is_nobodys_barrier() -> None:
    policies = [allow(number) for number in range(LEAST)]
    policies.insert(4, policy(500))
    assert shape(bind(policies), policies) == [LEAST + 1]


def test_a_large_set_is_not_spread_over_indexes() -> None:
    policies = [allow(number, src_sets=(f"s:{number}",)) for number in range(LEAST + 1)]
    found = bind(policies)
    for change, expected in (
        (grown(0, MOST_MEMBERS), [LEAST + 1]),
        (grown(MOST_MEMBERS, 1), [LEAST, "p003"]),
        (grown(MOST_MEMBERS, -1), [LEAST + 1]),
    ):
        found.change_sets({"s:3": change})
        found.flush()
        assert shape(found, policies) == expected


def test_endpoints_with_the_same_policies_share_an_index() -> None:
    policies = [allow(number) for number in range(LEAST)]
    found = bind(policies, "cali2", "cali1", "cali3")
    assert len(found.indexes) == 1
    found.bind("cali3", None)
    assert found.flush()[0] == set()
    assert found.indexes == bind(policies, "cali1", "cali2").indexes


def test_an_index_keeps_its_name_while_policies_come_change_and_go() -> None:
    policies = [allow(number) for number in range(LEAST)]
    found = bind(policies, "cali1", "cali2")
    name = next(iter(found.indexes))

    changed = allow(3, dst_ports=(PortRange(81, 81),))
    found.change_policies({changed.id: changed})
    assert found.flush() == (set(), {name})
    assert found.indexes[name].entries[3][1] == (Ticket(6, (81,)),)

    more = [*policies[:3], changed, *policies[4:], allow(100)]
    found.change_policies({more[-1].id: more[-1]})
    for interface in ("cali1", "cali2"):
        found.bind(interface, EndpointBinding((tier(more),), ()))
    found.flush()
    assert list(found.indexes) == [name]
    assert found.indexes == bind(more, "cali1", "cali2").indexes


def test_the_order_of_events_does_not_matter() -> None:
    policies = [allow(number) for number in range(2 * LEAST)]
    policies[LEAST] = deny(LEAST)
    found = Runs()
    for interface in ("cali2", "cali1"):
        found.bind(interface, EndpointBinding((tier(policies),), ()))
        found.flush()
    for each in reversed(policies):
        found.change_policies({each.id: each})
        found.flush()
    assert found.indexes == bind(policies, "cali1", "cali2").indexes
    assert shape(found, policies) == shape(bind(policies), policies)


# --- the keys of an index ---

SETS = ("s:a", "s:b")
NETS = [parse_net(text) for text in ("10.0.0.1", "10.0.0.2", "10.0.0.0/24", "0.0.0.0/0", "fd00::1")]
tickets = st.builds(
    Ticket,
    st.sampled_from([None, 6, 17]),
    st.just(()),
    st.sampled_from(["", *SETS]),
    st.none(),
) | st.builds(
    Ticket,
    st.sampled_from([6, 17]),
    st.sampled_from([(80,), (80, 81)]),
    st.just(""),
    st.none() | st.lists(st.sampled_from(NETS), max_size=3, unique=True).map(tuple),
)
entries = st.dictionaries(
    st.sampled_from(["one", "two", "three"]), st.lists(tickets, max_size=3).map(tuple)
)
members = st.frozensets(st.sampled_from(NETS))


@settings(max_examples=100, deadline=None)
@given(st.lists(entries | st.tuples(st.sampled_from(SETS), members), max_size=8))
def test_keys_are_those_of_a_fresh_start(
    changes: list[dict[str, tuple[Ticket, ...]] | tuple[str, frozenset[Net]]],
) -> None:
    holds: dict[str, frozenset[Member]] = dict.fromkeys(SETS, NONE)
    keys = Keys(4, keys_of, holds.__getitem__)
    told: dict[object, set[bytes]] = {}
    index = Index("x", Peer.SOURCE, UNIFORM[Action.ALLOW], ())
    for change in changes:
        if isinstance(change, dict):
            index = Index("x", Peer.SOURCE, UNIFORM[Action.ALLOW], tuple(change.items()))
            keys.want(index)
        else:
            name, now = change
            before, holds[name] = holds[name], frozenset(now)
            keys.change_set(name, holds[name] - before, before - holds[name])
        for key_shape, (came, went) in keys.flush().items():
            present = told.setdefault(key_shape, set())
            assert not came & present and went <= present
            present |= came
            present -= went
    fresh = Keys(4, keys_of, holds.__getitem__)
    fresh.want(index)
    assert keys.shapes == fresh.shapes
    assert {s: keys.keys(s) for s in keys.shapes} == {s: fresh.keys(s) for s in fresh.shapes}
    assert {s: k for s, k in told.items() if k} == {s: set(fresh.keys(s)) for s in fresh.shapes}


# --- packets ---


@pytest.fixture(scope="module")
def enforcers() -> Iterator[Enforcers]:
    """Enforcers for which every list is long."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(runs, "LEAST", 1)
        places = {name: Crossroads(name, stack) for name in ("nftables", "iptables")}
        yield {name: (place, place.prober(stack)) for name, place in places.items()}


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(objects.worlds())
def test_packets_fare_as_the_oracle_says(enforcers: Enforcers, world: dict[Key, JSON]) -> None:
    check(enforcers, world)
    place, _ = enforcers["nftables"]
    place.brain.read()
    with inside(place.node.netns.fd):
        assert place.brain.dataplane.apply(0.0) == 0  # the kernel has what is wanted
