"""What is kept of a peer's routes when its session, or ours, ends (RFC 4724)."""

from __future__ import annotations

from api.net import V4, Net, parse_net
from bird_glue.adj_rib_in import END_OF_RIB_SECONDS, UNMARKED_SECONDS, AdjRibIn
from bird_glue.decision import Session
from bird_glue.messages import Announced, Attributes, GracefulRestart, Opened, Updated

PEER = parse_net("10.0.0.1")
ONE, TWO = parse_net("10.50.0.0/24"), parse_net("10.51.0.0/24")
BOTH = frozenset((V4,))
NONE: frozenset[int] = frozenset()


def tell(routes: AdjRibIn, *nets: Net) -> None:
    announced = tuple(Announced(net, PEER) for net in nets)
    routes.updated(Updated(PEER, False, (), announced, Attributes()))


def come_up(routes: AdjRibIn, now: float, graceful: GracefulRestart | None, *nets: Net) -> None:
    routes.opened(Opened(PEER, 65001, 90, 1, graceful))
    routes.up(PEER, now)
    tell(routes, *nets)


def established(graceful: GracefulRestart | None) -> AdjRibIn:
    routes = AdjRibIn()
    routes.set_peers({PEER: Session(True, frozenset((64512,)))})
    come_up(routes, 0, graceful, ONE, TWO)
    if graceful:
        routes.end_of_rib(PEER, V4)
    return routes


KEEPING = GracefulRestart(30, False, BOTH, BOTH)


def held(routes: AdjRibIn) -> set[Net]:
    return set(routes.routes)


def test_routes_outlive_a_peer_that_restarts_gracefully_until_it_has_told_all() -> None:
    routes = established(KEEPING)
    routes.down(PEER, 10, graceful=True)
    assert held(routes) == {ONE, TWO}
    come_up(routes, 15, KEEPING, ONE)
    assert held(routes) == {ONE, TWO}
    routes.end_of_rib(PEER, V4)
    assert held(routes) == {ONE}
    assert routes.next_deadline() is None


def test_routes_go_when_the_peer_does_not_come_back_in_time() -> None:
    routes = established(KEEPING)
    routes.down(PEER, 10, graceful=True)
    assert routes.next_deadline() == 40
    routes.expire(39.9)
    assert held(routes) == {ONE, TWO}
    routes.down(PEER, 39.95, graceful=True)  # an attempt that failed changes nothing
    routes.expire(40)
    assert held(routes) == set()


def test_routes_go_when_the_peer_has_not_kept_forwarding() -> None:
    routes = established(KEEPING)
    routes.down(PEER, 10, graceful=True)
    routes.opened(Opened(PEER, 65001, 90, 1, GracefulRestart(30, True, BOTH, NONE)))
    routes.up(PEER, 11)
    assert held(routes) == set()


def test_routes_go_with_a_notification_or_without_the_capability() -> None:
    routes = established(KEEPING)
    routes.down(PEER, 10, graceful=False)
    assert held(routes) == set()
    routes = established(None)
    routes.down(PEER, 10, graceful=True)
    assert held(routes) == set()
    routes = established(GracefulRestart(30, False, NONE, NONE))  # a mere helper
    routes.down(PEER, 10, graceful=True)
    assert held(routes) == set()


def test_routes_outlive_a_restart_of_our_own_whatever_the_peer_can() -> None:
    for graceful, wait in ((KEEPING, END_OF_RIB_SECONDS), (None, UNMARKED_SECONDS)):
        routes = established(graceful)
        routes.restarted(10)
        assert held(routes) == {ONE, TWO}
        come_up(routes, 11, graceful, TWO)
        assert held(routes) == {ONE, TWO}
        routes.expire(11 + wait - 0.1)
        assert held(routes) == {ONE, TWO}
        routes.expire(11 + wait)
        assert held(routes) == {TWO}


def test_routes_go_when_our_own_restart_finds_the_peer_gone() -> None:
    routes = established(KEEPING)
    routes.restarted(10)
    routes.expire(10 + END_OF_RIB_SECONDS)
    assert held(routes) == set()


def test_a_dead_peer_keeps_nothing_and_is_not_waited_for() -> None:
    routes = established(KEEPING)
    assert routes.failed(PEER, independent=False)
    assert held(routes) == set()
    assert routes.complete(10)
    routes.down(PEER, 11, graceful=True)
    assert routes.next_deadline() is None
    assert routes.complete(11)
    come_up(routes, 12, KEEPING, ONE)
    assert held(routes) == {ONE}
    assert not routes.complete(12)
    assert not AdjRibIn().failed(PEER, independent=True)


def test_a_failure_while_the_peer_restarts_counts_where_its_detection_does_not_restart_too() -> (
    None
):
    routes = established(KEEPING)
    routes.down(PEER, 10, graceful=True)
    assert not routes.failed(PEER, independent=False)
    assert held(routes) == {ONE, TWO}
    assert not routes.failed(PEER, independent=True)
    assert held(routes) == set()


def test_complete_means_that_all_peers_have_told_all() -> None:
    routes = established(KEEPING)
    assert routes.complete(0)
    routes.restarted(10)
    assert not routes.complete(10)
    come_up(routes, 11, KEEPING)
    assert not routes.complete(100)
    routes.end_of_rib(PEER, V4)
    assert routes.complete(11)
    unmarked = established(None)
    assert not unmarked.complete(UNMARKED_SECONDS - 0.1)
    assert unmarked.complete(UNMARKED_SECONDS)


