"""What is told to whom."""

from __future__ import annotations

from dataclasses import replace

from api.net import V4, Net, parse_net
from bird_glue.advertise import (
    LearnedRoute,
    Speaking,
    announcements,
    learned_announcement,
    own_announcements,
    own_routes,
)
from bird_glue.announcement import Announcement
from bird_glue.announcer import attribute_words
from bird_glue.decision import Path
from bird_glue.filters import AddCommunity, Filter, PrefixMatch, PrependAsPath, Rule
from bird_glue.messages import Attributes, Segment
from bird_glue.nexthops import Topology
from bird_glue.pools import PoolPolicy, Pools
from kernel.routes import PROTO_FELIX, Hop, Route

BLOCK, HIDDEN, OUTSIDE = (
    parse_net(text) for text in ("10.1.0.0/26", "10.2.0.0/26", "192.0.2.0/26")
)
POOLS = Pools(
    (
        PoolPolicy(parse_net("10.1.0.0/16"), exported=True, programmed=True),
        PoolPolicy(parse_net("10.2.0.0/16"), exported=False, programmed=True),
    )
)
METRICS = {4: 1024, 6: 1024}
ROUTER = Speaking(64512, external=True, priority=1024)
NODE = Speaking(64512, external=False, priority=1024)
CLIENT = Speaking(64512, external=False, priority=1024, cluster_id=9)
LEARNED = Attributes(
    origin=0,
    as_path=(Segment("as-sequence", (65001,)), Segment("as-set", (1, 2))),
    med=7,
    communities=("65001:7",),
    clusters=(5,),
)
PATH = Path(parse_net("10.0.0.1"), parse_net("10.0.0.9"), LEARNED)


def own(speaking: Speaking) -> dict[Net, str]:
    routes = own_routes((BLOCK, HIDDEN, OUTSIDE), (), POOLS, Topology(), METRICS)
    found = own_announcements(routes, V4, speaking)
    return {net: words(announcement, speaking) for net, announcement in found.items()}


def words(announcement: Announcement, to: Speaking) -> str:
    """As ExaBGP is told."""
    return attribute_words(announcement, to.asn if to.external else None)


def reflected(learned: Speaking, to: Speaking, path: Path = PATH) -> str | None:
    route = LearnedRoute(BLOCK, path, 0x0A000001, told=True)
    found = learned_announcement(route, learned, to, 9)
    return None if found is None else words(found, to)


def test_own_blocks_exactly_and_none_of_a_pool_that_is_not_exported() -> None:
    assert own(ROUTER) == dict.fromkeys((BLOCK, OUTSIDE), "next-hop self origin igp")
    # 2^31 - 1 - 1024, as a Calico node announces a route of normal priority
    preferred = "next-hop self origin igp local-preference 2147482623"
    assert own(NODE) == dict.fromkeys((BLOCK, OUTSIDE), preferred)
    assert own_announcements(own_routes((BLOCK,), (), POOLS, Topology(), METRICS), 6, NODE) == {}


def test_who_hears_of_a_learned_route() -> None:
    assert reflected(ROUTER, ROUTER) is None  # never transit
    assert reflected(NODE, NODE) is None  # RFC 4456 6
    assert reflected(CLIENT, NODE)
    assert reflected(NODE, CLIENT)
    assert reflected(CLIENT, CLIENT)
    assert reflected(ROUTER, NODE)
    assert reflected(CLIENT, ROUTER)


def test_reflection_between_nodes_keeps_the_route_and_marks_its_way() -> None:
    assert reflected(CLIENT, NODE) == (
        "next-hop 10.0.0.9 origin igp local-preference 100 med 7 "
        "as-path [ 65001 ( 1 2 ) ] community [ 65001:7 ] "
        "originator-id 10.0.0.1 cluster-list [ 0.0.0.9 0.0.0.5 ]"
    )


