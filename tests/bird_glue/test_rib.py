"""Selection of routes: by hand, and against a recomputation from nothing in another order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import BITS, V4, V6, Net, parse_net
from bird_glue.adj_rib_in import AdjRibIn
from bird_glue.decision import MARTIANS, Guard, Session, Vicinity, prefix_refusal
from bird_glue.messages import Announced, Attributes, Opened, Segment, Updated
from bird_glue.nexthops import Topology
from bird_glue.rib import NO_NEXT_HOP, Rib, Selection
from kernel.routes import Hop, Route

KERNEL = 2  # protocol number of connected routes
OWN_AS = 64512
A, B, C = (parse_net(f"10.0.0.{n}") for n in (1, 2, 3))
FAR = parse_net("172.16.5.5")  # behind a gateway, or behind a BGP route
NET = parse_net("10.50.0.0/24")
CONNECTED = Route(parse_net("10.0.0.0/24"), (Hop(2),), protocol=KERNEL)
TOPOLOGY = Topology([CONNECTED], [parse_net("10.0.0.100")])
DEFAULT = Route(parse_net("0.0.0.0/0"), (Hop(2, A.address),), protocol=3)


def session(external: bool = True, allowed: int = 0) -> Session:
    return Session(external, frozenset((OWN_AS,)), allowed)


def path(*asns: int) -> tuple[Segment, ...]:
    return (Segment("as-sequence", asns),) if asns else ()


def announce(peer: Net, net: Net, next_hop: Net | None = None, **attributes: object) -> Updated:
    made = Attributes(**{"origin": 0, **attributes})  # type: ignore[arg-type]
    return Updated(peer, False, (), (Announced(net, next_hop or peer),), made)


def withdraw(peer: Net, net: Net) -> Updated:
    return Updated(peer, False, (net,), (), Attributes())


def make(*events: Updated, topology: Topology = TOPOLOGY, guard: Guard | None = None) -> Rib:
    routes = AdjRibIn()
    routes.set_peers({A: session(), B: session(), C: session(external=False)})
    rib = Rib(routes)
    rib.set_topology(topology)
    rib.set_guard(guard or Guard())
    for number, peer in enumerate((A, B, C)):
        routes.opened(Opened(peer, 65001, 90, number + 1, None))
        routes.up(peer, 0)
    for event in events:
        routes.updated(event)
    rib.flush()
    return rib


def best(*events: Updated) -> Net:
    return make(*events).selected[NET].best.peer


def hops(rib: Rib, net: Net = NET) -> tuple[Hop, ...]:
    return rib.selected[net].hops if net in rib.selected else ()


def test_every_step_of_the_decision() -> None:
    long, short = path(1, 2), path(1)
    assert best(announce(A, NET, as_path=short), announce(C, NET, local_preference=200)) == C
    assert best(announce(A, NET, as_path=long), announce(B, NET, as_path=short)) == B
    assert best(announce(A, NET, origin=2), announce(B, NET, origin=1)) == B
    assert best(announce(A, NET, med=5), announce(B, NET)) == B
    assert best(announce(A, NET, as_path=short), announce(C, NET, as_path=short)) == A
    assert best(announce(A, NET), announce(B, NET)) == A  # the lower router id


def test_equal_paths_share_the_traffic() -> None:
    rib = make(announce(A, NET, as_path=path(1)), announce(B, NET, as_path=path(2)))
    assert hops(rib) == (Hop(2, A.address), Hop(2, B.address))
    rib = make(announce(A, NET, as_path=path(1)), announce(B, NET, as_path=path(2, 3)))
    assert hops(rib) == (Hop(2, A.address),)


def test_direct_next_hop_comes_before_one_behind_a_gateway() -> None:
    topology = Topology([CONNECTED, DEFAULT])
    rib = make(announce(A, NET, next_hop=FAR), announce(B, NET), topology=topology)
    assert rib.selected[NET].best.peer == B
    rib = make(announce(A, NET, next_hop=FAR), topology=topology)
    assert hops(rib) == (Hop(2, A.address),)


def test_next_hop_that_only_a_bgp_route_leads_to() -> None:
    """A reflected route whose next hop is in another rack, and a default route by BGP."""
    rack = parse_net("172.16.5.0/24")
    rib = make(announce(C, NET, next_hop=FAR), announce(A, rack))
    assert hops(rib) == (Hop(2, A.address),)
    # without the rack's route there is no way
    rib = make(announce(C, NET, next_hop=FAR))
    assert hops(rib) == ()
    assert rib.refusals(C) == {NET: NO_NEXT_HOP}


def test_next_hop_moves_with_the_bgp_route_it_leans_on() -> None:
    routes = AdjRibIn()
    routes.set_peers({A: session(), B: session(), C: session(external=False)})
    rib = Rib(routes)
    rib.set_topology(TOPOLOGY)
    rack = parse_net("172.16.5.0/24")
    for event in (announce(C, NET, next_hop=FAR), announce(A, rack, med=5)):
        routes.updated(event)
    assert set(rib.flush()) == {NET, rack}
    routes.updated(announce(B, rack))
    changes = rib.flush()
    assert {net: selection and selection.hops for net, selection in changes.items()} == {
        NET: (Hop(2, B.address),),
        rack: (Hop(2, B.address),),
    }
    routes.updated(withdraw(A, rack))
    routes.updated(withdraw(B, rack))
    assert rib.flush() == {NET: None, rack: None}


def test_routes_that_lean_on_each_other_are_not_used() -> None:
    one, other = parse_net("172.16.1.0/24"), parse_net("172.16.2.0/24")
    rib = make(
        announce(A, one, next_hop=parse_net("172.16.2.1")),
        announce(A, other, next_hop=parse_net("172.16.1.1")),
    )
    assert rib.selected == {}


def test_what_is_refused_and_why() -> None:
    guard = Guard(
        router_id=77,
        cluster_id=88,
        blocks=(parse_net("10.1.0.0/26"),),
        hosts=frozenset({parse_net("10.0.0.100")}),
        subnets=frozenset({parse_net("10.0.0.0/24")}),
        neighbours=frozenset({B}),
    )
    cases = {
        announce(A, NET, as_path=path(65001, OWN_AS)): "our own AS is in its AS path",
        announce(C, NET, originator=77): "this node is its originator",
        announce(C, NET, clusters=(5, 88)): "our own cluster is in its cluster list",
        announce(
            A, NET, next_hop=parse_net("10.0.0.100")
        ): "its next hop is an address of this node",
        announce(A, parse_net("10.1.0.0/26")): "it is inside a block of this node",
        announce(A, parse_net("10.1.0.4/30")): "it is inside a block of this node",
        announce(A, parse_net("10.0.0.0/24")): "it is a subnet this node is on",
        announce(A, parse_net("10.0.0.100/32")): "it is an address of this node",
        announce(A, parse_net("10.0.0.1/32")): "it is its own next hop",
        announce(A, B): "a peer, gateway or node on a link of this node is in it",
        announce(A, NET, next_hop=parse_net("0.1.2.3")): (
            "its next hop is not an address of a machine"
        ),
        announce(A, parse_net("224.0.0.0/8")): "it is not an address that is routed",
        announce(A, parse_net("127.0.0.1/32")): "it is not an address that is routed",
        announce(A, NET, next_hop=parse_net("192.0.2.1")): NO_NEXT_HOP,
    }
    for event, why in cases.items():
        rib = make(event, guard=guard)
        assert rib.selected == {}, why
        assert list(rib.refusals(event.peer).values()) == [why]
    # what reflectors say means nothing in another AS, nor does a load balancer's address harm
    assert make(announce(A, NET, originator=77, clusters=(88,)), guard=guard).selected
    assert make(announce(A, parse_net("10.0.0.9/32")), guard=guard).selected
    # a route around an own block is fine
    assert make(announce(A, parse_net("10.1.0.0/16")), guard=guard).selected


def test_own_as_may_be_allowed() -> None:
    routes = AdjRibIn()
    routes.set_peers({A: session(allowed=1)})
    rib = Rib(routes)
    rib.set_topology(TOPOLOGY)
    routes.updated(announce(A, NET, as_path=path(65001, OWN_AS)))
    assert rib.flush()[NET]
    routes.updated(announce(A, NET, as_path=path(65001, OWN_AS, OWN_AS)))
    assert rib.flush() == {NET: None}


def test_settings_take_effect_on_what_is_held() -> None:
    rib = make(announce(A, NET))
    rib.set_guard(Guard(blocks=(parse_net("10.50.0.0/16"),)))
    assert rib.flush() == {NET: None}
    rib.set_guard(Guard())
    assert list(rib.flush()) == [NET]
    rib.set_topology(Topology())  # the interface went
    assert rib.flush() == {NET: None}
    rib.set_topology(TOPOLOGY)
    assert list(rib.flush()) == [NET]


NETS = [parse_net(t) for t in ("10.50.0.0/24", "10.50.0.0/16", "172.16.5.0/24", "0.0.0.0/0")]
NEXT_HOPS = [A, B, C, FAR, parse_net("10.50.0.9"), parse_net("192.0.2.1"), parse_net("10.0.0.100")]
attributes = st.builds(
    Attributes,
    origin=st.integers(0, 2),
    as_path=st.lists(st.sampled_from([1, 2, OWN_AS]), max_size=2).map(lambda asns: path(*asns)),
    med=st.none() | st.integers(0, 1),
    local_preference=st.none() | st.sampled_from([100, 200]),
    originator=st.none() | st.sampled_from([5, 77]),
)
announcements = st.builds(
    lambda peer, net, hop, made: Updated(peer, False, (), (Announced(net, hop),), made),
    st.sampled_from([A, B, C]),
    st.sampled_from(NETS),
    st.sampled_from(NEXT_HOPS),
    attributes,
)
withdrawals = st.builds(withdraw, st.sampled_from([A, B, C]), st.sampled_from(NETS))
topologies = st.sampled_from([TOPOLOGY, Topology([CONNECTED, DEFAULT]), Topology()])
GUARD = Guard(router_id=77, blocks=(parse_net("10.50.0.0/20"),), hosts=frozenset({NEXT_HOPS[-1]}))
guards = st.sampled_from([Guard(), GUARD])
steps = st.lists(announcements | withdrawals | topologies | guards | st.none(), max_size=25)


@settings(max_examples=100, deadline=None)
@given(steps, st.randoms(use_true_random=False))
def test_result_is_that_of_a_recomputation_in_any_order(
    steps: list[Updated | Topology | Guard | None], random: object
) -> None:
    """None in ``steps``: flush here. At the end: held paths into a new RIB, shuffled, at once."""
    routes, topology, guard = AdjRibIn(), Topology(), Guard()
    sessions = {A: session(), B: session(allowed=1), C: session(external=False)}
    routes.set_peers(sessions)
    rib = Rib(routes)
    told: dict[Net, Selection] = {}

    def flush() -> None:
        for net, selection in rib.flush().items():
            if selection is None:
                del told[net]  # only what was told may be taken back
            else:
                assert told.get(net) != selection  # and only changes are told
                told[net] = selection

    for step in steps:
        match step:
            case Updated():
                routes.updated(step)
            case Topology():
                topology = step
                rib.set_topology(step)
            case Guard():
                guard = step
                rib.set_guard(step)
            case None:
                flush()
    flush()
    fresh = AdjRibIn()
    fresh.set_peers(sessions)
    held = [
        Updated(p.peer, False, (), (Announced(net, p.next_hop),), p.attributes)
        for net, paths in routes.routes.items()
        for p in paths.values()
    ]
    random.shuffle(held)  # type: ignore[attr-defined]
    for event in held:
        fresh.updated(event)
    again = Rib(fresh)
    again.set_guard(guard)
    again.set_topology(topology)
    again.flush()
    assert told == again.selected == rib.selected
    assert {peer: rib.refusals(peer) for peer in sessions} == {
        peer: again.refusals(peer) for peer in sessions
    }
    assert +fresh.next_hops == +routes.next_hops
    for selection in told.values():
        assert selection.hops
        assert all(hop.gateway is not None and hop.ifindex == 2 for hop in selection.hops)
        assert all(p.next_hop.version == V4 for p in selection.paths)


def test_an_address_of_our_block_may_be_borrowed_by_another_node() -> None:
    block, host = parse_net("10.1.0.0/26"), parse_net("10.1.0.5/32")
    rib = make(announce(A, host), guard=Guard(blocks=(block,)))
    assert rib.selected[host].best.peer == A
    # a block of one address has nothing to lend
    rib = make(announce(A, host), guard=Guard(blocks=(host,)))
    assert rib.selected == {}


@st.composite
def prefixes(draw: st.DrawFn, of: tuple[Net, ...] = ()) -> Net:
    """A prefix, often a part or the whole of one of some, or one that contains it."""
    version, address, length = (
        draw(st.sampled_from(of)) if of else (draw(st.sampled_from((V4, V6))), 0, 0)
    )
    bits = BITS[version]
    random = draw(st.integers(0, (1 << bits) - 1))
    address |= random & ((1 << bits - length) - 1)
    shift = bits - draw(st.integers(0, bits))
    return Net(version, address >> shift << shift, bits - shift)


@settings(max_examples=300)
@given(st.data())
def test_who_is_not_looked_at_is_not_refused(data: st.DataObject) -> None:
    nets = tuple(data.draw(st.lists(prefixes(), min_size=5, max_size=5)))
    guard = Guard(
        1, None, nets[:2], frozenset(nets[2:3]), frozenset(nets[3:4]), frozenset(nets[4:])
    )
    net = data.draw(prefixes((*nets, *MARTIANS)))
    other = parse_net("192.0.2.1")
    assert net == other or not prefix_refusal(net, other, guard) or Vicinity(guard).has(net)
