"""Guard, pools and BGPFilters decide the same in BIRD's language and in Python.

A real BIRD is given drawn routes in a table, and a pipe with each drawn filter from there to a
table of its own; what is in those is what the filters let pass. Routes in a table are not
BGP's, so for the test the filters take static ones for learned ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from api.net import V4, V6, Net, format_address, parse_net
from bird_glue.advertise import LearnedRoute, Speaking, learned_announcement
from bird_glue.bird_config import export_body
from bird_glue.bird_filters import (
    EXTERNAL,
    WORKLOAD,
    block,
    community,
    forbidden,
    import_body,
    pool_functions,
)
from bird_glue.bird_routes import parse_routes
from bird_glue.birdc import Birdc, BirdError
from bird_glue.decision import Guard, Session, refusal
from bird_glue.decision import Path as RoutePath
from bird_glue.filters import (
    AddCommunity,
    Direction,
    Filter,
    PrefixMatch,
    PrependAsPath,
    RouteFacts,
    Rule,
    SetLocalPreference,
    evaluate,
    preference_of,
)
from bird_glue.messages import Attributes, Segment
from bird_glue.pools import PoolPolicy, Pools
from kernel.netns import Namespace
from tests.bird_glue.world import Process
from tests.support.netns import connect, eventually, fresh_namespace

COMMUNITIES = ("65001:7", "65001:8", "1:2:3", "4:5:6")
ASNS = (64512, 65001, 65002)
PREFERENCES = (100, 200, 2147482623)
GUARD = Guard(
    router_id=1,
    blocks=(parse_net("10.1.0.0/26"), parse_net("10.1.7.7/32"), parse_net("fd00:1::/122")),
    hosts=frozenset(map(parse_net, ("127.0.0.1", "172.31.1.11", "10.1.9.1", "::1", "fd00::11"))),
    subnets=frozenset(
        map(parse_net, ("10.1.9.0/24", "10.1.8.0/21", "0.0.0.0/0", "fd00::/64", "::/0"))
    ),
    neighbours=frozenset(map(parse_net, ("10.1.9.7", "10.1.10.130", "fd00::7"))),
)
POOLS = Pools(
    (
        PoolPolicy(parse_net("10.1.0.0/16"), exported=True, programmed=True),
        PoolPolicy(parse_net("10.2.0.0/16"), exported=False, programmed=True),
        PoolPolicy(parse_net("fd00:1::/48"), exported=True, programmed=False),
    ),
    services=(parse_net("10.3.0.0/24"),),
    told_on=(parse_net("10.3.0.0/24"),),
)
PREFIXES = {
    V4: (
        "0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.0.0/26", "10.1.0.32/27", "10.1.0.5/32",
        "10.1.7.7/32", "10.1.9.0/24", "10.1.9.1/32", "10.1.9.0/25", "10.2.3.0/26", "10.3.0.0/24",
        "10.3.0.7/32", "10.77.0.1/32", "10.1.9.7/32", "10.1.9.9/32", "10.1.9.128/25",
        "10.1.10.128/30", "10.1.10.0/24", "10.1.11.0/24", "10.1.8.0/21", "10.1.0.0/20",
        "192.0.2.0/24", "192.0.2.128/25", "203.0.113.9/32",
    ),
    V6: (
        "::/0", "fd00::/64", "fd00::11/128", "fd00:1::/122", "fd00:1::10/124", "fd00:1::5/128",
        "fd00:1:0:9::/64", "fd00::7/128", "fd00::9/128", "fd00::/65", "fd00::8000:0:0:0/65",
        "2001:db8::/32", "2001:db8:5::/48", "2001:db8::9/128",
    ),
}  # fmt: skip
NEXT_HOPS = {
    V4: (
        "172.31.1.1", "172.31.1.11", "10.77.0.1", "172.31.1.1", "10.9.0.1",
        "127.0.0.1", "224.0.0.1", "0.1.2.3", "240.0.0.1",
        "0.255.255.255", "1.0.0.0", "126.255.255.255", "127.255.255.255", "128.0.0.0",
        "223.255.255.255", "255.255.255.255",
    ),
    V6: (
        "fd00::1", "fd00::11", "fd00::3", "fd00::5", "::1", "ff02::1",
        "::2", "feff:ffff::1", "ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    ),
}  # fmt: skip
CIDRS = {
    V4: ("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.0.0/26", "192.0.2.0/24", "10.1.0.5/32"),
    V6: ("::/0", "fd00::/16", "fd00:1::/122", "2001:db8::/32", "2001:db8::9/128"),
}

Told = Mapping[Net, Attributes]


@st.composite
def matches(draw: st.DrawFn, version: int) -> PrefixMatch:
    net = parse_net(draw(st.sampled_from(CIDRS[version])))
    bits = 32 if version == V4 else 128
    shortest = draw(st.integers(net.length, bits))
    longest = draw(st.sampled_from((net.length, bits, (net.length + bits) // 2)))
    return PrefixMatch(net, shortest, longest, draw(st.booleans()))


OPERATIONS = st.one_of(
    st.builds(AddCommunity, st.sampled_from(COMMUNITIES)),
    st.builds(PrependAsPath, st.lists(st.sampled_from(ASNS), min_size=1, max_size=3).map(tuple)),
    st.builds(SetLocalPreference, st.sampled_from(PREFERENCES)),
)


def rules(version: int) -> st.SearchStrategy[Rule]:
    return st.builds(
        Rule,
        accept=st.booleans(),
        prefix=st.none() | matches(version),
        remote=st.booleans(),
        interface=st.sampled_from(("", "", "eth*", "eth0", "*", "lan.*-1")),
        external=st.sampled_from((None, None, True, False)),
        community=st.sampled_from(("", "", *COMMUNITIES)),
        as_path=st.sampled_from(((), (), (65001,), (65001, 65002))),
        local_preference=st.sampled_from((None, None, *PREFERENCES)),
        operations=st.lists(OPERATIONS, max_size=3).map(tuple),
    )


def filters(version: int) -> st.SearchStrategy[tuple[Filter, ...]]:
    drawn = st.lists(rules(version), min_size=1, max_size=4).map(tuple)
    one = st.builds(lambda found: Filter("f", found, found, found, found), drawn)
    missing = st.just(Filter("gone", missing=True))
    return st.lists(st.one_of(one, one, one, missing), max_size=2).map(tuple)


ATTRIBUTES = st.builds(
    Attributes,
    origin=st.just(0),
    as_path=st.lists(st.sampled_from(ASNS), max_size=3).map(
        lambda asns: (Segment("as-sequence", tuple(asns)),) if asns else ()
    ),
    med=st.sampled_from((None, 5)),
    local_preference=st.sampled_from(PREFERENCES),
    communities=st.lists(st.sampled_from(COMMUNITIES[:2]), unique=True).map(tuple),
    large_communities=st.lists(st.sampled_from(COMMUNITIES[2:]), unique=True).map(tuple),
)


@st.composite
def routes(draw: st.DrawFn, version: int) -> dict[Net, tuple[RoutePath, str, bool]]:
    """By prefix: the path, the interface it leaves by, and whether it came over eBGP."""
    nets = draw(st.lists(st.sampled_from(PREFIXES[version]), min_size=6, unique=True))
    peer = parse_net("172.31.1.1" if version == V4 else "fd00::1")
    found = {}
    for text in nets:
        next_hop = parse_net(draw(st.sampled_from(NEXT_HOPS[version])))
        path = RoutePath(peer, next_hop, draw(ATTRIBUTES))
        found[parse_net(text)] = path, draw(st.sampled_from(INTERFACES)), draw(st.booleans())
    return found


INTERFACES = ("eth0", "lan.5-1")


@pytest.fixture(scope="module")
def stage() -> Iterator[Namespace]:
    with fresh_namespace() as here, fresh_namespace() as there:
        for name in INTERFACES:
            connect(here, name, there, name)
        yield here


def static(net: Net, path: RoutePath, interface: str, external: bool) -> str:
    attributes = path.attributes
    words = [
        f"bgp_next_hop = {format_address(*path.next_hop[:2])};",
        "bgp_origin = ORIGIN_IGP;",
        f"bgp_local_pref = {attributes.local_preference};",
        "bgp_path = +empty+;",
    ]
    words += [f"bgp_path.prepend({asn});" for s in attributes.as_path for asn in reversed(s.asns)]
    words += [f"bgp_community.add({community(text)});" for text in attributes.communities]
    words += [
        f"bgp_large_community.add({community(text)});" for text in attributes.large_communities
    ]
    if attributes.med is not None:
        words.append(f"bgp_med = {attributes.med};")
    if external:
        words.append(f"{EXTERNAL} = 1;")
    return f'route {net} via "{interface}" {{ {" ".join(words)} }};'


def configuration(
    version: int, drawn: Mapping[Net, tuple[RoutePath, str, bool]], bodies: Sequence[list[str]]
) -> str:
    """One table with all routes, and one behind each filter."""
    family = f"ipv{version}"
    text = (
        f"router id 1.1.1.1;\nattribute int manx_announced;\nattribute int {EXTERNAL};\n"
        f"attribute int {WORKLOAD};\n"
        f"{family} table drawn;\nprotocol device {{ }}\n"
    )
    text += forbidden(GUARD, version) + pool_functions(POOLS, version)
    lines = [f"{family} {{ table drawn; }};", *(static(net, *how) for net, how in drawn.items())]
    text += block("protocol static", lines)
    for number, body in enumerate(bodies):
        # not BGP's own here, see above
        lines = [
            line.replace("RTS_STATIC", "RTS_OSPF").replace("RTS_BGP", "RTS_STATIC") for line in body
        ]
        text += f"{family} table passed{number};\n" + block(f"filter drawn{number}", lines)
        pipe = f"table drawn; peer table passed{number}; import none; export filter drawn{number};"
        text += f"protocol pipe pipe{number} {{ {pipe} }}\n"
    return text


def passed(birdc: Birdc, number: int) -> Told:
    """What is in a table, read from BIRD's text."""
    shown = parse_routes(birdc.ask(f"show route table passed{number} all"))
    return {route.net: route.attributes for route in shown}


