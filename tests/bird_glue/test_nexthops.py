"""Longest-prefix match, and how the kernel's routes resolve a next hop."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import BITS, Net, host_net, parse_net
from bird_glue.nexthops import PodRoute, PrefixTable, Topology
from kernel.routes import PROTO_BGP, PROTO_FELIX, Hop, Route


def net(text: str) -> Net:
    return parse_net(text)


@st.composite
def nets(draw: st.DrawFn) -> Net:
    version = draw(st.sampled_from((4, 6)))
    length = draw(st.integers(0, BITS[version]))
    value = draw(st.sampled_from((0, 1, 5))) << (BITS[version] - 3)
    value |= draw(st.integers(0, 3))
    shift = BITS[version] - length
    return Net(version, value >> shift << shift, length)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), nets())), st.lists(nets(), min_size=1))
def test_longest_match_is_that_of_a_linear_search(
    changes: list[tuple[bool, Net]], probes: list[Net]
) -> None:
    table: PrefixTable[int] = PrefixTable()
    plain: dict[Net, int] = {}
    for number, (add, where) in enumerate(changes):
        if add:
            table[where] = plain[where] = number
        else:
            assert table.pop(where) == plain.pop(where, None)
    for probe in probes:
        host = host_net(probe.version, probe.address)
        matching = [where for where in plain if where.contains(host)]
        best = max(matching, key=lambda where: where.length, default=None)
        assert table.match(host) == (None if best is None else (best, plain[best]))
        assert table.get(probe) == plain.get(probe)


ROUTES = [
    Route(net("10.0.0.0/24"), (Hop(2),), protocol=2),
    Route(net("0.0.0.0/0"), (Hop(2, net("10.0.0.1").address),), protocol=3),
    Route(net("10.9.0.0/16"), kind="blackhole", protocol=3),
    Route(net("10.8.0.0/16"), (Hop(2, net("10.0.0.8").address),), protocol=PROTO_BGP),
    Route(net("10.7.0.0/16"), (Hop(9),), protocol=PROTO_FELIX),
]
TOPOLOGY = Topology(ROUTES, [net("10.0.0.100")])


def test_connected_static_default_and_blackhole() -> None:
    direct = TOPOLOGY.resolve(net("10.0.0.7"))
    assert direct
    assert direct.direct
    assert direct.hops == (Hop(2, net("10.0.0.7").address),)
    behind = TOPOLOGY.resolve(net("172.16.0.1"))
    assert behind
    assert not behind.direct
    assert behind.hops == (Hop(2, net("10.0.0.1").address),)
    assert TOPOLOGY.resolve(net("10.9.1.1")) is None
    assert TOPOLOGY.resolve(net("10.0.0.100")) is None  # here
    assert TOPOLOGY.resolve(net("fe80::1")) is None
    assert TOPOLOGY.subnets == {net("10.0.0.0/24")}


def test_routes_of_manx_itself_say_nothing_about_next_hops() -> None:
    for text in ("10.8.0.1", "10.7.0.1"):
        resolution = TOPOLOGY.resolve(net(text))
        assert resolution
        assert resolution.via == net("0.0.0.0/0")


def test_interfaces_without_a_carrier_lead_nowhere() -> None:
    both = (Hop(2, net("10.0.0.1").address), Hop(3, net("10.1.0.1").address))
    routes = [*ROUTES[:1], Route(net("0.0.0.0/0"), both, protocol=3)]
    topology = Topology(routes, running=frozenset({3}))
    assert topology.subnets == frozenset()
    found = topology.resolve(net("10.0.0.7"))
    assert found
    assert found.hops == both[1:]
    assert not topology.same(Topology(routes))


def test_of_equal_prefixes_the_lowest_metric_counts() -> None:
    low = Route(net("0.0.0.0/0"), (Hop(2, 1),), protocol=3, metric=50)
    high = Route(net("0.0.0.0/0"), (Hop(2, 2),), protocol=3, metric=100)
    for order in ([low, high], [high, low]):
        found = Topology(order).resolve(net("1.1.1.1"))
        assert found
        assert found.hops == low.hops


def test_a_peer_that_only_a_gateway_leads_to() -> None:
    peer, gateway = net("10.9.0.7"), net("10.0.0.1")
    topology = Topology(ROUTES, [net("10.0.0.100")])
    assert topology.resolve(peer) is None
    assert topology.configure({peer: gateway})
    assert not topology.configure({peer: gateway})
    found = topology.resolve(peer)
    assert found
    assert (found.hops, found.direct, found.via) == ((Hop(2, gateway.address),), False, peer)
    # gateways that lead to each other lead nowhere
    other = net("10.9.0.8")
    topology.configure({peer: other, other: peer})
    assert topology.resolve(peer) is None
    assert topology.configure({})


def test_interfaces_that_are_ignored() -> None:
    topology = Topology(ROUTES, names={2: "eth0"})
    assert topology.configure({}, ("eth*", "docker0"))
    assert topology.resolve(net("10.0.0.7")) is None
    default = topology.resolve(net("192.0.2.1"))  # a route by a gateway is one all the same
    assert default
    assert topology.configure({}, ("docker0",))
    assert topology.resolve(net("10.0.0.7"))


def test_names_and_pods() -> None:
    routes = [*ROUTES, Route(net("10.7.0.7"), (Hop(9),), protocol=PROTO_FELIX)]
    topology = Topology(routes, names={2: "eth0", 9: "cali1"})
    assert topology.pods == {net("10.7.0.7"): PodRoute(9, 0)}
    assert topology.interface((Hop(2),)) == "eth0"
    assert topology.interface((Hop(3),)) is None
    assert topology.interface(()) is None
    assert {str(found[0]) for found in topology.routes()} == {
        *("10.0.0.0/24", "0.0.0.0/0", "10.9.0.0/16"),
    }
