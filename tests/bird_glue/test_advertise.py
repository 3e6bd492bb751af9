"""What is told to whom."""

from __future__ import annotations

from api.net import V4, Net, parse_net
from bird_glue.advertise import Speaking, own_announcements, reflected_announcement
from bird_glue.announcement import Announcement
from bird_glue.announcer import attribute_words
from bird_glue.decision import Path
from bird_glue.messages import Attributes, Segment
from bird_glue.pools import PoolPolicy, Pools

BLOCK, HIDDEN, OUTSIDE = (
    parse_net(text) for text in ("10.1.0.0/26", "10.2.0.0/26", "192.0.2.0/26")
)
POOLS = Pools(
    [
        PoolPolicy(parse_net("10.1.0.0/16"), exported=True, programmed=True),
        PoolPolicy(parse_net("10.2.0.0/16"), exported=False, programmed=True),
    ]
)
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
    found = own_announcements((BLOCK, HIDDEN, OUTSIDE), POOLS, V4, speaking)
    return {net: words(announcement, speaking) for net, announcement in found.items()}


def words(announcement: Announcement, to: Speaking) -> str:
    """As ExaBGP is told."""
    return attribute_words(announcement, to.asn if to.external else None)


def reflected(learned: Speaking, to: Speaking, path: Path = PATH) -> str | None:
    found = reflected_announcement(path, learned, to, own_cluster_id=9, router_id=0x0A000001)
    return None if found is None else words(found, to)


def test_own_blocks_exactly_and_none_of_a_pool_that_is_not_exported() -> None:
    assert own(ROUTER) == dict.fromkeys((BLOCK, OUTSIDE), "next-hop self origin igp")
    # 2^31 - 1 - 1024, as a Calico node announces a route of normal priority
    preferred = "next-hop self origin igp local-preference 2147482623"
    assert own(NODE) == dict.fromkeys((BLOCK, OUTSIDE), preferred)
    assert own_announcements((BLOCK,), POOLS, 6, NODE) == {}


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
    no_export = PATH._replace(attributes=Attributes(communities=("65535:65281",)))
    assert reflected(CLIENT, ROUTER, no_export) is None
    assert reflected(CLIENT, NODE, no_export)
    no_advertise = PATH._replace(attributes=Attributes(communities=("65535:65282",)))
    assert reflected(CLIENT, NODE, no_advertise) is None