def test_towards_another_as_our_own_is_put_in_front() -> None:
    told = reflected(CLIENT, ROUTER)
    assert told == (
        "next-hop self origin igp as-path [ 64512 65001 ( 1 2 ) ] community [ 65001:7 ]"
    )
    keep = Speaking(64512, external=True, priority=1024, next_hop_keep=True)
    assert (reflected(CLIENT, keep) or "").startswith("next-hop 10.0.0.9 ")


def test_well_known_communities_are_honoured() -> None:
    for value in ("65535:65281", "65535:65283"):
        no_export = PATH._replace(attributes=Attributes(communities=(value,)))
        assert reflected(CLIENT, ROUTER, no_export) is None
        assert reflected(CLIENT, NODE, no_export)
    no_advertise = PATH._replace(attributes=Attributes(communities=("65535:65282",)))
    assert reflected(CLIENT, NODE, no_advertise) is None


def test_only_a_reflector_tells_on_inside_of_pools() -> None:
    def told(*, cluster_id: int | None, told: bool) -> bool:
        route = LearnedRoute(BLOCK, PATH, 1, told=told)
        return learned_announcement(route, CLIENT, ROUTER, cluster_id) is not None

    assert told(cluster_id=9, told=True)
    assert not told(cluster_id=9, told=False)
    assert not told(cluster_id=None, told=True)


HOST, OWN_HOST, STATIC, LAN = (
    parse_net(text) for text in ("10.1.5.7", "10.1.0.7", "198.51.100.0/24", "10.0.0.0/24")
)
TOPOLOGY = Topology(
    [
        Route(HOST, (Hop(7),), protocol=PROTO_FELIX),
        Route(OWN_HOST, (Hop(7),), protocol=PROTO_FELIX),
        Route(parse_net("10.2.0.9"), (Hop(7),), protocol=PROTO_FELIX),
        Route(parse_net("192.0.2.99"), (Hop(7),), protocol=PROTO_FELIX),
        Route(parse_net("10.1.9.9"), (Hop(8, 5),), protocol=PROTO_FELIX),  # a tunnel's
        Route(STATIC, (Hop(2, 1),), protocol=4),
        Route(LAN, (Hop(2),), protocol=4),
        Route(parse_net("172.17.0.0/16"), (Hop(3),), protocol=4),
        Route(parse_net("169.254.1.1"), (Hop(7),), protocol=4),
    ],
    names={2: "eth0", 3: "docker0", 7: "cali1", 8: "vxlan.calico"},
)


def all_told(speaking: Speaking, *, services: tuple[Net, ...] = ()) -> set[Net]:
    routes = own_routes((BLOCK, HIDDEN), services, POOLS, TOPOLOGY, METRICS, ("docker*",))
    return set(own_announcements(routes, V4, speaking))


def test_addresses_of_pods_outside_of_own_blocks() -> None:
    """Borrowed ones: inside of a pool that is announced, and routed to a pod here."""
    assert all_told(NODE) == all_told(ROUTER) == {BLOCK, HOST}
    service = parse_net("10.96.0.0/12")
    assert all_told(ROUTER, services=(service,)) == {BLOCK, HOST, service}


def test_pods_whose_routes_are_better_than_normal() -> None:
    """A machine that moves here from another node: its address goes before the block's."""
    routes = [
        Route(parse_net(text), (Hop(7),), protocol=PROTO_FELIX, metric=metric)
        for text, metric in (("10.1.0.8", 512), ("10.1.0.9", 1024), ("10.2.0.8", 512))
    ]
    found = own_routes((BLOCK, HIDDEN), (), POOLS, Topology(routes), METRICS)
    told = {
        net: announcement.attributes.local_preference
        for net, announcement in own_announcements(found, V4, NODE).items()
    }
    assert told == {BLOCK: 2147482623, parse_net("10.1.0.8"): 2147483647 - 512}


def with_rules(speaking: Speaking, *rules: Rule) -> Speaking:
    return replace(speaking, filters=(Filter("f", export_v4=rules),))