def sorted_communities(told: Told) -> dict[Net, tuple[object, ...]]:
    """For comparison: the order of communities means nothing."""
    return {
        net: (
            a.as_path,
            a.med,
            a.local_preference,
            sorted(a.communities),
            sorted(a.large_communities),
        )
        for net, a in told.items()
    }


def compare(stage: Namespace, directory: Path, text: str, expected: Sequence[Told]) -> None:
    """Run BIRD on the configuration; what passes its filters must be what is expected."""
    path, control = directory / "bird.conf", directory / "b"
    path.write_text(text)
    control.unlink(missing_ok=True)
    log = directory / "bird.log"
    log.unlink(missing_ok=True)
    wanted = [sorted_communities(told) for told in expected]
    with Process(stage, "bird", "-f", "-c", str(path), "-s", str(control), log=log):
        eventually(control.exists)
        deadline = time.monotonic() + 10
        while True:
            try:
                with Birdc(control) as birdc:
                    found = [sorted_communities(passed(birdc, n)) for n in range(len(expected))]
            except BirdError:
                found = []
            if found == wanted or time.monotonic() > deadline:
                break
            time.sleep(0.01)

    assert found == wanted, f"{text}\n{log.read_text()}"


def merged(attributes: Attributes) -> Attributes:
    """AS path as one sequence."""
    asns = tuple(asn for segment in attributes.as_path for asn in segment.asns)
    path = (Segment("as-sequence", asns),) if asns else ()
    return Attributes(
        0,
        path,
        attributes.med,
        attributes.local_preference,
        attributes.communities,
        attributes.large_communities,
    )