def used(routes: AdjRibIn) -> set[Net]:
    return {
        net
        for net, paths in routes.routes.items()
        if any(routes.peers[path.peer].session for path in paths.values())
    }


def test_routes_share_what_they_have_in_common_and_are_looked_at_in_order() -> None:
    """Thousands come in a few UPDATEs: what holds of one path is then found out once."""
    nets = [Net(V4, (10 << 24) + (count << 8), 24) for count in range(300, 0, -1)]
    routes = established(None)
    routes.changed.clear()
    tell(routes, *nets[:150])
    tell(routes, *nets[150:], nets[0])
    assert list(routes.changed) == nets
    assert len({id(routes.routes[net][PEER]) for net in nets}) == 1
    assert routes.next_hops == {PEER: len(held(routes))}
    other = parse_net("10.0.0.9")
    told = Updated(PEER, False, (nets[1],), (Announced(nets[0], other),), Attributes())
    routes.updated(told)
    assert routes.routes[nets[0]][PEER].next_hop == other
    assert routes.next_hops == {PEER: len(held(routes)) - 1, other: 1}


def test_routes_of_a_peer_that_is_no_longer_wanted_are_not_used() -> None:
    """They are kept while its session stands: it may be wanted again before that ends."""
    routes = established(KEEPING)
    sessions = {PEER: Session(True, frozenset((64512,)))}
    routes.changed.clear()
    routes.set_peers({})
    assert used(routes) == set()
    assert routes.changed.keys() == {ONE, TWO}
    assert routes.complete(0)
    routes.updated(Updated(PEER, False, (TWO,), (), Attributes()))
    routes.changed.clear()
    routes.set_peers(sessions)
    assert used(routes) == {ONE}
    assert routes.changed.keys() == {ONE}
    assert routes.complete(0)

    routes.set_peers({})
    routes.down(PEER, 1, graceful=True)
    assert held(routes) == set()
    assert not routes.peers
    assert not routes.next_hops


def test_restart_takes_peers_along_that_are_not_wanted() -> None:
    routes = established(KEEPING)
    routes.set_peers({})
    routes.restarted(1)
    assert not routes.peers
    assert held(routes) == set()


def test_what_was_not_told_again_does_not_outlive_the_next_restart() -> None:
    """RFC 4724 4.2: a route that was stale already MUST be deleted."""
    routes = established(KEEPING)
    routes.down(PEER, 10, graceful=True)
    come_up(routes, 15, KEEPING, ONE)
    routes.down(PEER, 20, graceful=True)  # before it marked the end
    assert held(routes) == {ONE}
    come_up(routes, 25, KEEPING)
    routes.down(PEER, 30, graceful=True)
    assert held(routes) == set()
    assert not routes.next_hops


INTERNAL = Attributes(local_preference=4_000_000_000, originator=7, clusters=(8, 9), med=5)


def attributes_of(routes: AdjRibIn) -> list[Attributes]:
    return [path.attributes for paths in routes.routes.values() for path in paths.values()]


def test_another_as_has_no_say_in_what_is_preferred_here() -> None:
    """RFC 4271 5.1.5: LOCAL_PREF of an external peer MUST be ignored; so what reflectors add."""
    told = Updated(PEER, False, (), (Announced(ONE, PEER),), INTERNAL)
    routes = established(None)
    routes.updated(Updated(PEER, False, (TWO,), (), Attributes()))
    routes.updated(told)
    assert attributes_of(routes) == [Attributes(med=5)]
    # also while it is not known to be wanted
    routes.set_peers({})
    routes.updated(told)
    assert attributes_of(routes) == [Attributes(med=5)]

    unknown = AdjRibIn()
    unknown.up(PEER, 0)
    unknown.updated(told)
    unknown.set_peers({PEER: Session(True, frozenset((64512,)))})
    assert attributes_of(unknown) == [Attributes(med=5)]

    internal = AdjRibIn()
    internal.set_peers({PEER: Session(False, frozenset((64512,)))})
    internal.up(PEER, 0)
    internal.updated(told)
    assert attributes_of(internal) == [INTERNAL]


def test_routes_go_when_the_session_and_the_link_have_gone() -> None:
    """Whichever goes first; a link that merely flaps ends nothing."""
    routes = established(KEEPING)
    routes.unplugged(PEER)
    assert held(routes) == {ONE, TWO}
    routes.down(PEER, 10, graceful=True)
    assert held(routes) == set()
    come_up(routes, 20, KEEPING, ONE)
    routes.down(PEER, 30, graceful=True)
    assert held(routes) == {ONE}
    routes.unplugged(PEER)
    assert held(routes) == set()


def test_ipv4_routes_of_an_ipv6_session_go_with_the_wish_for_them() -> None:
    peer, six = parse_net("fd00::1"), parse_net("fd50::/64")
    routes = AdjRibIn()
    routes.set_peers({peer: Session(True, frozenset((64512,)), extended=True)})
    both = GracefulRestart(30, False, frozenset((4, 6)), frozenset((4, 6)))
    routes.opened(Opened(peer, 65001, 90, 1, both))
    routes.up(peer, 0)
    for net in (ONE, six):
        routes.updated(Updated(peer, False, (), (Announced(net, peer),), Attributes()))
    routes.end_of_rib(peer, 6)
    assert not routes.complete(1)
    routes.end_of_rib(peer, 4)
    assert routes.complete(1)
    routes.set_peers({peer: Session(True, frozenset((64512,)))})
    assert held(routes) == {six}