def test_a_filter_takes_away_and_adds() -> None:
    none = with_rules(ROUTER, Rule(accept=False))
    assert all_told(none) == set()
    every = with_rules(ROUTER, Rule(accept=True))
    # what the kernel has, but no pods inside of own blocks, no link-local, no ignored interface
    assert all_told(every) == {BLOCK, HIDDEN, HOST, STATIC, LAN, parse_net("192.0.2.99")}
    by_interface = with_rules(ROUTER, Rule(accept=True, interface="eth*"))
    assert all_told(by_interface) == {BLOCK, HOST, STATIC, LAN}
    learned = with_rules(ROUTER, Rule(accept=False, remote=True))
    assert all_told(learned) == {BLOCK, HOST}
    assert all_told(replace(ROUTER, filters=(Filter("gone", missing=True),))) == set()


def test_a_filter_lets_learned_routes_through_where_bgp_permits() -> None:
    accept = Rule(accept=True, prefix=PrefixMatch(BLOCK, 26, 32), remote=True)

    def told(learned: Speaking, to: Speaking, cluster_id: int | None = None) -> bool:
        route = LearnedRoute(BLOCK, PATH, 1, told=False)
        return learned_announcement(route, learned, with_rules(to, accept), cluster_id) is not None

    assert told(ROUTER, ROUTER)
    assert told(NODE, ROUTER)
    assert told(ROUTER, NODE)
    assert not told(NODE, NODE)  # RFC 4456 6
    assert not told(NODE, NODE, cluster_id=9)
    assert told(CLIENT, NODE, cluster_id=9)


def test_what_a_filter_changes() -> None:
    operations = (AddCommunity("65001:7"), AddCommunity("1:2:3"), PrependAsPath((64512, 64513)))
    changing = Rule(accept=True, operations=operations)
    assert own(with_rules(ROUTER, changing))[BLOCK] == (
        "next-hop self origin igp as-path [ 64512 64512 64513 ] "
        "community [ 65001:7 ] large-community [ 1:2:3 ]"
    )


def test_ipv4_routes_over_ipv6_for_who_is_to_have_them() -> None:
    """RFC 8950. Over IPv4 an IPv6 next hop becomes our own."""
    six, four = parse_net("fd00::1"), parse_net("10.0.0.7")
    block = parse_net("fd10::/122")
    routes = own_routes((BLOCK, block), (), POOLS, Topology(), METRICS)
    both = replace(NODE, ipv4_priority=100)
    told = announcements(routes, (), {six: both, four: NODE, PATH.peer: ROUTER}, None)
    assert told[four].keys() == {BLOCK}
    assert told[six].keys() == {BLOCK, block}
    assert told[six][block].attributes.local_preference == 2147483647 - 1024
    assert told[six][BLOCK].attributes.local_preference == 2147483647 - 100
    route = LearnedRoute(BLOCK, PATH._replace(next_hop=six), 1, told=True)
    for to, expected in ((CLIENT, None), (replace(CLIENT, ipv4_priority=1), six)):
        found = learned_announcement(route, CLIENT, to, 9)
        assert found
        assert found.next_hop == expected


def test_communities_of_prefixes() -> None:
    communities = (
        (parse_net("10.1.0.0/16"), ("65001:1", "1:2:3")),
        (BLOCK, ("65001:2", "65001:1")),
        (OUTSIDE, ("65001:9",)),
    )
    speaking = replace(ROUTER, communities=communities)
    assert own(speaking) == {
        BLOCK: ("next-hop self origin igp community [ 65001:1 65001:2 ] large-community [ 1:2:3 ]"),
        OUTSIDE: "next-hop self origin igp community [ 65001:9 ]",
    }
    # as Calico: what a filter accepts is told as the filter leaves it
    accepted = with_rules(speaking, Rule(accept=True))
    assert own(accepted)[BLOCK] == "next-hop self origin igp"