QUICK = settings(
    max_examples=25,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a failing one takes ten seconds
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("version", [V4, V6])
@QUICK
@given(data=st.data())
def test_imports(stage: Namespace, tmp_path: Path, version: int, data: st.DataObject) -> None:
    drawn = data.draw(routes(version))
    sessions = data.draw(
        st.lists(
            st.builds(
                Session,
                external=st.booleans(),
                own_asns=st.sampled_from((frozenset((64512,)), frozenset((64512, 65002)))),
                allowed=st.integers(0, 1),
                filters=filters(version),
            ),
            min_size=8,
            max_size=8,
        )
    )
    expected: list[Told] = []
    for session in sessions:
        told = {}
        for net, (path, interface, _) in drawn.items():
            facts = RouteFacts(net, path.attributes, session.external, True, interface)
            decision = evaluate(session.filters, Direction.IMPORT, facts)
            if not refusal(net, path, session, GUARD) and decision.accept is not False:
                told[net] = merged(decision.attributes)
        expected.append(told)
    bodies = [import_body(session, version) for session in sessions]
    compare(stage, tmp_path, configuration(version, drawn, bodies), expected)


@pytest.mark.parametrize("version", [V4, V6])
@QUICK
@given(data=st.data())
def test_exports(stage: Namespace, tmp_path: Path, version: int, data: st.DataObject) -> None:
    """Of learned routes, but for what BIRD does by itself: the AS in front, iBGP to iBGP."""
    drawn = data.draw(routes(version))
    peers = data.draw(
        st.lists(
            st.builds(
                Speaking,
                asn=st.just(64512),
                external=st.booleans(),
                priority=st.just(1024),
                cluster_id=st.just(9),
                filters=filters(version),
                communities=st.sampled_from(
                    ((), ((parse_net("10.1.0.0/16"), ("65001:7", "1:2:3")),))
                ),
            ),
            min_size=8,
            max_size=8,
        )
    )
    reflects = data.draw(st.booleans())
    expected: list[Told] = []
    for peer in peers:
        told = {}
        for net, (path, interface, external) in drawn.items():
            learned = Speaking(64512, external=external, priority=1024, cluster_id=9)
            if not (reflects or external or peer.external):
                learned = Speaking(64512, external=True, priority=1024)
            route = LearnedRoute(net, path, 7, POOLS.exports_learned(net), interface)
            announcement = learned_announcement(route, learned, peer, 9 if reflects else None)
            if announcement is not None:
                facts = RouteFacts(net, path.attributes, peer.external, True, interface)
                changed = evaluate(peer.filters, Direction.EXPORT, facts).attributes
                attributes = merged(announcement.attributes)
                # eBGP carries neither; the engine leaves them out, not its filter
                told[net] = Attributes(
                    0,
                    attributes.as_path,
                    path.attributes.med,
                    preference_of(changed),
                    attributes.communities,
                    attributes.large_communities,
                )
        expected.append(told)
    local = parse_net("172.31.1.11" if version == V4 else "fd00::11")
    bodies = [export_body(peer, local, version, {}, reflects=reflects) for peer in peers]
    compare(stage, tmp_path, configuration(version, drawn, bodies), expected)
